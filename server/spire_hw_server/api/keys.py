"""The keys this server signs with: where they live, and evidence about that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw._pb import hw_keys_pb2 as pb
from spire_hw.errors import InvalidInputError
from spire_hw.transport.peer import UnixPeer

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.plugin.keymanager import RetainedKey
    from spire_hw.rpc.service import Call
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.ca.custody import Custodian, ListedKey

_MAX_ID: Final = 255
_MAX_CERTIFICATES: Final = 4
_MAX_COMMENT: Final = 400


class KeysService:
    """`spire_hw.server.v1.Keys`."""

    def __init__(self, *, custodian: Custodian, audit: Audit) -> None:
        self._custodian = custodian
        self._audit = audit

    async def list_keys(self, request: pb.ListKeysRequest, call: Call) -> pb.ListKeysResponse:
        """Return all keys."""
        del request, call
        listed = await self._custodian.list()
        kept = await self._custodian.retained.list()
        return pb.ListKeysResponse(
            keys=[_encode(key) for key in listed], retained=[_encode_retained(key) for key in kept]
        )

    async def get_key(self, request: pb.GetKeyRequest, call: Call) -> pb.Key:
        """Return one key."""
        del call
        return _encode(await self._custodian.get(_checked(request.id)))

    async def attest_key(self, request: pb.AttestKeyRequest, call: Call) -> pb.AttestKeyResponse:
        """Return signed evidence about a key."""
        self._audit.note(call, key_id=request.id[:_MAX_ID])
        if len(request.attestation) > _MAX_CERTIFICATES:
            raise InvalidInputError(f"an attestation has at most {_MAX_CERTIFICATES} certificates")
        evidence = await self._custodian.attest(
            _checked(request.id), request.nonce, tuple(request.attestation)
        )
        return pb.AttestKeyResponse(evidence=evidence)

    async def restore_key(self, request: pb.RestoreKeyRequest, call: Call) -> pb.Key:
        """Make a replaced generation current again."""
        self._audit.note(call, key_id=request.id[:_MAX_ID], generation=request.generation)
        key_id = _checked(request.id)
        await self._custodian.retained.restore(
            key_id, request.generation, by=_operator(call), comment=_comment(request.comment)
        )
        return _encode(await self._custodian.get(key_id))

    async def destroy_key(self, request: pb.DestroyKeyRequest, call: Call) -> pb.DestroyKeyResponse:
        """Destroy a replaced generation before its time."""
        self._audit.note(call, key_id=request.id[:_MAX_ID], generation=request.generation)
        await self._custodian.retained.destroy(
            _checked(request.id),
            request.generation,
            by=_operator(call),
            comment=_comment(request.comment),
        )
        return pb.DestroyKeyResponse()


def _operator(call: Call) -> str:
    peer = call.peer
    return f"uid {peer.process.uid}" if isinstance(peer, UnixPeer) else "unknown"


def _comment(text: str) -> str:
    if len(text) > _MAX_COMMENT:
        raise InvalidInputError(f"a comment has at most {_MAX_COMMENT} characters")
    return text


def _checked(key_id: str) -> str:
    if not key_id or len(key_id) > _MAX_ID:
        raise InvalidInputError("key id is required")
    return key_id


def _encode(key: ListedKey) -> pb.Key:
    report, evidence = key.report, key.report.evidence
    role = key.role
    return pb.Key(
        id=report.key_id,
        type=key.key_type.config_name,
        fingerprint=report.fingerprint,
        public_key=report.spki,
        custody=evidence.words,
        location=evidence.location,
        device=evidence.device,
        token=evidence.token,
        generation=evidence.generation,
        created_at=_seconds(evidence.created),
        last_used_at=_seconds(report.last_used),
        attributes=evidence.attributes,
        authority=None
        if role is None
        else pb.Authority(kind=role.kind, id=role.authority_id, status=role.status),
        trouble=key.trouble,
    )


def _encode_retained(kept: RetainedKey) -> pb.RetainedKey:
    return pb.RetainedKey(
        id=kept.info.key_id,
        type=kept.info.key_type.config_name,
        fingerprint=kept.info.fingerprint,
        generation=kept.generation,
        until=int(kept.until),
    )


def _seconds(moment: datetime | None) -> int:
    return 0 if moment is None else int(moment.timestamp())

"""What operators may do on the signer's own host, over a unix socket.

Only root and the signer's own user are listened to; the socket's mode says the same.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from spire_hw import __version__
from spire_hw._pb import hw_signer_admin_pb2 as pb
from spire_hw._pb import hw_signer_pb2
from spire_hw.errors import DeniedError, InvalidInputError, SpireHwError
from spire_hw.key import spki_der
from spire_hw.plugin.keymanager import KeyRetention, Keys
from spire_hw.rpc.service import bind
from spire_hw.transport.peer import UnixPeer
from spire_hw_signer.admission import describe
from spire_hw_signer.attesting import NAME
from spire_hw_signer.orders import Action
from spire_hw_signer.telling import custody_message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.plugin.keymanager import KeyInfo
    from spire_hw.rpc.service import Call, Method
    from spire_hw_signer.actions import Actions
    from spire_hw_signer.attesting import Attesting
    from spire_hw_signer.audit.chain import LogHead
    from spire_hw_signer.audit.checkpoint import Checkpoints
    from spire_hw_signer.audit.log import AuditLog
    from spire_hw_signer.devicelog.drain import DeviceLog
    from spire_hw_signer.keys import HeldKey, OwnerKeys
    from spire_hw_signer.live import Live
    from spire_hw_signer.revocations import Revocations

_ROOT: Final = 0
_MAX_CERTIFICATES: Final = 4
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["SignerAdmin"]


class SignerAdmin:
    """`spire_hw.signer.v1.SignerAdmin`."""

    def __init__(
        self,
        name: str,
        audit: AuditLog,
        checkpoints: Checkpoints,
        live: Live,
        *,
        revocations: Revocations,
        actions: Actions,
        attesting: Attesting,
        device_log: DeviceLog | None,
    ) -> None:
        """Make it.

        Args:
            name: of the signer.
            audit: the audit log.
            checkpoints: of it.
            live: policy and keys.
            revocations: who is shut out.
            actions: what can be done.
            attesting: evidence about keys.
            device_log: what the device logs itself, None where that is not read.
        """
        self._name = name
        self._audit = audit
        self._checkpoints = checkpoints
        self._live = live
        self._revocations = revocations
        self._actions = actions
        self._attesting = attesting
        self._device_log = device_log

    async def get_status(self, request: Any, call: Call) -> Any:
        """Return how the signer is."""
        del request
        _check_peer(call)
        operators = self._actions.operators
        return pb.Status(
            name=self._name,
            version=__version__,
            log_head=_head(self._audit.head),
            log_id=self._audit.log_id,
            log_directory=str(self._audit.directory),
            log_trouble=self._audit.trouble,
            checkpoint=self._checkpoints.last,
            checkpoint_trouble=self._checkpoints.trouble,
            log_key=self._checkpoints.log_key,
            clock_fault=self._checkpoints.clock_fault,
            policy=self._live.policy.hash,
            places=[
                pb.Status.Place(name=place.name, trouble=place.trouble)
                for place in self._checkpoints.places
            ],
            operators=sorted(operators.keys),
            required=operators.required,
            revoked=sorted(self._live.policy.revoked | self._revocations.identities),
            device_log_trouble=None if self._device_log is None else self._device_log.trouble,
        )

    async def list_keys(self, request: Any, call: Call) -> Any:
        """List the keys of all owners, retained ones too."""
        del request
        _check_peer(call)
        found: list[pb.AdminKey] = []
        for owner, keys in self._live.owners.items():
            found += await _keys_of(str(owner), keys)
        return pb.ListKeysResponse(keys=found)

    async def attest_key(self, request: Any, call: Call) -> Any:
        """Return signed evidence of where a key is."""
        _check_peer(call)
        if len(request.attestation) > _MAX_CERTIFICATES:
            raise InvalidInputError(f"an attestation has at most {_MAX_CERTIFICATES} certificates")
        evidence = await self._attesting.attest(
            request.key, request.nonce, tuple(request.attestation)
        )
        return pb.AttestKeyResponse(evidence=evidence)

    async def carry_out(self, request: Any, call: Call) -> Any:
        """Carry out an action."""
        by = _check_peer(call)
        match request.WhichOneof("what"):
            case "order":
                done = await self._actions.order(request.order, by)
            case "direct":
                asked = request.direct
                action = Action.parse(asked.action)
                done = await self._actions.direct(action, asked.target, asked.comment, by)
            case _:
                raise InvalidInputError("an order or an action is required")
        return pb.CarryOutResponse(
            action=done.action.value,
            target=done.target,
            message=done.message,
            log_head=_head(done.head),
        )


def admin_methods(service: SignerAdmin) -> Sequence[Method]:
    """Return the methods of the admin socket."""
    return bind(_SERVICE, service)


def _check_peer(call: Call) -> str:
    """Return who calls, in words; only root and the user of this process may."""
    peer = call.peer
    if not isinstance(peer, UnixPeer) or peer.process.uid not in {_ROOT, os.geteuid()}:
        raise DeniedError("only root and the signer's own user may do this")
    return describe(peer)


async def _keys_of(owner: str, keys: OwnerKeys) -> list[pb.AdminKey]:
    found = [await _current(owner, keys, held) for held in await keys.refresh()]
    if isinstance(keys.manager, KeyRetention):
        found += [
            pb.AdminKey(
                owner=owner,
                public_key=_key(kept.info),
                generation=kept.generation,
                retained=True,
                retained_until=int(kept.until),
            )
            for kept in await keys.manager.retained_keys()
        ]
    return found


async def _current(owner: str, keys: OwnerKeys, held: HeldKey) -> pb.AdminKey:
    one = pb.AdminKey(owner=owner, public_key=_key(held.info), generation=held.generation)
    try:
        evidence = await Keys(keys.manager, NAME).evidence(held.info.key_id)
    except SpireHwError as e:
        one.trouble = e.message
    else:
        one.custody.CopyFrom(custody_message(evidence))
        # What was made days ago is not on note any more.
        one.generation = one.generation or evidence.generation
    return one


def _key(info: KeyInfo) -> Any:
    number: Any = info.key_type.value
    return hw_signer_pb2.PublicKey(
        id=info.key_id,
        type=number,
        pkix_data=spki_der(info.public_key),
        fingerprint=info.fingerprint,
    )


def _head(head: LogHead) -> Any:
    return hw_signer_pb2.LogHead(seq=head.seq, hash=head.hash)

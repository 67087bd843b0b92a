"""Which TPMs are enrolled by the hash of their endorsement key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from spire_hw._pb import hw_admin_pb2 as pb
from spire_hw.errors import AlreadyExistsError, InvalidInputError
from spire_hw.rpc import convert
from spire_hw_server.datastore.interface import EnrolledEk

if TYPE_CHECKING:
    from spire_hw.rpc.service import Call
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.datastore.interface import Datastore

MAX_COMMENT: Final = 1024
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


class TpmService:
    """`spire_hw.server.v1.Tpm`."""

    def __init__(self, *, store: Datastore, audit: Audit) -> None:
        self._store = store
        self._audit = audit

    async def allow_ek(self, request: pb.AllowEkRequest, call: Call) -> pb.EnrolledEk:
        """Enrol a TPM."""
        self._audit.note(call, ek_hash=request.ek_hash)
        ek_hash = _checked(request.ek_hash)
        if len(request.comment) > MAX_COMMENT:
            raise InvalidInputError(f"comment is longer than {MAX_COMMENT} characters")
        if await self._store.is_ek_allowed(ek_hash):
            raise AlreadyExistsError(f"TPM {ek_hash} is enrolled already")
        ek = await self._store.allow_ek(EnrolledEk(ek_hash, request.comment))
        call.log.info("TPM enrolled", ek_hash=ek_hash)
        return _encode(ek)

    async def deny_ek(self, request: pb.DenyEkRequest, call: Call) -> pb.DenyEkResponse:
        """Take a TPM off the list."""
        self._audit.note(call, ek_hash=request.ek_hash)
        ek_hash = _checked(request.ek_hash)
        await self._store.deny_ek(ek_hash)
        call.log.info("TPM taken off the list", ek_hash=ek_hash)
        return pb.DenyEkResponse()

    async def list_eks(self, request: pb.ListEksRequest, call: Call) -> pb.ListEksResponse:
        """Return enrolled TPMs in the order of their hashes, whole or page by page."""
        del call
        if request.page_size < 0:
            raise InvalidInputError("page size is negative")
        eks = sorted(await self._store.list_eks(), key=lambda ek: ek.ek_hash)
        eks = [ek for ek in eks if ek.ek_hash > request.page_token]
        page = eks[: request.page_size] if request.page_size else eks
        token = page[-1].ek_hash if len(page) < len(eks) else ""
        return pb.ListEksResponse(eks=[_encode(ek) for ek in page], next_page_token=token)


def _checked(ek_hash: str) -> str:
    if _HASH.fullmatch(ek_hash) is None:
        raise InvalidInputError("ek_hash is not a SHA-256 in 64 lower-case hex digits")
    return ek_hash


def _encode(ek: EnrolledEk) -> pb.EnrolledEk:
    return pb.EnrolledEk(
        ek_hash=ek.ek_hash, comment=ek.comment, created_at=convert.time_to_pb(ek.created_at)
    )

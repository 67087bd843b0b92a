"""Which TPMs are enrolled by the hash of their endorsement key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from spire_hw._pb import hw_admin_pb2 as pb
from spire_hw.errors import AlreadyExistsError, InvalidInputError
from spire_hw.rpc import convert
from spire_hw_server.datastore.records import MAX_EK_COMMENT, MAX_EK_OWNER, EkChange, EnrolledEk

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.rpc.service import Call
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.datastore.interface import Datastore

MAX_ITEMS: Final = 1000
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_OUTCOMES: Final = {
    EkChange.ADDED: pb.EnrollEkResult.ADDED,
    EkChange.UPDATED: pb.EnrollEkResult.UPDATED,
    EkChange.UNCHANGED: pb.EnrollEkResult.UNCHANGED,
}


class TpmService:
    """`spire_hw.server.v1.Tpm`."""

    def __init__(self, *, store: Datastore, audit: Audit) -> None:
        self._store = store
        self._audit = audit

    async def allow_ek(self, request: pb.AllowEkRequest, call: Call) -> pb.EnrolledEk:
        """Enrol a TPM."""
        self._audit.note(call, ek_hash=request.ek_hash)
        wanted = _decode(request)
        if await self._store.is_ek_allowed(wanted.ek_hash):
            raise AlreadyExistsError(f"TPM {wanted.ek_hash} is enrolled already")
        ek = await self._store.allow_ek(wanted)
        call.log.info("TPM enrolled", ek_hash=wanted.ek_hash)
        return _encode(ek)

    async def enroll_eks(self, request: pb.EnrollEksRequest, call: Call) -> pb.EnrollEksResponse:
        """Enrol many TPMs, or say what that would do."""
        if len(request.eks) > MAX_ITEMS:
            raise InvalidInputError(f"more than {MAX_ITEMS} TPMs in one request")
        read = _decode_all(request.eks)
        wanted = [ek for ek in read if isinstance(ek, EnrolledEk)]
        changes = iter(await self._store.enroll_eks(wanted, dry_run=request.dry_run))
        answer = pb.EnrollEksResponse()
        for item, ek in zip(request.eks, read, strict=True):
            error = ek if isinstance(ek, InvalidInputError) else None
            self._audit.item(call, error, ek_hash=item.ek_hash, dry_run=request.dry_run)
            if error is None:
                answer.results.add(outcome=_OUTCOMES[next(changes)])
            else:
                answer.results.add(outcome=pb.EnrollEkResult.REFUSED, message=error.message)
        if not request.dry_run:
            call.log.info("TPMs enrolled", count=len(wanted), refused=len(read) - len(wanted))
        return answer

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


def _decode(request: pb.AllowEkRequest) -> EnrolledEk:
    for name, text, limit in (
        ("comment", request.comment, MAX_EK_COMMENT),
        ("owner", request.owner, MAX_EK_OWNER),
    ):
        if len(text) > limit:
            raise InvalidInputError(f"{name} is longer than {limit} characters")
    return EnrolledEk(_checked(request.ek_hash), request.comment, owner=request.owner)


def _decode_all(items: Iterable[pb.AllowEkRequest]) -> list[EnrolledEk | InvalidInputError]:
    """Return each as a TPM to enrol, or what is wrong with it."""
    found: list[EnrolledEk | InvalidInputError] = []
    seen = set()
    for item in items:
        try:
            ek = _decode(item)
        except InvalidInputError as e:
            found.append(e)
            continue
        twice = ek.ek_hash in seen
        seen.add(ek.ek_hash)
        found.append(InvalidInputError("the same EK hash stood here before") if twice else ek)
    return found


def _checked(ek_hash: str) -> str:
    if _HASH.fullmatch(ek_hash) is None:
        raise InvalidInputError("ek_hash is not a SHA-256 in 64 lower-case hex digits")
    return ek_hash


def _encode(ek: EnrolledEk) -> pb.EnrolledEk:
    return pb.EnrolledEk(
        ek_hash=ek.ek_hash,
        comment=ek.comment,
        created_at=convert.time_to_pb(ek.created_at),
        owner=ek.owner,
    )

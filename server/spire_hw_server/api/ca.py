"""The server's X.509 authority signed by hand: a request out, a certificate in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw._pb import hw_ca_pb2 as pb
from spire_hw.errors import InvalidInputError

if TYPE_CHECKING:
    from spire_hw.rpc.service import Call
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.ca.manager import CaManager

_MAX_CHAIN: Final = 10


class CaService:
    """`spire_hw.server.v1.Ca`."""

    def __init__(self, *, manager: CaManager, audit: Audit) -> None:
        self._manager = manager
        self._audit = audit

    async def request_authority(
        self, request: pb.RequestAuthorityRequest, call: Call
    ) -> pb.RequestAuthorityResponse:
        """Make the key of the next authority and a request for it."""
        made = await self._manager.request_x509(replace=request.replace)
        self._audit.note(call, key_id=made.key_id)
        due_at = 0 if made.due_at is None else int(made.due_at.timestamp())
        return pb.RequestAuthorityResponse(csr=made.csr, key_id=made.key_id, due_at=due_at)

    async def import_authority(
        self, request: pb.ImportAuthorityRequest, call: Call
    ) -> pb.ImportAuthorityResponse:
        """Take the signed certificate."""
        if not 1 <= len(request.chain) <= _MAX_CHAIN:
            raise InvalidInputError(f"a chain has 1 to {_MAX_CHAIN} certificates")
        record = await self._manager.import_x509(
            tuple(request.chain), request.root, activate=request.activate
        )
        self._audit.note(call, local_authority_id=record.authority_id)
        return pb.ImportAuthorityResponse(
            authority_id=record.authority_id,
            root_id=record.upstream_authority_id,
            expires_at=int(record.not_after.timestamp()),
            active=request.activate,
        )

"""Whose request for a DevID certificate it is; the certificate itself others issue."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from spire_hw._pb import hw_devid_pb2 as pb
from spire_hw.errors import DeniedError, LimitError, NotFoundError, NotReadyError
from spire_hw.tpm.devidrequest import MAX_REQUEST_BYTES, DevIdRequest, check_request

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.rpc.service import Call
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.datastore.interface import Datastore


class DevIdService:
    """`spire_hw.server.v1.DevId`."""

    def __init__(self, *, store: Datastore, audit: Audit, clock: Clock) -> None:
        self._store = store
        self._audit = audit
        self._clock = clock

    async def check_request(self, request: pb.CheckDevIdRequest, call: Call) -> pb.DevIdNode:
        """Tell which attested node a request is of, if its proof holds."""
        if request.ByteSize() > MAX_REQUEST_BYTES:
            raise LimitError("DevID request is too large")
        checked = check_request(
            DevIdRequest(
                csr=request.csr,
                public=request.public_area,
                ak=request.ak,
                attest=request.attest,
                signature=request.signature,
            )
        )
        digest = hashlib.sha256(checked.ak_spki).digest()
        node = await self._store.find_by_attestation_key(digest)
        if node is None:
            raise NotFoundError(
                "no node attested with the attestation key of this request: let the node attest "
                "by its TPM first, then make the request anew there"
            )
        self._audit.note(call, agent_id=str(node.agent_id))
        if node.banned or node.quarantine:
            state = "banned" if node.banned else f"in quarantine ({node.quarantine})"
            raise DeniedError(f"{node.agent_id} is {state}: it gets no DevID")
        if node.expires_at <= self._clock.now():
            raise NotReadyError(
                f"the SVID of {node.agent_id} has expired: the node has to attest again first"
            )
        call.log.info("DevID request checked", agent_id=str(node.agent_id))
        return pb.DevIdNode(agent_id=str(node.agent_id))

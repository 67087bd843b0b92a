"""The server's state in figures, for operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw._pb import server_debug_pb2 as pb
from spire_hw.rpc import convert
from spire_hw.svid.x509svid import parse_x509_svid
from spire_hw.x509.certificate import load_certificate
from spire_hw_server.datastore.records import EntryFilter, NodeFilter

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.rpc.service import Call
    from spire_hw.spiffeid import SpiffeId, TrustDomain
    from spire_hw_server.ca.identity import ServerIdentity
    from spire_hw_server.datastore.interface import Datastore


class DebugService:
    """`spire.api.server.debug.v1.Debug`."""

    def __init__(
        self,
        *,
        trust_domain: TrustDomain,
        store: Datastore,
        identity: ServerIdentity,
        clock: Clock,
    ) -> None:
        self._trust_domain = trust_domain
        self._store = store
        self._identity = identity
        self._clock = clock
        self._started = clock.monotonic()

    async def get_info(self, request: pb.GetInfoRequest, call: Call) -> pb.GetInfoResponse:
        """Return the server's SVID, its age and how much it keeps."""
        del request, call
        bundles = await self._store.list_bundles()
        return pb.GetInfoResponse(
            svid_chain=self._svid_chain(),
            uptime=int(self._clock.monotonic() - self._started),
            agents_count=await self._store.count_nodes(NodeFilter()),
            entries_count=await self._store.count_entries(EntryFilter()),
            federated_bundles_count=sum(b.trust_domain != self._trust_domain for b in bundles),
        )

    def _svid_chain(self) -> list[pb.GetInfoResponse.Cert]:
        chain = self._identity.svid.chain
        ids: list[SpiffeId] = [parse_x509_svid(chain).spiffe_id]
        ids += [self._trust_domain.id] * (len(chain) - 1)
        certs = []
        for spiffe_id, der in zip(ids, chain, strict=True):
            certificate = load_certificate(der)
            certs.append(
                pb.GetInfoResponse.Cert(
                    id=convert.id_to_pb(spiffe_id),
                    expires_at=int(certificate.not_valid_after_utc.timestamp()),
                    subject=certificate.subject.rfc4514_string(),
                )
            )
        return certs

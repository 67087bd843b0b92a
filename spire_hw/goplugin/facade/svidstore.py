"""SVIDStore over gRPC.

Source: `spire.plugin.agent.svidstore.v1`; federated bundles go by trust domain ID
(`spiffe://name`), each as its certificates one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw._pb import plugin_agent_svidstore_pb2 as pb
from spire_hw.errors import InvalidInputError
from spire_hw.goplugin.facade.values import chain_from_ders
from spire_hw.plugin.svidstore import StoredX509Svid
from spire_hw.rpc.convert import time_from_pb, time_to_pb
from spire_hw.rpc.service import bind
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509.certificate import encode_der, load_certificate, load_chain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spire_hw.goplugin.facade.link import Link
    from spire_hw.plugin.info import Side
    from spire_hw.plugin.svidstore import SvidStore
    from spire_hw.rpc.service import Call, Method

_SERVICE: Final = "/spire.plugin.agent.svidstore.v1.SVIDStore/"


def remote(link: Link, side: Side) -> RemoteSvidStore:
    """Return the contract over an external plugin."""
    del side  # agents alone have them
    return RemoteSvidStore(link)


def methods(plugin: SvidStore, side: Side) -> list[Method]:
    """Return the service over an object of the contract."""
    del side
    return bind(pb.DESCRIPTOR.services_by_name["SVIDStore"], SvidStoreService(plugin))


class RemoteSvidStore:
    """An external SVIDStore; see `spire_hw.plugin.svidstore.SvidStore`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def put_x509_svid(self, svid: StoredX509Svid, metadata: Sequence[str]) -> None:
        """Store an SVID."""
        request = pb.PutX509SVIDRequest(
            svid=pb.X509SVID(
                spiffeID=str(svid.spiffe_id),
                cert_chain=svid.chain,
                private_key=svid.private_key,
                bundle=svid.bundle,
                expires_at=time_to_pb(svid.expires_at),
            ),
            metadata=metadata,
            federated_bundles={
                str(trust_domain.id): b"".join(roots)
                for trust_domain, roots in svid.federated_bundles.items()
            },
        )
        await self._link.unary(_SERVICE + "PutX509SVID", request, pb.PutX509SVIDResponse)

    async def delete_x509_svid(self, metadata: Sequence[str]) -> None:
        """Take an SVID out."""
        request = pb.DeleteX509SVIDRequest(metadata=metadata)
        await self._link.unary(_SERVICE + "DeleteX509SVID", request, pb.DeleteX509SVIDResponse)


class SvidStoreService:
    """The gRPC service over an SVIDStore."""

    def __init__(self, plugin: SvidStore) -> None:
        self._plugin = plugin

    async def put_x509_svid(
        self, request: pb.PutX509SVIDRequest, call: Call
    ) -> pb.PutX509SVIDResponse:
        """Serve PutX509SVID."""
        if not request.HasField("svid"):
            raise InvalidInputError("SVID is missing")
        svid = _stored(request.svid, request.federated_bundles)
        await self._plugin.put_x509_svid(svid, list(request.metadata))
        return pb.PutX509SVIDResponse()

    async def delete_x509_svid(
        self, request: pb.DeleteX509SVIDRequest, call: Call
    ) -> pb.DeleteX509SVIDResponse:
        """Serve DeleteX509SVID."""
        await self._plugin.delete_x509_svid(list(request.metadata))
        return pb.DeleteX509SVIDResponse()


def _stored(message: pb.X509SVID, federated: Mapping[str, bytes]) -> StoredX509Svid:
    expires_at = time_from_pb(message.expires_at, "expiry")
    if expires_at is None:
        raise InvalidInputError("expiry is missing")
    if not message.private_key:
        raise InvalidInputError("private key is missing")
    for der in message.bundle:
        load_certificate(der)
    return StoredX509Svid(
        spiffe_id=SpiffeId.parse(message.spiffeID),
        chain=chain_from_ders(message.cert_chain),
        private_key=message.private_key,
        bundle=tuple(message.bundle),
        expires_at=expires_at,
        federated_bundles={
            _trust_domain(name): tuple(encode_der(root) for root in load_chain(ders))
            for name, ders in federated.items()
        },
    )


def _trust_domain(text: str) -> TrustDomain:
    """Return the trust domain of its ID, or of its bare name as older hosts send it."""
    return TrustDomain.parse(text.removeprefix("spiffe://"))

"""UpstreamAuthority over gRPC.

Source: `spire.plugin.server.upstreamauthority.v1`.
"""

from __future__ import annotations

from contextlib import aclosing
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from spire_hw._pb import plugin_server_upstreamauthority_pb2 as pb
from spire_hw._pb import plugin_types_pb2
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.goplugin.facade.values import (
    chain_from_ders,
    jwt_key_to_pb,
    jwt_keys_from_pb,
    roots_from_pb,
    roots_to_pb,
)
from spire_hw.plugin.upstreamauthority import (
    JwtKeyPublisher,
    LocalBundle,
    LocalBundleSource,
    UpstreamX509Ca,
)
from spire_hw.rpc.service import bind

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from spire_hw.bundle.bundle import JwtAuthority, X509Root
    from spire_hw.goplugin.facade.link import Link
    from spire_hw.plugin.info import Side
    from spire_hw.plugin.upstreamauthority import UpstreamAuthority
    from spire_hw.rpc.service import Call, Method

_SERVICE: Final = "/spire.plugin.server.upstreamauthority.v1.UpstreamAuthority/"
_MAX_TTL_S: Final = 2**31 - 1


def remote(link: Link, side: Side) -> RemoteUpstreamAuthority:
    """Return the contract over an external plugin."""
    del side  # servers alone have them
    return RemoteUpstreamAuthority(link)


def methods(plugin: UpstreamAuthority, side: Side) -> list[Method]:
    """Return the service over an object of the contract."""
    del side
    descriptor = pb.DESCRIPTOR.services_by_name["UpstreamAuthority"]
    return bind(descriptor, UpstreamAuthorityService(plugin))


class RemoteUpstreamAuthority:
    """An external UpstreamAuthority; see `spire_hw.plugin.upstreamauthority.UpstreamAuthority`.

    It offers the optional abilities too: whether the plugin has them is known when it is asked.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    async def mint_x509_ca(
        self, csr: bytes, preferred_ttl: timedelta
    ) -> AsyncGenerator[UpstreamX509Ca, None]:
        """Have a CA certificate signed."""
        seconds = min(int(preferred_ttl.total_seconds()), _MAX_TTL_S)
        request = pb.MintX509CARequest(csr=csr, preferred_ttl=seconds)
        path = _SERVICE + "MintX509CAAndSubscribe"
        first = True
        async with aclosing(self._link.stream(path, request, pb.MintX509CAResponse)) as answers:
            async for answer in answers:
                yield self._minted(answer, first=first)
                first = False
        if first:
            self._link.refuse("it ended without one")

    def _minted(self, answer: pb.MintX509CAResponse, *, first: bool) -> UpstreamX509Ca:
        ders = [certificate.asn1 for certificate in answer.x509_ca_chain]
        if ders and not first:
            self._link.refuse("a second certificate chain")
        with self._link.checking("X.509 CA chain"):
            chain = chain_from_ders(ders) if first else ()
        return UpstreamX509Ca(chain, self._roots(answer.upstream_x509_roots))

    async def publish_jwt_key(
        self, key: JwtAuthority
    ) -> AsyncGenerator[tuple[JwtAuthority, ...], None]:
        """Publish a JWT key."""
        request = pb.PublishJWTKeyRequest(jwt_key=jwt_key_to_pb(key))
        path = _SERVICE + "PublishJWTKeyAndSubscribe"
        async with aclosing(self._link.stream(path, request, pb.PublishJWTKeyResponse)) as answers:
            async for answer in answers:
                yield self._jwt_keys(answer.upstream_jwt_keys)

    async def subscribe_to_local_bundle(self) -> AsyncGenerator[LocalBundle, None]:
        """Follow the local bundle."""
        request = pb.SubscribeToLocalBundleRequest()
        path = _SERVICE + "SubscribeToLocalBundle"
        response_type = pb.SubscribeToLocalBundleResponse
        async with aclosing(self._link.stream(path, request, response_type)) as answers:
            async for answer in answers:
                yield LocalBundle(
                    self._roots(answer.upstream_x509_roots),
                    self._jwt_keys(answer.upstream_jwt_keys),
                )

    def _roots(self, messages: Sequence[plugin_types_pb2.X509Certificate]) -> tuple[X509Root, ...]:
        if not messages:
            self._link.refuse("no upstream roots in it")
        with self._link.checking("upstream roots"):
            return roots_from_pb(messages)

    def _jwt_keys(self, messages: Sequence[plugin_types_pb2.JWTKey]) -> tuple[JwtAuthority, ...]:
        with self._link.checking("upstream JWT keys"):
            return jwt_keys_from_pb(messages)


class UpstreamAuthorityService:
    """The gRPC service over an UpstreamAuthority."""

    def __init__(self, plugin: UpstreamAuthority) -> None:
        self._plugin = plugin

    async def mint_x509ca_and_subscribe(
        self, request: pb.MintX509CARequest, call: Call
    ) -> AsyncGenerator[pb.MintX509CAResponse, None]:
        """Serve MintX509CAAndSubscribe."""
        if not request.csr:
            raise InvalidInputError("CSR is required")
        if request.preferred_ttl < 0:
            raise InvalidInputError("preferred TTL is negative")
        ttl = timedelta(seconds=request.preferred_ttl)
        async with aclosing(self._plugin.mint_x509_ca(request.csr, ttl)) as answers:
            async for minted in answers:
                yield pb.MintX509CAResponse(
                    x509_ca_chain=[
                        plugin_types_pb2.X509Certificate(asn1=der) for der in minted.chain
                    ],
                    upstream_x509_roots=roots_to_pb(minted.roots),
                )

    async def publish_jwt_key_and_subscribe(
        self, request: pb.PublishJWTKeyRequest, call: Call
    ) -> AsyncGenerator[pb.PublishJWTKeyResponse, None]:
        """Serve PublishJWTKeyAndSubscribe."""
        if not isinstance(self._plugin, JwtKeyPublisher):
            raise _not_here("publishing JWT keys")
        (key,) = jwt_keys_from_pb([request.jwt_key])
        async with aclosing(self._plugin.publish_jwt_key(key)) as answers:
            async for keys in answers:
                yield pb.PublishJWTKeyResponse(upstream_jwt_keys=map(jwt_key_to_pb, keys))

    async def subscribe_to_local_bundle(
        self, request: pb.SubscribeToLocalBundleRequest, call: Call
    ) -> AsyncGenerator[pb.SubscribeToLocalBundleResponse, None]:
        """Serve SubscribeToLocalBundle."""
        if not isinstance(self._plugin, LocalBundleSource):
            raise _not_here("telling the local bundle")
        async with aclosing(self._plugin.subscribe_to_local_bundle()) as answers:
            async for bundle in answers:
                yield pb.SubscribeToLocalBundleResponse(
                    upstream_x509_roots=roots_to_pb(bundle.x509_roots),
                    upstream_jwt_keys=map(jwt_key_to_pb, bundle.jwt_authorities),
                )


def _not_here(what: str) -> SpireHwError:
    return SpireHwError(f"{what} is not supported", kind=ErrorKind.UNIMPLEMENTED)

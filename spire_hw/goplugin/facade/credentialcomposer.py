"""CredentialComposer over gRPC.

Source: `spire.plugin.server.credentialcomposer.v1`. A service writes what its composer made over the
attributes it was sent, so that fields newer than this code come back as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf.message import Message

from spire_hw._pb import plugin_server_credentialcomposer_pb2 as pb
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.goplugin.facade import attributes as convert
from spire_hw.key import parse_spki, spki_der
from spire_hw.rpc.service import bind
from spire_hw.spiffeid import SpiffeId

if TYPE_CHECKING:
    from spire_hw.goplugin.facade.link import Link
    from spire_hw.key import PublicKey
    from spire_hw.plugin.credentialcomposer import (
        CredentialComposer,
        JwtSvidAttributes,
        X509CaAttributes,
        X509SvidAttributes,
    )
    from spire_hw.plugin.info import Side
    from spire_hw.rpc.service import Call, Method

M = TypeVar("M", bound=Message)

_SERVICE: Final = "/spire.plugin.server.credentialcomposer.v1.CredentialComposer/"
_SUBJECT: Final = "sub"


def remote(link: Link, side: Side) -> RemoteCredentialComposer:
    """Return the contract over an external plugin."""
    del side  # servers alone have them
    return RemoteCredentialComposer(link)


def methods(plugin: CredentialComposer, side: Side) -> list[Method]:
    """Return the service over an object of the contract."""
    del side
    descriptor = pb.DESCRIPTOR.services_by_name["CredentialComposer"]
    return bind(descriptor, CredentialComposerService(plugin))


class RemoteCredentialComposer:
    """An external CredentialComposer; see `spire_hw.plugin.credentialcomposer`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def compose_server_x509_ca(self, attributes: X509CaAttributes) -> X509CaAttributes | None:
        """Amend the server's own CA certificate."""
        request = pb.ComposeServerX509CARequest()
        convert.write_ca(attributes, request.attributes)
        answer = await self._call("ServerX509CA", request, pb.ComposeServerX509CAResponse)
        if answer is None:
            return None
        with self._link.checking("attributes"):
            return convert.read_ca(answer.attributes)

    async def compose_server_x509_svid(
        self, attributes: X509SvidAttributes
    ) -> X509SvidAttributes | None:
        """Amend the server's own X509-SVID."""
        request = pb.ComposeServerX509SVIDRequest()
        convert.write_svid(attributes, request.attributes)
        answer = await self._call("ServerX509SVID", request, pb.ComposeServerX509SVIDResponse)
        return self._svid(answer)

    async def compose_agent_x509_svid(
        self, spiffe_id: SpiffeId, public_key: PublicKey, attributes: X509SvidAttributes
    ) -> X509SvidAttributes | None:
        """Amend an agent's X509-SVID."""
        request = pb.ComposeAgentX509SVIDRequest(
            spiffe_id=str(spiffe_id), public_key=spki_der(public_key)
        )
        convert.write_svid(attributes, request.attributes)
        answer = await self._call("AgentX509SVID", request, pb.ComposeAgentX509SVIDResponse)
        return self._svid(answer)

    async def compose_workload_x509_svid(
        self, spiffe_id: SpiffeId, public_key: PublicKey, attributes: X509SvidAttributes
    ) -> X509SvidAttributes | None:
        """Amend a workload's X509-SVID."""
        request = pb.ComposeWorkloadX509SVIDRequest(
            spiffe_id=str(spiffe_id), public_key=spki_der(public_key)
        )
        convert.write_svid(attributes, request.attributes)
        answer = await self._call("WorkloadX509SVID", request, pb.ComposeWorkloadX509SVIDResponse)
        return self._svid(answer)

    async def compose_workload_jwt_svid(
        self, spiffe_id: SpiffeId, attributes: JwtSvidAttributes
    ) -> JwtSvidAttributes | None:
        """Amend a workload's JWT-SVID."""
        request = pb.ComposeWorkloadJWTSVIDRequest(spiffe_id=str(spiffe_id))
        convert.write_jwt(attributes, request.attributes)
        answer = await self._call("WorkloadJWTSVID", request, pb.ComposeWorkloadJWTSVIDResponse)
        if answer is None:
            return None
        with self._link.checking("claims"):
            made = convert.read_jwt(answer.attributes)
        if made.claims.get(_SUBJECT) != attributes.claims.get(_SUBJECT):
            self._link.refuse("it changes the subject")
        return made

    async def _call(self, what: str, request: Message, response_type: type[M]) -> M | None:
        """Return the answer, None when the plugin leaves things as they are."""
        try:
            answer = await self._link.unary(f"{_SERVICE}Compose{what}", request, response_type)
        except SpireHwError as e:
            if e.kind is ErrorKind.UNIMPLEMENTED:
                return None
            raise
        return answer if answer.HasField("attributes") else None

    def _svid(self, answer: Any) -> X509SvidAttributes | None:
        if answer is None:
            return None
        with self._link.checking("attributes"):
            return convert.read_svid(answer.attributes)


class CredentialComposerService:
    """The gRPC service over a CredentialComposer."""

    def __init__(self, plugin: CredentialComposer) -> None:
        self._plugin = plugin

    async def compose_server_x509_ca(
        self, request: pb.ComposeServerX509CARequest, call: Call
    ) -> pb.ComposeServerX509CAResponse:
        """Serve ComposeServerX509CA."""
        given = convert.read_ca(request.attributes)
        made = await self._plugin.compose_server_x509_ca(given)
        if made is None:
            return pb.ComposeServerX509CAResponse()
        convert.write_ca(made, request.attributes)
        return pb.ComposeServerX509CAResponse(attributes=request.attributes)

    async def compose_server_x509_svid(
        self, request: pb.ComposeServerX509SVIDRequest, call: Call
    ) -> pb.ComposeServerX509SVIDResponse:
        """Serve ComposeServerX509SVID."""
        given = convert.read_svid(request.attributes)
        made = await self._plugin.compose_server_x509_svid(given)
        return pb.ComposeServerX509SVIDResponse(attributes=_amended(made, request.attributes))

    async def compose_agent_x509_svid(
        self, request: pb.ComposeAgentX509SVIDRequest, call: Call
    ) -> pb.ComposeAgentX509SVIDResponse:
        """Serve ComposeAgentX509SVID."""
        made = await self._plugin.compose_agent_x509_svid(
            SpiffeId.parse(request.spiffe_id),
            parse_spki(request.public_key),
            convert.read_svid(request.attributes),
        )
        return pb.ComposeAgentX509SVIDResponse(attributes=_amended(made, request.attributes))

    async def compose_workload_x509_svid(
        self, request: pb.ComposeWorkloadX509SVIDRequest, call: Call
    ) -> pb.ComposeWorkloadX509SVIDResponse:
        """Serve ComposeWorkloadX509SVID."""
        made = await self._plugin.compose_workload_x509_svid(
            SpiffeId.parse(request.spiffe_id),
            parse_spki(request.public_key),
            convert.read_svid(request.attributes),
        )
        return pb.ComposeWorkloadX509SVIDResponse(attributes=_amended(made, request.attributes))

    async def compose_workload_jwt_svid(
        self, request: pb.ComposeWorkloadJWTSVIDRequest, call: Call
    ) -> pb.ComposeWorkloadJWTSVIDResponse:
        """Serve ComposeWorkloadJWTSVID."""
        spiffe_id = SpiffeId.parse(request.spiffe_id)
        given = convert.read_jwt(request.attributes)
        made = await self._plugin.compose_workload_jwt_svid(spiffe_id, given)
        if made is None:
            return pb.ComposeWorkloadJWTSVIDResponse()
        convert.write_jwt(made, request.attributes)
        return pb.ComposeWorkloadJWTSVIDResponse(attributes=request.attributes)


def _amended(
    made: X509SvidAttributes | None, message: pb.X509SVIDAttributes
) -> pb.X509SVIDAttributes | None:
    if made is None:
        return None
    convert.write_svid(made, message)
    return message

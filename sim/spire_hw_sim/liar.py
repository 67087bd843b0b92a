"""A server whose answers are a test's choice; honest where nothing else was said."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Self

from google.protobuf.message_factory import GetMessageClass

from spire_hw._pb import (
    hw_posture_pb2,
    server_agent_pb2,
    server_bundle_pb2,
    server_entry_pb2,
    server_svid_pb2,
    types_pb2,
)
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import parse
from spire_hw.errors import ErrorKind, NotFoundError, SpireHwError
from spire_hw.key import SoftwareSigner
from spire_hw.rpc.convert import bundle_to_pb, id_from_pb
from spire_hw.rpc.server import RpcServer
from spire_hw.rpc.service import Method
from spire_hw.svid.jwtsvid import issue_jwt_svid
from spire_hw.transport.tcpfront import TcpFront
from spire_hw.x509.certificate import encode_pem
from spire_hw.x509.csr import parse_csr
from spire_hw_agent.app import Agent
from spire_hw_agent.config import build_settings
from spire_hw_sim.pki import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from google.protobuf.descriptor import ServiceDescriptor

    from spire_hw.key import PublicKey
    from spire_hw.rpc.service import Call

TRUST_DOMAIN: Final = "liar.example"
_MEMORY: Final = 'KeyManager "memory" { plugin_data {} }'
AGENT_PATH: Final = "/spire/agent/join_token/x"
_SERVICES: Final = {
    "agent": server_agent_pb2.DESCRIPTOR.services_by_name["Agent"],
    "bundle": server_bundle_pb2.DESCRIPTOR.services_by_name["Bundle"],
    "posture": hw_posture_pb2.DESCRIPTOR.services_by_name["Posture"],
    "entry": server_entry_pb2.DESCRIPTOR.services_by_name["Entry"],
    "svid": server_svid_pb2.DESCRIPTOR.services_by_name["SVID"],
}


class LyingServer:
    """Serves the calls an agent makes; a test replaces what it wants to be wrong.

    Attributes:
        entries: what synchronisation answers, by id.
        reattestable: what attestation answers.
        svid_calls: the entry ids of every BatchNewX509SVID.
        attestations: how many have begun, whatever was sent.
    """

    def __init__(self) -> None:
        self.authority = Authority(TRUST_DOMAIN)
        self.entries: dict[str, types_pb2.Entry] = {}
        self.reattestable = False
        self.attestations = 0
        self.svid_calls: list[list[str]] = []
        self._server_identity = self.authority.identity(f"spiffe://{TRUST_DOMAIN}/spire/server")
        self._front = TcpFront(
            "127.0.0.1",
            0,
            identity=lambda: self._server_identity,
            bundles=lambda: {self.authority.trust_domain: self.authority.bundle()},
            admit=lambda _: True,
        )
        self._server = RpcServer(
            [
                _method("agent", "AttestAgent", self._attest),
                _method("agent", "RenewAgent", self._renew),
                _method("agent", "PostStatus", self._post_status),
                _method("bundle", "GetBundle", self._get_bundle),
                _method("bundle", "GetFederatedBundle", self._get_federated),
                _method("entry", "SyncAuthorizedEntries", self._sync),
                _method("posture", "Heartbeat", self._heartbeat),
                _method("svid", "BatchNewX509SVID", self._new_x509),
                _method("svid", "NewJWTSVID", self._new_jwt),
            ]
        )
        self._server.add_front(self._front)

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close(0)

    @property
    def port(self) -> int:
        """Return the TCP port."""
        return self._front.port

    # -- what a test replaces ------------------------------------------------------

    def agent_chain(self, key: PublicKey) -> Sequence[bytes]:
        """Return the chain an attested or renewed agent gets."""
        return [self.leaf(key, AGENT_PATH)]

    def workload_chain(self, key: PublicKey, entry: types_pb2.Entry) -> Sequence[bytes]:
        """Return the chain for an entry."""
        return [self.leaf(key, entry.spiffe_id.path)]

    def bundle_answer(self) -> types_pb2.Bundle:
        """Return what GetBundle answers."""
        return bundle_to_pb(self.authority.bundle())

    async def sync_answers(
        self, requests: AsyncIterator[Any]
    ) -> AsyncIterator[server_entry_pb2.SyncAuthorizedEntriesResponse]:
        """Answer a synchronisation."""
        await anext(requests)
        yield server_entry_pb2.SyncAuthorizedEntriesResponse(entries=self.entries.values())

    def heartbeat_answers(
        self, requests: AsyncIterator[Any]
    ) -> AsyncIterator[hw_posture_pb2.HeartbeatResponse]:
        """Answer a heartbeat stream; as servers do that know none."""
        raise SpireHwError("there is no such method", kind=ErrorKind.UNIMPLEMENTED)

    def x509_results(
        self, params: Sequence[server_svid_pb2.NewX509SVIDParams]
    ) -> list[server_svid_pb2.BatchNewX509SVIDResponse.Result]:
        """Return the results for a batch."""
        return [self.x509_result(p) for p in params]

    def x509_result(
        self, params: server_svid_pb2.NewX509SVIDParams
    ) -> server_svid_pb2.BatchNewX509SVIDResponse.Result:
        """Return the result for one entry."""
        chain = self.workload_chain(parse_csr(params.csr).public_key, self.entries[params.entry_id])
        return server_svid_pb2.BatchNewX509SVIDResponse.Result(
            svid=types_pb2.X509SVID(cert_chain=chain)
        )

    async def jwt_svid(self, entry: types_pb2.Entry, audience: Sequence[str]) -> types_pb2.JWTSVID:
        """Return a token for an entry."""
        return types_pb2.JWTSVID(
            id=entry.spiffe_id, token=await self.token(entry.spiffe_id.path, audience)
        )

    # -- means -----------------------------------------------------------------------

    def leaf(self, key: PublicKey, path: str, **more: Any) -> bytes:
        """Return a certificate of our authority."""
        return self.authority.leaf(key, f"spiffe://{TRUST_DOMAIN}{path}", **more)

    async def token(self, path: str, audience: Sequence[str], life_s: int = 300) -> str:
        """Return a JWT-SVID."""
        now = SystemClock().now()
        spiffe_id = types_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path=path)
        return await issue_jwt_svid(
            SoftwareSigner(self.authority.key),
            "key",
            spiffe_id=id_from_pb(spiffe_id),
            audience=audience,
            issued_at=now,
            expires_at=now + timedelta(seconds=life_s),
        )

    def add(self, path: str, selector: str, **fields: Any) -> types_pb2.Entry:
        """Grant an entry, whose id is its path."""
        kind, _, value = selector.partition(":")
        entry = types_pb2.Entry(
            id=path,
            spiffe_id=types_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path=path),
            selectors=[types_pb2.Selector(type=kind, value=value)],
            **fields,
        )
        self.entries[path] = entry
        return entry

    # -- handlers ----------------------------------------------------------------------

    async def _attest(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        self.attestations += 1
        request = await anext(requests)
        chain = self.agent_chain(parse_csr(request.params.params.csr).public_key)
        yield server_agent_pb2.AttestAgentResponse(
            result=server_agent_pb2.AttestAgentResponse.Result(
                svid=types_pb2.X509SVID(cert_chain=chain), reattestable=self.reattestable
            )
        )

    async def _renew(self, request: Any, call: Call) -> Any:
        chain = self.agent_chain(parse_csr(request.params.csr).public_key)
        return server_agent_pb2.RenewAgentResponse(svid=types_pb2.X509SVID(cert_chain=chain))

    async def _post_status(self, request: Any, call: Call) -> Any:
        return server_agent_pb2.PostStatusResponse()

    async def _get_bundle(self, request: Any, call: Call) -> types_pb2.Bundle:
        return self.bundle_answer()

    async def _get_federated(self, request: Any, call: Call) -> types_pb2.Bundle:
        raise NotFoundError("no such bundle")

    async def _sync(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        async for answer in self.sync_answers(requests):
            yield answer

    async def _heartbeat(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        async for answer in self.heartbeat_answers(requests):
            yield answer

    async def _new_x509(self, request: Any, call: Call) -> Any:
        self.svid_calls.append([p.entry_id for p in request.params])
        results = self.x509_results(request.params)
        return server_svid_pb2.BatchNewX509SVIDResponse(results=results)

    async def _new_jwt(self, request: Any, call: Call) -> Any:
        svid = await self.jwt_svid(self.entries[request.entry_id], request.audience)
        return server_svid_pb2.NewJWTSVIDResponse(svid=svid)


def _method(service: str, name: str, handler: Any) -> Method:
    descriptor: ServiceDescriptor = _SERVICES[service]
    rpc = descriptor.methods_by_name[name]
    return Method(
        path=f"/{descriptor.full_name}/{name}",
        request_type=GetMessageClass(rpc.input_type),
        response_type=GetMessageClass(rpc.output_type),
        client_streaming=rpc.client_streaming,
        server_streaming=rpc.server_streaming,
        handler=handler,
    )


def agent_of(server: LyingServer, home: Path, key_manager: str = _MEMORY) -> Agent:
    """Return an agent, not started, that trusts this server.

    Args:
        server: running.
        home: a folder for its files, with a short path.
        key_manager: stanza of its KeyManager.
    """
    (home / "bundle.pem").write_bytes(encode_pem([server.authority.der]))
    text = f"""
    agent {{
      trust_domain = "{TRUST_DOMAIN}"
      server_address = "127.0.0.1"
      server_port = {server.port}
      data_dir = "{home}/data"
      socket_path = "{home}/api.sock"
      trust_bundle_path = "{home}/bundle.pem"
      join_token = "x"
      experimental {{ sync_interval = "100ms" }}
    }}
    plugins {{
      {key_manager}
      NodeAttestor "join_token" {{ plugin_data {{}} }}
      WorkloadAttestor "unix" {{ plugin_data {{}} }}
    }}
    """
    return Agent(build_settings(parse(text)))

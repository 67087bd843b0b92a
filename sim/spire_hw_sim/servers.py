"""Whole servers for tests and benchmarks, and agents that do exactly what a script says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from spire_hw._pb import (
    server_agent_pb2,
    server_bundle_pb2,
    server_entry_pb2,
    server_svid_pb2,
    types_pb2,
)
from spire_hw.config import hcl
from spire_hw.errors import SpireHwError
from spire_hw.key import KeyType, PrivateKey, SoftwareSigner, generate_private_key
from spire_hw.rpc import convert
from spire_hw.rpc.client import Channel, connect, connect_unix
from spire_hw.spiffeid import SpiffeId, server_id
from spire_hw.transport.dialer import Dialer
from spire_hw.transport.tls import TlsIdentity
from spire_hw.x509.csr import build_csr
from spire_hw_server.config import ServerSettings, build_settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from google.protobuf.message import Message

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw_server.app import Server

TRUST_DOMAIN: Final = "example.org"
TIMEOUT_S: Final = 20.0

AGENT: Final = "/spire.api.server.agent.v1.Agent/"
ENTRY: Final = "/spire.api.server.entry.v1.Entry/"
SVID: Final = "/spire.api.server.svid.v1.SVID/"
BUNDLE: Final = "/spire.api.server.bundle.v1.Bundle/"
LOCAL_AUTHORITY: Final = "/spire.api.server.localauthority.v1.LocalAuthority/"


def server_config(
    directory: Path, *, key_manager: str = "disk", more: str = "", plugins: str = ""
) -> str:
    """Return a server.conf whose files are all below a directory.

    Args:
        directory: short enough for a socket path.
        key_manager: `disk` or `memory`.
        more: further keys of the server section.
        plugins: further plugin blocks.
    """
    data = directory / "data"
    keys = f'keys_path = "{data}/keys.json"' if key_manager == "disk" else ""
    return f"""
server {{
  trust_domain = "{TRUST_DOMAIN}"
  bind_address = "127.0.0.1"
  bind_port = 0
  socket_path = "{directory}/api.sock"
  data_dir = "{data}"
  {more}
}}
plugins {{
  DataStore "sql" {{
    plugin_data {{ database_type = "sqlite3" connection_string = "{data}/db.sqlite3" }}
  }}
  KeyManager "{key_manager}" {{ plugin_data {{ {keys} }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  {plugins}
}}
"""


def server_settings(
    directory: Path, *, key_manager: str = "disk", more: str = ""
) -> ServerSettings:
    """Return the settings of `server_config`."""
    text = server_config(directory, key_manager=key_manager, more=more)
    return build_settings(hcl.parse(text, "server.conf"))


class Operator:
    """The admin socket, with the calls that tests need most."""

    def __init__(self, socket_path: Path) -> None:
        self.channel = connect_unix(socket_path)

    async def close(self) -> None:
        """Hang up."""
        await self.channel.close()

    async def bundle(self) -> Bundle:
        """Return the server's bundle."""
        message = await self.channel.unary(
            BUNDLE + "GetBundle",
            server_bundle_pb2.GetBundleRequest(),
            types_pb2.Bundle,
            timeout_s=TIMEOUT_S,
        )
        return convert.bundle_from_pb(message)

    async def token(self, agent_id: SpiffeId | None = None, ttl: int = 600) -> str:
        """Return a new join token."""
        request = server_agent_pb2.CreateJoinTokenRequest(ttl=ttl)
        if agent_id is not None:
            request.agent_id.CopyFrom(convert.id_to_pb(agent_id))
        made = await self.channel.unary(
            AGENT + "CreateJoinToken", request, types_pb2.JoinToken, timeout_s=TIMEOUT_S
        )
        return made.value

    async def create(self, *entries: types_pb2.Entry) -> list[Any]:
        """Create entries and return the results."""
        response = await self.channel.unary(
            ENTRY + "BatchCreateEntry",
            server_entry_pb2.BatchCreateEntryRequest(entries=entries),
            server_entry_pb2.BatchCreateEntryResponse,
            timeout_s=TIMEOUT_S,
        )
        return list(response.results)


def entry_message(
    path: str, parent: SpiffeId, selectors: Sequence[str] = ("unix:uid:1000",), **fields: Any
) -> types_pb2.Entry:
    """Return an entry of the test trust domain for a create request."""
    return types_pb2.Entry(
        spiffe_id=types_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path=path),
        parent_id=convert.id_to_pb(parent),
        selectors=[
            types_pb2.Selector(type=kind, value=value)
            for kind, _, value in (s.partition(":") for s in selectors)
        ],
        **fields,
    )


async def make_csr(key: PrivateKey) -> bytes:
    """Return an agent's CSR."""
    return await build_csr(SoftwareSigner(key))


@dataclass
class ScriptedAgent:
    """An agent that attests with join tokens and calls what it is told to.

    Attributes:
        port: of the server on this machine.
        bundle: whom it believes.
        key: of its SVID.
        chain: its SVID; empty before it attested.
        spiffe_id: from the server's answer.
    """

    port: int
    bundle: Bundle
    clock: Clock | None = None
    key: PrivateKey = field(default_factory=lambda: generate_private_key(KeyType.EC_P256))
    chain: tuple[bytes, ...] = ()
    spiffe_id: SpiffeId | None = None

    async def channel(self) -> Channel:
        """Return a new connection, anonymous before the agent attested."""
        identity = None
        if self.chain:
            identity = TlsIdentity(self.chain, private_key=self.key)
        dialer = Dialer(
            "127.0.0.1",
            self.port,
            server_id=server_id(self.bundle.trust_domain),
            bundle=lambda: self.bundle,
            identity=identity,
            clock=self.clock,
        )
        return await connect(dialer)

    async def attest(self, token: str) -> server_agent_pb2.AttestAgentResponse.Result:
        """Join with a token and keep the SVID.

        Raises:
            SpireHwError: what the server answered.
        """
        return await self.prove("join_token", token.encode())

    async def prove(
        self, kind: str, payload: bytes, answer: Callable[[bytes], Awaitable[bytes]] | None = None
    ) -> server_agent_pb2.AttestAgentResponse.Result:
        """Attest and keep the SVID.

        Args:
            kind: name of the attestor.
            payload: the first message.
            answer: answers a challenge; None for an attestor that asks nothing.

        Raises:
            SpireHwError: what the server answered.
        """
        params = server_agent_pb2.AttestAgentRequest.Params(
            data=types_pb2.AttestationData(type=kind, payload=payload),
            params=server_agent_pb2.AgentX509SVIDParams(csr=await make_csr(self.key)),
        )
        answer_type = server_agent_pb2.AttestAgentResponse
        anonymous = ScriptedAgent(self.port, self.bundle, self.clock)
        async with (
            await anonymous.channel() as channel,
            channel.bidi(AGENT + "AttestAgent", answer_type, timeout_s=TIMEOUT_S) as call,
        ):
            await call.send(server_agent_pb2.AttestAgentRequest(params=params))
            said = await call.receive()
            while (
                answer is not None and said is not None and said.WhichOneof("step") == "challenge"
            ):
                response = await answer(said.challenge)
                await call.send(server_agent_pb2.AttestAgentRequest(challenge_response=response))
                said = await call.receive()
        if said is None or said.WhichOneof("step") != "result":
            raise SpireHwError("the server ended the attestation without a result")
        self.take(said.result.svid)
        return said.result

    def take(self, svid: types_pb2.X509SVID) -> None:
        """Use an SVID from now on."""
        self.chain = tuple(svid.cert_chain)
        self.spiffe_id = convert.id_from_pb(svid.id)

    async def call(self, path: str, request: Message, response_type: Any) -> Any:
        """Make one call over a connection of its own."""
        async with await self.channel() as channel:
            return await channel.unary(path, request, response_type, timeout_s=TIMEOUT_S)

    async def renew(self) -> types_pb2.X509SVID:
        """Ask for a new SVID for a new key; `take` it together with the key to use it."""
        request = server_agent_pb2.RenewAgentRequest(
            params=server_agent_pb2.AgentX509SVIDParams(csr=await make_csr(self.key))
        )
        response = await self.call(
            AGENT + "RenewAgent", request, server_agent_pb2.RenewAgentResponse
        )
        svid: types_pb2.X509SVID = response.svid
        return svid

    async def batch_new(self, channel: Channel, wanted: Sequence[tuple[str, bytes]]) -> list[Any]:
        """Ask for X509-SVIDs for (entry id, CSR) pairs and return the results."""
        request = server_svid_pb2.BatchNewX509SVIDRequest(
            params=[server_svid_pb2.NewX509SVIDParams(entry_id=i, csr=c) for i, c in wanted]
        )
        response = await channel.unary(
            SVID + "BatchNewX509SVID",
            request,
            server_svid_pb2.BatchNewX509SVIDResponse,
            timeout_s=TIMEOUT_S,
        )
        return list(response.results)

    async def workload(self, entry_id: str) -> ScriptedAgent:
        """Return something that calls with the SVID of a workload's entry."""
        caller = ScriptedAgent(self.port, self.bundle, self.clock)
        async with await self.channel() as channel:
            (result,) = await self.batch_new(channel, [(entry_id, await make_csr(caller.key))])
        caller.take(result.svid)
        return caller


async def joined_agent(server: Server, operator: Operator) -> ScriptedAgent:
    """Return an agent that joined a server with a fresh token."""
    agent = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    await agent.attest(await operator.token())
    return agent

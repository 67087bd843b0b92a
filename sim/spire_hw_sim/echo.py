"""A service of every call shape behind real fronts, for tests of transport and RPC."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.wrappers_pb2 import StringValue

from spire_hw.errors import DeniedError, DeniedReason, ErrorKind, SpireHwError
from spire_hw.rpc.client import Channel, connect, connect_unix
from spire_hw.rpc.server import RpcLimits, RpcServer
from spire_hw.rpc.service import Call, Handler, Method
from spire_hw.spiffeid import SpiffeId, server_id
from spire_hw.transport.dialer import Dialer
from spire_hw.transport.front import Front, FrontLimits
from spire_hw.transport.peer import TcpPeer, UnixPeer
from spire_hw.transport.tcpfront import TcpFront
from spire_hw.transport.unixfront import UnixFront
from spire_hw_sim.pki import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from spire_hw.rpc.interceptors import Guard, Interceptor
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.transport.tls import TlsIdentity

PREFIX: Final = "/sim.Echo/"
TIMEOUT_S: Final = 10.0


class Echo:
    """The service; keeps what tests ask about.

    Attributes:
        calls: every call that reached a handler.
        held: set when a `Hold` call rests.
        dropped: set when a `Hold` call was cancelled.
        sent: messages `Flood` got rid of.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.held = asyncio.Event()
        self.dropped = asyncio.Event()
        self.sent = 0

    def methods(self) -> list[Method]:
        """Return the methods: name, streams in, streams out."""
        shapes: list[tuple[str, bool, bool, Handler]] = [
            ("Say", False, False, self.say),
            ("Raw", False, False, self.raw),
            ("Fail", False, False, self.fail),
            ("Count", False, True, self.count),
            ("Hold", False, True, self.hold),
            ("Flood", False, True, self.flood),
            ("Join", True, False, self.join),
            ("Chat", True, True, self.chat),
            ("Ask", True, True, self.ask),
        ]
        return [Method(PREFIX + n, StringValue, StringValue, i, o, h) for n, i, o, h in shapes]

    async def say(self, request: StringValue, call: Call) -> StringValue:
        """Answer with the request."""
        self.calls.append(call)
        return StringValue(value=request.value)

    async def raw(self, request: StringValue, call: Call) -> bytes:
        """Answer with the request, encoded here."""
        return request.SerializeToString()

    async def fail(self, request: StringValue, call: Call) -> StringValue:
        """Fail as told: an error kind, a denied reason, or a bug."""
        name = request.value
        if name in ErrorKind.__members__:
            raise SpireHwError(f"secret of {name}", kind=ErrorKind[name])
        if name in DeniedReason.__members__:
            raise DeniedError("denied", DeniedReason[name])
        raise RuntimeError(f"secret of {name}")

    async def count(self, request: StringValue, call: Call) -> AsyncIterator[StringValue]:
        """Send 0, 1, 2 and fail when told to."""
        for number in range(3):
            yield StringValue(value=str(number))
        if request.value:
            raise DeniedError("that is enough", DeniedReason.AGENT_BANNED)

    async def hold(self, request: StringValue, call: Call) -> AsyncIterator[StringValue]:
        """Send one message and rest until cancelled."""
        self.calls.append(call)
        yield StringValue(value="first")
        self.held.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.dropped.set()

    async def flood(self, request: StringValue, call: Call) -> AsyncIterator[StringValue]:
        """Send large messages for as long as they are taken."""
        message = StringValue(value="x" * 100_000)
        while True:
            self.sent += 1
            yield message

    async def join(self, requests: AsyncIterator[StringValue], call: Call) -> StringValue:
        """Answer with all requests in one."""
        return StringValue(value="".join([request.value async for request in requests]))

    async def chat(
        self, requests: AsyncIterator[StringValue], call: Call
    ) -> AsyncIterator[StringValue]:
        """Answer each request; `deny` ends it."""
        async for request in requests:
            if request.value == "deny":
                raise DeniedError("not that", DeniedReason.AGENT_MUST_REATTEST)
            yield StringValue(value=request.value.upper())

    async def ask(
        self, requests: AsyncIterator[StringValue], call: Call
    ) -> AsyncIterator[StringValue]:
        """Ask the caller back in the middle, and answer with all that was said."""
        self.calls.append(call)
        first = await anext(requests)
        await call.reply(StringValue(value=f"{first.value}?"))
        yield StringValue(value=first.value + (await anext(requests)).value)


class EchoWorld:
    """An echo server with a TCP front and a unix front, and what it believes.

    Attributes:
        authority: the CA of `example.org`.
        identity: what the TCP front shows.
        bundles: whom the TCP front believes.
        admitted: IDs let in, None for all.
    """

    def __init__(
        self,
        directory: Path,
        *,
        front_limits: FrontLimits | None = None,
        rpc_limits: RpcLimits | None = None,
        interceptors: Sequence[Guard | Interceptor] = (),
        show_internal: bool = False,
    ) -> None:
        self.authority = Authority("example.org")
        self.server_id = server_id(self.authority.trust_domain)
        self.identity: TlsIdentity = self.authority.identity(str(self.server_id))
        self.bundles = {self.authority.trust_domain: self.authority.bundle()}
        self.admitted: set[SpiffeId] | None = None
        self.echo = Echo()
        self.path = directory / "api.sock"
        limits = front_limits or FrontLimits()
        self.tcp = TcpFront(
            "127.0.0.1",
            0,
            identity=lambda: self.identity,
            bundles=lambda: self.bundles,
            admit=lambda spiffe_id: self.admitted is None or spiffe_id in self.admitted,
            limits=limits,
        )
        self.unix = UnixFront(self.path, 0o700, limits=limits)
        self.server = RpcServer(
            self.echo.methods(), interceptors, limits=rpc_limits, show_internal=show_internal
        )
        for front in self.fronts:
            self.server.add_front(front)

    @property
    def fronts(self) -> tuple[Front, Front]:
        """Return both fronts."""
        return self.tcp, self.unix

    def believe(self, *authorities: Authority) -> None:
        """Believe these authorities, each for its own trust domain."""
        self.bundles = {authority.trust_domain: authority.bundle() for authority in authorities}

    def dialer(self, identity: TlsIdentity | None = None, **more: Any) -> Dialer:
        """Return a dialer to the TCP front that believes the world's authority."""
        more.setdefault("server_id", self.server_id)
        more.setdefault("bundle", self.authority.bundle)
        return Dialer("127.0.0.1", self.tcp.port, identity=identity, **more)

    async def over_tcp(self, identity: TlsIdentity | None = None, **more: Any) -> Channel:
        """Return a channel to the TCP front."""
        return await connect(self.dialer(identity, **more))

    def over_unix(self) -> Channel:
        """Return a channel to the unix front."""
        return connect_unix(self.path)

    async def who(self, identity: TlsIdentity | None = None, **more: Any) -> str:
        """Call over TCP and return whom the handler saw."""
        async with await self.over_tcp(identity, **more) as channel:
            await say(channel)
        return caller_of(self.echo.calls[-1])

    def agent(self, name: str = "one", trust_domain: TrustDomain | None = None) -> str:
        """Return the text of an agent's ID."""
        return f"spiffe://{trust_domain or self.authority.trust_domain}/spire/agent/sim/{name}"


def caller_of(call: Call) -> str:
    """Return the caller's SPIFFE ID, `anonymous`, or its user."""
    match call.peer:
        case TcpPeer(spiffe_id=None):
            return "anonymous"
        case TcpPeer(spiffe_id=spiffe_id):
            return str(spiffe_id)
        case UnixPeer(process=process):
            return f"uid {process.uid}"


async def say(channel: Channel, text: str = "hello", **more: Any) -> str:
    """Make the plain call and return the answer."""
    more.setdefault("timeout_s", TIMEOUT_S)
    answer = await channel.unary(PREFIX + "Say", StringValue(value=text), StringValue, **more)
    return answer.value


@asynccontextmanager
async def echo_world(directory: Path, **more: Any) -> AsyncIterator[EchoWorld]:
    """Run an `EchoWorld`; arguments as it takes them."""
    world = EchoWorld(directory, **more)
    await world.server.start()
    try:
        yield world
    finally:
        await world.server.close(0)

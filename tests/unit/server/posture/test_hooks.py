"""Who hears of a node's new state: over real sockets, in order, signed, and no more than fits."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import timedelta
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import InvalidInputError, NotReadyError, UnavailableError
from spire_hw.posture.verdict import NodeState
from spire_hw.spiffeid import TrustDomain, agent_id
from spire_hw.syslog import SyslogSettings
from spire_hw_server.posture import states
from spire_hw_server.posture.hooks import MAX_WAITING, Hooks
from spire_hw_server.posture.outcome import StateChange
from spire_hw_server.posture.states import Standing
from spire_hw_server.posture.syslog import message_of
from spire_hw_server.posture.webhook import SIGNATURE, TIMESTAMP, sign
from spire_hw_server.postureconfig import PostureSettings, WebhookSettings
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from spire_hw.plugin.notifier import NodeStateEvent

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
LOG = structlog.get_logger()
STEP = timedelta(seconds=60)
SECRET = "0123456789abcdef0123456789abcdef"  # noqa: S105 - made up


def change(name: str = "n", state: NodeState = NodeState.QUARANTINED) -> StateChange:
    now = SimClock().now()
    after = Standing(state, ("pcr_mismatch",), "policy: PCR 4 is not allowed", now)
    return StateChange(agent_id(TD, "tpm", name), states.new(now), after, "heartbeat")


@asynccontextmanager
async def running(settings: PostureSettings, clock: SimClock) -> AsyncIterator[Hooks]:
    hooks = Hooks(settings, trust_domain=TD, clock=clock, log=LOG)
    tasks = Tasks(on_failure=lambda name, error: None)
    await hooks.start()
    tasks.start("hooks", hooks.run())
    try:
        yield hooks
    finally:
        await tasks.close()
        await hooks.close()


class Receiver:
    """A web server that notes what it gets and answers as told."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[tuple[web.BaseRequest, bytes]] = asyncio.Queue()
        self.answers: list[int] = []

    async def handle(self, request: web.BaseRequest) -> web.Response:
        await self.got.put((request, await request.read()))
        return web.Response(status=self.answers.pop(0) if self.answers else 204)

    @asynccontextmanager
    async def serve(self, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
        runner = web.ServerRunner(web.Server(self.handle))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        try:
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    async def next(self, clock: SimClock | None = None) -> tuple[web.BaseRequest, bytes]:
        """Return the next request; waits between tries go by."""
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            got = group.create_task(self.got.get())
            while not got.done():
                if clock is not None:
                    await clock.advance(STEP)
                await asyncio.wait({got}, timeout=0.05)
        return got.result()


def certificate(stem: Path) -> tuple[Path, Path]:
    """Make a certificate for this machine and its key; return their files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, stem.name)])
    now = SimClock().now()
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    files = stem.with_suffix(".pem"), stem.with_suffix(".key")
    files[0].write_bytes(made.public_bytes(Encoding.PEM))
    plain = NoEncryption()
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, plain))
    return files


def hook(port: int, **changes: Any) -> PostureSettings:
    url = f"http://127.0.0.1:{port}/node"
    return PostureSettings(webhook=replace(WebhookSettings(url), **changes))


async def test_webhook_is_signed_over_time_and_body(tmp_path: Path) -> None:
    secret, receiver, clock = tmp_path / "secret", Receiver(), SimClock()
    secret.write_text(SECRET + "\n")
    async with receiver.serve() as port, running(hook(port, secret_path=secret), clock) as hooks:
        hooks.tell(change())
        request, body = await receiver.next()
    assert json.loads(body) == {
        "event": "node_state",
        "time": clock.now().isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "trust_domain": "example.org",
        "agent_id": "spiffe://example.org/spire/agent/tpm/n",
        "state": "quarantined",
        "state_before": "new",
        "reasons": ["pcr_mismatch"],
        "message": "policy: PCR 4 is not allowed",
        "occasion": "heartbeat",
    }
    assert (request.method, request.path) == ("POST", "/node")
    timestamp = request.headers[TIMESTAMP]
    assert timestamp == str(int(clock.now().timestamp()))
    wanted = sign(SECRET.encode(), timestamp, body)
    assert request.headers[SIGNATURE] == f"sha256={wanted}"
    assert SECRET not in str(request.headers) + body.decode()


async def test_webhook_is_tried_again_in_order() -> None:
    receiver, clock = Receiver(), SimClock()
    receiver.answers = [503, 429, 200]
    async with receiver.serve() as port, running(hook(port), clock) as hooks:
        hooks.tell(change("one"))
        hooks.tell(change("two"))
        names = [json.loads((await receiver.next(clock))[1])["agent_id"][-3:] for _ in range(4)]
    assert names == ["one", "one", "one", "two"]


async def test_refusal_for_good_and_redirects_are_not_tried_again() -> None:
    receiver, clock = Receiver(), SimClock()
    receiver.answers = [400, 302]
    with capture_logs() as logs:
        async with receiver.serve() as port, running(hook(port), clock) as hooks:
            for name in ("one", "two", "six"):
                hooks.tell(change(name))
            names = [json.loads((await receiver.next(clock))[1])["agent_id"][-3:] for _ in range(3)]
    assert names == ["one", "two", "six"]
    told = [e["error"] for e in logs if e["event"] == "State of a node was not told"]
    assert told == ["the receiver answers 400", "the receiver answers 302"]


async def test_receiver_that_stays_away_is_given_up_and_named() -> None:
    clock = SimClock()
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with capture_logs() as logs:
            async with running(hook(port), clock) as hooks, asyncio.timeout(10):
                hooks.tell(change())
                while not any(e["event"] == "State of a node was not told" for e in logs):
                    await clock.advance(STEP)
                    await asyncio.sleep(0.01)
    told = [e for e in logs if e["event"] == "State of a node was not told"]
    assert [(e["receiver"], e["state"]) for e in told] == [("webhook", "quarantined")]


async def test_queue_is_bounded_and_says_what_was_lost() -> None:
    receiver, clock = Receiver(), SimClock()
    async with receiver.serve() as port:
        hooks = Hooks(hook(port), trust_domain=TD, clock=clock, log=LOG)
        await hooks.start()
        for number in range(MAX_WAITING + 3):
            hooks.tell(change(f"n{number}"))
        tasks = Tasks(on_failure=lambda name, error: None)
        with capture_logs() as logs:
            tasks.start("hooks", hooks.run())
            first = json.loads((await receiver.next())[1])["agent_id"]
            await receiver.next()
            await tasks.close()
            await hooks.close()
    assert first.endswith("/n3")
    assert [e["count"] for e in logs if e["event"] == "States of nodes were not told"] == [3]


async def test_webhook_over_tls_is_verified(tmp_path: Path) -> None:
    good, key = certificate(tmp_path / "good")
    bad, _ = certificate(tmp_path / "bad")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(good, key)
    receiver, clock = Receiver(), SimClock()
    async with receiver.serve(context) as port:
        url = f"https://127.0.0.1:{port}/"
        async with running(hook(port, url=url, ca_path=good), clock) as hooks:
            hooks.tell(change())
            await receiver.next()
        with capture_logs() as logs:
            async with running(hook(port, url=url, ca_path=bad), clock) as hooks:
                hooks.tell(change())
                async with asyncio.timeout(10):
                    while not any(e["event"] == "State of a node was not told" for e in logs):
                        await clock.advance(STEP)
                        await asyncio.sleep(0.01)
    assert receiver.got.empty()


@pytest.mark.parametrize("text", ["", "short", "x" * 5000])
async def test_secret_that_will_not_do_stops_the_start(tmp_path: Path, text: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text(text)
    for path in (secret, tmp_path / "none"):
        hooks = Hooks(hook(1, secret_path=path), trust_domain=TD, clock=SimClock(), log=LOG)
        with pytest.raises((NotReadyError, InvalidInputError), match="secret") as refused:
            await hooks.start()
        assert not text or text not in refused.value.message


async def test_authorities_that_cannot_be_read_stop_the_start(tmp_path: Path) -> None:
    settings = hook(1, ca_path=tmp_path / "none")
    hooks = Hooks(settings, trust_domain=TD, clock=SimClock(), log=LOG)
    with pytest.raises(NotReadyError, match="ca_path"):
        await hooks.start()


def to_syslog(**changes: Any) -> PostureSettings:
    return PostureSettings(syslog=SyslogSettings(**changes))


async def received_by(receive: Callable[[], Awaitable[bytes]]) -> str:
    async with asyncio.timeout(10):
        return (await receive()).decode()


def is_message(text: str) -> bool:
    head, _, words = text.partition(" - ")
    return head.startswith("<36>1 ") and "state=quarantined" in words and "reasons=" in words


async def test_syslog_over_unix_and_udp(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    path = str(tmp_path / "log")
    for family, address in ((socket.AF_UNIX, path), (socket.AF_INET, ("127.0.0.1", 0))):
        with closing(socket.socket(family, socket.SOCK_DGRAM)) as receiver:
            receiver.bind(address)
            receiver.setblocking(False)
            if family is socket.AF_UNIX:
                settings = to_syslog(transport="unix", path=path)
            else:
                host, port = receiver.getsockname()
                settings = to_syslog(transport="udp", host=host, port=port)
            async with running(settings, SimClock()) as hooks:
                hooks.tell(change())
                text = await received_by(lambda r=receiver: loop.sock_recv(r, 65536))
        assert is_message(text), text


async def test_syslog_over_tcp_counts_octets() -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await got.put(await reader.read())
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        async with running(to_syslog(transport="tcp", host=host, port=port), SimClock()) as hooks:
            hooks.tell(change())
            text = await received_by(got.get)
    count, _, rest = text.partition(" ")
    assert int(count) == len(rest.encode())
    assert is_message(rest)


async def test_syslog_messages_hold_one_line_and_quote_what_needs_it() -> None:
    event: dict[str, object] = {
        "time": "2026-11-22T12:00:00.000Z",
        "state": "banned",
        "message": 'by "me": \\ \n<0>1 forged ü',
        "reasons": ["a", "b"],
        "empty": "",
    }
    text = message_of(event).encode(10, "host name\n", 7).decode()
    assert text == (
        "<82>1 2026-11-22T12:00:00.000Z hostname spire-hw-server 7 node-state - \ufeff"
        'state=banned message="by \\"me\\": \\\\ ?<0>1 forged ü" reasons=a,b empty=""'
    )
    assert message_of({"time": "t", "state": "attested"}).encode(4, "", 7).startswith(b"<37>1 t - ")


class Listening:
    """A notifier that hears of nodes."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.heard: asyncio.Queue[NodeStateEvent] = asyncio.Queue()

    async def notify_node_state(self, event: NodeStateEvent) -> None:
        if self.errors:
            raise self.errors.pop(0)
        await self.heard.put(event)


async def test_notifiers_in_this_process_hear_of_it_too() -> None:
    clock, plugin = SimClock(), Listening(UnavailableError("not yet"))
    hooks = Hooks(PostureSettings(), trust_domain=TD, clock=clock, log=LOG)
    hooks.use({"ours": plugin, "deaf": object()})
    tasks = Tasks(on_failure=lambda name, error: None)
    tasks.start("hooks", hooks.run())
    hooks.tell(change("x", NodeState.BANNED))
    async with asyncio.timeout(10):
        while plugin.heard.empty():
            await clock.advance(STEP)
            await asyncio.sleep(0.01)
    event = plugin.heard.get_nowait()
    assert (event.agent_id.path, event.state) == ("/spire/agent/tpm/x", NodeState.BANNED)
    assert (event.before, event.occasion) == (NodeState.NEW, "heartbeat")
    await tasks.close()
    await hooks.close()

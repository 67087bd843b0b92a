"""AttestAgent abused over real sockets: what the host itself has to refuse.

Messages beyond the limits, unknown attestors, requests and keys that are not a node's own, answers
from elsewhere, several exchanges at once; and streams that do not keep to their shape.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from google.protobuf import empty_pb2

from spire_hw._pb import server_agent_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.aio.tasks import Tasks
from spire_hw.config import hcl
from spire_hw.errors import ErrorKind, LimitError, SpireHwError
from spire_hw_plugins.nodeattestor.tpm import dialects
from spire_hw_plugins.nodeattestor.tpm.wire import (
    decode_challenge,
    encode_attestation_data,
    encode_response,
)
from spire_hw_server.api import agent as agent_api
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_sim.again import refused
from spire_hw_sim.ekca import common_name, ek_spec, integer, oid, tlv
from spire_hw_sim.servers import (
    AGENT,
    TIMEOUT_S,
    Operator,
    ScriptedAgent,
    joined_agent,
    make_csr,
    server_config,
)
from spire_hw_sim.softtpm import (
    AK_ATTRIBUTES,
    ENDORSEMENT,
    OWNER,
    SVID_KEY_ATTRIBUTES,
    SoftKey,
    SoftTpm,
    default_scheme,
    encode_public,
    make_ek,
)
from spire_hw_sim.tpmnode import TpmNode, Vendor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.key import PrivateKey
    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio

NO_LIMITS = "ratelimit { attestation = false signing = false }"
METHOD = AGENT + "AttestAgent"
IA, RE = ErrorKind.INVALID_ARGUMENT, ErrorKind.RESOURCE_EXHAUSTED


@dataclass
class Site:
    """A server that attests by TPM, and nodes of a manufacturer it trusts."""

    server: Server
    operator: Operator
    vendor: Vendor

    @classmethod
    async def open(cls, directory: Path, clock: SimClock, settings: str = "") -> Self:
        vendor = Vendor.make()
        (directory / "roots.der").write_bytes(vendor.root.certificate)
        plugin = f"""
          NodeAttestor "tpm" {{ plugin_data {{
            endorsement_ca_path = "{directory}/roots.der" ek_policy = "ca"
            pcrs = {{ sha256 = [0, 2, 4, 7] }}
            {settings}
          }} }}
          KeyManager "memory" """
        text = server_config(directory, key_manager="memory", more=NO_LIMITS)
        text = text.replace('KeyManager "memory"', plugin)
        server = Server(build_settings(hcl.parse(text, "server.conf")), clock=clock)
        await server.start()
        return cls(server, Operator(server.settings.socket_path), vendor)

    async def close(self) -> None:
        await self.operator.close()
        await self.server.close()

    def node(self, number: int = 0) -> TpmNode:
        return self.vendor.equip(TpmNode(SoftTpm(ek=make_ek("L-2", number))))

    async def channel(self) -> Any:
        stranger = ScriptedAgent(self.server.port, await self.operator.bundle(), self.server.clock)
        return await stranger.channel()

    async def agents(self) -> int:
        answer = await self.operator.channel.unary(
            AGENT + "CountAgents",
            pb.CountAgentsRequest(),
            pb.CountAgentsResponse,
            timeout_s=TIMEOUT_S,
        )
        return int(answer.count)

    async def attest(self, node: TpmNode) -> pb.AttestAgentResponse.Result:
        """Attest honestly."""
        async with await self.channel() as channel, stream_on(channel) as call:
            await call.send(first(await params(node)))
            challenge = await received(call)
            await call.send(answer(node.answer(challenge.challenge)))
            return (await received(call)).result

    async def refusal(self, *messages: pb.AttestAgentRequest) -> SpireHwError:
        """Send messages, and return what the exchange ends in; nothing is stored for it."""

        async def act() -> None:
            async with await self.channel() as channel, stream_on(channel) as call:
                for message in messages:
                    await call.send(message)
                await call.done_sending()
                while await call.receive() is not None:
                    pass

        before = await self.agents()
        error = await refused(act)
        assert await self.agents() == before
        return error


def stream_on(channel: Any) -> Any:
    return channel.bidi(METHOD, pb.AttestAgentResponse, timeout_s=TIMEOUT_S)


async def received(call: Any) -> pb.AttestAgentResponse:
    message = await call.receive()
    assert isinstance(message, pb.AttestAgentResponse)
    return message


async def params(node: TpmNode, **more: Any) -> pb.AttestAgentRequest.Params:
    assert node.key is not None
    csr = more.pop("csr", None) or await make_csr(node.key.private)
    data = types_pb2.AttestationData(type="tpm", payload=node.payload())
    for name, value in more.items():
        setattr(data, name, value)
    return pb.AttestAgentRequest.Params(data=data, params=pb.AgentX509SVIDParams(csr=csr))


def first(message: pb.AttestAgentRequest.Params) -> pb.AttestAgentRequest:
    return pb.AttestAgentRequest(params=message)


def answer(data: bytes) -> pb.AttestAgentRequest:
    return pb.AttestAgentRequest(challenge_response=data)


@pytest_asyncio.fixture
async def site(short_dir: Path, clock: SimClock) -> AsyncIterator[Site]:
    site = await Site.open(short_dir, clock)
    yield site
    await site.close()


# -- shape of the stream --------------------------------------------------------------


async def test_messages_out_of_order_are_refused(site: Site) -> None:
    node = site.node()
    good = await params(node)
    no_csr = pb.AttestAgentRequest.Params(data=good.data)
    no_data = pb.AttestAgentRequest.Params(params=good.params)
    for messages in (
        (),
        (answer(b"x"),),
        (pb.AttestAgentRequest(),),
        (first(no_csr),),
        (first(no_data),),
        (first(await params(node, payload=b"")),),
        (first(await params(node, type="")),),
        (first(good),),
        (first(good), first(good)),
        (first(good), pb.AttestAgentRequest()),
        (first(good), answer(b"")),
        (first(good), answer(b"x"), answer(b"x")),
    ):
        error = await site.refusal(*messages)
        assert error.kind is IA, (messages, error)
    await site.attest(node)
    assert await site.agents() == 1


async def test_a_right_answer_after_a_wrong_one_is_not_read(site: Site) -> None:
    node = site.node()

    async def act() -> None:
        async with await site.channel() as channel, stream_on(channel) as call:
            await call.send(first(await params(node)))
            challenge = (await received(call)).challenge
            response = node.respond(decode_challenge(challenge))
            bad = replace(response, secret=bytes(32))
            await call.send(answer(encode_response(bad)))
            await call.send(answer(encode_response(response)))
            await call.receive()

    error = await refused(act)
    assert error.kind is IA
    assert error.message.startswith("nodeattestor(tpm): challenge: secret does not match")
    assert await site.agents() == 0
    await site.attest(node)


async def test_a_stream_that_says_nothing_is_ended(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_api, "_FIRST_MESSAGE_S", 0.05)
    async with await site.channel() as channel:
        with pytest.raises(SpireHwError) as caught:
            async with stream_on(channel) as call:
                await call.receive()
        assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
    monkeypatch.setattr(agent_api, "_FIRST_MESSAGE_S", 10.0)
    await site.attest(site.node())


async def test_streams_dropped_at_any_point_leave_nothing(site: Site) -> None:
    node = site.node()
    message = first(await params(node))
    for steps in range(3):
        async with await site.channel() as channel, stream_on(channel) as call:
            if steps > 0:
                await call.send(message)
            if steps > 1:
                await received(call)
        # A dropped stream gives its place back: the node is let in at once.
    await _eventually_attests(site, node)
    assert await site.agents() == 1


async def _eventually_attests(site: Site, node: TpmNode) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                await site.attest(node)
            except LimitError:
                await asyncio.sleep(0.02)
            else:
                return


# -- what the host answers for -----------------------------------------------------------


async def test_messages_beyond_the_limits(site: Site) -> None:
    node = site.node()
    for size in ((64 << 10) + 1, (1 << 20) + 1, 5 << 20):
        error = await site.refusal(first(await params(node, payload=b"x" * size)))
        assert error.kind is RE, size
    error = await site.refusal(first(await params(node)), answer(b"x" * ((1 << 20) + 1)))
    assert error.kind is RE
    await site.attest(node)


@pytest.mark.parametrize("name", ["tpm_devid", "x\0y", "../tpm", "TPM", "tpm\n", "t" * 10_000])
async def test_types_nobody_configured(site: Site, name: str) -> None:
    error = await site.refusal(first(await params(site.node(), type=name)))
    assert error.kind is ErrorKind.FAILED_PRECONDITION
    assert len(error.message) < 200
    assert error.message.isprintable()


async def test_no_way_back_to_evidence_without_a_quote(site: Site) -> None:
    node = site.node()
    await site.attest(node)
    plain = node.payload().replace(b'"spire_hw"', b'"other"')
    error = await site.refusal(first(await params(node, payload=plain)))
    assert error.kind in {IA, ErrorKind.PERMISSION_DENIED}
    await site.attest(node)


async def test_node_that_was_quoted_never_falls_back_where_activation_is_enough(
    short_dir: Path, clock: SimClock
) -> None:
    site = await Site.open(short_dir, clock, "accept_activation_only = true")
    try:
        quoted, plain = site.node(), site.node()
        for node in (quoted, plain):
            node.certificate = site.vendor.root.issue(ek_spec(node.tpm.ek.private.public_key()))
        await site.attest(quoted)
        error = await refused(lambda: activate(site, quoted))
        assert error.kind is ErrorKind.PERMISSION_DENIED
        assert error.message.endswith(
            "policy: node attested with quotes before and may not fall back [downgrade]"
        )
        await site.attest(quoted)
        assert (await activate(site, plain)).reattestable
        await site.attest(plain)
        with pytest.raises(SpireHwError, match=r"\[downgrade\]"):
            await activate(site, plain)
        assert await site.agents() == 2
    finally:
        await site.close()


async def activate(site: Site, node: TpmNode) -> pb.AttestAgentResponse.Result:
    """Attest by activation alone."""
    payload = encode_attestation_data(replace(node.data(), ek_pub=None))
    async with await site.channel() as channel, stream_on(channel) as call:
        await call.send(first(await params(node, payload=payload)))
        sealed = dialects.decode_challenge((await received(call)).challenge)
        assert sealed is not None
        await call.send(answer(dialects.encode_response(node.tpm.activate(*sealed))))
        return (await received(call)).result


async def test_an_answer_is_worth_nothing_on_another_stream(site: Site) -> None:
    node = site.node()
    async with await site.channel() as channel, stream_on(channel) as call:
        await call.send(first(await params(node)))
        old = answer(node.answer((await received(call)).challenge))
        await call.send(old)
        await received(call)
    message = first(await params(node))
    error = await site.refusal(message, old)
    assert "secret does not match" in error.message
    assert (await site.refusal(old)).kind is IA


async def test_a_restart_makes_open_challenges_worthless(
    site: Site, short_dir: Path, clock: SimClock
) -> None:
    node = site.node()
    async with await site.channel() as channel, stream_on(channel) as call:
        await call.send(first(await params(node)))
        challenge = (await received(call)).challenge
        old = answer(node.answer(challenge))
        await site.close()
        with pytest.raises(SpireHwError) as caught:  # noqa: PT012 - either may notice
            await call.send(old)
            await call.receive()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    again = await Site.open(short_dir, clock)
    site.server, site.operator = again.server, again.operator
    (short_dir / "roots.der").write_bytes(site.vendor.root.certificate)
    error = await site.refusal(first(await params(node)), old)
    assert error.kind in {IA, ErrorKind.PERMISSION_DENIED}


async def test_guessing_is_limited_to_a_trickle(short_dir: Path, clock: SimClock) -> None:
    text = server_config(short_dir, key_manager="memory")
    server = Server(build_settings(hcl.parse(text, "server.conf")), clock=clock)
    await server.start()
    operator = Operator(server.settings.socket_path)
    stranger = ScriptedAgent(server.port, await operator.bundle(), clock)
    tasks = Tasks(on_failure=lambda name, error: None)
    try:
        # Time stands still: one guess is let through, some may wait, the rest is sent away.
        left = {tasks.spawn("guess", stranger.attest(f"guess-{n}")) for n in range(32)}
        kinds: list[ErrorKind] = []
        async with asyncio.timeout(TIMEOUT_S):
            while kinds.count(RE) < 8:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for guess in done:
                    error = guess.exception()
                    assert isinstance(error, SpireHwError)
                    kinds.append(error.kind)
        assert kinds.count(IA) <= 1
        assert set(kinds) <= {IA, RE}
    finally:
        await tasks.close()
        await operator.close()
        await server.close()


def csr_of(key: Any, *extensions: x509.ExtensionType, algorithm: Any = None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm = algorithm or hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)


KEY = ec.generate_private_key(ec.SECP256R1())


def uri(text: str) -> x509.ExtensionType:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(text)])


def broken_signature() -> bytes:
    sound = bytearray(csr_of(KEY))
    sound[-1] ^= 1
    return bytes(sound)


def odd_point(form: int) -> bytes:
    """Return a well signed request whose key is not in the usual form."""
    numbers = KEY.public_key().public_numbers()
    x, y = (n.to_bytes(32, "big") for n in (numbers.x, numbers.y))
    point = bytes((form | numbers.y & 1,)) + x + (y if form == HYBRID else b"")
    kind = tlv(0x30, oid("1.2.840.10045.2.1"), oid("1.2.840.10045.3.1.7"))
    key = tlv(0x30, kind, tlv(0x03, b"\0" + point))
    body = tlv(0x30, integer(0), common_name("x"), key, tlv(0xA0))
    signature = KEY.sign(body, ec.ECDSA(hashes.SHA256()))
    return tlv(0x30, body, tlv(0x30, oid("1.2.840.10045.4.3.2")), tlv(0x03, b"\0" + signature))


UNCOMPRESSED, COMPRESSED, HYBRID = 4, 2, 6
SOUND = csr_of(KEY)
REQUESTS = {
    "broken signature": broken_signature(),
    "PEM": b"-----BEGIN CERTIFICATE REQUEST-----\n",
    "cut": SOUND[:-3],
    "trailing": SOUND + b"\0",
    "64 KiB of attributes": csr_of(
        KEY, x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x" * 65_536)
    ),
    "another agent": csr_of(KEY, uri("spiffe://example.org/spire/agent/tpm/other")),
    "the server": csr_of(KEY, uri("spiffe://example.org/spire/server")),
    "DNS name": csr_of(KEY, x509.SubjectAlternativeName([x509.DNSName("example.org")])),
    "CA true": csr_of(KEY, x509.BasicConstraints(ca=True, path_length=None)),
    "RSA-1024": csr_of(rsa.generate_private_key(65_537, 1024)),  # noqa: S505 - it is to be refused
    "RSA exponent 3": csr_of(rsa.generate_private_key(3, 2048)),
    "P-224": csr_of(ec.generate_private_key(ec.SECP224R1())),
    "secp256k1": csr_of(ec.generate_private_key(ec.SECP256K1())),
    "compressed point": odd_point(COMPRESSED),
    "hybrid point": odd_point(HYBRID),
    "Ed25519": csr_of(ed25519.Ed25519PrivateKey.generate()),
    "SHA-1": SOUND.replace(bytes.fromhex("06082a8648ce3d040302"), bytes.fromhex("06082a8648ce3d040301")),
    "empty sequence": b"\x30\x00",
}  # fmt: skip


@pytest.mark.parametrize("row", REQUESTS)
async def test_requests_that_are_refused(site: Site, row: str) -> None:
    node = site.node()
    error = await site.refusal(first(await params(node, csr=REQUESTS[row])))
    assert error.kind is IA
    token = await site.operator.token()
    stranger = ScriptedAgent(site.server.port, await site.operator.bundle(), site.server.clock)
    spent = pb.AttestAgentRequest.Params(
        data=types_pb2.AttestationData(type="join_token", payload=token.encode()),
        params=pb.AgentX509SVIDParams(csr=REQUESTS[row]),
    )
    assert (await site.refusal(first(spent))).kind is IA
    await stranger.attest(token)  # a bad request did not spend it


# -- keys of other nodes -----------------------------------------------------------------


def borrower(site: Site, owner: TpmNode, role: str) -> TpmNode:
    """Return another machine that has one key of an attested node as well."""
    assert owner.key is not None
    node = site.node()
    match role:
        case "AK":
            node.tpm = replace(node.tpm, ak=owner.tpm.ak)
        case "CSR key":
            node.key = owner.key
        case "AK that is a CSR key":
            node.tpm = replace(node.tpm, ak=make_ak_of(owner.key.private))
        case _:
            node.key = SoftKey(owner.tpm.ak.private, make_svid_public(owner.tpm.ak.private), OWNER)
    return node


def make_ak_of(private: PrivateKey) -> SoftKey:
    public = encode_public(private, AK_ATTRIBUTES, scheme=default_scheme(private))
    return SoftKey(private, public, ENDORSEMENT)


def make_svid_public(private: PrivateKey) -> bytes:
    return encode_public(private, SVID_KEY_ATTRIBUTES)


AK_REUSED = "nodeattestor(tpm): ak: key belongs to another node [ak_reused]"
KEY_REUSED = "csr: key belongs to another node [key_reused]"


@pytest.mark.parametrize(
    ("role", "refusal"),
    [
        ("AK", AK_REUSED),
        ("AK that is a CSR key", AK_REUSED),
        ("CSR key", KEY_REUSED),
        ("CSR key that is an AK", KEY_REUSED),
    ],
)
async def test_a_key_of_another_node(
    site: Site, monkeypatch: pytest.MonkeyPatch, role: str, refusal: str
) -> None:
    owner = site.node()
    owner_id = (await site.attest(owner)).svid.id
    other = borrower(site, owner, role)

    async def sign(*_: Any) -> Any:
        raise AssertionError("nothing is to be signed for it")

    with monkeypatch.context() as patched:
        patched.setattr(site.server.manager._issuer, "agent_svid", sign)
        error = await refused(lambda: site.attest(other))
    assert error.kind is ErrorKind.PERMISSION_DENIED
    assert error.message == refusal
    assert await site.agents() == 1
    await site.attest(owner)
    await site.operator.channel.unary(
        AGENT + "DeleteAgent",
        pb.DeleteAgentRequest(id=owner_id),
        empty_pb2.Empty,
        timeout_s=TIMEOUT_S,
    )
    await site.attest(other)


async def test_a_renewal_for_a_key_of_another_node(site: Site) -> None:
    owner = site.node()
    await site.attest(owner)
    assert owner.key is not None
    agent = await joined_agent(site.server, site.operator)
    request = pb.RenewAgentRequest(
        params=pb.AgentX509SVIDParams(csr=await make_csr(owner.key.private))
    )
    with pytest.raises(SpireHwError) as caught:
        await agent.call(AGENT + "RenewAgent", request, pb.RenewAgentResponse)
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED
    assert caught.value.message == KEY_REUSED


# -- several at once ---------------------------------------------------------------------


async def test_two_good_exchanges_of_one_node_have_one_winner(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = site.node()
    issuing, go_on = asyncio.Event(), asyncio.Event()
    issuer = site.server.manager._issuer
    plain = issuer.agent_svid

    async def slow(*arguments: Any) -> Any:
        issuing.set()
        await go_on.wait()
        return await plain(*arguments)

    monkeypatch.setattr(issuer, "agent_svid", slow)
    tasks = Tasks(on_failure=lambda name, error: None)
    winner = tasks.spawn("winner", site.attest(node))
    await asyncio.wait_for(issuing.wait(), TIMEOUT_S)
    with pytest.raises(LimitError, match="attesting already"):
        await site.attest(node)
    go_on.set()
    assert (await winner).reattestable
    assert await site.agents() == 1
    await tasks.close()


async def test_a_thief_of_the_certificate_next_door_holds_the_node_off_for_seconds_only(
    site: Site, clock: SimClock
) -> None:
    node, thief = site.node(), site.node()
    thief.tpm, thief.certificate = SoftTpm(ek=node.tpm.ek), node.certificate
    thief.chain = node.chain
    async with await site.channel() as channel, stream_on(channel) as call:
        await call.send(first(await params(thief)))
        await received(call)
        with pytest.raises(LimitError):
            await site.attest(node)
        await clock.advance(timedelta(seconds=10))
        await site.attest(node)
        with pytest.raises(LimitError):
            await call.receive()
    assert await site.agents() == 1

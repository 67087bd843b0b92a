"""Agent half of x509pop: what it shows, what it signs with, and servers that ask for odd things."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from spire_hw.config import hcl
from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError
from spire_hw.key import KeyType
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity, SvidKey
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_plugins.keymanager import memory
from spire_hw_plugins.nodeattestor.x509pop import agent, server
from spire_hw_sim.clock import SimClock
from spire_hw_sim.nodepki import PEM, Holder, make_root, rsa_key
from spire_hw_sim.pki import now

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_plugins.keymanager.memory import MemoryKeyManager

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
NONCE = {"nonce": "A" * 43 + "="}


@dataclass
class Wire:
    """Both ends of one attestation stream."""

    to_server: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    to_agent: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)

    async def send(self, data: bytes) -> None:
        await self.to_server.put(data)

    async def receive(self) -> bytes:
        return await self.to_agent.get()

    async def challenge(self, data: bytes) -> bytes:
        await self.to_agent.put(data)
        return await self.to_server.get()


def host(directory: Path, side: Side) -> HostInfo:
    return HostInfo(side, TD, directory, get_logger("test"), SimClock(now()))


@dataclass
class Bench:
    """An agent half, a server half that trusts a root, and what is between them."""

    directory: Path
    root: Holder
    keys: MemoryKeyManager
    configured: bool = False

    @property
    def config(self) -> str:
        return (
            f'private_key_path = "{self.directory}/node.key"\n'
            f'certificate_path = "{self.directory}/node.crt"\n'
        )

    async def agent(self, config: str | None = None) -> agent.X509PopAgent:
        plugin = agent.build(host(self.directory, Side.AGENT))
        body = hcl.parse(config or self.config, "agent.conf")
        assert plugin.validate(body) == []
        await plugin.configure(body)
        return plugin

    async def svid_key(self) -> SvidKey:
        if not self.configured:
            await self.keys.configure(hcl.parse("", "agent.conf"))
            self.configured = True
        made = await self.keys.generate_key("agent-svid-A", KeyType.EC_P256)
        return SvidKey(self.keys, made.key_id, made.public_key)

    async def attest(self, plugin: agent.X509PopAgent, *, lend: bool = True) -> AttestedIdentity:
        """Run both halves against each other."""
        path = self.directory / "ca.pem"
        path.write_bytes(self.root.certificate.public_bytes(PEM))
        other = server.build(host(self.directory, Side.SERVER))
        await other.configure(hcl.parse(f'ca_bundle_path = "{path}"', "server.conf"))
        wire = Wire()

        async def admit(_: SpiffeId) -> None:
            return

        async def serve() -> AttestedIdentity:
            payload = await wire.to_server.get()
            request = AttestationRequest(payload, wire.challenge, None, admit)
            return await other.attest(request)

        lent = await self.svid_key() if lend else None
        failure: Exception | None = None
        try:
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                serving = group.create_task(serve())
                await plugin.aid_attestation(wire, lent)
        except* SpireHwError as e:
            failure = e.exceptions[0]
        if failure is not None:
            raise failure
        return serving.result()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, make_root(), memory.build(host(tmp_path, Side.AGENT)))


@pytest.mark.parametrize(
    "key",
    [
        rsa_key(),
        rsa_key(3072),
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
    ],
    ids=["rsa-2048", "rsa-3072", "p256", "p384", "p521"],
)
@pytest.mark.parametrize("form", ["PKCS8", "TraditionalOpenSSL"])
async def test_keys_in_files(bench: Bench, key: Any, form: str) -> None:
    _, path = bench.root.issue(key).write(bench.directory, "node")
    shape = getattr(serialization.PrivateFormat, form)
    path.write_bytes(key.private_bytes(PEM, shape, serialization.NoEncryption()))
    made = await bench.attest(await bench.agent(), lend=False)
    assert made.agent_id.path.startswith("/spire/agent/x509pop/")


async def test_intermediates(bench: Bench) -> None:
    node = bench.root.below().below(common_name="Deeper").issue()
    node.write(bench.directory, "node")
    await bench.attest(await bench.agent())
    one = Holder(node.key, node.certificate)
    one.write(bench.directory, "node")
    with pytest.raises(SpireHwError, match="no authority"):
        await bench.attest(await bench.agent())
    more = bench.directory / "more.pem"
    more.write_bytes(b"".join(c.public_bytes(PEM) for c in node.above))
    await bench.attest(await bench.agent(bench.config + f'intermediates_path = "{more}"'))


async def test_certificate_is_read_again_at_every_attestation(bench: Bench) -> None:
    bench.root.issue().write(bench.directory, "node")
    plugin = await bench.agent()
    first = await bench.attest(plugin)
    bench.root.issue().write(bench.directory, "node")
    assert (await bench.attest(plugin)).agent_id != first.agent_id


async def test_key_of_the_key_manager(bench: Bench) -> None:
    config = (
        f'private_key_path = "keymanager:node"\ncertificate_path = "{bench.directory}/node.crt"\n'
    )
    plugin = await bench.agent(config)
    with pytest.raises(NotReadyError) as caught:
        await bench.attest(plugin)
    request_path = bench.directory / "x509pop-node.csr"
    assert str(request_path) in caught.value.message
    request = x509.load_pem_x509_csr(request_path.read_bytes())
    assert request.is_signature_valid

    class Theirs:
        def public_key(self) -> Any:
            return request.public_key()

    node = bench.root.issue(Theirs())
    (bench.directory / "node.crt").write_bytes(node.certificate.public_bytes(PEM))
    made = await bench.attest(plugin)
    assert made.agent_id.path.startswith("/spire/agent/x509pop/")
    await bench.keys.generate_key("node", KeyType.EC_P256)  # lost and made anew
    with pytest.raises(NotReadyError, match="for another key"):
        await bench.attest(plugin)
    with pytest.raises(NotReadyError, match="does not lend its KeyManager"):
        await bench.attest(plugin, lend=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "private_key_path is required"),
        ('private_key_path = "/k"', "certificate_path is required"),
        ('certificate_path = "/c"', "private_key_path is required"),
        ('private_key_path = "keymanager:"\ncertificate_path = "/c"', "comes a key id"),
        ('private_key_path = "keymanager:../x"\ncertificate_path = "/c"', "comes a key id"),
        ('private_key_path = "keymanager:agent-svid-A"\ncertificate_path = "/c"', "own SVID"),
        ('private_key_pth = "/k"', 'did you mean "private_key_path"?'),
    ],
)
async def test_configurations_that_cannot_be_used(bench: Bench, config: str, words: str) -> None:
    plugin = agent.build(host(bench.directory, Side.AGENT))
    found = plugin.validate(hcl.parse(config, "agent.conf"))
    assert any(words in fault.message for fault in found)
    with pytest.raises(InvalidInputError):
        await plugin.configure(hcl.parse(config, "agent.conf"))


async def test_files_that_cannot_be_used(bench: Bench) -> None:
    certificate, key = bench.root.issue().write(bench.directory, "node")
    good = {path: path.read_bytes() for path in (certificate, key)}
    other = bench.root.issue(rsa_key())
    secret = serialization.BestAvailableEncryption(b"secret")
    pkcs8 = serialization.PrivateFormat.PKCS8
    odd = ed25519.Ed25519PrivateKey.generate()
    wrong: list[tuple[Path, bytes | None, str]] = [
        (key, None, "cannot be read"),
        (key, b"", "holds no private key"),
        (key, good[certificate], "holds no private key"),
        (key, b"x" * (2 << 20), "larger than 1 MiB"),
        (key, other.key.private_bytes(PEM, pkcs8, secret), "is encrypted"),
        (key, other.key.private_bytes(PEM, pkcs8, serialization.NoEncryption()), "another key"),
        (key, odd.private_bytes(PEM, pkcs8, serialization.NoEncryption()), "is not an RSA or EC"),
        (certificate, None, "cannot be read"),
        (certificate, good[key], "holds no certificate"),
        (certificate, other.certificate.public_bytes(PEM), "another key"),
    ]
    for path, content, words in wrong:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(SpireHwError) as caught:
            await bench.agent()
        assert words in caught.value.message
        assert "secret" not in caught.value.message
        path.write_bytes(good[path])
    await bench.agent()


@pytest.mark.parametrize(
    ("challenge", "words"),
    [
        (b"", "envelope"),
        (b"{}", "exactly one"),
        (b'{"rsa_signature": {"nonce": "AAAA"}}', "nonce is 3 bytes"),
        (b'{"ecdsa_signature": {"nonce": "AAAA"}}', "nonce is 3 bytes"),
        (b'{"ecdsa_signature": {}}', "is missing"),
        (b'{"ecdsa_signature": []}', "an object"),
        (b'{"ecdsa_signature": {"nonce": 1}}', "a string"),
        (b'{"ecdsa_signature": {"nonce": "' + b"A" * 30000 + b'"}}', "limit"),
        (json.dumps({"rsa_signature": NONCE}).encode(), "cannot give"),
        (json.dumps({"rsa_signature": NONCE, "ecdsa_signature": NONCE}).encode(), "exactly one"),
    ],
)
async def test_challenges_that_are_not_answered(bench: Bench, challenge: bytes, words: str) -> None:
    bench.root.issue().write(bench.directory, "node")
    plugin = await bench.agent()
    wire = Wire()
    await wire.to_agent.put(challenge)
    with pytest.raises(SpireHwError) as caught:
        await plugin.aid_attestation(wire, None)
    assert words in caught.value.message
    assert wire.to_server.qsize() == 1  # the payload, and no signature


async def test_two_answers_to_one_challenge_differ(bench: Bench) -> None:
    """The agent's own nonce is new each time: the server does not choose what is signed."""
    node = bench.root.issue()
    node.write(bench.directory, "node")
    plugin = await bench.agent()
    challenge = json.dumps({"ecdsa_signature": NONCE}).encode()
    seen = set()
    for _ in range(2):
        wire = Wire()
        await wire.to_agent.put(challenge)
        await plugin.aid_attestation(wire, None)
        await wire.to_server.get()
        seen.add(json.loads(await wire.to_server.get())["ecdsa_signature"]["nonce"])
    assert len(seen) == 2

"""x509pop with a key in a PKCS#11 token that another program made."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization

from spire_hw.config import hcl
from spire_hw.errors import InvalidInputError, NotFoundError, NotReadyError, SpireHwError
from spire_hw.log import get_logger
from spire_hw.pkcs11.errors import TokenError
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.nodeattestor.x509pop import agent, wire
from spire_hw_sim.clock import SimClock
from spire_hw_sim.nodepki import Holder, make_root
from spire_hw_sim.pki import now
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.asyncio, pytest.mark.hsm]

TOKEN, PIN = "node", "31415926"


@dataclass
class Public:
    """Stands for a key whose private half is in the token."""

    key: Any

    def public_key(self) -> Any:
        return self.key


@dataclass
class Machine:
    """A node whose key was made in a token by pkcs11-tool."""

    directory: Path
    hsm: SoftHsm
    root: Holder

    def tool(self, *arguments: str) -> bytes:
        done = subprocess.run(  # noqa: S603 - pkcs11-tool with arguments of this file
            [
                *("pkcs11-tool", "--module", self.hsm.module, "--token-label", TOKEN),
                *("--login", "--pin", "env:NODE_PIN", *arguments),
            ],
            capture_output=True,
            check=True,
            env={**os.environ, **self.hsm.environment, "NODE_PIN": PIN},
        )
        return done.stdout

    def make_key(self, kind: str, label: str = "machine", cka_id: str = "01") -> None:
        """Make a key pair and write a certificate for it."""
        named = ("--label", label, "--id", cka_id)
        self.tool("--keypairgen", "--key-type", kind, *named)
        der = self.tool("--read-object", "--type", "pubkey", *named)
        node = self.root.issue(Public(serialization.load_der_public_key(der)))
        pem = node.certificate.public_bytes(serialization.Encoding.PEM)
        (self.directory / "node.crt").write_bytes(pem)

    def uri(self, path: str = f"token={TOKEN};object=machine") -> str:
        query = f"module-path={self.hsm.module}&pin-source=file:{self.directory}/pin"
        return f"pkcs11:{path}?{query}"

    async def agent(self, uri: str) -> agent.X509PopAgent:
        host = HostInfo(
            Side.AGENT, TrustDomain("example.org"), self.directory, get_logger("t"), SimClock(now())
        )
        plugin = agent.build(host)
        text = f'private_key_path = "{uri}"\ncertificate_path = "{self.directory}/node.crt"'
        body = hcl.parse(text, "agent.conf")
        assert [fault.message for fault in plugin.validate(body)] == []
        await plugin.configure(body)
        return plugin

    async def prove(self, plugin: agent.X509PopAgent) -> None:
        """Be the server, and check what the agent proves."""
        sent: list[bytes] = []
        challenges: list[wire.Challenge] = []

        class Exchange:
            async def send(self, data: bytes) -> None:
                sent.append(data)

            async def receive(self) -> bytes:
                (der,) = wire.decode_payload(sent[0], max_certificates=1)
                key = agent.public_key_of(agent.load_certificate(der))
                challenges.append(wire.Challenge(wire.Scheme.of(key), os.urandom(32)))
                return wire.encode_challenge(challenges[0])

        await plugin.aid_attestation(Exchange(), None)
        (der,) = wire.decode_payload(sent[0], max_certificates=1)
        key = agent.public_key_of(agent.load_certificate(der))
        wire.verify_response(key, challenges[0], wire.decode_response(sent[1]))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    hsm = SoftHsm(tmp_path / "hsm")
    hsm.init_token(TOKEN, PIN)
    for name, value in hsm.environment.items():
        monkeypatch.setenv(name, value)
    pin = tmp_path / "pin"
    pin.touch(mode=0o600)
    pin.write_text(PIN + "\n")
    return Machine(tmp_path, hsm, make_root())


@pytest.mark.parametrize("kind", ["EC:prime256v1", "rsa:2048"])
async def test_a_key_in_a_token_proves_itself(machine: Machine, kind: str) -> None:
    machine.make_key(kind)
    plugin = await machine.agent(machine.uri())
    await machine.prove(plugin)
    await machine.prove(plugin)
    await machine.prove(await machine.agent(machine.uri(f"token={TOKEN};id=%01")))


async def test_a_key_that_is_not_the_certificate_s(machine: Machine) -> None:
    machine.make_key("EC:prime256v1")
    certificate = (machine.directory / "node.crt").read_bytes()
    machine.make_key("EC:prime256v1", label="other", cka_id="02")
    (machine.directory / "node.crt").write_bytes(certificate)
    with pytest.raises(SpireHwError, match="is not the certificate's"):
        await machine.prove(await machine.agent(machine.uri(f"token={TOKEN};object=other")))
    with pytest.raises(NotFoundError, match=r"no private key in token .* fits label"):
        await machine.prove(await machine.agent(machine.uri(f"token={TOKEN};object=mach")))


async def test_a_label_that_several_keys_have(machine: Machine) -> None:
    machine.make_key("EC:prime256v1")
    machine.make_key("EC:prime256v1", cka_id="02")
    with pytest.raises(NotReadyError, match="several keys"):
        await machine.prove(await machine.agent(machine.uri()))
    await machine.prove(await machine.agent(machine.uri(f"token={TOKEN};object=machine;id=%02")))


async def test_a_refused_pin_is_sent_once(machine: Machine) -> None:
    machine.make_key("EC:prime256v1")
    (machine.directory / "pin").write_text("00000000\n")
    plugin = await machine.agent(machine.uri())
    for _ in range(4):  # SoftHSM locks a token after three wrong ones
        with pytest.raises(SpireHwError) as caught:
            await machine.prove(plugin)
        assert "00000000" not in caught.value.message
    # Nor by another plugin of this process.
    with pytest.raises(SpireHwError, match="PIN refused") as caught:
        await machine.prove(await machine.agent(machine.uri()))
    cause = caught.value if isinstance(caught.value, TokenError) else caught.value.__cause__
    assert isinstance(cause, TokenError)
    assert cause.reason == "hsm.pin_latched"
    (machine.directory / "pin").write_text(PIN)
    await machine.prove(plugin)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("pkcs11:token=t;object=o", "names no module"),
        ("pkcs11:token=t;object=o?module-path=/m", "names no PIN file"),
        ("pkcs11:token=t?module-path=/m&pin-source=file:/p", "names no key"),
        ("pkcs11:object=o?module-path=/m&pin-source=file:/p", "names no token"),
        ("pkcs11:token=t;object=o?module-path=/m&pin-value=1234", "holds a PIN"),
        ("pkcs11:token=t;object=o?module-path=m&pin-source=file:/p", "not absolute"),
        ("pkcs11:token=t;object=o?module-path=/m&pin-source=|cat", "is a command"),
        ("pkcs11:token=t;object=o;library-version=1?module-path=/m&pin-source=file:/p", "cannot"),
        ("pkcs11:token=t;object=o;type=cert?module-path=/m&pin-source=file:/p", "type cannot"),
        ("pkcs11:nonsense", "name=value"),
    ],
)
async def test_uris_that_cannot_be_used(machine: Machine, uri: str, words: str) -> None:
    host = HostInfo(
        Side.AGENT, TrustDomain("example.org"), machine.directory, get_logger("t"), SimClock(now())
    )
    body = hcl.parse(f'private_key_path = {json.dumps(uri)}\ncertificate_path = "/c"', "agent.conf")
    (fault,) = agent.build(host).validate(body)
    assert words in fault.message
    assert "1234" not in fault.message
    with pytest.raises(InvalidInputError):
        await agent.build(host).configure(body)

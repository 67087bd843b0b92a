"""DevID keys in a TPM, from their making to the attestation of their node."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.config.hcl import parse
from spire_hw.errors import (
    ConfigError,
    ErrorKind,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import HashAlgorithm, KeyType, verify_digest
from spire_hw.plugin.nodeattestor import AttestationRequest
from spire_hw.tpm import devid
from spire_hw.tpm.attest import AkKind
from spire_hw.tpm.device import TpmDevice
from spire_hw.tpm.devid import DevIdKey
from spire_hw.tpm.errors import Rc, TpmError
from spire_hw.tpm.keys import KeyBlob
from spire_hw.tpm.storage import KeyLostError
from spire_hw_plugins.nodeattestor.tpm_devid import agent, server, wire
from spire_hw_sim.nodepki import PEM, Holder, make_root
from spire_hw_sim.tpm_bus import TpmBus, refusal
from spire_hw_sim.tpm_command import ENDORSEMENT, OWNER
from tests.integration.tpm.leaks import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.nodeattestor import AttestedIdentity
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_sim.manufacturer import Manufacturer
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
SIGN, CERTIFY, ACTIVATE, LOAD, CREATE_PRIMARY = 0x15D, 0x148, 0x147, 0x157, 0x131


@dataclass(frozen=True)
class Public:
    """A key whose private half is in a TPM, as an issuer sees it."""

    key: Any

    def public_key(self) -> Any:
        return self.key


class Exchange:
    """Both ends of one attestation in one process."""

    def __init__(self) -> None:
        self.to_server: asyncio.Queue[bytes] = asyncio.Queue()
        self.to_agent: asyncio.Queue[bytes] = asyncio.Queue()

    async def send(self, data: bytes) -> None:
        await self.to_server.put(data)

    async def receive(self) -> bytes:
        return await self.to_agent.get()

    async def next_challenge(self) -> bytes | None:
        return await self.receive()


class Bench:
    """A server half, an agent half and what they are configured with."""

    def __init__(
        self, agent_host: HostInfo, server_host: HostInfo, maker: Manufacturer, folder: Path
    ) -> None:
        self.root = make_root("DevID Root")
        self.folder = folder
        self.agent = agent.build(agent_host)
        self.server = server.build(server_host)
        (folder / "devid-ca.pem").write_bytes(self.root.certificate.public_bytes(PEM))
        maker.write_roots(folder / "makers.pem")

    async def provision(
        self, device: TpmDevice, key_type: KeyType, password: bytes = b"", *, prefixed: bool = False
    ) -> KeyBlob:
        """Make a key and write the files of its node."""
        blob = await device.run(
            "make DevID", lambda c: devid.create_devid(c, key_type, password), timeout_s=120
        )
        start = 0 if prefixed else 2
        (self.folder / "devid.pub").write_bytes(blob.public[start:])
        (self.folder / "devid.priv").write_bytes(blob.private[start:])
        self.certify(blob, self.root)
        return blob

    def certify(self, blob: KeyBlob, issuer: Holder) -> None:
        holder = issuer.issue(Public(blob.parsed.key), common_name="rack-7")
        text = b"".join(c.public_bytes(PEM) for c in (holder.certificate, *holder.above))
        (self.folder / "devid.pem").write_bytes(text)

    async def configure(self, tcti: str, more: str = "") -> None:
        folder = self.folder
        await self.server.configure(
            parse(
                f'devid_ca_path = "{folder / "devid-ca.pem"}"\n'
                f'endorsement_ca_path = "{folder / "makers.pem"}"'
            )
        )
        await self.agent.configure(
            parse(
                f'tcti = "{tcti}"\n'
                f'devid_cert_path = "{folder / "devid.pem"}"\n'
                f'devid_pub_path = "{folder / "devid.pub"}"\n'
                f'devid_priv_path = "{folder / "devid.priv"}"\n{more}'
            )
        )

    async def attest(self) -> AttestedIdentity:
        """Let both halves talk; raise what either raises."""
        exchange = Exchange()

        async def challenge(message: bytes) -> bytes:
            await exchange.to_agent.put(message)
            return await exchange.to_server.get()

        async def admit(_: SpiffeId) -> None:
            return

        async def serve() -> AttestedIdentity:
            payload = await exchange.to_server.get()
            return await self.server.attest(AttestationRequest(payload, challenge, None, admit))

        failed: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                served = group.create_task(serve())
                group.create_task(self.agent.aid_attestation(exchange, None))
        except* SpireHwError as e:
            failed = e.exceptions[0]
        if failed is not None:
            raise failed
        return served.result()


@pytest_asyncio.fixture
async def bench(
    agent_host: HostInfo, server_host: HostInfo, factory: Any, tmp_path: Path
) -> AsyncIterator[Bench]:
    made = Bench(agent_host, server_host, factory.manufacturer, tmp_path)
    yield made
    await made.agent.close()
    await made.server.close()


@pytest_asyncio.fixture
async def device(tpm: Swtpm) -> AsyncIterator[TpmDevice]:
    device = TpmDevice(tpm.tcti)
    yield device
    await device.close()


@pytest.mark.parametrize("key_type", devid.KEY_TYPES)
@pytest.mark.parametrize("ek_type", ["rsa-2048", "ec-p256"])
async def test_a_provisioned_node_attests(
    bench: Bench, device: TpmDevice, tpm: Swtpm, key_type: KeyType, ek_type: str
) -> None:
    await bench.provision(device, key_type)
    await bench.configure(tpm.tcti, f'ek_type = "{ek_type}"')
    with nothing_left_behind(tpm):
        first = await bench.attest()
        assert "subject:cn:rack-7" in first.selector_values
        assert await bench.attest() == first
    tpm.reset(clean=False)
    with nothing_left_behind(tpm):
        assert await bench.attest() == first


async def test_files_with_sizes_are_read_too_and_intermediates_are_sent(
    bench: Bench, device: TpmDevice, tpm: Swtpm
) -> None:
    blob = await bench.provision(device, KeyType.EC_P256, prefixed=True)
    bench.certify(blob, bench.root.below())
    await bench.configure(tpm.tcti)
    made = await bench.attest()
    assert "issuer:cn:Site Intermediate" in made.selector_values
    assert sum(v.startswith("ca:fingerprint:") for v in made.selector_values) == 2


async def test_passwords_of_key_and_hierarchies_do_not_cross_the_bus(
    bench: Bench, tpm: Swtpm
) -> None:
    secrets = {b"devid secret", b"owner secret", b"endorsement secret"}
    with TpmBus(tpm) as bus:
        device = TpmDevice(bus.tcti)
        await bench.provision(device, KeyType.EC_P256, b"devid secret")
        await device.close()
        tpm.commands.set_password(OWNER, b"owner secret")
        tpm.commands.set_password(ENDORSEMENT, b"endorsement secret")
        (bench.folder / "e").write_bytes(b"endorsement secret\n")
        await bench.configure(
            bus.tcti,
            'devid_password = "devid secret"\nowner_hierarchy_password = "owner secret"\n'
            f'endorsement_auth_path = "{bench.folder / "e"}"',
        )
        with nothing_left_behind(tpm):
            await bench.attest()
        seen = b"".join(s.data for s in bus.commands) + b"".join(bus.answers)
        assert not [secret for secret in secrets if secret in seen]
        await bench.agent.close()


async def test_a_wrong_password_of_the_key_is_sent_once(
    bench: Bench, device: TpmDevice, tpm: Swtpm
) -> None:
    await bench.provision(device, KeyType.EC_P256, b"right")
    with TpmBus(tpm) as bus:
        await bench.configure(bus.tcti, 'devid_password = "wrong"')
        with nothing_left_behind(tpm), pytest.raises(TpmError, match="wrong password"):
            await bench.attest()
        sent = sum(seen.code == CERTIFY for seen in bus.commands)
        for _ in range(3):
            with pytest.raises(UnavailableError, match="not sent again"):
                await bench.attest()
        assert sum(seen.code == CERTIFY for seen in bus.commands) == sent
        await bench.configure(bus.tcti, 'devid_password = "right"')
        await bench.attest()
        await bench.agent.close()


@pytest.mark.parametrize(
    "code", [Rc.LOCKOUT, Rc.OBJECT_MEMORY, Rc.SESSION_MEMORY, 0x9A2, Rc.RETRY, Rc.FAILURE]
)
@pytest.mark.parametrize("command", [CERTIFY, ACTIVATE, SIGN])
async def test_a_tpm_that_fails_in_the_middle_ends_the_exchange_and_is_left_clean(
    bench: Bench, device: TpmDevice, tpm: Swtpm, command: int, code: int
) -> None:
    await bench.provision(device, KeyType.EC_P256)
    with TpmBus(tpm) as bus:
        await bench.configure(bus.tcti, 'ek_type = "ec-p256"')
        await bench.attest()
        times = 1 if code == Rc.RETRY else -1

        def fail(seen: Any) -> bytes | None:
            nonlocal times
            if seen.code != command or not times:
                return None
            times -= 1
            return refusal(code)

        bus.on_command = fail
        with nothing_left_behind(tpm):
            if code == Rc.RETRY:
                await bench.attest()
            else:
                with pytest.raises(SpireHwError) as caught:
                    await bench.attest()
                if code != Rc.FAILURE:
                    assert caught.value.kind is ErrorKind.UNAVAILABLE
        bus.on_command = lambda _: None
        await bench.attest()
        await bench.agent.close()


async def test_a_key_of_another_tpm_or_of_before_a_clear_is_told(
    bench: Bench, device: TpmDevice, tpm: Swtpm, other_tpm: Swtpm
) -> None:
    await bench.provision(device, KeyType.EC_P256)
    await bench.configure(other_tpm.tcti)
    with nothing_left_behind(other_tpm), pytest.raises(KeyLostError, match="of another TPM"):
        await bench.attest()
    await bench.configure(tpm.tcti)
    await bench.attest()
    tpm.commands.clear()
    with nothing_left_behind(tpm), pytest.raises(KeyLostError, match="before TPM2_Clear"):
        await bench.attest()


async def test_a_tpm_without_endorsement_certificate_is_told(bench: Bench, bare_tpm: Swtpm) -> None:
    device = TpmDevice(bare_tpm.tcti)
    await bench.provision(device, KeyType.EC_P256)
    await device.close()
    await bench.configure(bare_tpm.tcti)
    with pytest.raises(NotReadyError, match="endorsement certificate"):
        await bench.attest()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (wire.Challenge(bytes(31), bytes(68), bytes(256)), "nonce must be 32 bytes"),
        (wire.Challenge(bytes(32), bytes(68), bytes(256)), "TPM refused the credential"),
        (wire.Challenge(bytes(32), bytes(2000), bytes(256)), "malformed"),
        (wire.Challenge(bytes(32), bytes(68), bytes(1)), "TPM refused the credential"),
    ],
)
async def test_challenges_of_a_server_that_lies_get_no_signature(
    bench: Bench, device: TpmDevice, tpm: Swtpm, message: wire.Challenge, words: str
) -> None:
    await bench.provision(device, KeyType.EC_P256)
    with TpmBus(tpm) as bus:
        await bench.configure(bus.tcti)
        exchange = Exchange()
        await exchange.to_agent.put(wire.encode_challenge(message))
        with nothing_left_behind(tpm), pytest.raises(InvalidInputError, match=words):
            await bench.agent.aid_attestation(exchange, None)
        assert exchange.to_server.qsize() == 1
        assert SIGN not in {seen.code for seen in bus.commands}
        await bench.agent.close()


async def test_files_that_do_not_belong_together_are_told(
    bench: Bench, device: TpmDevice, tpm: Swtpm
) -> None:
    blob = await bench.provision(device, KeyType.EC_P256)
    bench.certify(
        KeyBlob(b"", b"", (await bench.provision(device, KeyType.EC_P256)).parsed), bench.root
    )
    (bench.folder / "devid.pub").write_bytes(blob.public[2:])
    with pytest.raises(InvalidInputError, match="for another key"):
        await bench.configure(tpm.tcti)
    for name, content in (("devid.pub", b""), ("devid.pub", bytes(90)), ("devid.priv", b"x")):
        (bench.folder / name).write_bytes(content)
        with pytest.raises(InvalidInputError):
            await bench.configure(tpm.tcti)
    (bench.folder / "devid.priv").unlink()
    with pytest.raises(SpireHwError):
        await bench.configure(tpm.tcti)


async def test_the_configuration_is_upstreams_and_more(agent_host: HostInfo) -> None:
    plugin = agent.build(agent_host)
    assert [f.message for f in plugin.validate(parse(""))] == [
        "devid_cert_path is required",
        "devid_priv_path is required",
        "devid_pub_path is required",
    ]
    base = 'devid_cert_path = "a"\ndevid_priv_path = "b"\ndevid_pub_path = "c"\n'
    assert plugin.validate(parse(base + 'devid_password = "x"')) == []
    both = base + 'devid_password = "x"\ndevid_auth_path = "y"\ntcti = "a"\ntpm_device_path = "/b"'
    assert len(plugin.validate(parse(both))) == 2
    with pytest.raises(ConfigError):
        await plugin.configure(parse(both))
    with pytest.raises(NotReadyError, match="cannot be read"):
        await plugin.configure(parse(base))


async def test_a_devid_key_signs_only_what_it_is_given(device: TpmDevice, tpm: Swtpm) -> None:
    digest = HashAlgorithm.SHA256.digest(b"nonce")
    with nothing_left_behind(tpm):
        for key_type in devid.KEY_TYPES:
            blob = await device.run("make", lambda c, t=key_type: devid.create_devid(c, t))
            key = DevIdKey(blob)
            made = await device.run("sign", lambda c, k=key: devid.sign_devid(c, k, digest))
            verify_digest(blob.parsed.key, digest, made, devid._OPTIONS)
            for kind in AkKind:
                await device.run(
                    "certify", lambda c, k=key, a=kind: devid.certify_devid(c, k, b"q", a)
                )
            assert isinstance(blob.parsed.key, ec.EllipticCurvePublicKey) is (
                key_type is KeyType.EC_P256
            )
        with pytest.raises(InvalidInputError):
            await device.run("make", lambda c: devid.create_devid(c, KeyType.EC_P384))

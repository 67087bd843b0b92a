"""What a TPM that is busy, or somebody on its bus, does to us."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.tpm import attest, endorsement, keys
from spire_hw.tpm.connection import Connection, Hierarchy
from spire_hw.tpm.credential import Challenge, make_credential
from spire_hw.tpm.device import TpmDevice
from spire_hw.tpm.errors import Rc, TpmError
from spire_hw.tpm.wire import PcrSelection
from spire_hw_sim.tpm_bus import Seen, TpmBus, refusal
from spire_hw_sim.tpm_command import ENDORSEMENT, OWNER
from tests.integration.tpm.leaks import loaded, nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
SIGN, CREATE, QUOTE, ACTIVATE, FLUSH, CERTIFY = 0x15D, 0x153, 0x158, 0x147, 0x165, 0x148
DIGEST = HashAlgorithm.SHA256.digest(b"data")
OPTIONS = SignOptions(HashAlgorithm.SHA256)


@pytest.fixture
def bus(tpm: Swtpm) -> Iterator[TpmBus]:
    with TpmBus(tpm) as bus:
        yield bus


@pytest_asyncio.fixture
async def device(bus: TpmBus) -> AsyncIterator[TpmDevice]:
    device = TpmDevice(bus.tcti)
    yield device
    await device.close()


def answering(bus: TpmBus, command: int, code: int, times: int) -> None:
    """Have a command answered with a code so many times."""
    left = times

    def on_command(seen: Seen) -> bytes | None:
        nonlocal left
        if seen.code != command or left == 0:
            return None
        left -= 1
        return refusal(code)

    bus.on_command = on_command


async def new_key(device: TpmDevice) -> keys.KeyBlob:
    blob, _ = await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256))
    return blob


@pytest.mark.parametrize("code", [Rc.RETRY, Rc.YIELDED, Rc.TESTING, Rc.NV_RATE])
async def test_a_busy_tpm_is_asked_again(
    device: TpmDevice, bus: TpmBus, tpm: Swtpm, code: Rc
) -> None:
    blob = await new_key(device)
    answering(bus, SIGN, code, 4)
    with nothing_left_behind(tpm):
        assert await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS))
    assert sum(seen.code == SIGN for seen in bus.commands) == 5


async def test_a_tpm_that_stays_busy_is_unavailable_when_time_is_up(
    device: TpmDevice, bus: TpmBus, tpm: Swtpm
) -> None:
    blob = await new_key(device)
    answering(bus, SIGN, Rc.RETRY, -1)
    with nothing_left_behind(tpm), pytest.raises(TpmError, match="TPM_RC_RETRY") as caught:
        await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS), timeout_s=0.3)
    assert caught.value.retryable
    assert caught.value.kind is ErrorKind.UNAVAILABLE


@pytest.mark.parametrize("command", [SIGN, CREATE, QUOTE, ACTIVATE, CERTIFY])
async def test_a_refused_command_leaves_nothing_loaded(
    device: TpmDevice, bus: TpmBus, tpm: Swtpm, command: int
) -> None:
    blob = await new_key(device)
    ek = await device.run("find EK", endorsement.find_endorsement)
    ak = await device.run("make AK", attest.create_attestation_key)
    sealed = make_credential(ek.parsed, ak.name, bytes(32))
    answering(bus, command, Rc.LOCKOUT, -1)

    async def everything() -> None:
        await new_key(device)
        await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS))
        await device.run("activate", lambda c: _activate(c, ek, sealed))
        await device.run("certify", lambda c: attest.certify(c, blob, bytes(32)))
        selection = PcrSelection("sha256", (0, 7))
        await device.run("quote", lambda c: attest.quote(c, selection, bytes(32)))

    with nothing_left_behind(tpm), pytest.raises(TpmError, match="locked"):
        await everything()
    bus.on_command = lambda _: None
    await everything()
    assert loaded(tpm) == []


def _activate(connection: Connection, ek: endorsement.Endorsement, sealed: Challenge) -> bytes:
    return attest.activate(connection, ek, sealed.id_object, sealed.encrypted_secret)


async def test_a_flush_that_fails_makes_a_new_connection(device: TpmDevice, bus: TpmBus) -> None:
    blob = await new_key(device)
    answering(bus, FLUSH, Rc.HANDLE, 1)
    assert await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS))
    assert await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS))


async def test_a_signature_that_was_altered_does_not_leave(
    device: TpmDevice, bus: TpmBus, tpm: Swtpm
) -> None:
    blob = await new_key(device)

    def alter(seen: Seen, answer: bytes) -> bytes:
        if seen.code != SIGN:
            return answer
        return answer[:40] + bytes([answer[40] ^ 1]) + answer[41:]

    bus.on_answer = alter
    with nothing_left_behind(tpm), pytest.raises(SpireHwError, match="does not verify"):
        await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS))


@pytest.mark.parametrize("ek_type", [endorsement.EkType.EC_P256, endorsement.EkType.RSA_2048])
async def test_the_activation_secret_and_passwords_do_not_cross_the_bus(
    device: TpmDevice, bus: TpmBus, tpm: Swtpm, ek_type: endorsement.EkType
) -> None:
    passwords = {Hierarchy.ENDORSEMENT: b"endorsement secret", Hierarchy.OWNER: b"owner secret"}
    tpm.commands.set_password(ENDORSEMENT, passwords[Hierarchy.ENDORSEMENT])
    tpm.commands.set_password(OWNER, passwords[Hierarchy.OWNER])
    for hierarchy, password in passwords.items():
        device.set_password(hierarchy, password)
    secret = secrets.token_bytes(32)
    with nothing_left_behind(tpm):
        await new_key(device)
        ek = await device.run("find EK", lambda c: endorsement.find_endorsement(c, ek_type))
        ak = await device.run("make AK", attest.create_attestation_key)
        sealed = make_credential(ek.parsed, ak.name, secret)
        assert await device.run("activate", lambda c: _activate(c, ek, sealed)) == secret
    seen = b"".join(s.data for s in bus.commands) + b"".join(bus.answers)
    for hidden in (secret, *passwords.values()):
        assert hidden not in seen


async def test_a_quote_is_made_again_when_a_pcr_changed_after_it_was_read(
    device: TpmDevice, bus: TpmBus, tpm: Swtpm
) -> None:
    await device.run("make AK", attest.create_attestation_key)
    selection = PcrSelection("sha256", tuple(range(24)))
    changes = 2

    def measure(seen: Seen) -> bytes | None:
        nonlocal changes
        if seen.code == QUOTE and changes:
            changes -= 1
            tpm.extend_pcr(10, b"another file")
        return None

    bus.on_command = measure
    made = await device.run("quote", lambda c: attest.quote(c, selection, bytes(32)))
    assert len(made.values) == 24
    assert sum(seen.code == QUOTE for seen in bus.commands) == 3
    changes = 100
    with nothing_left_behind(tpm), pytest.raises(UnavailableError, match="PCRs changed"):
        await device.run("quote", lambda c: attest.quote(c, selection, bytes(32)))


async def test_answers_of_random_bytes_are_errors_of_ours(
    device: TpmDevice, bus: TpmBus, tpm: Swtpm
) -> None:
    blob = await new_key(device)
    for size in (0, 1, 9, 10, 11, 60, 400):
        bus.on_answer = (
            lambda seen, answer, size=size: (  # type: ignore[misc]
                answer[:2] + (10 + size).to_bytes(4, "big") + bytes(4) + secrets.token_bytes(size)
                if seen.code == SIGN
                else answer
            )
        )
        with pytest.raises(SpireHwError):
            await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS))
    bus.on_answer = lambda _seen, answer: answer
    for handle in loaded(tpm):
        tpm.commands.flush(handle)
    assert await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS))

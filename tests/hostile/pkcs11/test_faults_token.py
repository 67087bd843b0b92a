"""Rows 14 to 24 of the fault list: which token, its PIN, its login, its write protection."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.pkcs11.errors import TokenError
from spire_hw.plugin.keymanager import KeyHealth
from spire_hw_sim.pkcs11faults import Fault
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import PIN, settled, waited

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager
    from spire_hw_sim.clock import SimClock
    from spire_hw_sim.tokenrig import TokenRig

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(32)
P256 = KeyType.EC_P256
# CK_TOKEN_INFO flags
WRITE_PROTECTED, COUNT_LOW, FINAL_TRY, LOCKED = 0x2, 0x10000, 0x20000, 0x40000
CKR_GENERAL_ERROR, CKR_FUNCTION_FAILED = 0x05, 0x06
CKR_PIN_EXPIRED, CKR_PIN_LOCKED, CKR_PIN_NOT_INITIALIZED = 0xA3, 0xA4, 0x102
CKR_SO_EXISTS, CKR_ANOTHER_USER = 0xB8, 0x104
CKR_SESSION_READ_ONLY, CKR_WRITE_PROTECTED = 0xB5, 0xE2


async def keys_are_intact(rig: TokenRig, fingerprint: str) -> None:
    """Check that the key of before is there once nothing goes wrong any more."""
    rig.faults.clear()
    rig.write_pin(PIN)
    rig.forget_pins()
    again = await rig.start()
    assert [k.fingerprint for k in await again.get_public_keys()] == [fingerprint]
    assert (await again.sign_data("a", DIGEST, SHA256)).fingerprint == fingerprint


async def one_key(rig: TokenRig) -> str:
    manager = await rig.start()
    made = await manager.generate_key("a", P256)
    await manager.close()
    return made.fingerprint


def slots(rig: TokenRig) -> dict[str, int]:
    """Return the slots by serial number, asked without a login since two tokens have one name."""
    asked = (
        "import sys, pkcs11\n"
        "for s in pkcs11.lib(sys.argv[1]).get_slots(token_present=True):\n"
        "    print(s.get_token().serial.decode().strip() or '-', s.slot_id)"
    )
    shown = subprocess.run(  # noqa: S603
        [sys.executable, "-c", asked, rig.hsm.module],
        env=rig.hsm.environment,
        check=True,
        capture_output=True,
        text=True,
    )
    pairs = (line.split() for line in shown.stdout.splitlines())
    return {serial: int(number) for serial, number in pairs}


async def test_fault_14_a_slot_number_is_only_a_hint(tampered: TokenRig) -> None:
    made = await one_key(tampered)
    number = slots(tampered)[tampered.serial]
    named = {"token_label": None, "uri": f"pkcs11:token=spire;slot-id={number + 1}"}
    manager = await tampered.start(**named)
    assert (await manager.sign_data("a", DIGEST, SHA256)).fingerprint == made
    await manager.close()
    # Where two tokens have one name it helps to choose, and alone it has to be right.
    other = tampered.hsm.init_token("spire", pin=PIN)
    for serial, fingerprints in ((tampered.serial, [made]), (other, [])):
        uri = f"pkcs11:token=spire;slot-id={slots(tampered)[serial]}"
        data = "data" if serial == tampered.serial else "other"
        manager = await tampered.start(data, token_label=None, uri=uri)
        assert [k.fingerprint for k in await manager.get_public_keys()] == fingerprints
        await manager.close()
    with pytest.raises(SpireHwError, match="not present") as caught:
        await tampered.start(token_label=None, uri="pkcs11:slot-id=7", start_timeout="1s")
    assert caught.value.kind is ErrorKind.UNAVAILABLE


@pytest.mark.parametrize("pin", ["wrong-9999", f" {PIN}", f"{PIN}\n"])
async def test_fault_16_a_wrong_pin_is_sent_once_by_all_workers_together(
    tampered: TokenRig, pin: str
) -> None:
    made = await one_key(tampered)
    before = tampered.faults.calls("C_Login")
    tampered.write_pin(pin)
    manager = tampered.build()
    for _ in range(3):
        with pytest.raises(TokenError, match=r"PIN refused: .*correct the PIN") as caught:
            await manager.configure(tampered.config(workers=3))
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert caught.value.reason in {"hsm.pin_incorrect", "hsm.pin_latched"}
        assert pin.strip() not in str(caught.value)
    assert tampered.faults.calls("C_Login") == before + 1
    assert psutil.Process().children() == []
    await keys_are_intact(tampered, made)


async def test_fault_16_a_wrong_pin_is_sent_once_by_all_who_open_the_token_at_a_time(
    tampered: TokenRig,
) -> None:
    made = await one_key(tampered)
    before = tampered.faults.calls("C_Login")
    tampered.write_pin("wrong-1234")
    manager = tampered.build()
    tries = (manager.configure(tampered.config()) for _ in range(3))
    for result in await asyncio.gather(*tries, return_exceptions=True):
        assert isinstance(result, TokenError)
        assert result.reason in {"hsm.pin_incorrect", "hsm.pin_latched"}
    assert tampered.faults.calls("C_Login") == before + 1
    await keys_are_intact(tampered, made)


async def test_fault_16_a_wrong_pin_is_sent_once_by_all_plugins_of_a_process(
    tampered: TokenRig,
) -> None:
    made = await one_key(tampered)
    before = tampered.faults.calls("C_Login")
    tampered.write_pin("wrong-5678")
    for naming in (
        {},
        {"token_label": None, "token_serial": tampered.serial},
        {
            "token_label": None,
            "pin_file": None,
            "uri": f"pkcs11:token=spire?pin-source={tampered.pin_file}",
        },
    ):
        with pytest.raises(TokenError, match="PIN refused"):
            await tampered.start(**naming)
    tries = (tampered.start() for _ in range(3))
    for result in await asyncio.gather(*tries, return_exceptions=True):
        assert isinstance(result, TokenError)
        assert result.reason == "hsm.pin_latched"
    assert tampered.faults.calls("C_Login") == before + 1
    # What the source holds instead is sent, by each of them, and once if it is wrong, too.
    tampered.write_pin("wrong-9012")
    for _ in range(2):
        with pytest.raises(TokenError, match="PIN refused"):
            await tampered.start()
    assert tampered.faults.calls("C_Login") == before + 2
    tampered.write_pin(PIN)
    assert (await (await tampered.start()).get_public_key("a")).fingerprint == made


async def test_fault_16_a_start_that_is_given_up_leaves_no_pin_unjudged(
    tampered: TokenRig,
) -> None:
    made = await one_key(tampered)
    before = tampered.faults.calls("C_Login")
    tampered.write_pin("wrong-3456")
    tampered.faults.set(Fault("C_Login", sleep_s=0.5))
    starting = asyncio.gather(tampered.start())
    async with asyncio.timeout(30):
        while tampered.faults.calls("C_Login") == before:  # noqa: ASYNC110 - no event of it
            await asyncio.sleep(0.02)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    with pytest.raises(TokenError) as caught:
        await tampered.start()
    assert caught.value.reason == "hsm.pin_latched"
    assert tampered.faults.calls("C_Login") == before + 1
    await keys_are_intact(tampered, made)


async def test_fault_18_a_locked_pin_is_not_sent_again(tampered: TokenRig) -> None:
    made = await one_key(tampered)
    before = tampered.faults.calls("C_Login")
    tampered.faults.set(Fault("C_Login", returns=CKR_PIN_LOCKED, instead=True))
    manager = tampered.build()
    for _ in range(3):
        with pytest.raises(TokenError, match=r"user PIN locked.*operator must unlock") as caught:
            await manager.configure(tampered.config(workers=2))
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert tampered.faults.calls("C_Login") == before + 1
    # The token says so itself: nothing is sent at all, whatever the PIN.
    tampered.faults.set(Fault("C_GetTokenInfo", flags_on=LOCKED))
    tampered.write_pin("another")
    with pytest.raises(TokenError, match="user PIN locked") as caught:
        await manager.configure(tampered.config())
    assert caught.value.reason == "hsm.pin_locked"
    assert tampered.faults.calls("C_Login") == before + 1
    await keys_are_intact(tampered, made)


async def test_fault_19_the_last_try_is_left_to_the_operator(tampered: TokenRig) -> None:
    made = await one_key(tampered)
    before = tampered.faults.calls("C_Login")
    tampered.faults.set(Fault("C_GetTokenInfo", flags_on=FINAL_TRY))
    with pytest.raises(TokenError, match="next wrong PIN locks the token; log in once") as caught:
        await tampered.start()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert caught.value.reason == "hsm.pin_final_try"
    assert tampered.faults.calls("C_Login") == before
    await keys_are_intact(tampered, made)


async def test_fault_19_a_low_count_is_tried_once_and_told(
    tampered: TokenRig, capsys: pytest.CaptureFixture[str]
) -> None:
    made = await one_key(tampered)
    before = tampered.faults.calls("C_Login")
    tampered.faults.set(Fault("C_GetTokenInfo", flags_on=COUNT_LOW))
    tampered.write_pin("wrong-9999")
    manager = tampered.build()
    for _ in range(2):
        with pytest.raises(TokenError, match="PIN refused"):
            await manager.configure(tampered.config())
    assert tampered.faults.calls("C_Login") == before + 1
    tampered.write_pin(PIN)
    await manager.configure(tampered.config())
    assert "hsm.pin_count_low" in capsys.readouterr().out
    await manager.close()
    await keys_are_intact(tampered, made)


@pytest.mark.parametrize(
    ("code", "words", "reason"),
    [
        (CKR_PIN_EXPIRED, "user PIN expired.*set a new one", "hsm.pin_expired"),
        (CKR_PIN_NOT_INITIALIZED, "no user PIN yet.*security officer", "hsm.user_pin_not_init"),
    ],
)
async def test_fault_21_a_pin_that_expired_or_was_never_set(
    tampered: TokenRig, code: int, words: str, reason: str
) -> None:
    made = await one_key(tampered)
    before = tampered.faults.calls("C_Login")
    tampered.faults.set(Fault("C_Login", returns=code, instead=True))
    manager = tampered.build()
    for number in range(2):
        with pytest.raises(TokenError, match=words) as caught:
            await manager.configure(tampered.config(workers=2))
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert number or caught.value.reason.startswith(reason)
    assert tampered.faults.calls("C_Login") == before + 1
    await keys_are_intact(tampered, made)


@pytest.mark.parametrize(
    ("function", "code"), [("C_Login", CKR_ANOTHER_USER), ("C_OpenSession", CKR_SO_EXISTS)]
)
async def test_fault_22_the_security_officer_is_logged_in(
    tampered: TokenRig, function: str, code: int
) -> None:
    made = await one_key(tampered)
    tampered.faults.set(Fault(function, returns=code, instead=True))
    manager = tampered.build()
    with pytest.raises(TokenError, match=r"security officer \(SO\) is logged in") as caught:
        await manager.configure(tampered.config(start_timeout="6s"))
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    # The PIN is not held to have been wrong: once the officer has gone it is sent again by itself.
    async with asyncio.TaskGroup() as group:
        configuring = group.create_task(manager.configure(tampered.config(start_timeout="30s")))
        await asyncio.wait({configuring}, timeout=0.5)
        assert not configuring.done()
        tampered.faults.clear()
    await manager.close()
    await keys_are_intact(tampered, made)


async def read_only(rig: TokenRig, manager: Pkcs11KeyManager, fingerprint: str) -> None:
    """Check what works on a token that cannot be written to, and what is said of it."""
    assert [k.fingerprint for k in await manager.get_public_keys()] == [fingerprint]
    health = manager.key_health()
    assert (health.health, health.reason) == (KeyHealth.DEGRADED, "hsm.read_only")
    assert "rotation is impossible" in health.message
    for _ in range(2):
        with pytest.raises(TokenError, match="read-only: keys cannot be generated") as caught:
            await manager.generate_key("a", P256)
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert (await manager.sign_data("a", DIGEST, SHA256)).fingerprint == fingerprint
    assert [k.fingerprint for k in await manager.get_public_keys()] == [fingerprint]
    assert rig.faults.calls("C_GenerateKeyPair") == 1


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("C_GetTokenInfo", flags_on=WRITE_PROTECTED)],
        [Fault("C_CreateObject", returns=CKR_WRITE_PROTECTED, instead=True)],
        [Fault("C_CreateObject", returns=CKR_SESSION_READ_ONLY, instead=True)],
        [Fault("C_CreateObject", returns=CKR_GENERAL_ERROR, instead=True)],
        [Fault("C_CreateObject", returns=CKR_FUNCTION_FAILED, instead=True)],
    ],
    ids=["flag", "protected", "session", "general", "failed"],
)
async def test_fault_23_a_write_protected_token_signs_and_says_so(
    tampered: TokenRig, faults: list[Fault]
) -> None:
    made = await one_key(tampered)
    tampered.faults.set(*faults)
    manager = await tampered.start()
    await read_only(tampered, manager, made)


async def test_fault_23_a_token_that_can_be_written_to_again_is_used(tampered: TokenRig) -> None:
    await one_key(tampered)
    tampered.faults.set(Fault("C_CreateObject", returns=CKR_WRITE_PROTECTED, instead=True))
    manager = await tampered.start()
    assert manager.key_health().health is KeyHealth.DEGRADED
    tampered.faults.clear()
    made = await manager.generate_key("a", P256)
    await settled(manager)
    assert manager.key_health().health is KeyHealth.GOOD
    await manager.close()
    await keys_are_intact(tampered, made.fingerprint)


async def test_fault_23_who_may_write_only_later_waits_for_who_was_there_before(
    tampered: TokenRig, clock: SimClock
) -> None:
    tampered.clock = clock
    first = await tampered.start("one")
    made = await first.generate_key("a", P256)
    tampered.faults.set(Fault("C_CreateObject", returns=CKR_WRITE_PROTECTED, instead=True))
    second = await tampered.start("two")
    tampered.faults.clear()
    with pytest.raises(SpireHwError, match="in use by another instance") as caught:
        await waited(clock, second.generate_key("a", P256))
    assert caught.value.kind is ErrorKind.ABORTED
    assert await first.get_public_keys() == [made]
    assert tampered.faults.calls("C_GenerateKeyPair") == 1


async def test_fault_24_many_that_log_in_at_once_do_so_without_a_word(
    tampered: TokenRig, tmp_path: Path
) -> None:
    managers = [tampered.build(f"data-{n}") for n in range(6)]
    configs = [tampered.config(key_identifier_value=f"server-{n}", workers=2) for n in range(6)]
    await asyncio.gather(*(m.configure(c) for m, c in zip(managers, configs, strict=True)))
    for manager in managers:
        await manager.generate_key("a", P256)
        await manager.sign_data("a", DIGEST, SHA256)
        assert manager.key_health().health is KeyHealth.GOOD

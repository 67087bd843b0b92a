"""Faults while keys are made, replaced and disposed of (numbers 59 to 71): the old key stays."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import ErrorKind, LimitError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.log import get_logger
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.pkcs11.keyring.disposal import Disposal
from spire_hw.pkcs11.keyring.generation import Making
from spire_hw.telemetry.naming import Selection
from spire_hw.telemetry.registry import Registry
from spire_hw_sim.clock import SimClock
from spire_hw_sim.pkcs11faults import Fault
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig, settled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
OWNER = Owner("example.org", "server-1")
P256 = KeyType.EC_P256


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path, tampered=True) as made:
        yield made


def pairs(rig: TokenRig) -> dict[str, int]:
    """Return how many halves each of our labels has, read by another process."""
    shown = rig.meddle(
        "from collections import Counter\n"
        "seen = Counter(o[Attribute.LABEL] for o in find(CLASS=PRIVATE) + find(CLASS=PUBLIC))\n"
        "[print(n, label) for label, n in seen.items()]"
    )
    lines = (line.split(" ", 1) for line in shown.splitlines())
    return {label: int(count) for count, label in lines}


def generation(key_id: str, number: int) -> dict[str, int]:
    return {OWNER.key_label(key_id, number): 2}


async def fingerprint(manager: Pkcs11KeyManager, key_id: str = "a") -> str:
    """Return a key's fingerprint after it has signed."""
    made = await manager.sign_data(key_id, bytes(32), SHA256)
    assert made.fingerprint == (await manager.get_public_key(key_id)).fingerprint
    return made.fingerprint


async def failure(manager: Pkcs11KeyManager, key_type: KeyType = P256) -> SpireHwError:
    with pytest.raises(SpireHwError) as caught:
        await manager.generate_key("a", key_type)
    return caught.value


@pytest.mark.parametrize("code", [0x31, 0x02])
@pytest.mark.asyncio
async def test_fault_59_a_full_token_makes_room_once_and_then_says_so(
    rig: TokenRig, code: int
) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    old = await fingerprint(manager)
    rig.faults.set(Fault("C_GenerateKeyPair", returns=code, instead=True))
    before = rig.faults.calls("C_GenerateKeyPair")
    rig.meddle("make('somebody else', b'x' * 16)")
    error = await failure(manager)
    assert error.kind is ErrorKind.RESOURCE_EXHAUSTED
    assert "token full: 3 objects of ours, 2 others" in error.message
    rig.meddle("[o.destroy() for o in find(LABEL='somebody else')]")
    assert rig.faults.calls("C_GenerateKeyPair") == before + 2
    assert await fingerprint(manager) == old
    rig.faults.clear()
    await settled(manager)
    assert pairs(rig) == generation("a", 1)
    await manager.generate_key("a", P256)
    await settled(manager)
    assert await fingerprint(manager) != old


@pytest.mark.parametrize("limit", [(65536, 31), (65536, 300)])
@pytest.mark.asyncio
async def test_fault_59_a_token_that_says_that_it_is_full_is_not_asked(
    rig: TokenRig, limit: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    manager = await rig.start()
    old = (await manager.generate_key("a", P256)).fingerprint
    registry = Registry(Selection("x"))
    assert manager._pool is not None
    manager._pool.metrics = registry
    assert "hsm.nearly_full" not in "".join(capsys.readouterr())
    rig.faults.set(Fault("C_GetTokenInfo", memory=limit))
    made = rig.faults.calls("C_GenerateKeyPair")
    if limit[1] >= 32:
        old = (await manager.generate_key("a", P256)).fingerprint
        made += 1
    for key_type in (KeyType.RSA_4096,) if limit[1] >= 32 else (P256, KeyType.RSA_4096):
        with pytest.raises(TokenError, match=r"token full: .* others .the token says") as caught:
            await manager.generate_key("a", key_type)
        assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED
    assert rig.faults.calls("C_GenerateKeyPair") == made
    assert await fingerprint(manager) == old
    told = "".join(capsys.readouterr())
    assert told.count("hsm.nearly_full") == 1
    assert f"{limit[1]} bytes of private memory" in told
    (shown,) = (r for r in registry.read() if r.name == "x_hsm_free_memory")
    assert {(dict(labels)["memory"], value) for labels, value in shown.series} == {
        ("private", limit[1]),
        ("public", limit[1]),
    }
    rig.faults.clear()
    await manager.generate_key("a", KeyType.RSA_2048)
    await manager.close()
    # An operator who knows better has the last word.
    rig.faults.set(Fault("C_GetTokenInfo", memory=limit))
    again = await rig.start(profile_overrides={"tells_memory": False})
    await again.generate_key("a", P256)


@pytest.mark.asyncio
async def test_fault_63_a_key_that_comes_after_its_caller_left_is_given_to_the_next(
    rig: TokenRig,
) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    rig.faults.set(Fault("C_GenerateKeyPair", sleep_s=2))
    before = rig.faults.calls("C_GenerateKeyPair")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await manager.generate_key("a", P256)
    made = await manager.generate_key("a", P256)
    assert rig.faults.calls("C_GenerateKeyPair") == before + 1
    assert await fingerprint(manager) == made.fingerprint
    await settled(manager)
    assert pairs(rig) == generation("a", 2)


@pytest.mark.asyncio
async def test_fault_63_a_key_nobody_asks_for_again_goes_when_another_type_is_wanted(
    rig: TokenRig,
) -> None:
    manager = await rig.start()
    rig.faults.set(Fault("C_GenerateKeyPair", sleep_s=1))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await manager.generate_key("a", P256)
    made = await manager.generate_key("a", KeyType.EC_P384)
    assert (await manager.get_public_key("a")).fingerprint == made.fingerprint
    await settled(manager)
    assert list(pairs(rig).values()) == [2]


@pytest.mark.parametrize("code", [0x13, 0xD1])
@pytest.mark.asyncio
async def test_fault_64_a_template_that_is_refused_is_tried_shorter_and_then_told(
    rig: TokenRig, code: int
) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    old = await fingerprint(manager)
    before = rig.faults.calls("C_GenerateKeyPair")
    rig.faults.set(Fault("C_GenerateKeyPair", times=1, returns=code, instead=True))
    # Without the attributes that say no, SoftHSM makes a key that may decrypt: it is not kept.
    assert "violates policy: DECRYPT" in (await failure(manager)).message
    assert rig.faults.calls("C_GenerateKeyPair") == before + 2
    rig.faults.set(Fault("C_GenerateKeyPair", returns=code, instead=True))
    error = await failure(manager)
    assert error.kind is ErrorKind.FAILED_PRECONDITION
    assert "template (profile softhsm)" in error.message
    assert await fingerprint(manager) == old
    await settled(manager)
    assert pairs(rig) == generation("a", 1)


@pytest.mark.parametrize(
    ("attribute", "value", "name"),
    [(0x162, "01", "EXTRACTABLE"), (0x103, "00", "SENSITIVE"), (0x163, "00", "LOCAL")],
)
@pytest.mark.asyncio
async def test_fault_65_a_key_that_is_not_what_was_asked_for_is_destroyed(
    rig: TokenRig, attribute: int, value: str, name: str
) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    old = await fingerprint(manager)
    rig.faults.set(Fault("C_GetAttributeValue", attributes={attribute: value}))
    error = await failure(manager)
    assert error.kind is ErrorKind.FAILED_PRECONDITION
    assert name in error.message
    rig.faults.clear()
    await settled(manager)
    assert pairs(rig) == generation("a", 1)
    assert await fingerprint(manager) == old


@pytest.mark.asyncio
async def test_fault_66_a_key_that_cannot_be_proved_is_destroyed(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    old = await fingerprint(manager)
    rig.faults.set(Fault("C_Sign", signature="flipped", times=1))
    assert (await failure(manager)).kind is ErrorKind.INTERNAL
    rig.faults.set(Fault("C_GetAttributeValue", attributes={0x181: None}))
    assert (await failure(manager)).kind is ErrorKind.INTERNAL
    rig.faults.clear()
    await settled(manager)
    assert pairs(rig) == generation("a", 1)
    assert await healed_fingerprint(manager) == old


async def healed_fingerprint(manager: Pkcs11KeyManager) -> str:
    async with asyncio.timeout(20):
        while True:
            with suppress(SpireHwError):
                return await fingerprint(manager)
            await asyncio.sleep(0.05)


@pytest.mark.asyncio
async def test_fault_67_an_id_that_is_taken_is_drawn_again_three_times(rig: TokenRig) -> None:
    manager = await rig.start()
    taken = b"t" * 16
    rig.meddle(f"make('somebody else', {taken!r})")
    assert manager._pool is not None
    assert manager._keyring is not None

    def making(*ids: bytes) -> Making:
        drawn = iter(ids)
        assert manager._pool is not None
        return Making(manager._pool, P256, lambda: next(drawn), OWNER.key_label("a", 1))

    refuse = Fault("C_GenerateKeyPair", returns=0x13, instead=True)
    rig.faults.set(refuse)
    with pytest.raises(TokenError, match="another object has it") as caught:
        await making(taken, taken, taken).generate(manager._keyring.disposal)
    assert caught.value.kind is ErrorKind.ABORTED
    free = secrets.token_bytes(16)
    rig.faults.set(Fault("C_GenerateKeyPair", returns=0x13, instead=True, times=2))
    made = await making(taken, taken, free).generate(manager._keyring.disposal)
    assert made.cka_id == free
    assert pairs(rig) == {"somebody else": 2, OWNER.key_label("a", 1): 2}


@pytest.mark.parametrize("code", [0x1B, 0x06])
@pytest.mark.asyncio
async def test_fault_68_a_key_that_cannot_be_destroyed_waits_and_is_not_forgotten(
    rig: TokenRig, code: int
) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    await manager.generate_key("b", P256)
    marker = rig.folder / "stuck"
    marker.touch()
    rig.faults.set(Fault("C_DestroyObject", returns=code, instead=True, while_exists=str(marker)))
    new = [(await manager.generate_key(key_id, P256)).fingerprint for key_id in ("a", "b")]
    assert [await fingerprint(manager, key_id) for key_id in ("a", "b")] == new
    assert manager._keyring is not None
    disposal = manager._keyring.disposal
    tries = rig.faults.calls("C_DestroyObject")
    await asyncio.sleep(3)
    # Pauses of a second and more: a token that refuses is not asked all the time.
    assert 1 <= rig.faults.calls("C_DestroyObject") - tries + 1 <= 8
    assert disposal.waiting == 2
    marker.unlink()
    async with asyncio.timeout(60):
        while disposal.waiting:
            await disposal.now()
            await asyncio.sleep(0.1)
    assert pairs(rig) == {**generation("a", 2), **generation("b", 2)}


@pytest.mark.parametrize("code", [0x1B, 0x06])
@pytest.mark.asyncio
async def test_fault_68_pairs_that_never_go_are_tried_once_a_day(
    rig: TokenRig, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = await rig.start()
    pool, clock, registry = manager._pool, SimClock(), Registry(Selection("x"))
    assert pool is not None
    pool.metrics = registry
    marker = rig.folder / "stuck"
    marker.touch()
    rig.faults.set(Fault("C_DestroyObject", returns=code, instead=True, while_exists=str(marker)))
    rig.meddle("[make(f'old {n}', bytes([n]) * 16) for n in (1, 2, 3)]")
    disposal = Disposal(pool, clock, get_logger("test"))
    disposal.add((bytes([n]) * 16, f"old {n}") for n in (1, 2))
    tasks = Tasks(lambda _name, error: pytest.fail(repr(error)))
    tasks.start("disposal", disposal.run())
    told: list[str] = []

    async def until(lines: int, text: str, step: timedelta = timedelta(seconds=61)) -> None:
        """Let time pass whenever nothing is tried, until the log has so many such lines."""
        async with asyncio.timeout(60):
            while True:
                told.extend("".join(capsys.readouterr()).splitlines())
                if sum(text in line for line in told) >= lines:
                    return
                if clock._sleepers:
                    await clock.advance(step)
                await asyncio.sleep(0.02)

    await until(2, "in a day")
    assert sum("hsm.disposal_failed" in line for line in told) >= 2 * 10
    await clock.advance(timedelta(hours=23))
    marker.unlink()
    disposal.add([(bytes([3]) * 16, "old 3")])
    told.clear()
    await until(1, "hsm.key_destroyed", timedelta(0))
    # What is new does not wait, and does not hurry what is stuck.
    assert pairs(rig) == {"old 1": 2, "old 2": 2}
    (shown,) = (r for r in registry.read() if r.name == "x_hsm_keys_awaiting_disposal")
    ((labels, value),) = shown.series
    assert (dict(labels), value) == ({"hsm": f"spire_{rig.serial}"}, 2)
    told.clear()
    await until(2, "hsm.key_destroyed")
    assert not any("hsm.disposal_failed" in line for line in told)
    assert pairs(rig) == {}
    await tasks.close()


@pytest.mark.asyncio
async def test_what_waits_is_destroyed_once_by_whoever_comes_first(
    rig: TokenRig, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    marker = rig.folder / "stuck"
    marker.touch()
    rig.faults.set(Fault("C_DestroyObject", returns=0x1B, instead=True, while_exists=str(marker)))
    await manager.generate_key("a", P256)
    assert manager._keyring is not None
    disposal = manager._keyring.disposal
    assert disposal.waiting == 1
    marker.unlink()
    capsys.readouterr()
    await asyncio.gather(*(disposal.now() for _ in range(4)))
    await settled(manager)
    assert "".join(capsys.readouterr()).count("hsm.key_destroyed") == 1
    assert pairs(rig) == generation("a", 2)


@pytest.mark.asyncio
async def test_fault_68_what_a_restart_finds_is_disposed_of_then(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    rig.faults.set(Fault("C_DestroyObject", returns=0x1B, instead=True))
    await manager.generate_key("a", P256)
    await manager.close()
    rig.faults.clear()
    again = await rig.start()
    await settled(again)
    assert pairs(rig) == generation("a", 2)


@pytest.mark.asyncio
async def test_fault_69_nothing_on_the_token_is_ever_changed(rig: TokenRig) -> None:
    for _ in range(2):
        manager = await rig.start(retain_replaced="1h")
        for key_id in ("a", "b", "a", "b"):
            await manager.generate_key(key_id, P256)
            await fingerprint(manager, key_id)
        await manager.get_public_keys()
        await manager.key_evidence("a")
        await manager.close()
    for name in ("C_SetAttributeValue", "C_CopyObject", "C_InitPIN", "C_SetPIN", "C_InitToken"):
        assert rig.faults.calls(name) == 0


@pytest.mark.asyncio
async def test_fault_70_two_that_make_one_key_take_turns(rig: TokenRig) -> None:
    manager = await rig.start()
    made = await asyncio.gather(*(manager.generate_key("a", P256) for _ in range(5)))
    assert len({one.fingerprint for one in made}) == 5
    assert await fingerprint(manager) in {one.fingerprint for one in made}
    await settled(manager)
    assert pairs(rig) == generation("a", 5)


@pytest.mark.asyncio
async def test_no_more_key_ids_get_keys_than_policy_allows(rig: TokenRig) -> None:
    manager = await rig.start(max_keys=3)
    await manager.generate_key("a", P256)
    wishes = [manager.generate_key(key_id, P256) for key_id in ("b", "c", "d", "e")]
    results = await asyncio.gather(*wishes, return_exceptions=True)
    refused = [r for r in results if isinstance(r, SpireHwError)]
    assert [r.kind for r in refused] == [ErrorKind.RESOURCE_EXHAUSTED] * 2
    assert "max_keys" in refused[0].message
    # Those that there are are replaced all the same.
    assert len(await manager.get_public_keys()) == 3
    await manager.generate_key("a", P256)
    await manager.close()
    with pytest.raises(SpireHwError, match="one more than the 2"):
        await (await rig.start(max_keys=2)).generate_key("f", P256)


@pytest.mark.asyncio
async def test_fault_71_a_loop_of_crashes_does_not_fill_the_token(tmp_path: Path) -> None:
    clock = SimClock()
    async with TokenRig(tmp_path, clock, tampered=True) as rig:
        refused = made = 0
        for _ in range(8):
            manager = await rig.start(generations_per_day=12)
            try:
                await manager.generate_key("a", P256)
                made += 1
            except LimitError as e:
                assert "generation budget" in str(e)  # noqa: PT017 - the others are counted
                refused += 1
            await fingerprint(manager)
            await manager.close()
        assert (made, refused) == (4, 4)
        manager = await rig.start(generations_per_day=12)
        await manager.generate_key("b", P256)
        await settled(manager)
        assert pairs(rig) == {**generation("a", 4), **generation("b", 1)}
        await manager.close()
        await clock.advance(timedelta(hours=3))
        manager = await rig.start(generations_per_day=12)
        await manager.generate_key("a", P256)


@pytest.mark.asyncio
async def test_the_test_key_signs_now_and_then_and_is_nobodys(tmp_path: Path) -> None:
    clock = SimClock()
    async with TokenRig(tmp_path, clock, tampered=True) as rig:
        manager = await rig.start()
        await manager.generate_key("a", P256)
        signed = rig.faults.calls("C_Sign")
        async with asyncio.timeout(60):
            while rig.faults.calls("C_Sign") < signed + 3:
                await clock.advance(timedelta(seconds=301))
                await asyncio.sleep(0.1)
        assert pairs(rig) == {OWNER.test_label: 2, **generation("a", 1)}
        assert [k.key_id for k in await manager.get_public_keys()] == ["a"]
        await manager.close()
        # It is found again, not made again, and it outlives what tidies up.
        manager = await rig.start()
        assert [k.key_id for k in await manager.get_public_keys()] == ["a"]
        await settled(manager)
        made = rig.faults.calls("C_GenerateKeyPair")
        assert manager._keyring is not None
        await manager._keyring.test_key.sign()
        assert rig.faults.calls("C_GenerateKeyPair") == made
        assert pairs(rig) == {OWNER.test_label: 2, **generation("a", 1)}
        rig.faults.set(Fault("C_Sign", returns=0x30))
        with pytest.raises(SpireHwError, match="DEVICE_ERROR"):
            await manager._keyring.test_key.sign()

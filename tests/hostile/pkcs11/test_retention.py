"""Replaced generations that are kept: unused, over restarts, given back, destroyed in their time."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import ErrorKind, NotFoundError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig, settled, waited

if TYPE_CHECKING:
    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager
    from spire_hw_sim.clock import SimClock

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(32)
OWNER = Owner("example.org", "server-1")
P256 = KeyType.EC_P256
KEEP = {"retain_replaced": "26h"}


def generations(timed: TokenRig) -> list[str]:
    shown = timed.meddle("[print(o[Attribute.LABEL]) for o in find(CLASS=PRIVATE)]")
    # A key that signs nothing but tests is made now and then.
    labels = [label for label in shown.splitlines() if not label.endswith(".test")]
    return sorted(label.rpartition(":")[2].lstrip("0") for label in labels)


async def kept(manager: Pkcs11KeyManager) -> list[int]:
    return [one.generation for one in await manager.retained_keys()]


@pytest.mark.asyncio
async def test_a_replaced_key_is_kept_over_restarts_and_signs_nothing(timed: TokenRig) -> None:
    manager = await timed.start(**KEEP)
    first = await manager.generate_key("a", P256)
    second = await manager.generate_key("a", P256)
    (retained,) = await manager.retained_keys()
    assert (retained.info.fingerprint, retained.generation) == (first.fingerprint, 1)
    assert retained.until == timed.clock.now().timestamp() + 26 * 3600
    for _ in range(2):
        await manager.close()
        manager = await timed.start(**KEEP)
        assert await kept(manager) == [1]
        assert [k.fingerprint for k in await manager.get_public_keys()] == [second.fingerprint]
        made = await manager.sign_data("a", DIGEST, SHA256)
        assert made.fingerprint == second.fingerprint
    assert generations(timed) == ["1", "2"]


@pytest.mark.asyncio
async def test_what_was_kept_long_enough_is_destroyed(timed: TokenRig, clock: SimClock) -> None:
    manager = await timed.start(**KEEP)
    await manager.generate_key("a", P256)
    await manager.generate_key("a", P256)
    assert manager._keyring is not None
    await clock.advance(timedelta(hours=25))
    await manager._keyring._house.sweep()
    assert await kept(manager) == [1]
    await clock.advance(timedelta(hours=2))
    await manager._keyring._house.sweep()
    await settled(manager)
    assert await kept(manager) == []
    assert generations(timed) == ["2"]
    with pytest.raises(NotFoundError, match="not retained"):
        await manager.restore_key("a", 1)


@pytest.mark.asyncio
async def test_a_clock_that_jumped_destroys_nothing(timed: TokenRig, clock: SimClock) -> None:
    manager = await timed.start(**KEEP)
    await manager.generate_key("a", P256)
    await manager.generate_key("a", P256)
    clock._now += timedelta(days=30)
    assert manager._keyring is not None
    await manager._keyring._house.sweep()
    await settled(manager)
    assert generations(timed) == ["1", "2"]
    assert await kept(manager) == [1]


@pytest.mark.asyncio
async def test_without_retention_everything_replaced_goes_at_the_next_start(
    timed: TokenRig,
) -> None:
    manager = await timed.start(**KEEP)
    await manager.generate_key("a", P256)
    await manager.generate_key("a", P256)
    await manager.close()
    manager = await timed.start()
    await settled(manager)
    assert generations(timed) == ["2"]
    assert await kept(manager) == []


@pytest.mark.asyncio
async def test_a_restored_generation_stays_current_though_a_higher_one_exists(
    timed: TokenRig,
) -> None:
    manager = await timed.start(**KEEP)
    first = await manager.generate_key("a", P256)
    await manager.generate_key("a", P256)
    assert (await manager.restore_key("a", 1)).fingerprint == first.fingerprint
    made = await manager.sign_data("a", DIGEST, SHA256)
    verify_digest(first.public_key, DIGEST, made.signature, SHA256)
    for _ in range(2):
        await manager.close()
        manager = await timed.start(**KEEP)
        assert (await manager.get_public_key("a")).fingerprint == first.fingerprint
        assert await kept(manager) == [2]
    third = await manager.generate_key("a", P256)
    assert await kept(manager) == [2, 1]
    await manager.close()
    manager = await timed.start(**KEEP)
    assert (await manager.get_public_key("a")).fingerprint == third.fingerprint
    assert generations(timed) == ["1", "2", "3"]


@pytest.mark.asyncio
async def test_a_host_that_lost_its_note_learns_from_the_token_what_was_restored(
    timed: TokenRig, clock: SimClock
) -> None:
    manager = await timed.start(**KEEP)
    first = await manager.generate_key("a", P256)
    second = await manager.generate_key("a", P256)
    await manager.restore_key("a", 1)
    await manager.close()
    manager = await timed.start("another-host", **KEEP)
    assert (await manager.get_public_key("a")).fingerprint == first.fingerprint
    assert await kept(manager) == [2]
    await waited(clock, manager.restore_key("a", 2))
    await manager.close()
    # The first host's note is older than what the token tells.
    manager = await timed.start(**KEEP)
    assert (await manager.get_public_key("a")).fingerprint == second.fingerprint


@pytest.mark.asyncio
async def test_what_one_host_restored_is_no_loss_to_another(
    timed: TokenRig, clock: SimClock
) -> None:
    manager = await timed.start(**KEEP)
    first = await manager.generate_key("a", P256)
    await manager.generate_key("a", P256)
    await manager.close()
    manager = await timed.start("another-host", **KEEP)
    await waited(clock, manager.restore_key("a", 1))
    await manager.close()
    manager = await timed.start(**KEEP)
    assert (await manager.get_public_key("a")).fingerprint == first.fingerprint
    assert [k.fingerprint for k in await manager.get_public_keys()] == [first.fingerprint]
    await waited(clock, manager.generate_key("a", P256))
    await manager.close()
    # A choice that a later generation ended accounts for nothing.
    timed.meddle(f"[o.destroy() for o in find(LABEL={OWNER.key_label('a', 3)!r})]")
    with pytest.raises(SpireHwError, match="older generations of a"):
        await timed.start(**KEEP)


@pytest.mark.parametrize("settings", [{}, KEEP], ids=["destroyed", "kept"])
@pytest.mark.asyncio
async def test_a_key_that_takes_its_own_place_stays(
    timed: TokenRig, settings: dict[str, str]
) -> None:
    manager = await timed.start(**settings)
    made = await manager.generate_key("a", P256)
    keyring = manager._keyring
    assert keyring is not None
    await keyring._retention.replace(keyring.get("a"))
    await settled(manager)
    assert await kept(manager) == []
    assert (await manager.sign_data("a", DIGEST, SHA256)).fingerprint == made.fingerprint
    assert generations(timed) == ["1"]


@pytest.mark.asyncio
async def test_a_restored_key_that_vanishes_does_not_bring_the_rejected_one_back(
    timed: TokenRig,
) -> None:
    manager = await timed.start(**KEEP)
    await manager.generate_key("a", P256)
    await manager.generate_key("a", P256)
    await manager.restore_key("a", 1)
    await manager.close()
    timed.meddle(f"[o.destroy() for o in find(LABEL={OWNER.key_label('a', 1)!r})]")
    with pytest.raises(SpireHwError, match="missing: a") as caught:
        await timed.start(**KEEP)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    manager = await timed.start(**KEEP, accept_key_loss=True)
    assert await manager.get_public_keys() == []
    await manager.generate_key("a", P256)
    assert generations(timed) == ["2", "3"]


@pytest.mark.asyncio
async def test_what_was_restored_is_not_numbered_again_when_the_higher_one_is_gone(
    timed: TokenRig,
) -> None:
    manager = await timed.start(**KEEP)
    await manager.generate_key("a", P256)
    await manager.generate_key("a", P256)
    await manager.restore_key("a", 1)
    await manager.destroy_retained("a", 2)
    assert generations(timed) == ["1"]
    third = await manager.generate_key("a", P256)
    assert generations(timed) == ["1", "3"]
    await manager.close()
    manager = await timed.start(**KEEP)
    assert (await manager.get_public_key("a")).fingerprint == third.fingerprint
    for wrong in (2, 3, 7):
        with pytest.raises(NotFoundError):
            await manager.destroy_retained("a", wrong)


@pytest.mark.asyncio
async def test_a_generation_that_no_note_knows_is_kept_not_destroyed(timed: TokenRig) -> None:
    manager = await timed.start(**KEEP)
    await manager.generate_key("a", P256)
    await manager.close()
    timed.meddle(f"make({OWNER.key_label('a', 7)!r}, b'7' * 16, EXTRACTABLE=False)")
    manager = await timed.start(**KEEP)
    await settled(manager)
    assert generations(timed) == ["1", "7"]
    assert await kept(manager) == [1]


@pytest.mark.asyncio
async def test_a_restore_that_fails_changes_nothing(timed: TokenRig) -> None:
    manager = await timed.start(**KEEP)
    await manager.generate_key("a", P256)
    second = await manager.generate_key("a", P256)
    timed.meddle(f"[o.destroy() for o in find(LABEL={OWNER.key_label('a', 1)!r})]")
    with pytest.raises(SpireHwError, match="no longer on token"):
        await manager.restore_key("a", 1)
    assert (await manager.get_public_key("a")).fingerprint == second.fingerprint
    await manager.close()
    manager = await timed.start(**KEEP)
    assert (await manager.get_public_key("a")).fingerprint == second.fingerprint

"""Rows 25 to 42 of the fault list: what is found on a token, and what must not be believed."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.log import get_logger
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.pkcs11.inventory.reaping import SharedToken
from spire_hw.plugin.keymanager import KeyHealth
from spire_hw_sim.pkcs11faults import Fault
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig, settled

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager
    from spire_hw_sim.clock import SimClock

    Told = Callable[[str], list[dict[str, Any]]]

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(32)
OWNER = Owner("example.org", "server-1")
P256 = KeyType.EC_P256
PROVEN = "EXTRACTABLE=False, DERIVE=False, DECRYPT=False, UNWRAP=False"
CKA_SIGN, CKA_LOCAL, CKA_NEVER_EXTRACTABLE = 0x108, 0x163, 0x164
CKA_ALWAYS_SENSITIVE, CKA_KEY_GEN_MECHANISM = 0x165, 0x166


def objects(rig: TokenRig) -> list[str]:
    # A key that signs nothing but tests is made now and then.
    return [line for line in rig.objects() if f" {OWNER.prefix}.test " not in line]


async def swept(manager: Pkcs11KeyManager) -> None:
    """Have the house kept once, and everything destroyed that is to be destroyed."""
    assert manager._keyring is not None
    await manager._keyring._house.sweep()
    await settled(manager)


async def refused(rig: TokenRig, words: str, reason: str, **changes: object) -> TokenError:
    """Have a start refused for what is on the token; nothing there changes."""
    before = objects(rig)
    with pytest.raises(TokenError, match=words) as caught:
        await rig.start(**changes)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert caught.value.reason == reason
    assert objects(rig) == before
    return caught.value


async def test_fault_25_who_is_not_logged_in_believes_no_listing(tampered: TokenRig) -> None:
    manager = await tampered.start()
    made = await manager.generate_key("a", P256)
    tampered.faults.set(Fault("C_Login", instead=True))
    for pid in manager.worker_pids:
        os.kill(pid, signal.SIGKILL)
    for _ in range(3):
        with pytest.raises(SpireHwError) as caught:
            await manager.get_public_keys()
        assert caught.value.kind is ErrorKind.UNAVAILABLE
    tampered.faults.clear()
    async with asyncio.timeout(60):
        while True:
            try:
                keys = await manager.get_public_keys()
                break
            except SpireHwError as e:
                assert e.kind is ErrorKind.UNAVAILABLE  # noqa: PT017 - what is not over yet
                await asyncio.sleep(0.1)
    assert [key.fingerprint for key in keys] == [made.fingerprint]
    assert (await manager.get_public_key("a")).fingerprint == made.fingerprint


async def test_fault_26_a_search_that_finds_nothing_is_no_empty_token(tampered: TokenRig) -> None:
    manager = await tampered.start()
    made = await manager.generate_key("a", P256)
    tampered.faults.set(Fault("C_FindObjects", finds_nothing=True))
    with pytest.raises(TokenError, match=r"names 1 keys, token .* shows 0; missing: a") as caught:
        await manager.get_public_keys()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert caught.value.reason == "hsm.keys_missing"
    with pytest.raises(TokenError, match="accept_key_loss"):
        await tampered.start()
    tampered.faults.clear()
    assert [k.fingerprint for k in await manager.get_public_keys()] == [made.fingerprint]


async def test_fault_27_a_public_half_alone_is_cleared_away_when_it_is_old(
    timed: TokenRig, clock: SimClock
) -> None:
    first = await timed.start()
    made = await first.generate_key("a", P256)
    await first.close()
    timed.meddle(f"_, p = make({OWNER.key_label('a', 2)!r}, b'2', {PROVEN}); p.destroy()")
    whole = objects(timed)
    manager = await timed.start()
    assert [k.fingerprint for k in await manager.get_public_keys()] == [made.fingerprint]
    await swept(manager)
    await clock.advance(timedelta(minutes=50))
    await swept(manager)
    assert objects(timed) == whole
    await clock.advance(timedelta(minutes=20))
    await swept(manager)
    assert objects(timed) == [line for line in whole if not line.endswith(" 32")]
    assert (await manager.sign_data("a", DIGEST, SHA256)).fingerprint == made.fingerprint


@pytest.mark.parametrize("below", [False, True], ids=["alone", "over-a-kept-one"])
async def test_fault_28_a_private_half_that_is_current_is_never_cleared_away(
    timed: TokenRig, clock: SimClock, below: bool
) -> None:
    manager = await timed.start(retain_replaced="100h")
    made = await manager.generate_key("a", P256)
    if below:
        made = await manager.generate_key("a", P256)
    label = OWNER.key_label("a", 2 if below else 1)
    timed.meddle(f"[o.destroy() for o in find(CLASS=PUBLIC, LABEL={label!r})]")
    left = objects(timed)
    for _ in range(3):
        await clock.advance(timedelta(hours=1))
        await swept(manager)
    await manager.close()
    again = await timed.start(retain_replaced="100h")
    assert [k.fingerprint for k in await again.get_public_keys()] == [made.fingerprint]
    assert (await again.sign_data("a", DIGEST, SHA256)).fingerprint == made.fingerprint
    for _ in range(3):
        await clock.advance(timedelta(hours=1))
        await swept(again)
    assert objects(timed) == left
    # A host without the note does not know the public key: it neither uses nor destroys it.
    await again.close()
    with pytest.raises(TokenError) as caught:
        await timed.start("another-host", retain_replaced="100h")
    assert caught.value.reason == "hsm.keys_missing"
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert "bring that file back" in caught.value.message
    assert objects(timed) == left


async def test_fault_29_objects_without_a_name_are_passed_over_and_counted(
    timed: TokenRig,
) -> None:
    timed.meddle(f"make('', b'', {PROVEN}); make('', b'1', {PROVEN}); make('x', b'', {PROVEN})")
    before = objects(timed)
    manager = await timed.start()
    assert await manager.get_public_keys() == []
    await manager.generate_key("a", P256)
    await swept(manager)
    assert set(before) <= set(objects(timed))
    assert manager._pool is not None
    shared = SharedToken(manager._pool, OWNER, timed.clock, get_logger("test"))
    tenancy = await shared.tenancy()
    assert (tenancy.nameless, tenancy.foreign) == (6, 0)


async def test_fault_30_the_losing_generation_never_signs(timed: TokenRig, told: Told) -> None:
    manager = await timed.start()
    old = await manager.generate_key("a", P256)
    await manager.close()
    timed.meddle(f"make({OWNER.key_label('a', 3)!r}, b'3' * 16, {PROVEN})")
    again = await timed.start()
    (key,) = await again.get_public_keys()
    (line,) = told("hsm.key_leftover")
    assert (line["label"], line["fp"]) == (OWNER.key_label("a", 1), old.fingerprint)
    assert (line["used"], line["used_fp"]) == (OWNER.key_label("a", 3), key.fingerprint)
    made = await again.sign_data("a", DIGEST, SHA256)
    assert made.fingerprint == key.fingerprint
    await swept(again)
    assert {line.split()[1] for line in objects(timed)} == {OWNER.key_label("a", 3)}


async def test_fault_31_copies_of_one_key_are_named_and_left(timed: TokenRig) -> None:
    label = OWNER.key_label("a", 1)
    timed.meddle(f"make({label!r}, b'1', {PROVEN}); make({label!r}, b'2', {PROVEN})")
    error = await refused(timed, "will not choose", "hsm.key_duplicate")
    assert "CKA_ID 31, key " in error.message
    assert " 32, key " in error.message
    timed.meddle("[o.destroy() for o in find(ID=b'2')]")
    timed.meddle(f"make({label!r}, b'1', {PROVEN})")
    await refused(timed, "will not choose", "hsm.key_duplicate")


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ("EXTRACTABLE=True, DERIVE=False", "EXTRACTABLE, NEVER_EXTRACTABLE"),
        ("SENSITIVE=False, DERIVE=False, EXTRACTABLE=False", "SENSITIVE, ALWAYS_SENSITIVE"),
        ("EXTRACTABLE=False, DERIVE=True", "DERIVE"),
        ("EXTRACTABLE=False, DERIVE=False, DECRYPT=True", "DECRYPT"),
        ("EXTRACTABLE=False, DERIVE=False, UNWRAP=True", "UNWRAP"),
    ],
)
async def test_fault_33_what_a_key_may_do_is_judged(
    timed: TokenRig, attributes: str, words: str
) -> None:
    timed.meddle(f"make({OWNER.key_label('a', 1)!r}, b'1' * 16, {attributes})")
    await refused(timed, f'key "a" violates policy: {words}', "hsm.key_policy")


@pytest.mark.parametrize(
    ("attribute", "value", "name"),
    [
        (CKA_SIGN, None, "SIGN"),
        (CKA_LOCAL, None, "LOCAL"),
        (CKA_LOCAL, "00", "LOCAL"),
        (CKA_NEVER_EXTRACTABLE, None, "NEVER_EXTRACTABLE"),
        (CKA_ALWAYS_SENSITIVE, None, "ALWAYS_SENSITIVE"),
        (CKA_KEY_GEN_MECHANISM, None, "KEY_GEN_MECHANISM"),
        (CKA_KEY_GEN_MECHANISM, "ff" * 8, "KEY_GEN_MECHANISM"),
    ],
)
async def test_fault_34_an_attribute_that_cannot_be_read_proves_nothing(
    tampered: TokenRig,
    capsys: pytest.CaptureFixture[str],
    attribute: int,
    value: str | None,
    name: str,
) -> None:
    manager = await tampered.start()
    made = await manager.generate_key("a", P256)
    await manager.close()
    tampered.faults.set(Fault("C_GetAttributeValue", attributes={attribute: value}))
    await refused(tampered, f'key "a" violates policy: {name}', "hsm.key_policy")
    again = await tampered.start(accept_weak_keys=["a"])
    assert "hsm.key_weak" in capsys.readouterr().out
    assert (await again.sign_data("a", DIGEST, SHA256)).fingerprint == made.fingerprint


@pytest.mark.parametrize("code", [0x30, 0x101, 0xB3])
async def test_fault_34_a_device_that_fails_while_it_is_asked_has_proved_nothing_either_way(
    tampered: TokenRig, code: int
) -> None:
    first = await tampered.start()
    made = [await first.generate_key(key_id, P256) for key_id in ("a", "b")]
    tampered.faults.set(Fault("C_GetAttributeValue", returns=code))
    with pytest.raises(SpireHwError) as caught:
        await first.get_public_keys()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    with pytest.raises(SpireHwError) as caught:
        await tampered.start(start_timeout="10s")
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    with pytest.raises(SpireHwError) as caught:
        await first.generate_key("a", P256)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    tampered.faults.clear()
    async with asyncio.timeout(30):
        while True:
            with suppress(SpireHwError):
                assert await first.get_public_keys() == made
                break
            await asyncio.sleep(0.1)
    again = await tampered.start()
    assert await again.get_public_keys() == made


async def test_fault_36_a_key_of_another_type_is_ignored_unless_the_note_names_it(
    timed: TokenRig, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = await timed.start()
    made = await manager.generate_key("a", P256)
    await manager.close()
    rsa = (
        "session.generate_keypair(KeyType.RSA, {bits}, store=True, id=b'9' * 16, label={label!r},"
        " capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY, private_template="
        "{{Attribute.EXTRACTABLE: False, Attribute.SIGN_RECOVER: False}})"
    )
    timed.meddle(rsa.format(bits=1024, label=OWNER.key_label("b", 1)))
    again = await timed.start()
    assert [k.fingerprint for k in await again.get_public_keys()] == [made.fingerprint]
    assert "hsm.key_ignored" in capsys.readouterr().out
    await again.close()
    # The type it really has is listed when it is one of ours.
    timed.meddle("[o.destroy() for o in find(ID=b'9' * 16)]")
    timed.meddle(rsa.format(bits=2048, label=OWNER.key_label("b", 1)))
    third = await timed.start()
    types = {k.key_id: k.key_type for k in await third.get_public_keys()}
    assert types == {"a": P256, "b": KeyType.RSA_2048}
    await third.close()
    timed.meddle("[o.destroy() for o in find(ID=b'9' * 16)]")
    timed.meddle(rsa.format(bits=1024, label=OWNER.key_label("b", 1)))
    await refused(timed, "RSA-1024 is not a supported key type", "hsm.key_type")


async def test_fault_38_neither_of_two_instances_destroys_anything(
    timed: TokenRig, clock: SimClock
) -> None:
    first = await timed.start("one", retain_replaced="1h")
    await first.generate_key("a", P256)
    await first.generate_key("a", P256)
    assert first.key_health().health is KeyHealth.GOOD
    second = await timed.start("two", retain_replaced="1h")
    before = objects(timed)
    await clock.advance(timedelta(minutes=59))
    await swept(first)
    with pytest.raises(TokenError, match=r"in use by another instance.*stop one") as caught:
        await swept(second)
    assert caught.value.reason == "hsm.owner_conflict"
    health = second.key_health()
    assert (health.health, health.reason) == (KeyHealth.DEGRADED, "hsm.owner_conflict")
    with pytest.raises(TokenError, match="in use by another instance"):
        await second.restore_key("a", 1)
    with pytest.raises(TokenError, match="in use by another instance"):
        await second.destroy_retained("a", 1)
    async with asyncio.timeout(30):
        while objects(timed) != before:  # noqa: ASYNC110 - a test key that is made has no name yet
            await asyncio.sleep(0.1)
    for manager in (first, second):
        await manager.sign_data("a", DIGEST, SHA256)
    assert first.key_health().health is KeyHealth.GOOD
    assert (await first.restore_key("a", 1)).key_id == "a"


async def test_fault_38_who_is_started_while_another_makes_a_key_may_use_it(
    tampered: TokenRig,
) -> None:
    first = await tampered.start("one")
    await first.generate_key("a", P256)
    tampered.faults.set(Fault("C_Sign", sleep_s=6.0, times=1, pid=first.worker_pids[1]))
    making = asyncio.gather(first.generate_key("a", P256), return_exceptions=True)
    assert first._keyring is not None
    async with asyncio.timeout(30):
        while (await first._keyring._stock.take()).top["a"] < 2:  # noqa: ASYNC110 - no event of it
            await asyncio.sleep(0.05)
    second = await tampered.start("two")
    found = await second.get_public_key("a")
    assert not making.done()
    (made,) = await making
    assert made == found
    await settled(first)
    for manager in (first, second):
        assert (await manager.sign_data("a", DIGEST, SHA256)).fingerprint == found.fingerprint
    with pytest.raises(TokenError, match="in use by another instance"):
        await second.generate_key("a", P256)


async def test_a_look_for_other_instances_reads_the_manifest_alone(tampered: TokenRig) -> None:
    manager = await tampered.start()
    assert manager._keyring is not None
    claim, read = manager._keyring._claim, list[int]()
    for key_id in ("a", "b"):
        await manager.generate_key(key_id, P256)
        counts = {name: -tampered.faults.calls(name) for name in ("C_FindObjectsInit", "C_Login")}
        attributes = tampered.faults.calls("C_GetAttributeValue")
        await claim.look()
        assert {n: c + tampered.faults.calls(n) for n, c in counts.items()} == {
            "C_FindObjectsInit": 1,
            "C_Login": 0,
        }
        read.append(tampered.faults.calls("C_GetAttributeValue") - attributes)
    assert read[0] == read[1]


async def test_keys_made_at_the_same_time_are_all_named_on_the_token(timed: TokenRig) -> None:
    manager = await timed.start()
    names = [f"a long name, number {number}" for number in range(4)]
    made = await asyncio.gather(*(manager.generate_key(name, P256) for name in names))
    await manager.close()
    # Without the note the token alone can tell what a key is called whose label has a hash.
    again = await timed.start("another")
    assert {k.key_id: k for k in await again.get_public_keys()} == {k.key_id: k for k in made}


async def test_what_cannot_be_cleared_away_when_its_time_is_up_is_not_tried_all_the_time(
    timed: TokenRig, clock: SimClock, capsys: pytest.CaptureFixture[str]
) -> None:
    first = await timed.start("one", retain_replaced="1h")
    await first.generate_key("a", P256)
    await first.generate_key("a", P256)
    await timed.start("two", retain_replaced="1h")
    await swept(first)
    told = 0

    async def refusals(least: int) -> int:
        nonlocal told
        async with asyncio.timeout(30):
            while True:
                told += "".join(capsys.readouterr()).count("hsm.housekeeping_failed")
                if told >= least:
                    return told
                await asyncio.sleep(0.05)

    for number in (1, 2, 3):
        await clock.advance(timedelta(minutes=31))
        before = await refusals(number)
    for _ in range(5):
        await clock.advance(timedelta(seconds=2))
        await asyncio.sleep(0.2)
    assert await refusals(0) == before


def colliding() -> tuple[str, str]:
    """Return two server ids that look alike in labels (30 bits)."""
    seen: dict[str, str] = {}
    for number in itertools.count():
        name = f"server-{number}"
        other = seen.setdefault(Owner("example.org", name).prefix, name)
        if other != name:
            return other, name
    raise AssertionError


async def test_fault_39_server_ids_that_look_alike_are_told_apart(timed: TokenRig) -> None:
    one, two = colliding()
    first = await timed.start("one", key_identifier_value=one)
    made = await first.generate_key("a", P256)
    before = objects(timed)
    with pytest.raises(TokenError, match=f'belongs to server "{one}".*another server id') as caught:
        await timed.start("two", key_identifier_value=two)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert caught.value.reason == "hsm.owner_collision"
    assert objects(timed) == before
    assert [k.fingerprint for k in await first.get_public_keys()] == [made.fingerprint]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("o[Attribute.LABEL] = 'mine'", 'now labelled "mine": give back "sh1:'),
        ("o[Attribute.ID] = b'new'", "now CKA_ID 6e6577: give back"),
    ],
)
async def test_fault_41_a_renamed_key_is_found_and_named(
    timed: TokenRig, change: str, words: str
) -> None:
    manager = await timed.start()
    made = await manager.generate_key("a", P256)
    undo = timed.meddle(
        "(o,) = find(CLASS=PRIVATE); print(o[Attribute.LABEL], o[Attribute.ID].hex())"
    )
    label, cka_id = undo.split()
    timed.meddle(f"for o in find(CLASS=PRIVATE): {change}")
    with pytest.raises(TokenError, match=words) as caught:
        await manager.get_public_keys()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert caught.value.reason == "hsm.key_renamed"
    await manager.close()
    await refused(timed, words, "hsm.key_renamed")
    timed.meddle(
        "(o,) = find(CLASS=PRIVATE)\n"
        f"o[Attribute.LABEL], o[Attribute.ID] = {label!r}, bytes.fromhex({cka_id!r})"
    )
    again = await timed.start()
    assert [k.fingerprint for k in await again.get_public_keys()] == [made.fingerprint]


async def test_fault_42_a_key_that_may_not_sign_any_more(timed: TokenRig) -> None:
    manager = await timed.start()
    await manager.generate_key("a", P256)
    await manager.generate_key("b", P256)
    label = OWNER.key_label("a", 1)
    timed.meddle(f"for o in find(CLASS=PRIVATE, LABEL={label!r}): o[Attribute.SIGN] = False")
    for pid in manager.worker_pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(SpireHwError) as caught:
        await manager.sign_data("a", DIGEST, SHA256)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert "no longer permits signing" in caught.value.message
    await manager.sign_data("b", DIGEST, SHA256)
    await manager.close()
    await refused(timed, "violates policy: SIGN", "hsm.key_policy")

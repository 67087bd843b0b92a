"""Faults of a token that this key manager can meet; numbers are those of the fault list."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import pytest

from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.plugin.keymanager import KeyHealth
from spire_hw_sim.clock import SimClock
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import PIN, SPY, TokenRig, settled, waited

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager

    Told = Callable[[str], list[dict[str, Any]]]

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
needs_spy = pytest.mark.skipif(not SPY.exists(), reason="pkcs11-spy.so (opensc) is not installed")
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(32)
OWNER = Owner("example.org", "server-1")
T = TypeVar("T")
P256 = KeyType.EC_P256


async def healed(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call for as long as the token is said to be away."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await call()
            except SpireHwError as e:
                if e.kind is not ErrorKind.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.05)


async def until(manager: Pkcs11KeyManager, holds: Callable[[], bool]) -> None:
    """Wait until something holds for the workers."""
    assert manager._pool is not None
    async with asyncio.timeout(60):
        while not holds():
            manager._pool._changed.clear()
            await manager._pool._changed.wait()


async def eventually_signs(manager: Pkcs11KeyManager, key_id: str) -> None:
    await healed(lambda: manager.sign_data(key_id, DIGEST, SHA256))


def link(path: str) -> str:
    return str(Path(path).readlink())


def open_files(pid: int) -> list[str]:
    return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def objects(rig: TokenRig) -> list[str]:
    return sorted(line.rpartition(" ")[0] for line in rig.objects())


@pytest.mark.asyncio
async def test_fault_11_and_12_a_token_that_is_away_and_comes_back(rig: TokenRig) -> None:
    rig.hsm.remove()
    manager = rig.build()
    with pytest.raises(
        SpireHwError, match=r"not present|initialise module|no hsm worker"
    ) as caught:
        await manager.configure(rig.config(start_timeout="1s"))
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    async with asyncio.TaskGroup() as group:
        configuring = group.create_task(manager.configure(rig.config(start_timeout="20s")))
        await asyncio.wait({configuring}, timeout=1)
        assert not configuring.done()
        rig.hsm.put_back()
    assert await manager.get_public_keys() == []


@pytest.mark.asyncio
async def test_fault_13_two_tokens_with_one_label_need_a_serial(rig: TokenRig) -> None:
    other = rig.hsm.init_token("spire", pin=PIN)
    with pytest.raises(SpireHwError, match="token_serial") as caught:
        await rig.start()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert rig.serial in caught.value.message
    assert other in caught.value.message
    manager = await rig.start(token_serial=rig.serial)
    await manager.generate_key("a", P256)


@pytest.mark.asyncio
async def test_fault_15_another_token_of_the_same_name_is_noticed(rig: TokenRig) -> None:
    first = await rig.start()
    await first.generate_key("a", P256)
    await first.close()
    rig.hsm.remove()
    rig.hsm.token_dir.mkdir()
    serial = rig.hsm.init_token("spire", pin=PIN)
    with pytest.raises(SpireHwError, match="serial changed") as caught:
        await rig.start()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    with pytest.raises(SpireHwError, match="manifest names 1 keys"):
        await rig.start(accept_token=serial)
    manager = await rig.start(accept_token=serial, accept_key_loss=True)
    assert await manager.get_public_keys() == []


@needs_spy
@pytest.mark.asyncio
async def test_faults_16_and_17_a_wrong_pin_is_sent_once(
    rig: TokenRig, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.write_pin("wrong-9999")
    manager = rig.build()
    for _ in range(3):
        with pytest.raises(SpireHwError, match="PIN refused") as caught:
            await manager.configure(rig.config(workers=3, **rig.spied()))
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert "wrong-9999" not in repr(caught.value) + str(caught.value)
    assert rig.calls("C_Login") == 1
    # What stands between has seen the PIN.
    assert "hsm.traced" in capsys.readouterr().out
    rig.write_pin(PIN)
    await manager.configure(rig.config(workers=3, **rig.spied()))
    assert rig.calls("C_Login") == 1 + 4
    await manager.generate_key("a", P256)
    await manager.sign_data("a", DIGEST, SHA256)
    assert rig.calls("C_SetAttributeValue") == 0


@needs_spy
@pytest.mark.asyncio
async def test_fault_17_requests_do_not_send_a_refused_pin_again_but_find_the_right_one(
    rig: TokenRig,
) -> None:
    manager = await rig.start(**rig.spied())
    await manager.generate_key("a", P256)
    before = rig.calls("C_Login")
    rig.write_pin("wrong-9999")
    for pid in manager.worker_pids:
        os.kill(pid, signal.SIGKILL)
    refused = 0
    while refused < 8:
        with pytest.raises(SpireHwError) as caught:
            await healed(lambda: manager.sign_data("a", DIGEST, SHA256))
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        refused += 1
        await asyncio.sleep(0.3)
    assert rig.calls("C_Login") == before + 1
    rig.write_pin(PIN)
    async with asyncio.timeout(30):
        while True:
            with suppress(SpireHwError):
                await manager.sign_data("a", DIGEST, SHA256)
                break
            await asyncio.sleep(0.05)
    await manager.generate_key("b", P256)


@pytest.mark.asyncio
async def test_fault_12_who_needs_a_token_that_is_back_finds_it_with_all_workers(
    rig: TokenRig,
) -> None:
    manager = await rig.start(workers=2)
    await manager.generate_key("a", P256)
    assert manager._pool is not None
    seats = [manager._pool._admin, *manager._pool._seats]
    rig.hsm.remove()
    for pid in manager.worker_pids:
        os.kill(pid, signal.SIGKILL)
    await until(manager, lambda: all(seat.is_broken for seat in seats))
    with pytest.raises(SpireHwError) as caught:
        await manager.sign_data("a", DIGEST, SHA256)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    rig.hsm.put_back()
    await eventually_signs(manager, "a")
    await until(manager, lambda: all(seat.is_ready for seat in seats))
    await manager.generate_key("b", P256)


@pytest.mark.asyncio
async def test_a_start_that_is_cancelled_leaves_no_process(rig: TokenRig) -> None:
    before = set(psutil.Process().children())
    for moment in (0.0, 0.01, 0.05, 0.2, 0.5, 1.0):
        manager = rig.build()
        with suppress(TimeoutError):
            async with asyncio.timeout(moment):
                await manager.configure(rig.config(workers=2))
        await manager.close()
        assert set(psutil.Process().children()) <= before


@needs_spy
@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (PIN.encode(), 0o644, "mode 0644"),
        (PIN.encode(), 0o640, "mode 0640"),
        (b"", 0o600, "is empty"),
        (b"\n", 0o600, "is empty"),
        (b"9" * 300, 0o600, "longer than"),
        (b"\xff\xfe", 0o600, "not UTF-8"),
        (b"12\x0034", 0o600, "holds a NUL"),
        (None, 0o700, "not a regular file"),
    ],
)
@pytest.mark.asyncio
async def test_fault_20_no_login_with_a_pin_file_that_is_unfit(
    rig: TokenRig, content: bytes | None, mode: int, words: str
) -> None:
    manager = await rig.start(**rig.spied())
    made = await manager.generate_key("a", P256)
    before = rig.calls("C_Login")
    rig.pin_file.unlink()
    if content is None:
        rig.pin_file.mkdir()
    else:
        rig.pin_file.write_bytes(content)
    rig.pin_file.chmod(mode)
    with pytest.raises(SpireHwError, match=words) as caught:
        await manager.configure(rig.config(**rig.spied()))
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert str(rig.pin_file) in caught.value.message
    assert rig.calls("C_Login") == before
    assert (await manager.sign_data("a", DIGEST, SHA256)).fingerprint == made.fingerprint


@pytest.mark.asyncio
async def test_the_pin_is_in_no_argument_environment_or_repr(
    rig: TokenRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIG_PIN", PIN)
    manager = await rig.start(pin_file=None, pin_env="RIG_PIN")
    assert "RIG_PIN" not in os.environ
    for pid in manager.worker_pids:
        process = psutil.Process(pid)
        assert PIN not in " ".join(process.cmdline())
        assert PIN not in " ".join(f"{k}={v}" for k, v in process.environ().items())
    assert manager._pool is not None
    assert PIN not in repr(vars(manager)) + repr(manager._pool._admin._opening)
    os.kill(manager.worker_pids[1], signal.SIGKILL)
    await manager.generate_key("a", P256)
    await eventually_signs(manager, "a")


@pytest.mark.asyncio
async def test_workers_are_closed_to_debuggers_and_inherit_nothing(rig: TokenRig) -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    try:
        manager = await rig.start()
        for pid in manager.worker_pids:
            process = psutil.Process(pid)
            assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
            assert link(f"/proc/self/fd/{write_end}") not in open_files(pid)
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.asyncio
async def test_faults_25_26_a_vanished_token_is_never_an_empty_list(rig: TokenRig) -> None:
    manager = await rig.start()
    for key_id in ("x509-CA-A", "JWT-Signer-A"):
        await manager.generate_key(key_id, P256)
    rig.hsm.remove()
    with pytest.raises(SpireHwError) as caught:
        await manager.get_public_keys()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    rig.hsm.put_back()
    await eventually_signs(manager, "x509-CA-A")
    listed = await healed(manager.get_public_keys)
    assert {k.key_id for k in listed} == {"x509-CA-A", "JWT-Signer-A"}


@pytest.mark.asyncio
async def test_fault_26_a_restart_on_an_emptied_token_refuses(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    await manager.close()
    rig.meddle("for o in find(CLASS=PRIVATE) + find(CLASS=PUBLIC): o.destroy()")
    with pytest.raises(SpireHwError, match="shows 0") as caught:
        await rig.start()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    with pytest.raises(SpireHwError, match="shows 0"):
        await rig.start("another-host")


@pytest.mark.parametrize("gone", ["PRIVATE", "PUBLIC"])
@pytest.mark.asyncio
async def test_faults_27_28_a_key_that_lost_a_half(rig: TokenRig, gone: str) -> None:
    manager = await rig.start()
    made = await manager.generate_key("a", P256)
    await manager.close()
    rig.meddle(f"[o.destroy() for o in find(CLASS={gone})]")
    if gone == "PRIVATE":
        with pytest.raises(SpireHwError, match="missing: a"):
            await rig.start()
        return
    again = await rig.start()
    assert [k.fingerprint for k in await again.get_public_keys()] == [made.fingerprint]
    await again.sign_data("a", DIGEST, SHA256)


@pytest.mark.asyncio
async def test_fault_30_leftover_generations_are_disposed_of(rig: TokenRig, told: Told) -> None:
    manager = await rig.start()
    old = await manager.generate_key("a", P256)
    await manager.close()
    rig.meddle(f"make({OWNER.key_label('a', 7)!r}, b'7' * 16, EXTRACTABLE=False)")
    again = await rig.start()
    (new,) = await again.get_public_keys()
    (line,) = told("hsm.key_leftover")
    assert (line["level"], line["key_id"], line["kept"]) == ("warning", "a", False)
    assert (line["label"], line["fp"]) == (OWNER.key_label("a", 1), old.fingerprint)
    assert (line["used"], line["used_fp"]) == (OWNER.key_label("a", 7), new.fingerprint)
    await settled(again)
    assert objects(rig) == [f"{h} {OWNER.key_label('a', 7)}" for h in ("PRIVATE_KEY", "PUBLIC_KEY")]
    await again.sign_data("a", DIGEST, SHA256)
    await again.generate_key("a", P256)
    await settled(again)
    assert objects(rig) == [f"{h} {OWNER.key_label('a', 8)}" for h in ("PRIVATE_KEY", "PUBLIC_KEY")]


@pytest.mark.asyncio
async def test_fault_31_duplicates_are_left_to_the_operator(rig: TokenRig) -> None:
    label = OWNER.key_label("a", 1)
    rig.meddle(f"[make({label!r}, i * 16, EXTRACTABLE=False) for i in (b'1', b'2')]")
    before = objects(rig)
    with pytest.raises(SpireHwError, match="will not choose") as caught:
        await rig.start()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert objects(rig) == before


@pytest.mark.asyncio
async def test_fault_32_a_public_half_of_another_key_is_found_out(
    rig: TokenRig, told: Told
) -> None:
    label = OWNER.key_label("a", 1)
    rig.meddle(
        f"one, two = make({label!r}, b'1' * 16, EXTRACTABLE=False), make('x', b'2' * 16)\n"
        "point = two[0][Attribute.EC_POINT]\n"
        "one[0].destroy()\n"
        "session.create_object({Attribute.CLASS: PUBLIC, Attribute.KEY_TYPE: KeyType.EC,"
        " Attribute.TOKEN: True, Attribute.PRIVATE: False,"
        f" Attribute.LABEL: {label!r}, Attribute.ID: b'1' * 16,"
        " Attribute.EC_PARAMS: encode_named_curve_parameters('secp256r1'),"
        " Attribute.EC_POINT: point})"
    )
    words = 'key "a" on token spire/.*: public key mismatch'
    with pytest.raises(TokenError, match=words) as caught:
        await rig.start()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert caught.value.reason == "hsm.public_key_mismatch"
    assert f'(label "{label}", CKA_ID {(b"1" * 16).hex()}, ' in caught.value.message
    (line,) = told("hsm.public_key_mismatch")
    assert (line["key_id"], line["label"], line["cka_id"]) == ("a", label, (b"1" * 16).hex())
    assert len(objects(rig)) == 4


@pytest.mark.asyncio
async def test_fault_33_an_extractable_key_is_not_used(rig: TokenRig) -> None:
    rig.meddle(f"make({OWNER.key_label('a', 1)!r}, b'1' * 16, EXTRACTABLE=True)")
    with pytest.raises(SpireHwError, match="EXTRACTABLE") as caught:
        await rig.start()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert len(objects(rig)) == 2
    manager = await rig.start(accept_weak_keys=["a"])
    await manager.sign_data("a", DIGEST, SHA256)


@pytest.mark.asyncio
async def test_fault_37_foreign_objects_are_neither_listed_nor_touched(rig: TokenRig) -> None:
    other = Owner("example.org", "server-2").key_label("x509-CA-A", 1)
    foreign = ("payroll", "", other, "sh1:", OWNER.prefix + "odd")
    rig.meddle(f"[make(l, bytes([n]) * 16) for n, l in enumerate({foreign!r})]")
    before = objects(rig)
    manager = await rig.start()
    assert await manager.get_public_keys() == []
    await manager.generate_key("x509-CA-A", P256)
    await manager.generate_key("x509-CA-A", P256)
    await settled(manager)
    mine = [f"{h} {OWNER.key_label('x509-CA-A', 2)}" for h in ("PRIVATE_KEY", "PUBLIC_KEY")]
    assert objects(rig) == sorted(before + mine)


async def blind(rig: TokenRig, data: str = "one") -> Pkcs11KeyManager:
    """Start an instance whose time stands still: it looks at nothing unless it is asked something."""
    rig.clock = SimClock()
    return await rig.start(data)


@pytest.mark.asyncio
async def test_fault_38_the_later_of_two_instances_makes_and_destroys_nothing(
    timed: TokenRig, clock: SimClock
) -> None:
    first = await timed.start("one")
    made = await first.generate_key("a", P256)
    second = await timed.start("two")
    before = [line for line in objects(timed) if ".test" not in line]
    for _ in range(2):
        with pytest.raises(SpireHwError, match="in use by another instance") as caught:
            await waited(clock, second.generate_key("a", P256))
        assert caught.value.kind is ErrorKind.ABORTED
    assert [line for line in objects(timed) if ".test" not in line] == before
    made = await first.generate_key("a", P256)
    assert await second.get_public_keys() == [made]
    for manager in (first, second):
        assert (await manager.sign_data("a", DIGEST, SHA256)).fingerprint == made.fingerprint
    # It gave way for good: that the other is gone is for the operator to say, by a restart.
    await first.close()
    with pytest.raises(SpireHwError, match="restart this one"):
        await second.generate_key("a", P256)
    await second.close()
    again = await timed.start("two")
    await waited(clock, again.generate_key("a", P256))


@pytest.mark.asyncio
async def test_fault_38_who_follows_a_dead_instance_waits_for_a_word_of_it_and_goes_on(
    timed: TokenRig, clock: SimClock, capsys: pytest.CaptureFixture[str]
) -> None:
    first = await timed.start("one")
    made = await first.generate_key("a", P256)
    await first.close()
    second = await timed.start("two")
    making = asyncio.gather(second.generate_key("b", P256))
    # Signing and listing wait for nobody.
    assert await second.get_public_keys() == [made]
    await second.sign_data("a", DIGEST, SHA256)
    assert not making.done()
    began = clock.monotonic()
    await waited(clock, making)
    assert clock.monotonic() - began >= 20.0
    assert capsys.readouterr().out.count("hsm.owner_unsettled") == 1
    # Where it was alive itself nobody else is, and a mark that is too old is a dead one's.
    await second.close()
    again = await timed.start("two")
    await again.generate_key("b", P256)
    await again.close()
    await clock.advance(timedelta(minutes=31))
    third = await timed.start("three")
    await third.generate_key("b", P256)


@pytest.mark.asyncio
async def test_fault_38_hosts_that_share_a_directory_are_told_apart_all_the_same(
    timed: TokenRig, clock: SimClock
) -> None:
    """Plugins of two other servers of one machine keep their notes in one place."""
    timed.holds_data_dir = False
    first = await timed.start()
    made = await first.generate_key("a", P256)
    second = await timed.start()
    with pytest.raises(SpireHwError, match="in use by another instance"):
        await waited(clock, second.generate_key("a", P256))
    assert await first.get_public_keys() == [made]


@pytest.mark.asyncio
async def test_fault_38_who_was_not_heard_out_before_a_restart_is_waited_for_again(
    timed: TokenRig, clock: SimClock
) -> None:
    first = await blind(timed)
    await first.generate_key("a", P256)
    timed.clock = clock
    second = await timed.start("two")
    await second.close()
    again = await timed.start("two")
    making = asyncio.gather(again.generate_key("a", P256), return_exceptions=True)
    await first.generate_key("a", P256)
    assert not making.done()
    (caught,) = await waited(clock, making)
    assert isinstance(caught, SpireHwError)
    assert caught.kind is ErrorKind.ABORTED


@pytest.mark.asyncio
async def test_fault_38_an_earlier_instance_that_is_restarted_meanwhile_goes_on(
    timed: TokenRig, clock: SimClock
) -> None:
    first = await blind(timed)
    await first.generate_key("a", P256)
    timed.clock = clock
    second = await timed.start("two")
    await first.generate_key("a", P256)
    await first.close()
    again = await timed.start("one")
    with pytest.raises(SpireHwError, match="in use by another instance"):
        await waited(clock, second.generate_key("a", P256))
    await again.generate_key("a", P256)
    assert again.key_health().health is KeyHealth.GOOD


@pytest.mark.asyncio
async def test_fault_38_of_three_instances_the_first_goes_on(
    timed: TokenRig, clock: SimClock
) -> None:
    managers = [await timed.start(name) for name in ("one", "two", "three")]
    first, *others = managers
    # The two that came later may hold each other off until the first has looked.
    for manager in (*others, first) * 2:
        assert manager._keyring is not None
        with suppress(SpireHwError):
            await waited(clock, manager._keyring._house.sweep())
    for _ in range(2):
        await first.generate_key("a", P256)
        for manager in others:
            with pytest.raises(SpireHwError, match="in use by another instance"):
                await manager.generate_key("a", P256)
    # Started again, it writes over nobody who lives and has not given way.
    await first.close()
    again = await timed.start("one")
    await again.generate_key("a", P256)
    for manager in others:
        with pytest.raises(SpireHwError, match="in use by another instance"):
            await manager.generate_key("a", P256)
    await again.generate_key("a", P256)


@pytest.mark.asyncio
async def test_fault_38_an_instance_that_could_not_speak_up_finds_what_the_later_makes(
    timed: TokenRig, clock: SimClock
) -> None:
    first = await blind(timed)
    await first.generate_key("a", P256)
    timed.clock = clock
    second = await timed.start("two")
    made = [await waited(clock, second.generate_key(key_id, P256)) for key_id in ("a", "b", "a")]
    await settled(second)
    assert {k.key_id: k for k in await first.get_public_keys()} == {k.key_id: k for k in made}
    for key in made[1:]:
        assert (await first.sign_data(key.key_id, DIGEST, SHA256)).fingerprint == key.fingerprint
    await first.close()
    again = await timed.start("one")
    assert {k.key_id: k for k in await again.get_public_keys()} == {k.key_id: k for k in made}


@pytest.mark.asyncio
async def test_fault_38_what_the_later_instance_gives_up_is_given_up_by_the_earlier(
    timed: TokenRig, clock: SimClock
) -> None:
    first = await blind(timed)
    made = await first.generate_key("a", P256)
    timed.clock = clock
    second = await timed.start("two", retain_replaced="1h")
    await waited(clock, second.generate_key("a", P256))
    assert await first.get_public_keys() != [made]
    # As when it was not current yet, and whoever wanted it went away.
    timed.meddle(f"[o.destroy() for o in find(LABEL={OWNER.key_label('a', 2)!r})]")
    assert await first.get_public_keys() == [made]
    assert (await first.sign_data("a", DIGEST, SHA256)).fingerprint == made.fingerprint


@pytest.mark.asyncio
async def test_fault_40_a_key_deleted_behind_our_back(rig: TokenRig) -> None:
    manager = await rig.start()
    made = {key_id: await manager.generate_key(key_id, P256) for key_id in ("a", "b")}
    rig.meddle(f"[o.destroy() for o in find(LABEL={OWNER.key_label('a', 1)!r})]")
    # Whether it is gone is not known from a listing alone: so does a token that loses its head.
    with pytest.raises(SpireHwError, match="missing: a"):
        await manager.get_public_keys()
    for _ in range(2):
        with pytest.raises(SpireHwError, match="vanished") as caught:
            await manager.sign_data("a", DIGEST, SHA256)
        assert caught.value.kind is ErrorKind.INTERNAL
    await manager.sign_data("b", DIGEST, SHA256)
    assert await manager.get_public_keys() == [made["b"]]
    assert manager.key_health().reason == "hsm.key_vanished"
    rig.meddle(f"[o.destroy() for o in find(LABEL={OWNER.key_label('b', 1)!r})]")
    with pytest.raises(SpireHwError, match="vanished"):
        await manager.sign_data("b", DIGEST, SHA256)
    # Nothing at all is what a token that went away shows.
    with pytest.raises(SpireHwError, match="missing: a, b") as caught:
        await manager.get_public_keys()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    await manager.close()
    with pytest.raises(SpireHwError, match="missing: a, b"):
        await rig.start()


@pytest.mark.asyncio
async def test_fault_42_signing_switched_off_behind_our_back(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    await manager.close()
    rig.meddle("[o.__setitem__(Attribute.SIGN, False) for o in find(CLASS=PRIVATE)]")
    with pytest.raises(SpireHwError) as caught:
        await rig.start()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION


@pytest.mark.asyncio
async def test_fault_48_a_full_queue_refuses_at_once_and_recovers(rig: TokenRig) -> None:
    manager = await rig.start(queue=4)
    info = await manager.generate_key("a", P256)
    worker = manager.worker_pids[1]
    os.kill(worker, signal.SIGSTOP)
    calls = [asyncio.ensure_future(manager.sign_data("a", DIGEST, SHA256)) for _ in range(400)]  # noqa: TID251
    done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
    refused = [c.exception() for c in done]
    assert refused
    for error in refused:
        assert isinstance(error, SpireHwError)
        assert error.kind is ErrorKind.RESOURCE_EXHAUSTED
    os.kill(worker, signal.SIGCONT)
    for made in await asyncio.gather(*waiting, return_exceptions=True):
        if isinstance(made, SpireHwError):
            assert made.kind is ErrorKind.RESOURCE_EXHAUSTED
            continue
        assert not isinstance(made, BaseException)
        verify_digest(info.public_key, DIGEST, made.signature, SHA256)


@pytest.mark.asyncio
async def test_fault_49_a_hung_worker_is_killed_and_replaced(rig: TokenRig) -> None:
    manager = await rig.start(sign_timeout="1s")
    await manager.generate_key("a", P256)
    hung = manager.worker_pids[1]
    os.kill(hung, signal.SIGSTOP)
    with pytest.raises(SpireHwError, match="did not sign") as caught:
        await manager.sign_data("a", DIGEST, SHA256)
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
    await eventually_signs(manager, "a")
    assert hung not in manager.worker_pids
    assert not psutil.pid_exists(hung)


@pytest.mark.asyncio
async def test_fault_49_with_two_workers_the_other_one_goes_on(rig: TokenRig) -> None:
    manager = await rig.start(sign_timeout="60s", workers=2)
    await manager.generate_key("a", P256)
    os.kill(manager.worker_pids[1], signal.SIGSTOP)
    calls = [asyncio.ensure_future(manager.sign_data("a", DIGEST, SHA256)) for _ in range(8)]  # noqa: TID251
    done, waiting = await asyncio.wait(calls, timeout=5)
    assert done
    os.kill(manager.worker_pids[1], signal.SIGCONT)
    await asyncio.gather(*waiting)


@pytest.mark.asyncio
async def test_fault_79_a_killed_worker_costs_no_signature(rig: TokenRig) -> None:
    manager = await rig.start()
    info = await manager.generate_key("a", P256)
    made: list[Any] = []

    async def sign() -> None:
        made.append(await manager.sign_data("a", DIGEST, SHA256))

    async with asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(sign())
            if number == 100:
                await asyncio.sleep(0)
                os.kill(manager.worker_pids[1], signal.SIGKILL)
    assert len(made) == 200
    for one in made:
        verify_digest(info.public_key, DIGEST, one.signature, SHA256)


@pytest.mark.asyncio
async def test_fault_79_a_killed_admin_worker_is_replaced(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    os.kill(manager.worker_pids[0], signal.SIGKILL)
    assert len(await manager.get_public_keys()) == 1
    await manager.generate_key("a", P256)


@pytest.mark.asyncio
async def test_fault_55_salts_at_their_limits(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("r", KeyType.RSA_2048)
    for salt in (1, 20, 222):
        options = SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=salt)
        await manager.sign_data("r", DIGEST, options)
    for salt in (223, -2):
        options = SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=salt)
        with pytest.raises(InvalidInputError, match="salt"):
            await manager.sign_data("r", DIGEST, options)


@pytest.mark.asyncio
async def test_fault_58_signing_goes_on_while_a_key_is_generated(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    generating = asyncio.ensure_future(manager.generate_key("r", KeyType.RSA_4096))  # noqa: TID251
    signed = 0
    while not generating.done() and signed < 50:
        await manager.sign_data("a", DIGEST, SHA256)
        signed += 1
    assert signed == 50 or generating.done()
    await generating


@pytest.mark.asyncio
async def test_fault_63_a_caller_that_gave_up_finds_its_key_when_it_asks_again(
    rig: TokenRig,
) -> None:
    manager = await rig.start()
    old = await manager.generate_key("r", P256)
    assert manager._keyring is not None
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await manager.generate_key("r", KeyType.RSA_2048)
    assert (await manager.get_public_key("r")).fingerprint == old.fingerprint
    made = await manager.generate_key("r", KeyType.RSA_2048)
    await settled(manager)
    assert (await manager.get_public_key("r")).fingerprint == made.fingerprint
    label = OWNER.key_label("r", 2)
    assert objects(rig) == [f"PRIVATE_KEY {label}", f"PUBLIC_KEY {label}"]


@pytest.mark.asyncio
async def test_fault_80_a_bad_new_configuration_leaves_the_old_one_serving(rig: TokenRig) -> None:
    manager = await rig.start()
    made = await manager.generate_key("a", P256)
    for changes in ({"token_label": "nope", "start_timeout": "1s"}, {"module_path": "/nope.so"}):
        with pytest.raises(SpireHwError):
            await manager.configure(rig.config(**changes))
    assert [k.fingerprint for k in await manager.get_public_keys()] == [made.fingerprint]
    await manager.generate_key("a", P256)


@pytest.mark.asyncio
async def test_fault_81_closing_leaves_no_worker(rig: TokenRig) -> None:
    manager = await rig.start(workers=2)
    await manager.generate_key("a", P256)
    pids = manager.worker_pids
    assert len(pids) == 3
    await manager.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)

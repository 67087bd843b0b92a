"""Faults while a token signs (numbers 43 to 58): who asks sees what it should, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import pytest_asyncio

from spire_hw.errors import ErrorKind, InvalidInputError, LimitError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.plugin.keymanager import KeyHealth
from spire_hw_sim.clock import SimClock
from spire_hw_sim.pkcs11faults import Fault
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig, settled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(range(32))
P256 = KeyType.EC_P256
LOGINS = 2  # the admin worker's and the signing worker's


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path, tampered=True) as made:
        yield made


class Traces:
    """What must be the same after a fault: descriptors of host and workers, sessions of the token."""

    def __init__(self, rig: TokenRig, manager: Pkcs11KeyManager) -> None:
        self._rig = rig
        self._manager = manager
        self._before = self._now()

    def _now(self) -> tuple[int, int, int]:
        me = psutil.Process()
        workers = [c for c in me.children() if c.status() != psutil.STATUS_ZOMBIE]
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        of_workers = max(len(list(Path(f"/proc/{c.pid}/fd").iterdir())) for c in workers)
        return len(workers), descriptors, of_workers

    async def check(self) -> None:
        """Check that nothing was left, once what ends has ended."""
        async with asyncio.timeout(10):
            while self._now() != self._before:  # noqa: ASYNC110 - other processes end
                await asyncio.sleep(0.05)
        for pid in self._manager.worker_pids:
            opened = self._rig.faults.calls("C_OpenSession", pid)
            assert opened - self._rig.faults.calls("C_CloseSession", pid) == 2


async def started(rig: TokenRig, *key_ids: str, **changes: object) -> Pkcs11KeyManager:
    manager = await rig.start(**changes)
    for key_id in key_ids or ("a",):
        await manager.generate_key(key_id, P256)
    await signs(manager, *key_ids or ("a",))
    return manager


async def signs(manager: Pkcs11KeyManager, *key_ids: str, options: SignOptions = SHA256) -> None:
    """Check that keys sign, with the keys they have."""
    for key_id in key_ids or ("a",):
        info = await manager.get_public_key(key_id)
        digest = options.hash.digest(DIGEST)
        made = await manager.sign_data(key_id, digest, options)
        assert made.fingerprint == info.fingerprint
        verify_digest(info.public_key, digest, made.signature, options)


async def heals(manager: Pkcs11KeyManager, *key_ids: str) -> None:
    async with asyncio.timeout(30):
        while True:
            with suppress(SpireHwError):
                await signs(manager, *key_ids)
                return
            await asyncio.sleep(0.05)


async def refusal(manager: Pkcs11KeyManager, key_id: str = "a") -> SpireHwError:
    with pytest.raises(SpireHwError) as caught:
        await manager.sign_data(key_id, DIGEST, SHA256)
    return caught.value


@pytest.mark.parametrize("function", ["C_SignInit", "C_Sign"])
@pytest.mark.parametrize("code", [0xB0, 0xB3, 0x90, 0x91])
@pytest.mark.asyncio
async def test_fault_43_a_session_closed_under_us_costs_nothing(
    rig: TokenRig, function: str, code: int
) -> None:
    manager = await started(rig)
    traces = Traces(rig, manager)
    pids = manager.worker_pids
    rig.faults.set(Fault(function, times=1, returns=code))
    await signs(manager)
    assert manager.worker_pids == pids
    assert rig.faults.calls("C_Login") == LOGINS
    await traces.check()


@pytest.mark.slow
@pytest.mark.asyncio
async def test_fault_43_sessions_that_were_opened_anew_are_told(
    rig: TokenRig, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = await started(rig)
    for _ in range(2):
        rig.faults.set(Fault("C_Sign", times=1, returns=0xB3))
        await signs(manager)
    told = ""
    async with asyncio.timeout(40):
        while "hsm.session_reopened" not in told:  # with the next ping of a worker that rests
            await asyncio.sleep(0.2)
            told += capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if "hsm.session_reopened" in line]
    assert "sign-0" in line
    assert "2" in line


@pytest.mark.parametrize("code", [0x82, 0x60])
@pytest.mark.asyncio
async def test_fault_44_a_handle_that_is_stale_is_found_again(rig: TokenRig, code: int) -> None:
    manager = await started(rig)
    searches = rig.faults.calls("C_FindObjectsInit")
    rig.faults.set(Fault("C_SignInit", times=1, returns=code, instead=True))
    await signs(manager)
    assert rig.faults.calls("C_FindObjectsInit") == searches + 1
    assert rig.faults.calls("C_Login") == LOGINS


@pytest.mark.asyncio
async def test_fault_44_logged_out_under_us_is_one_login_more(rig: TokenRig) -> None:
    manager = await started(rig)
    traces = Traces(rig, manager)
    rig.faults.set(Fault("C_SignInit", times=1, returns=0x101, instead=True))
    await signs(manager)
    assert rig.faults.calls("C_Login") == LOGINS + 1
    await traces.check()


@pytest.mark.parametrize("code", [0x32, 0xE0])
@pytest.mark.asyncio
async def test_fault_45_a_token_removed_while_it_signs_is_unavailable_and_heals(
    rig: TokenRig, code: int
) -> None:
    manager = await started(rig, "a", "b", probe_interval="1s")
    traces = Traces(rig, manager)
    marker = rig.folder / "removed"
    marker.touch()
    rig.faults.set(
        *(
            Fault(name, returns=code, instead=True, while_exists=str(marker))
            for name in ("C_SignInit", "C_OpenSession")
        )
    )
    for _ in range(20):
        error = await refusal(manager)
        assert error.kind is ErrorKind.UNAVAILABLE
    assert {k.key_id for k in [await manager.get_public_key(n) for n in "ab"]} == {"a", "b"}
    marker.unlink()
    await heals(manager, "a", "b")
    await traces.check()


@pytest.mark.asyncio
async def test_fault_46_a_device_that_fails_is_tried_by_one_worker_and_seldom(
    rig: TokenRig,
) -> None:
    manager = await started(rig, workers=3, probe_interval="2s")
    traces = Traces(rig, manager)
    logins, signs_before = rig.faults.calls("C_Login"), rig.faults.calls("C_Sign")
    rig.faults.set(Fault("C_Sign", returns=0x30))
    loop = asyncio.get_running_loop()
    start, refused = loop.time(), 0
    while loop.time() - start < 5:
        error = await refusal(manager)
        assert error.kind is ErrorKind.UNAVAILABLE
        assert "CKR_DEVICE_ERROR" in error.message
        refused += 1
        await asyncio.sleep(0.01)
    # Every worker meets the fault once; then one of them tries again, every two seconds.
    assert refused > 50
    assert rig.faults.calls("C_Login") - logins <= 4
    assert rig.faults.calls("C_Sign") - signs_before <= 3 + 2 * 4
    rig.faults.clear()
    await heals(manager)
    await traces.check()


@pytest.mark.asyncio
async def test_fault_46_listing_a_device_that_fails_logs_in_seldom_too(rig: TokenRig) -> None:
    manager = await started(rig)
    traces = Traces(rig, manager)
    logins = rig.faults.calls("C_Login")
    rig.faults.set(Fault("C_FindObjectsInit", pid=0, returns=0x30, instead=True))
    loop = asyncio.get_running_loop()
    start = loop.time()
    while loop.time() - start < 4:
        with pytest.raises(SpireHwError) as caught:
            await manager.get_public_keys()
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        await asyncio.sleep(0.01)
    assert rig.faults.calls("C_Login") - logins <= 6
    rig.faults.clear()
    async with asyncio.timeout(60):
        while True:
            with suppress(SpireHwError):
                assert len(await manager.get_public_keys()) == 1
                break
            await asyncio.sleep(0.1)
    await traces.check()


@pytest.mark.asyncio
async def test_fault_47_an_operation_left_active_dies_with_its_session(rig: TokenRig) -> None:
    manager = await started(rig)
    traces = Traces(rig, manager)
    rig.faults.set(Fault("C_Sign", times=1, returns=0x21, instead=True))
    assert "DATA_LEN_RANGE" in (await refusal(manager)).message
    await signs(manager)
    assert rig.faults.calls("C_Login") == LOGINS
    await traces.check()


@pytest.mark.asyncio
async def test_fault_48_a_slow_token_serves_all_keys_and_what_is_urgent_first(
    rig: TokenRig,
) -> None:
    manager = await started(rig, "x509", "jwt", queue=64)
    rig.faults.set(Fault("C_Sign", sleep_s=0.05))
    order: list[str] = []

    refused: list[SpireHwError] = []

    async def sign(key_id: str, name: str, options: SignOptions) -> None:
        try:
            await manager.sign_data(key_id, DIGEST, options)
        except SpireHwError as e:
            refused.append(e)
        else:
            order.append(name)

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(sign("jwt", "jwt", SHA256))
        await asyncio.sleep(0.3)
        for _ in range(56):
            group.create_task(sign("jwt", "jwt", SHA256))
        await asyncio.sleep(0)
        group.create_task(sign("x509", "x509", SHA256))
        group.create_task(sign("x509", "urgent", SignOptions(HashAlgorithm.SHA256, urgent=True)))
        for _ in range(40):
            group.create_task(sign("jwt", "jwt", SHA256))
    # Only what the token has in hand goes before what is urgent; then the keys take turns.
    assert order.index("urgent") <= 8 + 4
    assert order.index("x509") <= 8 + 8
    assert refused
    assert {e.kind for e in refused} == {ErrorKind.RESOURCE_EXHAUSTED}
    assert "queue full (64)" in refused[0].message
    rig.faults.clear()
    await signs(manager, "x509", "jwt")


@pytest.mark.slow
@pytest.mark.asyncio
async def test_fault_48_what_comes_during_a_ping_of_a_slow_token_is_served_after_it(
    rig: TokenRig,
) -> None:
    manager = await started(rig)
    rig.faults.set(Fault("C_Sign", sleep_s=0.02), Fault("C_GetSessionInfo", sleep_s=1))
    pings = rig.faults.calls("C_GetSessionInfo", manager.worker_pids[1])
    while rig.faults.calls("C_GetSessionInfo", manager.worker_pids[1]) < pings + 1:
        await signs(manager)
        await asyncio.sleep(0.2)
    await signs(manager)


@pytest.mark.asyncio
async def test_fault_49_a_call_that_never_returns_costs_its_worker_and_no_other(
    rig: TokenRig,
) -> None:
    manager = await started(rig, sign_timeout="1s", workers=2)
    traces = Traces(rig, manager)
    hung = manager.worker_pids[1]
    rig.faults.set(Fault("C_Sign", pid=hung, sleep_s=3600))
    results = await asyncio.gather(
        *(manager.sign_data("a", DIGEST, SHA256) for _ in range(8)), return_exceptions=True
    )
    failed = [r for r in results if isinstance(r, BaseException)]
    assert 1 <= len(failed) < len(results)
    for error in failed:
        assert isinstance(error, SpireHwError)
        assert error.kind is ErrorKind.DEADLINE_EXCEEDED
    await heals(manager)
    await traces.check()
    assert hung not in manager.worker_pids
    assert not psutil.pid_exists(hung)


@pytest.mark.parametrize("how", ["flipped", "random", "short", "zero_r", "zero_s"])
@pytest.mark.asyncio
async def test_faults_50_and_51_a_wrong_signature_never_leaves_and_a_second_ends_the_key(
    rig: TokenRig, how: str
) -> None:
    manager = await started(rig, "a", "b")
    rig.faults.set(Fault("C_Sign", times=1, signature=how))
    workers = manager.worker_pids
    error = await refusal(manager)
    assert error.kind is ErrorKind.INTERNAL
    await heals(manager, "a")
    assert manager.worker_pids[1] not in workers
    rig.faults.set(Fault("C_Sign", times=1, signature=how))
    assert (await refusal(manager)).kind is ErrorKind.INTERNAL
    rig.faults.clear()
    assert "quarantined" in (await refusal(manager)).message
    await heals(manager, "b")


@pytest.mark.asyncio
async def test_fault_50_a_wrong_signature_is_charged_to_no_other_key(rig: TokenRig) -> None:
    keys = [f"k{n}" for n in range(6)]
    manager = await started(rig, *keys)
    for skip in (1, 9, 17):
        rig.faults.set(Fault("C_Sign", times=1, skip=skip, signature="flipped"))
        results = await asyncio.gather(
            *(manager.sign_data(key, DIGEST, SHA256) for key in keys for _ in range(4)),
            return_exceptions=True,
        )
        assert sum(isinstance(r, BaseException) for r in results) == 1
        rig.faults.clear()
        await heals(manager, "k5")
    good = [key for key in keys if not await _is_quarantined(manager, key)]
    assert len(good) >= 5


async def _is_quarantined(manager: Pkcs11KeyManager, key_id: str) -> bool:
    try:
        await signs(manager, key_id)
    except SpireHwError as e:
        return "quarantined" in e.message
    return False


@pytest.mark.parametrize("size", [0, 20, 31, 33, 64, 200])
@pytest.mark.asyncio
async def test_fault_52_a_digest_of_a_wrong_length_does_not_reach_the_token(
    rig: TokenRig, size: int
) -> None:
    manager = await started(rig)
    before = rig.faults.calls("C_SignInit")
    with pytest.raises(InvalidInputError):
        await manager.sign_data("a", bytes(size), SHA256)
    assert rig.faults.calls("C_SignInit") == before


@pytest.mark.asyncio
async def test_fault_53_options_that_make_no_sense_do_not_reach_the_token(rig: TokenRig) -> None:
    manager = await started(rig)
    before = rig.faults.calls("C_SignInit")
    for options in (
        SignOptions(HashAlgorithm.SHA256, pss=True),
        SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=20),
    ):
        with pytest.raises(InvalidInputError, match="PSS"):
            await manager.sign_data("a", DIGEST, options)
    assert rig.faults.calls("C_SignInit") == before


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384])
@pytest.mark.asyncio
async def test_fault_54_long_and_short_digests_sign_on_both_curves(
    rig: TokenRig, key_type: KeyType
) -> None:
    manager = await rig.start()
    await manager.generate_key("a", key_type)
    for algorithm in HashAlgorithm:
        await signs(manager, "a", options=SignOptions(algorithm))


@pytest.mark.asyncio
async def test_fault_55_a_salt_the_token_refuses_is_the_callers_matter(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("r", KeyType.RSA_2048)
    traces = Traces(rig, manager)
    options = SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=20)
    rig.faults.set(Fault("C_SignInit", returns=0x71, instead=True))
    with pytest.raises(InvalidInputError, match="salt length 20 not supported by token"):
        await manager.sign_data("r", DIGEST, options)
    rig.faults.clear()
    for salt in (-1, 0, 20):
        await signs(manager, "r", options=SignOptions(HashAlgorithm.SHA256, True, salt))
    assert rig.faults.calls("C_Login") == LOGINS
    await traces.check()


@pytest.mark.parametrize(
    ("code", "text"), [(0x80000001, "0x80000001"), (0x1B, "ACTION_PROHIBITED")]
)
@pytest.mark.asyncio
async def test_fault_56_a_code_nobody_knows_carries_its_number(
    rig: TokenRig, code: int, text: str
) -> None:
    manager = await started(rig, probe_interval="1s")
    rig.faults.set(Fault("C_Sign", returns=code))
    error = await refusal(manager)
    assert text in error.message
    assert error.kind in {ErrorKind.INTERNAL, ErrorKind.FAILED_PRECONDITION}
    rig.faults.clear()
    await heals(manager)
    assert rig.faults.calls("C_Login") <= LOGINS + 2


REFUSALS = [
    0x02,
    0x07,
    0x10,
    0x11,
    0x12,
    0x13,
    0x1B,
    0x20,
    0x21,
    0x31,
    0x54,
    0x62,
    0x71,
    0xB1,
    0xB5,
]
REFUSALS += [0xD0, 0xD1, 0xE2, 0x1234]


@pytest.mark.asyncio
async def test_every_refusal_names_key_token_step_code_and_what_to_do(rig: TokenRig) -> None:
    manager = await started(rig)
    where = re.escape(f"on token spire/{rig.serial}: ")
    for code in REFUSALS:
        rig.faults.set(Fault("C_Sign", returns=code))
        name = rf"CKR_[A-Z_]+ \(0x{code:02x}\)" if code != 0x1234 else "CKR_0x1234"
        told = (await refusal(manager)).message
        assert re.fullmatch(rf'key "a" {where}sign failed: {name}; \S.*', told)
        rig.faults.set(Fault("C_GenerateKeyPair", returns=code, instead=True))
        with pytest.raises(SpireHwError) as caught:
            await manager.generate_key("b", P256)
        told = caught.value.message
        assert re.fullmatch(rf'key "b" {where}[^/]*CKR_[^/]*; \S.*', told), told
    for code in (0x63, 0x68, 0x70):
        rig.faults.set(Fault("C_Sign", returns=code))
        told = (await refusal(manager)).message
        words = rf'token spire/{rig.serial} refuses CKM_ECDSA for key "a": CKR_\w+ \(0x{code:x}\)'
        assert re.fullmatch(rf"{words}.*; \S.*", told)
    rig.faults.clear()
    await signs(manager)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (0x31, "hsm.device_memory"),
        (0x21, "hsm.data_len_range"),
        (0x1B, "hsm.action_prohibited"),
        (0x54, "hsm.function_not_supported"),
        (0x70, "hsm.mechanism_invalid"),
    ],
)
@pytest.mark.asyncio
async def test_a_key_that_is_only_refused_is_told_once_a_minute_and_is_not_well(
    rig: TokenRig, told: Callable[[str], list[dict[str, Any]]], code: int, reason: str
) -> None:
    rig.clock = clock = SimClock()
    manager = await started(rig, "a", "b")
    rig.faults.set(Fault("C_Sign", returns=code))
    for _ in range(4):
        await refusal(manager)
    assert manager.key_health().health is KeyHealth.GOOD
    await refusal(manager)
    health = manager.key_health()
    assert (health.health, health.reason) == (KeyHealth.DEGRADED, reason)
    assert 'key "a"' in health.message
    for _ in range(5):
        await refusal(manager, "b")
    assert manager.key_health().health is KeyHealth.DOWN
    lines = told(reason)
    assert [(x["key_id"], x["level"], x["left_out"]) for x in lines] == [
        ("a", "error", 0),
        ("b", "error", 0),
    ]
    assert all(f"spire/{rig.serial}" in x["error"] for x in lines)
    await clock.advance(timedelta(seconds=61))
    await refusal(manager)
    assert [x["left_out"] for x in told(reason)] == [0, 0, 4]
    # One that signs is well again, the other is not known to be.
    rig.faults.clear()
    await signs(manager, "a")
    assert manager.key_health().health is KeyHealth.DEGRADED
    await signs(manager, "b")
    assert manager.key_health().health is KeyHealth.GOOD


@pytest.mark.asyncio
async def test_one_signature_between_refusals_keeps_a_key_well(rig: TokenRig) -> None:
    manager = await started(rig)
    for _ in range(2):
        rig.faults.set(Fault("C_Sign", returns=0x21))
        for _ in range(4):
            await refusal(manager)
        rig.faults.clear()
        await signs(manager)
    assert manager.key_health().health is KeyHealth.GOOD


@pytest.mark.asyncio
async def test_a_refused_generation_is_told_with_its_code_and_key(
    rig: TokenRig, told: Callable[[str], list[dict[str, Any]]]
) -> None:
    manager = await started(rig, max_keys=2)
    rig.faults.set(Fault("C_GenerateKeyPair", returns=0x1B, instead=True))
    for _ in range(2):
        with pytest.raises(SpireHwError, match=r"CKR_ACTION_PROHIBITED \(0x1b\)"):
            await manager.generate_key("b", P256)
    (line,) = told("hsm.action_prohibited")
    assert (line["key_id"], line["step"]) == ("b", "generate key pair")
    assert f'key "b" on token spire/{rig.serial}: ' in line["error"]
    rig.faults.clear()
    await manager.generate_key("b", P256)
    with pytest.raises(LimitError, match="max_keys"):
        await manager.generate_key("c", P256)
    (line,) = told("hsm.generation_refused")
    assert line["key_id"] == "c"
    assert told("hsm.task_failed") == []


@pytest.mark.asyncio
async def test_fault_57_who_signs_while_its_key_is_replaced_gets_the_new_fingerprint(
    rig: TokenRig,
) -> None:
    manager = await started(rig)
    stop = asyncio.Event()
    seen: set[str] = set()

    async def sign() -> None:
        while not stop.is_set():
            made = await manager.sign_data("a", DIGEST, SHA256)
            seen.add(made.fingerprint)

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(sign())
        made = [(await manager.get_public_key("a")).fingerprint]
        for _ in range(8):
            made.append((await manager.generate_key("a", P256)).fingerprint)
            await settled(manager)
        await manager.sign_data("a", DIGEST, SHA256)
        stop.set()
    assert seen <= set(made)
    assert made[-1] == (await manager.get_public_key("a")).fingerprint


@pytest.mark.asyncio
async def test_fault_58_a_long_generation_holds_no_signature_up(rig: TokenRig) -> None:
    manager = await started(rig)
    rig.faults.set(Fault("C_GenerateKeyPair", sleep_s=3))
    async with asyncio.TaskGroup() as group:
        generating = group.create_task(manager.generate_key("b", P256))
        while rig.faults.calls("C_GenerateKeyPair") < 2:  # noqa: ASYNC110 - another process calls
            await asyncio.sleep(0.01)
        for _ in range(50):
            await signs(manager)
        assert not generating.done()
    await signs(manager, "a", "b")


@pytest.mark.asyncio
async def test_fault_05_a_module_that_crashes_again_and_again_is_given_up(rig: TokenRig) -> None:
    manager = await started(rig)
    before = await manager.get_public_key("a")
    rig.faults.set(Fault("C_SignInit", crash=11))
    first = await refusal(manager)
    assert first.kind is ErrorKind.UNAVAILABLE
    assert "signal 11" in first.message
    latched = first
    async with asyncio.timeout(100):
        while latched.kind is not ErrorKind.FAILED_PRECONDITION:
            await asyncio.sleep(0.1)
            latched = await refusal(manager)
    assert "5 times within 5 minutes" in latched.message
    logins, crashes = rig.faults.calls("C_Login"), rig.faults.calls("C_SignInit")
    rig.faults.clear()
    for _ in range(5):
        assert (await refusal(manager)).kind is ErrorKind.FAILED_PRECONDITION
    assert rig.faults.calls("C_Login") == logins
    assert rig.faults.calls("C_SignInit") == crashes
    # The admin worker never crashed; a new configuration starts over.
    assert [k.fingerprint for k in await manager.get_public_keys()] == [before.fingerprint]
    await manager.configure(rig.config())
    await signs(manager)
    assert (await manager.get_public_key("a")).fingerprint == before.fingerprint


@pytest.mark.asyncio
async def test_fault_05_a_module_that_crashes_at_its_start_is_told(rig: TokenRig) -> None:
    for function in ("C_Initialize", "C_Login"):
        rig.faults.set(Fault(function, crash=6))
        with pytest.raises(SpireHwError) as caught:
            await rig.start(start_timeout="3s")
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert "signal 6" in caught.value.message
    rig.faults.clear()
    await started(rig)


def test_descriptors_are_counted_where_they_are() -> None:
    read_end, write_end = os.pipe()
    before = len(list(Path("/proc/self/fd").iterdir()))
    os.close(read_end)
    os.close(write_end)
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 2

"""Faults of processes and concurrency (numbers 73 to 81): nothing is left, nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import pytest_asyncio

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw_sim.pkcs11faults import Fault
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import PIN, TokenRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(32)
P256 = KeyType.EC_P256
# A host that forks with a key manager open; the child tries to use it.
FORKER = """
import asyncio, os, sys
from pathlib import Path
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw_sim.tokenrig import TokenRig
OPTIONS = SignOptions(HashAlgorithm.SHA256)
async def main():
    async with TokenRig(Path(sys.argv[1])) as rig:
        manager = await rig.start()
        await manager.generate_key("a", KeyType.EC_P256)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write_end, b"%d" % len(manager.worker_pids))
            os._exit(0)
        os.waitpid(pid, 0)
        for _ in range(20):
            await manager.sign_data("a", bytes(32), OPTIONS)
        print(len(await manager.get_public_keys()), os.read(read_end, 10).decode())
asyncio.run(main())
"""


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path, tampered=True) as made:
        yield made


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def is_loaded(module: str) -> bool:
    """Tell whether this process has loaded a library."""
    return Path(module).resolve().name in Path("/proc/self/maps").read_text()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def cores() -> list[Path]:
    """Return core files where workers stand."""
    return list(Path("/").glob("core*"))


def children() -> set[int]:
    return {c.pid for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE}


async def signs(manager: Pkcs11KeyManager, key_id: str = "a") -> None:
    info = await manager.get_public_key(key_id)
    made = await manager.sign_data(key_id, DIGEST, SHA256)
    verify_digest(info.public_key, DIGEST, made.signature, SHA256)


def test_fault_73_a_fork_of_the_host_leaves_its_token_alone(tmp_path: Path) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", FORKER, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "1 2"


@pytest.mark.asyncio
async def test_fault_73_and_74_the_module_is_in_processes_of_one_thread_and_not_in_the_host(
    rig: TokenRig,
) -> None:
    manager = await rig.start(workers=3)
    await manager.generate_key("a", P256)
    await asyncio.gather(*(manager.sign_data("a", DIGEST, SHA256) for _ in range(300)))
    assert not is_loaded(rig.hsm.module)
    for pid in manager.worker_pids:
        assert threads(pid) == 1
        assert psutil.Process(pid).ppid() == os.getpid()
        assert rig.faults.calls("C_Initialize", pid) == 1
    # Whoever verifies holds no token's library.
    for pid in children() - set(manager.worker_pids):
        assert "verifier" in " ".join(psutil.Process(pid).cmdline())


@pytest.mark.asyncio
async def test_fault_75_a_search_under_way_holds_no_signature_up(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    rig.faults.set(Fault("C_FindObjects", pid=manager.worker_pids[0], sleep_s=1))
    async with asyncio.TaskGroup() as group:
        listing = group.create_task(manager.get_public_keys())
        for _ in range(100):
            await signs(manager)
        assert not listing.done()
    begun, ended = (rig.faults.calls(f"C_FindObjects{n}") for n in ("Init", "Final"))
    assert begun == ended


@pytest.mark.asyncio
async def test_fault_76_already_logged_in_leaves_no_session_behind(rig: TokenRig) -> None:
    manager = await rig.start()
    await manager.generate_key("a", P256)
    rig.faults.set(Fault("C_Login", times=1, returns=0x100, instead=True))
    before = children()
    os.kill(manager.worker_pids[1], signal.SIGKILL)
    async with asyncio.timeout(30):
        while True:
            try:
                await signs(manager)
                break
            except SpireHwError:
                await asyncio.sleep(0.05)
    for pid in manager.worker_pids:
        assert rig.faults.calls("C_OpenSession", pid) - rig.faults.calls("C_CloseSession", pid) == 2
    assert len(children()) == len(before)


@pytest.mark.asyncio
async def test_fault_77_a_token_with_few_sessions_gets_fewer_workers(rig: TokenRig) -> None:
    rig.faults.set(Fault("C_OpenSession", skip=4, returns=0xB1, instead=True))
    manager = await rig.start(workers=3, start_timeout="10s")
    await manager.generate_key("a", P256)
    assert len(manager.worker_pids) == 2
    await signs(manager)
    # The only session of its worker is spoilt, and there is none more to be had than it gives back.
    rig.faults.set(
        Fault("C_Sign", times=1, returns=0x21),
        Fault("C_OpenSession", times=1, returns=0xB1, instead=True),
    )
    with pytest.raises(SpireHwError, match="DATA_LEN_RANGE"):
        await manager.sign_data("a", DIGEST, SHA256)
    await signs(manager)


@pytest.mark.asyncio
async def test_fault_77_without_any_session_the_token_is_unavailable(rig: TokenRig) -> None:
    rig.faults.set(Fault("C_OpenSession", returns=0xB1, instead=True))
    before = children()
    with pytest.raises(SpireHwError, match="no session left") as caught:
        await rig.start(start_timeout="2s")
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert rig.faults.calls("C_Login") == 0
    assert children() == before


@pytest.mark.asyncio
async def test_fault_78_a_module_is_initialised_once_in_a_process_and_never_unloaded(
    rig: TokenRig,
) -> None:
    manager = await rig.start(probe_interval="1s")
    await manager.generate_key("a", P256)
    rig.faults.set(Fault("C_Sign", times=3, returns=0x30))
    seen = set(manager.worker_pids)
    async with asyncio.timeout(30):
        while True:
            seen |= set(manager.worker_pids)
            try:
                await signs(manager)
                break
            except SpireHwError:
                await asyncio.sleep(0.02)
    seen |= set(manager.worker_pids)
    assert len(seen) >= 3
    assert all(rig.faults.calls("C_Initialize", pid) == 1 for pid in seen)
    ended = seen - set(manager.worker_pids)
    assert all(rig.faults.calls("C_Finalize", pid) == 0 for pid in ended)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
@pytest.mark.asyncio
async def test_fault_79_workers_that_are_killed_cost_no_signature_and_leave_nothing(
    rig: TokenRig, how: signal.Signals
) -> None:
    manager = await rig.start(workers=2)
    await manager.generate_key("a", P256)
    await signs(manager)
    before, logins = len(children()), rig.faults.calls("C_Login")
    open_before = descriptors()
    calls = [asyncio.ensure_future(manager.sign_data("a", DIGEST, SHA256)) for _ in range(100)]  # noqa: TID251
    await asyncio.sleep(0)
    os.kill(manager.worker_pids[1], how)
    assert all(made.signature for made in await asyncio.gather(*calls))
    async with asyncio.timeout(30):
        while len(manager.worker_pids) < 3:  # noqa: ASYNC110 - a process starts
            await asyncio.sleep(0.05)
    assert rig.faults.calls("C_Login") == logins + 1
    # Many signatures at once start the process that verifies.
    assert len(children()) <= before + 2
    assert descriptors() <= open_before + 2 * 2


@pytest.mark.asyncio
async def test_fault_80_a_new_pin_and_other_workers_take_over_without_a_gap(rig: TokenRig) -> None:
    manager = await rig.start()
    info = await manager.generate_key("a", P256)
    old = set(manager.worker_pids)
    stop = asyncio.Event()

    async def sign() -> int:
        count = 0
        while not stop.is_set():
            made = await manager.sign_data("a", DIGEST, SHA256)
            assert made.fingerprint == info.fingerprint
            count += 1
        return count

    async with asyncio.TaskGroup() as group:
        signing = [group.create_task(sign()) for _ in range(4)]
        for workers in (2, 1):
            await manager.configure(rig.config(workers=workers))
        stop.set()
    assert all(task.result() for task in signing)
    assert not old & set(manager.worker_pids)
    assert not any(psutil.pid_exists(pid) for pid in old)


@pytest.mark.asyncio
async def test_fault_81_closing_with_a_full_queue_ends_in_time_and_settles_everybody(
    rig: TokenRig,
) -> None:
    before = children()
    manager = await rig.start(workers=2)
    await manager.generate_key("a", P256)
    rig.faults.set(Fault("C_Sign", sleep_s=0.5))
    calls = [asyncio.ensure_future(manager.sign_data("a", DIGEST, SHA256)) for _ in range(60)]  # noqa: TID251
    await asyncio.sleep(0.2)
    async with asyncio.timeout(25):
        await manager.close()
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [r for r in results if isinstance(r, BaseException)]
    assert 1 <= len(refused) < len(results)
    for error in refused:
        assert isinstance(error, SpireHwError)
        assert error.kind is ErrorKind.UNAVAILABLE
    assert children() == before


@pytest.mark.asyncio
async def test_the_pin_is_in_no_process_that_can_be_seen_and_leaves_no_core(
    rig: TokenRig,
) -> None:
    manager = await rig.start(workers=2)
    await manager.generate_key("a", P256)
    await asyncio.gather(*(manager.sign_data("a", DIGEST, SHA256) for _ in range(100)))
    pids = children()
    assert pids >= set(manager.worker_pids)
    for pid in pids:
        process = psutil.Process(pid)
        assert PIN not in " ".join(process.cmdline())
        assert PIN not in str(process.environ())
    for pid in manager.worker_pids:
        assert psutil.Process(pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
    victim = manager.worker_pids[1]
    os.kill(victim, signal.SIGSEGV)
    async with asyncio.timeout(30):
        while psutil.pid_exists(victim):  # noqa: ASYNC110 - a process ends
            await asyncio.sleep(0.02)
    assert not cores()

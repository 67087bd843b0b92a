"""A TPM without resource manager that others use too: full, locked, busy with a second process."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.config.hcl import parse
from spire_hw.errors import ErrorKind, UnavailableError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.tpm import keys
from spire_hw.tpm.connection import Hierarchy
from spire_hw.tpm.device import TpmDevice
from spire_hw.tpm.errors import Rc, TpmError
from spire_hw.tpm.storage import StorageKey
from spire_hw_plugins.keymanager.tpm import TpmKeyManager, build
from spire_hw_sim.tpm_bus import Seen, TpmBus, refusal
from spire_hw_sim.tpm_command import OWNER
from tests.integration.tpm.leaks import loaded, nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.plugin.info import HostInfo
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = HashAlgorithm.SHA256.digest(b"data")
CREATE_PRIMARY, SIGN, SESSION, TEST_PARMS = 0x131, 0x15D, 0x176, 0x18A

# A second program of ours at the same TPM: makes a key, signs, tells how often.
_OTHER = """
import asyncio, sys
from pathlib import Path
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import parse
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager.tpm import build

async def main() -> None:
    tcti, folder, rounds = sys.argv[1:]
    host = HostInfo(
        Side.AGENT, TrustDomain.parse("example.org"), Path(folder), get_logger("o"), SystemClock()
    )
    manager = build(host)
    await manager.configure(parse(f'tcti = "{tcti}"\\nsession = "salted"'))
    await manager.generate_key("other", KeyType.EC_P256)
    for _ in range(int(rounds)):
        await manager.sign_data("other", bytes(32), SignOptions(HashAlgorithm.SHA256))
        print("signed", flush=True)
    await manager.close()

asyncio.run(main())
"""


@pytest_asyncio.fixture
async def device(tpm: Swtpm) -> AsyncIterator[TpmDevice]:
    device = TpmDevice(tpm.tcti)
    yield device
    await device.close()


async def make(device: TpmDevice) -> keys.KeyBlob:
    blob, _ = await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256))
    return blob


async def test_slots_that_others_give_back_are_waited_for(device: TpmDevice, tpm: Swtpm) -> None:
    held = [tpm.commands.create_primary(OWNER, StorageKey.ECC.value)[0] for _ in range(3)]
    gone = threading.Timer(0.3, lambda: [tpm.commands.flush(handle) for handle in held])
    gone.start()
    try:
        assert await make(device)
    finally:
        gone.join()
    assert loaded(tpm) == []


async def test_session_slots_that_others_give_back_are_waited_for(tpm: Swtpm) -> None:
    with TpmBus(tpm) as bus:
        device = TpmDevice(bus.tcti)
        left = 3

        def full(seen: Seen) -> bytes | None:
            nonlocal left
            if seen.code != SESSION or not left:
                return None
            left -= 1
            return refusal(Rc.SESSION_MEMORY)

        bus.on_command = full
        with nothing_left_behind(tpm):
            blob, name = await device.run(
                "make key", lambda c: keys.create_key(c, KeyType.EC_P256, salted=True)
            )
            use = keys.KeyUse(name, salted=True)
            await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, SHA256, use))
        assert left == 0
        await device.close()


async def test_a_tpm_that_stays_full_of_sessions_is_given_up_and_left_as_it_is(
    tpm: Swtpm,
) -> None:
    with TpmBus(tpm) as bus:
        device = TpmDevice(bus.tcti)
        bus.on_command = lambda seen: refusal(Rc.SESSION_MEMORY) if seen.code == SESSION else None
        with (
            nothing_left_behind(tpm),
            pytest.raises(TpmError, match="no free slot for a session") as caught,
        ):
            await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256, salted=True))
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        await device.close()


async def test_two_processes_share_one_tpm(
    agent_host: HostInfo, tpm: Swtpm, tmp_path: Path
) -> None:
    manager = build(agent_host)
    await manager.configure(parse(f'tcti = "{tpm.tcti}"\nsession = "salted"'))
    await manager.generate_key("mine", KeyType.EC_P256)
    folder = tmp_path / "other"
    folder.mkdir()
    rounds = 25
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _OTHER, tpm.tcti, str(folder), str(rounds)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert other.stdout is not None
    assert await other.stdout.readline() == b"signed\n"
    count = 0
    async with asyncio.TaskGroup() as group:
        done = group.create_task(other.communicate())
        while not done.done():
            await manager.sign_data("mine", DIGEST, SHA256)
            count += 1
    out, err = done.result()
    assert other.returncode == 0, err.decode()
    assert out.count(b"signed") == rounds - 1
    assert count > 1
    await manager.close()
    assert loaded(tpm) == []


async def test_a_locked_tpm_is_told_and_keys_outside_the_lock_work_on(
    agent_host: HostInfo, tpm: Swtpm
) -> None:
    """Wrong passwords of another program lock the TPM; our keys are not under that protection."""
    manager = build(agent_host)
    await manager.configure(parse(f'tcti = "{tpm.tcti}"'))
    await manager.generate_key("A", KeyType.EC_P256)
    lock(tpm)
    with nothing_left_behind(tpm):
        await manager.sign_data("A", DIGEST, SHA256)
        await manager.generate_key("B", KeyType.EC_P256)
    await manager.close()


def lock(tpm: Swtpm) -> None:
    """Have the TPM count wrong passwords until it is locked."""
    commands = tpm.commands
    commands.set_dictionary_attack_limit(1)
    handle, _ = commands.create_primary(OWNER, StorageKey.ECC.value, b"right")
    key = commands.create_child(handle, b"right", b"child secret")
    commands.flush(handle)
    assert commands.sign_with_password(key, b"wrong") & 0xFF == 0x8E
    assert commands.sign_with_password(key, b"child secret") == Rc.LOCKOUT
    commands.flush(key)


@pytest.mark.parametrize("code", [Rc.LOCKOUT, 0x98E, 0x9A2])
async def test_a_refused_password_is_sent_once(tpm: Swtpm, code: int) -> None:
    with TpmBus(tpm) as bus:
        device = TpmDevice(bus.tcti)
        tpm.commands.set_password(OWNER, b"owner secret")
        device.set_password(Hierarchy.OWNER, b"wrong")
        if code != 0x9A2:
            bus.on_command = lambda s: refusal(code) if s.code == CREATE_PRIMARY else None
        with nothing_left_behind(tpm), pytest.raises(TpmError):
            await make(device)
        assert sum(seen.code == CREATE_PRIMARY for seen in bus.commands) == 1
        bus.on_command = lambda _: None
        if code != Rc.LOCKOUT:
            for _ in range(3):
                with (
                    nothing_left_behind(tpm),
                    pytest.raises(UnavailableError, match="is not sent again"),
                ):
                    await make(device)
            assert sum(seen.code == CREATE_PRIMARY for seen in bus.commands) == 1
        device.set_password(Hierarchy.OWNER, b"owner secret")
        assert await make(device)
        await device.close()


async def test_key_types_are_tested_and_a_tpm_that_cannot_answer_is_no_tpm_without_them(
    agent_host: HostInfo, tpm: Swtpm
) -> None:
    with TpmBus(tpm) as bus:
        manager: TpmKeyManager = build(agent_host)
        await manager.configure(parse(f'tcti = "{bus.tcti}"'))
        assert sum(seen.code == TEST_PARMS for seen in bus.commands) == len(KeyType)
        await manager.close()
        bus.on_command = lambda s: refusal(Rc.FAILURE) if s.code == TEST_PARMS else None
        with pytest.raises(TpmError, match="failure mode"):
            await manager.configure(parse(f'tcti = "{bus.tcti}"'))

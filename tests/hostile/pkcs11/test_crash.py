"""kill -9 at any moment: no stray worker, and one complete, signing pair for each key."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from spire_hw.key import HashAlgorithm, SignOptions
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig, settled

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
ROUNDS = 12
HOST = """
import asyncio, json, sys
from pathlib import Path
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.key import KeyType
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager import pkcs11
async def main():
    folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
    manager = pkcs11.build(HostInfo(side=Side.SERVER, trust_domain=TrustDomain.parse("example.org"),
        data_dir=folder, log=get_logger("host"), clock=SystemClock()))
    await manager.configure(Body.from_dict(config))
    print(json.dumps(manager.worker_pids), flush=True)
    while True:
        made = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
        print("made", made.fingerprint, flush=True)
        for kept in (await manager.retained_keys())[-1:]:
            made = await manager.restore_key("x509-CA-A", kept.generation)
            print("made", made.fingerprint, flush=True)
        for kept in (await manager.retained_keys())[:-3]:
            await manager.destroy_retained("x509-CA-A", kept.generation)
asyncio.run(main())
"""


def start_host(rig: TokenRig, **changes: str) -> tuple[subprocess.Popen[str], list[int]]:
    data = rig.folder / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    config = {
        "module_path": rig.hsm.module,
        "token_label": "spire",
        "pin_file": str(rig.pin_file),
        "key_identifier_value": "server-1",
        "environment": rig.hsm.environment,
        "generations_per_day": 0,
        **changes,
    }
    complaints = rig.folder / "stderr"
    with complaints.open("w") as errors:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", HOST, str(data), json.dumps(config)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    line = ""
    while not line.startswith("["):
        line = process.stdout.readline()
        assert line, f"host did not start: {complaints.read_text()}"
    return process, json.loads(line)


def until_made(process: subprocess.Popen[str]) -> None:
    """Return once a host has told of a key."""
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("made "):
        assert line, "host died"


def alive_after(pids: list[int], timeout_s: float) -> list[psutil.Process]:
    """Return which processes still run after a while; one that only waits to be reaped does not."""
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, timeout_s)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.asyncio
async def test_faults_60_to_62_kill_at_random_moments_leaves_one_signing_pair(
    rig: TokenRig,
) -> None:
    moments = random.Random(7)  # noqa: S311 - moments, not secrets
    for number in range(ROUNDS):
        process, workers = await asyncio.to_thread(start_host, rig)
        if number == 0:
            await asyncio.to_thread(until_made, process)
        await asyncio.sleep(moments.uniform(0.005, 0.2))
        process.kill()
        await asyncio.to_thread(process.wait)
        assert process.stdout is not None
        process.stdout.close()
        assert await asyncio.to_thread(alive_after, workers, 30) == []
    manager = await rig.start()
    (key,) = await manager.get_public_keys()
    made = await manager.sign_data(key.key_id, bytes(32), SignOptions(HashAlgorithm.SHA256))
    assert made.fingerprint == key.fingerprint
    await settled(manager)
    prefix = Owner("example.org", "server-1").prefix
    shown = rig.meddle(
        "from collections import Counter\n"
        "ids = Counter(o[Attribute.ID] for o in find(CLASS=PRIVATE) + find(CLASS=PUBLIC)\n"
        f"    if o[Attribute.LABEL].startswith({prefix!r}))\n"
        "print(sum(n == 2 for n in ids.values()), len(ids), len(find(CLASS=DATA)))"
    )
    complete, everything, manifests = map(int, shown.split())
    assert complete == 1
    assert everything <= 1 + ROUNDS
    assert manifests == 1


@pytest.mark.slow
@pytest.mark.asyncio
async def test_kill_at_random_moments_of_a_restore_leaves_the_old_or_the_new_current(
    rig: TokenRig,
) -> None:
    moments = random.Random(11)  # noqa: S311 - moments, not secrets
    told = ""
    for _ in range(ROUNDS // 2):
        process, workers = await asyncio.to_thread(start_host, rig, retain_replaced="26h")
        await asyncio.sleep(moments.uniform(0.05, 0.5))
        process.kill()
        output, _ = await asyncio.to_thread(process.communicate)
        assert await asyncio.to_thread(alive_after, workers, 30) == []
        manager = await rig.start(retain_replaced="26h")
        keys = await manager.get_public_keys()
        kept = [one.info.fingerprint for one in await manager.retained_keys()]
        for key in keys:
            made = await manager.sign_data(key.key_id, bytes(32), SignOptions(HashAlgorithm.SHA256))
            assert made.fingerprint == key.fingerprint
        await manager.close()
        lines = [line for line in output.splitlines() if line.startswith("made ")]
        told = lines[-1].removeprefix("made ") if lines else told
        current = [key.fingerprint for key in keys]
        assert len(current) == (1 if told else len(current))
        # What was told last is current, or what was under way then: nothing that was told is lost.
        assert not told or told in [*current, *kept]
        assert not set(current) & set(kept)

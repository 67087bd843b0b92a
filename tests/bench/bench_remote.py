"""What it costs that the keys are on another host: remote against local pkcs11, and how many a second.

The signer is a process of its own with its audit log on the disk; both ends are on this machine, and
each has a SoftHSM token. Lines `name value`; the best of some rounds, for the machine does other
things too. CPU seconds for 1000 signatures are printed for both ends.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager.remote.manager import RemoteKeyManager
from spire_hw_sim.liarsigner import write_client
from spire_hw_sim.meter import tell
from spire_hw_sim.remoterig import SignerProcess
from spire_hw_sim.signer import SignerRig, client_policy
from spire_hw_sim.tokenrig import TokenRig

if TYPE_CHECKING:
    from spire_hw.plugin.keymanager import KeyManager

KEY_ID: Final = "JWT-Signer-A"
OPTIONS: Final = SignOptions(HashAlgorithm.SHA256)
DIGEST: Final = bytes(32)
ROUNDS: Final = 7
SEQUENTIAL: Final = 200
IN_FLIGHT: Final = 16
WINDOW_S: Final = 1.0


async def p50_ms(manager: KeyManager) -> float:
    """Return the median of one call after the other."""
    taken = []
    for _ in range(SEQUENTIAL):
        began = time.perf_counter()
        await manager.sign_data(KEY_ID, DIGEST, OPTIONS)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1000


async def per_second(manager: KeyManager) -> float:
    """Return signatures a second with several in flight."""
    end = time.perf_counter() + WINDOW_S
    made = 0

    async def sign() -> None:
        nonlocal made
        while time.perf_counter() < end:
            await manager.sign_data(KEY_ID, DIGEST, OPTIONS)
            made += 1

    began = time.perf_counter()
    await asyncio.gather(*(sign() for _ in range(IN_FLIGHT)))
    return made / (time.perf_counter() - began)


def cpu_s(*processes: psutil.Process) -> float:
    """Return the CPU seconds of some processes."""
    total = 0.0
    for one in processes:
        times = one.cpu_times()
        total += times.user + times.system
    return total


async def measure(folder: Path, signer: SignerProcess) -> None:
    """Print the figures."""
    files = write_client(signer.rig.authority, folder / "client")
    (folder / "data").mkdir(mode=0o700)
    host = HostInfo(
        side=Side.SERVER,
        trust_domain=TrustDomain.parse("example.org"),
        data_dir=folder / "data",
        log=get_logger("bench"),
        clock=SystemClock(),
    )
    remote = RemoteKeyManager(host)
    await remote.configure(Body.from_dict(files.config(signer.address)))
    await remote.generate_key(KEY_ID, KeyType.EC_P256)
    async with TokenRig(folder / "local") as tokens:
        local = await tokens.start()
        await local.generate_key(KEY_ID, KeyType.EC_P256)
        for manager in (local, remote):
            await p50_ms(manager)
        pairs = [(await p50_ms(local), await p50_ms(remote)) for _ in range(ROUNDS)]
        best_local, best_remote = (min(column) for column in zip(*pairs, strict=True))
        tell("local_sign_p50_ms", best_local)
        tell("remote_sign_p50_ms", best_remote)
        tell("remote_sign_added_p50_ms", best_remote - best_local)
    assert signer.runs is not None
    process = psutil.Process(signer.runs.pid)
    me, far = psutil.Process(), [process, *process.children(recursive=True)]
    rates = []
    for _ in range(ROUNDS):
        ours, theirs = cpu_s(me), cpu_s(*far)
        rate = await per_second(remote)
        ours, theirs = cpu_s(me) - ours, cpu_s(*far) - theirs
        rates.append((rate, ours / rate / WINDOW_S * 1000, theirs / rate / WINDOW_S * 1000))
    rate, ours, theirs = max(rates)
    tell("remote_sign_client_cpu_s", ours)
    tell("remote_sign_signer_cpu_s", theirs)
    tell("remote_sign_per_s", rate)
    await remote.close()


def main() -> None:
    """Run."""
    with tempfile.TemporaryDirectory(prefix="shb") as name:
        folder = Path(name)
        signer = SignerProcess(SignerRig(folder / "signer", policy=client_policy(raw="true")))
        signer.start()
        try:
            asyncio.run(measure(folder, signer))
        finally:
            signer.stop()


if __name__ == "__main__":
    main()

"""Print `softhsm_sign_vs_raw`: how much of a token's speed is left through the key manager.

Raw is a loop over python-pkcs11 in as many processes as the key manager has signing workers, by
default the one it has without configuration: the strictest way to count, since host and verifiers
are processes too. Both sign with the same P-256 key in turns; the ratio of the best rounds is
printed, nothing is asserted. A round of the key manager starts and ends with nothing under way, so it
has to be long: while it fills and drains, one core of two is idle. Where other things run too, the CPU
times of the processes, printed too, tell more than the rates, and so does the ratio that they allow on
two cores with nothing else to do, or on as many as there are processes: verifiers share what is to be
verified, so only the one worker and the host are bound to a core each. Raw is python-pkcs11 as anybody
starts it; our workers have glibc keep more freed memory, which is part of what they are: `--allocation`
gives raw the same.
Run as `python tests/bench/bench_pkcs11.py [workers...]` for other numbers of workers, and for the
other types of keys with `--all`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.log import get_logger
from spire_hw.pkcs11.pool.process import ALLOCATION
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager import pkcs11
from spire_hw_sim.meter import tell
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SECONDS = 0.5
ROUNDS = 24
WARM_UP = 12  # a second verifier starts only after some seconds
CALLERS = 128
CORES = 2
TYPES = (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048)
RAW = """
import sys, time, pkcs11
from pkcs11 import Attribute, Mechanism, ObjectClass
label, key_id, mechanism, data, seconds, pin = sys.argv[1:7]
token = pkcs11.lib(sys.argv[7]).get_token(token_label=label)
session = token.open(user_pin=pin)
wanted = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.ID: bytes.fromhex(key_id)}
key = next(iter(list(session.get_objects(wanted))))
data, mechanism = bytes.fromhex(data), Mechanism[mechanism]
key.sign(data, mechanism=mechanism)
print("ready", flush=True)
for _ in sys.stdin:
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < float(seconds):
        key.sign(data, mechanism=mechanism)
        count += 1
    print(count, time.perf_counter() - start, flush=True)
"""


@dataclass(slots=True)
class Cost:
    """What the rounds of one way to sign took.

    Attributes:
        best: highest rate of a round, per second.
        signed: signatures of all rounds.
        cpu_s: CPU seconds of all rounds.
    """

    best: float = 0.0
    signed: int = 0
    cpu_s: float = 0.0

    @property
    def each_us(self) -> float:
        """Return the CPU microseconds of one signature."""
        return self.cpu_s / self.signed * 1e6

    def add(self, signed: int, seconds: float) -> None:
        """Count a round."""
        self.best = max(self.best, signed / seconds)
        self.signed += signed

    @contextmanager
    def over(self, pids: Sequence[int]) -> Iterator[None]:
        """Count the CPU time of these processes while the context is open."""
        before = self._used_s(pids)
        yield
        self.cpu_s += self._used_s(pids) - before

    @staticmethod
    def _used_s(pids: Sequence[int]) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in pids]
        return sum(t.user + t.system for t in times)


class RawLoops:
    """Processes that sign with python-pkcs11 and nothing else when they are told to."""

    def __init__(
        self,
        hsm: SoftHsm,
        key_id: bytes,
        key_type: KeyType,
        processes: int,
        environment: Mapping[str, str],
    ) -> None:
        rsa = key_type is KeyType.RSA_2048
        prefix = "3031300d060960864801650304020105000420" if rsa else ""
        arguments = ["bench", key_id.hex(), "RSA_PKCS" if rsa else "ECDSA", prefix + "11" * 32]
        self._started: list[subprocess.Popen[str]] = []
        for _ in range(processes):
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", RAW, *arguments, str(SECONDS), "1234", hsm.module],
                env={**os.environ, **hsm.environment, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._started.append(process)
            # One after the other: SoftHSM shows no token to some of those that log in at once.
            if self._read(process) != "ready":
                raise SystemExit("raw loop did not start")

    @property
    def pids(self) -> list[int]:
        """Return the process ids."""
        return [process.pid for process in self._started]

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> str:
        return process.stdout.readline().rstrip("\n") if process.stdout is not None else ""

    def round(self) -> tuple[int, float]:
        """Return the signatures of one round and the seconds it took."""
        for process in self._started:
            if process.stdin is not None:
                process.stdin.write("go\n")
                process.stdin.flush()
        answers = [self._read(process).split() for process in self._started]
        rate = sum(int(count) / float(seconds) for count, seconds in answers)
        signed = sum(int(count) for count, _ in answers)
        return signed, signed / rate

    def close(self) -> None:
        """End the processes."""
        for process in self._started:
            process.communicate()


async def managed_round(manager: pkcs11.Pkcs11KeyManager, key_id: str) -> tuple[int, float]:
    """Return the signatures of one round through sign_data, with many callers, and its seconds."""
    options = SignOptions(HashAlgorithm.SHA256)
    stop = time.perf_counter() + SECONDS
    counts = [0] * CALLERS

    async def call(number: int) -> None:
        while time.perf_counter() < stop:
            await manager.sign_data(key_id, b"\x11" * 32, options)
            counts[number] += 1

    start = time.perf_counter()
    await asyncio.gather(*(call(n) for n in range(CALLERS)))
    return sum(counts), time.perf_counter() - start


def verifier_pids() -> list[int]:
    """Return the processes that verify what workers signed."""
    children = psutil.Process().children()
    return [child.pid for child in children if "spire_hw.pkcs11.pool.verifier" in child.cmdline()]


async def ratio(
    manager: pkcs11.Pkcs11KeyManager,
    hsm: SoftHsm,
    key_type: KeyType,
    workers: int,
    raw_environment: Mapping[str, str],
) -> float:
    """Make a key and return how the rates compare."""
    name = key_type.config_name
    await manager.generate_key(name, key_type)
    cka_id = bytes.fromhex((await manager.key_evidence(name)).attributes["CKA_ID"])
    loops = await asyncio.to_thread(RawLoops, hsm, cka_id, key_type, workers, raw_environment)
    raw, worker, verifier, host = Cost(), Cost(), Cost(), Cost()
    costs = (worker, verifier, host)
    try:
        for _ in range(WARM_UP):
            await managed_round(manager, name)
        for _ in range(ROUNDS):
            with raw.over(loops.pids):
                raw.add(*await asyncio.to_thread(loops.round))
            pids = manager.worker_pids
            with worker.over(pids), verifier.over(verifier_pids()), host.over([os.getpid()]):
                done = await managed_round(manager, name)
            for cost in costs:
                cost.add(*done)
    finally:
        await asyncio.to_thread(loops.close)
    raw_us, (sign_us, verify_us, host_us) = raw.each_us, [cost.each_us for cost in costs]
    busy = min(workers, CORES)
    slowest_us = max(sign_us / busy, host_us, (sign_us + verify_us + host_us) / CORES)
    # There is one verifier more than there are workers.
    apart_us = max(sign_us / workers, host_us, verify_us / (workers + 1))
    sys.stdout.write(
        f"{name} processes={workers} raw={raw.best:.0f}/s managed={worker.best:.0f}/s "
        f"ratio={worker.best / raw.best:.2f}; CPU time of a signature: raw {raw_us:.0f} us, "
        f"workers {sign_us:.0f} us, verifiers {verify_us:.0f} us, host {host_us:.0f} us; "
        f"ratio on {CORES} idle cores {raw_us / busy / slowest_us:.2f}, "
        f"on one for each process {raw_us / workers / apart_us:.2f}\n"
    )
    return worker.best / raw.best


async def measure(
    workers: int, folder: Path, key_types: Sequence[KeyType], raw_environment: Mapping[str, str]
) -> float:
    """Return the ratio for the first key type; print those of all."""
    hsm = SoftHsm(folder / "hsm")
    hsm.init_token("bench", pin="1234")
    pin = folder / "pin"
    pin.write_text("1234\n")
    pin.chmod(0o600)
    host = HostInfo(
        side=Side.SERVER,
        trust_domain=TrustDomain.parse("example.org"),
        data_dir=folder,
        log=get_logger("bench"),
        clock=SystemClock(),
    )
    manager = pkcs11.build(host)
    config = {
        "module_path": hsm.module,
        "token_label": "bench",
        "pin_file": str(pin),
        "key_identifier_value": "bench",
        "workers": workers,
        "environment": hsm.environment,
    }
    await manager.configure(Body.from_dict(config))
    try:
        ratios = [await ratio(manager, hsm, one, workers, raw_environment) for one in key_types]
    finally:
        await manager.close()
    return ratios[0]


def main() -> None:
    """Measure with the numbers of workers given; with the key manager's own number by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workers", type=int, nargs="*", default=[1])
    parser.add_argument("--all", action="store_true", help="all types of keys")
    parser.add_argument(
        "--allocation", action="store_true", help="raw has our workers' glibc settings"
    )
    arguments = parser.parse_args()
    raw_environment = ALLOCATION if arguments.allocation else {}
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory() as folder:
            types = TYPES if arguments.all else TYPES[:1]
            tell(
                "softhsm_sign_vs_raw",
                asyncio.run(measure(workers, Path(folder), types, raw_environment)),
            )


if __name__ == "__main__":
    main()

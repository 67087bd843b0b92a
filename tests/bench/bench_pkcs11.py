"""How much of a token's speed is left through the key manager: `softhsm_sign_vs_raw`.

Raw is a loop over python-pkcs11 in as many processes as the key manager has signing workers. Both
sign the same number of seconds; the ratio of the best rounds is printed, nothing is asserted.
Run as `python tests/bench/bench_pkcs11.py [workers...]`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager import pkcs11
from spire_hw_sim.softhsm import SoftHsm

SECONDS = 2.0
ROUNDS = 3
CALLERS = 128
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
sys.stdin.readline()
count, start = 0, time.perf_counter()
while time.perf_counter() - start < float(seconds):
    key.sign(data, mechanism=mechanism)
    count += 1
print(count / (time.perf_counter() - start), flush=True)
"""


def raw_rate(hsm: SoftHsm, key_id: bytes, key_type: KeyType, processes: int) -> float:
    """Signatures per second of plain loops."""
    rsa = key_type is KeyType.RSA_2048
    prefix = "3031300d060960864801650304020105000420" if rsa else ""
    arguments = ["bench", key_id.hex(), "RSA_PKCS" if rsa else "ECDSA", prefix + "11" * 32]
    started = []
    for _ in range(processes):
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", RAW, *arguments, str(SECONDS), "1234", hsm.module],
            env={**os.environ, **hsm.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit("raw loop did not start")
        started.append(process)
    for process in started:
        if process.stdin is not None:
            process.stdin.write("go\n")
            process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in started)


async def managed_rate(manager: pkcs11.Pkcs11KeyManager, key_id: str) -> float:
    """Signatures per second through sign_data with many callers."""
    options = SignOptions(HashAlgorithm.SHA256)
    stop = time.perf_counter() + SECONDS
    counts = [0] * CALLERS

    async def call(number: int) -> None:
        while time.perf_counter() < stop:
            await manager.sign_data(key_id, b"\x11" * 32, options)
            counts[number] += 1

    start = time.perf_counter()
    await asyncio.gather(*(call(n) for n in range(CALLERS)))
    return sum(counts) / (time.perf_counter() - start)


async def measure(workers: int, folder: Path) -> None:
    """Print the ratio for each key type."""
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
        for key_type in TYPES:
            name = key_type.config_name
            await manager.generate_key(name, key_type)
            cka_id = bytes.fromhex((await manager.key_evidence(name)).attributes["CKA_ID"])
            raw, managed = [], []
            for _ in range(ROUNDS):
                raw.append(await asyncio.to_thread(raw_rate, hsm, cka_id, key_type, workers))
                managed.append(await managed_rate(manager, name))
            sys.stdout.write(
                f"softhsm_sign_vs_raw {name} processes={workers} "
                f"raw={max(raw):.0f}/s managed={max(managed):.0f}/s "
                f"ratio={max(managed) / max(raw):.2f}\n"
            )
    finally:
        await manager.close()


def main() -> None:
    """Measure with the numbers of workers given, 1 and 2 by default."""
    for workers in [int(a) for a in sys.argv[1:]] or [1, 2]:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(measure(workers, Path(folder)))


if __name__ == "__main__":
    main()

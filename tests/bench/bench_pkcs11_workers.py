"""Print `softhsm_two_workers_vs_one`: what a second signing worker adds on two cores.

Two key managers, one with one signing worker and one with two, sign in turns with keys in one
SoftHSM token, RSA-2048 for the figure: the token's own work is what workers multiply, and there it is
nearly all the work. With ECDSA P-256, printed too, one worker leaves little to a second one on two
cores: a signature costs the token about 75 us and its verification 85 us, which processes of their
own do meanwhile, so that both cores are busy already. Rounds are much longer than what is under way
at their end takes: two workers do not finish the last batches at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from bench_pkcs11 import managed_round

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.key import KeyType
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager import pkcs11
from spire_hw_sim.meter import tell
from spire_hw_sim.softhsm import SoftHsm

ROUNDS = 16
WORKERS = (1, 2)


async def manager_of(hsm: SoftHsm, folder: Path, workers: int) -> pkcs11.Pkcs11KeyManager:
    """Return a key manager with keys of its own."""
    data = folder / str(workers)
    data.mkdir(mode=0o700)
    host = HostInfo(
        side=Side.SERVER,
        trust_domain=TrustDomain.parse("example.org"),
        data_dir=data,
        log=get_logger("bench"),
        clock=SystemClock(),
    )
    manager = pkcs11.build(host)
    config = {
        "module_path": hsm.module,
        "token_label": "bench",
        "pin_file": str(folder / "pin"),
        "key_identifier_value": f"bench-{workers}",
        "workers": workers,
        "environment": hsm.environment,
    }
    await manager.configure(Body.from_dict(config))
    return manager


async def measure(folder: Path, rounds: int) -> None:
    """Print the figure and the rates behind it."""
    hsm = SoftHsm(folder / "hsm")
    hsm.init_token("bench", pin="1234")
    pin = folder / "pin"
    pin.write_text("1234\n")
    pin.chmod(0o600)
    managers = {workers: await manager_of(hsm, folder, workers) for workers in WORKERS}
    ratios = {}
    try:
        for key_type in (KeyType.EC_P256, KeyType.RSA_2048):
            name = key_type.config_name
            best = dict.fromkeys(WORKERS, 0.0)
            for manager in managers.values():
                await manager.generate_key(name, key_type)
                await managed_round(manager, name)
            for _ in range(rounds):
                for workers, manager in managers.items():
                    signed, seconds = await managed_round(manager, name)
                    best[workers] = max(best[workers], signed / seconds)
            ratios[key_type] = best[2] / best[1]
            shown = ", ".join(f"{workers}: {rate:.0f}/s" for workers, rate in best.items())
            sys.stdout.write(f"{name} workers {shown}, ratio {ratios[key_type]:.2f}\n")
    finally:
        for manager in managers.values():
            await manager.close()
    tell("softhsm_two_workers_vs_one", ratios[KeyType.RSA_2048])


def main() -> None:
    """Measure in a token of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), arguments.rounds))


if __name__ == "__main__":
    main()

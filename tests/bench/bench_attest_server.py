"""How many `tpm` attestations one CPU second of a server checks.

Only `attest()` is counted (process time, the node's own work left out): envelope, endorsement
certificate chain, creation proof, credential, certify, quote, policy, selectors. Run it as a script.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from attestor import attestation_s, configured

from spire_hw.log import LogSettings, configure
from spire_hw_sim.softtpm import SoftTpm, make_ak, make_ek
from spire_hw_sim.tpmnode import TpmNode, Vendor

_ROUNDS = 300


async def _main() -> None:
    vendor = Vendor.make()
    with tempfile.TemporaryDirectory() as name:
        configure(LogSettings(file=Path(name) / "log"))
        server = await configured(Path(name), vendor)
        for ek, ak in (
            ("L-1", "secp256r1"),
            ("L-2", "secp256r1"),
            ("H-3", "secp256r1"),
            ("L-1", "rsa2048"),
        ):
            node = vendor.equip(TpmNode(SoftTpm(ek=make_ek(ek), ak=make_ak(ak))))
            cost = await attestation_s(server, node, _ROUNDS)
            sys.stdout.write(
                f"EK {ek}, AK {ak}: {1 / cost:.0f} per CPU second, {cost * 1e3:.2f} ms each\n"
            )


if __name__ == "__main__":
    asyncio.run(_main())

"""How many `tpm` attestations one CPU second of a server checks.

Only `attest()` is counted (process time, the node's own work left out): envelope, endorsement
certificate chain, creation proof, credential, certify, quote, policy, selectors. Run it as a script.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import parse
from spire_hw.log import LogSettings, configure, get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.nodeattestor import AttestationRequest
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.nodeattestor.tpm.server import TpmServer, build
from spire_hw_sim.softtpm import SoftTpm, make_ak, make_ek
from spire_hw_sim.tpmnode import TpmNode, Vendor

if TYPE_CHECKING:
    from spire_hw.spiffeid import SpiffeId

_ROUNDS = 300


async def _server(directory: Path, vendor: Vendor) -> TpmServer:
    (directory / "root.der").write_bytes(vendor.root.certificate)
    host = HostInfo(
        side=Side.SERVER,
        trust_domain=TrustDomain.parse("example.org"),
        data_dir=directory,
        log=get_logger("bench"),
        clock=SystemClock(),
    )
    server = build(host)
    settings = f'endorsement_ca_path = "{directory / "root.der"}"\nek_policy = "ca"\n'
    await server.configure(parse(settings))
    return server


async def _measure(server: TpmServer, node: TpmNode) -> float:
    """Return server-side CPU seconds per attestation."""
    theirs = 0.0

    async def challenge(message: bytes) -> bytes:
        nonlocal theirs
        start = time.process_time()
        answer = node.answer(message)
        theirs += time.process_time() - start
        return answer

    async def admit(_: SpiffeId) -> None:
        return None

    payload = node.payload()
    start = time.process_time()
    for _ in range(_ROUNDS):
        await server.attest(AttestationRequest(payload, challenge, node.spki, admit))
    return (time.process_time() - start - theirs) / _ROUNDS


async def _main() -> None:
    vendor = Vendor.make()
    with tempfile.TemporaryDirectory() as name:
        configure(LogSettings(file=Path(name) / "log"))
        server = await _server(Path(name), vendor)
        for ek, ak in (
            ("L-1", "secp256r1"),
            ("L-2", "secp256r1"),
            ("H-3", "secp256r1"),
            ("L-1", "rsa2048"),
        ):
            node = vendor.equip(TpmNode(SoftTpm(ek=make_ek(ek), ak=make_ak(ak))))
            cost = await _measure(server, node)
            sys.stdout.write(
                f"EK {ek}, AK {ak}: {1 / cost:.0f} per CPU second, {cost * 1e3:.2f} ms each\n"
            )


if __name__ == "__main__":
    asyncio.run(_main())

"""The server half of `tpm` in this process, and what an attestation costs it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import parse
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.nodeattestor import AttestationRequest
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.nodeattestor.tpm.server import TpmServer, build

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.spiffeid import SpiffeId
    from spire_hw_sim.tpmnode import TpmNode, Vendor


async def configured(directory: Path, vendor: Vendor, settings: str = "") -> TpmServer:
    """Return the server half; it trusts the vendor's CA."""
    (directory / "root.der").write_bytes(vendor.root.certificate)
    host = HostInfo(
        side=Side.SERVER,
        trust_domain=TrustDomain.parse("example.org"),
        data_dir=directory,
        log=get_logger("bench"),
        clock=SystemClock(),
    )
    made = build(host)
    roots = f'endorsement_ca_path = "{directory / "root.der"}"\nek_policy = "ca"\n'
    await made.configure(parse(roots + settings))
    return made


async def attestation_s(
    server: TpmServer, node: TpmNode, rounds: int, *, selector: str = "tier:quote"
) -> float:
    """Return CPU seconds of one attestation without the node's own work.

    Args:
        server: as `configured` made it.
        node: attests again and again.
        rounds: how often.
        selector: has to be among what every attestation gives.
    """
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
    for _ in range(rounds):
        found = await server.attest(AttestationRequest(payload, challenge, node.spki, admit))
        assert selector in found.selector_values
    return (time.process_time() - start - theirs) / rounds

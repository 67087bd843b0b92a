"""Print `attestation_cpu_ms` and `heartbeat_cpu_ms`: what checking one node costs a server.

Both run the server half of `tpm` in this process; only its own work counts. A full attestation is
envelope, endorsement certificate with an intermediate, credential, key certification, quote of the
PCRs that are quoted by default, and a boot log of 200 kB and 537 events, which is unpacked, parsed,
replayed and turned into facts. What it costs to quote PCR 8 as well, so that each of GRUB's 500
commands is held against its digest, is told beside it. A heartbeat is one quote of 15 PCRs by a
known attestation key. The best of many rounds is printed.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from attestor import attestation_s, configured

from spire_hw.clock import SystemClock
from spire_hw.log import LogSettings, configure
from spire_hw.posture.evidence import EkFacts
from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatChallenge, KnownNode, SignedQuote
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.tpm.verify import qualifier
from spire_hw.tpm.wire import PcrSelection
from spire_hw_sim.firmware import Firmware
from spire_hw_sim.softtpm import SoftTpm, make_ek
from spire_hw_sim.tpmnode import TpmNode, Vendor

if TYPE_CHECKING:
    from spire_hw_plugins.nodeattestor.tpm.server import TpmServer

ROUNDS = 60
ATTESTATIONS = 8
HEARTBEATS = 50
LOG_BYTES = 200_000
PCRS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15)
DEFAULTS = "boot_log = true\n"
ALL = f"{DEFAULTS}pcrs = {{ sha256 = [{', '.join(map(str, PCRS))}] }}\n"


def machine() -> tuple[dict[tuple[str, int], bytes], bytes]:
    """Return the PCRs after a boot and its log, which is of the size that is asked for."""
    least = len(Firmware(commands=0).boot().log())
    commands, text = 500, 24
    text += (
        LOG_BYTES - len(Firmware(commands=commands, command_bytes=text).boot().log())
    ) // commands
    boot = Firmware(commands=commands, command_bytes=max(text, 24)).boot()
    log = boot.log()
    sys.stdout.write(f"boot log: {len(log)} bytes, {least} of them without GRUB's commands\n")
    return boot.pcrs("sha256"), log


async def attestation_ms(made: TpmServer, node: TpmNode) -> float:
    """Return CPU milliseconds of one attestation."""
    return 1000 * await attestation_s(made, node, ATTESTATIONS, selector="secureboot:on")


async def heartbeat_ms(made: TpmServer, node: TpmNode) -> float:
    """Return CPU milliseconds of one heartbeat."""
    spki = hashlib.sha256(node.spki or b"").digest()
    known = KnownNode(
        EkFacts(node.ek_hash, ("ca",)), node.tpm.ak.public, "endorsement", spki, key_in_tpm=True
    )
    asked, clock = PcrSelection("sha256", PCRS), SystemClock()
    beats = []
    for _ in range(HEARTBEATS):
        challenge = HeartbeatChallenge(
            secrets.token_bytes(32), EvidenceRequest(pcrs=(("sha256", PCRS),))
        )
        bound = qualifier("heartbeat", challenge.nonce, spki, b"", node.tpm.ak.name)
        quote = SignedQuote(*node.tpm.quote((asked,), bound), node.tpm.pcr_values(asked))
        beats.append((challenge, HeartbeatAnswer((quote,))))
    start = time.process_time()
    for challenge, answer in beats:
        await made.check_heartbeat(known, challenge, answer, clock.now())
    return (time.process_time() - start) / HEARTBEATS * 1000


async def measure() -> None:
    """Print both figures."""
    vendor = Vendor.make()
    with tempfile.TemporaryDirectory() as name:
        configure(LogSettings(file=Path(name) / "log"))
        made = await configured(Path(name), vendor, DEFAULTS)
        strict = await configured(Path(name), vendor, ALL)
        pcrs, log = machine()
        node = vendor.equip(TpmNode(SoftTpm(ek=make_ek("L-1"), pcrs=pcrs)))
        node.boot_log = log
        whole = [await attestation_ms(made, node) for _ in range(ROUNDS)]
        more = [await attestation_ms(strict, node) for _ in range(ROUNDS)]
        beats = [await heartbeat_ms(made, node) for _ in range(ROUNDS)]
    sys.stdout.write("attestations, by round: " + " ".join(f"{ms:.2f}" for ms in whole) + "\n")
    sys.stdout.write("heartbeats, by round: " + " ".join(f"{ms:.3f}" for ms in beats) + "\n")
    sys.stdout.write(f"with GRUB's commands: {min(more):.2f} ms\n")
    sys.stdout.write(f"attestation_cpu_ms {min(whole):.3f}\n")
    sys.stdout.write(f"heartbeat_cpu_ms {min(beats):.4f}\n")


if __name__ == "__main__":
    asyncio.run(measure())

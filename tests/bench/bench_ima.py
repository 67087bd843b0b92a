"""What a list of 10,000 measured files costs a server: replayed and held against an allow-list.

Only CPU time counts, the best of many rounds. Beside it, for comparison: the same in the binary form,
and a boot log of 194 kB from compressed bytes to facts. Run it as a script.
"""

from __future__ import annotations

import sys
import time
import zlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from spire_hw.posture.evaluate import evaluate
from spire_hw.posture.evidence import EkFacts, Evidence, Occasion, Tier
from spire_hw.posture.policyfile import parse_policy
from spire_hw.tpm import boot, eventlog, ima, imalist
from spire_hw.tpm.inflate import inflate
from spire_hw_plugins.nodeattestor.tpm import machine
from spire_hw_sim.firmware import PROFILES
from spire_hw_sim.imawriter import ImaList

if TYPE_CHECKING:
    from collections.abc import Callable

_ENTRIES = 10_000
_ROUNDS = 40
_BANK = "sha256"
_QUOTED = (*range(8), 11, 12, 14)


def _best_ms(job: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.process_time()
        job()
        best = min(best, time.process_time() - start)
    return best * 1000


def _main() -> None:
    start = PROFILES["clean"].boot()
    prefix = "/usr/lib/x86_64-linux-gnu/some/package/library-"
    listed = ImaList.start(start.values(_BANK)).files(_ENTRIES - 1, prefix=prefix)
    pcrs = start.pcrs(_BANK) | {(_BANK, 10): listed.pcr(_BANK)}
    allowed = b"".join(i.digest.hex().encode() + b"  " + i.path + b"\n" for i in listed.items[1:])
    policy = parse_policy(
        'policy "bench" {\n version = 1\n ima { allow = ["@list"] }\n}', read=lambda _: allowed
    )
    evidence = Evidence(
        made_at=datetime(2026, 1, 1, tzinfo=UTC),
        occasion=Occasion.ATTESTATION,
        tier=Tier.QUOTE,
        ek=EkFacts("0" * 64, ("hash",)),
        ak_public=b"",
        key_in_tpm=True,
        pcrs=pcrs,
    )

    def check(*parts: bytes) -> None:
        facts = ima.replay(parts, None, pcrs, _BANK)
        verdict = evaluate(policy, replace(evidence, ima=facts))
        if not verdict.holds:
            raise SystemExit(f"the list was refused: {verdict.checks}")

    text = list(machine.ImaList(listed.ascii()).parts(0, imalist.PART_BYTES))
    sys.stdout.write(f"ima_10k_ms {_best_ms(lambda: check(*text)):.1f}\n")
    half = _ENTRIES // 2
    binary = listed.binary()[: -len(listed.binary(half))], listed.binary(half)
    sys.stdout.write(f"ima_10k_binary_ms {_best_ms(lambda: check(*binary)):.1f}\n")
    replayed = _best_ms(lambda: ima.replay(text, None, pcrs, _BANK))
    sys.stdout.write(f"ima_10k_replay_ms {replayed:.1f}\n")

    grub = PROFILES["grub"].boot()
    packed = zlib.compress(grub.log())
    quoted = {(_BANK, n): value for n, value in grub.values(_BANK).items() if n in _QUOTED}

    def read() -> None:
        log = eventlog.parse(inflate(packed, eventlog.MAX_BYTES, "log"))
        boot.facts(log, quoted, _BANK)

    sys.stdout.write(f"boot_log_ms {_best_ms(read):.2f}\n")


if __name__ == "__main__":
    _main()

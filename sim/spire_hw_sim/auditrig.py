"""Audit logs for tests: one with everything in it, its files as lines, what a verification says."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Final

from spire_hw.clock import SystemClock
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key
from spire_hw.log import get_logger
from spire_hw_signer.audit.checkpoint import Checkpoints
from spire_hw_signer.audit.folder import file_names
from spire_hw_signer.audit.log import AuditLog, AuditSettings, Intent, Outcome, Refused
from spire_hw_signer.audit.seal import verify_directory
from spire_hw_signer.audit.verify import Report, Verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from spire_hw.clock import Clock
    from spire_hw.key import PublicKey
    from spire_hw_signer.audit.places import Place
    from spire_hw_signer.audit.start import Found
    from spire_hw_signer.audit.verify import Witness

MAX_BYTES: Final = 1 << 20


def intent(number: int = 0, key_id: str = "x509-CA-A") -> Intent:
    """Return what a client is about to have done."""
    return Intent(
        client="spiffe://infra.example/spire-server-1",
        cert_hash="a" * 64,
        peer="192.0.2.7:4711",
        method="Sign",
        request_id=f"{number:032x}",
        key_id=key_id,
        generation=3,
        fingerprint="b" * 64,
        hash_alg="sha256",
        digest_sha256=f"{number:064x}",
        policy_hash="c" * 64,
    )


def make_log(
    directory: Path,
    *,
    max_bytes: int = MAX_BYTES,
    clock: Clock | None = None,
    boot: str | None = None,
) -> AuditLog:
    """Return a log that is not open yet."""
    settings = AuditSettings(directory, max_bytes=max_bytes)
    return AuditLog(settings, clock=clock or SystemClock(), log=get_logger("audit"), boot=boot)


def make_key() -> SoftwareSigner:
    """Return a log key."""
    return SoftwareSigner(generate_private_key(KeyType.EC_P256))


def make_checkpoints(
    log: AuditLog,
    found: Found,
    key: SoftwareSigner,
    *,
    places: Sequence[Place] = (),
    clock: Clock | None = None,
) -> Checkpoints:
    """Return the checkpoints of an open log; they are not started."""
    return Checkpoints(
        log, found, key, places=places, clock=clock or SystemClock(), log=get_logger("audit")
    )


async def sign_some(log: AuditLog, count: int) -> None:
    """Have so many things done, and one refused."""
    for number in range(count):
        (seq,) = await log.intend([intent(number)])
        log.conclude([Outcome(seq, "done", latency_s=0.001)])
    log.refuse([Refused(intent(key_id="other"), "key_id", 3)])


async def write_whole(
    directory: Path, key: SoftwareSigner, *, rounds: int = 3, max_bytes: int = MAX_BYTES
) -> None:
    """Write a log with checkpoints, as a signer that is started and stopped some times does."""
    for _ in range(rounds):
        log = make_log(directory, max_bytes=max_bytes)
        checkpoints = make_checkpoints(log, await log.open(), key)
        await checkpoints.start()
        log.note("policy_loaded", {"policy": "d" * 64})
        await sign_some(log, 3)
        await checkpoints.close()
        await log.close()


async def until(holds: Callable[[], object]) -> None:
    """Wait until something holds, some seconds at most."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - it happens on a disk
            await asyncio.sleep(0.01)


def read_all(directory: Path) -> list[bytes]:
    """Return all lines of a log with their line feeds."""
    return [
        line
        for name in file_names(directory)
        for line in (directory / name).read_bytes().splitlines(keepends=True)
    ]


def verify(
    directory: Path,
    key: PublicKey | None = None,
    witnesses: Iterable[Witness] = (),
    copies: Iterable[Mapping[str, Any]] = (),
) -> Report:
    """Return what the verification tool says."""
    return verify_directory(directory, Verifier(key, witnesses, copies)).finish()


def codes(report: Report) -> set[str]:
    """Return the codes of its findings."""
    return {finding.code for finding in report.findings}


async def _write_for_ever(directory: Path) -> None:
    """Write until this process is killed; a line on standard output says that it is under way."""
    log = make_log(directory, max_bytes=64 * 1024)
    await log.open()
    number = 0
    while True:
        seqs = await log.intend([intent(number + n) for n in range(8)])
        log.conclude([Outcome(seq, "done") for seq in seqs[:-1]])
        log.conclude([Outcome(seqs[-1], "failed", "for a change")])
        number += len(seqs)
        sys.stdout.write(f"{log.head}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    from pathlib import Path

    asyncio.run(_write_for_ever(Path(sys.argv[1])))

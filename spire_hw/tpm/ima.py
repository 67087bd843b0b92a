"""Read the kernel's list of measured files and replay it into PCR 10.

Spec: Linux kernel, security/integrity/ima (templates, violations, boot aggregate).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from spire_hw.posture.evidence import ImaFacts, ImaState, PcrValues

PCR: Final = 10
MAX_BYTES: Final = 8 * 1024 * 1024
MAX_ENTRIES: Final = 100_000
MAX_LINE: Final = 8192


def replay(
    data: bytes,
    start: ImaState | None,
    pcrs: PcrValues,
    bank: str,
    *,
    logged: PcrValues | None = None,
    known: ImaState | None = None,
    allow_padded_sha1: bool = False,
) -> ImaFacts:
    """Replay a list, or the part of it after `start`, up to the quoted PCR 10.

    Entries after the one that reaches the quoted value are ignored: the list grows after a quote.

    Args:
        data: `ascii_runtime_measurements` (or its per-bank siblings) or
            `binary_runtime_measurements` (little-endian); whole entries.
        start: where the part begins; None for a list from the first entry.
        pcrs: verified values; PCR 10 of `bank` must be among them, and PCR 0 to 7 when `start` is
            None.
        bank: which PCR 10.
        logged: replayed values of a verified boot log, for the PCRs of the boot aggregate that were
            not quoted or have moved on since.
        known: an earlier state of the same boot that the list must pass through.
        allow_padded_sha1: accept kernels before 5.8, which extend SHA-1 into larger banks.

    Raises:
        AttestationError: codes `ima_hash`, `ima_replay`, `boot_aggregate`, and denied
            `ima_rollback`, `ima_padded_sha1`.
        InvalidInputError: a line or record is malformed.
        LimitError: more than `MAX_BYTES` or `MAX_ENTRIES`, or a line over `MAX_LINE`.
    """
    raise NotImplementedError

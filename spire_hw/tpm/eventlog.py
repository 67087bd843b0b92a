"""Read a TCG boot log and replay it into PCR values.

Nothing here says what a log means: that is `boot` and `secureboot`. Types and data of events are
claims; only what replays to a quoted PCR is authentic, and of that only PCR number and digest.

Spec: TCG EFI Protocol Specification, 5; PC Client Platform Firmware Profile, 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

MAX_BYTES: Final = 512 * 1024
MAX_EVENTS: Final = 4096


class Event(NamedTuple):
    """One measurement.

    Attributes:
        pcr: PCR number.
        type: TCG event type.
        digests: one per bank of the log, in the order of `Log.banks`.
        data: what firmware says it measured.
    """

    pcr: int
    type: int
    digests: tuple[bytes, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Log:
    """A boot log that parsed.

    Attributes:
        sha256: lower-case hex SHA-256 of the bytes.
        banks: hash names it holds digests for, those we know.
        events: without the header; numbered from 1 in messages.
        locality: where PCR 0 starts, 0 unless a StartupLocality event says otherwise.
        legacy: SHA-1 alone, without a header.
    """

    sha256: str
    banks: tuple[str, ...]
    events: tuple[Event, ...]
    locality: int
    legacy: bool


def parse(raw: bytes, *, allow_legacy: bool = False) -> Log:
    """Read a whole log.

    Args:
        raw: the kernel's `binary_bios_measurements`.
        allow_legacy: take the old format that holds SHA-1 alone.

    Raises:
        AttestationError: `log_missing`: there are no bytes.
        InvalidInputError: malformed, or the old format while it is not allowed.
        LimitError: more than `MAX_BYTES` or `MAX_EVENTS`.
    """
    raise NotImplementedError


def replay(log: Log, bank: str) -> dict[int, bytes]:
    """Return the value of each of the 24 PCRs after the log.

    Raises:
        InvalidInputError: the log has no digests of this bank.
    """
    raise NotImplementedError

"""What a boot log proves about a machine, once it replays to quoted PCR values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from spire_hw.posture.evidence import BootFacts, PcrValues
    from spire_hw.tpm.eventlog import Log


@dataclass(frozen=True, slots=True)
class BootRules:
    """Where a policy may tolerate what is refused by default.

    Attributes:
        empty_secure_boot: the SecureBoot variable may be empty, which reads as off.
        early_authority: an image may have been authorised before PCR 7's separator (option ROMs).
    """

    empty_secure_boot: bool = False
    early_authority: bool = False


STRICT: Final = BootRules()


def facts(log: Log, pcrs: PcrValues, bank: str, rules: BootRules = STRICT) -> BootFacts:
    """Replay a log and return what the quoted PCRs vouch for.

    Every quoted PCR of 0 to 7 must come out as quoted; others are explained or not.

    Args:
        log: from `eventlog.parse`.
        pcrs: verified values; other banks than `bank` are not looked at.
        bank: which digests to use.
        rules: what to tolerate.

    Raises:
        AttestationError: codes `log_replay`, `log_event_digest`, `log_type`, `log_order`,
            `secureboot_ambiguous`.
        InvalidInputError: the bank is not in the log, or an event does not parse.
    """
    raise NotImplementedError

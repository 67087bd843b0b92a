"""What a token refuses to do with which key: told in the log, and remembered while it goes on.

Faults that cost a worker are told where workers are watched; the rest would otherwise be known to
the callers alone. Calls that fail are counted by whoever takes them, see `spire_hw.plugin.keycalls`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.logsample import Sampler
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.remedies import SIGN

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.errors import SpireHwError
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.entry import Entry

_STANDING_AFTER: Final = 5
_EVERY_S: Final = 60.0
# What a key's own attributes say: no return code comes with it.
_OF_KEY: Final = frozenset({"hsm.key_not_permitted", "hsm.key_ambiguous"})


class Refusals:
    """Lines about refusals, one a minute for each key, step and code; and keys that only refuse.

    Attributes:
        standing: by CKA_ID, how many signatures in a row were refused, and the last error. Whoever
            has a signature of a key takes it out.
    """

    def __init__(self, clock: Clock, log: Logger) -> None:
        self._lines = Sampler(clock, burst=1, period_s=_EVERY_S)
        self._log = log
        self.standing: dict[bytes, tuple[int, TokenError]] = {}

    def tell(self, key_id: str, step: str, error: SpireHwError, **fields: object) -> None:
        """Log an error under its stable code.

        Args:
            key_id: which key was to be used or made.
            step: what was to be done with it.
            error: what came of it.
            fields: what else is known of the key.
        """
        reason = error.reason if isinstance(error, TokenError) else "hsm.generation_refused"
        left_out = self._lines.admit((key_id, step, reason))
        if left_out is not None:
            self._log.error(
                reason, key_id=key_id, step=step, error=error.message, left_out=left_out, **fields
            )

    def add(self, entry: Entry, error: TokenError) -> None:
        """Note, and log, that a signature failed though the token's workers are well."""
        if error.operation == SIGN and (error.code or error.reason in _OF_KEY):
            times, _ = self.standing.get(entry.cka_id, (0, error))
            self.standing[entry.cka_id] = times + 1, error
        self.tell(entry.key_id, SIGN, error, fp=entry.fingerprint)

    def of(self, entry: Entry) -> TokenError | None:
        """Return what a key answers whenever it is to sign; None when it is not known to."""
        times, error = self.standing.get(entry.cka_id, (0, None))
        return error if times >= _STANDING_AFTER else None

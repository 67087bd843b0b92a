"""Witnesses a signer's audit log: its head never goes back and never changes (pure).

A head is what the log ended with when an answer was made. Calls overlap, so an answer may carry an
older head than one that came before it; it may not carry one that is older than what was known when
its call was sent.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

HASH_BYTES: Final = 32
_REMEMBERED: Final = 1024


@dataclass(frozen=True, slots=True)
class LogHead:
    """The end of an audit log.

    Attributes:
        seq: number of the last record, 1 for the first.
        hash: its chain value.
    """

    seq: int
    hash: bytes


class Witness:
    """What was seen of one log."""

    def __init__(self, head: LogHead | None = None) -> None:
        """Go on from the newest head of an earlier run."""
        self.head = head
        self._hashes = OrderedDict(() if head is None else [(head.seq, head.hash)])
        self._vouched = 0  # number of the record that the newest checkpoint was for

    @property
    def floor(self) -> int:
        """Return the number that answers to calls sent now cannot be below."""
        return 0 if self.head is None else self.head.seq

    def saw(self, head: LogHead, floor: int) -> str:
        """Take note of a head.

        Args:
            head: as it came with an answer.
            floor: `floor` at the time when the call was sent.

        Returns:
            "", or what speaks against the log; then the note stays as it is.
        """
        if head.seq < 1 or len(head.hash) != HASH_BYTES:
            return f"head {head.seq} is malformed"
        if head.seq < floor:
            return f"head went back from record {floor} to {head.seq}"
        known = self._hashes.setdefault(head.seq, head.hash)
        if known != head.hash:
            return f"record {head.seq} is another one than before"
        if self.head is None or head.seq > self.head.seq:
            self.head = head
        while len(self._hashes) > _REMEMBERED:
            self._hashes.popitem(last=False)
        return ""

    def saw_checkpoint(self, vouched: LogHead | None, head: LogHead) -> str:
        """Take note of the last checkpoint, whose signature holds.

        Args:
            vouched: the record it is for, None when the signer shows none.
            head: as it came in the same answer.

        Returns:
            As `saw`.
        """
        if vouched is None:
            return "it shows no checkpoint any more" if self._vouched else ""
        if vouched.seq > head.seq:
            return f"its checkpoint is for record {vouched.seq}, it has {head.seq}"
        if vouched.seq < self._vouched:
            return f"its checkpoint went back from record {self._vouched} to {vouched.seq}"
        if self._hashes.get(vouched.seq, vouched.hash) != vouched.hash:
            return f"its checkpoint is for another record {vouched.seq} than was seen"
        self._vouched = vouched.seq
        return ""

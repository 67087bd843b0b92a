"""Does a device's log go on where it was left?

A log whose own entries do not hold together is not taken at all. One that holds together but does
not go on where it was left is taken as it is, with a fault: a device that was reset or replaced has
a log all the same.

This module is pure: values in, values or a DeviceLogError out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from spire_hw_signer.devicelog.entries import DeviceLogError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from spire_hw_signer.devicelog.entries import Dump, Entry, Mark

GAP: Final = "gap"
BACK: Final = "back"
OTHER: Final = "other"
CHAIN: Final = "chain"
UNLOGGED: Final = "unlogged"
FULL: Final = "full"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something about a log that somebody has to look at.

    Attributes:
        reason: stable word.
        text: the same in words.
    """

    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class News:
    """What is new in a log.

    Attributes:
        entries: in their order.
        faults: what is wrong with it, in words.
    """

    entries: Sequence[Entry]
    faults: Sequence[Fault]


def compare(dump: Dump, known: Mark | None, unlogged: Mapping[str, int], capacity: int) -> News:
    """Return what was not taken before.

    Args:
        dump: the log as it is now.
        known: the entry that was taken last, None for none.
        unlogged: what the counters of unlogged events were.
        capacity: how many entries the device holds.

    Raises:
        DeviceLogError: the entries do not hold together.
    """
    faults = _inner(dump.entries)
    entries: Sequence[Entry] = dump.entries
    if known is not None and entries:
        entries, joint = _join(entries, known)
        faults += joint
    faults += _unlogged(dump.unlogged, unlogged)
    if len(entries) >= capacity:
        text = f"the device's log was full: {len(entries)} entries came since it was read last"
        faults.append(Fault(FULL, text))
    return News(entries, faults)


def _inner(entries: Sequence[Entry]) -> list[Fault]:
    gaps: list[Fault] = []
    for before, entry in pairwise(entries):
        steps = entry.steps_from(before.number)
        if steps < 1:
            text = f"entry {entry.number} follows {before.number}"
            raise DeviceLogError(CHAIN, f"the device's log is not in order: {text}")
        if not entry.is_linked(before.digest):
            text = f"entry {entry.number} (digest {entry.digest.hex()}) does not follow"
            text += f" {before.number} (digest {before.digest.hex()})"
            raise DeviceLogError(CHAIN, f"the chain of the device's log is broken: {text}")
        if steps > 1:
            gaps.append(_gap(before.number, entry.number, steps))
    if len(gaps) > 1:
        return [Fault(GAP, f"{gaps[0].text}; {len(gaps) - 1} such gaps follow")]
    return gaps


def _join(entries: Sequence[Entry], known: Mark) -> tuple[Sequence[Entry], list[Fault]]:
    for at, entry in enumerate(entries):
        if entry.number != known.number:
            continue
        if entry.digest == known.digest:
            return entries[at + 1 :], []
        text = f"its entry {known.number} is not the one that was read before"
        return entries, [
            Fault(OTHER, f"this is the log of another device, or it was rewritten: {text}")
        ]
    first = entries[0]
    steps = first.steps_from(known.number)
    if steps < 1:
        text = f"it has entries {first.number} to {entries[-1].number}, {known.number} was read"
        return entries, [Fault(BACK, f"the device's log went back: {text} before")]
    if steps > 1:
        return entries, [_gap(known.number, first.number, steps)]
    if not first.is_linked(known.digest):
        text = f"entry {first.number} does not follow {known.number} as it was read before"
        return entries, [Fault(CHAIN, f"the chain of the device's log is broken: {text}")]
    return entries, []


def _gap(before: int, after: int, steps: int) -> Fault:
    text = f"{steps - 1} entries of the device's log are missing, between {before} and {after}"
    return Fault(GAP, text)


def _unlogged(now: Mapping[str, int], before: Mapping[str, int]) -> Iterator[Fault]:
    for kind, count in now.items():
        # Whether a device counts on or anew after it was asked, more than none is told once.
        if count and count != before.get(kind, 0):
            yield Fault(UNLOGGED, f"the device had no room to log {count} {kind}")

"""Which authority signs, which one waits, and when that changes: a pure state machine.

One `Slots` value stands for one kind of authority (X.509 or JWT). It has two slots, A and B, each
with its own key id in the KeyManager. One slot is current and signs; the other is empty, holds the
prepared successor, or holds the predecessor whose slot is reused at the next preparation. Every
step makes a new value; storing it before use is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError

if TYPE_CHECKING:
    from collections.abc import Iterable


class SlotName(Enum):
    """The two slots; the value is the suffix of the key id and the journal's slot id."""

    A = "A"
    B = "B"

    @property
    def other(self) -> SlotName:
        """Return the slot that is not this one."""
        return SlotName.B if self is SlotName.A else SlotName.A


class Status(Enum):
    """What an authority is; the value is upstream's number in the journal."""

    PREPARED = 2
    ACTIVE = 3
    OLD = 4


class Step(Enum):
    """What is due for one kind of authority."""

    REST = "rest"
    PREPARE = "prepare"
    ACTIVATE = "activate"
    PREPARE_AND_ACTIVATE = "prepare and activate"


class Record(Protocol):
    """What the state machine needs to know of an authority."""

    @property
    def slot(self) -> SlotName:
        """Return the slot that holds its key."""
        ...

    @property
    def authority_id(self) -> str:
        """Return its name in bundles and on the LocalAuthority API."""
        ...

    @property
    def issued_at(self) -> datetime:
        """Return when it was prepared."""
        ...

    @property
    def not_after(self) -> datetime:
        """Return when it ends."""
        ...

    @property
    def status(self) -> Status:
        """Return what it is now."""
        ...

    def with_status(self, status: Status) -> Self:
        """Return the same authority with another status."""
        ...


R = TypeVar("R", bound=Record)

_PREPARE_CAP = timedelta(days=30)
_ACTIVATE_CAP = timedelta(days=7)
_PROPAGATION_CAP = timedelta(minutes=1)


def preparation_due(record: Record) -> datetime:
    """Return when the successor must be prepared: half of the life left, at most 30 days."""
    life = record.not_after - record.issued_at
    return record.not_after - min(life / 2, _PREPARE_CAP)


def activation_due(record: Record) -> datetime:
    """Return when the successor must take over: a sixth of the life left, at most 7 days."""
    life = record.not_after - record.issued_at
    return record.not_after - min(life / 6, _ACTIVATE_CAP)


def propagation(record: Record) -> timedelta:
    """Return how long a successor is published before it signs: a minute, less in a short life."""
    return min((record.not_after - record.issued_at) / 12, _PROPAGATION_CAP)


@dataclass(frozen=True, slots=True)
class Slots(Generic[R]):
    """Both slots of one kind of authority.

    Attributes:
        active: the authority that signs; None before the first activation.
        next: what the other slot holds, PREPARED or OLD; None when it is empty.
    """

    active: R | None = None
    next: R | None = None

    def __post_init__(self) -> None:
        if self.active is not None and self.active.status is not Status.ACTIVE:
            raise SpireHwError(f"active authority has status {self.active.status.name}")
        if self.next is None:
            return
        if self.next.status is Status.ACTIVE:
            raise SpireHwError("two authorities are active")
        if self.active is not None and self.next.slot is self.active.slot:
            raise SpireHwError(f"two authorities share slot {self.next.slot.value}")

    @classmethod
    def restore(cls, records: Iterable[R]) -> Slots[R]:
        """Rebuild from journal records that are usable (key present, not expired).

        The last record of a slot counts, as later ones replace earlier ones. Of several active
        ones, which no orderly history holds, the youngest signs.
        """
        latest: dict[SlotName, R] = {}
        for record in records:
            held = latest.get(record.slot)
            if held is None or record.issued_at >= held.issued_at:
                latest[record.slot] = record
        actives = [r for r in latest.values() if r.status is Status.ACTIVE]
        active = max(actives, key=lambda r: r.issued_at, default=None)
        rest = [r for r in latest.values() if r is not active]
        other = max(rest, key=lambda r: r.issued_at, default=None)
        if other is not None and other.status is Status.ACTIVE:
            other = other.with_status(Status.OLD)
        return cls(active, other)

    @property
    def prepared(self) -> R | None:
        """Return the successor that waits, if there is one."""
        if self.next is not None and self.next.status is Status.PREPARED:
            return self.next
        return None

    @property
    def old(self) -> R | None:
        """Return the predecessor, as long as its slot was not reused."""
        if self.next is not None and self.next.status is Status.OLD:
            return self.next
        return None

    @property
    def free_slot(self) -> SlotName:
        """Return the slot that the next preparation uses; never the one that signs."""
        if self.active is not None:
            return self.active.slot.other
        return SlotName.A if self.next is None else self.next.slot

    def due(self, now: datetime) -> Step:
        """Tell what has to be done at this time.

        A prepared authority waits until verifiers had time to hear of it, unless the active one
        would end before.
        """
        waiting = self.prepared
        if waiting is not None and now >= waiting.not_after:
            waiting = None
        if self.active is None or now >= self.active.not_after:
            return Step.ACTIVATE if waiting is not None else Step.PREPARE_AND_ACTIVATE
        in_a_hurry = self.active.not_after - now <= propagation(self.active)
        if waiting is None:
            if now < preparation_due(self.active):
                return Step.REST
            return Step.PREPARE_AND_ACTIVATE if in_a_hurry else Step.PREPARE
        heard = now >= waiting.issued_at + propagation(self.active)
        due = now >= activation_due(self.active) and (heard or in_a_hurry)
        return Step.ACTIVATE if due else Step.REST

    def prepare(self, record: R) -> Slots[R]:
        """Put a new authority into the free slot.

        Raises:
            SpireHwError: the record is not PREPARED or not made for the free slot.
        """
        if record.status is not Status.PREPARED or record.slot is not self.free_slot:
            raise SpireHwError(
                f"authority {record.authority_id} is {record.status.name} in slot "
                f"{record.slot.value}; a prepared one for slot {self.free_slot.value} is needed"
            )
        return replace(self, next=record)

    def activate(self, authority_id: str | None = None) -> Slots[R]:
        """Let the prepared authority sign; the active one becomes OLD.

        Args:
            authority_id: the one that is meant, None for whichever is prepared.

        Raises:
            NotReadyError: nothing is prepared.
            InvalidInputError: another one is prepared.
        """
        prepared = self.prepared
        if prepared is None:
            raise NotReadyError("no authority is prepared")
        if authority_id is not None and prepared.authority_id != authority_id:
            raise InvalidInputError(f"authority {authority_id} is not the prepared one")
        old = None if self.active is None else self.active.with_status(Status.OLD)
        return Slots(prepared.with_status(Status.ACTIVE), old)

    def records(self) -> tuple[R, ...]:
        """Return what the slots hold, oldest first."""
        held = [r for r in (self.active, self.next) if r is not None]
        return tuple(sorted(held, key=lambda r: r.issued_at))

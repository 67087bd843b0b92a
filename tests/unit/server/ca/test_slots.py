from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError
from spire_hw_server.ca.journal import JwtRecord
from spire_hw_server.ca.slots import (
    SlotName,
    Slots,
    Status,
    Step,
    activation_due,
    preparation_due,
    propagation,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def record(
    name: str,
    slot: SlotName,
    status: Status = Status.PREPARED,
    issued_at: datetime = START,
    ttl: timedelta = DAY,
) -> JwtRecord:
    return JwtRecord(slot, name, issued_at, issued_at + ttl, status, b"key " + name.encode())


def test_thresholds_are_half_and_sixth_of_a_short_life() -> None:
    short = record("x", SlotName.A)
    assert preparation_due(short) == START + timedelta(hours=12)
    assert activation_due(short) == START + timedelta(hours=20)
    assert propagation(short) == timedelta(minutes=1)


def test_thresholds_are_capped_for_a_long_life() -> None:
    long = record("x", SlotName.A, ttl=timedelta(days=365))
    assert preparation_due(long) == long.not_after - timedelta(days=30)
    assert activation_due(long) == long.not_after - timedelta(days=7)


def test_nothing_there_means_prepare_and_activate() -> None:
    empty: Slots[JwtRecord] = Slots()
    assert empty.due(START) is Step.PREPARE_AND_ACTIVATE
    assert empty.free_slot is SlotName.A


def test_a_life_runs_through_all_steps() -> None:
    empty: Slots[JwtRecord] = Slots()
    slots = empty.prepare(record("one", SlotName.A))
    assert slots.due(START) is Step.ACTIVATE
    slots = slots.activate()
    assert slots.due(START + timedelta(hours=11)) is Step.REST
    assert slots.due(START + timedelta(hours=12)) is Step.PREPARE
    second = record("two", SlotName.B, issued_at=START + timedelta(hours=12))
    slots = slots.prepare(second)
    assert slots.due(START + timedelta(hours=13)) is Step.REST
    assert slots.due(START + timedelta(hours=20)) is Step.ACTIVATE
    slots = slots.activate("two")
    assert slots.active is not None
    assert slots.active.authority_id == "two"
    assert slots.old is not None
    assert slots.old.authority_id == "one"
    assert slots.prepared is None
    assert slots.free_slot is SlotName.A


def test_a_late_successor_is_published_before_it_signs() -> None:
    active = record("one", SlotName.A, Status.ACTIVE)
    late = START + timedelta(hours=21)
    slots = Slots(active)
    assert slots.due(late) is Step.PREPARE
    slots = slots.prepare(record("two", SlotName.B, issued_at=late))
    assert slots.due(late) is Step.REST
    assert slots.due(late + timedelta(minutes=1)) is Step.ACTIVATE


def test_a_successor_does_not_wait_past_the_end_of_the_active_one() -> None:
    active = record("one", SlotName.A, Status.ACTIVE)
    last = START + DAY - timedelta(seconds=30)
    assert Slots(active).due(last) is Step.PREPARE_AND_ACTIVATE
    waiting = record("two", SlotName.B, issued_at=last)
    assert Slots(active, waiting).due(last) is Step.ACTIVATE


def test_an_expired_successor_is_prepared_anew() -> None:
    active = record("one", SlotName.A, Status.ACTIVE)
    expired = record("two", SlotName.B, ttl=timedelta(hours=1))
    assert Slots(active, expired).due(START + timedelta(hours=13)) is Step.PREPARE
    assert Slots(active, expired).due(START + 2 * DAY) is Step.PREPARE_AND_ACTIVATE


def test_prepare_refuses_the_slot_that_signs() -> None:
    slots = Slots(record("one", SlotName.A, Status.ACTIVE))
    with pytest.raises(SpireHwError, match="slot A"):
        slots.prepare(record("two", SlotName.A))


def test_prepare_refuses_what_is_not_prepared() -> None:
    empty: Slots[JwtRecord] = Slots()
    with pytest.raises(SpireHwError, match="ACTIVE"):
        empty.prepare(record("one", SlotName.A, Status.ACTIVE))


def test_activate_needs_something_prepared() -> None:
    slots = Slots(record("one", SlotName.A, Status.ACTIVE))
    with pytest.raises(NotReadyError):
        slots.activate()


def test_activate_refuses_another_name() -> None:
    slots = Slots(record("one", SlotName.A, Status.ACTIVE), record("two", SlotName.B))
    with pytest.raises(InvalidInputError):
        slots.activate("three")


def test_two_in_one_slot_are_refused() -> None:
    with pytest.raises(SpireHwError, match="share"):
        Slots(record("one", SlotName.A, Status.ACTIVE), record("two", SlotName.A))
    with pytest.raises(SpireHwError, match="two authorities are active"):
        Slots(None, record("two", SlotName.A, Status.ACTIVE))
    with pytest.raises(SpireHwError, match="status"):
        Slots(record("one", SlotName.A, Status.OLD))


def test_restore_takes_the_latest_of_each_slot() -> None:
    later = START + timedelta(hours=1)
    slots = Slots.restore(
        [
            record("a1", SlotName.A, Status.OLD),
            record("b1", SlotName.B, Status.ACTIVE),
            record("a2", SlotName.A, Status.PREPARED, later),
        ]
    )
    assert slots.active is not None
    assert slots.active.authority_id == "b1"
    assert slots.prepared is not None
    assert slots.prepared.authority_id == "a2"
    assert [r.authority_id for r in slots.records()] == ["b1", "a2"]


def test_restore_lets_the_youngest_of_two_active_ones_sign() -> None:
    later = START + timedelta(hours=1)
    slots = Slots.restore(
        [record("a", SlotName.A, Status.ACTIVE), record("b", SlotName.B, Status.ACTIVE, later)]
    )
    assert slots.active is not None
    assert slots.active.authority_id == "b"
    assert slots.old is not None
    assert slots.old.authority_id == "a"


def test_restore_of_a_lone_successor_uses_its_slot() -> None:
    slots = Slots.restore([record("b", SlotName.B)])
    assert slots.active is None
    assert slots.due(START) is Step.ACTIVATE
    assert slots.free_slot is SlotName.B


class SlotsMachine(RuleBasedStateMachine):
    """Any order of steps, times and restarts keeps the promises of the slots."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: Slots[JwtRecord] = Slots()
        self.now = START
        self.count = 0
        self.signed_by: list[str] = []
        self.published: dict[str, datetime] = {}

    @rule(minutes=st.integers(0, 3 * 24 * 60))
    def time_passes(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)

    @rule(hours=st.integers(1, 24 * 90))
    def prepare(self, hours: int) -> None:
        self.count += 1
        made = record(
            f"n{self.count}",
            self.slots.free_slot,
            issued_at=self.now,
            ttl=timedelta(hours=hours),
        )
        self.published[made.authority_id] = self.now
        self.slots = self.slots.prepare(made)

    @rule()
    def activate(self) -> None:
        if self.slots.prepared is None:
            return
        before = self.slots.active
        prepared = self.slots.prepared
        self.slots = self.slots.activate()
        assert self.slots.active is not None
        assert self.slots.active.authority_id == prepared.authority_id
        assert self.slots.old == (None if before is None else before.with_status(Status.OLD))
        self.signed_by.append(prepared.authority_id)

    @rule()
    def follow_what_is_due(self) -> None:
        step = self.slots.due(self.now)
        if step in {Step.PREPARE, Step.PREPARE_AND_ACTIVATE}:
            self.prepare(24)
        if step in {Step.ACTIVATE, Step.PREPARE_AND_ACTIVATE}:
            self.activate()
        if step in {Step.ACTIVATE, Step.PREPARE_AND_ACTIVATE}:
            assert self.slots.active is not None
            assert self.slots.active.not_after > self.now

    @rule()
    def restart(self) -> None:
        before = self.slots
        self.slots = Slots.restore(before.records())
        assert self.slots == before

    @invariant()
    def one_signs_at_most_and_slots_differ(self) -> None:
        held = [r for r in (self.slots.active, self.slots.next) if r is not None]
        assert len({r.slot for r in held}) == len(held)
        assert sum(r.status is Status.ACTIVE for r in held) == (self.slots.active is not None)

    @invariant()
    def the_free_slot_never_signs(self) -> None:
        if self.slots.active is not None:
            assert self.slots.free_slot is not self.slots.active.slot

    @invariant()
    def nothing_signed_before_it_was_published(self) -> None:
        assert all(name in self.published for name in self.signed_by)


TestSlotsMachine = SlotsMachine.TestCase
TestSlotsMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

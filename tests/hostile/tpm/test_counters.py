"""Counters, clocks and PCRs that do not fit a node's past."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from spire_hw.posture.drift import DriftRules, compare
from spire_hw.posture.evidence import Counters, EkFacts, Evidence, Occasion, Tier
from spire_hw.posture.memory import Memory, advance
from spire_hw.posture.verdict import Action, Check

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
PCRS = {("sha256", n): bytes([n + 1]) * 32 for n in range(16)}
COUNTERS = Counters(clock_ms=50_000, reset_count=7, restart_count=1, safe=True, firmware_version=9)
RULES = DriftRules()


def evidence(after_s: float = 0, pcrs: Any = None, **changes: Any) -> Evidence:
    """Return evidence of the machine `after_s` seconds after the first."""
    counted = {
        name: changes.pop(name)
        for name in ("clock_ms", "reset_count", "restart_count", "safe", "firmware_version")
        if name in changes
    }
    counters = replace(
        COUNTERS, **({"clock_ms": COUNTERS.clock_ms + round(after_s * 1000)} | counted)
    )
    given: dict[str, Any] = {
        "made_at": NOW + timedelta(seconds=after_s),
        "occasion": Occasion.HEARTBEAT,
        "tier": Tier.QUOTE,
        "ek": EkFacts("aa" * 32, ("ca",)),
        "ak_public": b"AK",
        "counters": counters,
        "pcrs": PCRS | (pcrs or {}),
        "boot_id": "one",
    }
    return Evidence(**(given | changes))


def remembered(*shown: Evidence) -> Memory:
    memory = advance(None, evidence())
    for one in shown:
        memory = advance(memory, one)
    return memory


def failed(memory: Memory, shown: Evidence, rules: DriftRules = RULES) -> list[tuple[str, Action]]:
    return [(c.code, c.action) for c in compare(memory, shown, rules) if not c.holds]


def found(memory: Memory, shown: Evidence) -> Check:
    (check,) = (c for c in compare(memory, shown, RULES) if not c.holds)
    return check


def test_the_same_machine_some_time_later_passes() -> None:
    assert failed(remembered(), evidence(60)) == []
    assert failed(remembered(), evidence(60, restart_count=2)) == []
    assert failed(remembered(), evidence(60, reset_count=8, clock_ms=9, boot_id="two")) == []


def test_lower_reset_count_is_another_tpm() -> None:
    check = found(remembered(), evidence(60, reset_count=6))
    assert (check.code, check.action) == ("tpm_replaced", Action.BAN)
    assert check.message == "counters: TPM was cleared or replaced"


def test_lower_restart_count_is_refused() -> None:
    check = found(remembered(), evidence(60, restart_count=0))
    assert (check.code, check.action) == ("counter_rollback", Action.REFUSE)


def test_clock_going_back_is_refused_when_both_readings_are_safe() -> None:
    back = evidence(60, clock_ms=49_999)
    check = found(remembered(), back)
    assert (check.code, check.action) == ("clock_rollback", Action.REFUSE)
    assert failed(remembered(), evidence(60, clock_ms=49_999, safe=False)) == []
    assert failed(remembered(evidence(safe=False)), back) == []


@pytest.mark.parametrize("gap_s", [0, 1, 7.9])
def test_reset_sooner_than_a_machine_boots_is_a_reset_of_the_tpm_alone(gap_s: float) -> None:
    check = found(remembered(), evidence(gap_s, reset_count=8, clock_ms=0, boot_id="two"))
    assert (check.code, check.action) == ("tpm_reset_without_reboot", Action.QUARANTINE)


def test_reset_under_a_kernel_that_runs_on_is_a_reset_of_the_tpm_alone() -> None:
    check = found(remembered(), evidence(3600, reset_count=8, clock_ms=0))
    assert check.code == "tpm_reset_without_reboot"


def test_reset_without_a_boot_is_not_forgotten_by_waiting() -> None:
    held = replace(remembered(), held_reset=8)
    later = evidence(3600, reset_count=8, clock_ms=0, boot_id="two")
    assert failed(held, later) == [("tpm_reset_without_reboot", Action.QUARANTINE)]
    assert failed(held, evidence(3600, reset_count=9, clock_ms=0, boot_id="two")) == []


@pytest.mark.parametrize("number", [*range(8), 12, 13, 14])
def test_pcr_that_changes_while_the_machine_runs(number: int) -> None:
    check = found(remembered(), evidence(60, {("sha256", number): b"x" * 32}))
    assert (check.code, check.action) == ("pcr_changed_without_reset", Action.BAN)
    assert check.message == f"counters: PCR {number} changed without a reset"


@pytest.mark.parametrize("number", [8, 9, 10, 15])
def test_pcr_that_a_running_machine_may_extend(number: int) -> None:
    assert failed(remembered(), evidence(60, {("sha256", number): b"x" * 32})) == []


def test_pcr_11_may_go_through_the_phases_of_a_boot_only() -> None:
    def extended(value: bytes, phase: str) -> bytes:
        return hashlib.sha256(value + hashlib.sha256(phase.encode()).digest()).digest()

    before = PCRS["sha256", 11]
    ready = extended(extended(before, "sysinit"), "ready")
    assert failed(remembered(), evidence(60, {("sha256", 11): ready})) == []
    other = extended(before, "evil")
    assert failed(remembered(), evidence(60, {("sha256", 11): other})) == [
        ("pcr_changed_without_reset", Action.BAN)
    ]


def test_pcrs_that_are_lost_on_resume() -> None:
    zeroed = {("sha256", n): bytes(32) for n in range(8)}
    check = found(remembered(), evidence(60, zeroed, restart_count=2))
    assert (check.code, check.action) == ("pcr_lost", Action.QUARANTINE)
    one = found(remembered(), evidence(60, {("sha256", 0): bytes(32)}, restart_count=2))
    assert one.code == "pcr_lost"


def test_pcr_that_changes_over_a_resume_is_no_loss() -> None:
    shown = evidence(60, {("sha256", 4): b"x" * 32}, restart_count=2)
    assert failed(remembered(), shown) == [("pcr_changed_without_reset", Action.BAN)]


def test_counters_may_not_be_hidden_once_they_were_shown() -> None:
    hidden = evidence(60, counters=None)
    check = found(remembered(), hidden)
    assert (check.code, check.action) == ("counters_hidden", Action.REFUSE)


def test_counters_are_not_hidden_behind_a_new_attestation_key() -> None:
    check = found(remembered(), evidence(60, counters=None, ak_public=b"other"))
    assert (check.code, check.action) == ("ak_changed", Action.REFUSE)


def test_fallback_from_quotes_to_activation_is_refused() -> None:
    shown = evidence(60, {}, tier=Tier.ACTIVATION)
    assert ("downgrade", Action.REFUSE) in failed(remembered(), shown)


def test_another_endorsement_key_under_the_same_identity_is_refused() -> None:
    shown = evidence(60, ek=EkFacts("bb" * 32, ("ca",)))
    assert failed(remembered(), shown) == [("duplicate_id", Action.REFUSE)]


def test_tpm_firmware_changes_with_the_policys_leave_only() -> None:
    shown = evidence(60, reset_count=8, boot_id="two", firmware_version=10)
    assert failed(remembered(), shown) == [("tpm_firmware", Action.QUARANTINE)]
    assert failed(remembered(), shown, DriftRules(firmware_by_policy=True)) == []


def test_two_machines_that_take_turns_with_one_tpm_are_told() -> None:
    memory = remembered(evidence(60, reset_count=9, clock_ms=5, boot_id="two"))
    check = found(memory, evidence(90))
    assert (check.code, check.action) == ("cloned_tpm", Action.QUARANTINE)


def test_two_machines_under_the_same_counters_are_told() -> None:
    behind = evidence(60, clock_ms=40_000, boot_id="two")
    assert failed(remembered(), behind) == [("cloned_tpm", Action.QUARANTINE)]
    ahead = remembered(evidence(60, clock_ms=200_000, boot_id="two"))
    assert failed(ahead, evidence(90, clock_ms=300_000)) == [("cloned_tpm", Action.QUARANTINE)]


def test_an_old_state_of_the_tpm_is_not_taken_for_a_second_machine() -> None:
    memory = remembered(
        evidence(30, clock_ms=80_000), evidence(60, reset_count=9, clock_ms=5, boot_id="two")
    )
    assert failed(memory, evidence(90, clock_ms=60_000)) == [("tpm_replaced", Action.BAN)]


def test_operator_decides_what_a_reason_does() -> None:
    rules = DriftRules(actions={"tpm_replaced": Action.QUARANTINE})
    assert failed(remembered(), evidence(60, reset_count=6), rules) == [
        ("tpm_replaced", Action.QUARANTINE)
    ]


def test_after_an_operators_release_the_machine_is_taken_as_it_is() -> None:
    memory = replace(remembered(), lenient=True)
    assert failed(memory, evidence(1, reset_count=3, clock_ms=1)) == []
    assert failed(memory, evidence(1, ek=EkFacts("bb" * 32, ("ca",)))) != []

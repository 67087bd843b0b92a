"""How evidence differs from what the same node showed before, and what that means.

A node's TPM counts its restarts and ticks on; its PCRs stand still while it runs. What does not fit
is told by a reason code; what a code does is data (`reasons`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from spire_hw.posture.evidence import Tier
from spire_hw.posture.memory import is_same_boot
from spire_hw.posture.phases import passed
from spire_hw.posture.reasons import action_of
from spire_hw.posture.verdict import Check

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from spire_hw.posture.evidence import Counters, Evidence
    from spire_hw.posture.memory import Memory
    from spire_hw.posture.verdict import Action

# PCRs that stand still from the hand-over to the system until the next reset.
_BOOT_PCRS: Final = frozenset(range(8))
_STILL_PCRS: Final = _BOOT_PCRS | frozenset({12, 13, 14})
_PHASE_PCR: Final = 11


@dataclass(frozen=True, slots=True)
class DriftRules:
    """What an operator set.

    Attributes:
        min_boot_time: a machine does not boot in less.
        actions: what differs from `reasons.DEFAULT_ACTIONS`, by reason code.
        firmware_by_policy: the policy says which TPM firmware is good, so it may change.
    """

    min_boot_time: timedelta = timedelta(seconds=8)
    actions: Mapping[str, Action] = field(default_factory=dict)
    firmware_by_policy: bool = False


def compare(memory: Memory | None, evidence: Evidence, rules: DriftRules) -> tuple[Check, ...]:
    """Return one check per thing that was compared.

    Args:
        memory: of the node, None when it shows itself for the first time.
        evidence: what it shows now.
        rules: the operator's.

    Source: reference for TPM attestation, sections 5.3 and 9.4.
    """
    found = _Comparison(rules)
    for finding in evidence.findings:
        found.fails("evidence", finding.code, finding.message)
    if memory is not None:
        _compare_identity(found, memory, evidence)
        if not memory.lenient:
            _compare_counters(found, memory, evidence)
    return tuple(found.checks)


class _Comparison:
    """Collects checks."""

    def __init__(self, rules: DriftRules) -> None:
        self.rules = rules
        self.checks: list[Check] = []

    def fails(self, rule: str, code: str, message: str) -> None:
        action = action_of(code, self.rules.actions)
        self.checks.append(Check(rule, False, message, code, action))

    def holds(self, rule: str, message: str) -> None:
        self.checks.append(Check(rule, True, message))


def _compare_identity(found: _Comparison, memory: Memory, evidence: Evidence) -> None:
    before = memory.last
    if evidence.ek.hash != before.ek.hash:
        found.fails("endorsement key", "duplicate_id", "node: identity belongs to another TPM")
    if before.tier is Tier.QUOTE and evidence.tier is not Tier.QUOTE:
        text = "policy: node attested with quotes before and may not fall back"
        found.fails("tier", "downgrade", text)
    if before.counters is not None and evidence.counters is None:
        if evidence.ak_public != before.ak_public:
            text = "counters: AK changed without re-enrolment, and hides the counters"
            found.fails("attestation key", "ak_changed", text)
        else:
            text = "counters: they were shown before and are hidden now"
            found.fails("counters", "counters_hidden", text)
    elif evidence.counters is None and evidence.ak_public != before.ak_public:
        # Differences mean nothing between the scrambled counters of two keys.
        found.holds("attestation key", "AK changed; reboots cannot be told")


def _compare_counters(found: _Comparison, memory: Memory, evidence: Evidence) -> None:
    before, now = memory.last.counters, evidence.counters
    if before is None or now is None:
        if is_same_boot(memory, evidence):
            _compare_pcrs(found, memory, evidence, resumed=False)
        return
    _compare_firmware(found, before, now)
    if now.reset_count < before.reset_count:
        if _is_earlier_boot(memory, evidence):
            found.fails("counters", "cloned_tpm", "node: two machines use one TPM identity")
        else:
            found.fails("counters", "tpm_replaced", "counters: TPM was cleared or replaced")
        return
    if now.reset_count > before.reset_count:
        _compare_reboot(found, memory, evidence)
        return
    if now.restart_count < before.restart_count:
        found.fails("counters", "counter_rollback", "counters: restart counter went back")
        return
    resumed = now.restart_count > before.restart_count
    if _is_other_machine(memory, evidence):
        found.fails("counters", "cloned_tpm", "node: two machines use one TPM identity")
    elif before.safe and now.safe and now.clock_ms < before.clock_ms:
        found.fails("clock", "clock_rollback", "counters: clock went back")
    else:
        found.holds("counters", "same boot, resumed" if resumed else "same boot")
    _compare_pcrs(found, memory, evidence, resumed=resumed)


def _compare_firmware(found: _Comparison, before: Counters, now: Counters) -> None:
    if now.firmware_version == before.firmware_version:
        return
    change = f"{before.firmware_version:016x} to {now.firmware_version:016x}"
    if found.rules.firmware_by_policy:
        found.holds("TPM firmware", f"changed from {change}")
    else:
        text = f"policy: TPM firmware changed from {change}"
        found.fails("TPM firmware", "tpm_firmware", text)


def _compare_reboot(found: _Comparison, memory: Memory, evidence: Evidence) -> None:
    gap = evidence.made_at - memory.last.made_at
    running_on = memory.last.boot_id is not None and memory.last.boot_id == evidence.boot_id
    held = memory.held_reset
    counters = evidence.counters
    if gap < found.rules.min_boot_time or running_on:
        text = "counters: TPM was reset without a boot"
        found.fails("reboot", "tpm_reset_without_reboot", text)
    elif held is not None and counters is not None and counters.reset_count <= held:
        text = "counters: TPM was reset without a boot, and the machine has not booted since"
        found.fails("reboot", "tpm_reset_without_reboot", text)
    else:
        found.holds("reboot", f"{gap.total_seconds():.0f} s after it was last seen")


def _is_earlier_boot(memory: Memory, evidence: Evidence) -> bool:
    """Tell whether a boot that seemed to be over goes on."""
    now = evidence.counters
    return now is not None and any(
        boot.reset_count == now.reset_count
        and boot.boot_id == evidence.boot_id
        and boot.clock_ms <= now.clock_ms
        for boot in memory.earlier
    )


def _is_other_machine(memory: Memory, evidence: Evidence) -> bool:
    """Tell whether another kernel runs beside the one that is remembered, under the same counters.

    A kernel may be replaced without a reset (kexec), but the one before does not come back, and the
    clock goes on.
    """
    before, now = memory.last, evidence
    if before.boot_id is None or now.boot_id is None or before.boot_id == now.boot_id:
        return False
    if any(boot.boot_id == now.boot_id for boot in memory.earlier):
        return True
    if before.counters is None or now.counters is None:
        return False
    both_safe = before.counters.safe and now.counters.safe
    return both_safe and now.counters.clock_ms < before.counters.clock_ms


def _compare_pcrs(found: _Comparison, memory: Memory, evidence: Evidence, *, resumed: bool) -> None:
    before = memory.last.pcrs
    lost = sorted(_lost(before, evidence.pcrs)) if resumed else []
    if lost:
        found.fails("PCRs", "pcr_lost", "counters: PCRs were lost on resume")
        return
    changed = sorted(set(_changed(before, evidence.pcrs)))
    if changed:
        numbers = ", ".join(str(number) for number in changed)
        text = f"counters: PCR {numbers} changed without a reset"
        found.fails("PCRs", "pcr_changed_without_reset", text)
    else:
        found.holds("PCRs", "unchanged since the boot")


def _lost(
    before: Mapping[tuple[str, int], bytes], now: Mapping[tuple[str, int], bytes]
) -> set[int]:
    return {
        number
        for (bank, number), value in now.items()
        if number in _BOOT_PCRS and not any(value) and any(before.get((bank, number), b""))
    }


def _changed(
    before: Mapping[tuple[str, int], bytes], now: Mapping[tuple[str, int], bytes]
) -> Iterator[int]:
    for (bank, number), value in now.items():
        old = before.get((bank, number))
        if old is None or old == value:
            continue
        if number in _STILL_PCRS or (number == _PHASE_PCR and passed(old, value, bank) is None):
            yield number

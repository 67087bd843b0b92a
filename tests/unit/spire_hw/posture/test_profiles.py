"""Drafts from whole boots of simulated machines: what they let pass later, and what not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from spire_hw.posture.diff import compare
from spire_hw.posture.document import decode_evidence, encode_evidence
from spire_hw.posture.evaluate import evaluate
from spire_hw.posture.learn import learn
from spire_hw.posture.policyfile import parse_policy
from spire_hw.tpm import boot, eventlog, ima
from spire_hw_sim.firmware import PROFILES, Firmware
from spire_hw_sim.imawriter import ImaList
from tests.unit.spire_hw.posture.samples import GOOD

if TYPE_CHECKING:
    from spire_hw.posture.evidence import Evidence

CLEAN, UKI = PROFILES["clean"], PROFILES["uki"]
LATER = ("enter-initrd", "leave-initrd", "sysinit", "ready")


def shown(machine: Firmware, *phases: str, files: int = 20) -> Evidence:
    """Return what a machine's attestation proves, read from its log and list as the server does."""
    started = machine.boot().with_phases(*phases)
    bank = started.banks[-1]
    pcrs = {where: value for where, value in started.pcrs(bank).items() if where[1] < 16}
    listed = ImaList.start(started.values(bank), algorithm=bank, loaders=bank != "sha1")
    listed = listed.files(files)
    pcrs[bank, 10] = listed.pcr(bank)
    log = eventlog.parse(started.log(), allow_legacy=True)
    facts = ima.replay([listed.ascii()], None, pcrs, bank)
    return replace(GOOD, pcrs=pcrs, boot=boot.facts(log, pcrs, bank), ima=facts)


@pytest.mark.parametrize("name", PROFILES)
def test_every_machine_can_be_learnt_from(name: str) -> None:
    evidence = shown(PROFILES[name])
    text = learn("web", [evidence])
    policy = parse_policy(text)
    assert evaluate(policy, evidence).holds
    again = decode_evidence(encode_evidence(evidence))
    assert again == evidence
    assert parse_policy(learn("web", [again])) == policy


@pytest.mark.parametrize(
    ("before", "after", "codes"),
    [
        (CLEAN, CLEAN, set()),
        (CLEAN, PROFILES["dbx_update"], set()),
        (PROFILES["dbx_update"], CLEAN, {"dbx_old"}),
        (CLEAN, PROFILES["secure_boot_off"], {"secureboot"}),
        (CLEAN, PROFILES["evil_kernel"], {"boot_image", "boot_file"}),
        (CLEAN, replace(CLEAN, initrd=b"other"), {"boot_file"}),
        (CLEAN, replace(CLEAN, command_line="/boot/vmlinuz init=/bin/sh"), {"boot_command"}),
        (CLEAN, replace(CLEAN, version="Sim 1.2.4"), {"pcr_mismatch", "firmware_version"}),
        (CLEAN, replace(CLEAN, debug_mode=True), {"debug_mode"}),
        (CLEAN, replace(CLEAN, dma_protection=False), {"dma_protection"}),
        (CLEAN, PROFILES["option_roms"], {"pcr_mismatch"}),
        (UKI, UKI, set()),
        (UKI, replace(UKI, kernel=b"other"), {"boot_image", "uki"}),
        (UKI, CLEAN, {"boot_image", "uki"}),
    ],
)
def test_what_a_draft_lets_pass(before: Firmware, after: Firmware, codes: set[str]) -> None:
    policy = parse_policy(learn("web", [shown(before)]))
    verdict = evaluate(policy, shown(after))
    found = {check.code for check in verdict.checks if not check.holds}
    assert codes <= found, [check.message for check in verdict.checks]
    assert verdict.holds is (not codes)


def test_boot_phases_do_not_matter_to_a_unified_kernel_image() -> None:
    policy = parse_policy(learn("web", [shown(UKI, *LATER)]))
    for count in range(len(LATER) + 1):
        assert evaluate(policy, shown(UKI, *LATER[:count])).holds
    assert not evaluate(policy, shown(UKI, "evil")).holds


def test_an_update_is_an_addition_to_the_draft() -> None:
    updated = replace(CLEAN, kernel=b"kernel 6.1.0-29", initrd=b"initrd of 6.1.0-29")
    old, both = (
        parse_policy(learn("web", [shown(machine) for machine in machines]))
        for machines in ((CLEAN,), (CLEAN, updated))
    )
    differences = compare(old, both)
    assert {one.rule for one in differences} == {"boot.images", "boot.files"}
    assert all(one.added and not one.removed for one in differences)
    assert not evaluate(old, shown(updated)).holds
    assert evaluate(both, shown(updated)).holds


def test_files_that_were_not_there_are_not_in_the_draft() -> None:
    policy = parse_policy(learn("web", [shown(CLEAN, files=20)]))
    assert evaluate(policy, shown(CLEAN, files=3)).holds
    found = evaluate(policy, shown(CLEAN, files=21))
    assert [check.code for check in found.checks if not check.holds] == ["ima_unknown_file"]

"""Evidence held against a policy: every rule becomes a line that says what was found."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from spire_hw.posture.bootcheck import check_boot
from spire_hw.posture.evidence import Tier
from spire_hw.posture.firmware import tpm_version_text
from spire_hw.posture.imacheck import check_ima
from spire_hw.posture.policy import IMA_PCR
from spire_hw.posture.sheet import Sheet, listed, shown
from spire_hw.posture.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.posture.evidence import Evidence, PcrValues
    from spire_hw.posture.policy import PcrSet, Policy, TpmRules

_UKI_PCR: Final = 11
_ANY_MAKER: Final = "*"


def evaluate(policy: Policy, evidence: Evidence) -> Verdict:
    """Return what a policy says to evidence.

    Everything the policy asks for must be in the evidence: who judges a heartbeat that brought no
    boot log puts the facts of the same boot in first. Of an IMA list, the part at hand is judged.

    Args:
        policy: the one for this node.
        evidence: verified facts.

    Returns:
        One check per rule in the order TPM, PCRs, boot log, IMA; failing rules carry the reason
        code and the action of the policy. Selectors are there only when all checks hold.
    """
    sheet = Sheet(policy.drift)
    for finding in evidence.findings:
        sheet.failed("evidence", finding.code, finding.message)
    _check_tpm(sheet, policy.tpm, evidence)
    if policy.needs_quote and _check_tier(sheet, evidence):
        _check_pcrs(sheet, policy, evidence.pcrs)
        if policy.boot is not None:
            check_boot(sheet, policy.boot, evidence, policy.bank)
        if policy.ima is not None:
            check_ima(sheet, policy.ima, evidence.ima, policy.reference)
    checks = tuple(sheet.checks)
    holds = all(check.holds for check in checks)
    return Verdict(
        policy=policy.name,
        version=policy.version,
        policy_sha256=policy.sha256,
        checks=checks,
        selectors=tuple(_selectors(policy, evidence.pcrs)) if holds else (),
    )


def pcrset_digest(policy: Policy, pcrs: PcrValues) -> str:
    """Return one digest for the PCRs a policy is about, "" when it is about none.

    SHA-256 over a line `bank:number:hex` for each, by bank and number. Those whose values the
    policy names; else those its boot rules speak of, without PCR 11, which goes on changing.
    """
    chosen = policy.valued_pcrs()
    if not chosen and policy.boot is not None:
        changing = {IMA_PCR, _UKI_PCR}
        chosen = tuple((policy.bank, n) for n in sorted(policy.covered_pcrs() - changing))
    present = [(bank, n) for bank, n in chosen if (bank, n) in pcrs]
    lines = "".join(f"{bank}:{n}:{pcrs[bank, n].hex()}\n" for bank, n in present)
    return hashlib.sha256(lines.encode()).hexdigest() if lines else ""


def _selectors(policy: Policy, pcrs: PcrValues) -> Iterator[str]:
    if policy.valued_pcrs() or policy.boot is not None:
        yield f"boot:policy:{policy.reference}"
    if policy.ima is not None:
        yield f"ima:policy:{policy.name}"
    if digest := pcrset_digest(policy, pcrs):
        yield f"pcrset:{policy.name}:{digest}"


def _check_tier(sheet: Sheet, evidence: Evidence) -> bool:
    return sheet.rule(
        "tier",
        "activation_only",
        holds=evidence.tier is Tier.QUOTE,
        good="the machine's state was quoted",
        bad="policy: only the TPM's identity was proved, not the machine's state",
    )


def _check_tpm(sheet: Sheet, rules: TpmRules, evidence: Evidence) -> None:
    ek = evidence.ek
    named = (
        ("root", "ek_root", rules.roots, ek.root),
        ("manufacturer", "ek_manufacturer", rules.manufacturers, ek.manufacturer),
        ("model", "ek_model", rules.models, ek.model),
    )
    for what, code, allowed, value in named:
        if allowed:
            found = "not known" if value is None else shown(value.encode())
            sheet.rule(
                f"tpm {what}",
                code,
                holds=value in allowed,
                good=f"the TPM's {what} is {found}",
                bad=f"policy: the TPM's {what} is not allowed: {found}",
            )
    if rules.key_in_tpm:
        sheet.rule(
            "tpm key",
            "key_not_in_tpm",
            holds=evidence.key_in_tpm,
            good="the agent's key is in this TPM",
            bad="policy: the agent's key is not proved to be in the TPM",
        )
    if rules.counters:
        sheet.rule(
            "tpm counters",
            "counters_hidden",
            holds=evidence.counters is not None,
            good="the TPM's counters are visible",
            bad="policy: the TPM's counters are hidden by the place of its attestation key",
        )
    if rules.firmware_floors:
        _check_tpm_firmware(sheet, rules, evidence)


def _check_tpm_firmware(sheet: Sheet, rules: TpmRules, evidence: Evidence) -> None:
    rule, code, maker = "tpm firmware", "tpm_firmware", evidence.ek.manufacturer
    floor = rules.firmware_floors.get(maker or "", rules.firmware_floors.get(_ANY_MAKER))
    if floor is None and maker is not None:
        sheet.passed(rule, "no least firmware version for this manufacturer")
    elif floor is None:
        sheet.failed(rule, code, "policy: the TPM's manufacturer is not known, nor its firmware")
    elif evidence.counters is None:
        sheet.failed(rule, code, "policy: the TPM's firmware version is hidden")
    else:
        version = evidence.counters.firmware_version
        found = tpm_version_text(version)
        sheet.rule(
            rule,
            code,
            holds=version >= floor,
            good=f"the TPM's firmware is {found}",
            bad=f"policy: the TPM's firmware is too old: {found}",
        )


def _check_pcrs(sheet: Sheet, policy: Policy, pcrs: PcrValues) -> None:
    for (bank, number), allowed in sorted(policy.pcrs.items()):
        rule, value = f"pcr {bank}:{number}", pcrs.get((bank, number))
        if value is None:
            sheet.failed(rule, "pcr_missing", f"policy: PCR {number} of {bank} was not quoted")
        elif value in allowed:
            sheet.passed(
                rule, f"PCR {number} is among {len(allowed)} allowed: {bank}:{value.hex()}"
            )
        else:
            found = f"it is {bank}:{value.hex()}"
            message = f"policy: PCR {number} is not among the allowed values, {found}"
            sheet.failed(rule, "pcr_mismatch", message)
    if policy.pcr_sets:
        _check_sets(sheet, policy.pcr_sets, pcrs)


def _check_sets(sheet: Sheet, sets: tuple[PcrSet, ...], pcrs: PcrValues) -> None:
    rule = "pcr sets"
    wanted = {where for one in sets for where in one.values}
    if missing := wanted - set(pcrs):
        numbers = listed({number for _, number in missing})
        sheet.failed(rule, "pcr_missing", f"policy: PCR {numbers} was not quoted")
        return
    closest = min((differences(one, pcrs) for one in sets), key=len)
    if not closest:
        held = next(one.name for one in sets if not differences(one, pcrs))
        sheet.passed(rule, f'PCRs are those of "{held}"')
        return
    numbers = listed({number for _, number in closest})
    message = f"policy: PCR {numbers} fits none of {len(sets)} sets of allowed values"
    sheet.failed(rule, "pcr_mismatch", message)


def differences(one: PcrSet, pcrs: PcrValues) -> list[tuple[str, int]]:
    """Return the PCRs that are not as a set has them, by bank and number."""
    return sorted(where for where, allowed in one.values.items() if pcrs.get(where) not in allowed)

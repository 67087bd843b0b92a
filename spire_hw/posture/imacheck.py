"""What a policy says to the kernel's list of measured files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.posture.sheet import Sheet, shown
from spire_hw.posture.signature import is_signed

if TYPE_CHECKING:
    from spire_hw.posture.evidence import ImaEntry, ImaFacts
    from spire_hw.posture.policy import ImaRules

_RULE: Final = "ima files"
# So many files are named; whether there are more does not change what becomes of the node, and
# a node could make looking at them expensive.
_MAX_FINDINGS: Final = 20


def check_ima(sheet: Sheet, rules: ImaRules, facts: ImaFacts | None, policy: str) -> None:
    """Add the checks of a list, or of the part of it at hand.

    Args:
        sheet: where they go.
        rules: the policy's.
        facts: the replayed list.
        policy: `name@version` for messages.
    """
    if facts is None:
        sheet.failed("ima", "ima_missing", "ima: the list of measured files is missing")
        return
    if not rules.padded_sha1:
        sheet.rule(
            "ima padded_sha1",
            "ima_padded_sha1",
            holds=not facts.padded_sha1,
            good="the kernel extends digests of the bank's own kind",
            bad="ima: kernel extends SHA-1 into the SHA-256 bank",
        )
    plural = "violation" if facts.violations == 1 else "violations"
    sheet.rule(
        "ima violations",
        "ima_violation",
        holds=facts.violations <= rules.violations,
        good=f"{facts.violations} {plural}, {rules.violations} allowed",
        bad=f"ima: {facts.violations} {plural}, {rules.violations} allowed",
    )
    _check_files(sheet, rules, facts.entries, policy)


def _check_files(sheet: Sheet, rules: ImaRules, entries: tuple[ImaEntry, ...], policy: str) -> None:
    files, algorithms = rules.files, rules.algorithms
    others: dict[tuple[bytes, bytes], ImaEntry] = {}
    excluded = signed = 0
    for entry in entries:
        path, algorithm, digest = entry[0], entry[1], entry[2]
        is_listed = digest in files.get(path, ()) or digest in rules.anywhere
        if is_listed and algorithm in algorithms:
            continue
        if is_excluded(rules, path):
            excluded += 1
        elif (path, digest) in others:
            continue  # no signature makes up for the one before
        elif rules.keyring and is_signed(entry, rules.keyring, algorithms):
            signed += 1
        else:
            others[path, digest] = entry
            if len(others) > _MAX_FINDINGS:
                break
    for entry in list(others.values())[:_MAX_FINDINGS]:
        message = f"ima: a file is not in policy {policy}: {_about(entry, rules)}"
        sheet.failed(_RULE, "ima_unknown_file", message)
    if len(others) > _MAX_FINDINGS:
        message = f"ima: more than {_MAX_FINDINGS} files are not in policy {policy}"
        sheet.failed(_RULE, "ima_unknown_file", message)
    if not others:
        listed = len(entries) - excluded - signed
        sheet.passed(_RULE, f"{listed} files listed, {signed} signed, {excluded} excluded")


def is_excluded(rules: ImaRules, path: bytes) -> bool:
    """Tell whether a path is not looked at; one that climbs (`/../`) always is."""
    if not rules.exclude or not rules.exclude.match(path):
        return False
    return b"/../" not in path and not path.endswith(b"/..")


def _about(entry: ImaEntry, rules: ImaRules) -> str:
    name = f"{shown(entry.path)}, {shown(entry.algorithm.encode())[1:-1]}:{entry.digest.hex()}"
    if entry.algorithm not in rules.algorithms:
        return f"{name} (a digest of this kind does not count)"
    if entry.path in rules.files:
        return f"{name} (its content is another one)"
    if (entry.signature or entry.appended) and rules.keyring:
        return f"{name} (its signature is not by a key of the policy)"
    return name

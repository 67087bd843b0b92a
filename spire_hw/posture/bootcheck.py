"""What a policy says to a boot log's facts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from spire_hw.posture import phases
from spire_hw.posture.firmware import is_older
from spire_hw.posture.sheet import Sheet, listed, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from spire_hw.posture.evidence import BootFacts, Evidence
    from spire_hw.posture.policy import BootRules

_OPTION_ROMS: Final = 2
_IMAGES: Final = 4
_UKI_PCR: Final = 11
# Beyond those every log has to reproduce: what later software measures.
_LATER: Final = frozenset({8, 9, 12, 14})
_SBAT: Final = re.compile(r"sbat,[0-9]{1,9},([0-9]{1,18})(?:\n.*)?", re.ASCII | re.DOTALL)
_SHOWN: Final = 3


def check_boot(sheet: Sheet, rules: BootRules, evidence: Evidence, bank: str) -> None:
    """Add one check per rule.

    Args:
        sheet: where they go.
        rules: the policy's.
        evidence: with the boot log's facts and the quoted PCRs.
        bank: the log has to be replayed in this one.
    """
    boot = evidence.boot
    if boot is None:
        sheet.failed("boot log", "log_missing", "policy: the boot log is missing")
        return
    sheet.rule(
        "boot log",
        "log_bank",
        holds=boot.bank == bank,
        good=f"the boot log explains PCR {listed(boot.explained)}" if boot.explained else "",
        bad=f"policy: the boot log speaks for bank {boot.bank}, not {bank}",
    )
    _check_firmware(sheet, rules, boot)
    _check_secure_boot(sheet, rules, boot)
    _check_revocations(sheet, rules, boot)
    unexplained = _LATER.intersection(rules.covered()) - set(boot.explained)
    if unexplained:
        message = f"policy: the boot log does not explain PCR {listed(unexplained)}"
        sheet.failed("boot log", "log_missing", message)
    _check_loaded(sheet, rules, boot)
    if rules.uki is not None:
        _check_uki(sheet, rules.uki, boot.uki, evidence.pcrs.get((bank, _UKI_PCR)), bank)
    _check_mok(sheet, rules, boot)


def sbat_level(sbat: str) -> int | None:
    """Return the level of shim's revocations, None when there is none."""
    found = _SBAT.fullmatch(sbat)
    return None if found is None else int(found[1])


def _check_firmware(sheet: Sheet, rules: BootRules, boot: BootFacts) -> None:
    sheet.rule(
        "firmware_error",
        "firmware_error",
        holds=not boot.firmware_error,
        good="firmware reported no error",
        bad="policy: firmware reported an error",
    )
    found = shown(boot.crtm_version.encode()) if boot.crtm_version else "not measured"
    if rules.firmware_versions is not None:
        sheet.rule(
            "firmware_versions",
            "firmware_version",
            holds=boot.crtm_version in rules.firmware_versions,
            good=f"firmware version is {found}",
            bad=f"policy: firmware version is not allowed: {found}",
        )
    if rules.firmware_floor is not None:
        sheet.rule(
            "firmware_floor",
            "firmware_version",
            holds=bool(boot.crtm_version) and not is_older(boot.crtm_version, rules.firmware_floor),
            good=f"firmware version is {found}",
            bad=f"policy: firmware version is too old: {found}",
        )
    if rules.workarounds is not None:
        more = [shown(n.encode()) for n in sorted(set(boot.workarounds) - rules.workarounds)]
        sheet.rule(
            "workarounds",
            "log_workaround",
            holds=not more,
            good="no fault of firmware had to be made up for but those allowed",
            bad=f"policy: a fault of firmware had to be made up for: {', '.join(more)}",
        )


def _check_secure_boot(sheet: Sheet, rules: BootRules, boot: BootFacts) -> None:
    if rules.secure_boot != "any":
        states = {True: "on", False: "off", None: "unknown"}
        found = states[boot.secure_boot]
        sheet.rule(
            "secure_boot",
            "secureboot",
            holds=found == rules.secure_boot,
            good=f"Secure Boot is {found}",
            bad=f"policy: Secure Boot is {found}",
        )
    if not rules.debug_mode:
        sheet.rule(
            "debug_mode",
            "debug_mode",
            holds=not boot.debug_mode,
            good="firmware is not in debug mode",
            bad="policy: firmware is in debug mode",
        )
    if rules.dma_protection:
        sheet.rule(
            "dma_protection",
            "dma_protection",
            holds=boot.dma_protection,
            good="firmware did not report DMA protection to be off",
            bad="policy: DMA protection is off",
        )
    for name, allowed in sorted(rules.variables.items()):
        value = boot.variables.get(name)
        found = "not there" if value is None else f"sha256:{value}"
        sheet.rule(
            f"variable {name}",
            "secureboot_keys",
            holds=value in allowed,
            good=f"variable {name} is {found}",
            bad=f"policy: variable {name} is not among the allowed values, it is {found}",
        )
    _check_all(sheet, "db", "secureboot_keys", rules.db, boot.db, what="entry of db")
    _check_all(
        sheet,
        "authorities",
        "secureboot_authority",
        rules.authorities,
        boot.authorities,
        what="certificate that let an image start",
    )


def _check_revocations(sheet: Sheet, rules: BootRules, boot: BootFacts) -> None:
    if rules.dbx_floor is not None:
        missing = len(rules.dbx_floor - boot.dbx)
        lacking = "1 entry is" if missing == 1 else f"{missing} entries are"
        sheet.rule(
            "dbx_floor",
            "dbx_old",
            holds=not missing,
            good=f"the revocation list has {len(boot.dbx)} entries, all those demanded among them",
            bad=f"policy: revocation list is too old, {lacking} missing",
        )
    if rules.sbat_floor is not None:
        level = sbat_level(boot.sbat)
        found = shown(boot.sbat.encode()) if boot.sbat else "not measured"
        sheet.rule(
            "sbat_floor",
            "dbx_old",
            holds=level is not None and level >= rules.sbat_floor,
            good=f"revocation level is {found}",
            bad=f"policy: revocation list is too old, SbatLevel is {found}",
        )


def _check_loaded(sheet: Sheet, rules: BootRules, boot: BootFacts) -> None:
    images = [image.digest for image in boot.images if image.pcr == _IMAGES]
    roms = [image.digest for image in boot.images if image.pcr == _OPTION_ROMS]
    _check_all(sheet, "images", "boot_image", rules.images, images, what="boot image", some=True)
    _check_all(sheet, "option_roms", "boot_image", rules.option_roms, roms, what="option ROM")
    if rules.revoked_images is not None:
        bad = [digest for digest in (*roms, *images) if digest in rules.revoked_images]
        sheet.rule(
            "revoked_images",
            "boot_image_revoked",
            holds=not bad,
            good="none of the images started is revoked",
            bad=f"policy: a revoked image was started: {_some(bad)}",
        )
    if rules.commands is not None:
        others = [c for c in boot.commands if not rules.commands.match(c.encode())]
        names = ", ".join(shown(command.encode()) for command in others[:_SHOWN])
        sheet.rule(
            "commands",
            "boot_command",
            holds=not others,
            good=f"{len(boot.commands)} commands and command lines are allowed",
            bad=f"policy: a command or command line is not allowed: {names}",
        )
    _check_all(sheet, "files", "boot_file", rules.files, boot.files, what="file loaded at boot")


def _check_uki(
    sheet: Sheet, allowed: Collection[str], uki: str | None, quoted: bytes | None, bank: str
) -> None:
    if uki is None or quoted is None:
        sheet.failed("uki", "uki", "policy: no unified kernel image is proved")
        return
    passed = phases.passed(bytes.fromhex(uki), quoted, bank)
    sheet.rule(
        "uki",
        "uki",
        holds=uki in allowed,
        good=f"the unified kernel image is {uki}",
        bad=f"policy: the unified kernel image is not allowed: {uki}",
    )
    sheet.rule(
        "uki phases",
        "uki",
        holds=passed is not None,
        good=f"after it came {', '.join(passed or ()) or 'nothing'}",
        bad="policy: PCR 11 has more in it than a unified kernel image and boot phases",
    )


def _check_mok(sheet: Sheet, rules: BootRules, boot: BootFacts) -> None:
    if rules.mok != "any":
        found = {True: "present", False: "absent", None: "unknown"}[boot.mok]
        sheet.rule(
            "mok",
            "mok",
            holds=found == rules.mok,
            good=f"the owner's key lists (MOK) are {found}",
            bad=f"policy: the owner's key lists (MOK) are {found}",
        )
    _check_all(
        sheet, "mok_digests", "mok", rules.mok_digests, boot.mok_digests, what="list of MOK keys"
    )


def _check_all(
    sheet: Sheet,
    rule: str,
    code: str,
    allowed: Collection[object] | None,
    found: Iterable[str | bytes],
    *,
    what: str,
    some: bool = False,
) -> None:
    """Add a check that everything found is allowed, and with `some` that anything was found."""
    if allowed is None:
        return
    values = list(found)
    others = [value for value in values if value not in allowed]
    if some and not values:
        sheet.failed(rule, code, f"policy: no {what} was measured")
        return
    sheet.rule(
        rule,
        code,
        holds=not others,
        good=f"{len(values)} of {len(values)} allowed ({what})",
        bad=f"policy: {len(others)} of {len(values)} not allowed ({what}): {_some(others)}",
    )


def _some(digests: list[str] | list[bytes] | list[str | bytes]) -> str:
    texts = [digest if isinstance(digest, str) else digest.hex() for digest in digests[:_SHOWN]]
    return ", ".join(texts) + (", ..." if len(digests) > _SHOWN else "")

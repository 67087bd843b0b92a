from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.errors import ErrorKind, Finding
from spire_hw.posture.evaluate import evaluate, pcrset_digest
from spire_hw.posture.evidence import Evidence, Tier
from spire_hw.posture.reasons import DEFAULT_ACTIONS
from spire_hw.posture.verdict import Action
from tests.unit.spire_hw.posture.samples import (
    BOOT,
    EK,
    EK_HASH,
    GOOD,
    MAKER,
    PCRS,
    ROOT,
    UKI,
    booted,
    digest,
    extended,
    good,
    policy,
)

if TYPE_CHECKING:
    from spire_hw.posture.policy import Policy

P4, P7 = PCRS["sha256", 4].hex(), PCRS["sha256", 7].hex()
PIN = f'pcrs {{ sha256 {{ "4" = ["{P4}"] }} }}'
LOADED = f'images = ["{digest("shim").hex()}", "{digest("kernel").hex()}"]'


def failed(made: Policy, evidence: Evidence) -> list[tuple[str, str, Action]]:
    verdict = evaluate(made, evidence)
    assert verdict.holds is not any(not check.holds for check in verdict.checks)
    if not verdict.holds:
        assert verdict.selectors == ()
    return [(c.code, c.message, c.action) for c in verdict.checks if not c.holds]


def test_a_good_machine_gets_selectors() -> None:
    made = policy(f'version = 7\n{PIN}\nima {{ allow = ["{"00" * 32}"] exclude = ["*"] }}')
    verdict = evaluate(made, GOOD)
    assert verdict.holds
    assert verdict.action is Action.ACCEPT
    assert (verdict.policy, verdict.version, verdict.policy_sha256) == ("web", 7, made.sha256)
    expected = hashlib.sha256(f"sha256:4:{P4}\n".encode()).hexdigest()
    assert verdict.selectors == ("boot:policy:web@7", "ima:policy:web", f"pcrset:web:{expected}")
    assert all(check.code == "" for check in verdict.checks)


def test_selectors_say_only_what_was_looked_at() -> None:
    nothing = policy("allow_any_state = true")
    assert evaluate(nothing, GOOD).selectors == ()
    files = policy(f'ima {{ allow = ["{"00" * 32}"] exclude = ["*"] }}')
    assert evaluate(files, GOOD).selectors == ("ima:policy:web",)
    boot = policy(f"boot {{ {LOADED} }}")
    lines = "".join(f"sha256:{n}:{PCRS['sha256', n].hex()}\n" for n in (4, 7))
    assert pcrset_digest(boot, PCRS) == hashlib.sha256(lines.encode()).hexdigest()


def test_pcrset_does_not_change_with_what_goes_on_changing() -> None:
    made = policy(f'boot {{ uki = ["{UKI.hex()}"] {LOADED} }} ima {{ allow = ["{"00" * 32}"] }}')
    later = {**PCRS, ("sha256", 10): bytes(32), ("sha256", 11): extended(UKI, "enter-initrd")}
    assert pcrset_digest(made, PCRS) == pcrset_digest(made, later) != ""


@pytest.mark.parametrize(
    ("inside", "changes", "code", "message"),
    [
        (f'roots = ["{ROOT}"]', {"root": "b" * 64}, "ek_root", f'not allowed: "{"b" * 64}"'),
        (f'roots = ["{ROOT}"]', {"root": None}, "ek_root", "not known"),
        (f'manufacturers = ["{MAKER}"]', {"manufacturer": "id:00"}, "ek_manufacturer", '"id:00"'),
        ('models = ["NPCT75x"]', {"model": 'x"\n'}, "ek_model", r'"x\x22\x0a"'),
    ],
)
def test_rules_about_the_tpm(inside: str, changes: dict[str, Any], code: str, message: str) -> None:
    made = policy(f"allow_any_state = true\ntpm {{ {inside} }}")
    assert failed(made, GOOD) == []
    (found,) = failed(made, good(ek=replace(EK, **changes)))
    assert (found[0], found[2]) == (code, Action.REFUSE)
    assert message in found[1]


def test_key_and_counters() -> None:
    made = policy("allow_any_state = true\ntpm { counters = true }")
    assert failed(made, GOOD) == []
    codes = [code for code, _, _ in failed(made, good(key_in_tpm=False, counters=None))]
    assert codes == ["key_not_in_tpm", "counters_hidden"]


@pytest.mark.parametrize(
    ("floors", "evidence", "holds"),
    [
        ({MAKER: "7.2.3.1"}, GOOD, True),
        ({MAKER: "7.2.3.2"}, GOOD, False),
        ({MAKER: "0x0007000200030001"}, GOOD, True),
        ({"id:OTHER": "99"}, GOOD, True),
        ({"id:OTHER": "99", "*": "8"}, GOOD, False),
        ({"*": "8", MAKER: "1"}, GOOD, True),
        ({MAKER: "1"}, good(counters=None), False),
        ({MAKER: "1"}, good(ek=replace(EK, manufacturer=None)), False),
        ({"*": "1"}, good(ek=replace(EK, manufacturer=None)), True),
    ],
)
def test_least_firmware_of_the_tpm(floors: dict[str, str], evidence: Evidence, holds: bool) -> None:
    blocks = "\n".join(f'firmware_floor "{m}" {{ version = "{v}" }}' for m, v in floors.items())
    made = policy(f"allow_any_state = true\ntpm {{ {blocks} }}")
    codes = [code for code, _, _ in failed(made, evidence)]
    assert codes == ([] if holds else ["tpm_firmware"])
    assert made.request().counters


def test_pcr_values() -> None:
    made = policy(f'pcrs {{ sha256 {{ "4" = ["{"00" * 32}", "{P4}"] "7" = ["{P7}"] }} }}')
    assert failed(made, GOOD) == []
    other = {**PCRS, ("sha256", 4): b"\x01" * 32}
    message = f"policy: PCR 4 is not among the allowed values, it is sha256:{'01' * 32}"
    assert failed(made, good(pcrs=other)) == [("pcr_mismatch", message, Action.QUARANTINE)]
    del other["sha256", 7]
    missing = ("pcr_missing", "policy: PCR 7 of sha256 was not quoted", Action.REFUSE)
    assert failed(made, good(pcrs=other))[1] == missing


def test_one_set_of_pcrs_has_to_hold_as_a_whole() -> None:
    a, b = digest("pcr 0").hex(), "11" * 32
    made = policy(
        f'pcr_set "one" {{ sha256 {{ "0" = ["{a}"] "4" = ["{b}"] "7" = ["{b}"] }} }}'
        f'pcr_set "two" {{ sha256 {{ "0" = ["{a}"] "4" = ["{P4}"] }} }}'
    )
    assert failed(made, GOOD) == []
    mixed = {**PCRS, ("sha256", 0): bytes(32), ("sha256", 4): bytes.fromhex(b)}
    message = "policy: PCR 0 and 7 fits none of 2 sets of allowed values"
    assert failed(made, good(pcrs=mixed)) == [("pcr_mismatch", message, Action.QUARANTINE)]
    del mixed["sha256", 7]
    assert failed(made, good(pcrs=mixed))[0][0] == "pcr_missing"


def test_activation_alone_does_not_satisfy_rules_about_the_machine() -> None:
    poor = good(tier=Tier.ACTIVATION, pcrs={}, boot=None, ima=None)
    assert [code for code, _, _ in failed(policy(PIN), poor)] == ["activation_only"]
    assert failed(policy("allow_any_state = true"), poor) == []


def test_missing_logs_are_never_an_absence_of_rules() -> None:
    made = policy(f'boot {{ {LOADED} }} ima {{ allow = ["{"00" * 32}"] exclude = ["*"] }}')
    codes = [code for code, _, _ in failed(made, good(boot=None, ima=None))]
    assert codes == ["log_missing", "ima_missing"]


def test_boot_rules_that_hold() -> None:
    names = {name: digest(name).hex() for name in ("PK", "KEK", "db", "dbx")}
    variables = "\n".join(f'{name} = ["{value}"]' for name, value in names.items())
    made = policy(f"""
boot {{
  {LOADED}
  variables {{ {variables} }}
  db = ["{BOOT.db[0]}", "{BOOT.db[1]}"]
  dbx_floor = ["{digest("dbx 3").hex()}"]
  sbat_floor = 2023012900
  authorities = ["{BOOT.authorities[0]}"]
  revoked_images = ["{"00" * 32}"]
  option_roms = ["{digest("rom").hex()}"]
  commands = ["linux /vmlinuz *", "menuentry *"]
  files = ["{digest("vmlinuz").hex()}", "{digest("initrd").hex()}"]
  uki = ["{UKI.hex()}"]
  mok = "present"
  mok_digests = ["{digest("MokList").hex()}"]
  firmware_versions = ["N2CET63W (1.46 )"]
  firmware_floor = "N2CET63W (1.9 )"
  workarounds = ["exit_boot_services"]
}}""")
    assert [message for _, message, _ in failed(made, GOOD)] == []
    request = made.request()
    assert request.pcrs == (("sha256", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 14)),)


@pytest.mark.parametrize(
    ("inside", "changes", "code", "message"),
    [
        ("", {"secure_boot": False}, "secureboot", "policy: Secure Boot is off"),
        ("", {"secure_boot": None}, "secureboot", "policy: Secure Boot is unknown"),
        ('secure_boot = "off"', {}, "secureboot", "policy: Secure Boot is on"),
        ("", {"debug_mode": True}, "debug_mode", "policy: firmware is in debug mode"),
        ("", {"dma_protection": False}, "dma_protection", "policy: DMA protection is off"),
        ("", {"firmware_error": True}, "firmware_error", "policy: firmware reported an error"),
        ("", {"bank": "sha1"}, "log_bank", "speaks for bank sha1, not sha256"),
        (f'variables {{ PK = ["{"00" * 32}"] }}', {}, "secureboot_keys", "variable PK is not"),
        (
            f'variables {{ dbx = ["{"00" * 32}"] }}',
            {"variables": {}},
            "secureboot_keys",
            "not there",
        ),
        (f'db = ["{"00" * 32}"]', {}, "secureboot_keys", "2 of 2 not allowed (entry of db)"),
        (f'authorities = ["{"00" * 32}"]', {}, "secureboot_authority", "1 of 1 not allowed"),
        (f'dbx_floor = ["{"00" * 32}"]', {}, "dbx_old", "policy: revocation list is too old"),
        ("sbat_floor = 2024010900", {}, "dbx_old", "policy: revocation list is too old"),
        ("sbat_floor = 1", {"sbat": ""}, "dbx_old", "SbatLevel is not measured"),
        ("sbat_floor = 1", {"sbat": "sbat,1,99x"}, "dbx_old", "SbatLevel is"),
        (f'images = ["{digest("shim").hex()}"]', {}, "boot_image", digest("kernel").hex()),
        (LOADED, {"images": ()}, "boot_image", "policy: no boot image was measured"),
        (f'option_roms = ["{"00" * 32}"]', {}, "boot_image", "1 of 1 not allowed (option ROM)"),
        (f'revoked_images = ["{digest("rom").hex()}"]', {}, "boot_image_revoked", "revoked image"),
        ('commands = ["linux*"]', {}, "boot_command", r'"menuentry \x22a ${b}\x22"'),
        (f'files = ["{digest("vmlinuz").hex()}"]', {}, "boot_file", "1 of 2 not allowed"),
        (f'uki = ["{"00" * 32}"]', {}, "uki", "image is not allowed"),
        (f'uki = ["{UKI.hex()}"]', {"uki": None}, "uki", "no unified kernel image is proved"),
        ('mok = "absent"', {}, "mok", "(MOK) are present"),
        ('mok = "present"', {"mok": None}, "mok", "(MOK) are unknown"),
        (f'mok_digests = ["{"00" * 32}"]', {}, "mok", "1 of 1 not allowed"),
        ('firmware_versions = ["1"]', {}, "firmware_version", "firmware version is not allowed"),
        ('firmware_floor = "N2CET63W (1.47 )"', {}, "firmware_version", "version is too old"),
        ('firmware_floor = "1"', {"crtm_version": ""}, "firmware_version", "not measured"),
        ("workarounds = []", {}, "log_workaround", "exit_boot_services"),
        ('commands = ["*"]', {"explained": tuple(range(9))}, "log_missing", "explain PCR 12"),
        (f'files = ["{"00" * 32}"]', {"explained": (0, 4, 7), "files": ()}, "log_missing", "PCR 9"),
        ('mok = "present"', {"explained": (0, 4, 7)}, "log_missing", "PCR 14"),
    ],
)
def test_boot_rules_that_do_not(
    inside: str, changes: dict[str, Any], code: str, message: str
) -> None:
    more = "" if "images" in inside and "revoked" not in inside else LOADED
    made = policy(f"boot {{ {inside}\n{more} }}")
    found = failed(made, booted(**changes))
    assert (code, DEFAULT_ACTIONS[code]) in [(c, a) for c, _, a in found]
    assert any(message in text for c, text, _ in found if c == code), found


def test_pcr_11_has_nothing_in_it_but_image_and_phases() -> None:
    made = policy(f'boot {{ uki = ["{UKI.hex()}"] {LOADED} }}')
    assert failed(made, GOOD) == []
    for value in (UKI, extended(UKI, "enter-initrd", "sysinit")):
        assert failed(made, good(pcrs={**PCRS, ("sha256", 11): value})) == []
    for value in (extended(UKI, "evil"), bytes(32), extended(UKI, "ready", "sysinit")):
        found = failed(made, good(pcrs={**PCRS, ("sha256", 11): value}))
        assert [code for code, _, _ in found] == ["uki"]


def test_the_policy_decides_what_a_reason_does() -> None:
    drift = 'drift { pcr_mismatch = "ban" secureboot = "accept" dbx_old = "quarantine" }'
    zeros = "00" * 32
    made = policy(
        f'{drift}\npcrs {{ sha256 {{ "4" = ["{zeros}"] }} }}\nboot {{ dbx_floor = ["{zeros}"] }}'
    )
    verdict = evaluate(made, booted(secure_boot=False))
    assert [(c.code, c.action) for c in verdict.checks if not c.holds] == [
        ("pcr_mismatch", Action.BAN),
        ("dbx_old", Action.QUARANTINE),
    ]
    assert verdict.action is Action.BAN
    accepted = next(check for check in verdict.checks if check.rule == "secure_boot")
    assert accepted.holds
    assert accepted.message == "policy: Secure Boot is off; secureboot is accepted"


def test_what_speaks_against_a_node_never_holds() -> None:
    finding = Finding("ima_rollback", "ima: list was rewritten", ErrorKind.PERMISSION_DENIED)
    made = replace(policy("allow_any_state = true"), drift={"ima_rollback": Action.ACCEPT})
    found = failed(made, good(findings=(finding,)))
    assert found == [("ima_rollback", "ima: list was rewritten", Action.REFUSE)]
    found = failed(policy("allow_any_state = true"), good(findings=(finding,)))
    assert found[0][2] is Action.BAN


def test_groups_ask_for_verified_facts_alone() -> None:
    made = policy(
        f'nodes {{ selectors = ["manufacturer:{MAKER}"] ek_hashes = ["{EK_HASH}"] }} {PIN}'
    )
    assert made.nodes[0].rank == (True, 1)

"""What logs of sound machines say; shapes are those of logs of real machines."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest

from spire_hw.errors import AttestationError, InvalidInputError
from spire_hw.posture.evidence import BootFacts, BootImage
from spire_hw.tpm import boot, eventlog, secureboot
from spire_hw_sim import firmware
from spire_hw_sim.firmware import (
    DISTRIBUTION_KEY,
    PHASES,
    PROFILES,
    VENDOR_KEY,
    Boot,
    Firmware,
    Measurement,
)


def _facts(start: Boot, bank: str = "sha256", without: tuple[int, ...] = ()) -> BootFacts:
    pcrs = {place: v for place, v in start.pcrs(bank).items() if place[1] not in without}
    log = eventlog.parse(start.log(), allow_legacy=start.legacy)
    return boot.facts(log, pcrs, bank)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_bank_replays_to_what_was_extended(name: str) -> None:
    start = PROFILES[name].boot()
    log = eventlog.parse(start.log(), allow_legacy=True)
    assert log.banks == start.banks
    for bank in start.banks:
        values = start.values(bank)
        if name == "forgets_exit":
            del values[5]
        assert eventlog.replay(log, bank).items() >= values.items()
        assert set(_facts(start, bank).explained) == set(range(24))


@pytest.mark.parametrize("banks", [("sha256",), ("sha384", "sha1"), ("sha1", "sha256", "sha512")])
def test_banks_of_any_number_and_order(banks: tuple[str, ...]) -> None:
    start = Firmware(banks=banks).boot()
    for bank in banks:
        assert _facts(start, bank).secure_boot is True


def test_an_algorithm_nobody_knows_is_passed_over() -> None:
    start = PROFILES["clean"].boot()
    sm3 = struct.pack("<H", 0x12)
    head = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 2)
    head += struct.pack("<HHHH", 0x12, 32, 11, 32) + b"\x04wxyz"
    raw = struct.pack("<II20sI", 0, 3, bytes(20), len(head)) + head
    for m in start.measurements:
        raw += struct.pack("<III", m.pcr, m.type, 2) + sm3 + bytes(32)
        raw += b"\x0b\0" + m.digest("sha256") + struct.pack("<I", len(m.data)) + m.data
    log = eventlog.parse(raw)
    assert log.banks == ("sha256",)
    assert eventlog.replay(log, "sha256") == start.values("sha256")
    with pytest.raises(InvalidInputError, match="log: no digests of bank sha1"):
        eventlog.replay(log, "sha1")


def test_digests_in_an_order_of_their_own() -> None:
    start = PROFILES["clean"].boot()
    turned = b"".join(firmware.event(m, ("sha256", "sha1")) for m in start.measurements)
    log = eventlog.parse(firmware.header(("sha1", "sha256")) + turned)
    assert log.events == eventlog.parse(start.log()).events


def test_vendor_information_in_the_header() -> None:
    start = PROFILES["clean"].boot()
    head = firmware.header(start.banks)
    raw = firmware.header(start.banks, vendor=b"some vendor") + start.log()[len(head) :]
    assert eventlog.replay(eventlog.parse(raw), "sha256") == start.values("sha256")


def test_what_a_clean_boot_says() -> None:
    machine = PROFILES["clean"]
    facts = _facts(machine.boot())
    assert facts.log_sha256 == _sha256(machine.boot().log())
    assert (facts.secure_boot, facts.debug_mode, facts.dma_protection) == (True, False, True)
    assert (facts.firmware_error, facts.workarounds) == (False, ())
    assert facts.crtm_version == "Sim 1.2.3"
    assert facts.variables["SecureBoot"] == _sha256(b"\1")
    assert facts.variables.keys() == {"SecureBoot", "PK", "KEK", "db", "dbx"}
    assert facts.db == (_sha256(VENDOR_KEY),)
    assert facts.dbx == {digest.hex() for digest in machine.dbx}
    assert facts.sbat == "sbat,1,2023012900"
    assert facts.authorities == (_sha256(VENDOR_KEY), _sha256(DISTRIBUTION_KEY))
    images = [(2, b"option ROM 0"), (4, b"shim 15.7"), (4, b"GRUB 2.12"), (4, machine.kernel)]
    assert facts.images == tuple(
        BootImage(pcr, hashlib.sha256(content).digest()) for pcr, content in images
    )
    assert facts.commands[0] == "set variable0=" + "x" * 24
    assert facts.commands[-1] == "/boot/vmlinuz root=/dev/sda1 ro quiet"
    assert len(facts.commands) == 31
    loaded = [machine.kernel, machine.initrd, machine.initrd]
    assert facts.files[:3] == tuple(hashlib.sha256(content).digest() for content in loaded)
    assert facts.mok is True
    assert len(facts.mok_digests) == 3
    assert facts.uki is None


def test_a_unified_kernel_image() -> None:
    start = PROFILES["uki"].boot()
    facts = _facts(start)
    assert facts.uki == start.values("sha256")[11].hex()
    assert facts.commands == ("/boot/vmlinuz root=/dev/sda1 ro quiet",)
    assert facts.mok is False
    assert facts.mok_digests == ()


def test_an_evil_kernel_changes_what_it_must() -> None:
    clean, evil = _facts(PROFILES["clean"].boot()), _facts(PROFILES["evil_kernel"].boot())
    assert set(clean.images) ^ set(evil.images) == {clean.images[-1], evil.images[-1]}
    assert clean.variables == evil.variables
    assert clean.files[0] != evil.files[0]


def test_facts_come_from_quoted_pcrs_alone() -> None:
    facts = _facts(PROFILES["clean"].boot(), without=(0, 2, 4, 7, 8, 9, 14))
    assert facts.secure_boot is None
    assert (facts.images, facts.commands, facts.files, facts.mok) == ((), (), (), None)
    assert (facts.crtm_version, facts.db, facts.dbx, facts.sbat) == ("", (), frozenset(), "")
    assert _facts(PROFILES["uki"].boot(), without=(11,)).uki is None


def test_other_banks_are_not_looked_at() -> None:
    start = PROFILES["clean"].boot()
    pcrs = start.pcrs("sha256") | {("sha1", n): bytes(20) for n in range(24)}
    assert boot.facts(eventlog.parse(start.log()), pcrs, "sha256").secure_boot is True


def test_option_roms_and_long_configurations() -> None:
    roms, grub = PROFILES["option_roms"].boot(), PROFILES["grub"].boot()
    assert len(roms.log()) > 70_000
    assert len([image for image in _facts(roms).images if image.pcr == 2]) == 220
    assert len(grub.log()) > 190_000
    assert len(_facts(grub).commands) == 501


def test_boot_phases_move_pcr_11() -> None:
    start = PROFILES["uki"].boot()
    for count in range(1, 5):
        gone_on = start.with_phases(*PHASES[:count])
        facts = _facts(gone_on)
        assert facts.uki == start.values("sha256")[11].hex()
        assert 11 not in facts.explained
    other = start.with_phases("enter-initrd", "something else")
    assert _facts(other).uki is None


def test_pcrs_that_the_log_does_not_explain() -> None:
    """Userspace measures into PCR 9 and 15, and no log knows."""
    more = [Measurement(n, firmware.EV_IPL, b"later", logged=False) for n in (8, 9, 12, 14, 15)]
    facts = _facts(PROFILES["clean"].boot().then(*more))
    assert set(range(24)) - set(facts.explained) == {8, 9, 12, 14, 15}
    assert (facts.commands, facts.files, facts.mok, facts.mok_digests) == ((), (), True, ())
    assert facts.secure_boot is True


@pytest.mark.parametrize(
    "texts",
    [
        (firmware.INVOCATION, firmware.SUCCESS),
        (firmware.INVOCATION, firmware.FAILURE),
        (firmware.INVOCATION, firmware.FAILURE, firmware.SUCCESS),
    ],
)
def test_firmware_that_forgets_how_it_handed_over(texts: tuple[bytes, ...]) -> None:
    start = PROFILES["clean"].boot()
    parts = tuple(m for m in start.measurements if not m.data.startswith(b"Exit"))
    for logged in range(len(texts)):
        exits = [
            Measurement(5, firmware.EV_ACTION, text, logged=i < logged)
            for i, text in enumerate(texts)
        ]
        bent = replace(start, measurements=(*parts, *exits))
        if logged > 1:  # The log ends in a result: nothing is known to follow.
            with pytest.raises(AttestationError, match="PCR 5 does not replay"):
                _facts(bent)
            continue
        facts = _facts(bent)
        assert facts.workarounds == (boot.WORKAROUND_EXIT,)
        assert 5 in facts.explained


def test_nothing_else_is_made_up_for() -> None:
    start = PROFILES["clean"].boot()
    for pcr in range(8):
        bent = start.then(Measurement(pcr, firmware.EV_ACTION, firmware.SUCCESS, logged=False))
        with pytest.raises(AttestationError, match=f"PCR {pcr} does not replay"):
            _facts(bent)


def test_several_pcrs_that_do_not_replay_are_all_named() -> None:
    start = PROFILES["clean"].boot()
    hidden = [Measurement(n, firmware.EV_IPL, b"x", logged=False) for n in (6, 1, 9)]
    with pytest.raises(AttestationError) as caught:
        _facts(start.then(*hidden))
    texts = [finding.message for finding in caught.value.findings]
    assert texts == ["log: PCR 1 does not replay", "log: PCR 6 does not replay"]


def test_old_shims_log_a_byte_more_than_they_measure() -> None:
    facts = _facts(PROFILES["old_shim"].boot())
    assert facts.authorities == (_sha256(VENDOR_KEY), _sha256(DISTRIBUTION_KEY))
    assert facts.sbat == "sbat,1,2023012900"


def test_shims_without_a_revocation_level() -> None:
    assert _facts(Firmware(sbat="").boot()).sbat == ""


@pytest.mark.parametrize("locality", [3, 4])
def test_pcr_0_starts_at_the_locality(locality: int) -> None:
    start = Firmware(locality=locality).boot()
    assert eventlog.parse(start.log()).locality == locality
    assert _facts(start).crtm_version == "Sim 1.2.3"
    silent = start.change(lambda m: None if m.type == firmware.EV_NO_ACTION else m)
    with pytest.raises(AttestationError, match="PCR 0 does not replay"):
        _facts(silent)


def test_separators_of_ones_are_legal() -> None:
    start = PROFILES["clean"].boot()
    ones = start.change(
        lambda m: replace(m, data=b"\xff" * 4) if m.type == firmware.EV_SEPARATOR else m
    )
    facts = _facts(ones)
    assert (facts.secure_boot, facts.firmware_error) == (True, False)


def test_a_part_of_the_root_of_trust_may_be_all_zero() -> None:
    fit = Measurement(0, boot.EV_S_CRTM_CONTENTS, b"FIT Type 0x2D Measured S-CRTM\0", bytes(4))
    start = PROFILES["clean"].boot()
    facts = _facts(replace(start, measurements=(fit, *start.measurements)))
    assert facts.secure_boot is True
    assert facts.crtm_version == ""  # may have come after the separator


def test_the_version_counts_only_before_the_separator() -> None:
    start = PROFILES["clean"].boot()
    version = boot.EV_S_CRTM_VERSION
    silent = start.change(lambda m: None if m.type == version else m)
    assert _facts(silent.then(Measurement(0, version, b"9.9.9\0"))).crtm_version == ""
    assert _facts(start.then(Measurement(0, version, b"9.9.9\0"))).crtm_version == "Sim 1.2.3"
    hidden = start.change(lambda m: replace(m, content=b"other") if m.type == version else m)
    assert _facts(hidden).crtm_version == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"F.20\0", "F.20"),
        ("1.2 b\0".encode("utf-16-le"), "1.2 b"),
        ("ü\0".encode("utf-16-le"), "hex:fc000000"),
        (bytes(range(16)), "hex:000102030405060708090a0b0c0d0e0f"),
        (b"\xff\xfe\xfd", "hex:fffefd"),
        (b"a\x1b[31m", "hex:611b5b33316d"),
        (b"\0\0", ""),
    ],
)
def test_versions_are_text_or_bytes(data: bytes, text: str) -> None:
    start = PROFILES["clean"].boot()
    told = start.change(lambda m: replace(m, data=data) if m.type == boot.EV_S_CRTM_VERSION else m)
    assert _facts(told).crtm_version == text


@pytest.mark.parametrize(
    ("data", "content", "text"),
    [
        (b"grub_cmd: ls\0", b"ls", "ls"),
        (b"grub_cmd: ls\0", b"ls\0", "ls"),
        (b"grub_cmd ls\0", b"ls", "ls"),
        (b"kernel_cmdline: quiet\0", b"quiet", "quiet"),
        (b"grub_kernel_cmdline quiet\0", b"quiet", "quiet"),
        (b"module_cmdline: a b\0", b"a b", "a b"),
        (b"plain", b"plain", "plain"),
        ("ro ü\0".encode("utf-16-le"), None, "ro ü"),
        (b"grub_cmd: menu {\n}\0", b"menu {\n}", "menu {\n}"),
        (b"grub_cmd: \xff\0", b"\xff", "hex:ff"),
        (b"grub_cmd: ls\0", b"rm", "digest:" + _sha256(b"rm")),
        (b"", b"hidden", "digest:" + _sha256(b"hidden")),
    ],
)
@pytest.mark.parametrize("pcr", [8, 12])
def test_commands_are_what_their_digest_covers(
    pcr: int, data: bytes, content: bytes | None, text: str
) -> None:
    more = Measurement(pcr, firmware.EV_IPL, data, content)
    assert _facts(PROFILES["secure_boot_off"].boot().then(more)).commands[-1] == text


def test_a_command_line_in_a_tagged_event() -> None:
    line = "quiet\0".encode("utf-16-le")
    more = Measurement(12, firmware.EV_EVENT_TAG, firmware.tagged(0x13, line), line)
    assert _facts(PROFILES["uki"].boot().then(more)).commands[-1] == "quiet"


def test_other_systems_use_pcr_11_for_something_else() -> None:
    more = Measurement(11, firmware.EV_EVENT_TAG, firmware.tagged(0x40010001, b"x"))
    assert _facts(PROFILES["clean"].boot().then(more)).uki is None


def test_remarks_of_firmware_are_no_images() -> None:
    remark = Measurement(4, 0x12, b"BOOT ATTEMPTS OMITTED")
    start = PROFILES["clean"].boot()
    assert _facts(replace(start, measurements=(remark, *start.measurements))).images == (
        _facts(start).images
    )
    unproved = replace(remark, content=b"something else")
    facts = _facts(replace(start, measurements=(unproved, *start.measurements)))
    assert hashlib.sha256(b"something else").digest() in {i.digest for i in facts.images}


def test_signature_lists_of_several_kinds() -> None:
    pair = [bytes(32), b"\1" * 32]
    body = firmware.signature_list(secureboot.CERT_SHA256, pair)
    body += firmware.signature_list(secureboot.CERT_X509, [VENDOR_KEY])
    body += firmware.signature_list(firmware.SHIM_LOCK, [b"abc", b"def"])
    entries = [*(p.hex() for p in pair), _sha256(VENDOR_KEY), _sha256(b"abc"), _sha256(b"def")]
    assert list(secureboot.signature_list(body)) == entries
    assert list(secureboot.signature_list(b"")) == []


def test_a_certificate_without_der_is_cut_behind_its_owner() -> None:
    value = firmware.OWNER + b"\x30\x82\x00\x01" + b"x"
    data = firmware.variable(secureboot.IMAGE_SECURITY, "db", value)
    start = PROFILES["clean"].boot()
    facts = _facts(start.then(Measurement(7, firmware.EV_AUTHORITY, data)))
    assert facts.authorities[-1] == _sha256(b"\x30\x82\x00\x01x")

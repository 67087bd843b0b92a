"""Boot logs that were cut, bent, relabelled or belong to another boot."""

from __future__ import annotations

import gc
import hashlib
import re
import struct
import sys
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import (
    AttestationError,
    ErrorKind,
    InvalidInputError,
    LimitError,
    SpireHwError,
)
from spire_hw.tpm import boot, eventlog, secureboot
from spire_hw.tpm.boot import BootRules
from spire_hw.tpm.inflate import inflate
from spire_hw_sim import firmware
from spire_hw_sim.again import refused_now
from spire_hw_sim.firmware import PROFILES, Boot, Firmware, Measurement

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.posture.evidence import BootFacts

BANK = "sha256"
CLEAN = PROFILES["clean"].boot()
RAW = CLEAN.log()
PCRS = CLEAN.pcrs(BANK)
HEADER = firmware.header(CLEAN.banks)
ZEROS = hashlib.sha256(bytes(4)).digest()
BOMB = zlib.compress(bytes(50_000_000), 9)


def _facts(raw: bytes, rules: BootRules = boot.STRICT) -> BootFacts:
    return boot.facts(eventlog.parse(raw), PCRS, BANK, rules)


def _of(start: Boot, rules: BootRules = boot.STRICT) -> BootFacts:
    return boot.facts(eventlog.parse(start.log()), start.pcrs(BANK), BANK, rules)


def _refusal(start: Boot, code: str, rules: BootRules = boot.STRICT) -> str:
    """Return why a boot that replays is refused."""
    raw, pcrs = start.log(), start.pcrs(BANK)
    error = refused_now(lambda: boot.facts(eventlog.parse(raw), pcrs, BANK, rules))
    assert isinstance(error, AttestationError)
    assert error.kind is ErrorKind.INVALID_ARGUMENT
    assert [finding.code for finding in error.findings] == [code]
    return error.message


def _malformed(raw: bytes, limit: type[SpireHwError] = InvalidInputError) -> str:
    error = refused_now(lambda: _facts(raw))
    assert isinstance(error, limit)
    return error.message


def _codes(raw: bytes) -> set[str]:
    """Return the reasons for which a log does not fit what was quoted."""
    error = refused_now(lambda: _facts(raw))
    assert isinstance(error, AttestationError)
    return {finding.code for finding in error.findings}


def _event(number: int, *, log: Boot = CLEAN) -> tuple[int, int]:
    """Return where event `number` begins and ends in the log."""
    sizes = [len(firmware.event(m, log.banks)) for m in log.measurements if m.logged]
    start = len(HEADER) + sum(sizes[: number - 1])
    return start, start + sizes[number - 1]


def _splice(number: int, edit: Callable[[bytes], bytes]) -> bytes:
    start, end = _event(number)
    return RAW[:start] + edit(RAW[start:end]) + RAW[end:]


def _named(name: str) -> Callable[[Measurement], bool]:
    head = struct.pack("<Q", len(name)), name.encode("utf-16-le")
    shims = name in {"SbatLevel", "Shim"}
    kind = firmware.EV_AUTHORITY if shims else firmware.EV_VARIABLE
    return lambda m: m.type == kind and (m.data[16:24], m.data[32 : 32 + len(head[1])]) == head


def _edit(matches: Callable[[Measurement], bool], **fields: object) -> Boot:
    return CLEAN.change(lambda m: replace(m, **fields) if matches(m) else m)  # type: ignore[arg-type]


def _is_separator(pcr: int) -> Callable[[Measurement], bool]:
    return lambda m: m.type == firmware.EV_SEPARATOR and m.pcr == pcr


def _variable(name: str, value: bytes, owner: bytes | None = None) -> Measurement:
    guid = owner or (secureboot.IMAGE_SECURITY if name in {"db", "dbx"} else secureboot.GLOBAL)
    return Measurement(7, firmware.EV_VARIABLE, firmware.variable(guid, name, value))


def _with_value(name: str, value: bytes, owner: bytes | None = None) -> Boot:
    changed = _variable(name, value, owner)
    return CLEAN.change(lambda m: changed if _named(name)(m) else m)


def _insert(before: Callable[[Measurement], bool], *more: Measurement) -> Boot:
    at = next(i for i, m in enumerate(CLEAN.measurements) if before(m))
    parts = (*CLEAN.measurements[:at], *more, *CLEAN.measurements[at:])
    return replace(CLEAN, measurements=parts)


def test_no_bytes_are_not_no_policy() -> None:
    assert _codes(b"") == {"log_missing"}


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (BOMB, LimitError, "log: larger than 524288 bytes"),
        (zlib.compress(bytes(524289)), LimitError, "log: larger than 524288 bytes"),
        (zlib.compress(RAW) + b"x", InvalidInputError, "log: compressed data is malformed"),
        (zlib.compress(RAW)[:-1], InvalidInputError, "log: compressed data is malformed"),
        (zlib.compress(RAW)[:-40], InvalidInputError, "log: compressed data is malformed"),
        (zlib.compress(RAW) * 2, InvalidInputError, "log: compressed data is malformed"),
        (b"", InvalidInputError, "log: compressed data is malformed"),
        (RAW, InvalidInputError, "log: compressed data is malformed"),
        (zlib.compress(RAW)[2:-4], InvalidInputError, "log: compressed data is malformed"),
    ],
)
def test_compressed_logs_are_one_bounded_stream(
    data: bytes, kind: type[SpireHwError], text: str
) -> None:
    error = refused_now(lambda: inflate(data, eventlog.MAX_BYTES, "log"))
    assert isinstance(error, kind)
    assert error.message == text


def test_a_log_of_exactly_the_limit_unpacks() -> None:
    assert len(inflate(zlib.compress(bytes(524288)), 524288, "log")) == 524288


def test_cut_anywhere() -> None:
    ends = {_event(n)[1] for n in range(1, len(CLEAN.measurements) + 1)} | {len(HEADER)}
    for size in range(1, len(RAW)):
        if size not in ends:
            text = _malformed(RAW[:size])
            # A head that begins with zeros and is cut within them may as well be padding; before
            # its first event a log is not known for what it is.
            expected = r"log: ends early in event \d+|log: \d+ bytes after the last event"
            if size < 48:
                expected += "|log: not a crypto-agile log"
            assert re.fullmatch(expected, text)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 20_000])
def test_event_larger_than_the_rest(size: int) -> None:
    start, _ = _event(3)
    place = start + 12 + 22 + 34
    raw = RAW[:place] + struct.pack("<I", size) + RAW[place + 4 :]
    assert _malformed(raw) == "log: ends early in event 3"


@pytest.mark.parametrize("count", [1, 4, 30, 68, 100, 5000])
@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_padding_after_the_last_event(byte: bytes, count: int) -> None:
    # The last event ends in text, so all that follows is padding.
    assert _malformed(RAW + byte * count) == f"log: {count} bytes after the last event"
    legacy = PROFILES["legacy"].boot().log()
    with pytest.raises(InvalidInputError, match=f"log: {count} bytes after the last event"):
        eventlog.parse(legacy + byte * count, allow_legacy=True)


def _spec(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "pcr": 0,
        "digest": bytes(20),
        "algorithms": [(4, 20), (11, 32)],
        "count": None,
        "vendor": b"\x00",
    }
    fields |= changes
    algorithms = fields["algorithms"]
    assert isinstance(algorithms, list)
    count = fields["count"] if fields["count"] is not None else len(algorithms)
    table = b"".join(struct.pack("<HH", *entry) for entry in algorithms)
    body = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, count) + table
    assert isinstance(fields["vendor"], bytes)
    body += fields["vendor"]
    return struct.pack("<II20sI", fields["pcr"], 3, fields["digest"], len(body)) + body


def test_not_crypto_agile() -> None:
    text = "log: not a crypto-agile log"
    assert _malformed(PROFILES["legacy"].boot().log()) == text
    assert _malformed(RAW[len(HEADER) :]) == text
    assert _malformed(_spec(pcr=1) + RAW[len(HEADER) :]) == text
    assert _malformed(_spec(digest=bytes(19) + b"\1") + RAW[len(HEADER) :]) == text
    assert _malformed(_spec(pcr=0xFFFFFFFF) + RAW[len(HEADER) :]) == text


def test_sha1_only_while_sha256_is_quoted() -> None:
    log = eventlog.parse(PROFILES["legacy"].boot().log(), allow_legacy=True)
    with pytest.raises(InvalidInputError, match="not a crypto-agile log"):
        boot.facts(log, PCRS, BANK)


@pytest.mark.parametrize(
    "head",
    [
        _spec(algorithms=[(4, 20), (11, 20)]),
        _spec(algorithms=[(11, 32), (11, 32)]),
        _spec(algorithms=[]),
        _spec(count=2**31),
        _spec(count=0),
        _spec(count=1),
        _spec(count=3),
        _spec(algorithms=[(4, 20), (11, 32), (0x99, 0)]),
        _spec(algorithms=[(4, 20), (11, 32), (0x99, 65)]),
        _spec(algorithms=[(i, 20) for i in range(0x100, 0x109)]),
        _spec(vendor=b"\x05abcd"),
        _spec(vendor=b"\x03abcd"),
        _spec(vendor=b""),
        struct.pack("<II20sI", 0, 3, bytes(20), 20) + b"Spec ID Event03\0" + bytes(4),
    ],
)
def test_algorithm_table(head: bytes) -> None:
    assert _malformed(head + RAW[len(HEADER) :]) == "log: algorithm table is malformed"


def _with_digests(raw: bytes, count: int, digests: bytes) -> bytes:
    return raw[:8] + struct.pack("<I", count) + digests + raw[12 + 22 + 34 :]


SHA1 = b"\x04\x00" + bytes(20)
SHA256 = b"\x0b\x00" + bytes(32)


@pytest.mark.parametrize(
    ("count", "digests"),
    [
        (0, b""),
        (1, SHA256),
        (2**32 - 1, SHA1 + SHA256),
        (3, SHA1 + SHA256),
        (3, SHA1 + SHA256 + SHA1),
        (2, SHA256 + SHA256),
        (2, b"\x05\x00" + bytes(20) + SHA256),
        (2, SHA1 + b"\x0c\x00" + bytes(48)),
    ],
)
def test_digests_of_an_event(count: int, digests: bytes) -> None:
    raw = _splice(4, lambda event: _with_digests(event, count, digests))
    assert _malformed(raw) == "log: event 4 has the wrong digests"


def test_too_many_events() -> None:
    note = firmware.event(Measurement(12, firmware.EV_IPL, b""), CLEAN.banks)
    missing = eventlog.MAX_EVENTS - len(CLEAN.measurements)
    eventlog.parse(RAW + note * missing)
    text = _malformed(RAW + note * (missing + 1), LimitError)
    assert text == "log: more than 4096 events"
    legacy = firmware.legacy_event(Measurement(12, firmware.EV_IPL, b"x"))
    with pytest.raises(LimitError, match="more than 4096 events"):
        eventlog.parse(legacy * 4097, allow_legacy=True)


def test_too_many_bytes() -> None:
    note = firmware.event(Measurement(12, firmware.EV_IPL, bytes(60_000)), CLEAN.banks)
    assert _malformed(RAW + note * 9, LimitError) == "log: larger than 524288 bytes"


@pytest.mark.parametrize("pcr", [24, 255, 0xFFFFFFFE, 0xFFFFFFFF])
def test_pcr_that_does_not_exist(pcr: int) -> None:
    raw = _splice(5, lambda event: struct.pack("<I", pcr) + event[4:])
    assert _malformed(raw) == f"log: PCR number {pcr} does not exist"


def test_but_for_the_note_at_the_end() -> None:
    note = struct.pack("<II", 0xFFFFFFFF, 3)
    agile = note + struct.pack("<I", 2) + SHA1 + SHA256 + struct.pack("<I", 5) + b"trust"
    assert _facts(RAW + agile).explained == tuple(range(24))
    assert "4294967295" in _malformed(RAW + agile + RAW[len(HEADER) :])
    legacy = PROFILES["legacy"].boot().log()
    end = note + b"\x55" * 20 + struct.pack("<I", 5) + b"trust"
    assert eventlog.parse(legacy + end, allow_legacy=True).events
    with pytest.raises(InvalidInputError, match="4294967295"):
        eventlog.parse(legacy + end * 2, allow_legacy=True)


def test_another_machine_or_boot() -> None:
    for name in ("evil_kernel", "dbx_update", "secure_boot_off"):
        raw = PROFILES[name].boot().log()
        error = refused_now(lambda raw=raw: _facts(raw))  # type: ignore[misc]
        assert re.search(r"log: PCR \d does not replay \[log_replay\]", error.message)


def test_the_changed_pcrs_are_named() -> None:
    with pytest.raises(AttestationError) as caught:
        _facts(PROFILES["evil_kernel"].boot().log())
    assert [f.message for f in caught.value.findings] == ["log: PCR 4 does not replay"]


def test_one_event_dropped_doubled_or_moved() -> None:
    for number, m in enumerate(CLEAN.measurements, 1):
        if m.pcr > 7 or m.data in {firmware.INVOCATION, firmware.SUCCESS}:
            continue
        start, end = _event(number)
        later = len(RAW)
        bent = {"dropped": RAW[:start] + RAW[end:], "doubled": RAW[:end] + RAW[start:]}
        rest = [n.pcr for n in CLEAN.measurements[number:]]
        if m.pcr in rest:
            bent["moved"] = RAW[:start] + RAW[end:later] + RAW[start:end]
        for raw in bent.values():
            assert _codes(raw) == {"log_replay"}


def test_data_exchanged_while_the_digest_stays() -> None:
    off = PROFILES["secure_boot_off"].boot()
    lied = off.change(
        lambda m: (
            replace(m, data=m.data[:-1] + b"\1", content=m.data) if _named("SecureBoot")(m) else m
        )
    )
    assert "does not match its digest" in _refusal(lied, "log_event_digest")


@pytest.mark.parametrize("name", ["SecureBoot", "PK", "KEK", "db", "dbx", "SbatLevel", "Shim"])
def test_every_byte_of_every_event_of_pcr_7(name: str) -> None:
    number = next(i for i, m in enumerate(CLEAN.measurements, 1) if _named(name)(m))
    start, end = _event(number)
    for place in range(start + 12 + 22 + 34 + 4, end, 7):
        bent = RAW[:place] + bytes((RAW[place] ^ 0x10,)) + RAW[place + 1 :]
        assert _codes(bent) == {"log_event_digest"}


@pytest.mark.parametrize(
    "kind",
    [
        firmware.EV_APPLICATION,
        firmware.EV_DRIVER,
        firmware.EV_IPL,
        firmware.EV_BLOB,
        firmware.EV_NO_ACTION,
        firmware.EV_POST_CODE,
        0x12345678,
    ],
)
def test_type_under_which_nothing_is_checked(kind: int) -> None:
    start, end = _event(next(i for i, m in enumerate(CLEAN.measurements, 1) if _named("db")(m)))
    raw = RAW[: start + 4] + struct.pack("<I", kind) + RAW[start + 8 : end] + RAW[end:]
    if kind == firmware.EV_NO_ACTION:
        assert _malformed(raw) == "log: no-action event with a digest"
        return
    error = refused_now(lambda: _facts(raw))
    assert error.message == f"log: event type {kind:08X} is not allowed in PCR 7 [log_type]"


@pytest.mark.parametrize("name", ["SecureBoot", "PK", "KEK", "db", "dbx"])
def test_variable_relabelled_as_an_authority(name: str) -> None:
    start = _edit(_named(name), type=firmware.EV_AUTHORITY)
    for rules in (boot.STRICT, BootRules(empty_secure_boot=True, early_authority=True)):
        _refusal(start, "secureboot_ambiguous", rules)


def test_authority_relabelled_as_a_variable() -> None:
    start = _edit(lambda m: m.type == firmware.EV_AUTHORITY, type=firmware.EV_VARIABLE)
    assert "comes after the separator" in _refusal(start, "log_order")


def test_an_action_that_is_none_of_pcr_7() -> None:
    more = Measurement(7, firmware.EV_ACTION, b"Something happened")
    assert "is not allowed in PCR 7" in _refusal(_insert(_named("db"), more), "log_type")


def test_an_image_relabelled_stays_an_image() -> None:
    """Whoever hides an image under another type, with its own bytes as the data, hides nothing."""
    evil = b"MZ" + bytes(200) + b"evil boot loader"
    for kind in (firmware.EV_IPL, firmware.EV_ACTION, 0x12, firmware.EV_BLOB, 0x80000010):
        for data in (evil, b"Booting Something"):
            hidden = Measurement(4, kind, data, evil)
            facts = _of(_insert(lambda m: m.data == firmware.INVOCATION, hidden))
            assert hashlib.sha256(evil).digest() in {image.digest for image in facts.images}


@pytest.mark.parametrize("pcr", range(8))
@pytest.mark.parametrize("kind", [firmware.EV_ACTION, firmware.EV_POST_CODE, firmware.EV_VARIABLE])
def test_separator_under_another_type(pcr: int, kind: int) -> None:
    text = _refusal(_edit(_is_separator(pcr), type=kind), "log_order")
    assert "separator's digest under another type" in text


@pytest.mark.parametrize("pcr", range(8))
def test_two_separators_or_none(pcr: int) -> None:
    twice = CLEAN.then(Measurement(pcr, firmware.EV_SEPARATOR, bytes(4)))
    assert f"PCR {pcr} has more than one separator" in _refusal(twice, "log_order")
    none = CLEAN.change(lambda m: None if _is_separator(pcr)(m) else m)
    assert f"PCR {pcr} has no separator" in _refusal(none, "log_order")


def test_separators_digest_far_from_the_firmware() -> None:
    fake = CLEAN.then(Measurement(9, firmware.EV_IPL, b"/boot/vmlinuz", bytes(4)))
    assert "separator's digest" in _refusal(fake, "log_order")


@pytest.mark.parametrize("data", [b"\2\0\0\0", b"", bytes(5), bytes(3)])
def test_separator_that_is_none(data: bytes) -> None:
    text = _refusal(_edit(_is_separator(3), data=data), "log_event_digest")
    assert "does not match its digest" in text


def test_separators_data_is_exchanged() -> None:
    error = _edit(_is_separator(3), data=bytes(4), content=b"\1\0\0\0")
    assert "does not match its digest" in _refusal(error, "log_event_digest")


def test_variable_after_the_separator() -> None:
    late = CLEAN.then(_variable("SecureBoot", b"\1"))
    assert "comes after the separator" in _refusal(late, "log_order")


def test_error_separator_is_a_fact_for_policy() -> None:
    error = _of(_edit(_is_separator(1), data=b"\1\0\0\0"))
    assert error.firmware_error
    assert not _of(CLEAN).firmware_error


@pytest.mark.parametrize("name", ["SecureBoot", "PK", "KEK", "db", "dbx"])
def test_variable_twice(name: str) -> None:
    again = next(m for m in CLEAN.measurements if _named(name)(m))
    text = _refusal(_insert(_is_separator(7), again), "secureboot_ambiguous")
    assert text == "log: Secure Boot state is ambiguous [secureboot_ambiguous]"
    other = _variable(name, b"\0", firmware.SHIM_LOCK)
    _refusal(_insert(_named(name), other), "secureboot_ambiguous")


@pytest.mark.parametrize("name", ["SecureBoot", "PK", "KEK", "db", "dbx"])
def test_wrong_owner(name: str) -> None:
    value = next(m for m in CLEAN.measurements if _named(name)(m)).data[32 + 2 * len(name) :]
    _refusal(_with_value(name, value, firmware.SHIM_LOCK), "secureboot_ambiguous")


@pytest.mark.parametrize("value", [b"", b"\0\0", b"\1\0", b"\2", b"\xff"])
def test_secure_boot_of_odd_size_or_value(value: bytes) -> None:
    _refusal(_with_value("SecureBoot", value), "secureboot_ambiguous")


def test_secure_boot_left_out() -> None:
    _refusal(CLEAN.change(lambda m: None if _named("SecureBoot")(m) else m), "secureboot_ambiguous")


def test_an_empty_variable_reads_as_off_where_policy_allows() -> None:
    empty = _with_value("SecureBoot", b"")
    assert _of(empty, BootRules(empty_secure_boot=True)).secure_boot is False


GUID = secureboot.GLOBAL


@pytest.mark.parametrize(
    "data",
    [
        GUID + struct.pack("<QQ", 2**63, 0),
        GUID + struct.pack("<QQ", 129, 0) + b"a\0" * 129,
        GUID + struct.pack("<QQ", 1, 2**64 - 2) + b"a\0",
        GUID + struct.pack("<QQ", 1, 9) + b"a\0" + b"12345678",
        GUID + struct.pack("<QQ", 1, 7) + b"a\0" + b"12345678",
        GUID + struct.pack("<QQ", 1, 0) + b"a",
        GUID + struct.pack("<QQ", 1, 0) + b"\x00\xd8",
        GUID + struct.pack("<QQ", 2, 0) + b"a\0\0\0",
        GUID + struct.pack("<QQ", 0, 0),
        GUID[:15],
        b"",
    ],
)
def test_variable_events(data: bytes) -> None:
    start = _insert(_named("dbx"), Measurement(7, firmware.EV_VARIABLE, data))
    number = start.measurements.index(Measurement(7, firmware.EV_VARIABLE, data)) + 1
    error = refused_now(lambda: _of(start))
    assert isinstance(error, InvalidInputError)
    assert error.message == f"log: variable event {number} is malformed"


@pytest.mark.parametrize("level", [b"sbat,1,\xff\n", b"sbat\x1b[m\n", b"s" * 129, b"a\0b\n"])
def test_revocation_level_that_is_no_text(level: bytes) -> None:
    data = firmware.variable(firmware.SHIM_LOCK, "SbatLevel", level)
    with pytest.raises(InvalidInputError, match=r"log: variable event \d+ is malformed"):
        _of(_edit(_named("SbatLevel"), data=data))


@pytest.mark.parametrize("level", [b"", b"\n", b"\0", b"\nsbat,1,2"])
def test_revocation_level_that_says_nothing(level: bytes) -> None:
    data = firmware.variable(firmware.SHIM_LOCK, "SbatLevel", level)
    _refusal(_edit(_named("SbatLevel"), data=data), "secureboot_ambiguous")


def _list(size: int, header: int, step: int, body: bytes) -> bytes:
    return secureboot.CERT_X509 + struct.pack("<III", size, header, step) + body


@pytest.mark.parametrize(
    "value",
    [
        _list(28 + 20, 0, 0, bytes(20)),
        _list(27, 0, 20, bytes(20)),
        _list(0, 0, 20, bytes(20)),
        _list(28 + 20, 0, 15, bytes(20)),
        _list(28 + 20, 0, 16, bytes(20)),
        _list(28 + 20, 0, 19, bytes(20)),
        _list(28 + 20, 21, 17, bytes(20)),
        _list(28 + 20, 2**32 - 1, 20, bytes(20)),
        _list(2**32 - 1, 0, 20, bytes(20)),
        _list(28 + 20, 0, 20, bytes(19)),
        _list(28 + 20, 0, 20, bytes(20))[:27],
        _list(28 + 20, 0, 20, bytes(20)) + b"\0",
        secureboot.CERT_SHA256 + struct.pack("<III", 28 + 20, 0, 20) + bytes(20),
    ],
)
@pytest.mark.parametrize("name", ["db", "dbx"])
def test_signature_lists(name: str, value: bytes) -> None:
    start = _with_value(name, value)
    error = refused_now(lambda: _of(start))
    assert isinstance(error, InvalidInputError)
    assert error.message == "log: signature list is malformed"


def test_authority_before_the_separator() -> None:
    early = Firmware()._authority(
        secureboot.IMAGE_SECURITY, "db", firmware.OWNER + firmware.VENDOR_KEY
    )
    start = _insert(_is_separator(7), early)
    _refusal(start, "secureboot_ambiguous")
    assert _of(start, BootRules(early_authority=True)).secure_boot is True


def test_on_without_authority_after_the_separator() -> None:
    def without(m: Measurement) -> Measurement | None:
        return None if m.type == firmware.EV_AUTHORITY and not _named("SbatLevel")(m) else m

    _refusal(CLEAN.change(without), "secureboot_ambiguous")


@pytest.mark.parametrize("name", ["PK", "KEK", "db"])
def test_on_without_keys(name: str) -> None:
    _refusal(_with_value(name, b""), "secureboot_ambiguous")
    _refusal(CLEAN.change(lambda m: None if _named(name)(m) else m), "secureboot_ambiguous")


def test_two_revocation_levels() -> None:
    newer = firmware.variable(firmware.SHIM_LOCK, "SbatLevel", b"sbat,1,2099010100\n")
    start = CLEAN.then(Measurement(7, firmware.EV_AUTHORITY, newer))
    raw = start.log()
    # Behind the hand-over nothing of firmware's may come in PCR 4 and 5; PCR 7 has its own rule.
    with pytest.raises(AttestationError, match="secureboot_ambiguous"):
        boot.facts(eventlog.parse(raw), start.pcrs(BANK), BANK)


def test_what_policies_may_demand_is_a_fact() -> None:
    facts = _of(Firmware(secure_boot=False, debug_mode=True, dma_protection=False).boot())
    assert (facts.secure_boot, facts.debug_mode, facts.dma_protection) == (False, True, False)
    facts = _of(CLEAN)
    assert (facts.secure_boot, facts.debug_mode, facts.dma_protection) == (True, False, True)


def test_revocation_state_is_a_fact() -> None:
    old, new = _of(CLEAN), _of(PROFILES["dbx_update"].boot())
    assert (old.sbat, new.sbat) == ("sbat,1,2023012900", "sbat,1,2024040900")
    assert old.dbx < new.dbx
    assert hashlib.sha256(b"revoked29").hexdigest() in new.dbx - old.dbx


LOCALITY = b"StartupLocality\0"


@pytest.mark.parametrize(
    "events",
    [
        [(0, LOCALITY + b"\3"), (0, LOCALITY + b"\3")],
        [(7, LOCALITY + b"\3")],
        [(0, LOCALITY)],
        [(0, LOCALITY + b"\3\0")],
        [(0, LOCALITY + b"\1")],
        [(0, LOCALITY + b"\2")],
        [(0, LOCALITY + b"\5")],
        [(0, LOCALITY + b"\xff")],
        [(0, b"StartupLocality3\3")],
    ],
)
def test_startup_locality(events: list[tuple[int, bytes]]) -> None:
    more = [Measurement(pcr, firmware.EV_NO_ACTION, data) for pcr, data in events]
    raw = _insert(lambda _: True, *more).log()
    assert _malformed(raw) == "log: startup locality event is malformed"


def test_no_action_with_a_digest() -> None:
    note = struct.pack("<III", 0, 3, 2) + SHA1 + b"\x0b\0" + bytes(31) + b"\1" + bytes(4)
    assert _malformed(HEADER + note + RAW[len(HEADER) :]) == "log: no-action event with a digest"


def test_no_action_that_looks_like_a_variable() -> None:
    said = replace(_variable("SecureBoot", b"\1"), type=firmware.EV_NO_ACTION)
    off = PROFILES["secure_boot_off"].boot()
    for position in (0, len(off.measurements)):
        parts = (*off.measurements[:position], said, *off.measurements[position:])
        _refusal(replace(off, measurements=parts), "log_type")
    for pcr in (0, 1, 6):
        elsewhere = off.then(replace(said, pcr=pcr))
        assert _of(elsewhere).secure_boot is False


@pytest.mark.parametrize("pcr", [4, 5])
@pytest.mark.parametrize("kind", [firmware.EV_APPLICATION, firmware.EV_ACTION, firmware.EV_IPL])
def test_measured_after_the_hand_over(pcr: int, kind: int) -> None:
    late = CLEAN.then(Measurement(pcr, kind, b"path", b"late image"))
    assert "image measured after hand-over" in _refusal(late, "log_order")


def test_the_hand_over_is_told_by_its_digest() -> None:
    renamed = _edit(lambda m: m.data == firmware.INVOCATION, data=b"x", content=firmware.INVOCATION)
    late = renamed.then(Measurement(4, firmware.EV_APPLICATION, b"path", b"late image"))
    assert "image measured after hand-over" in _refusal(late, "log_order")


FAULTS = [
    RAW[:-1],
    RAW + bytes(100),
    RAW[: len(HEADER) + 7],
    PROFILES["evil_kernel"].boot().log(),
    _spec(algorithms=[(11, 20)]),
    _splice(4, lambda event: _with_digests(event, 0, b"")),
    _edit(_is_separator(3), data=b"\2\0\0\0").log(),
]


def test_refusals_leave_nothing_behind() -> None:
    def refuse(times: int) -> None:
        for number in range(times):
            try:
                _facts(FAULTS[number % len(FAULTS)])
            except SpireHwError:
                continue
            pytest.fail("a bent log was taken")

    refuse(len(FAULTS))
    gc.collect()
    before = sys.getallocatedblocks()
    refuse(10_000)
    gc.collect()
    assert sys.getallocatedblocks() - before < 1000

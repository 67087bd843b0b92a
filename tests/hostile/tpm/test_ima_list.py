"""Measurement lists that were cut, bent, rewritten or belong to another boot."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
import zlib
from dataclasses import replace

import pytest

from spire_hw.errors import (
    AttestationError,
    ErrorKind,
    InvalidInputError,
    LimitError,
    SpireHwError,
)
from spire_hw.posture.evidence import ImaFacts, ImaState
from spire_hw.tpm import ima, imalist
from spire_hw.tpm.inflate import inflate
from spire_hw_sim.again import refused_now
from spire_hw_sim.firmware import PROFILES
from spire_hw_sim.imawriter import ImaList, Item

BANK = "sha256"
BOOT = PROFILES["clean"].boot()
VALUES = BOOT.values(BANK)
LIST = ImaList.start(VALUES).files(20)
DIGEST = hashlib.sha256(b"content").digest()
DENIED = ErrorKind.PERMISSION_DENIED


def _pcrs(pcr: bytes, *, loaders: bool = True) -> dict[tuple[str, int], bytes]:
    values = {n: VALUES[n] for n in range(10 if loaders else 8)}
    return {(BANK, n): value for n, value in values.items()} | {(BANK, 10): pcr}


def _replay(data: bytes, pcr: bytes, start: ImaState | None = None, **more: object) -> ImaFacts:
    return ima.replay([data], start, _pcrs(pcr), BANK, **more)  # type: ignore[arg-type]


def _state(count: int, source: ImaList = LIST) -> ImaState:
    return ImaState(count, source.pcr(BANK, count), bytes(32))


def _refusal(
    data: bytes, pcr: bytes, start: ImaState | None = None, **more: object
) -> tuple[str, ErrorKind, str]:
    error = refused_now(lambda: _replay(data, pcr, start, **more))
    assert isinstance(error, AttestationError)
    (finding,) = error.findings
    return finding.code, error.kind, finding.message


def _malformed(
    data: bytes, kind: type[SpireHwError] = InvalidInputError, start: ImaState | None = None
) -> str:
    pcr = LIST.pcr()
    error = refused_now(lambda: _replay(data, pcr, start))
    assert isinstance(error, kind)
    return error.message


def _lines(number: int, line: bytes) -> bytes:
    """Return the list with line `number` replaced."""
    lines = LIST.ascii().split(b"\n")
    lines[number - 1] = line
    return b"\n".join(lines)


LINE = LIST.items[4].line()
COLUMN, NAMED, PATH = LINE.split(b" ")[1], LINE.split(b" ")[3], LINE.split(b" ")[4]


def test_unpacks_to_too_much() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    error = refused_now(lambda: inflate(bomb, imalist.PART_BYTES, "ima"))
    assert isinstance(error, LimitError)
    assert error.message == "ima: larger than 786432 bytes"
    assert "part larger than 786432 bytes" in _malformed(LINE * 10_000, LimitError)


def test_too_much_in_parts() -> None:
    part = (LINE + b"\n") * (imalist.PART_BYTES // (len(LINE) + 1))
    with pytest.raises(LimitError, match="ima: larger than 8388608 bytes"):
        ima.replay([part] * 11, None, _pcrs(LIST.pcr()), BANK)


@pytest.mark.parametrize("form", ["ascii", "binary"])
def test_too_many_entries(form: str) -> None:
    item = Item(b"x", bytes(20), "ima", "sha1")
    unit = item.line() + b"\n" if form == "ascii" else item.record()
    # A line takes 88 bytes and more, so that the bytes are too many before the entries are.
    assert form == "binary" or len(unit) * 100_001 > imalist.MAX_BYTES
    if form == "ascii":
        assert _malformed(b"10 \n" * 100_001, LimitError) == "ima: more than 100000 entries"
        return
    part = unit * (imalist.PART_BYTES // len(unit))
    with pytest.raises(LimitError, match="ima: more than 100000 entries"):
        ima.replay([part] * 8, None, _pcrs(LIST.pcr()), BANK)


@pytest.mark.parametrize("size", [8193, 9000, 100_000])
def test_long_lines(size: int) -> None:
    for data in (
        _lines(5, b"10 " + b"a" * (size - 3)),
        _lines(21, b"10 " + b"a" * (size - 3)),
        LIST.ascii() + b"1" * size,
    ):
        assert _malformed(data, LimitError) == "ima: line longer than 8192 bytes"
    long = LIST.measure(Item(b"/a", DIGEST, "ima-buf", extra=bytes(size))).files(3)
    with pytest.raises(LimitError, match="ima: line longer than 8192 bytes"):
        _replay(long.binary(), long.pcr())


def test_lines_of_the_limit_are_read() -> None:
    long = LIST.measure(Item(b"/a", DIGEST, "ima-buf", extra=bytes(4000)))
    assert _replay(long.ascii(), long.pcr()).entries[-1].template == "ima-buf"


# Formats of one's own that are not read: names, digests or fields are missing, twice or unknown.
OWN_FORMS = [
    b"d-ng",
    b"n-ng",
    b"d-ng|",
    b"d-ng|n-ng|",
    b"|d-ng|n-ng",
    b"n-ng|d-ng",
    b"d|n",
    b"d-ng|n",
    b"d-ng|n-ng|n-ng",
    b"d-ng|n-ng|d-ng",
    b"d-ng|n-ng|sig|sig",
    b"d-ng|n-ng|SIG",
    b"d-ng|n-ng|ns",
    b"d-ng|n-ng" + b"|sig" * 14,
    b"d-ng|n-ng|" + b"x" * 300,
]


def _evm(*columns: bytes) -> bytes:
    return b" ".join([LINE.replace(b"ima-ng", b"evm-sig"), *columns])


MALFORMED_LINES = [
    b"",
    b"10",
    b"10 " + COLUMN,
    b"10 " + COLUMN + b" ima-ng",
    b"10 " + COLUMN + b" ima-ng " + NAMED,
    LINE + b" ",
    LINE + b" 00",
    b" " + LINE,
    LINE.replace(b" ", b"  ", 1),
    LINE.replace(b" ", b"\t"),
    b"010" + LINE[2:],
    b"9" + LINE[2:],
    b"11" + LINE[2:],
    b"+10" + LINE[2:],
    LINE.replace(COLUMN, COLUMN.upper()),
    LINE.replace(COLUMN, COLUMN[:-1]),
    LINE.replace(COLUMN, COLUMN[:-2]),
    LINE.replace(COLUMN, b"g" + COLUMN[1:]),
    LINE.replace(COLUMN, b""),
    LINE.replace(NAMED, NAMED.upper()),
    LINE.replace(NAMED, b"sha256:" + NAMED[7:].upper()),
    LINE.replace(NAMED, NAMED[:-1]),
    LINE.replace(NAMED, NAMED[:-2]),
    LINE.replace(NAMED, NAMED + b"00"),
    LINE.replace(NAMED, NAMED.replace(b":", b"")),
    LINE.replace(NAMED, NAMED.replace(b"sha256", b"sha1")),
    LINE.replace(NAMED, NAMED.replace(b"sha256", b"crc32")),
    LINE.replace(NAMED, NAMED[7:]),
    LINE.replace(b"ima-ng", b"ima-xx"),
    LINE.replace(b"ima-ng", b"ima-sig"),
    LINE.replace(b"ima-ng", b"ima-buf"),
    LINE.replace(b"ima-ng", b"ima"),
    LINE.replace(PATH, b"/usr/bin/\xff\xfe"),
    LINE.replace(PATH, b"/usr/bin/\xed\xa0\x80"),
    LINE.replace(PATH, b"/usr/bin/a\x00b"),
    LINE.replace(PATH, b""),
    LINE.replace(b"ima-ng", b"ima-sig") + b" 0",
    LINE.replace(b"ima-ng", b"ima-sig") + b" 0x00",
    LINE.replace(b"ima-ng", b"ima-sig") + b" AA",
    LINE.replace(b"ima-ng", b"ima-sig") + b" 00 ",
    b"10 " + COLUMN + b" ima " + b"0" * 40 + b" " + b"a" * 256,
    b"10 " + COLUMN + b" ima " + b"0" * 38 + b" /a",
    b"10 " + COLUMN + b" ima " + b"A" * 40 + b" /a",
    LINE.replace(b"ima-ng", b"ima-ngv2"),
    LINE.replace(NAMED, b"ima:" + NAMED),
    LINE.replace(b"ima-ng", b"ima-ngv2").replace(NAMED, b"evm:" + NAMED),
    LINE.replace(b"ima-ng", b"ima-ngv2").replace(NAMED, b"IMA:" + NAMED),
    LINE.replace(b"ima-ng", b"ima-ngv2").replace(NAMED, b":" + NAMED),
    LINE.replace(b"ima-ng", b"ima-ngv2").replace(NAMED, b"ima:verity:" + NAMED),
    LINE.replace(b"ima-ng", b"ima-ngv2").replace(NAMED, b"verity:" + NAMED[:-2]),
    LINE.replace(b"ima-ng", b"ima-ngv2").replace(NAMED, b"verity:" + NAMED[7:]),
    LINE.replace(b"ima-ng", b"ima-sigv2").replace(NAMED, b"ima:" + NAMED),
    LINE.replace(b"ima-ng", b"ima-modsig"),
    LINE.replace(b"ima-ng", b"ima-modsig") + b" ",
    LINE.replace(b"ima-ng", b"ima-modsig") + b"  ",
    LINE.replace(b"ima-ng", b"ima-modsig") + b"    ",
    LINE.replace(b"ima-ng", b"ima-modsig") + b"  " + NAMED + b" ",
    LINE.replace(b"ima-ng", b"ima-modsig") + b"   3082",
    LINE.replace(b"ima-ng", b"ima-modsig") + b"  ima:" + NAMED + b" 3082",
    LINE.replace(b"ima-ng", b"ima-modsig") + b"  " + NAMED[:-2] + b" 3082",
    LINE.replace(b"ima-ng", b"ima-modsig") + b"  " + NAMED[7:] + b" 3082",
    LINE.replace(b"ima-ng", b"ima-modsig") + b"  " + NAMED + b" 308",
    LINE.replace(b"ima-ng", b"ima-modsig") + b" AA " + NAMED + b" 3082",
    _evm(),
    _evm(b"", b"", b"", b"", b"", b""),
    _evm(b"", b"", b"", b"", b"", b"", b"", b""),
    _evm(b"AA", b"", b"", b"", b"", b"", b""),
    _evm(b"", b"", b"0", b"", b"", b"", b""),
    _evm(b"", b"", b"", b"0x", b"", b"", b""),
    _evm(b"", b"", b"", b"", b"4294967296", b"0", b"0"),
    _evm(b"", b"", b"", b"", b"0", b"99999999999999999999", b"0"),
    _evm(b"", b"", b"", b"", b"0", b"0", b"65536"),
    *(_evm(b"", b"", b"", b"", n, b"0", b"0") for n in (b"-1", b"+1", b"01", b"0x1", b"1_0")),
    _evm(b"", b"", b"", b"", b"\xd9\xa1", b"0", b"0"),
    *(LINE.replace(b"ima-ng", form) for form in OWN_FORMS),
    LINE.replace(b"ima-ng", b"d-ng|n-ng|sig"),
    LINE.replace(b"ima-ng", b"d-ng|n-ng|iuid") + b" x",
    LINE.replace(b"ima-ng", b"d-ng|n-ng") + b" ",
    LINE.replace(b"ima-ng", b"d-ngv2|n-ng"),
    LINE.replace(b"ima-ng", b"d-ng|n-ng|d-modsig|modsig") + b" " + NAMED + b" ",
]


@pytest.mark.parametrize("line", MALFORMED_LINES)
def test_malformed_line(line: bytes) -> None:
    assert _malformed(_lines(5, line)) == "ima: line 5 is malformed"


def test_the_last_line_lacks_its_end() -> None:
    assert _malformed(LIST.ascii()[:-1]) == "ima: line 21 is malformed"


@pytest.mark.parametrize(
    "line", [b"10 " + COLUMN + b" ima-ng " + NAMED, LINE.replace(NAMED, b"x"), b""]
)
def test_lines_are_numbered_over_all_parts(line: bytes) -> None:
    lines = LIST.ascii(first=11).split(b"\n")
    lines[3] = line
    text = _malformed(b"\n".join(lines), start=_state(11))
    assert text == "ima: line 15 is malformed"


def _evm_record(*fields: bytes) -> bytes:
    return _record(NAMED_A + b"".join(map(_field, fields)), b"evm-sig")


RECORD = LIST.items[4].record()
BODY = LIST.items[4].body()


def _record(body: bytes, template: bytes = b"ima-ng", pcr: int = 10) -> bytes:
    head = struct.pack("<I20sI", pcr, hashlib.sha1(body).digest(), len(template))  # noqa: S324
    return head + template + struct.pack("<I", len(body)) + body


def _field(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


NG = _field(b"sha256:\0" + DIGEST)
NAMED_A = NG + _field(b"/a\0")
TYPED = _field(b"ima:sha256:\0" + DIGEST)
MALFORMED_RECORDS = [
    RECORD[:-1],
    RECORD[:20],
    _record(BODY, pcr=9),
    _record(BODY, pcr=0x0A00000A),
    _record(BODY, b"ima-xx"),
    _record(BODY, b""),
    _record(BODY, b"ima-sig"),
    _record(BODY + b"\0"),
    _record(BODY[:-1]),
    _record(b""),
    _record(NG),
    _record(NG + _field(b"")),
    _record(NG + _field(b"\0")),
    _record(NG + _field(b"/a")),
    _record(NG + _field(b"/a\0\0")),
    _record(NG + _field(b"/\0a\0")),
    _record(NG + _field(b"/\xff\0")),
    _record(NG + struct.pack("<I", 2**32 - 1) + b"/a\0"),
    _record(struct.pack("<I", 2**31) + b"sha256:\0" + DIGEST + _field(b"/a\0")),
    _record(_field(b"sha256:" + DIGEST) + _field(b"/a\0")),
    _record(_field(b"sha256\0" + DIGEST) + _field(b"/a\0")),
    _record(_field(b"sha1:\0" + DIGEST) + _field(b"/a\0")),
    _record(_field(b"crc:\0" + DIGEST) + _field(b"/a\0")),
    _record(NG + _field(b"/a\0") + _field(b"x")),
    _record(NG + _field(b"/a\0"), b"ima-buf"),
    _record(NG + _field(b"/a\0") + struct.pack("<I", 9) + b"x", b"ima-sig"),
    _record(NG + _field(b"/a\0"), b"ima-ngv2"),
    _record(TYPED + _field(b"/a\0")),
    _record(_field(b"ima:sha256\0" + DIGEST) + _field(b"/a\0"), b"ima-ngv2"),
    _record(_field(b"evm:sha256:\0" + DIGEST) + _field(b"/a\0"), b"ima-ngv2"),
    _record(_field(b"verity:sha1:\0" + DIGEST) + _field(b"/a\0"), b"ima-ngv2"),
    _record(TYPED + _field(b"/a\0"), b"ima-sigv2"),
    _record(NAMED_A, b"ima-modsig"),
    _record(NAMED_A + _field(b""), b"ima-modsig"),
    _record(NAMED_A + 2 * _field(b""), b"ima-modsig"),
    _record(NAMED_A + 4 * _field(b""), b"ima-modsig"),
    _record(NAMED_A + _field(b"") + NG + _field(b""), b"ima-modsig"),
    _record(NAMED_A + 2 * _field(b"") + _field(b"\x30"), b"ima-modsig"),
    _record(NAMED_A + _field(b"") + TYPED + _field(b"\x30"), b"ima-modsig"),
    _record(NAMED_A + _field(b"") + NG[:-1] + _field(b"\x30"), b"ima-modsig"),
    _record(NAMED_A + _field(b"") + NG + struct.pack("<I", 2**32 - 1), b"ima-modsig"),
    _evm_record(),
    _evm_record(*6 * (b"",)),
    _evm_record(*8 * (b"",)),
    _evm_record(b"", b"security.ima", *5 * (b"",)),
    _evm_record(b"", b"a\0b\0", *5 * (b"",)),
    _evm_record(b"", b"\0\0", *5 * (b"",)),
    *(_evm_record(*4 * (b"",), bytes(n), b"", b"") for n in (1, 2, 3, 5, 8)),
    *(_evm_record(*6 * (b"",), bytes(n)) for n in (1, 3, 4)),
    *(_record(NAMED_A, form) for form in OWN_FORMS),
    _record(NAMED_A, b"d-ng|n-ng|sig"),
    _record(NAMED_A + _field(b""), b"d-ng|n-ng"),
    _record(NAMED_A + _field(bytes(2)), b"d-ng|n-ng|iuid"),
    struct.pack("<I20sI", 10, bytes(20), 2**32 - 1) + b"ima-ng",
    struct.pack("<I20sI", 10, bytes(20), 3) + b"ima" + bytes(20) + _field(b""),
    struct.pack("<I20sI", 10, bytes(20), 3) + b"ima" + bytes(20) + _field(b"a" * 256),
    struct.pack("<I20sI", 10, bytes(20), 3) + b"ima" + bytes(20) + _field(b"a\0b"),
    struct.pack("<I20sI", 10, bytes(20), 3) + b"ima" + bytes(19),
]


@pytest.mark.parametrize("record", MALFORMED_RECORDS)
def test_malformed_record(record: bytes) -> None:
    first = replace(LIST, items=LIST.items[:4]).binary()
    # What follows must not make up for what is missing.
    tail = b"" if record in {RECORD[:-1], RECORD[:20]} else LIST.binary(5)
    assert _malformed(first + record + tail) == "ima: line 5 is malformed"


@pytest.mark.parametrize("form", ["ascii", "binary"])
def test_cut_anywhere(form: str) -> None:
    short = ImaList.start(VALUES).files(2, "ima-sig")
    data = short.ascii() if form == "ascii" else short.binary()
    items = [item.line() + b"\n" if form == "ascii" else item.record() for item in short.items]
    whole = {len(b"".join(items[:n])) for n in range(4)}
    for size in range(1, len(data)):
        with pytest.raises((AttestationError, InvalidInputError)) as caught:
            _replay(data[:size], short.pcr())
        if size not in whole:
            assert "is malformed" in str(caught.value)


def test_template_hash_does_not_match_the_fields() -> None:
    lie = LIST.items[4].line().replace(b"tool3", b"tool9")
    code, kind, text = _refusal(_lines(5, lie), LIST.pcr())
    assert (code, kind) == ("ima_hash", ErrorKind.INVALID_ARGUMENT)
    assert text == "ima: line 5 does not match its hash"
    other = LIST.items[5].line().split(b" ")[1]
    assert _refusal(_lines(5, LINE.replace(COLUMN, other)), LIST.pcr())[0] == "ima_hash"
    record = LIST.items[4].record().replace(b"tool3", b"tool9")
    data = replace(LIST, items=LIST.items[:4]).binary() + record + LIST.binary(5)
    assert _refusal(data, LIST.pcr())[0] == "ima_hash"


@pytest.mark.parametrize("bank", ["sha256", "sha384", "sha512"])
def test_in_lists_per_bank(bank: str) -> None:
    data = LIST.ascii(bank=bank)
    assert _replay(data, LIST.pcr()).state.count == 21
    code, _, text = _refusal(data.replace(b"tool3", b"tool9"), LIST.pcr())
    assert (code, text) == ("ima_hash", "ima: line 5 does not match its hash")


def test_no_prefix_replays() -> None:
    for pcr in (b"\xff" * 32, LIST.files(1).pcr(), LIST.measure(LIST.items[3]).pcr()):
        code, kind, text = _refusal(LIST.ascii(), pcr)
        assert (code, kind) == ("ima_replay", ErrorKind.INVALID_ARGUMENT)
        assert text == "ima: list does not replay to PCR 10"
    # Nothing was measured, so no entry of the list counts.
    assert _refusal(LIST.ascii(), bytes(32))[0] == "boot_aggregate"


def test_entries_dropped_doubled_swapped_or_rewritten() -> None:
    items = LIST.items
    for number in range(1, len(items)):
        bent = [
            (*items[:number], *items[number + 1 :]),
            LIST.changed(number, DIGEST).items,
        ]
        if number + 1 < len(items):
            bent.append((*items[:number], items[number], *items[number:]))
            bent.append((*items[:number], items[number + 1], items[number], *items[number + 2 :]))
        for order in bent:
            data = ImaList(tuple(order))
            for text in (data.ascii(), data.binary()):
                assert _refusal(text, LIST.pcr())[0] == "ima_replay"


def test_no_boot_aggregate() -> None:
    none = ImaList(LIST.items[1:])
    code, kind, text = _refusal(none.ascii(), none.pcr())
    assert (code, kind) == ("boot_aggregate", ErrorKind.INVALID_ARGUMENT)
    assert text == "ima: boot aggregate does not match"
    late = ImaList((LIST.items[1], LIST.items[0], *LIST.items[2:]))
    assert _refusal(late.ascii(), late.pcr())[0] == "boot_aggregate"
    violated = ImaList((replace(LIST.items[1], violation=True), *LIST.items))
    assert _refusal(violated.ascii(), violated.pcr())[0] == "boot_aggregate"


def test_boot_aggregate_as_a_violation() -> None:
    violated = ImaList((replace(LIST.items[0], violation=True), *LIST.items[1:]))
    assert _refusal(violated.ascii(), violated.pcr())[0] == "boot_aggregate"


def test_boot_aggregate_twice() -> None:
    twice = LIST.measure(LIST.items[0]).files(1)
    assert _refusal(twice.ascii(), twice.pcr())[0] == "boot_aggregate"
    # In a later part as well.
    assert _refusal(twice.ascii(21), twice.pcr(), _state(21))[0] == "boot_aggregate"


def test_boot_aggregate_of_another_boot() -> None:
    other = ImaList.start(PROFILES["evil_kernel"].boot().values(BANK)).files(3)
    assert _refusal(other.ascii(), other.pcr())[0] == "boot_aggregate"
    zero = other.changed(0, bytes(32))
    assert _refusal(zero.ascii(), zero.pcr())[0] == "boot_aggregate"


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha384", "sm3"])
def test_boot_aggregate_of_a_bank_that_was_not_quoted(algorithm: str) -> None:
    size = {"md5": 16, "sha1": 20, "sha384": 48, "sm3": 32}[algorithm]
    first = Item(b"boot_aggregate", bytes(size), algorithm=algorithm)
    listed = ImaList((first, *LIST.items[1:]))
    assert _refusal(listed.ascii(), listed.pcr())[0] == "boot_aggregate"


def test_both_forms_of_the_aggregate_follow_from_the_quote_or_the_log() -> None:
    logged = {(BANK, n): VALUES[n] for n in range(24)}
    for loaders in (False, True):
        listed = ImaList.start(VALUES, loaders=loaders).files(2)
        assert _replay(listed.ascii(), listed.pcr()).state.count == 3
        # PCR 8 and 9 were not quoted, or something was added to PCR 9 since.
        bare = _pcrs(listed.pcr(), loaders=False)
        moved = {**bare, (BANK, 8): VALUES[8], (BANK, 9): DIGEST}
        for pcrs in (bare, moved):
            facts = ima.replay([listed.ascii()], None, pcrs, BANK, logged=logged)
            assert facts.state.count == 3
    with pytest.raises(AttestationError, match="boot aggregate"):
        ima.replay([listed.ascii()], None, bare, BANK)


def test_a_sha1_aggregate_covers_firmware_alone() -> None:
    sha1 = PROFILES["clean"].boot().values("sha1")
    pcrs = _pcrs(b"") | {("sha1", n): sha1[n] for n in range(10)}
    for loaders in (False, True):
        listed = ImaList.start(sha1, algorithm="sha1", loaders=loaders).files(2)
        pcrs[BANK, 10] = listed.pcr()
        if loaders:
            with pytest.raises(AttestationError, match="boot aggregate"):
                ima.replay([listed.ascii()], None, pcrs, BANK)
        else:
            assert ima.replay([listed.ascii()], None, pcrs, BANK).state.count == 3


def test_contradicts_what_is_known() -> None:
    rewritten = LIST.changed(7, DIGEST).files(5, prefix="/opt/")
    code, kind, text = _refusal(rewritten.ascii(), rewritten.pcr(), known=_state(12))
    assert (code, kind, text) == ("ima_rollback", DENIED, "ima: list was rewritten")
    assert _replay(rewritten.ascii(), rewritten.pcr(), known=_state(7)).state.count == 26
    assert _replay(LIST.ascii(), LIST.pcr(), known=_state(12)).state.count == 21
    assert _replay(LIST.ascii(), LIST.pcr(), known=_state(0)).state.count == 21


def test_gap_or_overlap() -> None:
    for first in (9, 11, 0, 20):
        code, kind, _ = _refusal(LIST.ascii(first), LIST.pcr(), _state(10))
        assert (code, kind) == ("ima_replay", ErrorKind.INVALID_ARGUMENT)
    assert _replay(LIST.ascii(10), LIST.pcr(), _state(10)).state.count == 21


def test_fewer_entries_than_before() -> None:
    data, pcr = LIST.ascii(), LIST.pcr(count=9)
    code, kind, _ = _refusal(data, pcr, known=_state(12))
    assert (code, kind) == ("ima_rollback", DENIED)
    later = ImaState(3, LIST.pcr(count=3), bytes(32))
    code, _, _ = _refusal(LIST.ascii(3), pcr, later, known=_state(12))
    assert code == "ima_rollback"
    code, _, _ = _refusal(LIST.ascii(3), pcr, later, known=_state(2))
    assert code == "ima_rollback"


def test_after_a_reset_the_old_place_is_worth_nothing() -> None:
    fresh = ImaList.start(VALUES).files(30, prefix="/opt/")
    assert _refusal(fresh.ascii(21), fresh.pcr(), _state(21))[0] == "ima_replay"


@pytest.mark.parametrize("form", ["ascii", "binary"])
def test_violations_are_counted_and_vouch_for_nothing(form: str) -> None:
    listed = LIST
    for number in range(7):
        item = Item(b"/var/log/%d" % number, bytes(32), violation=True)
        listed = listed.measure(item).files(1, prefix=f"/opt/{number}/")
    data = listed.ascii() if form == "ascii" else listed.binary()
    facts = _replay(data, listed.pcr())
    assert (facts.violations, facts.state.count, len(facts.entries)) == (7, 35, 27)
    assert not any(entry.path.startswith(b"/var/log") for entry in facts.entries)


def test_a_violation_that_was_none() -> None:
    """An entry blanked out afterwards no longer replays."""
    blank = LINE.replace(COLUMN, b"0" * 40)
    assert _refusal(_lines(5, blank), LIST.pcr())[0] == "ima_replay"


@pytest.mark.parametrize("size", [0, 3, 2000])
def test_signature_of_any_size_is_a_fact(size: int) -> None:
    signed = LIST.measure(Item(b"/a", DIGEST, "ima-sig", extra=b"\3" * size))
    for data in (signed.ascii(), signed.binary()):
        entry = _replay(data, signed.pcr()).entries[-1]
        assert (entry.path, entry.signature, entry.digest) == (b"/a", b"\3" * size, DIGEST)


def test_names_are_bytes() -> None:
    names = [b"/a/../b", b"/\x1b[31m", b"/x\\nb", b"/tab\there", b"/\xc3\xa9", b"/\r", b"/a_b"]
    listed = LIST.measure(*(Item(name, DIGEST) for name in names))
    for data in (listed.ascii(), listed.binary()):
        assert [e.path for e in _replay(data, listed.pcr()).entries[-7:]] == names


def test_a_newline_in_a_name_only_fits_the_binary_form() -> None:
    listed = LIST.measure(Item(b"/tmp/a\n10 b", DIGEST)).files(2)
    assert _replay(listed.binary(), listed.pcr()).entries[-3].path == b"/tmp/a\n10 b"
    text, pcr = listed.ascii(), listed.pcr()
    assert refused_now(lambda: _replay(text, pcr)).kind is ErrorKind.INVALID_ARGUMENT


def test_padded_sha1_needs_leave() -> None:
    old = ImaList.start(VALUES, padded=True).files(5)
    old = old.measure(Item(b"/v", bytes(32), violation=True)).files(2, prefix="/opt/")
    for data in (old.ascii(), old.binary(), old.ascii(bank="sha256")):
        code, kind, text = _refusal(data, old.pcr())
        assert (code, kind) == ("ima_padded_sha1", DENIED)
        assert text == "ima: kernel extends SHA-1 into the SHA-256 bank"
        facts = _replay(data, old.pcr(), allow_padded_sha1=True)
        assert (facts.padded_sha1, facts.state.count, facts.violations) == (True, 9, 1)
    assert not _replay(LIST.ascii(), LIST.pcr(), allow_padded_sha1=True).padded_sha1


@pytest.mark.parametrize("form", ["ascii", "binary"])
def test_memory_goes_with_the_size_of_a_list(form: str) -> None:
    """The largest list takes less than 64 MiB."""
    unit = Item(b"1", bytes(16), algorithm="md5")
    data = unit.line() + b"\n" if form == "ascii" else unit.record()
    share = 16
    data *= min(imalist.MAX_BYTES // len(data), imalist.MAX_ENTRIES) // share
    tracemalloc.start()
    with pytest.raises(AttestationError, match="does not replay"):
        _replay(data, LIST.pcr())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 1024 * 1024 // share


def test_no_list_at_all() -> None:
    code, kind, text = _refusal(b"", bytes(32))
    assert (code, kind, text) == ("ima_missing", ErrorKind.INVALID_ARGUMENT, "ima: list is missing")

"""Lines of the audit log: one spelling, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw_signer.audit.record import (
    MAX_LINE_BYTES,
    MAX_TEXT,
    NO_HEAD,
    Kind,
    Record,
    check_word,
    cut,
    encode,
    load_canonical,
    parse,
    parse_time,
    time_text,
)

TIME = "2026-11-22T08:12:00.000001Z"
BOOT = "01234567-89ab-cdef-0123-456789abcdef"
BODIES: dict[Kind, dict[str, Any]] = {
    Kind.START: {"log": "0" * 32},
    Kind.INTENT: {
        "client": "spiffe://infra.example/s",
        "cert": "",
        "peer": "192.0.2.1:1",
        "method": "Sign",
        "request": "00",
        "key": "k",
        "generation": 1,
        "fingerprint": "",
        "hash": "sha256",
        "digest": "",
        "policy": "",
    },
    Kind.OUTCOME: {
        "intent": 1,
        "result": "done",
        "reason": "",
        "latency": 5,
        "made_generation": 0,
        "made_fingerprint": "",
    },
    Kind.NOTE: {"event": "start", "fields": {"version": "1"}},
    Kind.ORDER: {
        "nonce": "0" * 32,
        "action": "key.restore",
        "target": "t",
        "expires": TIME,
        "operators": ["alice"],
        "comment": "",
        "head": "0" * 64,
        "at": 1,
        "accepted": 1,
        "reason": "",
    },
    Kind.CHECKPOINT: {
        "log": "0" * 32,
        "at": 1,
        "head": "0" * 64,
        "taken": TIME,
        "clock": "",
        "key": "0" * 64,
        "signature": "30",
    },
    Kind.ROTATION: {
        "log": "0" * 32,
        "file": "audit-0000000000000001.log",
        "open": [1],
        "orders": {},
    },
    Kind.RECOVERY: {"event": "torn", "bytes": 3, "digest": "0" * 64, "content": "00"},
    Kind.SEAL: {
        "log": "0" * 32,
        "file": "audit-0000000000000001.log",
        "digest": "0" * 64,
        "good": 4,
        "fault": "edited",
        "operators": ["uid=0"],
        "comment": "looked at",
        "open": [],
        "orders": {"0" * 32: TIME},
    },
}
BODIES[Kind.REFUSAL] = {**BODIES[Kind.INTENT], "reason": "key_id", "class": 3, "count": 1}
RECORDS = [Record(7, TIME, 9, BOOT, kind, NO_HEAD, body) for kind, body in BODIES.items()]


def test_every_kind_is_written_and_read() -> None:
    assert {record.kind for record in RECORDS} == set(Kind)
    for record in RECORDS:
        assert parse(encode(record)) == record


@given(
    client=st.text(max_size=MAX_TEXT),
    seq=st.integers(1, 2**63 - 1),
    mono=st.integers(0, 2**63 - 1),
    prev=st.binary(min_size=32, max_size=32),
)
def test_any_text_survives_on_one_ascii_line(client: str, seq: int, mono: int, prev: bytes) -> None:
    body = {**BODIES[Kind.INTENT], "client": client}
    line = encode(Record(seq, TIME, mono, "", Kind.INTENT, prev, body))
    assert line.isascii()
    assert b"\n" not in line
    assert parse(line) == Record(seq, TIME, mono, "", Kind.INTENT, prev, body)


@given(st.binary(max_size=400))
def test_reading_is_total(data: bytes) -> None:
    try:
        record = parse(data)
    except EncodingError:
        return
    assert encode(record) == data


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.kind.value)
def test_every_changed_character_is_another_record_or_none(record: Record) -> None:
    line = encode(record)
    for place in range(len(line)):
        for other in (b"0", b"x", b'"', b"\\", b" "):
            changed = line[:place] + other + line[place + 1 :]
            if changed == line:
                continue
            try:
                assert encode(parse(changed)) == changed
            except EncodingError:
                continue


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.kind.value)
def test_members_are_neither_missing_nor_added(record: Record) -> None:
    members = json.loads(encode(record))
    for name in members:
        left = {k: v for k, v in members.items() if k != name}
        with pytest.raises(EncodingError, match=r"is missing|missing or not known"):
            parse(spelled(left))
    with pytest.raises(EncodingError, match="zzz is not known"):
        parse(spelled({**members, "zzz": 1}))
    with pytest.raises(EncodingError, match="twice"):
        parse(encode(record)[:-1] + b',"kind":"note"}')


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.kind.value)
def test_values_have_one_type(record: Record) -> None:
    members = json.loads(encode(record))
    for name in members:
        for wrong in (None, True, -1, 1.5, [[]], {"a": [1]}, "\x00" * 600, 2**63):
            with pytest.raises(EncodingError):
                parse(spelled({**members, name: wrong}))


def spelled(members: dict[str, Any]) -> bytes:
    return json.dumps(members, sort_keys=True, separators=(",", ":")).encode()


def test_other_spellings_are_refused() -> None:
    line = encode(RECORDS[1])
    for other in (
        line.replace(b'"seq":7', b'"seq":07'),
        line.replace(b'"seq":7', b'"seq": 7'),
        line.replace(b'"seq":7', b'"seq":7.0'),
        line.replace(b'"seq":7', b'"seq":' + b"7" * 5000),
        line.replace(b"infra", b"\\u0069nfra"),
        line.replace(b"infra", "ïnfra".encode()),
        line.replace(b"08:12:00", b"08:12:61"),
        line.replace(b"2026-11-22", b"2026-11-31"),
        line.replace(b"2026-11-22T", b"2026-11-22 "),
        line.replace(b"cdef", b"CDEF", 1),
        line + b" ",
        b"\xef\xbb\xbf" + line,
        b"[" * 100_000,
        b"{}",
        b"",
        b"null",
        b"x" * (MAX_LINE_BYTES + 1),
    ):
        assert other != line
        with pytest.raises(EncodingError):
            parse(other)


def test_a_record_has_a_bound() -> None:
    body = {**BODIES[Kind.ROTATION], "open": list(range(1, 200_000))}
    with pytest.raises(EncodingError, match="longer"):
        encode(replace(RECORDS[0], kind=Kind.ROTATION, body=body))


def test_long_texts_are_cut_and_words_are_checked() -> None:
    assert cut("x" * MAX_TEXT) == "x" * MAX_TEXT
    assert len(cut("x" * 9999)) == MAX_TEXT
    assert check_word("policy_loaded", "event") == "policy_loaded"
    for wrong in ("", "Upper", "a b", "a\n", "-a", "x" * 65):
        with pytest.raises(InvalidInputError, match="event"):
            check_word(wrong, "event")


def test_times_and_canonical_objects() -> None:
    for at in (datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)):
        assert parse_time(time_text(at)) == at
    assert time_text(datetime(2026, 11, 22, 8, 12, 0, 1, tzinfo=UTC)) == TIME
    assert parse_time(TIME).microsecond == 1
    for wrong in ("", TIME[:-1], TIME + "\n", TIME.replace("Z", "+00:00")):
        with pytest.raises(EncodingError):
            parse_time(wrong)
    assert load_canonical(b'{"a":1}', "file") == {"a": 1}
    for bad in (b'{"a": 1}', b'{"b":1,"a":1}', b"[]", b'{"a":1.5}', b"\xff"):
        with pytest.raises(EncodingError, match="file"):
            load_canonical(bad, "file")

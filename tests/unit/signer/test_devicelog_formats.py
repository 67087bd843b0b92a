"""What programs print of devices' logs, and whether a log goes on where it was left."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spire_hw.errors import EncodingError
from spire_hw_signer.devicelog import jsonlines, yubihsm
from spire_hw_signer.devicelog.continuity import compare
from spire_hw_signer.devicelog.entries import DeviceLogError, Dump, Entry, Mark

# Yubico, "GET LOG ENTRIES", shell example: six entries of a real device.
SHOWN = """\
0 unlogged boots found
0 unlogged authentications found
Found 6 items
item:    46 -- cmd: 0x4b -- length:  234 -- session key: 0x0001 -- target key: 0xcf94 -- second key: 0x997e -- result: 0xcb -- tick: 335725 -- hash: 415f51f1f035a1b713e730e4464e4033
item:    47 -- cmd: 0x4c -- length:   77 -- session key: 0x0001 -- target key: 0xaff7 -- second key: 0xffff -- result: 0xcc -- tick: 351714 -- hash: 5496a60d478c2b9c801d8d32ca66b554
item:    48 -- cmd: 0x00 -- length:    0 -- session key: 0xffff -- target key: 0x0000 -- second key: 0x0000 -- result: 0x00 -- tick: 0 -- hash: 14ac7747ba9bbb243cfc70befeb5349b
item:    49 -- cmd: 0x03 -- length:   10 -- session key: 0xffff -- target key: 0x0001 -- second key: 0xffff -- result: 0x83 -- tick: 139 -- hash: b20a8f25c025e693a8e869b433294a20
item:    50 -- cmd: 0x04 -- length:   17 -- session key: 0xffff -- target key: 0x0001 -- second key: 0xffff -- result: 0x84 -- tick: 139 -- hash: ebfae425c319ac7a0afbb8b92597de7c
item:    51 -- cmd: 0x67 -- length:    2 -- session key: 0x0001 -- target key: 0xffff -- second key: 0xffff -- result: 0xe7 -- tick: 697 -- hash: 2e395d1b706668737e1d2215813db47e
"""
# The first two of another one after a reset: karalabe, "Publicly auditable YubiHSM logs" (2025).
RESET = """\
0 unlogged boots found
0 unlogged authentications found
Found 2 items
item:     1 -- cmd: 0xff -- length: 65535 -- session key: 0xffff -- target key: 0xffff -- second key: 0xffff -- result: 0xff -- tick: 4294967295 -- hash: 33012657537e4842f57fa6ed3b09b25b
item:     2 -- cmd: 0x00 -- length:    0 -- session key: 0xffff -- target key: 0x0000 -- second key: 0x0000 -- result: 0x00 -- tick: 0 -- hash: fc153091560e18bca82621522c85bdba
"""
NONE = "0 unlogged boots found\n0 unlogged authentications found\nNo logs to extract\n"
NO_COUNTERS = {"boots": 0, "authentications": 0}


def shown(text: str = SHOWN) -> Dump:
    return yubihsm.parse(text.encode())


def reasons(dump: Dump, known: Mark | None, capacity: int = 62) -> list[str]:
    return [fault.reason for fault in compare(dump, known, {}, capacity).faults]


def chain(start: int, count: int, before: bytes = bytes(16)) -> list[Entry]:
    """Return entries as a device makes them."""
    made: list[Entry] = []
    for n in range(count):
        number = (start + n) % 65536
        packed = yubihsm.PACKED.pack(number, 0x56, 34, 1, 2, 0xFFFF, 0xD6, n)
        before = yubihsm.chained(packed, before)
        made.append(yubihsm.YubiHsmEntry(number, before, "", packed))
    return made


def lines(*objects: object) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in objects)


def test_entries_of_a_real_device_are_read_and_their_chain_holds() -> None:
    dump = shown()
    assert [e.number for e in dump.entries] == [46, 47, 48, 49, 50, 51]
    assert dump.unlogged == NO_COUNTERS
    assert dump.entries[0].text == (
        "cmd=0x4b length=234 session=0x0001 target=0xcf94 second=0x997e result=0xcb tick=335725"
    )
    news = compare(dump, None, {}, 62)
    assert (news.entries, list(news.faults)) == (dump.entries, [])
    assert [e.number for e in compare(shown(RESET), None, {}, 62).entries] == [1, 2]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tick: 351714", "tick: 351715"),
        ("cmd: 0x00", "cmd: 0x01"),
        ("hash: b20a8f", "hash: b20a8e"),
        ("target key: 0xaff7", "target key: 0xaff6"),
        ("item:    48", "item:    58"),
        ("item:    48", "item:    44"),
    ],
)
def test_a_log_whose_chain_is_broken_is_not_taken(old: str, new: str) -> None:
    assert SHOWN.count(old) == 1
    with pytest.raises(DeviceLogError) as caught:
        compare(shown(SHOWN.replace(old, new)), None, {}, 62)
    assert caught.value.reason == "chain"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Found 6 items", "Found 5 items"),
        ("Found 6 items", "Found 65 items"),
        ("Found 6 items", "No logs to extract"),
        ("Found 6 items", "Found 6 item"),
        ("0 unlogged boots", "65536 unlogged boots"),
        ("0 unlogged boots", "-1 unlogged boots"),
        ("0 unlogged authentications found\n", ""),
        ("item:    46", "item: 65536"),
        ("length:  234", "length: 65536"),
        ("tick: 335725", "tick: 4294967296"),
        ("cmd: 0x4b", "cmd: 0x4B"),
        ("hash: 415f", "hash: 15f"),
        (" -- hash: 415f", " -- hash: 415f 415f"),
        ("item:    46", "\titem:    46"),
        ("0xe7 -- tick: 697", "0xe7 -- tick: 697\r"),
        ("item:    47", "item:    \u0664\u0667"),
        ("db47e\n", "db47e"),
        ("db47e\n", "db47e\n\n"),
        (SHOWN, ""),
        (SHOWN, "\n"),
        (SHOWN, "Created session 0\n"),
    ],
)
def test_other_output_is_refused(old: str, new: str) -> None:
    assert SHOWN.count(old) == 1
    with pytest.raises(EncodingError):
        shown(SHOWN.replace(old, new))


def test_what_some_versions_say_before_is_passed_over() -> None:
    talk = "Using default connector URL: http://localhost:12345\n"
    talk += "Session keepalive set up to run every 15 seconds\nCreated session 0\n"
    assert shown(talk + SHOWN) == shown()
    assert shown(NONE).entries == ()


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_begin_anew_after_the_last_one(first: int) -> None:
    before = chain(65500, 36)
    after = chain(first, 5, before[-1].digest)
    news = compare(Dump((*before, *after)), before[9].mark, {}, 62)
    assert (len(news.entries), list(news.faults)) == (31, [])
    news = compare(Dump(tuple(after)), before[-1].mark, {}, 62)
    assert (len(news.entries), list(news.faults)) == (5, [])


def test_what_was_taken_is_not_new() -> None:
    dump = shown()
    for at, entry in enumerate(dump.entries):
        news = compare(dump, entry.mark, {}, 62)
        assert (news.entries, list(news.faults)) == (dump.entries[at + 1 :], [])
    assert compare(shown(NONE), dump.entries[-1].mark, {}, 62).entries == ()


def test_a_log_that_does_not_go_on_where_it_was_is_taken_with_a_fault() -> None:
    entries = chain(100, 40)
    later = Dump(tuple(entries[20:]))
    assert reasons(later, entries[19].mark) == []
    assert reasons(later, entries[18].mark) == ["gap"]
    assert reasons(later, Mark(99, b"x" * 16)) == ["gap"]
    assert reasons(later, Mark(119, b"x" * 16)) == ["chain"]
    assert reasons(later, Mark(125, b"x" * 16)) == ["other"]
    assert reasons(later, Mark(140, b"x" * 16)) == ["back"]
    assert reasons(Dump(tuple(chain(1, 2))), entries[-1].mark) == ["back"]
    for known in (Mark(99, b""), Mark(119, b""), Mark(125, b""), Mark(140, b"")):
        assert len(compare(later, known, {}, 62).entries) == 20
    assert "19 entries" in compare(later, Mark(100, b""), {}, 62).faults[0].text


def test_events_that_found_no_room_are_told_once() -> None:
    text = SHOWN.replace("0 unlogged boots", "2 unlogged boots")
    dump = shown(text)
    (fault,) = compare(dump, None, NO_COUNTERS, 62).faults
    assert (fault.reason, "2 boots" in fault.text) == ("unlogged", True)
    assert compare(dump, None, dump.unlogged, 62).faults == []
    more = shown(text.replace("2 unlogged boots", "1 unlogged boots"))
    assert [f.reason for f in compare(more, None, dump.unlogged, 62).faults] == ["unlogged"]


def test_a_log_that_was_full_is_told() -> None:
    entries = chain(1, 62)
    assert reasons(Dump(tuple(entries)), None) == ["full"]
    assert reasons(Dump(tuple(entries)), entries[0].mark) == []


def test_json_lines_are_read() -> None:
    output = lines(
        {"number": 7, "text": "sign key 4", "digest": "5f"},
        {"number": 8, "text": "log in", "digest": "60", "previous": "5f"},
        {"number": 9, "text": "ü"},
        {"unlogged": 3},
    )
    dump = jsonlines.parse(output)
    assert [(e.number, e.text) for e in dump.entries] == [
        (7, "sign key 4"),
        (8, "log in"),
        (9, "ü"),
    ]
    assert dump.entries[0].digest == b"\x5f"
    assert len(dump.entries[2].digest) == 16
    assert dump.unlogged == {"events": 3}
    assert reasons(dump, Mark(6, b"")) == ["unlogged"]
    assert jsonlines.parse(b"") == Dump()


def test_json_lines_tell_gaps_and_broken_chains() -> None:
    first = {"number": 7, "text": "a", "digest": "5f"}
    broken = jsonlines.parse(lines(first, {"number": 8, "text": "b", "previous": "60"}))
    with pytest.raises(DeviceLogError, match="chain of the device's log is broken"):
        compare(broken, None, {}, 100)
    for number in (7, 6):
        again = jsonlines.parse(lines(first, {"number": number, "text": "b"}))
        with pytest.raises(DeviceLogError, match="not in order"):
            compare(again, None, {}, 100)
    many = jsonlines.parse(lines(*({"number": 2 * n, "text": "a"} for n in range(50))))
    (fault,) = compare(many, None, {}, 100).faults
    assert fault.text == (
        "1 entries of the device's log are missing, between 0 and 2; 48 such gaps follow"
    )
    other = jsonlines.parse(lines({"number": 7, "text": "b"}))
    assert reasons(other, jsonlines.parse(lines({"number": 7, "text": "a"})).entries[0].mark) == [
        "other"
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"7",
        b"{",
        b"[" * 4000,
        b'{"number": 1}',
        b'{"text": "a"}',
        b'{"number": 1, "text": ""}',
        b'{"number": 1, "text": "a\\nb"}',
        b'{"number": 1, "text": "\\ud800"}',
        b'{"number": 1, "text": "' + b"a" * 381 + b'"}',
        b'{"number": 1, "text": "a", "more": 1}',
        b'{"number": 1, "number": 2, "text": "a"}',
        b'{"number": 1.0, "text": "a"}',
        b'{"number": true, "text": "a"}',
        b'{"number": -1, "text": "a"}',
        b'{"number": 9223372036854775808, "text": "a"}',
        b'{"number": ' + b"9" * 4050 + b', "text": "a"}',
        b'{"number": 1, "text": "a", "digest": ""}',
        b'{"number": 1, "text": "a", "digest": "5"}',
        b'{"number": 1, "text": "a", "digest": "5F"}',
        b'{"number": 1, "text": "a", "previous": 5}',
        b'{"number": 1, "text": "a", "digest": "' + b"00" * 65 + b'"}',
        b'{"unlogged": -1}',
        b'{"unlogged": 1}\n{"unlogged": 1}',
        b'{"number": 1, "text": "\xff"}',
        b" " * 4097,
    ],
)
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(EncodingError):
        jsonlines.parse(line + b"\n")
    with pytest.raises(EncodingError):
        jsonlines.parse(b'{"unlogged": 1}')


@given(st.binary(max_size=600) | st.text(max_size=200).map(str.encode))
@example(SHOWN.encode()[:-1])
def test_rubbish_is_an_error_of_its_own_and_nothing_else(output: bytes) -> None:
    for parse in (yubihsm.parse, jsonlines.parse):
        try:
            dump = parse(output)
        except EncodingError:
            continue
        assert all(0 < len(e.text) <= 380 and e.text.isprintable() for e in dump.entries)


@pytest.mark.parametrize("mark", [Mark(0, b"\0"), Mark(2**63 - 1, b"\xff" * 64)])
def test_marks_are_read_as_they_were_written(mark: Mark) -> None:
    assert Mark.parse(str(mark)) == mark


@pytest.mark.parametrize(
    "text", ["", "1", ":", "-1:00", "1:0", "1:0G", "1" * 20 + ":00", "\u0661:00"]
)
def test_other_marks_are_none(text: str) -> None:
    assert Mark.parse(text) is None

"""Header blocks against RFC 7541: examples of appendix C, the tables, the limits."""

from __future__ import annotations

import pytest

from spire_hw.errors import InvalidInputError, LimitError
from spire_hw.rpc.h2.hpack import (
    MAX_BLOCK_BYTES,
    MAX_FIELDS,
    STATIC,
    Decoder,
    encode,
)

URL = "https://www.example.com"
DATE = "Mon, 21 Oct 2013 20:13:2{} GMT"
COOKIE = "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
GET = ((":method", "GET"), (":scheme", "http"), (":path", "/"))
WWW = (":authority", "www.example.com")
REQUESTS = [
    (*GET, WWW),
    (*GET, WWW, ("cache-control", "no-cache")),
    (
        (":method", "GET"), (":scheme", "https"), (":path", "/index.html"), WWW,
        ("custom-key", "custom-value"),
    ),
]  # fmt: skip
RESPONSES = [
    (
        (":status", "302"), ("cache-control", "private"), ("date", DATE.format(1)),
        ("location", URL),
    ),
    (
        (":status", "307"), ("cache-control", "private"), ("date", DATE.format(1)),
        ("location", URL),
    ),
    (
        (":status", "200"), ("cache-control", "private"), ("date", DATE.format(2)),
        ("location", URL), ("content-encoding", "gzip"), ("set-cookie", COOKIE),
    ),
]  # fmt: skip
TABLE_256 = "3fe101"


def decoded(decoder: Decoder, *blocks: str) -> list[tuple[tuple[str, str], ...]]:
    return [decoder.decode(bytes.fromhex(block)).fields for block in blocks]


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ("400a637573746f6d2d6b65790d637573746f6d2d686561646572", ("custom-key", "custom-header")),
        ("040c2f73616d706c652f70617468", (":path", "/sample/path")),
        ("100870617373776f726406736563726574", ("password", "secret")),
        ("82", (":method", "GET")),
    ],
)
def test_single_fields(block: str, field: tuple[str, str]) -> None:  # C.2
    assert decoded(Decoder(), block) == [(field,)]


@pytest.mark.parametrize(
    "blocks",
    [
        [
            "828684410f7777772e6578616d706c652e636f6d",
            "828684be58086e6f2d6361636865",
            "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
        ],
        [
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            "828684be5886a8eb10649cbf",
            "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
        ],
    ],
    ids=["plain", "huffman"],
)
def test_requests_on_one_connection(blocks: list[str]) -> None:  # C.3, C.4
    assert decoded(Decoder(), *blocks) == REQUESTS


@pytest.mark.parametrize(
    "blocks",
    [
        [
            (
                "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120"
                "474d546e1768747470733a2f2f7777772e6578616d706c652e636f6d"
            ),
            "4803333037c1c0bf",
            (
                "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738"
                "666f6f3d4153444a4b48514b425a584f5157454f50495541585157454f49553b206d61782d6167653d33"
                "3630303b2076657273696f6e3d31"
            ),
        ],
        [
            (
                "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad1718"
                "63c78f0b97c8e9ae82ae43d3"
            ),
            "4883640effc1c0bf",
            (
                "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7"
                "b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007"
            ),
        ],
    ],
    ids=["plain", "huffman"],
)
def test_responses_that_push_each_other_out(blocks: list[str]) -> None:  # C.5, C.6
    decoder = Decoder()
    assert decoded(decoder, TABLE_256 + blocks[0], *blocks[1:]) == RESPONSES
    # What the last one left: set-cookie, content-encoding, date; nothing else.
    assert decoded(decoder, "bebfc0") == [
        (("set-cookie", COOKIE), ("content-encoding", "gzip"), ("date", DATE.format(2)))
    ]
    with pytest.raises(InvalidInputError):
        decoded(decoder, "c1")


def test_the_static_table() -> None:
    assert len(STATIC) == 61
    for number, field in enumerate(STATIC, 1):
        assert Decoder().decode(bytes((0x80 | number,))).fields == (field,)
    assert [STATIC[n - 1] for n in (1, 2, 8, 14, 15, 16, 31, 38, 54, 61)] == [
        (":authority", ""), (":method", "GET"), (":status", "200"), (":status", "500"),
        ("accept-charset", ""), ("accept-encoding", "gzip, deflate"), ("content-type", ""),
        ("host", ""), ("server", ""), ("www-authenticate", ""),
    ]  # fmt: skip


def test_an_entry_larger_than_the_table_empties_it() -> None:
    decoder = Decoder()
    decoded(decoder, "40016101" + "62")
    assert decoded(decoder, "be") == [(("a", "b"),)]
    decoder.decode(b"\x40\x01c\x7f\xe1\x1f" + b"x" * (0x7F + 0x61 + 0x1F * 128))  # 4096 and 33
    with pytest.raises(InvalidInputError):
        decoded(decoder, "be")


def test_a_smaller_table_evicts_and_a_larger_one_does_not_bring_back() -> None:
    decoder = Decoder()
    decoded(decoder, "40016101624001630164")
    assert decoded(decoder, "bebf") == [(("c", "d"), ("a", "b"))]
    assert decoded(decoder, "3f03" + "be") == [(("c", "d"),)]  # 34 bytes: one entry
    assert decoded(decoder, "203fe11f" + "82") == [((":method", "GET"),)]  # none, then 4096
    with pytest.raises(InvalidInputError):
        decoded(decoder, "be")


@pytest.mark.parametrize(
    "block",
    [
        "80",  # index 0
        "be",  # nothing there
        "ffff80808080808080",  # an integer beyond measure
        "ff8080808080",
        "40",  # cut short
        "4001",
        "400161",
        "40016105",
        "0001610561",
        "7f",
        "82203f",  # a table size after a field, and cut short
        "8220",
        "3fe21f",  # 4097
        "0001618118",  # huffman, padded wrongly
    ],
)
def test_what_is_no_block(block: str) -> None:
    with pytest.raises(InvalidInputError):
        decoded(Decoder(), block)


def test_limits() -> None:
    assert len(Decoder().decode(b"\x82" * MAX_FIELDS).fields) == MAX_FIELDS
    with pytest.raises(LimitError):
        Decoder().decode(b"\x82" * (MAX_FIELDS + 1))
    with pytest.raises(LimitError):
        Decoder().decode(b"\x20" * (MAX_BLOCK_BYTES + 1))


@pytest.mark.parametrize(
    "field",
    [("X", "y"), ("x y", "z"), ("", "z"), ("x", "a\nb"), ("x", "a\0"), ("x", "\x7f"), ("é", "x")],
)
def test_malformed_fields_are_told_and_never_remembered(field: tuple[str, str]) -> None:
    name, value = (part.encode("latin-1") for part in field)
    literal = bytes((len(name),)) + name + bytes((len(value),)) + value
    assert Decoder().decode(b"\x00" + literal).malformed
    with pytest.raises(InvalidInputError):
        Decoder().decode(b"\x40" + literal)


def test_the_size_counts_names_values_and_overhead() -> None:
    block = Decoder().decode(encode([("abc", "defg"), (":method", "POST")]))
    assert block.size == 3 + 4 + 32 + 7 + 4 + 32


def test_blocks_are_remembered_only_while_they_mean_the_same() -> None:
    decoder = Decoder()
    plain = encode([("x", "y"), (":method", "POST")])
    assert decoder.decode(plain) is decoder.decode(plain)
    decoded(decoder, "40016101" + "62")
    assert decoded(decoder, "be") == [(("a", "b"),)]
    decoded(decoder, "40016301" + "64")
    assert decoded(decoder, "be") == [(("c", "d"),)]


def test_what_is_remembered_is_little() -> None:
    decoder = Decoder()
    for number in range(100):
        decoder.decode(encode([("x", str(number))]))
        decoder.decode(encode([("x", "y" * 600), ("n", str(number))]))
        decoder.decode(encode([("x", str(number))] * 100))
    assert decoder._remembered is not None
    assert len(decoder._remembered) <= 8
    assert sum(len(block.fields) for block in decoder._remembered.values()) <= 8 * 24

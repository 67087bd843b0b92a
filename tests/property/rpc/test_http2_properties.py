"""Blocks, messages and frames: both ways, and however they are cut."""

from __future__ import annotations

import asyncio
import itertools
import socket
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from spire_hw.errors import SpireHwError
from spire_hw.rpc.h2 import frames
from spire_hw.rpc.h2.connection import Connection
from spire_hw.rpc.h2.hpack import STATIC, Decoder, encode
from spire_hw.rpc.h2.limits import Pool, Windows
from spire_hw.rpc.h2.wire import (
    Assembler,
    encode_binary,
    encode_message,
    encode_timeout,
    pack,
    parse_binary,
    parse_message,
    parse_timeout,
)
from spire_hw.transport.half import Half

if TYPE_CHECKING:
    from spire_hw.rpc.h2.frames import Code
    from spire_hw.rpc.h2.hpack import Block

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=40)
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=300)
FIELDS = st.lists(st.one_of(st.tuples(NAMES, VALUES), st.sampled_from(STATIC)), max_size=30)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


@given(st.lists(FIELDS, max_size=4))
def test_what_is_encoded_is_decoded(blocks: list[list[tuple[str, str]]]) -> None:
    decoder = Decoder()
    for fields in blocks:
        block = decoder.decode(encode(fields))
        assert block.fields == tuple(fields)
        assert not block.malformed


def indexed(name: str, value: str) -> bytes:
    """Encode a field so that it is added to the table."""
    return b"\x40" + encode([(name, value)])[1:]


@given(st.lists(st.tuples(NAMES, VALUES), max_size=60), st.data())
def test_the_table_is_that_of_the_specification(
    fields: list[tuple[str, str]], more: st.DataObject
) -> None:
    decoder = Decoder()
    table: list[tuple[str, str]] = []
    limit = 4096
    names = {name for name, _ in STATIC}
    for field in fields:
        if field[0] in names:
            continue
        prefix = b""
        if more.draw(st.booleans()):
            limit = more.draw(st.integers(0, 30))
            prefix = bytes((0x20 | limit,))
        decoder.decode(prefix + indexed(*field))
        table.insert(0, field)
        while sum(len(n) + len(v) + 32 for n, v in table) > limit:
            table.pop()
        for number, known in enumerate(table[:60]):
            assert decoder.decode(bytes((0x80 | 62 + number,))).fields == (known,)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_block_or_an_error_of_ours(data: bytes) -> None:
    decoder = Decoder()
    try:
        first = decoder.decode(data)
    except SpireHwError:
        return
    assert first.size >= 32 * len(first.fields)


@given(st.lists(st.binary(max_size=200), max_size=8), st.lists(st.integers(0, 5000), max_size=12))
def test_messages_are_put_together_however_they_are_cut(
    messages: list[bytes], places: list[int]
) -> None:
    assembler = Assembler(200)
    got: list[bytes] = []
    for piece in cut(b"".join(map(pack, messages)), places):
        got += assembler.take(piece)
    assert got == messages
    assert assembler.pending == 0


@given(st.text(max_size=100))
def test_texts_survive(text: str) -> None:
    coded = encode_message(text)
    assert coded.isascii()
    assert coded.isprintable()
    assert parse_message(coded) == text.encode("utf-8", "replace").decode()


@given(st.text(max_size=50))
def test_any_text_is_a_message_and_perhaps_a_value(text: str) -> None:
    parse_message(text)
    parse_binary(text)


@given(st.binary(max_size=50))
def test_binary_values_survive(value: bytes) -> None:
    assert parse_binary(encode_binary(value)) == value


@given(st.floats(0, 90_000))
def test_deadlines_survive_within_a_millisecond(seconds: float) -> None:
    assert seconds <= parse_timeout(encode_timeout(seconds)) + 1e-9
    assert parse_timeout(encode_timeout(seconds)) <= seconds + 0.0011


class Listening(Connection):
    """Notes what it is told."""

    def __init__(self, half: Half) -> None:
        super().__init__(half, Windows(1 << 20, 1 << 20, 1 << 20), Pool(1 << 20), {})
        self.told: list[tuple[object, ...]] = []

    @override
    def on_headers(self, number: int, block: Block, *, end: bool) -> None:
        self.told.append((number, block.fields, end))

    @override
    def is_idle_stream(self, number: int) -> bool:
        return False

    @override
    def on_goaway(self, last: int, code: Code) -> None:
        self.told.append((last, code))

    @override
    def on_dropped(self) -> None:
        """Nothing is ever open."""

    @override
    def on_closed(self) -> None:
        self.told.append((self.why,))

    @override
    def on_settings(self) -> None:
        self.told.append(("settings",))

    @override
    def on_limit(self, max_streams: int) -> None:
        self.told.append((max_streams,))


SOME_FRAME = st.one_of(
    st.builds(
        lambda number, fields, end: frames.headers(number, encode(fields), end=end, limit=64),
        st.integers(1, 99),
        FIELDS.filter(lambda fields: len(encode(fields)) < 900),
        st.booleans(),
    ),
    st.builds(frames.goaway, st.integers(0, 99), st.sampled_from(frames.Code)),
    st.builds(lambda n: frames.settings({3: n}), st.integers(0, 2**32 - 1)),
    st.builds(lambda data: frames.frame(frames.DATA, 0, 1, data), st.binary(max_size=99)),
    st.builds(
        frames.frame, st.integers(0, 20), st.integers(0, 255), st.integers(0, 99), st.binary()
    ),
)


async def hear(pieces: list[bytes]) -> list[tuple[object, ...]]:
    near, far = socket.socketpair()
    half = Half()
    await asyncio.get_running_loop().create_connection(lambda: half, sock=near)
    connection = Listening(half)
    half.lead(connection)
    for piece in pieces:
        connection.send(piece)
    told = list(connection.told)
    connection.abort("the test is over")
    far.close()
    return told


@settings(max_examples=60, deadline=None)
@given(st.lists(SOME_FRAME, max_size=12), st.lists(st.integers(0, 9999), max_size=20))
def test_frames_mean_the_same_however_they_are_cut(sent: list[bytes], places: list[int]) -> None:
    data = frames.settings({}) + b"".join(sent)

    async def both() -> None:
        assert await hear([data]) == await hear(cut(data, places))

    asyncio.run(both())

"""gRPC's own texts and lengths, and frames of HTTP/2."""

from __future__ import annotations

import pytest

from spire_hw.errors import ErrorKind, InvalidInputError, LimitError, SpireHwError
from spire_hw.rpc.h2 import frames
from spire_hw.rpc.h2.limits import FREE_BYTES, Account, Budget, Pool
from spire_hw.rpc.h2.wire import (
    Assembler,
    encode_binary,
    encode_message,
    encode_timeout,
    is_content_type,
    pack,
    parse_binary,
    parse_message,
    parse_timeout,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1H", 3600), ("2M", 120), ("3S", 3), ("4m", 4e-3), ("5u", 5e-6), ("6n", 6e-9), ("0S", 0),
     ("99999999H", 99_999_999 * 3600)],
)  # fmt: skip
def test_timeouts(text: str, seconds: float) -> None:
    assert parse_timeout(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", "1", "S", "1s", "1 S", " 1S", "1S\n", "-1S", "+1S", "1.0S", "123456789S", "١S", "0x1S"],  # noqa: RUF001
)
def test_what_is_no_timeout(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_timeout(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0m"), (0, "0m"), (0.0001, "1m"), (1.5, "1500m"), (99_999.999, "99999999m"),
     (100_000, "100000S"), (1e12, "99999999S")],
)  # fmt: skip
def test_deadlines_are_told_rounded_up(seconds: float, text: str) -> None:
    assert encode_timeout(seconds) == text


@pytest.mark.parametrize(
    ("value", "good"),
    [("application/grpc", True), ("application/grpc+proto", True), ("Application/gRPC", True),
     ("application/grpc;charset=utf-8", True), ("application/grpc-web", False),
     ("application/grpcx", False), ("", False), ("text/html", False), ("application/grpc ", False)],
)  # fmt: skip
def test_content_types(value: str, good: bool) -> None:
    assert is_content_type(value) is good


@pytest.mark.parametrize(
    ("text", "coded"),
    [("plain text", "plain text"), ("50%", "50%25"), ("a\nb", "a%0Ab"), ("ü", "%C3%BC"),
     ("\ud800", "?"), ("", "")],
)  # fmt: skip
def test_messages_are_printable(text: str, coded: str) -> None:
    assert encode_message(text) == coded
    if text != "\ud800":
        assert parse_message(coded) == text


@pytest.mark.parametrize(
    ("coded", "text"), [("%", "%"), ("%G1", "%G1"), ("a%4", "a%4"), ("%FF", "�"), ("%25%", "%%")]
)
def test_malformed_messages_are_read_as_they_stand(coded: str, text: str) -> None:
    assert parse_message(coded) == text


@pytest.mark.parametrize("text", ["a", "abcde", "!!!!", "ab=c", "é", "YQ==="])
def test_what_is_no_binary_value(text: str) -> None:
    assert parse_binary(text) is None


def test_binary_values() -> None:
    for size in range(10):
        value = bytes(range(250, 250 + min(size, 6))) + b"x" * max(0, size - 6)
        assert parse_binary(encode_binary(value)) == value
    assert parse_binary("YQ==") == parse_binary("YQ") == b"a"


def test_a_message_is_refused_by_its_length_before_it_is_here() -> None:
    assembler = Assembler(10)
    assert list(assembler.take(pack(b"x" * 10))) == [b"x" * 10]
    with pytest.raises(LimitError, match="11"):
        assembler.take(pack(b"x" * 11)[:5])


def test_a_compressed_message_is_refused() -> None:
    with pytest.raises(SpireHwError) as caught:
        Assembler(10).take(b"\x01\0\0\0\x01x")
    assert caught.value.kind is ErrorKind.UNIMPLEMENTED


def test_header_blocks_are_cut_to_frames() -> None:
    block = bytes(range(256)) * 10
    cut = frames.headers(5, block, end=True, limit=1000)
    at, seen, kinds = 0, b"", []
    while at < len(cut):
        head, flags, stream = frames.HEAD.unpack_from(cut, at)
        size = head >> 8
        kinds.append((head & 0xFF, flags, stream))
        seen += cut[at + 9 : at + 9 + size]
        at += 9 + size
    assert seen == block
    assert kinds == [(1, 1, 5), (9, 0, 5), (9, 4, 5)]
    assert frames.headers(5, b"x", end=False) == b"\0\0\x01\x01\x04\0\0\0\x05x"


def test_frames_by_value() -> None:
    assert frames.settings({4: 65_536}) == bytes.fromhex("000006040000000000000400010000")
    assert frames.take_settings(bytes.fromhex("000400010000000500004000")) == [
        (4, 65_536),
        (5, 16_384),
    ]
    assert frames.window_update(3, 5) == bytes.fromhex("00000408000000000300000005")
    assert frames.rst_stream(3, frames.Code.CANCEL) == bytes.fromhex("00000403000000000300000008")
    goodbye = frames.goaway(7, frames.Code.NO_ERROR, "bye é")
    assert goodbye == bytes.fromhex("00000d0700000000000000000700000000") + b"bye ?"
    assert frames.code_of(8) is frames.Code.CANCEL
    assert frames.code_of(99) is frames.Code.INTERNAL_ERROR


def test_a_budget_runs_out_and_comes_back() -> None:
    budget = Budget(0.0)
    assert all(budget.spend(1, 0.0) for _ in range(1000))
    assert not budget.spend(1, 0.0)
    assert not budget.spend(1, 0.005)
    assert all(budget.spend(1, 1.0) for _ in range(90))
    budget.earn(50)
    assert all(budget.spend(1, 1.0) for _ in range(50))


def test_an_account_draws_on_the_pool_beyond_what_is_free() -> None:
    pool = Pool(1000)
    one, other = Account(5000 + FREE_BYTES, pool), Account(FREE_BYTES + 500, pool)
    assert one.add(FREE_BYTES)
    assert pool.used == 0
    assert one.add(900)
    assert other.add(FREE_BYTES)
    assert not other.add(200)
    assert other.add(-200)
    assert one.add(-900)
    assert other.add(500)
    assert not other.add(1)  # its own limit
    assert other.add(-501)
    assert (one.add(-FREE_BYTES), other.add(-FREE_BYTES), pool.used) == (True, True, 0)

from __future__ import annotations

import zlib

import pytest

from spire_hw.errors import InvalidInputError, LimitError
from spire_hw.tpm.inflate import inflate


@pytest.mark.parametrize("size", [0, 1, 1000, 4096])
def test_content_up_to_the_limit(size: int) -> None:
    assert inflate(zlib.compress(bytes(size)), 4096, "log") == bytes(size)


@pytest.mark.parametrize("size", [4097, 5000, 10_000_000])
def test_one_byte_more_is_too_much(size: int) -> None:
    with pytest.raises(LimitError) as caught:
        inflate(zlib.compress(bytes(size)), 4096, "ima")
    assert caught.value.message == "ima: larger than 4096 bytes"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\x78\x9c",
        zlib.compress(b"abc")[:-1],
        zlib.compress(b"abc") + b"\0",
        zlib.compress(b"abc") + zlib.compress(b"abc"),
        zlib.compress(bytes(4096)) + b"\0",
        zlib.compress(bytes(4096))[:-4],
        zlib.compress(bytes(4096))[:-4] + b"abcd",
        zlib.compress(b"abc", wbits=-15),
        zlib.compress(b"abc", wbits=31),
    ],
)
def test_anything_but_one_whole_stream(data: bytes) -> None:
    with pytest.raises(InvalidInputError, match="log: compressed data is malformed"):
        inflate(data, 4096, "log")


def test_a_stream_that_asks_for_a_dictionary() -> None:
    maker = zlib.compressobj(zdict=b"hello world")
    data = maker.compress(b"hello world") + maker.flush()
    with pytest.raises(InvalidInputError, match="compressed data is malformed"):
        inflate(data, 4096, "log")

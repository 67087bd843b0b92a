"""The Huffman code against RFC 7541: vectors of appendix C, codes of appendix B, padding of 5.2."""

from __future__ import annotations

import pytest

from spire_hw.errors import InvalidInputError
from spire_hw.rpc.h2.huffman import decode

EOS = (0x3FFFFFFF, 30)
# Symbol: code and its bits, copied from appendix B.
CODES = {
    "\0": (0x1FF8, 13), "\x01": (0x7FFFD8, 23), "\n": (0x3FFFFFFC, 30), "\r": (0x3FFFFFFD, 30),
    "\x16": (0x3FFFFFFE, 30), " ": (0x14, 6), "!": (0x3F8, 10), '"': (0x3F9, 10), "#": (0xFFA, 12),
    "$": (0x1FF9, 13), "%": (0x15, 6), "&": (0xF8, 8), "(": (0x3FA, 10), "*": (0xF9, 8),
    "+": (0x7FB, 11), ",": (0xFA, 8), "-": (0x16, 6), ".": (0x17, 6), "/": (0x18, 6),
    "0": (0x0, 5), "1": (0x1, 5), "2": (0x2, 5), "3": (0x19, 6), ":": (0x5C, 7), ";": (0xFB, 8),
    "<": (0x7FFC, 15), "=": (0x20, 6), "?": (0x3FC, 10), "@": (0x1FFA, 13), "A": (0x21, 6),
    "X": (0xFC, 8), "Z": (0xFD, 8), "\\": (0x7FFF0, 19), "^": (0x3FFC, 14), "_": (0x22, 6),
    "a": (0x3, 5), "z": (0x7B, 7), "{": (0x7FFE, 15), "|": (0x7FC, 11), "}": (0x3FFD, 14),
    "~": (0x1FFD, 13), "\x80": (0xFFFE6, 20), "\xf9": (0xFFFFFFE, 28), "\xff": (0x3FFFFEE, 26),
}  # fmt: skip


def packed(*codes: tuple[int, int]) -> bytes:
    """Return codes one after the other, padded with ones."""
    bits = "".join(f"{code:0{length}b}" for code, length in codes)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big") if bits else b""


@pytest.mark.parametrize(
    ("coded", "text"),
    [
        ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"),
        ("a8eb10649cbf", "no-cache"),
        ("25a849e95ba97d7f", "custom-key"),
        ("25a849e95bb8e8b4bf", "custom-value"),
        ("6402", "302"),
        ("640eff", "307"),
        ("aec3771a4b", "private"),
        ("9d29ad171863c78f0b97c8e9ae82ae43d3", "https://www.example.com"),
        ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
        ("9bd9ab", "gzip"),
        ("", ""),
    ],
)
def test_vectors_of_the_specification(coded: str, text: str) -> None:
    assert decode(bytes.fromhex(coded)) == text.encode()


@pytest.mark.parametrize("symbol", CODES, ids=lambda s: f"{ord(s):02x}")
def test_codes_of_the_specification(symbol: str) -> None:
    assert decode(packed(CODES[symbol])) == symbol.encode("latin-1")
    assert decode(packed(CODES["a"], CODES[symbol], CODES["0"])) == f"a{symbol}0".encode("latin-1")


@pytest.mark.parametrize(
    "coded",
    [
        packed(EOS),
        packed(CODES["a"], EOS, CODES["a"]),
        b"\xff",  # eight bits of padding
        packed(CODES["&"]) + b"\xff",
        b"\x18",  # "a" and three zeros
        b"\x1e",  # the last bit of the padding is none
        b"\xff\xff\xff",
    ],
)
def test_wrong_ends_are_refused(coded: bytes) -> None:
    with pytest.raises(InvalidInputError):
        decode(coded)


@pytest.mark.parametrize("size", range(1, 5))
def test_every_short_string_is_a_text_or_an_error(size: int) -> None:
    for number in range(0, 256**size, max(1, 256**size // 5000)):
        coded = number.to_bytes(size, "big")
        try:
            text = decode(coded)
        except InvalidInputError:
            continue
        assert len(text) <= size * 8 // 5

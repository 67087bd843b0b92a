"""The Huffman code of header fields (pure).

The code is canonical, so the length of each symbol's code says all of it. Decoding walks a table
by half bytes; nothing is ever encoded this way, senders may leave it out.

Source: RFC 7541 section 5.2 and appendix B.
"""

from __future__ import annotations

from array import array
from functools import cache
from typing import Final, NamedTuple

from spire_hw.errors import InvalidInputError

# Bits of the code of each byte value, in order; the 257th, EOS, has 30 ones.
_LENGTHS: Final = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c"
    "060a0a0c0d06080b0a0a080b080606060505050606060606060607080f060c0a"
    "0d06070707070707070707070707070707070707070707070807080d130d0e06"
    "0f05060506050606060507070606060506070605050607070707070f0b0e0d1c"
    "1416141416161617161717171717181718181617181717171715161716171718"
    "1615141616171715171616181516171715151615171617171416161617161617"
    "1a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b"
    "14181415161515171616191918181a171a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a"
)
_EOS: Final = 256
_EOS_BITS: Final = 30
_MAX_PADDING_BITS: Final = 7
_NIBBLE_BITS: Final = 4
_FAIL: Final = 0xFFFF
_NOTHING: Final = -1


class _Machine(NamedTuple):
    """Where sixteen times a state plus a half byte leads.

    Attributes:
        following: next state; `_FAIL` past EOS.
        symbols: the byte that is complete with it, or `_NOTHING`.
        final: by state, whether a string may end there.
    """

    following: array[int]
    symbols: array[int]
    final: bytes


def _tree() -> list[list[int]]:
    """Return the nodes of the code; a child is a node, a symbol as -1 - symbol, or 0 for none."""
    lengths = [*_LENGTHS, _EOS_BITS]
    nodes = [[0, 0]]
    code = last = 0
    for symbol in sorted(range(_EOS + 1), key=lambda s: (lengths[s], s)):
        code <<= lengths[symbol] - last
        last = lengths[symbol]
        node = 0
        for place in range(last - 1, 0, -1):
            bit = code >> place & 1
            if nodes[node][bit] == 0:
                nodes.append([0, 0])
                nodes[node][bit] = len(nodes) - 1
            node = nodes[node][bit]
        nodes[node][code & 1] = -1 - symbol
        code += 1
    return nodes


@cache
def _machine() -> _Machine:
    nodes = _tree()
    following, symbols = array("H"), array("h")
    for start in range(len(nodes)):
        for nibble in range(1 << _NIBBLE_BITS):
            node, symbol = start, _NOTHING
            for place in range(_NIBBLE_BITS - 1, -1, -1):
                node = nodes[node][nibble >> place & 1]
                if node < 0:
                    symbol, node = -1 - node, 0
                    if symbol == _EOS:
                        node, symbol = _FAIL, _NOTHING
                        break
            following.append(node)
            symbols.append(symbol)
    final = bytearray(len(nodes))
    node = 0
    for _ in range(_MAX_PADDING_BITS + 1):  # padding is the beginning of EOS: ones only
        final[node] = 1
        node = nodes[node][1]
    return _Machine(following, symbols, bytes(final))


def decode(data: bytes) -> bytes:
    """Return the bytes a Huffman-coded string stands for.

    Raises:
        InvalidInputError: EOS in it, or padding that is wrong.
    """
    following, symbols, final = _machine()
    state = 0
    out = bytearray()
    for byte in data:
        at = state << _NIBBLE_BITS | byte >> _NIBBLE_BITS
        if symbols[at] >= 0:
            out.append(symbols[at])
        state = following[at]
        if state != _FAIL:
            at = state << _NIBBLE_BITS | byte & 0xF
            if symbols[at] >= 0:
                out.append(symbols[at])
            state = following[at]
        if state == _FAIL:
            raise InvalidInputError("a header string holds the end-of-string symbol")
    if not final[state]:
        raise InvalidInputError("a header string is padded wrongly")
    return bytes(out)

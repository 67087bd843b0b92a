"""Inputs of the largest size a parser takes, made to cost as much as they can."""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from typing import TYPE_CHECKING, Final

from spire_hw.tpm import eventlog, imalist, secureboot
from spire_hw_sim import ekca, firmware
from spire_hw_sim.firmware import Firmware, Measurement
from spire_hw_sim.imawriter import Inode, Item

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST: Final = 64 * 1024
ANSWER: Final = 1024 * 1024
CERTIFICATE: Final = 16 * 1024
_BOOT: Final = Firmware().boot()


def _filled(unit: bytes, size: int) -> bytes:
    return unit * (size // len(unit))


def _many_events() -> bytes:
    raw = _BOOT.log()
    note = firmware.event(Measurement(12, firmware.EV_IPL, b"x"), _BOOT.banks)
    return raw + note * (eventlog.MAX_EVENTS - len(_BOOT.measurements))


def _large_events() -> bytes:
    raw = _BOOT.log()
    note = firmware.event(Measurement(12, firmware.EV_IPL, bytes(60_000)), _BOOT.banks)
    return raw + _filled(note, eventlog.MAX_BYTES - len(raw))


def _long_list() -> bytes:
    entries = [struct.pack(">I", n) * 8 for n in range(9_000)]
    data = firmware.signature_list(secureboot.CERT_SHA256, entries)
    return data[: eventlog.MAX_BYTES]


def _revocations() -> bytes:
    hashes = tuple(struct.pack(">I", n) * 8 for n in range(9_000))
    return Firmware(dbx=hashes).boot().log()


def _records() -> bytes:
    return _filled(Item(b"1", bytes(16), algorithm="md5").record(), imalist.PART_BYTES)


def _lines() -> bytes:
    return _filled(Item(b"1", bytes(16), algorithm="md5").line() + b"\n", imalist.PART_BYTES)


def _short_lines() -> bytes:
    return _filled(b"10 \n", imalist.PART_BYTES)


def _one_line() -> bytes:
    return b"1" * imalist.PART_BYTES


def _buffers() -> bytes:
    item = Item(b"k", bytes(32), "ima-buf", extra=bytes(3900))
    return _filled(item.line() + b"\n", imalist.PART_BYTES)


def _own_formats() -> bytes:
    """Return lines that each have another format, of as many fields as there may be."""
    fields = ["sig", "buf", "evmsig", "xattrnames", "xattrlengths", "xattrvalues", "iuid", "igid"]
    forms = ("|".join(["d-ng|n-ng", *order]) for order in itertools.permutations(fields))
    out, size = [], 0
    for form in forms:
        line = Item(b"1", bytes(16), form, "md5", inode=Inode()).line() + b"\n"
        size += len(line)
        if size > imalist.PART_BYTES:
            break
        out.append(line)
    return b"".join(out)


def _inodes() -> bytes:
    item = Item(b"1", bytes(16), "evm-sig", "md5", inode=Inode(mode=0))
    return _filled(item.line() + b"\n", imalist.PART_BYTES)


def _inode_records() -> bytes:
    return _filled(Item(b"1", bytes(16), "evm-sig", "md5").record(), imalist.PART_BYTES)


def _unread_format() -> bytes:
    return b"10 " + b"0" * 40 + b" d-ng|n-ng" + b"|sig" * (imalist.MAX_LINE // 4 - 20) + b"\n"


def _members(size: int) -> bytes:
    names = ",".join(f'"{n}":0' for n in range(size // 10))
    return f"{{{names}}}".encode()[:size]


def _pcrs() -> bytes:
    quote = {"pcrs": {"sha256": {str(n): "00" * 32 for n in range(10_000)}}}
    return json.dumps({"Secret": "AAAA", "spire_hw": {"v": 2, "quotes": [quote]}}).encode()[:ANSWER]


def _numbers() -> bytes:
    return b'{"x":[' + b"1," * (ANSWER // 2 - 10) + b"1]}"


def _nested() -> bytes:
    data = b""
    while len(data) < CERTIFICATE - 8:
        data = ekca.tlv(0x30, data)
    return data


def _extensions() -> bytes:
    one = ekca.extension("1.2.3", b"\x05\x00")
    return ekca.tlv(0x30, _filled(one, CERTIFICATE - 8))


def _pem() -> bytes:
    block = b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"
    return _filled(block, FIRST)


def _json(size: int) -> list[Callable[[], bytes]]:
    return [
        lambda: b"[" * size,
        lambda: b'{"a":' * (size // 5),
        lambda: b'{"a":"' + b"\\u0061" * ((size - 10) // 6) + b'"}',
        lambda: b'{"a":' + b"9" * (size - 10) + b"}",
        lambda: _members(size),
    ]


# By target.
WORST: Final[dict[str, list[Callable[[], bytes]]]] = {
    "boot_log": [_many_events, _large_events, _revocations],
    "signature_list": [_long_list],
    "boot_variable": [lambda: firmware.variable(secureboot.IMAGE_SECURITY, "dbx", _long_list())],
    "ima_part": [
        *(_records, _lines, _short_lines, _one_line, _buffers),
        *(_own_formats, _inodes, _inode_records, _unread_format),
    ],
    "inflate": [lambda: zlib.compress(bytes(50_000_000), 9)],
    "tpm_structures": [lambda: bytes(ANSWER), lambda: b"\xff" * ANSWER],
    "tpm_statement": [lambda: bytes(ANSWER), lambda: b"\xffTCG\x80\x18" + b"\xff" * ANSWER],
    "tpm_public": [lambda: bytes(FIRST), lambda: b"\x00\x01" + b"\xff" * FIRST],
    "der": [_nested, _extensions, lambda: b"\x06\x82\x3f\xf0" + b"\xff" * 16_367 + b"\x01"],
    "ek_certificate": [_nested, _extensions],
    "pem": [_pem, lambda: b"-----BEGIN " * (FIRST // 11), lambda: b"\n" * FIRST],
    "tpm_messages": _json(FIRST),
    "tpm_answer": [*_json(ANSWER), _pcrs, _numbers],
    "devid_messages": _json(FIRST),
    "x509pop_messages": _json(FIRST),
    "evidence": _json(FIRST),
}

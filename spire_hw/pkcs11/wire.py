"""What host and worker say to each other over their socket pair.

A frame is a 4-byte length, a kind byte and a 4-byte request number, then the body. Bodies are JSON,
but for signatures, which are packed: they are the hot path and come many to a frame. Neither side
believes the other: lengths are bounded and a body that does not decode raises `EncodingError`.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError
from spire_hw.key import HashAlgorithm, SignOptions
from spire_hw.pkcs11.errors import TokenError

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER: Final = struct.Struct(">IBI")
MAX_BODY: Final = 4 << 20
MAX_BATCH: Final = 64
_KEY: Final = struct.Struct(">HH")
_ITEM: Final = struct.Struct(">BBBiH")
_RESULT: Final = struct.Struct(">BH")


class Kind(IntEnum):
    """Frame kinds; the host asks, the worker answers OK or FAILED with the same number."""

    OPEN = 1
    LIST = 2
    GENERATE = 3
    DESTROY = 4
    SIGN = 5
    PUT_DATA = 6
    PING = 7
    OK = 100
    FAILED = 101


@dataclass(frozen=True, slots=True)
class SignKey:
    """A key to sign with.

    Attributes:
        cka_id: its CKA_ID.
        spki: DER SubjectPublicKeyInfo that its signatures are verified with.
    """

    cka_id: bytes
    spki: bytes


@dataclass(frozen=True, slots=True)
class SignItem:
    """One signature wanted; digest and options are those of `spire_hw.key.Signer.sign`."""

    key: SignKey
    digest: bytes
    options: SignOptions


def encode_frame(kind: Kind, number: int, body: bytes) -> bytes:
    """Return one frame."""
    return HEADER.pack(len(body), kind, number) + body


def decode_header(header: bytes) -> tuple[int, Kind, int]:
    """Return (body length, kind, request number).

    Raises:
        EncodingError: an unknown kind, or a body over `MAX_BODY`.
    """
    length, kind, number = HEADER.unpack(header)
    if length > MAX_BODY:
        raise EncodingError("worker frame", f"{length} bytes are too many")
    try:
        return length, Kind(kind), number
    except ValueError:
        raise EncodingError("worker frame", f"kind {kind} is unknown") from None


def encode_json(fields: dict[str, Any]) -> bytes:
    """Return a JSON body; bytes travel as base64 text, see `pack_bytes`."""
    return json.dumps(fields).encode("utf-8")


def decode_json(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON body.

    Raises:
        EncodingError: not a JSON object.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise EncodingError("worker frame", "body is not JSON") from None
    if not isinstance(fields, dict):
        raise EncodingError("worker frame", "body is not a JSON object")
    return fields


def pack_bytes(value: bytes) -> str:
    """Return bytes as text for a JSON body."""
    return base64.b64encode(value).decode("ascii")


def unpack_bytes(value: object) -> bytes:
    """Return what `pack_bytes` was given.

    Raises:
        EncodingError: not base64 text.
    """
    if not isinstance(value, str):
        raise EncodingError("worker frame", "bytes are missing")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        raise EncodingError("worker frame", "bytes are not base64") from None


def encode_items(items: Sequence[SignItem]) -> bytes:
    """Return the body of a SIGN frame: the keys, then the items that refer to them."""
    keys: dict[SignKey, int] = {}
    parts: list[bytes] = []
    for item in items:
        options = item.options
        place = keys.setdefault(item.key, len(keys))
        parts += (
            _ITEM.pack(
                place, options.hash.value, options.pss, options.salt_length, len(item.digest)
            ),
            item.digest,
        )
    table = [bytes((len(keys),))]
    for key in keys:
        table += (_KEY.pack(len(key.cka_id), len(key.spki)), key.cka_id, key.spki)
    return b"".join((*table, bytes((len(items),)), *parts))


def decode_items(body: bytes) -> list[SignItem]:
    """Return the signatures wanted.

    Raises:
        EncodingError: truncated, or more than `MAX_BATCH`.
    """
    reader = _Reader(body)
    keys = []
    for _ in range(reader.count()):
        id_length, spki_length = _KEY.unpack(reader.take(_KEY.size))
        keys.append(SignKey(reader.take(id_length), reader.take(spki_length)))
    items = []
    for _ in range(reader.count()):
        place, hash_number, pss, salt, length = _ITEM.unpack(reader.take(_ITEM.size))
        try:
            options = SignOptions(HashAlgorithm(hash_number), bool(pss), salt)
            items.append(SignItem(keys[place], reader.take(length), options))
        except (ValueError, IndexError):
            raise EncodingError("worker frame", "hash or key is unknown") from None
    reader.end()
    return items


def encode_results(results: Sequence[bytes | TokenError]) -> bytes:
    """Return the body of the answer to SIGN."""
    parts = [bytes((len(results),))]
    for result in results:
        failed = isinstance(result, TokenError)
        payload = encode_json(dict(result.to_dict())) if isinstance(result, TokenError) else result
        parts += (_RESULT.pack(failed, len(payload)), payload)
    return b"".join(parts)


def decode_results(body: bytes, expected: int) -> list[bytes | TokenError]:
    """Return signature or error of each item.

    Raises:
        EncodingError: truncated, or not as many as asked for.
    """
    reader = _Reader(body)
    if reader.count() != expected:
        raise EncodingError("worker frame", "wrong number of signatures")
    results: list[bytes | TokenError] = []
    for _ in range(expected):
        failed, length = _RESULT.unpack(reader.take(_RESULT.size))
        payload = reader.take(length)
        results.append(decode_error(payload) if failed else payload)
    reader.end()
    return results


def decode_error(body: bytes) -> TokenError:
    """Return the error in a FAILED body.

    Raises:
        EncodingError: not an error.
    """
    try:
        return TokenError.from_dict(decode_json(body))
    except ValueError as e:
        raise EncodingError("worker frame", "error does not decode") from e


class _Reader:
    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def count(self) -> int:
        count = self.take(1)[0]
        if count > MAX_BATCH:
            raise EncodingError("worker frame", f"batch of {count} is too large")
        return count

    def take(self, length: int) -> bytes:
        piece = self._body[self._at : self._at + length]
        if len(piece) != length:
            raise EncodingError("worker frame", "truncated", self._at)
        self._at += length
        return piece

    def end(self) -> None:
        if self._at != len(self._body):
            raise EncodingError("worker frame", "bytes left over", self._at)

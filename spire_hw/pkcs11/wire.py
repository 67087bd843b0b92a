"""What host and worker say to each other over their socket pair.

A frame is a 4-byte length, a kind byte and a 4-byte request number, then the body. Bodies are JSON,
but for signatures, which are packed: they are the hot path and come many to a frame. Neither side
believes the other: lengths are bounded and a body that does not decode raises `EncodingError`.
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from spire_hw.errors import EncodingError
from spire_hw.key import HashAlgorithm, SignOptions
from spire_hw.pkcs11.errors import TokenError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HEADER: Final = struct.Struct(">IBI")
MAX_BODY: Final = 4 << 20
MAX_BATCH: Final = 64
# Reason of an error: the CKA_ID of a pair that was to be made is another object's.
ID_TAKEN: Final = "hsm.id_taken"
_LENGTH: Final = struct.Struct(">I")
# Lengths of CKA_ID and public key; hash, PSS, salt; number of digests and the length of each.
_RUN: Final = struct.Struct(">HHBBiBH")


class Kind(IntEnum):
    """Frame kinds; the host asks, the worker answers OK or FAILED with the same number."""

    OPEN = 1
    LIST = 2
    GENERATE = 3
    DESTROY = 4
    SIGN = 5
    PUT_DATA = 6
    PING = 7
    VERIFY = 8
    LOGIN = 9
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


class SignItem(NamedTuple):
    """One signature wanted; digest and options are those of `spire_hw.key.Signer.sign`."""

    key: SignKey
    digest: bytes
    options: SignOptions


@dataclass(frozen=True, slots=True)
class SignRun:
    """Signatures wanted of one key in one way, as a worker gets them."""

    key: SignKey
    options: SignOptions
    digests: Sequence[bytes]


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
    except ValueError:
        raise EncodingError("worker frame", "bytes are not base64") from None


def encode_items(items: Sequence[SignItem]) -> bytes:
    """Return the body of a SIGN frame; neighbours that are alike share a run."""
    parts = [b""]
    runs = 0
    for key, options, digests in _runs_of(items):
        head = _RUN.pack(
            *(len(key.cka_id), len(key.spki)),
            *(options.hash.value, options.pss, options.salt_length),
            *(len(digests), len(digests[0])),
        )
        parts += (head, key.cka_id, key.spki, *digests)
        runs += 1
    parts[0] = bytes((runs,))
    return b"".join(parts)


def _runs_of(items: Sequence[SignItem]) -> Iterator[tuple[SignKey, SignOptions, list[bytes]]]:
    """Yield neighbours that differ in their digests only, and not in the length of those."""
    if not items:
        return
    key, digest, options = items[0]
    size = len(digest)
    run: list[bytes] = []
    for other_key, digest, other_options in items:
        # Mostly they are the same objects: a comparison would take longer than all the rest.
        is_like = (
            (other_key is key or other_key == key)
            and (other_options is options or other_options == options)
            and len(digest) == size
        )
        if not is_like:
            yield key, options, run
            key, options, size, run = other_key, other_options, len(digest), []
        run.append(digest)
    yield key, options, run


def decode_items(body: bytes) -> list[SignRun]:
    """Return the signatures wanted.

    Raises:
        EncodingError: truncated, or more than `MAX_BATCH`.
    """
    reader = _Reader(body)
    runs = []
    room = MAX_BATCH
    for _ in range(reader.count()):
        fields = _RUN.unpack(reader.take(_RUN.size))
        id_length, spki_length, hash_number, pss, salt, count, size = fields
        room -= count
        if room < 0:
            raise EncodingError("worker frame", "batch is too large")
        try:
            options = SignOptions(HashAlgorithm(hash_number), bool(pss), salt)
        except ValueError:
            raise EncodingError("worker frame", "hash is unknown") from None
        key = SignKey(reader.take(id_length), reader.take(spki_length))
        runs.append(SignRun(key, options, reader.take_all((size,) * count)))
    reader.end()
    return runs


def encode_verify(items: bytes, results: bytes) -> bytes:
    """Return the body of a VERIFY frame: what was asked of a token, and what it answered.

    Args:
        items: body of the SIGN frame.
        results: body of the answer to it.
    """
    return _LENGTH.pack(len(items)) + items + results


def decode_verify(body: bytes) -> tuple[list[SignRun], list[bytes | TokenError]]:
    """Return what was to be signed and what came of each digest.

    Raises:
        EncodingError: truncated, or there are not as many outputs as digests.
    """
    if len(body) < _LENGTH.size:
        raise EncodingError("worker frame", "truncated")
    (length,) = _LENGTH.unpack_from(body)
    end = _LENGTH.size + length
    runs = decode_items(body[_LENGTH.size : end])
    return runs, decode_results(body[end:], sum(len(run.digests) for run in runs))


def encode_results(results: Sequence[bytes | TokenError]) -> bytes:
    """Return the body of the answer to SIGN: count, failed or not, lengths, then the contents."""
    failed = bytes(isinstance(r, TokenError) for r in results)
    payloads = [encode_json(dict(r.to_dict())) if isinstance(r, TokenError) else r for r in results]
    lengths = _lengths(len(results)).pack(*map(len, payloads))
    return b"".join((bytes((len(results),)), failed, lengths, *payloads))


def decode_results(body: bytes, expected: int) -> list[bytes | TokenError]:
    """Return signature or error of each item.

    Raises:
        EncodingError: truncated, or not as many as asked for.
    """
    reader = _Reader(body)
    if reader.count() != expected:
        raise EncodingError("worker frame", "wrong number of signatures")
    failed = reader.take(expected)
    lengths = _lengths(expected)
    payloads = reader.take_all(lengths.unpack(reader.take(lengths.size)))
    reader.end()
    if not any(failed):
        return list(payloads)
    return [decode_error(p) if bad else p for bad, p in zip(failed, payloads, strict=True)]


@lru_cache(maxsize=MAX_BATCH + 1)
def _lengths(count: int) -> struct.Struct:
    return struct.Struct(f">{count}H")


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

    def take_all(self, lengths: Sequence[int]) -> list[bytes]:
        ends = list(accumulate(lengths, initial=0))
        joined = self.take(ends[-1])
        return [joined[begin:end] for begin, end in pairwise(ends)]

    def end(self) -> None:
        if self._at != len(self._body):
            raise EncodingError("worker frame", "bytes left over", self._at)

"""The text layer of JOSE, strictly: base64url one way only, JSON without surprises.

Spec: RFC 7515 section 2 and RFC 8259; duplicate members, NaN, Infinity, lone surrogates and deep
nesting are refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any, Final

from spire_hw.errors import EncodingError

MAX_DEPTH: Final = 32
_MAX_DIGITS: Final = 400
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)


def encode_base64url(data: bytes) -> str:
    """Return unpadded base64url text."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode_base64url(text: str, what: str) -> bytes:
    """Return the bytes of canonical, unpadded base64url text.

    Raises:
        EncodingError: another alphabet, padding, or bits that encode nothing.
    """
    if _BASE64URL.fullmatch(text) is None:
        raise EncodingError(what, "is not unpadded base64url")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as e:
        raise EncodingError(what, "is not base64url") from e
    if encode_base64url(data) != text:
        raise EncodingError(what, "is not canonical base64url")
    return data


def decode_base64(text: str, what: str) -> bytes:
    """Return the bytes of canonical, padded, plain base64 text.

    Raises:
        EncodingError: another alphabet, missing padding, blanks, or bits that encode nothing.
    """
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as e:
        raise EncodingError(what, "is not base64") from e
    if base64.b64encode(data).decode("ascii") != text:
        raise EncodingError(what, "is not canonical base64")
    return data


def encode_json(value: object, *, indent: int | None = None) -> bytes:
    """Return JSON text, compact unless indented.

    Raises:
        EncodingError: something JSON cannot say.
    """
    try:
        text = json.dumps(
            value,
            allow_nan=False,
            indent=indent,
            separators=(",", ":") if indent is None else (",", ": "),
        )
    except (TypeError, ValueError, RecursionError) as e:
        raise EncodingError("JSON", "value cannot be written as JSON") from e
    return text.encode("ascii")


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the object a JSON text holds.

    Raises:
        EncodingError: not UTF-8, not JSON, not an object, duplicate members, NaN or Infinity, a
            number of more than 400 digits, a lone surrogate, or more than 32 levels.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except UnicodeDecodeError as e:
        raise EncodingError(what, "is not UTF-8", e.start) from e
    except RecursionError as e:
        raise EncodingError(what, "is nested too deeply") from e
    except ValueError as e:
        raise EncodingError(what, "is not strict JSON") from e
    if not isinstance(value, dict):
        raise EncodingError(what, "is not a JSON object")
    _check_tree(value, what)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("number is too long")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in {float("inf"), float("-inf")}:
        raise ValueError("number is not finite")
    return value


def _check_tree(value: object, what: str) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not item.isascii():
                _check_text(item, what)
        if not below:
            return
        level = below
    raise EncodingError(what, "is nested too deeply")


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise EncodingError(what, "holds a lone surrogate") from e

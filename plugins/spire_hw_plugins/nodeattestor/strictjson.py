"""JSON of messages, strict: what two parsers could read differently is refused.

No duplicate members (nor names that differ in case alone), no floats, no special numbers, no
byte-order mark, no lone surrogates, canonical base64. Every fault is an `InvalidInputError` whose
text begins with `envelope: `, or a `LimitError` for size.
"""

from __future__ import annotations

import binascii
import json
from typing import TYPE_CHECKING, Any, Final, NoReturn

from spire_hw.errors import InvalidInputError, LimitError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MAX_DIGITS = 20
_MAX_NUMBER = 2**63
_MAX_TEXT = 128
_MAX_VALUES = 16_384
_LONG_TEXT = 4096


class StrictObject:
    """A JSON object whose members are taken by type; `path` is for messages."""

    def __init__(self, path: str, members: Mapping[str, Any]) -> None:
        self._path = path
        self._members = members

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def has(self, name: str) -> bool:
        """Tell whether a member is there and not null: Go writes null for what it leaves out."""
        return self._members.get(name) is not None

    def names(self) -> set[str]:
        """Return the names of its members."""
        return set(self._members)

    def closed(self, *known: str) -> None:
        """Refuse members other than the known ones."""
        unknown = self._members.keys() - known
        if unknown:
            raise InvalidInputError(f"envelope: unknown member {self._at(shown(min(unknown)))}")

    def _at(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def _get(self, name: str) -> object:
        value = self._members.get(name)
        if value is None or value in ("", {}):
            missing = "member " if not self._path else ""
            raise InvalidInputError(f"envelope: {missing}{self._at(name)} is missing")
        return value

    def _wrong(self, name: str, expected: str) -> InvalidInputError:
        return InvalidInputError(f"envelope: {self._at(name)} must be {expected}")

    def child(self, name: str, otherwise: str = "") -> StrictObject:
        """Return a member that must be an object; `otherwise` replaces the message."""
        value = self._get(name)
        if not isinstance(value, dict):
            raise InvalidInputError(otherwise) if otherwise else self._wrong(name, "an object")
        return StrictObject(self._at(name), value)

    def text(self, name: str) -> str:
        """Return a member that must be a short string."""
        value = self._get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        if len(value) > _MAX_TEXT:
            raise InvalidInputError(f"envelope: {self._at(name)} is too long")
        return value

    def flag(self, name: str) -> bool:
        """Return a member that must be true or false."""
        value = self._members[name]
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def number(self, name: str, *, signed: bool = False) -> int:
        """Return a member that must be an integer of at most 63 bits."""
        value = self._get(name)
        if type(value) is not int:
            raise self._wrong(name, "an integer")
        if (value < 0 and not signed) or abs(value) >= _MAX_NUMBER:
            raise InvalidInputError(f"envelope: {self._at(name)} is out of range")
        return value

    def blob(self, name: str, *, empty: bool = False) -> bytes:
        """Return a member that must be canonical base64, decoded."""
        found = self._members.get(name)
        if type(found) is str and found:
            data = _decode64(found)
            if data is not None:
                return data
        if empty and self._members.get(name) == "":
            return b""
        value = self._get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return decode64(value, self._at(name))

    def optional_blob(self, name: str, *, empty: bool = False) -> bytes | None:
        """Return the same, None when the member is absent."""
        return self.blob(name, empty=empty) if name in self._members else None

    def _list(self, name: str) -> list[object]:
        value = self._members.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def children(self, name: str, limit: int) -> list[StrictObject]:
        """Return a member that must be a list of at most `limit` objects."""
        values = self._list(name)
        if len(values) > limit:
            raise InvalidInputError(f"envelope: {self._at(name)} has more than {limit} entries")
        found = []
        for value in values:
            if not isinstance(value, dict):
                raise self._wrong(name, "a list of objects")
            found.append(StrictObject(self._at(name), value))
        return found

    def texts(self, name: str) -> list[str]:
        """Return a member that must be a list of non-empty strings."""
        values = self._list(name)
        if not all(isinstance(value, str) and value for value in values):
            raise self._wrong(name, "a list of strings")
        return [str(value) for value in values]

    def numbers(self, name: str) -> list[int]:
        """Return a member that must be a list of integers, none negative."""
        found = []
        for value in self._list(name):
            if type(value) is not int or not 0 <= value < _MAX_NUMBER:
                raise self._wrong(name, "a list of numbers")
            found.append(value)
        return found


def dump(value: object) -> bytes:
    """Return a message as it is sent; what is bytes in it becomes padded base64, as in Go."""
    return _ENCODER.encode(value).encode("ascii")


def _text_of(value: object) -> str:
    if isinstance(value, bytes):
        return _encode64(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), default=_text_of)


def load(data: bytes, limit: int) -> StrictObject:
    """Read one JSON object of at most `limit` bytes.

    Raises:
        LimitError: larger, or with more values than any message has.
        InvalidInputError: not one JSON object in strict form.
    """
    if len(data) > limit:
        raise LimitError(f"envelope: payload is {len(data)} bytes, limit {limit}")
    # A million bytes of small members cost more than all that is checked afterwards.
    if data.count(b",") > _MAX_VALUES:
        raise LimitError(f"envelope: more than {_MAX_VALUES} values")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InvalidInputError("envelope: not UTF-8 JSON") from e
    if text.startswith("\ufeff") or "\0" in text:
        raise InvalidInputError("envelope: not UTF-8 JSON")
    try:
        value = _DECODER.decode(text)
    except RecursionError as e:
        raise InvalidInputError("envelope: nested too deep") from e
    except json.JSONDecodeError as e:
        raise InvalidInputError(f"envelope: one JSON object expected: {e.msg}") from e
    if not isinstance(value, dict):
        raise InvalidInputError("envelope: one JSON object expected")
    if "\\u" in text:
        _check_text(value)
    return StrictObject("", value)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(set(map(str.casefold, members))) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name.casefold() in seen:
                raise InvalidInputError(f"envelope: member {shown(name)} appears twice")
            seen.add(name.casefold())
    return members


def _refuse_number(_: str) -> NoReturn:
    raise InvalidInputError("envelope: number not allowed here")


def _read_number(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        _refuse_number(text)
    return int(text)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_float=_refuse_number,
    parse_constant=_refuse_number,
    parse_int=_read_number,
)


def _check_text(value: object) -> None:
    if isinstance(value, dict):
        for name, member in value.items():
            _check_text(name)
            _check_text(member)
    elif isinstance(value, list):
        for member in value:
            _check_text(member)
    elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise InvalidInputError("envelope: text is not valid Unicode")


def decode64(text: str, what: str, stage: str = "envelope") -> bytes:
    """Decode padded base64 that has exactly one spelling.

    Raises:
        InvalidInputError: any other spelling; the message has `stage` in front.
    """
    data = _decode64(text)
    if data is None:
        raise InvalidInputError(f"{stage}: {what} is not canonical base64")
    return data


def _decode64(text: str) -> bytes | None:
    """Decode base64 that has exactly one spelling, None for any other."""
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None
    if len(text) > _LONG_TEXT:
        # Strict mode leaves open the spare bits of the last group, and nothing else.
        whole, text = len(text) == (len(data) + 2) // 3 * 4, text[-4:]
        return data if whole and _encode64(data[-(len(data) % 3 or 3) :]) == text else None
    return data if _encode64(data) == text else None


def _encode64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def shown(text: str) -> str:
    """Return foreign text fit for a message: ASCII, escaped, at most 64 characters of it."""
    return ascii(text[:64])[1:-1]

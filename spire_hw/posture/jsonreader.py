"""A JSON document read member by member; everything unexpected is refused with its place."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final, NoReturn

from spire_hw.errors import EncodingError

if TYPE_CHECKING:
    from collections.abc import Collection

WHAT: Final = "evidence document"
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*", re.ASCII)
_MAX_SHOWN: Final = 64


def refuse(where: str, reason: str) -> NoReturn:
    """Refuse the document.

    Raises:
        EncodingError: always.
    """
    raise EncodingError(WHAT, f"{_shown(where)}: {reason}" if where else reason)


def load(data: bytes) -> Any:
    """Return plain values of JSON in UTF-8.

    Raises:
        EncodingError: anything else, repeated members and numbers with a fraction included.
    """
    try:
        text = data.decode("utf-8")
        return json.loads(
            text, object_pairs_hook=_unique, parse_float=_no_number, parse_constant=_no_number
        )
    except UnicodeDecodeError as e:
        raise EncodingError(WHAT, "is not UTF-8 text", e.start) from e
    except json.JSONDecodeError as e:
        raise EncodingError(WHAT, f"is not JSON: {e.msg}", e.pos) from e
    except RecursionError as e:
        raise EncodingError(WHAT, "is nested too deep") from e
    except EncodingError:
        raise
    except ValueError as e:  # more digits than Python reads
        raise EncodingError(WHAT, "holds a number that is not allowed") from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        refuse(twice, "appears twice")
    return made


def _no_number(text: str) -> NoReturn:
    refuse("", f"number {text[:_MAX_SHOWN]} is not allowed")


class Members:
    """One object; every member has to be taken.

    Args:
        value: what should be an object.
        where: its place, "" for the document.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            refuse(where, "expected an object")
        self._left: dict[str, Any] = dict(value)
        self._where = where

    def end(self) -> None:
        """Make sure nothing is left.

        Raises:
            EncodingError: a member nobody knows.
        """
        if self._left:
            refuse(self._place(min(self._left)), "is not known")

    def names(self) -> list[str]:
        """Return the names that are left, sorted."""
        return sorted(self._left)

    def is_null(self, name: str) -> bool:
        """Tell whether a member is null, and take it if it is."""
        if name in self._left and self._left[name] is None:
            del self._left[name]
            return True
        return False

    def text(self, name: str) -> str:
        """Take a text."""
        return self._text(self._take(name), name)

    def optional_text(self, name: str) -> str | None:
        """Take a text or null."""
        return None if self.is_null(name) else self.text(name)

    def choice(self, name: str, known: Collection[str]) -> str:
        """Take one of some words."""
        word = self.text(name)
        if word not in known:
            refuse(self._place(name), f"expected one of {', '.join(known)}")
        return word

    def texts(self, name: str) -> list[str]:
        """Take a list of texts."""
        return [self._text(value, name) for value in self.plain_list(name)]

    def boolean(self, name: str) -> bool:
        """Take true or false."""
        value = self._take(name)
        if not isinstance(value, bool):
            refuse(self._place(name), "expected true or false")
        return value

    def optional_boolean(self, name: str) -> bool | None:
        """Take true, false or null."""
        return None if self.is_null(name) else self.boolean(name)

    def whole(self, name: str, most: int = 2**31 - 1) -> int:
        """Take a whole number from 0 to `most`."""
        return self._whole(self._take(name), name, most)

    def wholes(self, name: str, most: int) -> list[int]:
        """Take a list of whole numbers from 0 to `most`."""
        return [self._whole(value, name, most) for value in self.plain_list(name)]

    def octets(self, name: str) -> bytes:
        """Take bytes in hexadecimal."""
        return self._octets(self._take(name), name)

    def each_octets(self, name: str) -> list[bytes]:
        """Take a list of bytes in hexadecimal."""
        return [self._octets(value, name) for value in self.plain_list(name)]

    def members(self, name: str) -> Members:
        """Take an object."""
        return Members(self._take(name), self._place(name))

    def each_members(self, name: str) -> list[Members]:
        """Take a list of objects."""
        values = self.plain_list(name)
        return [Members(value, f"{self._place(name)}.{n}") for n, value in enumerate(values)]

    def plain_list(self, name: str) -> list[Any]:
        """Take a list as it is."""
        value = self._take(name)
        if not isinstance(value, list):
            refuse(self._place(name), "expected a list")
        return value

    def _take(self, name: str) -> Any:
        if name not in self._left:
            refuse(self._place(name), "is missing")
        return self._left.pop(name)

    def _place(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def _text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            refuse(self._place(name), "expected text")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            refuse(self._place(name), "is not Unicode text: lone surrogate")
        return value

    def _whole(self, value: Any, name: str, most: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            refuse(self._place(name), f"expected a whole number from 0 to {most}")
        return value

    def _octets(self, value: Any, name: str) -> bytes:
        if not isinstance(value, str) or _HEX.fullmatch(value) is None:
            refuse(self._place(name), "expected bytes in lower-case hexadecimal")
        return bytes.fromhex(value)


def _shown(where: str) -> str:
    return ascii(where[: 2 * _MAX_SHOWN])[1:-1]

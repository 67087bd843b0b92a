"""What is a selector: a fact about a node or workload, written `type:value`."""

from __future__ import annotations

from typing import Final, NamedTuple, Self, TypeAlias

from typing_extensions import override

from spire_hw.errors import InvalidInputError

_MAX_TYPE_BYTES: Final = 255
_MAX_VALUE_BYTES: Final = 2048


class _Fields(NamedTuple):
    type: str
    value: str


class Selector(_Fields):
    """A selector; equal, hashed and ordered by (type, value).

    A tuple underneath, so that matching sets of them runs at C speed.

    Args:
        type: who found out, such as `unix`; at most 255 bytes, no colon.
        value: what was found, such as `uid:1000`; at most 2,048 bytes.

    Raises:
        InvalidInputError: a part is empty, too long, has a NUL or is not Unicode; colon in type.
    """

    __slots__ = ()

    def __new__(cls, type: str, value: str) -> Self:  # noqa: A002 - upstream's field name
        """Check both parts and build the selector."""
        _check_part("type", type, _MAX_TYPE_BYTES)
        if ":" in type:
            raise InvalidInputError("selector type contains ':'")
        _check_part("value", value, _MAX_VALUE_BYTES)
        return super().__new__(cls, type, value)

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Return the selector written `type:value`; the value may hold further colons.

        Raises:
            InvalidInputError: no colon, or a part that is not allowed.
        """
        kind, colon, value = text.partition(":")
        if not colon:
            raise InvalidInputError("selector is not of the form type:value")
        return cls(kind, value)

    @override
    def __str__(self) -> str:
        return f"{self.type}:{self.value}"


SelectorSet: TypeAlias = frozenset[Selector]


def _check_part(what: str, text: str, limit: int) -> None:
    if not text:
        raise InvalidInputError(f"selector {what} is empty")
    if text.isascii():
        size = len(text)
    else:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as e:
            raise InvalidInputError(f"selector {what} is not valid Unicode") from e
    if size > limit:
        raise InvalidInputError(f"selector {what} is longer than {limit} bytes")
    if "\0" in text:
        raise InvalidInputError(f"selector {what} contains a NUL character")

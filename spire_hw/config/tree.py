"""What HCL and JSON text becomes: a tree that keeps order, repeats and line numbers.

Reading is the business of `spire_hw.config.hcl`; which keys and types make sense that of
`spire_hw.config.schema`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self, Union

from pydantic_core.core_schema import CoreSchema, is_instance_schema
from typing_extensions import override

from spire_hw.errors import InvalidInputError

MAX_CHARS: Final = 4 * 1024 * 1024  # of text that is read
MAX_DEPTH: Final = 64  # of blocks and lists


class Integer(int):
    """A whole number that remembers how it was written (`0x10`), for fields that want text."""

    text: str

    def __new__(cls, value: int, text: str | None = None) -> Self:
        """Make one; without text its decimal form is taken."""
        made = super().__new__(cls, value)
        made.text = str(value) if text is None else text
        return made


# `list` holds values; an item is never a list of bodies only, that is read as repeated blocks.
Value = Union[str, bool, int, float, "Body", list["Value"]]


@dataclass(frozen=True, slots=True)
class Item:
    """`key = value`; equal to another one whatever the line."""

    key: str
    value: Value
    line: int = 0

    @override
    def __eq__(self, other: object) -> bool:
        """Compare key and value, with `1` and `true` kept apart."""
        if not isinstance(other, Item):
            return NotImplemented
        return self.key == other.key and _same(self.value, other.value)

    @override
    def __hash__(self) -> int:
        """Hash the key: values may be lists."""
        return hash(self.key)


@dataclass(frozen=True, slots=True)
class Block:
    """`key "label" ... { body }`, also written `key = { body }`; lines do not matter to equality."""

    keys: tuple[str, ...]
    body: Body
    line: int = 0

    @override
    def __eq__(self, other: object) -> bool:
        """Compare keys and body."""
        if not isinstance(other, Block):
            return NotImplemented
        return self.keys == other.keys and self.body == other.body

    @override
    def __hash__(self) -> int:
        """Hash the keys."""
        return hash(self.keys)


@dataclass(frozen=True, slots=True)
class Body:
    """What stands between two braces, or in a file.

    Attributes:
        items: items and blocks in the order of the text.
        line: where the body starts, 1-based; 0 when it was not read from text.
        file: the file it was read from, "" when there is none.
    """

    items: tuple[Item | Block, ...] = ()
    line: int = 0
    file: str = ""

    @override
    def __eq__(self, other: object) -> bool:
        """Compare items in order."""
        return self.items == other.items if isinstance(other, Body) else NotImplemented

    @override
    def __hash__(self) -> int:
        """Hash the items."""
        return hash(self.items)

    def __bool__(self) -> bool:
        """Tell whether anything is in it."""
        return bool(self.items)

    def get(self, name: str) -> Value | None:
        """Return the value of an item: the last scalar, or all lists in one; keys in any case."""
        found: Value | None = None
        for item in self.items:
            if not isinstance(item, Item) or item.key.lower() != name.lower():
                continue
            if isinstance(item.value, list) and isinstance(found, list):
                found = [*found, *item.value]
            else:
                found = item.value
        return found

    def line_of(self, name: str) -> int:
        """Return the line of the last item or block of that name, else that of the body."""
        for item in reversed(self.items):
            key = item.key if isinstance(item, Item) else item.keys[0]
            if key.lower() == name.lower():
                return item.line
        return self.line

    def blocks(self, name: str) -> list[Block]:
        """Return the blocks whose first key is name, in any case, in order."""
        return [i for i in self.items if isinstance(i, Block) and i.keys[0].lower() == name.lower()]

    def labelled(self, name: str) -> list[Block]:
        """Return the blocks of that name as (name, label, ...), however the labels were nested.

        `name "label" {}`, `name { label {} }` and `name = [{ label = {} }]` give the same. What
        stands in a `name {}` without being a block is left out; `unlabelled` finds it.
        """
        found: list[Block] = []
        for block in self.blocks(name):
            if len(block.keys) > 1:
                found.append(block)
                continue
            inner = (i for i in block.body.items if isinstance(i, Block))
            found.extend(Block(block.keys + i.keys, i.body, i.line) for i in inner)
        return found

    def unlabelled(self, name: str) -> list[Item]:
        """Return the items directly inside `name {}` blocks, where only labels may stand."""
        bare = (b for b in self.blocks(name) if len(b.keys) == 1)
        return [i for b in bare for i in b.body.items if isinstance(i, Item)]

    def to_hcl(self) -> str:
        """Return HCL text that reads back as an equal tree."""
        return "".join(_print_body(self, ""))

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: object) -> CoreSchema:
        """Let a model hold a body as it is, without looking inside."""
        return is_instance_schema(cls)

    @classmethod
    def empty(cls) -> Body:
        """Return a body without items."""
        return cls()

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Body:
        """Build from plain values: mappings are blocks, lists of mappings repeated blocks."""
        items: list[Item | Block] = []
        for key, value in values.items():
            items.extend(make_items(key, _plain(value), 0))
        return cls(tuple(items))


def make_items(key: str, value: Value, line: int) -> list[Item | Block]:
    """Return `key = value` as the tree has it: bodies, alone or in a list, become blocks."""
    if isinstance(value, Body):
        return [Block((key,), value, line)]
    if isinstance(value, list) and value and all(isinstance(v, Body) for v in value):
        return [Block((key,), v, v.line or line) for v in value if isinstance(v, Body)]
    return [Item(key, value, line)]


def _plain(value: object) -> Value:
    if isinstance(value, Mapping):
        return Body.from_dict(value)
    if isinstance(value, (str, bool, int, float, Body)):
        return value
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    raise InvalidInputError(f"{type(value).__name__} has no place in a configuration")


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, int) and isinstance(b, int):
        return isinstance(a, bool) == isinstance(b, bool) and a == b
    return type(a) is type(b) and a == b


_IDENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)
_ESCAPES: Final = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SPECIAL: Final = re.compile(
    r'\$(?=\{)|[\\"\x00-\x1f\x7f-\x9f\u2028\u2029\ue123\ufeff\ud800-\udfff]'
)


def quote(text: str) -> str:
    """Return text as an HCL string; `${` is written so that no reader takes it for a template."""

    def escape(found: re.Match[str]) -> str:
        char = found[0]
        if char == "$":
            return "\\x24"
        if "\ud800" <= char <= "\udfff":
            raise InvalidInputError("text with a lone surrogate cannot be written")
        return _ESCAPES.get(char) or f"\\u{ord(char):04x}"

    return '"' + _SPECIAL.sub(escape, text) + '"'


def _print_body(body: Body, indent: str) -> Iterator[str]:
    for item in body.items:
        if isinstance(item, Item):
            yield f"{indent}{_print_key(item.key)} = {_print_value(item.value, indent)}\n"
        else:
            keys = " ".join([_print_key(item.keys[0]), *map(quote, item.keys[1:])])
            yield f"{indent}{keys} {{\n"
            yield from _print_body(item.body, indent + "  ")
            yield f"{indent}}}\n"


def _print_key(key: str) -> str:
    plain = _IDENT.fullmatch(key) is not None and key not in {"true", "false"}
    return key if plain else quote(key)


def _print_value(value: Value, indent: str) -> str:  # noqa: PLR0911 - one per type
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Integer):
        return value.text
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value - value != 0:
            raise InvalidInputError("infinity and NaN have no place in a configuration")
        text = repr(value)
        return text if "." in text or "e" in text else text + ".0"
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, Body):
        return "{\n" + "".join(_print_body(value, indent + "  ")) + indent + "}"
    return "[" + ", ".join(_print_value(v, indent) for v in value) + "]"

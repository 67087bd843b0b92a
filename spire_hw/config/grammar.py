"""The grammars behind `spire_hw.config.hcl.parse`, on lark; everything that loads it is lazy.

The parser is LALR and its callbacks run bottom-up, so depth costs no Python stack; the depth cap
protects those who walk the tree later.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
from typing import Any, Final, NoReturn, cast

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import (
    UnexpectedCharacters,
    UnexpectedEOF,
    UnexpectedInput,
    UnexpectedToken,
)
from typing_extensions import override

from spire_hw.config.tree import (
    MAX_CHARS,
    MAX_DEPTH,
    Block,
    Body,
    Integer,
    Item,
    Value,
    make_items,
)
from spire_hw.errors import ConfigError, ConfigFault

_MAX_NUMBER_CHARS: Final = 64
_NESTING: Final = 4  # braces inside one ${...}


def _template() -> str:
    inner = "[^{}]"
    for _ in range(_NESTING):
        inner = rf"(?:[^{{}}]|\{{{inner}*\}})"
    return rf"\$\{{{inner}*\}}"


_HCL: Final = (
    r"""
start: body
body: (_item ","?)*
_item: assign | block
assign: key "=" value
block: key+ object
object: "{" body "}"
key: IDENT | STRING
value: STRING -> string
  | HEREDOC -> heredoc
  | NUMBER -> number
  | FLOAT -> float_
  | BOOL -> bool_
  | object
  | list
list: "[" _commas? "]" | "[" _commas? _values _commas? "]"
_values: value | _values _commas value
_commas: ","+

IDENT: /[^\W\d][\w.\-]*/
BOOL: /(?:true|false)(?![\w.\-])/
FLOAT.2: /-?[0-9]+(?:\.[0-9]*(?:[eE][+\-]?[0-9]+)?|[eE][+\-]?[0-9]+)(?![\w.])/
NUMBER: /-?(?:0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)(?![\w.])/
STRING: /"(?:[^"\\\n$]|\\.|\$(?!\{)|"""
    + _template()
    + r""")*"/
HEREDOC: /<<-?(?P<tag>[^\W]+)\n(?:.*\n)*?[ \t\r\f\v]*(?P=tag)\r*\n/
COMMENT: /#[^\n]*|\/\/[^\n]*|\/\*(?:[^*]|\*(?!\/))*\*\//
WS: /[ \t\r\n]+/
%ignore COMMENT
%ignore WS
"""
)

_JSON: Final = r"""
start: object
object: "{" (pair ("," pair)*)? "}"
pair: STRING ":" value
value: STRING -> string
  | FLOAT -> float_
  | NUMBER -> number
  | BOOL -> bool_
  | "null" -> null
  | object
  | "[" (value ("," value)*)? "]" -> list
STRING: /"(?:[^"\\\x00-\x1f]|\\.)*"/
BOOL: "true" | "false"
FLOAT.2: /-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+\-]?[0-9]+)?|[eE][+\-]?[0-9]+)/
NUMBER: /-?(?:0|[1-9][0-9]*)(?![0-9])/
WS: /[ \t\r\n]+/
%ignore WS
"""


class _Refused(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.fault = ConfigFault(line, message)


class _Depth:
    """A subtree and how deep it is, so that depth is known without walking."""

    __slots__ = ("depth", "line", "value")

    def __init__(self, value: Value | None, depth: int, line: int) -> None:
        self.value = value
        self.depth = depth
        self.line = line


_Part = tuple[list[Item | Block], int]


@v_args(inline=True)
class _Common(Transformer[Token, Body]):
    """Scalars, lists and bodies of both languages."""

    def __init__(self) -> None:
        super().__init__()
        self.file = ""

    def string(self, token: Token) -> _Depth:
        return _Depth(self._text(token), 0, _line(token))

    def bool_(self, token: Token) -> _Depth:
        return _Depth(str(token) == "true", 0, _line(token))

    def number(self, token: Token) -> _Depth:
        text = str(token)
        if len(text) > _MAX_NUMBER_CHARS:
            raise _Refused(_line(token), "number is too long")
        digits = text.removeprefix("-")
        if digits[:2].lower() == "0x":
            value = int(digits, 16)
        else:
            value = int(digits, 8 if digits.startswith("0") else 10)
        return _Depth(Integer(-value if text[0] == "-" else value, text), 0, _line(token))

    def float_(self, token: Token) -> _Depth:
        value = float(token) if len(token) <= _MAX_NUMBER_CHARS else math.inf
        if not math.isfinite(value):
            raise _Refused(_line(token), "number is out of range")
        return _Depth(value, 0, _line(token))

    def list(self, *values: _Depth) -> _Depth:
        line = values[0].line if values else 0
        depth = _deeper(max((v.depth for v in values), default=0), line)
        return _Depth([v.value for v in values if v.value is not None], depth, line)

    def value(self, inner: _Depth) -> _Depth:
        return inner

    def start(self, held: _Depth) -> Body:
        body = held.value
        if not isinstance(body, Body):
            raise _Refused(1, "the file must hold a body")
        return body

    def _body(self, parts: tuple[_Part, ...]) -> _Depth:
        items = tuple(item for part, _ in parts for item in part)
        line = items[0].line if items else 0
        depth = _deeper(max((depth for _, depth in parts), default=0), line)
        return _Depth(Body(items, line, self.file), depth, line)

    def _text(self, token: Token) -> str:
        raise NotImplementedError


@v_args(inline=True)
class _Hcl(_Common):
    def heredoc(self, token: Token) -> _Depth:
        return _Depth(_heredoc(str(token)), 0, _line(token))

    def key(self, token: Token) -> tuple[str, int]:
        text = self._text(token) if token.type == "STRING" else str(token)
        if token.type == "IDENT" and text in {"true", "false"}:
            raise _Refused(_line(token), f"{text} cannot be a key")
        return text, _line(token)

    def assign(self, key: tuple[str, int], value: _Depth) -> _Part:
        return _pair(key, value)

    def block(self, *parts: Any) -> _Part:
        keys = [p[0] for p in parts[:-1]]
        held: _Depth = parts[-1]
        if not isinstance(held.value, Body):
            raise _Refused(parts[0][1], "expected a body")
        return [Block(tuple(keys), held.value, parts[0][1])], held.depth

    def body(self, *parts: _Part) -> _Depth:
        return self._body(parts)

    def object(self, body: _Depth) -> _Depth:
        return body

    @override
    def _text(self, token: Token) -> str:
        return _unquote(str(token), _line(token))


@v_args(inline=True)
class _Json(_Common):
    def null(self) -> _Depth:
        return _Depth(None, 0, 0)

    def pair(self, key: Token, value: _Depth) -> _Part:
        return _pair((self._text(key), _line(key)), value)

    def object(self, *parts: _Part) -> _Depth:
        return self._body(parts)

    @override
    def _text(self, token: Token) -> str:
        try:
            text = str(json.loads(str(token)))
        except ValueError as e:
            raise _Refused(_line(token), "string holds an escape that does not exist") from e
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise _Refused(_line(token), "string is not Unicode text: lone surrogate")
        return text


def _line(token: Token) -> int:
    return token.line or 0


def _deeper(depth: int, line: int) -> int:
    if depth >= MAX_DEPTH:
        raise _Refused(line, f"blocks and lists nest deeper than {MAX_DEPTH}")
    return depth + 1


def _pair(key: tuple[str, int], value: _Depth) -> _Part:
    if value.value is None:
        return [], 0
    return make_items(key[0], value.value, key[1]), value.depth


_ESCAPE: Final = re.compile(
    r"\\(?:(?P<plain>[abfnrtv\\\"])|(?P<octal>[0-7]{3})|x(?P<hex>[0-9a-fA-F]{2})"
    r"|u(?P<u4>[0-9a-fA-F]{4})|U(?P<u8>[0-9a-fA-F]{8})|(?P<bad>.))"
)
_PLAIN: Final = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"',
}  # fmt: skip
_CHUNK: Final = re.compile(_template() + r"|" + _ESCAPE.pattern + r"|[^\\]", re.DOTALL)
_MAX_CODE_POINT: Final = 0x10FFFF
_MAX_BYTE: Final = 0xFF


def _unquote(literal: str, line: int) -> str:
    inner = literal[1:-1]
    if "\\" not in inner:
        return inner
    out = bytearray()
    for found in _CHUNK.finditer(inner):
        if found[0][0] != "\\":
            out += found[0].encode()
        elif found["plain"]:
            out += _PLAIN[found["plain"]].encode()
        elif (raw := found["octal"] or found["hex"]) is not None:
            byte = int(raw, 8 if found["octal"] else 16)
            if byte > _MAX_BYTE:
                raise _Refused(line, f"escape {found[0]} is over 255")
            out.append(byte)
        elif (code := found["u4"] or found["u8"]) is not None:
            point = int(code, 16)
            if point > _MAX_CODE_POINT or 0xD800 <= point <= 0xDFFF:  # noqa: PLR2004 - surrogates
                raise _Refused(line, f"escape {found[0]} is no character")
            out += chr(point).encode()
        else:
            raise _Refused(line, f"escape {found[0]} does not exist")
    try:
        return out.decode()
    except UnicodeDecodeError as e:
        raise _Refused(line, "escapes in a string do not give UTF-8 text") from e


def _heredoc(token: str) -> str:
    head, _, rest = token.partition("\n")
    tag = head.lstrip("<").removeprefix("-")
    content = rest.rstrip("\r\n").removesuffix(tag)
    if not head.startswith("<<-"):
        return content
    lines = content.split("\n")
    prefix = lines[-1]
    if not all(line.startswith(prefix) for line in lines):
        return content[: len(content) - len(prefix)]
    return "\n".join([line.removeprefix(prefix) for line in lines[:-1]] + [""])


class _Language:
    """One grammar with its callbacks; they run inside the parser, hence the lock."""

    def __init__(self, grammar: str, reader: _Common) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._lark = Lark(
            grammar, parser="lalr", lexer="contextual", maybe_placeholders=False, transformer=reader
        )

    def read(self, text: str, file: str) -> Body:
        with self._lock:
            self._reader.file = file
            # With callbacks inside the parser the result is what `start` returned, not a tree.
            return cast("Body", self._lark.parse(text))


@functools.cache
def _hcl() -> _Language:
    return _Language(_HCL, _Hcl())


@functools.cache
def _json() -> _Language:
    return _Language(_JSON, _Json())


def parse(text: str, file: str) -> Body:
    """Read HCL or JSON text; see `spire_hw.config.hcl.parse`."""
    if len(text) > MAX_CHARS:
        _refuse(file, 0, f"the text is longer than {MAX_CHARS} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(file, 0, "the text is not Unicode: lone surrogate")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if "\0" in text:
        _refuse(file, text[: text.index("\0")].count("\n") + 1, "the text holds a NUL character")
    as_json = text.lstrip(" \t\r\n").startswith("{")
    try:
        return (_json() if as_json else _hcl()).read(text, file)
    except UnexpectedInput as e:
        line = e.line if e.line and e.line > 0 else text.count("\n") + 1
        message = f"{_sentence(e, text)} (column {max(1, e.column)})"
        raise ConfigError(file or "configuration", [ConfigFault(line, message)]) from e
    except _Refused as e:
        raise ConfigError(file or "configuration", [e.fault]) from e


def _refuse(file: str, line: int, message: str) -> NoReturn:
    raise ConfigError(file or "configuration", [ConfigFault(line, message)])


_MAX_SHOWN: Final = 24


def _sentence(error: UnexpectedInput, text: str) -> str:
    if isinstance(error, UnexpectedEOF):
        return "the text ends too early"
    if isinstance(error, UnexpectedToken):
        if error.token.type == "$END":
            return "the text ends too early; is a closing brace or bracket missing?"
        shown = str(error.token)[:_MAX_SHOWN]
        if "EQUAL" in error.accepts and "LBRACE" in error.accepts:
            return f"expected = or {{ after the key, found {shown!r}"
        return f"{shown!r} cannot stand here"
    if isinstance(error, UnexpectedCharacters):
        rest = text[error.pos_in_stream :][:_MAX_SHOWN].partition("\n")[0]
        hints = {
            '"': "a string is not closed on its line, or holds an escape that does not exist",
            "<": "a heredoc is not closed by its marker on a line of its own",
            "/": "a comment is not closed",
            "'": "strings take double quotes",
        }
        return hints.get(rest[:1], f"{rest!r} cannot stand here; text needs double quotes")
    return "cannot be read"

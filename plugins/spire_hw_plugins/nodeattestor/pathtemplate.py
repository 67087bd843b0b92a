"""`agent_path_template`: which path below `/spire/agent` a node gets (no I/O).

The part of Go's text/template that such templates use: text, and actions of fields, literals and
functions joined by pipes, as in `/cn/{{ .Subject.CommonName | lower }}`. There are no conditions,
loops, variables or comments. A field a node does not have is an error, as upstream has it; what
comes out has to be a path of a SPIFFE ID.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.config.schema import nearest
from spire_hw.errors import InvalidInputError
from spire_hw.spiffeid import TrustDomain, check_segment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from spire_hw.spiffeid import SpiffeId

Value = str | int | list[str] | dict[str, "Value"]

_MAX_TEMPLATE: Final = 2048
_MAX_OUTPUT: Final = 2048
_MAX_NESTED: Final = 16
_ACTION: Final = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
_TOKEN: Final = re.compile(
    r"\s*(?:"
    r"(?P<field>(?:\.[A-Za-z_][A-Za-z0-9_]*)+)"
    r'|(?P<string>"(?:[^"\\\n]|\\["\\])*")'
    r"|(?P<raw>`[^`]*`)"
    r"|(?P<number>-?[0-9]{1,9})(?![A-Za-z0-9_])"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign>[|()])"
    r")"
)


def _str(value: Value) -> str:
    if not isinstance(value, str | int):
        raise InvalidInputError("a function of the template needs text; use index for lists")
    return str(value)


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise InvalidInputError("a function of the template needs a number")
    return value


def _trunc(length: Value, text: Value) -> str:
    count, whole = _int(length), _str(text)
    return whole[count:] if count < 0 else whole[:count]


def _substr(start: Value, end: Value, text: Value) -> str:
    first, last, whole = _int(start), _int(end), _str(text)
    if first < 0:
        return whole[: max(last, 0)]
    return whole[first:] if last < 0 or last > len(whole) else whole[first:last]


def _index(values: Value, key: Value) -> Value:
    if isinstance(values, dict):
        return _member(values, _str(key))
    if not isinstance(values, list):
        raise InvalidInputError("index needs a list or a map")
    number = _int(key)
    if not 0 <= number < len(values):
        raise InvalidInputError(f"index {number} is out of range")
    return values[number]


def _sha1(text: Value) -> str:
    return hashlib.sha1(_str(text).encode(), usedforsecurity=False).hexdigest()


# Name to number of arguments and function; as in Go's templates and the sprig library.
_FUNCTIONS: Final[Mapping[str, tuple[int, Callable[..., Value]]]] = {
    "index": (2, _index),
    "lower": (1, lambda text: _str(text).lower()),
    "upper": (1, lambda text: _str(text).upper()),
    "trim": (1, lambda text: _str(text).strip()),
    "nospace": (1, lambda text: "".join(_str(text).split())),
    "trimAll": (2, lambda cut, text: _str(text).strip(_str(cut))),
    "trimPrefix": (2, lambda cut, text: _str(text).removeprefix(_str(cut))),
    "trimSuffix": (2, lambda cut, text: _str(text).removesuffix(_str(cut))),
    "replace": (3, lambda old, new, text: _str(text).replace(_str(old), _str(new))),
    "trunc": (2, _trunc),
    "substr": (3, _substr),
    "default": (2, lambda other, value: value or other),
    "sha1sum": (1, _sha1),
    "sha256sum": (1, lambda text: hashlib.sha256(_str(text).encode()).hexdigest()),
    "toString": (1, _str),
}


@dataclass(frozen=True, slots=True)
class _Field:
    """A path of names into what the node is known by."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """A function with operands; the result of the command before a pipe comes last."""

    name: str
    operands: tuple[_Operand, ...]


_Operand = _Field | _Call | str | int


class PathTemplate:
    """A template that was parsed."""

    def __init__(self, parts: Sequence[str | _Call | _Field]) -> None:
        self._parts = tuple(parts)

    @classmethod
    def parse(cls, text: str) -> PathTemplate:
        """Read a template.

        Raises:
            InvalidInputError: longer than 2048 characters, an action that is not closed or not
                understood, or an unknown function.
        """
        if len(text) > _MAX_TEMPLATE:
            raise InvalidInputError(f"template is longer than {_MAX_TEMPLATE} characters")
        parts: list[str | _Call | _Field] = []
        at = 0
        trim = False
        for found in _ACTION.finditer(text):
            before = text[at : found.start()]
            before = before.lstrip() if trim else before
            parts.append(_plain(before.rstrip() if found[1] else before))
            parts.append(_Parser(found[2]).action())
            at, trim = found.end(), bool(found[3])
        parts.append(_plain(text[at:].lstrip() if trim else text[at:]))
        return cls(parts)

    def execute(self, data: Mapping[str, Value]) -> str:
        """Return the text for one node.

        Args:
            data: field name to value.

        Raises:
            InvalidInputError: a field that is not there, an argument that does not fit its
                function, or more than 2048 characters.
        """
        made = ""
        for part in self._parts:
            made += part if isinstance(part, str) else _shown(_value(part, data))
            if len(made) > _MAX_OUTPUT:
                raise InvalidInputError(f"path is longer than {_MAX_OUTPUT} characters")
        return made

    def agent_id(self, trust_domain: TrustDomain, data: Mapping[str, Value]) -> SpiffeId:
        """Return the agent ID of one node.

        Raises:
            InvalidInputError: as `execute`, or what came out is no path of a SPIFFE ID.
        """
        path = self.execute(data)
        if not path.startswith("/"):
            raise InvalidInputError("agent_path_template gives a path that does not start with /")
        segments = [check_segment(segment) for segment in path[1:].split("/")]
        return trust_domain.member("spire", "agent", *segments)


class _Parser:
    """Reads one action."""

    def __init__(self, text: str) -> None:
        if text.count("(") > _MAX_NESTED:
            raise InvalidInputError("template action is nested too deep")
        self._text = text
        self._tokens = _tokens(text)
        self._at = 0

    def action(self) -> _Call | _Field:
        made = self._pipeline()
        if self._at != len(self._tokens):
            raise self._wrong()
        if isinstance(made, str | int):
            # A literal alone is legal in Go; wrapping it keeps text apart from actions.
            return _Call("toString", (made,))
        return made

    def _pipeline(self) -> _Operand:
        made = self._command(())
        while self._peek() == ("sign", "|"):
            self._at += 1
            made = self._command((made,))
        return made

    def _command(self, piped: tuple[_Operand, ...]) -> _Operand:
        kind, text = self._next()
        if kind != "name":
            self._at -= 1
            if piped:
                raise InvalidInputError(f"a pipe needs a function after it: {self._text.strip()}")
            return self._operand()
        if text not in _FUNCTIONS:
            hint = nearest(text, _FUNCTIONS) or f"; there are {', '.join(sorted(_FUNCTIONS))}"
            raise InvalidInputError(f'template function "{text}" is not known{hint}')
        operands: list[_Operand] = []
        while self._peek()[0] in {"field", "string", "raw", "number"} or self._peek()[1] == "(":
            operands.append(self._operand())
        operands += piped
        wanted = _FUNCTIONS[text][0]
        if len(operands) != wanted:
            raise InvalidInputError(f'"{text}" takes {wanted} arguments, found {len(operands)}')
        return _Call(text, tuple(operands))

    def _operand(self) -> _Operand:
        kind, text = self._next()
        if kind == "field":
            return _Field(tuple(text[1:].split(".")))
        if kind == "string":
            return re.sub(r"\\(.)", r"\1", text[1:-1])
        if kind == "raw":
            return text[1:-1]
        if kind == "number":
            return int(text)
        if text != "(":
            raise self._wrong()
        made = self._pipeline()
        if self._next() != ("sign", ")"):
            raise self._wrong()
        return made

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def _next(self) -> tuple[str, str]:
        found = self._peek()
        if found[0] == "end":
            raise self._wrong()
        self._at += 1
        return found

    def _wrong(self) -> InvalidInputError:
        return InvalidInputError(f"template action is not understood: {{{{{self._text}}}}}")


def _tokens(text: str) -> list[tuple[str, str]]:
    found = []
    at, end = 0, len(text.rstrip())
    while at < end:
        token = _TOKEN.match(text, at)
        if token is None:
            raise InvalidInputError(f"template action is not understood: {{{{{text}}}}}")
        kind = token.lastgroup or ""
        found.append((kind, token[kind]))
        at = token.end()
    return found


def _plain(text: str) -> str:
    if "{{" in text or "}}" in text:
        raise InvalidInputError("template has an action that is not closed")
    return text


def _value(operand: _Operand, data: Mapping[str, Value]) -> Value:
    if isinstance(operand, str | int):
        return operand
    if isinstance(operand, _Call):
        function = _FUNCTIONS[operand.name][1]
        made = function(*(_value(one, data) for one in operand.operands))
        if isinstance(made, str) and len(made) > _MAX_OUTPUT:
            raise InvalidInputError(f"{operand.name} gives more than {_MAX_OUTPUT} characters")
        return made
    found: Value = dict(data)
    for name in operand.names:
        if not isinstance(found, dict):
            raise InvalidInputError(f'".{".".join(operand.names)}" has no field "{name}"')
        found = _member(found, name)
    return found


def _member(values: Mapping[str, Value], name: str) -> Value:
    if name not in values:
        raise InvalidInputError(f'there is no "{name}"{nearest(name, values)}')
    return values[name]


def _shown(value: Value) -> str:
    if isinstance(value, str | int):
        return str(value)
    raise InvalidInputError("a list or map cannot stand in a path; use index")

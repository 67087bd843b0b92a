"""A tree checked against a model: frozen values out, or every fault at once with its line.

Types are as strict as HCL 1 makes them for upstream: a whole number may be quoted, text may be
given as a whole number, booleans are bare, lists need brackets. A model's field may be a scalar,
`GoDuration`, a list of scalars, a model (one block, repeated ones are merged), a list of models
(repeated blocks), a dict of models (labelled blocks) or `Body` (handed on unread).
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping  # noqa: TC003 - pydantic evaluates annotations
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Final, TypeVar, Union

# Looking for plugins reads the metadata of every installed package: 50 ms and 2 MiB.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    PrivateAttr,
    ValidationError,
)
from pydantic.fields import FieldInfo  # noqa: TC002 - as above

from spire_hw.config.duration import format_duration, parse_duration
from spire_hw.config.hcl import Block, Body, Integer, Item, Value
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError


def _duration(value: object) -> timedelta:
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        raise InvalidInputError('expected a duration such as "1h30m"')
    return parse_duration(value)


GoDuration = Annotated[timedelta, BeforeValidator(_duration)]


def at_least(least: timedelta) -> AfterValidator:
    """Return a validator for durations that must not be shorter: `Annotated[GoDuration, ...]`."""

    def long_enough(value: timedelta) -> timedelta:
        if value < least:
            shortest = format_duration(least)
            raise InvalidInputError(f"{format_duration(value)} is below the least, {shortest}")
        return value

    return AfterValidator(long_enough)


def parsed(parse: Callable[[str], object]) -> PlainValidator:
    """Make a validator that turns text into a value, for `Annotated[SpiffeId, ...]`.

    Args:
        parse: raises InvalidInputError for text that will not do.
    """

    def from_text(value: object) -> object:
        if not isinstance(value, str):
            raise InvalidInputError(f"expected text, found {_kind_of(value)}")
        return parse(value)

    return PlainValidator(from_text)


class Model(BaseModel):
    """Base of all configuration models.

    Attributes:
        unsupported: keys that upstream knows and this release does not, with the one value that
            may stand all the same because it asks for nothing (None: no value may).
        tolerant: keys nobody knows are noted instead of refused (upstream's `experimental`).
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True
    )
    unsupported: ClassVar[Mapping[str, object]] = {}
    tolerant: ClassVar[bool] = False

    _lines: dict[str, int] = PrivateAttr(default_factory=dict)
    _ignored: tuple[str, ...] = PrivateAttr(default=())

    def line(self, field: str) -> int:
        """Return the line that gave a field, or where its block starts; 0 when unknown."""
        return self._lines.get(field, self._lines.get("", 0))

    def given(self, field: str) -> bool:
        """Tell whether the field stood in the configuration."""
        return field in self.model_fields_set

    def remember(self, lines: Mapping[str, int], ignored: Iterable[str]) -> None:
        """Keep where the fields stood and what was passed over; called once by the reader."""
        self._lines = dict(lines)
        self._ignored = tuple(ignored)

    def ignored(self) -> tuple[str, ...]:
        """Return the unknown keys of a tolerant model that were passed over."""
        return self._ignored


M = TypeVar("M", bound=Model)


def decode(body: Body, model: type[M], file: str = "") -> M:
    """Check a body and return the model's instance.

    Args:
        body: what was read.
        model: the model class.
        file: name for messages; the body's own file when empty.

    Raises:
        ConfigError: with every fault that was found.
    """
    value, faults = check(body, model)
    if value is None or faults:
        raise ConfigError(file or body.file or "configuration", faults)
    return value


def faults(body: Body, model: type[Model]) -> list[ConfigFault]:
    """Return what is wrong with a body, in the order of its lines; empty when it is good."""
    return check(body, model)[1]


def check(body: Body, model: type[M], line: int = 0) -> tuple[M | None, list[ConfigFault]]:
    """Return the instance (None when there are faults) and the faults, ordered by line."""
    reader = _Reader(model, line or body.line)
    value = reader.read(body)
    found = sorted(reader.faults, key=lambda f: f.line)
    return (None if found else value), found


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the known name closest to name, "" when none is close."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f'; did you mean "{by_lower[close[0]]}"?' if close else ""


class _Reader:
    """Reads one body; nested bodies get readers of their own."""

    def __init__(self, model: type[Model], line: int) -> None:
        self._model = model
        self._line = line
        self.faults: list[ConfigFault] = []
        self._values: dict[str, Any] = {}
        self._lines: dict[str, int] = {"": line}
        self._ignored: list[str] = []
        self._broken: set[str] = set()  # already reported: pydantic need not say it again
        self._fields = {
            (f.alias or name).lower(): (name, f) for name, f in model.model_fields.items()
        }

    def read(self, body: Body) -> Any:
        """Return an instance, or None after a fault."""
        for item in body.items:
            self._take(item)
        for key in self._values.keys() - self._broken:
            held = self._values[key]
            if isinstance(held, _Merged):
                self._values[key] = self._nested(key, held.shape, held.body(), held.line)
        values = {k: v for k, v in self._values.items() if k not in self._broken}
        try:
            made = self._model.model_validate(values, by_name=True, by_alias=False)
        except ValidationError as e:
            self._explain(e)
            return None
        if self._broken:
            return None
        made.remember(self._lines, self._ignored)
        return made

    def _fault(self, line: int, message: str) -> None:
        self.faults.append(ConfigFault(line, message))

    def _take(self, item: Item | Block) -> None:
        key = item.key if isinstance(item, Item) else item.keys[0]
        field = self._fields.get(key.lower())
        if field is None:
            self._unknown(key, item)
            return
        name, info = field
        self._lines[name] = item.line
        shape = _Shape.of(info)
        if isinstance(item, Block):
            self._take_block(name, key, shape, item)
        elif shape.model is not None or shape.is_body:
            if shape.many and item.value == []:
                self._values.setdefault(name, [])
                return
            self._fault(item.line, f'"{key}" is a block: write {key} {{ ... }}')
            self._broken.add(name)
        else:
            self._take_value(name, key, shape, item)

    def _unknown(self, key: str, item: Item | Block) -> None:
        unsupported = {k.lower(): v for k, v in self._model.unsupported.items()}
        if key.lower() in unsupported:
            harmless = unsupported[key.lower()]
            value = item.value if isinstance(item, Item) else item.body
            if harmless is not None and value == harmless:
                return
            self._fault(item.line, f'"{key}" is not supported by this release yet; remove it')
        elif self._model.tolerant:
            self._ignored.append(key)
        else:
            known = [f.alias or n for n, f in self._model.model_fields.items()]
            self._fault(item.line, f'unknown key "{key}"{nearest(key, known)}')

    def _take_value(self, name: str, key: str, shape: _Shape, item: Item) -> None:
        before = self._values.get(name)
        value = shape.coerce(item.value)
        if isinstance(before, list) and isinstance(value, list):
            value = before + value
        self._values[name] = value

    def _take_block(self, name: str, key: str, shape: _Shape, block: Block) -> None:
        if shape.model is None and not shape.is_body:
            self._fault(block.line, f'"{key}" is a value, not a block: write {key} = ...')
            self._broken.add(name)
        elif shape.labelled:
            self._take_labelled(name, key, shape, block)
        elif len(block.keys) > 1:
            self._fault(block.line, f'"{key}" takes no label')
            self._broken.add(name)
        elif shape.many:
            made = self._nested(name, shape, block.body, block.line)
            self._values.setdefault(name, []).append(made)
        else:
            merged = self._values.setdefault(name, _Merged(shape, block.line))
            merged.parts.append(block.body)

    def _take_labelled(self, name: str, key: str, shape: _Shape, block: Block) -> None:
        held: dict[str, Any] = self._values.setdefault(name, {})
        blocks = [block]
        if len(block.keys) == 1:
            body = Body((Block((key,), block.body, block.line),))
            blocks = body.labelled(key)
            for item in body.unlabelled(key):
                self._fault(item.line, f'"{key}" needs a label: {key} "..." {{ ... }}')
                self._broken.add(name)
        for one in blocks:
            label = one.keys[1]
            if len(one.keys) > 2:  # noqa: PLR2004 - name and label
                self._fault(one.line, f'"{key}" takes one label')
                self._broken.add(name)
            elif label in held:
                self._fault(one.line, f'"{key}" "{label}" is given twice')
                self._broken.add(name)
            else:
                held[label] = self._nested(name, shape, one.body, one.line)

    def _nested(self, name: str, shape: _Shape, body: Body, line: int) -> Any:
        if shape.model is None:
            return body
        reader = _Reader(shape.model, line)
        made = reader.read(body)
        self.faults.extend(reader.faults)
        if made is None:
            self._broken.add(name)
        return made

    def _explain(self, error: ValidationError) -> None:
        for one in error.errors(include_url=False):
            name = str(one["loc"][0]) if one["loc"] else ""
            if name in self._broken:
                continue
            info = self._model.model_fields.get(name)
            key = (info.alias if info else None) or name
            where = "".join(f"[{i}]" for i in one["loc"][1:] if isinstance(i, int))
            line = self._lines.get(name, self._line)
            subject = f'"{key}"{where}' if key else "block"
            self._fault(line, f"{subject}: {_words(dict(one))}" if name else _words(dict(one)))


class _Merged:
    """Blocks given several times for one field: they count as one, later keys win."""

    def __init__(self, shape: _Shape, line: int) -> None:
        self.shape = shape
        self.line = line
        self.parts: list[Body] = []

    def body(self) -> Body:
        if len(self.parts) == 1:
            return self.parts[0]
        items = tuple(i for part in self.parts for i in part.items)
        return Body(items, self.parts[0].line, self.parts[0].file)


class _Shape:
    """What a field wants, as far as reading is concerned; pydantic does the checking."""

    def __init__(self, annotation: Any) -> None:
        self.model: type[Model] | None = None
        self.is_body = False
        self.many = False
        self.labelled = False
        self.scalar: Any = None
        self._read(annotation)

    @classmethod
    def of(cls, info: FieldInfo) -> _Shape:
        return cls(info.annotation)

    def _read(self, annotation: Any) -> None:
        annotation = _bare(annotation)
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin in (list, tuple):
            self.many = True
            annotation = _bare(arguments[0])
        elif origin is dict:
            self.labelled = True
            annotation = _bare(arguments[1])
        if isinstance(annotation, type) and issubclass(annotation, Model):
            self.model = annotation
        elif annotation is Body:
            self.is_body = True
        else:
            self.scalar = annotation

    def coerce(self, value: Value) -> Any:
        """Bend a value as far as HCL 1 does for upstream; what is still wrong stays as it is."""
        if isinstance(value, list):
            return [_scalar(v, self.scalar) for v in value] if self.many else value
        return value if self.many else _scalar(value, self.scalar)


def _bare(annotation: Any) -> Any:
    while typing.get_origin(annotation) in (Annotated, Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        annotation = inner[0]
    return annotation


def _scalar(value: Value, wanted: Any) -> Any:
    if isinstance(value, bool):
        return value
    if wanted is int:
        if isinstance(value, str):
            return _quoted_integer(value)
        return int(value) if isinstance(value, int) else value
    if isinstance(value, int) and wanted is not float:
        return value.text if isinstance(value, Integer) else str(value)
    if wanted is float and isinstance(value, int):
        return float(value) if abs(value) < 2**53 else value
    return value


_MAX_INTEGER_CHARS: Final = 32


def _quoted_integer(text: str) -> int | str:
    """Return the number in a string with Go's base prefixes, or the string."""
    digits = text.removeprefix("-").removeprefix("+")
    if not digits.isascii() or not digits[:1].isdigit() or len(text) > _MAX_INTEGER_CHARS:
        return text
    try:
        octal = len(digits) > 1 and digits[0] == "0" and digits[1].isdigit()
        value = int(digits, 8 if octal else 0)
    except ValueError:
        return text
    return -value if text.startswith("-") else value


_EXPECTED: Final[dict[str, str]] = {
    "missing": "is required",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "bool_type": "expected true or false without quotes",
    "float_type": "expected a number",
    "list_type": "expected a list: [ ... ]",
    "tuple_type": "expected a list: [ ... ]",
    "dict_type": "expected labelled blocks",
    "is_instance_of": "expected a block",
}


def _words(error: dict[str, Any]) -> str:  # noqa: PLR0911 - one per kind
    kind, context = error["type"], error.get("ctx") or {}
    if kind == "missing":
        return _EXPECTED[kind]
    if kind in _EXPECTED:
        return f"{_EXPECTED[kind]}, found {_kind_of(error['input'])}"
    if kind == "literal_error":
        known = [name for name in _quoted_names(str(context["expected"])) if name]
        hint = nearest(error["input"], known) if isinstance(error["input"], str) else ""
        return f"must be one of {', '.join(known)}{hint}"
    if kind in {"value_error", "assertion_error"}:
        return str(context.get("error", error["msg"]))
    bounds = {
        "greater_than": ("more than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in bounds:
        words, key = bounds[kind]
        return f"must be {words} {context[key]}"
    if kind == "too_short":
        return f"needs at least {context['min_length']} entries"
    return str(error["msg"])


def _quoted_names(expected: str) -> Iterator[str]:
    """Yield the names out of pydantic's `'a', 'b' or 'c'`."""
    yield from expected.split("'")[1::2]


def _kind_of(value: object) -> str:
    names = {bool: "a boolean", str: "text", float: "a number with a fraction", list: "a list"}
    if isinstance(value, int) and not isinstance(value, bool):
        return "a whole number"
    return next((words for kind, words in names.items() if isinstance(value, kind)), "a block")

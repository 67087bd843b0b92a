"""A tree checked against a model: frozen values out, or every fault at once with its line.

Types are as strict as HCL 1 makes them for upstream: a whole number may be quoted, text may be
given as a whole number, booleans are bare, lists need brackets. A model's field may be a scalar,
`GoDuration`, a list of scalars, a model (one block, repeated ones are merged), a list of models
(repeated blocks), a dict of models (labelled blocks) or `Body` (handed on unread).
"""

from __future__ import annotations

import typing
from collections.abc import Callable  # noqa: TC003 - public signatures stay real
from datetime import timedelta
from typing import Annotated, Any, Final, TypeVar

from spire_hw.config.duration import format_duration, parse_duration
from spire_hw.config.hcl import Block, Body, Integer, Item, Value
from spire_hw.config.model import Checked, Field, Model, Parsed, bare, fit, kind_of, nearest
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError

__all__ = [
    "Checked",
    "Field",
    "GoDuration",
    "Model",
    "at_least",
    "check",
    "decode",
    "faults",
    "nearest",
    "parsed",
]


def _duration(value: object) -> timedelta:
    if not isinstance(value, str):
        raise InvalidInputError('expected a duration such as "1h30m"')
    return parse_duration(value)


GoDuration = Annotated[timedelta, Parsed(_duration)]


def at_least(least: timedelta) -> Checked:
    """Return a check of durations that must not be shorter: `Annotated[GoDuration, ...]`."""

    def long_enough(value: timedelta) -> timedelta:
        if value < least:
            shortest = format_duration(least)
            raise InvalidInputError(f"{format_duration(value)} is below the least, {shortest}")
        return value

    return Checked(long_enough)


def parsed(parse: Callable[[str], object]) -> Parsed:
    """Return what turns text into a value, for `Annotated[SpiffeId, ...]`.

    Args:
        parse: raises InvalidInputError for text that will not do.
    """

    def from_text(value: object) -> object:
        if not isinstance(value, str):
            raise InvalidInputError(f"expected text, found {kind_of(value)}")
        return parse(value)

    return Parsed(from_text)


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


class _Reader:
    """Reads one body; nested bodies get readers of their own."""

    def __init__(self, model: type[Model], line: int) -> None:
        self._model = model
        self._line = line
        self.faults: list[ConfigFault] = []
        self._values: dict[str, Any] = {}
        self._lines: dict[str, int] = {"": line}
        self._ignored: list[str] = []
        self._broken: set[str] = set()  # already reported, not to be checked as well
        self._fields: dict[str, tuple[str, Any]] = {
            (spec.key or name).lower(): (name, hint)
            for name, (hint, spec) in model.model_fields().items()
        }

    def read(self, body: Body) -> Any:
        """Return an instance, or None after a fault."""
        for item in body.items:
            self._take(item)
        for key in self._values.keys() - self._broken:
            held = self._values[key]
            if isinstance(held, _Merged):
                self._values[key] = self._nested(key, held.shape, held.body(), held.line)
        values = {name: self._checked(name) for name in self._values.keys() - self._broken}
        for name, (_, spec) in self._model.model_fields().items():
            if name not in self._values and name not in self._broken and not spec.has_default:
                self._fault(self._line, f'"{spec.key or name}": is required')
                self._broken.add(name)
        if self._broken:
            return None
        made = self._model(**values)
        made.remember(self._lines, self._ignored)
        return made

    def _checked(self, name: str) -> Any:
        hint, spec = self._model.model_fields()[name]

        def complain(place: str, words: str) -> None:
            self._broken.add(name)
            where = f'"{spec.key or name}"{place}'
            self._fault(self._lines.get(name, self._line), f"{where}: {words}")

        return fit(hint, self._values[name], complain)

    def _fault(self, line: int, message: str) -> None:
        self.faults.append(ConfigFault(line, message))

    def _take(self, item: Item | Block) -> None:
        key = item.key if isinstance(item, Item) else item.keys[0]
        field = self._fields.get(key.lower())
        if field is None:
            self._unknown(key, item)
            return
        name, hint = field
        self._lines[name] = item.line
        shape = _Shape(hint)
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
            hint = nearest(key, self._model.model_keys())
            self._fault(item.line, f'unknown key "{key}"{hint}')

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
    """What a field wants, as far as reading is concerned; `fit` does the checking."""

    def __init__(self, annotation: Any) -> None:
        self.model: type[Model] | None = None
        self.is_body = False
        self.many = False
        self.labelled = False
        self.scalar: Any = None
        self._read(annotation)

    def _read(self, annotation: Any) -> None:
        annotation = bare(annotation)
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin in (list, tuple):
            self.many = True
            annotation = bare(arguments[0])
        elif origin is dict:
            self.labelled = True
            annotation = bare(arguments[1])
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

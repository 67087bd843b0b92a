"""Configuration models: classes whose annotations say what a field may hold.

A field is `name: type = default`, or without a default when it is required. Types are str, int, float,
bool, `Literal`, other classes (`Body`), other models, lists and dicts of these, and any of them `| None`.
`Annotated` adds what `Field`, `Parsed` and `Checked` ask for. Annotations are read when a model is first
used; whatever they name must exist at run time in the module of the model.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, Union

from typing_extensions import dataclass_transform, override

from spire_hw.errors import InvalidInputError

_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """What `Field` says about a field, or about the values inside one.

    Attributes:
        default: the value of a field that was not given.
        default_factory: makes that value anew for every instance.
        key: the key in the file, where it is not the field's name.
        ge, gt, le, lt: bounds of a number.
        min_length: of a text.
    """

    default: Any = _MISSING
    default_factory: Callable[[], Any] | None = None
    key: str = ""
    ge: int | None = None
    gt: int | None = None
    le: int | None = None
    lt: int | None = None
    min_length: int = 0

    @property
    def has_default(self) -> bool:
        """Tell whether the field may be left out."""
        return self.default is not _MISSING or self.default_factory is not None

    def check(self, value: Any) -> Any:
        """Return the value when it is within the bounds.

        Raises:
            InvalidInputError: it is not.
        """
        wrong = [
            f"must be {words} {bound}"
            for words, bound, holds in (
                ("at least", self.ge, self.ge is None or value >= self.ge),
                ("more than", self.gt, self.gt is None or value > self.gt),
                ("at most", self.le, self.le is None or value <= self.le),
                ("less than", self.lt, self.lt is None or value < self.lt),
            )
            if not holds
        ]
        if self.min_length and len(value) < self.min_length:
            wrong.append("must not be empty" if self.min_length == 1 else "is too short")
        if wrong:
            raise InvalidInputError(wrong[0])
        return value


def Field(  # noqa: N802 - stands for a value, as in other libraries of models
    *,
    default: Any = _MISSING,
    default_factory: Callable[[], Any] | None = None,
    key: str = "",
    ge: int | None = None,
    gt: int | None = None,
    le: int | None = None,
    lt: int | None = None,
    min_length: int = 0,
) -> Any:
    """Describe a field as its default, or bound a value inside `Annotated`; see `FieldSpec`."""
    return FieldSpec(default, default_factory, key, ge, gt, le, lt, min_length)


@dataclass(frozen=True, slots=True)
class Parsed:
    """Turns what stood in the file into the value, instead of a check of its type.

    Attributes:
        parse: raises InvalidInputError for what will not do.
    """

    parse: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Checked:
    """Looks at a value whose type is right, and returns it or another.

    Attributes:
        check: raises InvalidInputError for what will not do.
    """

    check: Callable[[Any], Any]


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
class Model:
    """Base of all configuration models; instances do not change.

    Attributes:
        unsupported: keys that upstream knows and this release does not, with the one value that
            may stand all the same because it asks for nothing (None: no value may).
        tolerant: keys nobody knows are noted instead of refused (upstream's `experimental`).
    """

    unsupported: ClassVar[Mapping[str, object]] = {}
    tolerant: ClassVar[bool] = False
    _specs: ClassVar[dict[str, tuple[Any, FieldSpec]]]

    def __init__(self, **values: Any) -> None:
        """Take values as they are; `spire_hw.config.schema` is what checks them.

        Raises:
            TypeError: a required field is missing, or there is no such field.
        """
        held = self.__dict__
        for name, (_, spec) in type(self).model_fields().items():
            if name in values:
                held[name] = values[name]
            elif spec.default_factory is not None:
                held[name] = spec.default_factory()
            elif spec.default is not _MISSING:
                held[name] = spec.default
            else:
                raise TypeError(f"{type(self).__name__} needs {name}")
        if extra := values.keys() - held.keys():
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(extra))}")
        held["_given"] = frozenset(values)
        held["_lines"] = {}
        held["_ignored"] = ()

    @override
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} does not change, not even its {name}")

    @override
    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.model_fields())

    __hash__ = None  # type: ignore[assignment]

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(sorted(self.__dict__['_given']))})"

    @classmethod
    def model_fields(cls) -> Mapping[str, tuple[Any, FieldSpec]]:
        """Return annotation and description of each field by its name."""
        specs: dict[str, tuple[Any, FieldSpec]] | None = cls.__dict__.get("_specs")
        if specs is None:
            specs = {}
            for name, hint in typing.get_type_hints(cls, include_extras=True).items():
                if name.startswith("_") or typing.get_origin(hint) is ClassVar:
                    continue
                if hasattr(Model, name):
                    raise TypeError(f"{cls.__name__}.{name}: the name belongs to all models")
                given = getattr(cls, name, _MISSING)
                specs[name] = hint, given if isinstance(given, FieldSpec) else FieldSpec(given)
            cls._specs = specs
        return specs

    @classmethod
    def model_keys(cls) -> list[str]:
        """Return the keys of the file that have a field."""
        return [spec.key or name for name, (_, spec) in cls.model_fields().items()]

    def line(self, field: str) -> int:
        """Return the line that gave a field, or where its block starts; 0 when unknown."""
        lines: dict[str, int] = self.__dict__["_lines"]
        return lines.get(field, lines.get("", 0))

    def given(self, field: str) -> bool:
        """Tell whether the field stood in the configuration."""
        return field in self.__dict__["_given"]

    def remember(self, lines: Mapping[str, int], ignored: Iterable[str]) -> None:
        """Keep where the fields stood and what was passed over; called once by the reader."""
        self.__dict__["_lines"] = dict(lines)
        self.__dict__["_ignored"] = tuple(ignored)

    def ignored(self) -> tuple[str, ...]:
        """Return the unknown keys of a tolerant model that were passed over."""
        held: tuple[str, ...] = self.__dict__["_ignored"]
        return held


# -- checks ------------------------------------------------------------------------

# Takes the place in a field, such as "[1]", and what is wrong there.
Complain = Callable[[str, str], None]

_WANTED: Final[Mapping[Any, str]] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false without quotes",
    list: "a list: [ ... ]",
    dict: "labelled blocks",
}


def fit(wanted: Any, value: Any, complain: Complain, place: str = "") -> Any:
    """Return the value as its annotation wants it.

    Args:
        wanted: the annotation.
        value: plain values, bodies and instances of models.
        complain: told about everything that is wrong; the result is meaningless then.
        place: where the value stands inside its field.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        return _fit_annotated(arguments[0], arguments[1:], value, complain, place)
    if origin in (Union, types.UnionType):
        given = next(a for a in arguments if a is not types.NoneType)
        return None if value is None else fit(given, value, complain, place)
    if origin is list and isinstance(value, list):
        return [fit(arguments[0], one, complain, f"{place}[{i}]") for i, one in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {k: fit(arguments[1], v, complain, place) for k, v in value.items()}
    return _fit_plain(wanted, value, complain, place)


def _fit_plain(wanted: Any, value: Any, complain: Complain, place: str) -> Any:
    kind = typing.get_origin(wanted) or wanted
    if kind is Literal:
        known = typing.get_args(wanted)
        if not isinstance(value, str) or value not in known:
            hint = nearest(value, known) if isinstance(value, str) else ""
            complain(place, f"must be one of {', '.join(known)}{hint}")
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        complain(place, f"expected {_WANTED.get(kind, 'a block')}, found {kind_of(value)}")
    elif kind is int:
        return int(value)  # the reader's integers remember how they were written
    return value


def _fit_annotated(
    base: Any, notes: tuple[Any, ...], value: Any, complain: Complain, place: str
) -> Any:
    failed = False

    def note(where: str, words: str) -> None:
        nonlocal failed
        failed = True
        complain(where, words)

    if not any(isinstance(n, Parsed) for n in notes):
        value = fit(base, value, note, place)
    for one in notes:
        if failed:
            break
        try:
            if isinstance(one, Parsed):
                value = one.parse(value)
            elif isinstance(one, Checked | FieldSpec):
                value = one.check(value)
        except InvalidInputError as e:
            note(place, e.message)
    return value


def bare(annotation: Any) -> Any:
    """Return the annotation without `Annotated` and `| None`."""
    while typing.get_origin(annotation) in (Annotated, Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        annotation = inner[0]
    return annotation


def kind_of(value: object) -> str:
    """Return what a value is, in words."""
    names = {bool: "a boolean", str: "text", float: "a number with a fraction", list: "a list"}
    if isinstance(value, int) and not isinstance(value, bool):
        return "a whole number"
    return next((words for kind, words in names.items() if isinstance(value, kind)), "a block")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the known name closest to name, "" when none is close."""
    import difflib  # noqa: PLC0415 - needed once something is wrong

    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f'; did you mean "{by_lower[close[0]]}"?' if close else ""

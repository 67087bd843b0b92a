from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pytest

from spire_hw.config.hcl import Body
from spire_hw.config.model import Checked, Field, Model, Parsed, fit
from spire_hw.errors import InvalidInputError


def even(value: int) -> int:
    if value % 2:
        raise InvalidInputError("must be even")
    return value


def number(value: object) -> int:
    if value != "one":
        raise InvalidInputError("is not one")
    return 1


class Point(Model):
    about: ClassVar[str] = "not a field"

    x: int
    y: Annotated[int, Field(ge=0, lt=10)] = 0
    names: list[str] = Field(default_factory=list)
    other: str = Field(default="z", key="0")


class Clash(Model):
    line: int = 0  # type: ignore[assignment]


def complaints(wanted: object, value: object) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    fit(wanted, value, lambda place, words: found.append((place, words)))
    return found


def test_values_and_defaults() -> None:
    made = Point(x=1)
    assert (made.x, made.y, made.names, made.other) == (1, 0, [], "z")
    assert made.given("x")
    assert not made.given("y")
    assert made.names is not Point(x=1).names
    assert Point.model_keys() == ["x", "y", "names", "0"]


def test_equal_by_value_and_never_changed() -> None:
    assert Point(x=1) == Point(x=1, y=0)
    assert Point(x=1) != Point(x=2)
    with pytest.raises(AttributeError, match="does not change"):
        Point(x=1).x = 2


def test_what_does_not_belong_to_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match="needs x"):
        Point()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="has no z"):
        Point(x=1, z=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="the name belongs to all models"):
        Clash.model_fields()


def test_values_are_not_shown() -> None:
    assert repr(Point(x=1, other="hunter2")) == "Point(other, x)"


@pytest.mark.parametrize(
    ("wanted", "value", "complaint"),
    [
        (int, True, ("", "expected a whole number, found a boolean")),
        (str, 1.5, ("", "expected text, found a number with a fraction")),
        (bool, 1, ("", "expected true or false without quotes, found a whole number")),
        (float, True, ("", "expected a number, found a boolean")),
        (list[int], "x", ("", "expected a list: [ ... ], found text")),
        (list[int], [1, "x"], ("[1]", "expected a whole number, found text")),
        (dict[str, int], [], ("", "expected labelled blocks, found a list")),
        (Body, "x", ("", "expected a block, found text")),
        (Literal["a", "b"], 1, ("", "must be one of a, b")),
        (Annotated[int, Field(ge=1)], 0, ("", "must be at least 1")),
        (Annotated[int, Field(gt=1)], 1, ("", "must be more than 1")),
        (Annotated[int, Field(le=1)], 2, ("", "must be at most 1")),
        (Annotated[int, Field(lt=1)], 1, ("", "must be less than 1")),
        (Annotated[str, Field(min_length=1)], "", ("", "must not be empty")),
        (Annotated[str, Field(min_length=2)], "x", ("", "is too short")),
        (Annotated[int, Checked(even)], 3, ("", "must be even")),
        (Annotated[int, Parsed(number)], 1, ("", "is not one")),
        (list[Annotated[int, Checked(even)] | None], [None, 3], ("[1]", "must be even")),
    ],
)
def test_what_does_not_fit_is_said_once(
    wanted: object, value: object, complaint: tuple[str, str]
) -> None:
    assert complaints(wanted, value) == [complaint]


@pytest.mark.parametrize(
    ("wanted", "value", "fitted"),
    [
        (int | None, None, None),
        (Annotated[int, Parsed(number), Checked(abs)], "one", 1),
        (dict[str, list[int]], {"a": [1]}, {"a": [1]}),
        (Literal["a", "b"], "b", "b"),
    ],
)
def test_what_fits(wanted: object, value: object, fitted: object) -> None:
    assert complaints(wanted, value) == []
    assert fit(wanted, value, lambda *_: None) == fitted

from __future__ import annotations

import copy
import pickle

import pytest

from spire_hw.errors import InvalidInputError
from spire_hw.selector import Selector


def test_the_first_colon_parts_type_and_value() -> None:
    selector = Selector.parse("unix:path:/bin/x")
    assert (selector.type, selector.value) == ("unix", "path:/bin/x")
    assert str(selector) == "unix:path:/bin/x"


@pytest.mark.parametrize(
    "text",
    ["", "unix", ":", "unix:", ":uid", "a:\0", "a:\ud800", "a" * 256 + ":x", "a:" + "x" * 2049],
)
def test_malformed_selectors_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        Selector.parse(text)


def test_a_type_holds_no_colon() -> None:
    with pytest.raises(InvalidInputError):
        Selector("a:b", "c")


def test_selectors_are_ordered_values() -> None:
    a, b = Selector("a", "2"), Selector(type="b", value="1")
    assert sorted([b, a]) == [a, b]
    assert {a, Selector("a", "2")} == {a}
    assert frozenset({a}) <= frozenset({a, b})
    assert copy.deepcopy(a) == a
    assert pickle.loads(pickle.dumps(a)) == a  # noqa: S301 - our own bytes


def test_values_may_hold_any_text() -> None:
    assert Selector("k8s", "ümläut é 漢 : /").value == "ümläut é 漢 : /"

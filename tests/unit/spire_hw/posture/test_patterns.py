from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.posture.patterns import Patterns


@pytest.mark.parametrize(
    ("pattern", "value", "matches"),
    [
        ("/usr/bin/ls", b"/usr/bin/ls", True),
        ("/usr/bin/ls", b"/usr/bin/ls2", False),
        ("/usr/bin/ls", b"x/usr/bin/ls", False),
        ("/var/", b"/var/", True),
        ("/var/", b"/var/a/b", True),
        ("/var/", b"/var", False),
        ("/var/", b"/varfile", False),
        ("*.pyc", b"/a/b.pyc", True),
        ("*.pyc", b"/a/b.pyc\n", False),
        ("/a?c", b"/abc", True),
        ("/a?c", b"/a\xffc", True),
        ("/a?c", b"/a\nc", True),
        ("/a?c", b"/ac", False),
        ("/a.c", b"/abc", False),
        ("[ab]", b"a", False),
        ("[ab]", b"[ab]", True),
        ("*", b"", True),
        ("a*b*c", b"aXbYbZc", True),
        ("a*b*c", b"aXcYb", False),
        ("*a*a*", b"a", False),
        ("*a*a*", b"aa", True),
        ("ab*ba", b"aba", False),
        ("", b"", True),
        ("é*", "éa".encode(), True),
    ],
)
def test_a_star_stands_for_any_bytes(pattern: str, value: bytes, matches: bool) -> None:
    assert Patterns.of([pattern]).match(value) is matches


def test_any_of_several_may_match_and_none_matches_nothing() -> None:
    patterns = Patterns.of(["/a", b"/b*", "/a"])
    assert patterns.texts == (b"/a", b"/b*")
    assert [patterns.match(v) for v in (b"/a", b"/bc", b"/c", b"/a/b")] == [
        True,
        True,
        False,
        False,
    ]
    assert not Patterns()
    assert not Patterns().match(b"")


small = st.text("ab*?/", max_size=8)


@given(small, st.text("ab/", max_size=10))
def test_the_same_as_shell_patterns(pattern: str, value: str) -> None:
    whole = pattern + "*" if pattern.endswith("/") else pattern
    expected = re.fullmatch(fnmatch.translate(whole), value) is not None
    assert Patterns.of([pattern]).match(value.encode()) is expected


def test_many_stars_do_not_make_it_slow() -> None:
    patterns = Patterns.of(["*a" * 200 + "b"])
    assert not patterns.match(b"a" * 8192)

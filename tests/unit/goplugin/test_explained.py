"""Errors of plugins: an explanation has what it explains as its cause, never itself."""

from __future__ import annotations

import pytest

from spire_hw.errors import SpireHwError, UnavailableError
from spire_hw.goplugin.host import raise_explained


def test_an_explanation_is_raised_from_what_it_explains() -> None:
    error = SpireHwError("stream is closed")
    with pytest.raises(UnavailableError) as caught:
        raise_explained(UnavailableError("the plugin went away"), error)
    assert caught.value.__cause__ is error


def test_an_error_that_needs_no_words_keeps_its_own_cause() -> None:
    first = ValueError("first")
    error = SpireHwError("refused")
    error.__cause__ = first
    with pytest.raises(SpireHwError) as caught:
        raise_explained(error, error)
    assert caught.value is error
    assert error.__cause__ is first

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from spire_hw.config.duration import format_duration, parse_duration
from spire_hw.config.hcl import Block, Body, Item, Value, expand_env, make_items, parse
from spire_hw.errors import ConfigError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.one_of(
    TEXT,
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False, allow_infinity=False, width=64),
)


def _bodies(values: st.SearchStrategy[Value]) -> st.SearchStrategy[Body]:
    items = st.builds(lambda k, v: make_items(k, v, 0), TEXT, values)
    blocks = st.builds(
        lambda keys, inner: [Block(tuple(keys), Body(tuple(i for part in inner for i in part)))],
        st.lists(TEXT, min_size=1, max_size=3),
        st.lists(items, max_size=3),
    )
    parts = st.lists(st.one_of(items, blocks), max_size=4)
    return parts.map(lambda found: Body(tuple(i for part in found for i in part)))


VALUES: st.SearchStrategy[Value] = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), _bodies(inner)), max_leaves=8
)


@given(_bodies(VALUES))
def test_every_tree_reads_back_from_its_text(body: Body) -> None:
    assert parse(body.to_hcl()) == body


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_with_a_line(text: str) -> None:
    try:
        body = parse(text)
    except ConfigError as e:
        assert all(0 <= f.line <= text.count("\n") + 1 for f in e.faults)  # noqa: PT017
    else:
        assert all(isinstance(i, (Item, Block)) for i in body.items)


@given(st.text('{}[]"=,\\\n <-E#/*$ax10.:', max_size=60))
def test_text_made_of_the_language_is_read_or_refused(text: str) -> None:
    try:
        body = parse(text)
    except ConfigError:
        return
    assert parse(body.to_hcl()) == body


@given(st.text(max_size=100), st.dictionaries(st.text(max_size=3), st.text(max_size=5)))
def test_expansion_is_total_and_leaves_text_without_dollars_alone(
    text: str, environ: dict[str, str]
) -> None:
    bare = text.replace("$", "")
    assert expand_env(bare, environ) == bare
    assert isinstance(expand_env(text, environ), str)
    assert expand_env(text.replace("$", "$$"), environ) == text


@given(st.timedeltas(min_value=timedelta(days=-(10**5)), max_value=timedelta(days=10**5)))
def test_durations_survive_printing(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration

"""Frames between host and worker survive both ways and never surprise the reader."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from spire_hw.errors import EncodingError
from spire_hw.key import HashAlgorithm, SignOptions
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.inventory import read_listing
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.pkcs11.inventory.manifest import Manifest
from spire_hw.pkcs11.wire import (
    SignItem,
    SignKey,
    decode_error,
    decode_items,
    decode_results,
    decode_verify,
    encode_items,
    encode_results,
    encode_verify,
)

_keys = st.builds(SignKey, st.binary(max_size=20), st.binary(max_size=600))
_options = st.builds(
    SignOptions,
    st.sampled_from(HashAlgorithm),
    st.booleans(),
    st.integers(min_value=-(2**31), max_value=2**31 - 1),
)
_items = st.builds(SignItem, _keys, st.binary(max_size=64), _options)


@given(st.lists(_items, max_size=8))
def test_items_survive(items: list[SignItem]) -> None:
    runs = decode_items(encode_items(items))
    assert [SignItem(r.key, d, r.options) for r in runs for d in r.digests] == items


@given(st.lists(_items, min_size=1, max_size=4), st.integers(min_value=1, max_value=16))
def test_neighbours_that_are_alike_share_a_run(items: list[SignItem], times: int) -> None:
    runs = decode_items(encode_items([item for item in items for _ in range(times)]))
    assert len(runs) <= len(items)
    assert sum(len(run.digests) for run in runs) == len(items) * times


@given(st.lists(st.binary(max_size=512), max_size=8))
def test_signatures_survive(results: list[bytes]) -> None:
    assert decode_results(encode_results(results), len(results)) == results


@given(st.lists(_items, max_size=8), st.binary(max_size=64))
def test_what_is_to_be_verified_survives(items: list[SignItem], raw: bytes) -> None:
    results = [raw] * len(items)
    runs, shown = decode_verify(encode_verify(encode_items(items), encode_results(results)))
    assert [SignItem(r.key, d, r.options) for r in runs for d in r.digests] == items
    assert shown == results


@given(st.lists(_items, min_size=1, max_size=8), st.integers(min_value=0, max_value=9))
def test_a_token_that_answers_less_or_more_than_it_was_asked_is_found_out(
    items: list[SignItem], count: int
) -> None:
    body = encode_verify(encode_items(items), encode_results([b"x"] * count))
    try:
        decode_verify(body)
    except EncodingError:
        assert count != len(items)
    else:
        assert count == len(items)


@given(st.binary(max_size=200), st.integers(min_value=0, max_value=5))
def test_any_bytes_decode_or_are_refused(body: bytes, expected: int) -> None:
    readers = (decode_items, lambda b: decode_results(b, expected), decode_error, decode_verify)
    for decode in readers:
        try:
            decode(body)
        except EncodingError:
            continue


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
_half = st.fixed_dictionaries(
    {},
    optional={
        "id": _json | st.just("AAAA"),
        "label": st.sampled_from(["sh1:x6v4g5:5c6bmp:a:000001", "sh1:x6v4g5:5c6bmp:~:1", "x"]),
        "private": st.booleans(),
        "material": _json | st.fixed_dictionaries({"kind": st.just(3), "point": _json}),
        "evidence": _json,
    },
)


@example({"halves": [{"id": "\x80"}], "data": None})
@given(st.fixed_dictionaries({"halves": st.lists(_half, max_size=5) | _json, "data": _json}))
def test_any_listing_is_sorted_out_or_refused(listing: dict[str, object]) -> None:
    try:
        read_listing(Owner("example.org", "s1"), listing)
    except (EncodingError, TokenError):
        return


@given(st.binary(max_size=100))
def test_any_manifest_parses_or_is_refused(value: bytes) -> None:
    try:
        Manifest.parse(value)
    except EncodingError:
        return

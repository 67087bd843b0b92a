"""Which generation is current, whatever is on the token and whatever note and manifest tell of it."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from spire_hw.pkcs11.inventory.choice import Choice, merged
from spire_hw.pkcs11.inventory.inventory import Inventory, read_listing
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.pkcs11.inventory.manifest import Manifest
from spire_hw.pkcs11.wire import pack_bytes

OWNER = Owner("example.org", "server-1")
generations = st.sets(st.integers(1, 12), max_size=8)
choices = st.builds(Choice, st.integers(1, 12), over=st.integers(1, 12), revision=st.integers(1, 5))
tables = st.dictionaries(st.just("a"), choices)


def listing(present: set[int], told: dict[str, Choice]) -> dict[str, Any]:
    halves = [
        {
            "id": pack_bytes(bytes([n])),
            "label": OWNER.key_label("a", n),
            "private": is_private,
            "material": None,
            "evidence": {},
        }
        for n in present
        for is_private in (True, False)
    ]
    value = Manifest(OWNER, "nonce", {"a": "a"}, 1.0, told).encode()
    return {"halves": halves, "data": [{"label": OWNER.manifest_label, "value": pack_bytes(value)}]}


def read(present: set[int], note: dict[str, Choice], told: dict[str, Choice]) -> Inventory:
    return read_listing(OWNER, listing(present, told), None, note)


@given(generations, tables, tables)
def test_the_latest_choice_decides_until_a_later_generation_is_made(
    present: set[int], note: dict[str, Choice], told: dict[str, Choice]
) -> None:
    found = read(present, note, told)
    choice = merged(note, told).get("a")
    current = found.current.get("a")
    if not present:
        assert current is None
    elif choice is None or max(present) > choice.over:
        assert current is not None
        assert current.generation == max(present)
    elif choice.generation in present:
        assert current is not None
        assert current.generation == choice.generation
    else:
        # What was turned away from does not come back by itself.
        assert current is None
    shown = {pair.generation for pair in found.everything}
    assert shown == present
    assert found.choices.get("a") == choice


@given(generations, tables)
def test_who_lost_the_note_comes_to_the_same_end(
    present: set[int], told: dict[str, Choice]
) -> None:
    with_note, without = read(present, told, told), read(present, {}, told)
    assert with_note.current.keys() == without.current.keys()
    assert [p.label for p in with_note.current.values()] == [
        p.label for p in without.current.values()
    ]


@given(generations.filter(bool), choices)
def test_a_new_generation_is_beyond_what_was_taken_back(present: set[int], choice: Choice) -> None:
    new = max(*present, choice.over) + 1
    found = read({*present, new}, {"a": choice}, {})
    assert found.current["a"].generation == new

"""How many signatures may be under way: by default, after refusals, and after a while."""

from __future__ import annotations

from spire_hw_plugins.keymanager.remote.room import MOST, MOST_OTHERS, Room


def room(under_way: int) -> Room:
    made = Room()
    made.under_way = under_way
    return made


def test_some_room_is_for_what_is_urgent_alone() -> None:
    assert room(0).left(0, urgent=False) == MOST_OTHERS
    assert room(MOST_OTHERS).left(0, urgent=False) == 0
    assert room(MOST_OTHERS).left(0, urgent=True) == MOST - MOST_OTHERS > 0
    assert room(MOST).left(0, urgent=True) == 0


def test_what_was_refused_tells_how_many_are_taken_until_that_is_forgotten() -> None:
    one = room(128)
    one.refused(28, 128, 0.1, 50.0, urgent=False)
    one.under_way = 90
    assert one.left(50.0, urgent=False) == 10
    assert one.left(50.0, urgent=True) == MOST - 90
    # Others that come later can only make it less.
    one.refused(5, 160, 0.1, 51.0, urgent=False)
    assert one.left(51.0, urgent=False) == 10
    assert one.left(60.9, urgent=False) == 10
    assert one.left(61.1, urgent=False) == MOST_OTHERS - 90


def test_when_nothing_of_ours_was_in_the_way_there_is_a_pause() -> None:
    for told_s, pause_s in ((0.1, 0.1), (0.0, 0.02), (1e6, 1.0)):
        one = room(0)
        one.refused(4, 4, told_s, 50.0, urgent=False)
        assert one.opens_at == 50.0 + pause_s
        assert one.left(50.0, urgent=True) == 0
        assert one.left(50.0 + pause_s, urgent=False) == 1
        assert one.left(50.0 + pause_s, urgent=True) == MOST

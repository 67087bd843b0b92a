"""Open exchanges in groups, against a plain list that is walked for every question."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import LimitError
from spire_hw_plugins.nodeattestor.tpm.exchanges import (
    GIVE_WAY_S,
    MAX_PER_SOURCE,
    Exchanges,
    Place,
)
from spire_hw_sim.clock import SimClock

_MAX_OPEN = 7
_places = st.tuples(st.sampled_from("ab"), st.sampled_from(["", "1", "2", "3"]))
_steps = st.lists(
    st.one_of(
        _places,
        st.tuples(st.sampled_from(["leave", "win"]), st.integers(0, _MAX_OPEN)),
        st.just(("wait", 0)),
    ),
    max_size=60,
)


class _Ticking(SimClock):
    """A clock that is moved without a loop."""

    def pass_by(self, seconds: float) -> None:
        self._set(self._monotonic + seconds)


@dataclass
class _Held:
    ek: str
    source: str
    since: float
    place: Place
    leave: ExitStack


def _has_place(held: list[_Held], ek: str, source: str, now: float) -> bool:
    """Make room as `Exchanges.hold` has to; tell whether there is some."""
    groups = [(lambda h: (h.ek, h.source) == (ek, source), 1)]
    if source:
        groups.append((lambda h: h.source == source, MAX_PER_SOURCE))
    groups.append((lambda _: True, _MAX_OPEN))
    for alike, limit in groups:
        found = [h for h in held if alike(h)]
        if len(found) < limit:
            continue
        if now - found[0].since < GIVE_WAY_S:
            return False
        held.remove(found[0])
    return True


@given(_steps)
def test_who_gives_way_is_the_same_as_in_a_walked_list(
    steps: list[tuple[str, str] | tuple[str, int]],
) -> None:
    clock = _Ticking()
    exchanges = Exchanges(clock, max_open=_MAX_OPEN)
    held: list[_Held] = []
    all_of: list[_Held] = []
    for step in steps:
        match step:
            case ("wait", _):
                clock.pass_by(GIVE_WAY_S / 2)
            case ("leave" | "win" as what, int(number)):
                if not held:
                    continue
                one = held[number % len(held)]
                if what == "leave":
                    one.leave.close()
                    held.remove(one)
                else:
                    exchanges.win(one.place)
                    held = [h for h in held if h is one or h.ek != one.ek]
            case (str(ek), str(source)):
                expected = _has_place(held, ek, source, clock.monotonic())
                leave = ExitStack()
                try:
                    place = leave.enter_context(exchanges.hold(ek, source))
                except LimitError:
                    assert not expected
                    continue
                assert expected
                held.append(_Held(ek, source, clock.monotonic(), place, leave))
                all_of.append(held[-1])
        assert len(exchanges) == len(held)
        assert all(map(_goes_on, held))
    for one in all_of:
        one.leave.close()
    assert len(exchanges) == 0
    # Nothing is kept of who has left.
    assert not exchanges._groups._groups


def _goes_on(held: _Held) -> bool:
    try:
        held.place.check()
    except LimitError:
        return False
    return True

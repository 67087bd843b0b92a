from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_agent.cache import Cache, JwtCache, Svid, WorkloadUpdate
from spire_hw_agent.entry import AgentEntry, JwtToken

if TYPE_CHECKING:
    from spire_hw.aio.watch import Watch

TD = TrustDomain("example.org")
OTHER = TrustDomain("other.example")
NOW = datetime(2026, 11, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
ALICE = frozenset({Selector("unix", "uid:1"), Selector("unix", "gid:1")})


def entry(number: int = 1, *selectors: str, **fields: object) -> AgentEntry:
    made = AgentEntry(
        entry_id=f"e{number}",
        spiffe_id=SpiffeId.parse(f"spiffe://example.org/w/{number}"),
        selectors=frozenset(map(Selector.parse, selectors or ("unix:uid:1",))),
        federates_with=(),
        hint="",
        revision=0,
        created_at=number,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def svid(of: AgentEntry, *, ends: datetime = NOW + HOUR, authority: str = "") -> Svid:
    renew_at = NOW + (ends - NOW) / 2
    return Svid(of.spiffe_id, (b"leaf",), b"key", ends, renew_at, of.revision, authority)


def cache_with(*entries: AgentEntry, max_svids: int = 1000) -> Cache:
    made = Cache(Bundle(TD), max_svids=max_svids)
    made.set_entries(entries)
    return made


def fill(cache: Cache, *entries: AgentEntry) -> None:
    cache.put_svids({e.entry_id: svid(e) for e in entries})


def shown(watch: Watch[WorkloadUpdate]) -> list[str] | None:
    found = watch.value.identities
    return None if found is None else [i.entry.entry_id for i in found]


def ids(found: list[AgentEntry]) -> list[str]:
    return [e.entry_id for e in found]


# -- matching ---------------------------------------------------------------------

_selectors = st.frozensets(st.sampled_from([f"t:{n}" for n in range(5)]), max_size=4)


@given(st.lists(_selectors.filter(bool), max_size=12), _selectors)
def test_matching_agrees_with_the_definition(
    entries: list[frozenset[str]], workload: frozenset[str]
) -> None:
    made = [entry(n, *selectors) for n, selectors in enumerate(entries)]
    expected = sorted(f"e{n}" for n, needed in enumerate(entries) if needed <= workload)
    found = cache_with(*made).matching(frozenset(map(Selector.parse, workload)))
    assert ids(found) == expected


def test_of_equal_hints_the_oldest_entry_keeps_it() -> None:
    young = entry(1, hint="db", created_at=20)
    old = entry(2, hint="db", created_at=10)
    plain = entry(3)
    other = entry(4, hint="web")
    assert ids(cache_with(young, old, plain, other).matching(ALICE)) == ["e2", "e3", "e4"]


def test_equal_hints_of_the_same_age_go_by_entry_id() -> None:
    assert ids(
        cache_with(entry(2, hint="x", created_at=5), entry(1, hint="x", created_at=5)).matching(
            ALICE
        )
    ) == ["e1"]


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.integers(0, 3)), max_size=10))
def test_hints_of_one_answer_are_unique_and_plain_entries_stay(
    shape: list[tuple[str, int]],
) -> None:
    made = [entry(n, hint=hint, created_at=age) for n, (hint, age) in enumerate(shape)]
    found = cache_with(*made).matching(ALICE)
    hints = [e.hint for e in found if e.hint]
    assert len(hints) == len(set(hints))
    assert {e.hint for e in found} == {e.hint for e in made}
    assert [e for e in found if not e.hint] == sorted(
        (e for e in made if not e.hint), key=lambda e: e.entry_id
    )


# -- what a workload sees ------------------------------------------------------------


def test_nothing_is_shown_before_every_identity_has_an_svid() -> None:
    one, two = entry(1), entry(2)
    cache = cache_with(one, two)
    with cache.subscribe(ALICE) as watch:
        assert watch.value.granted
        assert shown(watch) is None
        fill(cache, one)
        assert shown(watch) is None
        fill(cache, two)
        assert shown(watch) == ["e1", "e2"]


def test_a_new_entry_without_svid_does_not_hold_up_what_was_shown() -> None:
    one, two = entry(1), entry(2)
    cache = cache_with(one)
    fill(cache, one)
    with cache.subscribe(ALICE) as watch:
        cache.set_entries([one, two])
        renewed = replace(svid(one), private_key=b"renewed")
        cache.put_svids({"e1": renewed})
        assert watch.value.identities is not None
        assert [i.svid for i in watch.value.identities] == [renewed]


def test_a_removed_entry_is_gone_at_once_even_while_another_waits() -> None:
    one, two, three = entry(1), entry(2), entry(3)
    cache = cache_with(one, two)
    fill(cache, one, two)
    with cache.subscribe(ALICE) as watch:
        cache.set_entries([one, three])
        assert watch.value.identities is not None
        assert [i.entry.entry_id for i in watch.value.identities] == ["e1"]


def test_without_entries_nothing_is_granted() -> None:
    cache = cache_with(entry(1))
    with cache.subscribe(ALICE) as watch:
        cache.set_entries([])
        assert not watch.value.granted
        cache.set_entries([entry(1)])
        assert watch.value.granted


def test_a_change_of_bundles_reaches_who_still_waits_for_an_svid() -> None:
    one = entry(1, federates_with=(OTHER,))
    cache = cache_with(one)
    with cache.subscribe(ALICE) as watch:
        seen = watch.version
        cache.set_bundles(Bundle(TD, sequence=1), {OTHER: Bundle(OTHER)})
        assert watch.version > seen
        assert watch.value.federated == {OTHER: Bundle(OTHER)}


def test_only_named_trust_domains_are_shown() -> None:
    cache = cache_with(entry(1))
    cache.set_bundles(Bundle(TD), {OTHER: Bundle(OTHER)})
    with cache.subscribe(ALICE) as watch:
        assert watch.value.federated == {}


def test_an_unchanged_state_is_no_update() -> None:
    one = entry(1)
    cache = cache_with(one)
    fill(cache, one)
    with cache.subscribe(ALICE) as watch:
        seen = watch.version
        cache.set_entries([one])
        cache.set_bundles(Bundle(TD), {})
        assert watch.version == seen


def test_another_spiffe_id_under_the_same_entry_drops_the_svid() -> None:
    one = entry(1)
    cache = cache_with(one)
    fill(cache, one)
    moved = replace(one, spiffe_id=SpiffeId.parse("spiffe://example.org/moved"), revision=1)
    with cache.subscribe(ALICE) as watch:
        cache.set_entries([moved])
        assert watch.value.granted
        assert watch.value.identities is None
        fill(cache, one)  # arrives late: asked for before the change
        assert cache.svid_count == 0


def test_revoke_leaves_nothing() -> None:
    one = entry(1)
    cache = cache_with(one)
    fill(cache, one)
    cache.tokens.put(one, ["a"], token())
    with cache.subscribe(ALICE) as watch:
        cache.revoke()
        assert not watch.value.granted
    assert (cache.svid_count, len(cache.tokens), len(cache.entries)) == (0, 0, 0)


def test_reissue_keeps_the_entries_and_asks_for_all_svids() -> None:
    one = entry(1)
    cache = cache_with(one)
    fill(cache, one)
    before = cache.demand.version
    cache.reissue()
    assert cache.demand.version > before
    assert ids(cache.due(NOW)) == ["e1"]


# -- what is due ------------------------------------------------------------------


def test_due_are_missing_changed_and_half_spent_svids() -> None:
    fresh, missing, changed = entry(1), entry(2), entry(3)
    cache = cache_with(fresh, missing, changed)
    fill(cache, fresh, changed)
    cache.set_entries([fresh, missing, replace(changed, revision=1)])
    assert ids(cache.due(NOW)) == ["e2", "e3"]
    assert ids(cache.due(NOW + HOUR / 2)) == ["e1", "e2", "e3"]


def test_due_are_svids_of_a_tainted_authority() -> None:
    one, two = entry(1), entry(2)
    cache = cache_with(one, two)
    cache.put_svids({"e1": svid(one, authority="ab"), "e2": svid(two, authority="cd")})
    tainted = X509Root(b"x", tainted=True)
    object.__setattr__(tainted, "authority_id", "ab")
    cache.set_bundles(Bundle(TD, (tainted,)), {})
    assert ids(cache.due(NOW)) == ["e1"]


def test_an_ended_svid_is_not_shown() -> None:
    one = entry(1)
    cache = cache_with(one)
    cache.put_svids({"e1": svid(one, ends=NOW + HOUR)})
    with cache.subscribe(ALICE) as watch:
        cache.expire(NOW + HOUR - timedelta(seconds=1))
        assert shown(watch) == ["e1"]
        cache.expire(NOW + HOUR)
        assert shown(watch) is None
        assert watch.value.granted


def test_entries_without_prefetch_wait_until_somebody_asks() -> None:
    quiet = entry(1, prefetch=False)
    cache = cache_with(quiet)
    assert cache.due(NOW) == []
    before = cache.demand.version
    with cache.subscribe(ALICE):
        assert cache.demand.version > before
        assert ids(cache.due(NOW)) == ["e1"]


def test_beyond_the_limit_live_ones_stay_and_the_least_recently_used_leave() -> None:
    entries = [entry(n, f"unix:uid:{n}") for n in range(1, 5)]
    cache = cache_with(*entries, max_svids=2)
    for number in (3, 4):
        with cache.subscribe(frozenset({Selector("unix", f"uid:{number}")})):
            fill(cache, entries[number - 1])
    with cache.subscribe(frozenset({Selector("unix", "uid:1")})):
        assert ids(cache.due(NOW)) == ["e1"]  # live; then e4, used last, has the other place
        assert cache.svid_count == 1
    with (
        cache.subscribe(frozenset({Selector("unix", "uid:1")})),
        cache.subscribe(frozenset({Selector("unix", "uid:2")})),
        cache.subscribe(frozenset({Selector("unix", "uid:3")})),
    ):
        assert ids(cache.due(NOW)) == ["e1", "e2", "e3"]


# -- JWT-SVIDs --------------------------------------------------------------------


def token(text: str = "t", *, ends: datetime = NOW + HOUR) -> JwtToken:
    return JwtToken(text, NOW, ends, "kid")


def test_tokens_are_found_by_the_set_of_audiences() -> None:
    tokens, one = JwtCache(), entry(1)
    tokens.put(one, ["a", "b"], token())
    assert tokens.get(one, ["b", "a", "a"], NOW) == token()
    assert tokens.get(one, ["a"], NOW) is None
    assert tokens.get(entry(2), ["a", "b"], NOW) is None


def test_an_ended_token_is_not_found() -> None:
    tokens, one = JwtCache(), entry(1)
    tokens.put(one, ["a"], token())
    assert tokens.get(one, ["a"], NOW + HOUR) is None
    assert len(tokens) == 0


def test_a_changed_entry_has_no_tokens() -> None:
    cache, one = cache_with(entry(1)), entry(1)
    cache.tokens.put(one, ["a"], token())
    assert cache.tokens.get(replace(one, revision=1), ["a"], NOW) is None
    cache.tokens.put(one, ["a"], token())
    cache.set_entries([replace(one, revision=2)])
    assert len(cache.tokens) == 0


def test_a_removed_entry_has_no_tokens() -> None:
    cache = cache_with(entry(1), entry(2))
    cache.tokens.put(entry(1), ["a"], token())
    cache.tokens.put(entry(2), ["a"], token())
    cache.set_entries([entry(2)])
    assert len(cache.tokens) == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_the_least_recently_used_token_makes_room(limit: int) -> None:
    tokens, one = JwtCache(max_tokens=limit), entry(1)
    for number in range(5):
        tokens.put(one, [str(number)], token(str(number)))
    kept = [n for n in range(5) if tokens.get(one, [str(n)], NOW)]
    assert kept == list(range(5 - limit, 5))

"""The entry graph against the definition, written naively, through random changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain, server_id
from spire_hw_server.datastore.records import Entry
from spire_hw_server.entries import AuthorizedEntries, EntryGraph, order_of

TD = TrustDomain("example.org")
START = datetime(2026, 1, 1, tzinfo=UTC)
AGENTS = [TD.member("spire", "agent", "tpm", name) for name in "abc"]
WORKLOADS = [TD.member(name) for name in ("v", "w", "x", "y", "z")]
PARENTS = [server_id(TD), *AGENTS, *WORKLOADS]
SELECTORS = [Selector("t", value) for value in "1234"]

selector_sets = st.frozensets(st.sampled_from(SELECTORS))


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    chosen = draw(st.frozensets(st.sampled_from(SELECTORS), min_size=1))
    return Entry(
        entry_id=draw(st.sampled_from([f"e{i}" for i in range(12)])),
        spiffe_id=draw(st.sampled_from(WORKLOADS)),
        parent_id=draw(st.sampled_from(PARENTS)),
        selectors=tuple(sorted(chosen)),
        revision_number=draw(st.integers(0, 2)),
        created_at=START + timedelta(seconds=draw(st.integers(0, 3))),
    )


def by_definition(
    entries: dict[str, Entry], agent_id: SpiffeId, selectors: frozenset[Selector] | None
) -> list[Entry]:
    """What spire-behaviour says, without any index."""
    if selectors is None:
        return []
    parents = {agent_id}
    for entry in entries.values():
        if entry.parent_id == server_id(TD) and set(entry.selectors) <= selectors:
            parents.add(entry.spiffe_id)
    while True:
        found = [e for e in entries.values() if e.parent_id in parents]
        grown = parents | {e.spiffe_id for e in found}
        if grown == parents:
            return sorted(found, key=order_of)
        parents = grown


class GraphMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.graph = EntryGraph(TD)
        self.entries: dict[str, Entry] = {}
        self.nodes: dict[SpiffeId, frozenset[Selector] | None] = {}
        self.answers: dict[SpiffeId, tuple[AuthorizedEntries, list[Entry]]] = {}

    @rule(entry=entries())
    def put_entry(self, entry: Entry) -> None:
        changed = self.graph.put_entry(entry)
        assert changed == (self.entries.get(entry.entry_id) != entry)
        self.entries[entry.entry_id] = entry

    @rule(number=st.integers(0, 11))
    def remove_entry(self, number: int) -> None:
        removed = self.graph.remove_entry(f"e{number}")
        assert removed == (self.entries.pop(f"e{number}", None) is not None)

    @rule(agent=st.sampled_from(AGENTS), selectors=st.none() | selector_sets)
    def put_node(self, agent: SpiffeId, selectors: Any) -> None:
        self.graph.put_node(agent, selectors)
        self.nodes[agent] = selectors

    @rule(agent=st.sampled_from(AGENTS))
    def remove_node(self, agent: SpiffeId) -> None:
        assert self.graph.remove_node(agent) == (agent in self.nodes)
        self.nodes.pop(agent, None)

    @rule()
    def forget_all(self) -> None:
        self.graph.forget_all()
        self.answers.clear()

    @invariant()
    def answers_follow_the_definition(self) -> None:
        for agent in AGENTS:
            selectors = self.nodes.get(agent, frozenset())
            expected = by_definition(self.entries, agent, selectors)
            found = self.graph.authorized(agent)
            assert list(found.values()) == expected
            assert list(found) == [e.entry_id for e in expected]
            if agent in self.nodes and self.nodes[agent] is not None:
                assert self.graph.authorized(agent) is found
            before, listed = self.answers.get(agent, (found, expected))
            assert list(before.values()) == listed
            self.answers[agent] = (found, expected)

    @invariant()
    def look_ups_agree(self) -> None:
        assert len(self.graph) == len(self.entries)
        for workload in WORKLOADS:
            having = [e for e in self.entries.values() if e.spiffe_id == workload]
            assert list(self.graph.by_spiffe_id(workload)) == sorted(having, key=order_of)
        for number in range(12):
            assert self.graph.entry(f"e{number}") == self.entries.get(f"e{number}")


GraphMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGraph = GraphMachine.TestCase

"""The same deployment by upstream's programs and by ours: metrics of the same name are the same."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from spire_hw_sim.parties import Agent, Make, Party, Role, Server, missing
from spire_hw_sim.site import free_port, wait_until

if TYPE_CHECKING:
    from pathlib import Path

# What upstream measures and we do not.
_THEIRS = (
    "go_",
    "promhttp_",
    "spire_agent_bootstrap",
    "spire_agent_lru_cache_entry_",
    "spire_agent_runtime_",
    "spire_agent_store_",
    "spire_agent_sync_entries_",
    "spire_server_datastore_",
    "spire_server_rateLimit_",
    "spire_server_runtime_",
)
# Upstream's prefix of process metrics is Prometheus's; some of them are of Go's client alone.
_PROCESS = {"process_max_fds", "process_virtual_memory_max_bytes"}
# Type and names of labels by the name of a metric.
Shapes = dict[str, tuple[str, frozenset[str]]]


def expose(conf: Path) -> int:
    port = free_port()
    text = conf.read_text()
    conf.write_text(text + f'\ntelemetry {{ Prometheus {{ host = "127.0.0.1" port = {port} }} }}\n')
    return port


def shapes(port: int) -> Shapes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert answer.status == 200
    text = answer.read().decode()
    connection.close()
    return {
        family.name: (family.type, frozenset(k for s in family.samples for k in s.labels))
        for family in text_string_to_metric_families(text)
    }


def measured(make: Make) -> tuple[Shapes, Shapes]:
    """Return what server and agent of a make measure of one and the same life."""
    with Party() as party:
        server = party.server = Server(party, make)
        at_server = expose(server.conf)
        server.start()
        agent = Agent(party, make, "x509pop")
        at_agent = expose(agent.conf)
        agent.start()
        server.create_entry(agent.id)
        wait_until("an SVID is there", lambda: bool(agent.fetch()))
        agent.command("api", "fetch", "jwt", "-audience", "x")
        return shapes(at_server), shapes(at_agent)


@pytest.mark.skipif(bool(missing(Role.SERVER, Role.AGENT)), reason=missing(Role.SERVER, Role.AGENT))
def test_metrics_of_the_same_name_have_the_same_type_and_labels() -> None:
    theirs, ours = measured(Make.UPSTREAM), measured(Make.OURS)
    for upstream, own in zip(theirs, ours, strict=True):
        shared = upstream.keys() & own.keys()
        assert {n: upstream[n] for n in shared} == {n: own[n] for n in shared}
        left = {n for n in upstream.keys() - own.keys() if not n.startswith(_THEIRS)} - _PROCESS
        assert not {n for n in left if not n.startswith("process_network")}
        assert len(shared) > 20

"""Answers of a megabyte and more between the two makes: many entries, many identities of a workload."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from spire_hw_sim.parties import TRUST_DOMAIN, Agent, Make, Party, Role, missing
from spire_hw_sim.site import wait_until

ENTRIES, MINE = 2000, 150
_REASON = missing(Role.SERVER, Role.AGENT)
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)


def entry(number: int, parent: str) -> dict[str, Any]:
    user = os.getuid() if number < MINE else 70000 + number
    return {
        "parent_id": parent,
        "spiffe_id": f"spiffe://{TRUST_DOMAIN}/{number:05d}/{'x' * 200}",
        "selectors": [{"type": "unix", "value": f"uid:{user}"}],
        "dns_names": [f"a{number}.example"],
    }


@pytest.mark.parametrize(
    ("server_make", "agent_make"),
    [(Make.OURS, Make.UPSTREAM), (Make.UPSTREAM, Make.OURS)],
    ids=["ours-server-upstream-agent", "upstream-server-ours-agent"],
)
def test_large_answers(server_make: Make, agent_make: Make) -> None:
    with Party() as party:
        server = party.open_server(server_make)
        agent = Agent(party, agent_make, "x509pop")
        agent.start()
        parent = agent.id
        data = party.directory / "entries.json"
        data.write_text(json.dumps({"entries": [entry(n, parent) for n in range(ENTRIES)]}))
        server.command("entry", "create", "-data", data, make=Make.UPSTREAM)
        shown = [server.ask("entry", "show", make=make)["entries"] for make in Make]
        assert shown[0] == shown[1]
        assert len(shown[0]) == ENTRIES
        wait_until("all identities", lambda: len(agent.fetch()) == MINE, 120)
        for make in Make:
            # Upstream's command waits one second for an answer unless told otherwise.
            more = ("-timeout", "30s", "-output", "json")
            done = agent.command("api", "fetch", "x509", *more, make=make)
            assert done.returncode == 0, done.stderr
            assert len({svid["spiffe_id"] for svid in json.loads(done.stdout)["svids"]}) == MINE

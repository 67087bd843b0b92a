"""`agent list`, `show`, `evidence`, `quarantine` and `release` against a real server."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING

import pytest

from spire_hw_sim.servers import Operator, ScriptedAgent

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def agent_id(socket_path: Path, port: int) -> str:
    async def joined() -> str:
        admin = Operator(socket_path)
        try:
            agent = ScriptedAgent(port, await admin.bundle())
            await agent.attest(await admin.token())
        finally:
            await admin.close()
        assert agent.spiffe_id is not None
        return agent.spiffe_id.text

    return asyncio.run(joined())


def test_agents_of_which_nothing_is_kept_are_shown_as_spire_shows_them(
    cli: Cli, agent_id: str
) -> None:
    listed = cli("agent", "list")
    assert f"SPIFFE ID         : {agent_id}\n" in listed.out
    assert "State" not in listed.out
    (one,) = json.loads(cli("agent", "list", "-output", "json").out)["agents"]
    assert not {"state", "posture"} & one.keys()
    assert (one["id"]["trust_domain"], one["banned"]) == ("example.org", False)


def test_quarantine_and_release_by_hand(cli: Cli, agent_id: str) -> None:
    put = cli("agent", "quarantine", "-spiffeID", agent_id, "-comment", "case 12")
    assert (put.code, put.out) == (0, "Agent is in quarantine\n")
    shown = cli("agent", "show", "-spiffeID", agent_id).out
    assert re.search(r"(?m)^State +: quarantined$", shown)
    assert re.search(r"(?m)^Reasons +: operator$", shown)
    assert re.search(r"(?m)^Message +: .*case 12$", shown)
    assert re.search(r"(?m)^In this state +: since 20\d\d-", shown)
    as_json = json.loads(cli("agent", "show", "-spiffeID", agent_id, "-output", "json").out)
    assert (as_json["state"], as_json["posture"]["by_operator"]) == ("quarantined", True)
    assert cli("agent", "show", "-spiffeID", agent_id, "-field", "state").out == "quarantined\n"

    freed = cli("agent", "release", "-spiffeID", agent_id)
    assert (freed.code, freed.out) == (0, "Agent released\n")
    again = cli("agent", "release", "-spiffeID", agent_id)
    assert again.code == 1
    assert "in no quarantine" in again.err

    history = cli("agent", "evidence", agent_id).out
    assert history.startswith("Found 2 records:\n")
    assert re.findall(r"(?m)^Number +: (\d+)$", history) == ["2", "1"]
    assert re.search(r"(?m)^Summary +: case 12$", history)
    records = json.loads(cli("agent", "evidence", agent_id, "-output", "json").out)["records"]
    assert [(r["occasion"], r["state"]) for r in records] == [
        ("operator", "attested"),
        ("operator", "quarantined"),
    ]
    assert "and older ones" in cli("agent", "evidence", agent_id, "-limit", "1").out


def test_evidence_that_is_not_there(cli: Cli, agent_id: str) -> None:
    for words in (("-latest",), ("-number", "77")):
        missing = cli("agent", "evidence", agent_id, *words)
        assert (missing.code, missing.out) == (5, "")
    stranger = cli("agent", "evidence", "spiffe://example.org/spire/agent/tpm/none")
    assert stranger.code == 5


@pytest.mark.parametrize(
    "words",
    [
        ("agent", "evidence"),
        ("agent", "evidence", "no id"),
        ("agent", "evidence", "spiffe://example.org/workload"),
        ("agent", "evidence", "spiffe://example.org/spire/agent/x/y", "-number", "-1"),
        ("agent", "quarantine"),
        ("agent", "release", "-spiffeID", ""),
        ("agent", "release", "-spiffeID", "spiffe://other.org/spire/agent/x/y"),
    ],
)
def test_wrong_words_are_refused(cli: Cli, words: tuple[str, ...]) -> None:
    refused = cli(*words)
    assert refused.code in {1, 2}
    assert refused.err


def test_comment_that_cannot_be_shown_is_refused(cli: Cli, agent_id: str) -> None:
    for comment in ("\x1b[2J", "x" * 1025):
        refused = cli("agent", "quarantine", "-spiffeID", agent_id, "-comment", comment)
        assert refused.code == 2
    assert "quarantine" not in cli("agent", "show", "-spiffeID", agent_id).out

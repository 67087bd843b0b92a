"""A policy's life with real programs: learnt from a node, tried, put in force, tightened, taken back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from spire_hw_sim.programs import try_run
from spire_hw_sim.workload import Workload, refusal
from tests.integration.posture.conftest import GOOD, extended

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.posture.conftest import Estate

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(180)]

OTHER = extended(b"other")


async def test_a_policy_is_learnt_tried_put_in_force_tightened_and_taken_back(
    estate: Estate, tmp_path: Path
) -> None:
    estate.allow(GOOD)
    estate.start()
    node, site = estate.node, estate.site
    await node.fetch_soon()

    learnt = tmp_path / "learnt.hcl"
    learnt.write_text(site.command("policy", "learn", "-node", node.id, "-name", "learnt"))
    told = site.command("policy", "test", "-node", node.id, "-policyFile", learnt)
    assert f"✓ pcr sha256:4: PCR 4 is among 1 allowed: sha256:{GOOD}\n" in told
    assert "Accepted" in told
    assert "pcrs.sha256:4" not in site.command("policy", "diff", "p", learnt)

    document = tmp_path / "node.json"
    document.write_text(site.command("agent", "evidence", node.id, "-latest"))
    offline = try_run(
        "spire-hw-server", "policy", "test", "-evidence", document, "-policyFile", learnt
    )
    assert offline.stdout == told.replace(node.id, str(document))

    strict = tmp_path / "strict.hcl"
    strict.write_text(learnt.read_text().replace(GOOD, OTHER))
    failed = site.try_command("policy", "test", "-node", node.id, "-policyFile", strict)
    assert (failed.returncode, failed.stderr) == (1, "")
    assert "[pcr_mismatch, quarantine]" in failed.stdout
    compared = site.command("policy", "diff", learnt, strict, "-node", node.id)
    assert f"pcrs.sha256:4\n  - {GOOD}\n  + {OTHER}\n" in compared
    assert f"{node.id}: accepted -> quarantine\n" in compared

    site.command("policy", "create", "-policyFile", learnt, "-comment", "learnt")
    listed = json.loads(site.command("policy", "list", "-output", "json"))["policies"]
    assert [(p["name"], p["is_default"], bool(p["file"])) for p in listed] == [
        ("learnt", False, False),
        ("p", True, True),
    ]
    refused = site.try_command("policy", "delete", "p")
    assert refused.returncode == 2
    assert "is the file" in refused.stderr

    async with Workload(node.socket) as workload:
        await workload.x509_svid()
        # Stored evidence is judged again at once.
        site.command("policy", "update", "-policyFile", strict, "-expectedVersion", "1")
        await refusal(workload.x509_svid, "pcr_mismatch")
    assert await estate.state() == "quarantined"
    site.command("policy", "delete", "learnt")
    await node.fetch_soon()
    assert await estate.state() in {"attested", "drifted"}
    assert "Traceback" not in node.log.read_text() + site.log.read_text()

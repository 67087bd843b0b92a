"""`doctor` of server and agent over a whole trust domain, well and then broken piece by piece."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from spire_hw.clock import SystemClock
from spire_hw_sim.pki import dated_pem
from spire_hw_sim.programs import try_run

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_sim.site import Node, Site


def doctor(program: str, config: Path, **env: str) -> dict[str, dict[str, Any]]:
    command = ("doctor", "-config", config, "-output", "json")
    done = try_run(program, *command, env={**os.environ, **env})
    values = json.loads(done.stdout)
    assert done.returncode == (1 if values["problems"] else 6 if values["warnings"] else 0)
    return {f["check"]: f for f in values["findings"]}


def problems(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {c: f["message"] for c, f in found.items() if f["level"] == "problem"}


def test_all_is_well(site: Site, node: Node) -> None:
    found = doctor("spire-hw-server", site.conf, **site.hsm.environment)
    assert problems(found) == {}
    assert {"config", "database", "socket", "certificate", "hsm.token"} <= set(found)
    found = doctor("spire-hw-agent", node.conf)
    assert problems(found) == {}
    well = {"config", "data_dir", "tpm.answers", "socket", "certificate", "server.reachable"}
    assert {c for c in well if found[c]["level"] == "ok"} == well


def test_a_bundle_that_has_expired_or_is_none(node: Node, tmp_path: Path) -> None:
    past = SystemClock().now() - timedelta(days=400)
    bundle, config = tmp_path / "bootstrap.pem", tmp_path / "agent.conf"
    lines = node.conf.read_text().splitlines()
    (at,) = [n for n, line in enumerate(lines) if "trust_bundle_path" in line]
    lines[at] = f'  trust_bundle_path = "{bundle}"'
    config.write_text("\n".join(lines) + "\n")
    found = doctor("spire-hw-agent", config)
    assert "does not exist" in found["bundle.unreadable"]["message"]
    assert "bundle show" in found["bundle.unreadable"]["remedy"]
    bundle.write_text("not a certificate")
    assert "bundle.unreadable" in problems(doctor("spire-hw-agent", config))
    bundle.write_text(dated_pem(past, past + timedelta(days=365)))
    assert "expired" in problems(doctor("spire-hw-agent", config))["certificate.expired"]
    bundle.write_text(dated_pem(past, past + timedelta(days=405)))
    assert doctor("spire-hw-agent", config)["certificate.expires_soon"]["level"] == "warning"
    later = SystemClock().now() + timedelta(days=2)
    bundle.write_text(dated_pem(later, later + timedelta(days=365)))
    found = doctor("spire-hw-agent", config)
    assert "look at the clock" in found["certificate.not_yet_valid"]["remedy"]


def test_a_server_and_a_tpm_that_are_away(site: Site, node: Node) -> None:
    site.server.kill()
    found = doctor("spire-hw-agent", node.conf)
    assert "server.unreachable" in problems(found)
    found = doctor("spire-hw-server", site.conf, **site.hsm.environment)
    assert "socket.dead" in problems(found)
    node.agent.kill()
    node.tpm.kill()
    found = doctor("spire-hw-agent", node.conf)
    assert {"tpm.silent", "socket.dead"} <= set(problems(found))


def test_a_node_that_was_never_let_in_and_one_whose_data_are_damaged(
    node: Node, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    lines = node.conf.read_text().splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.strip().startswith("data_dir")]
    lines[at] = f'  data_dir = "{data}"'
    config = tmp_path / "agent.conf"
    config.write_text("\n".join(lines) + "\n")
    assert "ek-hash" in doctor("spire-hw-agent", config)["svid.missing"]["remedy"]
    (data / "agent-data.json").write_text("{")
    assert "damaged" in problems(doctor("spire-hw-agent", config))["data.damaged"]
    ahead = SystemClock().now().timestamp() + 3600
    os.utime(data / "agent-data.json", (ahead, ahead))
    assert "time.behind" in problems(doctor("spire-hw-agent", config))

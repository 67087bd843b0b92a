"""Our plugins in upstream's server and agent, which start them as external plugins."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from spire_hw.plugin.info import PluginKind
from spire_hw_plugins.cli.install import launcher
from spire_hw_sim import softhsm
from spire_hw_sim.parties import WORKLOAD, Agent, Make, Party, Role, missing
from spire_hw_sim.programs import run
from spire_hw_sim.site import wait_until
from spire_hw_sim.swtpm import Swtpm
from spire_hw_sim.swtpm import is_available as has_swtpm
from tests.interop.test_agents import verified

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REASON = missing(Role.SERVER, Role.AGENT)
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
SYNCED_S = 30


@pytest.fixture
def party(request: pytest.FixtureRequest) -> Iterator[Party]:
    with Party() as made:
        failed = request.session.testsfailed
        yield made
        if request.session.testsfailed > failed:
            print(made.logs())  # noqa: T201 - for whoever has to find out why


class Plugins:
    """Writes launchers and the blocks that configure them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "plugins"
        self._directory.mkdir()

    def block(self, kind: PluginKind, name: str, data: str, *, label: str = "") -> str:
        program = self._directory / f"{kind.value}-{name}"
        program.write_bytes(launcher(kind, name))
        program.chmod(0o755)
        checksum = hashlib.sha256(program.read_bytes()).hexdigest()
        data_dir = self._directory / "data"
        return f"""
  {kind.value} "{label or name}" {{
    plugin_cmd      = "{program}"
    plugin_checksum = "{checksum}"
    plugin_args     = ["-dataDir", "{data_dir}"]
    plugin_data {{
      {data}
    }}
  }}"""


@pytest.fixture
def plugins(party: Party) -> Plugins:
    return Plugins(party.directory)


def ek_hash(tpm: Swtpm) -> str:
    return run("spire-hw-agent", "tpm", "ek-hash", "-tcti", tpm.tcti).split()[0]


def workload_gets_its_svid(party: Party, agent: Agent) -> None:
    party.server.create_entry(agent.id)
    wait_until("the workload has its SVID", agent.fetch, SYNCED_S)
    (svid,) = [verified(found) for found in agent.fetch()]
    assert str(svid.spiffe_id) == WORKLOAD


@pytest.mark.tpm
@pytest.mark.skipif(not has_swtpm(), reason="swtpm is not installed")
def test_upstreams_hosts_attest_a_node_by_its_tpm(
    party: Party, plugins: Plugins, tmp_path: Path
) -> None:
    with Swtpm(tmp_path / "tpm") as tpm:
        for pcr in range(8):
            tpm.extend_pcr(pcr, b"boot")
        identity = ek_hash(tpm)
        keys = f'keys_path = "{party.directory}/keys.json"'
        node = f"""ek_policy = "hash"
      ek_hashes = ["{identity}"]
      require_tpm_key = false
      pcrs {{ sha256 = [0, 7] }}"""
        party.open_server(
            Make.UPSTREAM,
            plugins=plugins.block(PluginKind.KEY_MANAGER, "disk", keys)
            + plugins.block(PluginKind.NODE_ATTESTOR, "tpm", node),
        )
        agent_keys = f'directory = "{party.directory}"'
        agent = Agent(
            party,
            Make.UPSTREAM,
            "tpm",
            plugins=plugins.block(PluginKind.NODE_ATTESTOR, "tpm", f'tcti = "{tpm.tcti}"')
            + plugins.block(PluginKind.KEY_MANAGER, "disk", agent_keys)
            + plugins.block(PluginKind.WORKLOAD_ATTESTOR, "unix", "", label="seen_by_ours"),
        )
        agent.start()
        record = agent.record()
        assert record is not None
        assert agent.id.endswith(f"/spire/agent/tpm/{identity}")
        assert record["can_reattest"]
        selectors = {s["value"] for s in record["selectors"] if s["type"] == "tpm"}
        assert f"pub_hash:{identity}" in selectors
        assert "key:tpm" not in selectors
        workload_gets_its_svid(party, agent)
        more = "spiffe://interop.example/by-our-selector"
        party.server.ask(
            *("entry", "create", "-parentID", agent.id, "-spiffeID", more),
            *("-selector", f"seen_by_ours:uid:{os.getuid()}"),
        )
        wait_until(
            "our workload attestor counts",
            lambda: more in {found["spiffe_id"] for found in agent.fetch()},
            SYNCED_S,
        )


@pytest.mark.tpm
@pytest.mark.skipif(not has_swtpm(), reason="swtpm is not installed")
def test_upstreams_agent_keeps_its_key_in_the_tpm(
    party: Party, plugins: Plugins, tmp_path: Path
) -> None:
    party.open_server(Make.UPSTREAM)
    with Swtpm(tmp_path / "tpm") as tpm:
        keys = plugins.block(PluginKind.KEY_MANAGER, "tpm", f'tcti = "{tpm.tcti}"')
        agent = Agent(party, Make.UPSTREAM, "join_token", plugins=keys)
        agent.start()
        workload_gets_its_svid(party, agent)
        before = agent.record()
        agent.run.stop()
        agent.start()
        assert agent.record() == before
        workload = [verified(found) for found in agent.fetch()]
        assert [str(svid.spiffe_id) for svid in workload] == [WORKLOAD]


@pytest.mark.hsm
@pytest.mark.skipif(softhsm.SoftHsm.find_module() is None, reason="SoftHSM is not installed")
def test_upstreams_server_signs_with_a_token(
    party: Party, plugins: Plugins, tmp_path: Path
) -> None:
    hsm = softhsm.SoftHsm(tmp_path / "hsm")
    hsm.init_token("spire", pin="4321")
    pin = tmp_path / "pin"
    pin.write_text("4321\n")
    pin.chmod(0o600)
    environment = "\n".join(f'        {k} = "{v}"' for k, v in hsm.environment.items())
    data = f"""module_path = "{hsm.module}"
      token_label = "spire"
      pin_file = "{pin}"
      environment {{
{environment}
      }}"""
    server = party.open_server(
        Make.UPSTREAM, plugins=plugins.block(PluginKind.KEY_MANAGER, "pkcs11", data)
    )
    agent = Agent(party, Make.UPSTREAM, "x509pop")
    agent.start()
    workload_gets_its_svid(party, agent)
    before = server.command("bundle", "show")
    server.run.stop()
    server.start()
    assert server.command("bundle", "show") == before

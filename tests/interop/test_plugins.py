"""Our plugins as external plugins of upstream's unmodified server and agent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw_sim.liarsigner import SIGNER_ID, write_client
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.parties import TRUST_DOMAIN, Agent, Make, Party, Role, install_plugins, missing
from spire_hw_sim.remoterig import SignerProcess
from spire_hw_sim.signer import SignerRig, client_policy
from spire_hw_sim.site import wait_until
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import Swtpm

if TYPE_CHECKING:
    from collections.abc import Iterator

_REASON = missing(Role.SERVER, Role.AGENT)
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)
PIN = "27182818"


@dataclass
class Shop:
    """A party, and launchers of our plugins."""

    party: Party
    launchers: dict[tuple[str, str], dict[str, str]]

    def block(self, make: Make, kind: str, name: str, data: str = "") -> str:
        """Return the block of a plugin of ours: external in upstream's programs."""
        row = self.launchers[kind, name]
        memory = self.party.directory / "remembered"
        memory.mkdir(mode=0o700, exist_ok=True)
        external = (
            f'plugin_cmd = "{row["path"]}"\n plugin_checksum = "{row["checksum"]}"\n'
            f' plugin_args = ["-dataDir", "{memory}"]'
        )
        return (
            f'{kind} "{name}" {{\n {external if make is Make.UPSTREAM else ""}\n'
            f" plugin_data {{ {data} }}\n}}"
        )


@pytest.fixture
def shop() -> Iterator[Shop]:
    with Party() as party:
        yield Shop(party, install_plugins(party.directory / "plugins"))
        print(party.logs())  # noqa: T201 - for whoever has to find out why


def keys_of_server(shop: Shop, name: str) -> tuple[str, dict[str, str]]:
    """Return plugin_data of one of our KeyManagers, and the environment its device needs."""
    directory = shop.party.directory
    if name == "disk":
        return f'keys_path = "{directory}/server/data/keys.json"', {}
    if name == "memory":
        return "", {}
    hsm = SoftHsm(directory / "hsm")
    hsm.init_token("interop", PIN)
    pin = directory / "pin"
    pin.touch(mode=0o600)
    pin.write_text(PIN)
    data = (
        f'module_path = "{hsm.module}" token_label = "interop" pin_file = "{pin}"'
        ' key_identifier_value = "interop"'
    )
    return data, hsm.environment


@pytest.mark.parametrize("name", ["memory", "disk", pytest.param("pkcs11", marks=pytest.mark.hsm)])
def test_key_manager_in_upstreams_server(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    use_in_upstreams_server(shop, monkeypatch, name)


@pytest.mark.tpm
def test_tpm_keys_in_upstreams_server(
    shop: Shop, tpm: Swtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_in_upstreams_server(shop, monkeypatch, "tpm", f'tcti = "{tpm.tcti}"')


@pytest.mark.hsm
def test_keys_at_a_signer_in_upstreams_server(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has no words for what is signed: this client may have bare digests signed."""
    policy = client_policy(trust_domain=TRUST_DOMAIN, raw="true")
    signer = SignerProcess(SignerRig(shop.party.directory / "signer", policy=policy))
    files = write_client(signer.rig.authority, shop.party.directory / "client")
    data = f"""addresses = ["{signer.address}"] signer_id = "{SIGNER_ID}"
      signer_ca = "{files.ca}" cert = "{files.cert}" key = "{files.key}" """
    signer.start()
    try:
        use_in_upstreams_server(shop, monkeypatch, "remote", data)
    finally:
        signer.stop()


def use_in_upstreams_server(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, name: str, given: str = ""
) -> None:
    """Let one of our KeyManagers hold the authorities of upstream's server."""
    data, environment = (given, {}) if given else keys_of_server(shop, name)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    plugins = shop.block(Make.UPSTREAM, "KeyManager", name, data)
    server = shop.party.open_server(Make.UPSTREAM, plugins=plugins)
    agent = Agent(shop.party, Make.UPSTREAM, "join_token")
    agent.start()
    server.create_entry(agent.id)
    wait_until("an SVID", agent.fetch)
    authority = server.ask("localauthority", "x509", "show")["active"]["authority_id"]
    rotated = server.ask("localauthority", "x509", "prepare")["prepared_authority"]["authority_id"]
    server.command("localauthority", "x509", "activate", "-authorityID", rotated)
    assert server.run.stop(30) == 0
    server.start()
    found = server.ask("localauthority", "x509", "show")
    if name == "memory":
        assert found["active"]["authority_id"] not in {authority, rotated}
    else:
        assert found["active"]["authority_id"] == rotated
        assert found["old"]["authority_id"] == authority


@pytest.fixture
def tpm(tmp_path_factory: pytest.TempPathFactory, shop: Shop) -> Iterator[Swtpm]:
    made = Swtpm(Path(tmp_path_factory.mktemp("tpm")), persistent_ek=False)
    maker = Manufacturer("Interop TPM Works")
    maker.write_roots(shop.party.directory / "makers.pem")
    made.start()
    try:
        maker.equip(made, (EkKind.ECC_P256,))
        for pcr in range(8):
            made.extend_pcr(pcr, b"boot")
        yield made
    finally:
        made.stop()


@pytest.mark.tpm
@pytest.mark.parametrize("agent_make", Make, ids=lambda make: f"{make}-agent")
@pytest.mark.parametrize("server_make", Make, ids=lambda make: f"{make}-server")
def test_tpm_attestation(shop: Shop, tpm: Swtpm, server_make: Make, agent_make: Make) -> None:
    """Our attestor in either server, our key manager and attestors in either agent."""
    party = shop.party
    native = server_make is agent_make is Make.OURS
    lax = "" if native else "require_tpm_key = false bind_csr = false"
    roots = party.directory / "makers.pem"
    attestor = f'ek_policy = "ca" endorsement_ca_path = "{roots}" {lax}'
    keys = f'keys_path = "{party.directory}/server/data/keys.json"'
    server = party.open_server(
        server_make,
        plugins="\n".join(
            (
                shop.block(server_make, "KeyManager", "disk", keys),
                shop.block(server_make, "NodeAttestor", "tpm", attestor),
            )
        ),
    )
    tcti = f'tcti = "{tpm.tcti}"'
    binding = "" if native else "bind_csr = false"
    agent = Agent(
        party,
        agent_make,
        "tpm",
        plugins="\n".join(
            (
                shop.block(agent_make, "KeyManager", "tpm", tcti),
                shop.block(agent_make, "NodeAttestor", "tpm", f"{tcti} {binding}"),
            )
        ),
    )
    text = agent.conf.read_text()
    unix = shop.block(agent_make, "WorkloadAttestor", "unix")
    agent.conf.write_text(text.replace('WorkloadAttestor "unix" { plugin_data {} }', unix))
    agent.start()
    record = agent.record()
    assert record is not None
    values = {selector["value"] for selector in record["selectors"]}
    assert "tier:quote" in values
    assert ("key:tpm" in values) is native
    server.create_entry(agent.id)
    wait_until("an SVID", agent.fetch)
    agent_id = agent.id
    assert agent.run.stop(30) == 0
    agent.start()
    wait_until("an SVID after a restart", agent.fetch)
    assert agent.id == agent_id
    server.command("agent", "evict", "-spiffeID", agent_id)
    wait_until("the agent attests again", agent.record, 90)

"""Sample configurations, and every configuration the documentation shows, are valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.clock import SystemClock
from spire_hw.config import hcl
from spire_hw.config.hcl import Block, Body
from spire_hw.config.host import LogKeys
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.plugin.section import parse_plugins
from spire_hw.posture import policykeys
from spire_hw.posture.policyfile import parse_policy
from spire_hw.posture.reasons import DEFAULT_ACTIONS
from spire_hw.posture.verdict import Action
from spire_hw.spiffeid import TrustDomain
from spire_hw.telemetry import config as telemetry
from spire_hw_agent import app as agent_app
from spire_hw_agent import config as agent_config
from spire_hw_plugins import builtin
from spire_hw_plugins.keymanager import disk, pkcs11, tpm_config
from spire_hw_plugins.keymanager.remote import config as remote_config
from spire_hw_plugins.nodeattestor.tpm import agent as tpm_agent
from spire_hw_plugins.nodeattestor.tpm import config as tpm_server
from spire_hw_plugins.nodeattestor.tpm_devid import agent as devid_agent
from spire_hw_plugins.nodeattestor.tpm_devid import config as devid_server
from spire_hw_plugins.nodeattestor.x509pop import agent as x509pop_agent
from spire_hw_plugins.nodeattestor.x509pop import config as x509pop_server
from spire_hw_plugins.upstreamauthority import disk as upstream_disk
from spire_hw_plugins.upstreamauthority import pkcs11 as upstream_pkcs11
from spire_hw_plugins.workloadattestor import unix
from spire_hw_server import config as server_config
from spire_hw_server import offline as server_offline
from spire_hw_server.cli.init import init as server_init
from spire_hw_server.datastore.config import RawDatastoreConfig, parse_datastore
from spire_hw_signer import config as signer_config
from spire_hw_signer import policyfile as signer_policy
from spire_hw_signer.cli.init import init as signer_init
from spire_hw_signer.policy import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SERVER_CONF, AGENT_CONF = ROOT / "server" / "server.conf", ROOT / "agent" / "agent.conf"
SIGNER_CONF, SIGNER_POLICY = ROOT / "server" / "signer.conf", ROOT / "server" / "signer-policy.conf"
KINDS = {kind.value: kind for kind in PluginKind}
_FENCE = re.compile(r"^```hcl\n(.*?)^```", re.MULTILINE | re.DOTALL)


class NoEks:
    async def is_ek_allowed(self, ek_hash: str) -> bool:
        return False


def fences() -> Iterator[tuple[str, str]]:
    for file in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]:
        for n, text in enumerate(_FENCE.findall(file.read_text()), 1):
            yield f"{file.relative_to(ROOT)}:{n}", text


FENCES = list(fences())


@pytest.mark.asyncio
async def test_the_sample_of_the_server_is_valid_with_its_plugins() -> None:
    settings = server_config.load_settings(SERVER_CONF)
    assert await server_offline.check_settings(settings) == []
    assert settings.notices == ()


@pytest.mark.asyncio
async def test_the_sample_of_the_agent_is_valid_with_its_plugins() -> None:
    settings = agent_config.load_settings(AGENT_CONF)
    assert await agent_app.check(settings) == []
    assert settings.notices == ()


def test_the_samples_of_the_signer_are_valid() -> None:
    settings = signer_config.load_settings(SIGNER_CONF)
    assert settings.notices == ()
    policy = signer_policy.load_policy(SIGNER_POLICY)
    assert not list(signer_policy.describe(policy))


def test_no_two_ports_of_one_machine_are_the_same() -> None:
    # A server, a signer and an agent for a first try stand on one machine.
    server = server_config.load_settings(SERVER_CONF)
    signer = signer_config.load_settings(SIGNER_CONF)
    agent = agent_config.load_settings(AGENT_CONF)
    assert agent.server_port == server.bind_port
    probes = [s.health.bind_port for s in (server, signer, agent) if s.health is not None]
    sample = [server.bind_port, signer.bind_port, *probes]
    asked = [
        option.default
        for command in (server_init, signer_init)
        for option in command.params
        if option.name in {"server_port", "bind_port", "health_port"}
    ]
    for ports in (sample, asked):
        assert len(ports) >= 4
        assert len(set(ports)) == len(ports)
    assert set(asked) == set(sample)


@pytest.mark.parametrize("text", [t for _, t in FENCES], ids=[name for name, _ in FENCES])
def test_shown_configuration_is_valid(text: str) -> None:
    body = hcl.parse(text)
    assert body.items
    if body.blocks("policy"):
        assert parse_policy(text, read=referred_to).sha256
        return
    if body.blocks("client"):
        assert signer_policy.parse_policy(text).hash
        return
    for item in body.items:
        assert isinstance(item, Block), "a fence holds whole blocks"
        check_block(item)


def referred_to(name: str, /) -> bytes:
    """Return a file as policies in the documentation refer to it."""
    if name.endswith(".sha256"):
        return b"00" * 32 + b"  name\n"
    assert name.endswith(".pem")
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form)


def check_block(block: Block) -> None:
    key = block.keys[0]
    if key == "plugins":
        for inner in block.body.items:
            assert isinstance(inner, Block)
            check_block(inner)
    elif key in {"server", "health_checks", "posture", "telemetry"}:
        on_top_of(SERVER_CONF, block, server_config.build_settings)
    elif key == "signer":
        on_top_of(SIGNER_CONF, block, signer_config.build_settings)
    elif key == "agent":
        on_top_of(AGENT_CONF, block, agent_config.build_settings)
    else:
        check_plugin(block)


def on_top_of(sample: Path, block: Block, build: object) -> None:
    """Read a part of a file as if it stood in the sample, where its keys win."""
    assert callable(build)
    given = {item.key for item in block.body.items if not isinstance(item, Block)}
    items: list[object] = []
    for item in hcl.parse(sample.read_text()).items:
        if isinstance(item, Block) and item.keys == block.keys:
            kept = tuple(
                i for i in item.body.items if isinstance(i, Block) or not excluded(i.key, given)
            )
            items.append(Block(item.keys, Body((*kept, *block.body.items))))
        else:
            items.append(item)
    if not any(isinstance(i, Block) and i.keys == block.keys for i in items):
        items.append(block)
    build(Body(tuple(items)))  # type: ignore[arg-type]


def excluded(key: str, given: set[str]) -> bool:
    first_contact = {"trust_bundle_path", "trust_bundle_url", "insecure_bootstrap"}
    return key in given or (key in first_contact and bool(given & first_contact))


def check_plugin(block: Block) -> None:
    kind, name = block.keys
    (data,) = [b.body for b in block.body.blocks("plugin_data")] or [Body.empty()]
    if kind == "DataStore":
        parse_datastore(data)
        return
    if block.body.get("plugin_cmd") is not None:  # what it is given is its own business
        parse_plugins(Body((block,)))
        return
    found = []
    for side in Side:
        if (KINDS[kind], name, side) not in builtin.TABLE:
            continue
        host = HostInfo(
            side=side,
            trust_domain=TrustDomain.parse("example.org"),
            data_dir=Path("/nonexistent"),
            log=get_logger("test"),
            clock=SystemClock(),
            ek_list=NoEks() if side is Side.SERVER else None,
        )
        found.append(builtin.lookup(KINDS[kind], name, side)(host).validate(data))
    assert [] in found or (kind, name) == ("NodeAttestor", "join_token"), found


def keys_of(*models: type[object]) -> set[str]:
    fields = [item for model in models for item in model.model_fields.items()]  # type: ignore[attr-defined]
    return {field.alias or key for key, field in fields}


def test_every_key_of_both_files_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    server = keys_of(server_config.ServerKeys, server_config.ExperimentalKeys)
    agent = keys_of(agent_config.AgentKeys, agent_config.ExperimentalKeys)
    refused = {
        key
        for model in (
            server_config.ServerKeys,
            server_config.ExperimentalKeys,
            server_config.ServerFile,
            agent_config.AgentKeys,
            agent_config.ExperimentalKeys,
            agent_config.AgentFile,
        )
        for key in model.unsupported
    }
    both = keys_of(telemetry.TelemetryKeys, telemetry.PrometheusKeys, telemetry.TlsKeys)
    refused |= set(telemetry.TelemetryKeys.unsupported)
    missing = {key for key in server | agent | both | refused if f"`{key}`" not in text}
    assert not missing


def test_every_key_of_the_signer_and_every_reason_is_documented() -> None:
    text = (ROOT / "docs" / "signer.md").read_text()
    models = (
        signer_config.TlsKeys,
        signer_config.AuditKeys,
        signer_config.SyslogKeys,
        signer_config.OperatorsKeys,
        signer_policy.PolicyFile,
        signer_policy.ClientKeys,
        signer_policy.GenerateKeys,
        signer_policy.ImportKeys,
        signer_policy.X509Keys,
        signer_policy.JwtKeys,
    )
    own = keys_of(signer_config.SignerKeys) - keys_of(LogKeys)
    words = set(re.findall(r"[a-z0-9_]+", "".join(re.findall(r"`[^`]*`", text))))
    assert not (keys_of(*models) | own | {reason.word for reason in Reason}) - words


def test_every_key_of_a_policy_and_every_reason_is_documented() -> None:
    text = (ROOT / "docs" / "policies.md").read_text()
    models = (
        policykeys.PolicyKeys,
        policykeys.NodesKeys,
        policykeys.TpmKeys,
        policykeys.BootKeys,
        policykeys.ImaKeys,
    )
    words = set(re.findall(r"[a-z0-9_]+", "".join(re.findall(r"`[^`]*`", text))))
    assert not keys_of(*models) - words
    by_action = {action: f"| `{action.value}` | " for action in Action}
    lines = text.splitlines()
    for code, action in DEFAULT_ACTIONS.items():
        (row,) = [line for line in lines if line.startswith(by_action[action])]
        assert f"`{code}`" in row, code


def test_every_key_of_every_plugin_is_documented() -> None:
    pages = {
        "keymanager_pkcs11": (pkcs11.Config,),
        "keymanager_remote": (remote_config.Config,),
        "keymanager_disk": (disk.ServerConfig, disk.AgentConfig),
        "keymanager_tpm": (tpm_config.Config, tpm_config.PcrsConfig),
        "nodeattestor_tpm": (tpm_server.ServerConfig, tpm_agent.Config),
        "nodeattestor_tpm_devid": (devid_server.ServerConfig, devid_agent.Config),
        "nodeattestor_x509pop": (x509pop_server.ServerConfig, x509pop_agent.Config),
        "upstreamauthority_disk": (upstream_disk.Config,),
        "upstreamauthority_pkcs11": (upstream_pkcs11.Config,),
        "workloadattestor_unix": (unix.Config,),
        "datastore_sql": (RawDatastoreConfig,),
    }
    for page, models in pages.items():
        text = (ROOT / "docs" / "plugins" / f"{page}.md").read_text()
        missing = {key for key in keys_of(*models) if f"`{key}`" not in text}
        assert not missing, page

"""Upstream's own plugins, built as external ones, inside our server and agent.

Each is named by an environment variable. They are upstream's `disk` KeyManager, both halves of
`x509pop` and the `unix` WorkloadAttestor, served by the plugin SDK's `pluginmain`.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import pytest

from spire_hw_sim.parties import Agent, Make, Party, Server, find_program
from spire_hw_sim.site import wait_until

if TYPE_CHECKING:
    from pathlib import Path

VARIABLES = {
    "keys": "SPIRE_GO_SERVER_KEYMANAGER_DISK_BIN",
    "attestor": "SPIRE_GO_SERVER_NODEATTESTOR_X509POP_BIN",
    "node": "SPIRE_GO_AGENT_NODEATTESTOR_X509POP_BIN",
    "unix": "SPIRE_GO_AGENT_WORKLOADATTESTOR_UNIX_BIN",
}
FOUND = {name: find_program(variable, "") for name, variable in VARIABLES.items()}
ABSENT = [VARIABLES[name] for name, program in FOUND.items() if program is None]


def block(kind: str, name: str, program: Path | None, data: str) -> str:
    external = ""
    if program is not None:
        checksum = hashlib.sha256(program.read_bytes()).hexdigest()
        external = f'plugin_cmd = "{program}"\n plugin_checksum = "{checksum}"\n'
    return f'{kind} "{name}" {{\n {external} plugin_data {{ {data} }}\n}}\n'


def with_block(conf: Path, kind: str, name: str, new: str) -> None:
    """Put a block in the place of the one of that kind and name."""
    text = conf.read_text()
    pattern = rf'{kind} "{name}" {{\s*plugin_data {{[^}}]*}}\s*}}'
    changed, number = re.subn(pattern, lambda _: new, text)
    assert number == 1
    conf.write_text(changed)


@pytest.mark.skipif(len(ABSENT) == len(VARIABLES), reason=f"{', '.join(ABSENT)} not set")
def test_go_plugins_in_our_programs() -> None:
    """Those that were named take the place of ours, all at once."""
    with Party() as party:
        keys = f'keys_path = "{party.directory}/server/data/keys.json"'
        server = party.server = Server(
            party, Make.OURS, plugins=block("KeyManager", "disk", FOUND["keys"], keys)
        )
        ca = f'ca_bundle_path = "{party.root_path}"'
        with_block(
            server.conf,
            "NodeAttestor",
            "x509pop",
            block("NodeAttestor", "x509pop", FOUND["attestor"], ca),
        )
        server.start()
        agent = Agent(party, Make.OURS, "x509pop")
        own = (
            f'private_key_path = "{agent.home}/node.key" certificate_path = "{agent.home}/node.crt"'
        )
        with_block(
            agent.conf,
            "NodeAttestor",
            "x509pop",
            block("NodeAttestor", "x509pop", FOUND["node"], own),
        )
        with_block(
            agent.conf,
            "WorkloadAttestor",
            "unix",
            block("WorkloadAttestor", "unix", FOUND["unix"], ""),
        )
        agent.start()
        server.create_entry(agent.id)
        wait_until("an SVID", agent.fetch)
        before = agent.id, server.ask("localauthority", "x509", "show")["active"]
        assert server.run.stop(30) == 0
        assert agent.run.stop(30) == 0
        server.start()
        agent.start()
        wait_until("an SVID after a restart of both", agent.fetch)
        assert (agent.id, server.ask("localauthority", "x509", "show")["active"]) == before

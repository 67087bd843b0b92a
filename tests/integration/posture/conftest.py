"""A trust domain of real programs and a TPM of its own for each test, under a policy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw._pb import hw_posture_pb2
from spire_hw.rpc.client import connect_unix
from spire_hw_sim.site import Site
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import is_available

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw_sim.site import Node


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            for marker in (pytest.mark.tpm, pytest.mark.hsm, pytest.mark.slow):
                item.add_marker(marker)
            if not is_available() or SoftHsm.find_module() is None:
                item.add_marker(pytest.mark.skip(reason="swtpm or SoftHSM is not installed"))


def extended(*measured: bytes) -> str:
    """Return the SHA-256 value of a PCR into which this was measured since the reset."""
    value = bytes(32)
    for data in measured:
        value = hashlib.sha256(value + hashlib.sha256(data).digest()).digest()
    return value.hex()


_GET_STATE = "/spire_hw.server.v1.PostureAdmin/GetState"
GOOD = extended(b"boot")


class Estate:
    """A site with one node whose server has a policy for PCR 4.

    Attributes:
        site: the programs.
        node: its only node.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self._policies = site.directory / "policies"
        self._policies.mkdir()
        self.node: Node

    def allow(self, *values: str, drift: str = "") -> None:
        """Write the policy: these values of PCR 4, and what differs from the drift table."""
        listed = ", ".join(f'"{value}"' for value in values)
        text = f'policy "p" {{ pcrs {{ sha256 {{ "4" = [{listed}] }} }} drift {{ {drift} }} }}\n'
        new = self._policies / "new"
        new.write_text(text)
        new.replace(self._policies / "p.hcl")

    def start_server(self, posture: str = "", *, keys: str = "") -> None:
        """Start the server with heartbeats every second; `keys` are more of `server { }`."""
        block = f'posture {{ policy_dir = "{self._policies}" heartbeat_interval = "1s" {posture} }}'
        self.site.start_server(keys=keys, change=lambda text: f"{text}\n{block}\n")
        self.site.wait_ready()

    def start(self, posture: str = "", *, keys: str = "") -> None:
        """Start server and node, and make this process a workload."""
        self.start_server(posture, keys=keys)
        self.node = self.site.node("n")
        self.node.start()
        self.node.wait_in_use()
        self.site.register(self.node)

    async def state(self) -> str:
        """Return the state of the node as the server tells operators."""
        request = hw_posture_pb2.GetStateRequest(agent_id=self.node.id)
        async with connect_unix(self.site.socket) as channel:
            found = await channel.unary(
                _GET_STATE, request, hw_posture_pb2.NodePosture, timeout_s=10
            )
        return found.state


@pytest.fixture
def estate() -> Iterator[Estate]:
    with Site() as site:
        yield Estate(site)

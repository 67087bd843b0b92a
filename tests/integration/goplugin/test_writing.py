"""The plugins in docs/plugins/writing.md are plugins: taken out of the page and run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw.clock import SystemClock
from spire_hw.errors import DeniedError, InvalidInputError
from spire_hw.goplugin.external import ExternalPlugin
from spire_hw.goplugin.place import Place
from spire_hw.log import get_logger
from spire_hw.plugin.hostservices import HostServices
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity
from spire_hw.plugin.section import PluginConfig
from spire_hw.spiffeid import SpiffeId, TrustDomain
from tests.integration.goplugin.test_hostservices import Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGE = Path(__file__).parents[3] / "docs" / "plugins" / "writing.md"
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAIN = "from spire_hw_plugins.cli.main import main; main()"
TD = TrustDomain.parse("example.org")


def programs() -> dict[str, str]:
    """Return the page's programs by the name in their second line."""
    found = {}
    for text in PYTHON.findall(PAGE.read_text()):
        first, second, *_ = text.splitlines()
        assert first.startswith("#!")
        found[second.removeprefix("# ")] = text.replace(first, f"#!{sys.executable} -I", 1)
    return found


def install(name: str, directory: Path) -> Path:
    path = directory / name
    path.write_text(programs()[name])
    path.chmod(0o755)
    return path


def test_the_page_has_a_key_manager_and_a_node_attestor_and_they_are_short() -> None:
    found = programs()
    assert set(found) == {"folder_keys.py", "shared_secret.py"}
    assert all(len(text.splitlines()) < 90 for text in found.values())


def test_the_key_manager_does_what_hosts_expect(tmp_path: Path) -> None:
    program = install("folder_keys.py", tmp_path)
    data = tmp_path / "folder.hcl"
    (tmp_path / "keys").mkdir()
    data.write_text(f'directory = "{tmp_path}/keys"')
    command = ["-kind", "KeyManager", "-output", "json", "-data", str(data)]
    found = subprocess.run(  # noqa: S603
        [sys.executable, "-c", MAIN, "check", *command, str(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    report = json.loads(found.stdout)
    assert [s for s in report["steps"] if s["outcome"] != "passed"] == []
    assert found.returncode == 0
    assert (tmp_path / "keys" / "spire-hw-check-ec-p256.pem").stat().st_mode & 0o777 == 0o600


class Wire:
    """Both ends of an attestation between two plugin processes."""

    def __init__(self) -> None:
        self._up: asyncio.Queue[bytes] = asyncio.Queue()
        self._down: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def send(self, data: bytes) -> None:
        await self._up.put(data)

    async def receive(self) -> bytes:
        found = await self.next_challenge()
        assert found is not None
        return found

    async def next_challenge(self) -> bytes | None:
        return await self._down.get()

    async def challenge(self, data: bytes) -> bytes:
        await self._down.put(data)
        return await self._up.get()

    async def attest(self, agent: Any, server: Any) -> AttestedIdentity:
        async def admit(agent_id: SpiffeId) -> None:
            del agent_id

        async def serve() -> AttestedIdentity:
            try:
                request = AttestationRequest(await self._up.get(), self.challenge, None, admit)
                found: AttestedIdentity = await server.attest(request)
                return found
            finally:
                self._down.put_nowait(None)

        _, found = await asyncio.gather(agent.aid_attestation(self, None), serve())
        return found


@pytest_asyncio.fixture
async def halves(tmp_path: Path) -> AsyncIterator[tuple[ExternalPlugin, ExternalPlugin]]:
    program = install("shared_secret.py", tmp_path)
    recorder = Recorder()
    offers = {
        Side.AGENT: HostServices(recorder),
        Side.SERVER: HostServices(recorder, recorder, recorder),
    }
    async with AsyncExitStack() as stack:
        made = []
        for side in (Side.AGENT, Side.SERVER):
            place = Place.open()
            stack.callback(place.close)
            host = HostInfo(side, TD, tmp_path, get_logger("test"), SystemClock())
            config = PluginConfig(PluginKind.NODE_ATTESTOR, "shared_secret", cmd=str(program))
            plugin = ExternalPlugin(config, host, offers[side], place, environ=os.environ)
            stack.push_async_callback(plugin.close)
            await plugin.open()
            made.append(plugin)
        yield made[0], made[1]


@pytest.mark.asyncio
async def test_the_node_attestor_lets_in_who_has_the_secret_and_nobody_else(
    halves: tuple[ExternalPlugin, ExternalPlugin], tmp_path: Path
) -> None:
    agent, server = halves
    known, own = tmp_path / "nodes", tmp_path / "secret"
    known.mkdir()
    (known / "n1").write_bytes(b"s" * 32)
    await server.configure(f'directory = "{known}"')

    async def attest(node: str, secret: bytes) -> AttestedIdentity:
        own.write_bytes(secret)
        await agent.configure(f'node = "{node}"\nsecret_path = "{own}"')
        return await Wire().attest(agent.contract, server.contract)

    found = await attest("n1", b"s" * 32)
    assert found.agent_id == SpiffeId.parse("spiffe://example.org/spire/agent/shared_secret/n1")
    assert (found.selector_values, found.can_reattest) == (["node:n1"], True)
    for node, secret in (("n1", b"x" * 32), ("n2", b"s" * 32)):
        with pytest.raises(DeniedError, match=r"^nodeattestor\(shared_secret\): node is unknown"):
            await attest(node, secret)
    for node in ("../nodes/n1", "", "a/b"):
        with pytest.raises(InvalidInputError, match="names no node"):
            await attest(node, b"s" * 32)

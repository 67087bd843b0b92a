"""A plugin made with upstream's SDK, in Go, runs in our host as it does in upstream's."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw import log
from spire_hw.catalog import Catalog, External, check_plugins
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import parse
from spire_hw.errors import ConfigError, ErrorKind, NotFoundError, PluginError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.plugin.hostservices import HostServices
from spire_hw.plugin.info import Builder, HostInfo, PluginKind, Side
from spire_hw.plugin.keymanager import Keys
from spire_hw.plugin.metrics import PluginMetrics
from spire_hw.plugin.section import SERVER_RULES, PluginConfig, parse_plugins
from spire_hw.spiffeid import TrustDomain

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).parent / "go_plugin"
SHA256 = SignOptions(HashAlgorithm.SHA256)


class NoAgents:
    async def check_known(self, agent_id: object) -> None:
        raise NotFoundError(f"no agent {agent_id}")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the plugin from modules that are at hand; nothing is fetched."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed")
    made = tmp_path_factory.mktemp("go") / "keymanager"
    environment = {**os.environ, "GOPROXY": "off", "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local"}
    source = made.with_name("source")
    shutil.copytree(SOURCE, source)
    done = subprocess.run(  # noqa: S603
        [go, "build", "-o", str(made), "."],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"`go mod download` was not run in {SOURCE.name}: {done.stderr[-300:]}")
    return made


@pytest.fixture(autouse=True)
def every_line() -> Iterator[None]:
    log.output().level = log.Level.DEBUG
    yield
    log.output().reset_level()


def block(program: Path, data: str = "a = 1") -> list[PluginConfig]:
    checksum = hashlib.sha256(program.read_bytes()).hexdigest()
    text = f"""KeyManager "go" {{
        plugin_cmd = "{program}" plugin_checksum = "{checksum}" plugin_data {{ {data} }}
    }}"""
    return parse_plugins(parse(text, "server.conf"))


def host(tmp_path: Path) -> HostInfo:
    return HostInfo(
        Side.SERVER,
        TrustDomain("example.org"),
        tmp_path,
        log.get_logger("catalog"),
        SystemClock(),
    )


def no_builtins(kind: PluginKind, name: str) -> Builder:
    raise NotFoundError(f"no built-in {kind.value} {name}")


async def load(program: Path, tmp_path: Path, data: str = "a = 1") -> Catalog:
    told = host(tmp_path)
    services = HostServices(PluginMetrics(told.log, told.clock), NoAgents())
    return await Catalog.load(
        block(program, data), no_builtins, told, SERVER_RULES, external=External(services)
    )


@pytest.mark.asyncio
async def test_it_signs_logs_and_asks_its_host(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = await load(program, tmp_path)
    try:
        keys = Keys(catalog.one(PluginKind.KEY_MANAGER).plugin, "go")
        signer = await keys.generate("id", KeyType.EC_P256)
        signature = await signer.sign(bytes(32), SHA256)
        verify_digest(signer.public_key, bytes(32), signature, SHA256)
        assert [s.info.key_id for s in await keys.list()] == ["id"]
        with pytest.raises(PluginError, match=r"^keymanager\(go\): key \"x\" not found$"):
            await keys.get("x")
    finally:
        await catalog.close()
    printed = capsys.readouterr().out
    assert "level=warning msg=configured agent=NotFound" in printed
    assert 'text="a = 1\\n"' in printed
    assert 'msg="printed on stdout"' in printed
    assert "metric=a.b metric_type=counter" in printed


@pytest.mark.asyncio
async def test_its_panic_is_told_and_it_is_started_again(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = await load(program, tmp_path)
    try:
        keys = Keys(catalog.one(PluginKind.KEY_MANAGER).plugin, "go")
        signer = await keys.generate("panic", KeyType.EC_P256)
        with pytest.raises(PluginError, match="went away during the call: it ended") as caught:
            await signer.sign(bytes(32), SHA256)
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        (check,) = catalog.checks().values()
        while True:
            try:
                await check()
            except SpireHwError:
                await asyncio.sleep(0.05)
            else:
                break
        assert await keys.list() == []
    finally:
        await catalog.close()
    assert 'level=error msg="panic: as asked"' in capsys.readouterr().out


@pytest.mark.asyncio
async def test_a_configuration_it_does_not_accept(program: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keymanager\(go\): bad is bad"):
        await load(program, tmp_path, "bad = 1")
    # Its SDK knows no Validate: nobody is to blame for that.
    found = await check_plugins(
        block(program),
        no_builtins,
        host(tmp_path),
        SERVER_RULES,
        external=External(
            HostServices(PluginMetrics(log.get_logger("x"), SystemClock()), NoAgents())
        ),
    )
    assert found == []

"""External plugins that misbehave, and a look at what they leave behind."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from spire_hw.catalog import Catalog, External, check_plugins
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import parse
from spire_hw.errors import NotFoundError
from spire_hw.goplugin.launch import Limits
from spire_hw.log import get_logger
from spire_hw.plugin.hostservices import HostServices
from spire_hw.plugin.info import Builder, HostInfo, PluginKind, Side
from spire_hw.plugin.section import SERVER_RULES, PluginConfig
from spire_hw.spiffeid import TrustDomain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.clock import Clock
    from spire_hw.errors import ConfigFault

HERE = Path(__file__).parent
# Long enough for a guest to start on a busy machine.
PATIENT = Limits(start_s=60, init_s=20, configure_s=20, call_s=20, probe_s=10)


class Stage:
    """A host for one external KeyManager called `odd`."""

    def __init__(self, temp: Path) -> None:
        self.temp = temp
        self.limits = PATIENT
        self.services = HostServices()
        self.clock: Clock = SystemClock()
        self.environ: dict[str, str] = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}

    def program(self, script: str = "bad_guest.py") -> Path:
        """Return an executable made of one of the scripts here."""
        path = self.temp / script
        path.write_text(f"#!{sys.executable}\n{(HERE / script).read_text()}")
        path.chmod(0o755)
        return path

    def config(
        self, mode: str, *more: str, script: str = "bad_guest.py", **keys: Any
    ) -> PluginConfig:
        """Return the block of a guest in one of its modes."""
        program = self.program(script)
        made = PluginConfig(
            kind=PluginKind.KEY_MANAGER,
            name="odd",
            cmd=str(program),
            args=(mode, *more),
            checksum=hashlib.sha256(program.read_bytes()).hexdigest(),
            file="server.conf",
            line=7,
            data=parse(keys.pop("data", "")),
        )
        return replace(made, **keys)

    async def load(self, config: PluginConfig) -> Catalog:
        """Start a host with the plugin."""
        return await Catalog.load(
            [config], _no_builtins, self.host, SERVER_RULES, external=self._external
        )

    async def validate(self, config: PluginConfig) -> list[ConfigFault]:
        """Ask for the plugin's faults only."""
        return await check_plugins(
            [config], _no_builtins, self.host, SERVER_RULES, external=self._external
        )

    @property
    def host(self) -> HostInfo:
        return HostInfo(
            side=Side.SERVER,
            trust_domain=TrustDomain("example.org"),
            data_dir=self.temp,
            log=get_logger("catalog"),
            clock=self.clock,
        )

    @property
    def _external(self) -> External:
        return External(self.services, self.environ, self.limits)

    def processes(self) -> list[psutil.Process]:
        """Return what lives of our plugins and their children."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("TMPDIR", "").startswith(str(self.temp))
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def left_over(self) -> list[str]:
        """Return what should not be there any more."""
        left = [f"process {p.pid}" for p in self.processes()]
        left += [
            f"zombie {p.pid}"
            for p in psutil.Process().children()
            if p.status() == psutil.STATUS_ZOMBIE
        ]
        return left + [p.name for p in self.temp.iterdir() if p.name.startswith("spire-hw")]


def _no_builtins(kind: PluginKind, name: str) -> Builder:
    raise NotFoundError(f"no built-in {kind.value} {name}")


@pytest.fixture
def stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    assert tmp_path_factory.getbasetemp()  # pytest's own choice, before ours
    # Not below tmp_path: socket paths must stay short.
    temp = Path(tempfile.mkdtemp(prefix="shp-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    made = Stage(temp)
    yield made
    left = made.left_over()
    for process in made.processes():
        process.kill()
    shutil.rmtree(temp, ignore_errors=True)
    assert left == []

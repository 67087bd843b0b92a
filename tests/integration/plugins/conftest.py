"""Blocks of external plugins for the real server and agent, and what those plugins were told."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw_sim.workload import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent


class Outside:
    """External plugins that share a directory.

    Attributes:
        temp: the temporary directory, whose path is short.
    """

    def __init__(self, directory: Path, temp: Path) -> None:
        self.directory = directory
        self.temp = temp
        self.program = directory / "kinds"
        self.program.write_text(f"#!{sys.executable}\n{(HERE / 'kinds.py').read_text()}")
        self.program.chmod(0o755)

    def block(self, kind: str, name: str, data: str = "") -> str:
        """Return the block of one of the plugins in `kinds.py`."""
        checksum = hashlib.sha256(self.program.read_bytes()).hexdigest()
        return f"""{kind} "{name}" {{
            plugin_cmd = "{self.program}"
            plugin_args = ["{kind}", "{self.directory}"]
            plugin_checksum = "{checksum}"
            {data or "plugin_data {}"}
        }}
        """

    @staticmethod
    def builtin(kind: str, name: str, of: str, data: str) -> str:
        """Return the block of one of our built-ins as an external plugin."""
        command = Path(sys.executable).with_name("spire-hw-plugin")
        return f"""{kind} "{name}" {{
            plugin_cmd = "{command}"
            plugin_args = ["serve", "{kind}", "{of}"]
            plugin_data {{ {data} }}
        }}
        """

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Return what the plugins of a kind have noted so far."""
        file = self.directory / f"{kind}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    async def until(self, kind: str, holds: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Wait until what a plugin has noted is as wanted."""
        await until(lambda: holds(self.told(kind)))

    def set(self, name: str) -> None:
        """Switch something on in the plugins."""
        (self.directory / name).touch()

    def unset(self, name: str) -> None:
        """Switch it off."""
        (self.directory / name).unlink()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    with tempfile.TemporaryDirectory(prefix="shx-", dir="/tmp") as temp:
        monkeypatch.setattr(tempfile, "tempdir", temp)
        yield Outside(tmp_path, Path(temp))
        assert [p.name for p in Path(temp).iterdir() if p.name.startswith("spire-hw")] == []

"""A real server, and its commands run in this process against it."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spire_hw.cli.run import run
from spire_hw_server.cli.commands import root
from spire_hw_sim.programs import running
from spire_hw_sim.servers import server_config


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Cli = Callable[..., Answer]


@pytest.fixture(scope="module")
def port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture(scope="module")
def socket_path(port: int) -> Iterator[Path]:
    """A real server in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="hwcli") as folder:
        config = Path(folder) / "server.conf"
        text = server_config(Path(folder), key_manager="memory")
        config.write_text(text.replace("bind_port = 0", f"bind_port = {port}"))
        where = Path(folder) / "api.sock"
        flags = ["run", "-config", config, "-logLevel=info"]
        log = Path(folder) / "log"
        with running("spire-hw-server", flags, log, "-socketPath", where) as server:
            yield where
            assert server.stop() == 0, server.log_text()


@pytest.fixture
def cli(socket_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str, where: str = "", stdin: str = "") -> Answer:
        del stdin
        code = run(root, "spire-hw-server", [*words, "-socketPath", where or str(socket_path)])
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return call

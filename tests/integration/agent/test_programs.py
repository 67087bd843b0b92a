"""The agent's program as its operators meet it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw.cli.run import run
from spire_hw_agent.cli.commands import root as agent_root
from spire_hw_server.cli.commands import root as server_root
from spire_hw_sim.programs import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import click

_SERVER = """
server {{
  trust_domain = "prog.example"
  bind_address = "127.0.0.1"
  bind_port = {port}
  socket_path = "{d}/s.sock"
  data_dir = "{d}/server"
}}
plugins {{
  DataStore "sql" {{
    plugin_data {{ database_type = "sqlite3" connection_string = "{d}/server/db.sqlite3" }}
  }}
  KeyManager "disk" {{ plugin_data {{ keys_path = "{d}/server/keys.json" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
}}
"""
_AGENT = """
agent {{
  trust_domain = "prog.example"
  server_address = "127.0.0.1"
  server_port = {port}
  data_dir = "{d}/agent"
  socket_path = "{d}/a.sock"
  trust_bundle_path = "{d}/bundle.pem"
  log_file = "{d}/agent.out"
  experimental {{ sync_interval = "200ms" }}
}}
plugins {{
  KeyManager "disk" {{ plugin_data {{ directory = "{d}" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""


def wait(holds: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def command(root: click.Command, *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command in this process, which saves a second of imports each time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(root, "spire-hw", [str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


class Site:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: list[Program] = []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.conf = directory / "agent.conf"
        self.conf.write_text(_AGENT.format(d=directory, port=port))
        conf = directory / "server.conf"
        conf.write_text(_SERVER.format(d=directory, port=port))
        self.start("spire-hw-server", "run", "-config", conf)
        self.wait_until_healthy(server_root, "s.sock")
        (directory / "bundle.pem").write_text(self.server("bundle", "show"))

    def start(self, program: str, *arguments: str | Path, log: str = "") -> Program:
        made = Program(program, arguments, self.directory / (log or f"{program}.log"))
        self.running.append(made)
        return made

    def server(self, *arguments: str | Path) -> str:
        code, out, err = command(server_root, *arguments, "-socketPath", self.directory / "s.sock")
        assert code == 0, err
        return out

    def agent(self, *arguments: str | Path) -> tuple[int, str, str]:
        return command(agent_root, *arguments, "-socketPath", self.directory / "a.sock")

    def wait_until_healthy(self, root: click.Command, name: str) -> None:
        where = ("-socketPath", self.directory / name)
        wait(lambda: command(root, "healthcheck", *where)[0] == 0)

    def run_agent(self, *more: str, healthy: bool = True) -> Program:
        made = self.start("spire-hw-agent", "run", "-config", self.conf, *more)
        if healthy:
            self.wait_until_healthy(agent_root, "a.sock")
        return made

    def token(self) -> str:
        out = self.server("token", "generate", "-output", "json")
        value: str = json.loads(out)["value"]
        return value

    def agent_id(self) -> str:
        listed = json.loads(self.server("agent", "list", "-output", "json"))["agents"]
        return f"spiffe://prog.example{listed[0]['id']['path']}"


@pytest.fixture
def site() -> Iterator[Site]:
    directory = Path(tempfile.mkdtemp(prefix="prog"))
    made = None
    try:
        made = Site(directory)
        yield made
    finally:
        for program in reversed(made.running if made is not None else []):
            program.kill()
        shutil.rmtree(directory)


@pytest.mark.slow
def test_a_day_of_an_agent(site: Site) -> None:
    # Not running: which status, and what to do.
    code, _, err = site.agent("healthcheck")
    assert code == 3
    assert "Start it with `spire-hw-agent run`" in err
    # No token: wrong usage, with the remedy.
    lost = site.run_agent(healthy=False)
    assert lost.wait_for_exit() == 2
    assert "token generate" in lost.log_text()

    token_file = site.directory / "token"
    token_file.write_text(site.token() + "\n")
    agent = site.run_agent("-joinTokenFile", str(token_file))
    assert site.agent("healthcheck", "-verbose")[:2] == (
        0,
        "Checking agent health...\nAgent is healthy.\n",
    )
    # Keys of workloads are in its memory: no core file may ever hold it.
    assert resource.prlimit(agent.pid, resource.RLIMIT_CORE) == (0, 0)
    code, _, err = site.agent("api", "fetch")
    assert code == 4
    assert "no identity issued" in err

    site.server(
        *("entry", "create", "-parentID", site.agent_id()),
        *("-spiffeID", "spiffe://prog.example/web", "-selector", f"unix:uid:{os.getuid()}"),
    )
    wait(lambda: site.agent("api", "fetch", "x509")[0] == 0)
    fetch_and_validate(site)

    # A second one may not share its state.
    second = site.start(
        "spire-hw-agent", "run", "-config", site.conf, "-logFile", "", log="second.log"
    )
    assert second.wait_for_exit() == 1
    assert "in use by another agent" in second.log_text()

    # SIGUSR2 makes it go on in a new file, for logrotate.
    out = site.directory / "agent.out"
    out.rename(site.directory / "agent.out.1")
    os.kill(agent.pid, signal.SIGUSR2)
    wait(out.exists)

    # A power cut, in the middle of a watch: both go on afterwards, without a token.
    watch = site.start(
        *("spire-hw-agent", "api", "watch", "-socketPath", site.directory / "a.sock"),
        log="watch.log",
    )
    wait(lambda: watch.log_text().count("Received 1 svid") == 1)
    agent.kill()
    wait(lambda: "trying again in" in watch.log_text())
    agent = site.run_agent()
    wait(lambda: watch.log_text().count("Received 1 svid") == 2)

    # Banned: nothing is left, and the status says why.
    site.server("agent", "ban", "-spiffeID", site.agent_id())
    assert agent.wait_for_exit() == 4
    assert "the server banned spiffe://prog.example/spire/agent/join_token/" in out.read_text()
    assert json.loads((site.directory / "agent" / "agent-data.json").read_text())["svid"] == []


def fetch_and_validate(site: Site) -> None:
    code, out, _ = site.agent("api", "fetch", "-write", site.directory)
    assert code == 0
    assert "Received 1 svid after" in out
    assert "SPIFFE ID:\t\tspiffe://prog.example/web" in out
    assert f"Writing SVID #0 to file {site.directory}/svid.0.pem." in out
    assert (site.directory / "svid.0.key").stat().st_mode & 0o777 == 0o600
    code, out, _ = site.agent("api", "fetch", "x509", "-output", "json")
    assert json.loads(out)["svids"][0]["spiffe_id"] == "spiffe://prog.example/web"

    code, out, _ = site.agent("api", "fetch", "jwt", "-audience", "db")
    assert code == 0
    token = out.split("\t")[1].split()[0]
    code, out, _ = site.agent("api", "validate", "jwt", "-audience", "db", "-svid", token)
    assert out.startswith("SVID is valid.\nSPIFFE ID : spiffe://prog.example/web\n")
    code, _, err = site.agent("api", "validate", "jwt", "-audience", "web", "-svid", token)
    assert (code, token in err) == (2, False)
    assert site.agent("api", "fetch", "jwt")[0] == 2


def test_validate_tells_all_faults_and_reads_flags(tmp_path: Path) -> None:
    conf = tmp_path / "agent.conf"
    conf.write_text(_AGENT.format(d=tmp_path, port=8081))
    good = command(agent_root, "validate", "-config", conf)
    assert good[:2] == (0, "SPIRE agent configuration file is valid.\n")
    conf.write_text(conf.read_text().replace("server_port", "sever_port"))
    code, out, _ = command(
        agent_root,
        *("validate", "-config", conf, "-rebootstrapMode", "sometimes", "-output", "json"),
    )
    assert code == 1
    messages = [f["message"] for f in json.loads(out)["faults"]]
    assert any('"server_port"' in m for m in messages)
    assert any("rebootstrap_mode" in m for m in messages)

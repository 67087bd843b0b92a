"""The real programs with external plugins: validate, signals, a host that is killed."""

from __future__ import annotations

import os
import select
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import pytest

from spire_hw_sim.programs import Program, try_run
from spire_hw_sim.site import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.plugins.conftest import Outside

SERVER, AGENT = "spire-hw-server", "spire-hw-agent"


def server_conf(directory: Path, plugins: str) -> Path:
    path = directory / "server.conf"
    path.write_text(
        f"""server {{
          trust_domain = "example.org" bind_address = "127.0.0.1" bind_port = 0
          data_dir = "{directory}/d" socket_path = "{directory}/s.sock"
        }}
        plugins {{
          DataStore "sql" {{ plugin_data {{
            database_type = "sqlite3" connection_string = "{directory}/d/db.sqlite3"
          }} }}
          KeyManager "disk" {{ plugin_data {{ keys_path = "{directory}/keys.json" }} }}
          {plugins}
        }}"""
    )
    return path


def agent_conf(directory: Path, plugins: str) -> Path:
    path = directory / "agent.conf"
    path.write_text(
        f"""agent {{
          trust_domain = "example.org" server_address = "127.0.0.1" server_port = 1
          data_dir = "{directory}/d" insecure_bootstrap = true
        }}
        plugins {{
          KeyManager "memory" {{ plugin_data {{}} }}
          NodeAttestor "join_token" {{ plugin_data {{}} }}
          {plugins}
        }}"""
    )
    return path


@pytest.fixture
def home(outside: Outside) -> Path:
    """A directory whose path is short: sockets go into it."""
    directory = outside.temp / "home"
    directory.mkdir()
    return directory


@contextmanager
def running(conf: Path, home: Path, env: dict[str, str]) -> Iterator[Program]:
    program = Program(SERVER, ["run", "-config", conf], home / "log", env=env)
    try:
        program.wait_until_healthy("-socketPath", home / "s.sock")
        yield program
    finally:
        program.stop()


def plugins_of(program: Program) -> list[psutil.Process]:
    return [p for p in psutil.Process(program.pid).children() if "NodeAttestor" in p.cmdline()]


def wait_for_end(process: psutil.Process) -> None:
    try:
        held = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([held], [], [], 30)[0], f"{process.pid} still runs"
    finally:
        os.close(held)


def test_validate_asks_external_plugins(outside: Outside, home: Path) -> None:
    good = outside.block("NodeAttestor", "hello")
    done = try_run(SERVER, "validate", "-config", server_conf(home, good))
    assert (done.returncode, done.stdout) == (
        0,
        "SPIRE server configuration file is valid.\n",
    ), done.stderr
    assert not (home / "d").exists()
    wrong = good.replace('plugin_checksum = "', f'plugin_checksum = "{"ab" * 32}" # ')
    done = try_run(SERVER, "validate", "-config", server_conf(home, wrong))
    assert done.returncode == 1
    assert "server.conf:10: nodeattestor(hello): plugin_cmd" in done.stderr
    assert "has checksum" in done.stderr
    good = outside.block("WorkloadAttestor", "mine")
    done = try_run(AGENT, "validate", "-config", agent_conf(home, good))
    assert done.returncode == 0, done.stderr
    other = good.replace('["WorkloadAttestor"', '["NodeAttestor"')
    done = try_run(AGENT, "validate", "-config", agent_conf(home, other))
    assert done.returncode == 1
    assert "workloadattestor(mine): the program ended (exit status 1)" in done.stderr
    assert "this program is a plugin" in done.stderr


def test_a_signal_has_data_files_read_again(outside: Outside, home: Path) -> None:
    data = home / "data.hcl"
    data.write_text("a = 1")
    block = outside.block("NodeAttestor", "hello", f'plugin_data_file = "{data}"')
    temp = {"TMPDIR": str(home)}
    with running(server_conf(home, block), home, temp) as program:
        data.write_text("a = 2")
        os.kill(program.pid, signal.SIGUSR1)
        wait_until(
            "the plugin was told", lambda: outside.told("NodeAttestor")[-1]["config"] == "a = 2\n"
        )
        (plugin,) = plugins_of(program)
    wait_for_end(plugin)
    assert list(home.glob("spire-hw-plugins-*")) == []


def test_no_plugin_survives_a_host_that_is_killed(outside: Outside, home: Path) -> None:
    conf = server_conf(home, outside.block("NodeAttestor", "hello"))
    temp = {"TMPDIR": str(home)}
    with running(conf, home, temp) as program:
        (plugin,) = plugins_of(program)
        program.kill()
        wait_for_end(plugin)
    assert len(list(home.glob("spire-hw-plugins-*"))) == 1
    with running(conf, home, temp):
        # What the killed one left is cleared away by the next.
        assert len(list(home.glob("spire-hw-plugins-*"))) == 1
    assert list(home.glob("spire-hw-plugins-*")) == []

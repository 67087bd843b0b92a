"""Servers and agents of two makes, ours and upstream's, that can be put together in any way.

Both makes read the same configuration file: that is part of what is shown. Upstream's programs are
looked for on PATH and through environment variables; nothing here fetches or builds them.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

from spire_hw_sim.nodepki import PEM, Holder, make_root
from spire_hw_sim.programs import ProgramError, command_line
from spire_hw_sim.site import Run, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

TRUST_DOMAIN: Final = "interop.example"
WORKLOAD: Final = f"spiffe://{TRUST_DOMAIN}/web"
_COMMAND_S: Final = 30


class Make(enum.Enum):
    """Whose program it is."""

    OURS = "ours"
    UPSTREAM = "upstream"

    @override
    def __str__(self) -> str:
        """Return the word used in test names."""
        return self.value


class Role(enum.Enum):
    """Which program; the value is upstream's name of it."""

    SERVER = "spire-server"
    AGENT = "spire-agent"

    @property
    def variable(self) -> str:
        """Return the environment variable that names upstream's binary."""
        return self.value.upper().replace("-", "_") + "_BIN"


def find_program(variable: str, name: str) -> Path | None:
    """Return a program named by an environment variable or found on PATH, None when it is absent.

    Raises:
        ProgramError: the variable names something that is no program.
    """
    named = os.environ.get(variable)
    if named:
        if not os.access(named, os.X_OK):
            raise ProgramError(f"{variable}={named} is not a program")
        return Path(named)
    found = shutil.which(name)
    return Path(found) if found else None


def program_of(make: Make, role: Role) -> str:
    """Return what `spire_hw_sim.programs` takes to run a program of a make.

    Raises:
        ProgramError: upstream's is not at hand; the message says how to name it.
    """
    if make is Make.OURS:
        return role.value.replace("spire-", "spire-hw-")
    found = find_program(role.variable, role.value)
    if found is None:
        raise ProgramError(f"{role.value} is not on PATH and {role.variable} is not set")
    return str(found)


def missing(*roles: Role) -> str:
    """Return why upstream's programs for some roles cannot be run, "" when they can."""
    for role in roles:
        try:
            program_of(Make.UPSTREAM, role)
        except ProgramError as e:
            return str(e)
    return ""


def call(
    make: Make, role: Role, *arguments: str | Path, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of one make's program to its end, whatever its exit status."""
    return subprocess.run(
        command_line(program_of(make, role), *arguments),
        capture_output=True,
        text=True,
        timeout=_COMMAND_S,
        check=False,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
    )


def checked(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command printed.

    Raises:
        ProgramError: it failed.
    """
    if done.returncode:
        raise ProgramError(f"{done.args}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def install_plugins(directory: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Write launchers of our plugins; return path and checksum of each by kind and name."""
    start = "from spire_hw_plugins.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", start, "install", "-output", "json", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    rows: list[dict[str, str]] = json.loads(checked(done))["plugins"]
    return {(row["kind"], row["name"]): row for row in rows}


class Server:
    """A server of either make.

    Attributes:
        socket: its admin socket.
        run: its last run.
    """

    run: Run

    def __init__(self, party: Party, make: Make, *, keys: str = "", plugins: str = "") -> None:
        self.make = make
        self._party = party
        self.home = party.directory / "server"
        self.home.mkdir(mode=0o700)
        self.socket = self.home / "api.sock"
        self.port = free_port()
        self.conf = self.home / "server.conf"
        (self.home / "data").mkdir(mode=0o700)
        self.conf.write_text(
            _SERVER_CONF.format(
                td=TRUST_DOMAIN,
                port=self.port,
                home=self.home,
                root=party.root_path,
                keys=keys,
                plugins=plugins or _SERVER_KEYS.format(home=self.home),
            )
        )

    def start(self) -> None:
        """Start it and wait until it is healthy."""
        name = program_of(self.make, Role.SERVER)
        self.run = self._party.watch(Run(name, self.conf, self.home / "log", env={}))
        arguments = ("healthcheck", "-socketPath", self.socket)
        _wait_healthy(self.run, lambda: call(self.make, Role.SERVER, *arguments))

    def command(self, *arguments: str | Path, make: Make | None = None) -> str:
        """Run a command against the admin socket; by its own make's program unless told."""
        return checked(self.try_command(*arguments, make=make))

    def try_command(
        self, *arguments: str | Path, make: Make | None = None, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that may fail."""
        where = ("-socketPath", self.socket)
        return call(make or self.make, Role.SERVER, *arguments, *where, text=text)

    def ask(self, *arguments: str | Path, make: Make | None = None) -> Any:
        """Return what a command answers in JSON."""
        return json.loads(self.command(*arguments, "-output", "json", make=make))

    def agents(self) -> list[dict[str, Any]]:
        """Return the attested agents."""
        found: list[dict[str, Any]] = self.ask("agent", "list")["agents"]
        return found

    def create_entry(self, parent: str, spiffe_id: str = WORKLOAD, *more: str) -> str:
        """Give processes of this user an identity; return the entry's id."""
        made = self.ask(
            *("entry", "create", "-parentID", parent, "-spiffeID", spiffe_id),
            *("-selector", f"unix:uid:{os.getuid()}", *more),
        )
        return str(made["results"][0]["entry"]["id"])


class Agent:
    """An agent of either make.

    Attributes:
        socket: its Workload API.
        run: its last run.
    """

    run: Run

    def __init__(
        self,
        party: Party,
        make: Make,
        attestor: str,
        *,
        name: str = "agent",
        plugins: str = "",
        keys: str = "",
        certificate: Holder | None = None,
    ) -> None:
        """Set it up.

        Args:
            party: has a server already.
            make: whose agent.
            attestor: `join_token`, `x509pop`, or the name of one that is in `plugins`.
            name: of its directory.
            plugins: blocks beside attestor and `unix`; a KeyManager on disk when empty.
            keys: more keys of `agent { }`.
            certificate: the node's, for x509pop; a new one of the party's PKI when None.
        """
        self.make = make
        self.attestor = attestor
        self._party = party
        self.home = party.directory / name
        self.home.mkdir(mode=0o700)
        self.socket = self.home / "p" / "api.sock"
        self.conf = self.home / "agent.conf"
        (self.home / "data").mkdir(mode=0o700)
        self._bundle = self.home / "bootstrap.pem"
        self._bundle.write_text(party.server.command("bundle", "show"))
        self.certificate = certificate or party.root.issue(common_name=name)
        self.certificate.write(self.home, "node")
        self.conf.write_text(
            _AGENT_CONF.format(
                td=TRUST_DOMAIN,
                port=party.server.port,
                home=self.home,
                attestor=_ATTESTORS.get(attestor, "").format(home=self.home),
                plugins=plugins or _AGENT_KEYS.format(home=self.home),
                keys=keys,
            )
        )

    def start(self, *, wait: bool = True) -> None:
        """Start it, with a join token when it needs one, and wait until it has attested."""
        flags: list[str] = []
        known = {agent["id"]["path"] for agent in self._party.server.agents()}
        is_new = not (self.home / "log").exists()
        if self.attestor == "join_token" and is_new:
            made = self._party.server.ask("token", "generate", "-ttl", "600")
            flags = ["-joinToken", made["value"]]
        name = program_of(self.make, Role.AGENT)
        self.run = self._party.watch(Run(name, self.conf, self.home / "log", env={}, flags=flags))
        if not wait:
            return

        def attested() -> bool:
            if not self.run.is_running:
                raise ProgramError(f"the agent ended:\n{self.run.log()[-4000:]}")
            now = {agent["id"]["path"] for agent in self._party.server.agents()}
            return bool(now - known) or not is_new

        wait_until("the agent has attested", attested)
        _wait_healthy(self.run, lambda: self.command("healthcheck"))

    def record(self) -> dict[str, Any] | None:
        """Return what the server knows of this agent, None when it knows nothing."""
        for agent in self._party.server.agents():
            if agent["attestation_type"] == self.attestor:
                return agent
        return None

    @property
    def id(self) -> str:
        """Return its SPIFFE ID.

        Raises:
            ProgramError: the server does not know it.
        """
        found = self.record()
        if found is None:
            raise ProgramError("the server does not know this agent")
        return f"spiffe://{found['id']['trust_domain']}{found['id']['path']}"

    def command(
        self, *arguments: str | Path, make: Make | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against the Workload API; by its own make's program unless told."""
        return call(make or self.make, Role.AGENT, *arguments, "-socketPath", self.socket)

    def fetch(self, make: Make | None = None) -> list[dict[str, Any]]:
        """Return the X509-SVIDs this process gets, an empty list when it gets none."""
        done = self.command("api", "fetch", "x509", "-output", "json", make=make)
        if done.returncode:
            return []
        found: list[dict[str, Any]] = json.loads(done.stdout)["svids"]
        return found


class Party:
    """A trust domain in a directory: one server, agents, and a PKI that certifies nodes.

    Attributes:
        directory: short, removed at the end.
        root: certifies nodes for x509pop.
    """

    server: Server

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="shw"))
        self.root: Holder = make_root("Interop Node CA")
        self.root_path = self.directory / "node-ca.pem"
        self.root_path.write_bytes(self.root.certificate.public_bytes(PEM))
        self._runs: list[Run] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for run in reversed(self._runs):
            with contextlib.suppress(ProcessLookupError):
                run.program.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def watch(self, run: Run) -> Run:
        """See to it that a run ends with the party."""
        self._runs.append(run)
        return run

    def open_server(self, make: Make, *, keys: str = "", plugins: str = "") -> Server:
        """Set up the server and start it."""
        self.server = Server(self, make, keys=keys, plugins=plugins)
        self.server.start()
        return self.server

    def logs(self, lines: int = 40) -> str:
        """Return the end of every log, for the message of a test that failed."""
        return "\n".join(
            f"--- {log.parent.name}\n"
            + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
            for log in sorted(self.directory.glob("*/log"))
        )


def _wait_healthy(run: Run, ask: Callable[[], subprocess.CompletedProcess[str]]) -> None:
    def healthy() -> bool:
        if not run.is_running:
            raise ProgramError(f"{run.program.name} ended:\n{run.log()[-4000:]}")
        return ask().returncode == 0

    try:
        wait_until(f"{run.program.name} is healthy", healthy, 60)
    except ProgramError as e:
        raise ProgramError(f"{e}\n{run.log()[-4000:]}") from e


_SERVER_CONF: Final = """\
server {{
  trust_domain          = "{td}"
  bind_address          = "127.0.0.1"
  bind_port             = {port}
  socket_path           = "{home}/api.sock"
  data_dir              = "{home}/data"
  ca_ttl                = "24h"
  log_level             = "DEBUG"
  ratelimit {{ attestation = false signing = false }}
  {keys}
}}

plugins {{
  DataStore "sql" {{
    plugin_data {{
      database_type     = "sqlite3"
      connection_string = "{home}/data/db.sqlite3"
    }}
  }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  NodeAttestor "x509pop" {{
    plugin_data {{ ca_bundle_path = "{root}" }}
  }}
  {plugins}
}}
"""

_SERVER_KEYS: Final = """\
KeyManager "disk" {{
    plugin_data {{ keys_path = "{home}/data/keys.json" }}
  }}"""

_AGENT_CONF: Final = """\
agent {{
  trust_domain      = "{td}"
  server_address    = "127.0.0.1"
  server_port       = {port}
  data_dir          = "{home}/data"
  socket_path       = "{home}/p/api.sock"
  trust_bundle_path = "{home}/bootstrap.pem"
  log_level         = "DEBUG"
  {keys}
  experimental {{ sync_interval = "1s" }}
}}

plugins {{
  {attestor}
  {plugins}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""

_AGENT_KEYS: Final = """\
KeyManager "disk" {{
    plugin_data {{ directory = "{home}/data" }}
  }}"""

_ATTESTORS: Final = {
    "join_token": 'NodeAttestor "join_token" {{ plugin_data {{}} }}',
    "x509pop": """\
NodeAttestor "x509pop" {{
    plugin_data {{
      private_key_path = "{home}/node.key"
      certificate_path = "{home}/node.crt"
    }}
  }}""",
}

"""A trust domain of real programs on real devices (SoftHSM, swtpm), and the means to ill-treat it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import psutil

from spire_hw._pb import workload_pb2
from spire_hw.errors import SpireHwError
from spire_hw.rpc.client import connect_unix
from spire_hw.svid.x509svid import parse_x509_svid
from spire_hw.x509.certificate import load_chain
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.programs import Program, ProgramError, run, try_run
from spire_hw_sim.servers import Operator
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import Swtpm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from spire_hw.svid.x509svid import X509Svid

TRUST_DOMAIN: Final = "site.example"
TOKEN: Final = "spire-ca"  # noqa: S105 - a label
WORKLOAD: Final = f"spiffe://{TRUST_DOMAIN}/web"
_HEADER: Final = (("workload.spiffe.io", "true"),)
_FAKETIME: Final = ("/usr/lib", "/usr/lib64", "/usr/local/lib")
_TICK_S: Final = 0.02


def find_faketime() -> Path | None:
    """Return the library that shifts a program's clock, None when it is not installed."""
    for folder in _FAKETIME:
        for found in Path(folder).glob("**/faketime/libfaketime.so.1"):
            return found
    return None


def free_port() -> int:
    """Return a TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def wait_until(what: str, holds: Callable[[], object], timeout_s: float = 30) -> None:
    """Wait until something holds.

    Raises:
        ProgramError: it does not.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise ProgramError(f"not so after {timeout_s:g} s: {what}")
        time.sleep(_TICK_S)


class Run:
    """One run of a program, with the part of its log that is this run's."""

    def __init__(
        self,
        program: str,
        conf: Path,
        log: Path,
        *,
        env: Mapping[str, str],
        prefix: Sequence[str] = (),
        flags: Sequence[str] = (),
    ) -> None:
        self._start = log.stat().st_size if log.exists() else 0
        arguments: list[str | Path] = ["run", "-config", conf, *flags]
        self.program = Program(program, arguments, log, env=env, prefix=prefix)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self.program.pid

    @property
    def is_running(self) -> bool:
        """Tell whether the process is alive."""
        return self.program.exit_status is None

    def log(self) -> str:
        """Return what this run wrote to its output."""
        with self.program.log.open("rb") as f:
            f.seek(self._start)
            return f.read().decode(errors="replace")

    def wait_for(self, pattern: str, timeout_s: float = 30, *, after: int = 0) -> str:
        """Wait for a line that matches and return it.

        Args:
            pattern: regular expression, searched in the output.
            timeout_s: how long.
            after: how many characters of the output to pass over.

        Raises:
            ProgramError: the program ended, or no such line came.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ended = not self.is_running
            found = re.search(f".*(?:{pattern}).*", self.log()[after:])
            if found is not None:
                return found[0]
            if ended or time.monotonic() > deadline:
                how = f"ended with {self.program.exit_status}" if ended else "goes on"
                name = self.program.name
                raise ProgramError(f"{name} {how} without {pattern!r}:\n{self.log()[-4000:]}")
            time.sleep(_TICK_S)

    def children(self) -> list[psutil.Process]:
        """Return its child processes, all generations."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> list[psutil.Process]:
        """End it as a power cut would; return what were its children."""
        children = self.children()
        self.program.kill()
        return children

    def stop(self, timeout_s: float = 10) -> int:
        """Ask it to stop and return its exit status.

        Raises:
            ProgramError: it goes on; it is killed then.
        """
        if self.is_running:
            self.send(signal.SIGTERM)
        try:
            return self.program.wait_for_exit(timeout_s)
        finally:
            self.program.kill()


class Node:
    """A machine with a TPM and an agent.

    Attributes:
        home: holds data directory, configuration and log.
        tpm: its TPM; may be exchanged.
        agent: the agent's last run.
    """

    agent: Run

    def __init__(self, site: Site, name: str, tpm: Swtpm) -> None:
        self.site = site
        self.name = name
        self.tpm = tpm
        self.home = site.directory / name
        self.home.mkdir(mode=0o700)
        self.conf = self.home / "agent.conf"
        self.data = self.home / "data"
        self.log = self.home / "log"
        self.socket = self.home / "p" / "api.sock"
        self.bundle = self.home / "bootstrap.pem"

    def start(
        self,
        *,
        keys: str = "",
        change: Callable[[str], str] = str,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        flags: Sequence[str] = (),
    ) -> Run:
        """Start the agent; `wait_in_use` waits until it has its SVID.

        Args:
            keys: more keys of `agent { }`.
            change: last word on the text of the configuration.
            env: more of the environment.
            prefix: a command that runs the program, such as `prlimit`.
            flags: of the command line.
        """
        text = _AGENT_CONF.format(
            td=TRUST_DOMAIN,
            port=self.site.port,
            data=self.data,
            socket=self.socket,
            bundle=self.bundle,
            tcti=self.tpm.tcti,
            keys=keys,
        )
        self.conf.write_text(change(text))
        self.agent = Run(
            "spire-hw-agent",
            self.conf,
            self.log,
            env={**self.site.clock_env, **(env or {})},
            prefix=prefix,
            flags=flags,
        )
        self.site.runs.append(self.agent)
        return self.agent

    def wait_in_use(self, timeout_s: float = 30, *, after: int = 0) -> str:
        """Wait until the agent uses an SVID and return the line that says so."""
        return self.agent.wait_for("Agent SVID in use", timeout_s, after=after)

    @property
    def id(self) -> str:
        """Return the agent's SPIFFE ID."""
        found = re.findall(r"spiffe://\S+/spire/agent/tpm/[0-9a-f]+", self.log.read_text())
        return str(found[-1])

    def key_files(self) -> dict[str, bytes]:
        """Return the wrapped keys."""
        return {p.name: p.read_bytes() for p in sorted((self.data / "keys-tpm").glob("*.tpmkey"))}

    async def fetch(self, timeout_s: float = 5) -> list[X509Svid]:
        """Return the SVIDs this process is given, in one try.

        Raises:
            SpireHwError: what the agent answered.
        """
        request, answer = workload_pb2.X509SVIDRequest(), workload_pb2.X509SVIDResponse
        async with connect_unix(self.socket) as channel:
            stream = channel.server_stream(
                "/SpiffeWorkloadAPI/FetchX509SVID",
                request,
                answer,
                timeout_s=timeout_s,
                metadata=_HEADER,
            )
            async for message in stream:
                return [parse_x509_svid(load_chain(svid.x509_svid)) for svid in message.svids]
        return []

    async def fetch_soon(self, timeout_s: float = 30, *, at_least: int = 1) -> list[X509Svid]:
        """Return the SVIDs this process is given, as soon as there are enough.

        Raises:
            ProgramError: there were none in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                found = await self.fetch()
                if len(found) >= at_least:
                    return found
                why = f"{len(found)} SVIDs"
            except SpireHwError as e:
                why = e.message
            if time.monotonic() > deadline:
                raise ProgramError(f"no SVID after {timeout_s:g} s: {why}\n{self.agent.log()}")
            await asyncio.sleep(_TICK_S)


class Site:
    """A directory with a token, a maker of TPMs, a server and nodes.

    Attributes:
        directory: short, removed at the end.
        hsm: the token's store.
        server: the server's last run.
        clock_env: environment that puts programs under `shift_clock`.
        runs: every run there was.
    """

    server: Run

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="shw"))
        self.port = free_port()
        self.hsm = SoftHsm(self.directory / "hsm")
        self.pin = "".join(secrets.choice("0123456789") for _ in range(8))
        self.hsm.init_token(TOKEN, self.pin)
        self.pin_file = self.directory / "pin"
        self.write_pin(self.pin)
        self.maker = Manufacturer("Site TPM Works")
        self.roots = self.maker.write_roots(self.directory / "makers.pem")
        self.conf = self.directory / "server.conf"
        self.data = self.directory / "d"
        self.log = self.directory / "server.log"
        self.socket = self.directory / "s" / "api.sock"
        self.runs: list[Run] = []
        self.clock_env: dict[str, str] = {}
        self._clock = self.directory / "clock"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything and remove the directory."""
        for one in self.runs:
            with contextlib.suppress(ProcessLookupError):
                one.send(signal.SIGCONT)
            one.program.kill()
        self._stack.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- clock ---------------------------------------------------------------------

    def use_shifted_clock(self, library: Path) -> None:
        """Have programs started from now on live by `shift_clock`."""
        self.clock_env = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        self.shift_clock(0)

    def shift_clock(self, seconds: float) -> None:
        """Put everybody's clock ahead of, or behind, the real one."""
        new = self._clock.with_suffix(".new")
        new.write_text(f"{seconds:+g}s\n")
        new.replace(self._clock)

    # -- token ---------------------------------------------------------------------

    def write_pin(self, pin: str, mode: int = 0o600) -> None:
        """Put a PIN into the PIN file, as an editor would."""
        new = self.pin_file.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(pin + "\n")
        new.chmod(mode)
        new.replace(self.pin_file)

    def private_keys(self) -> list[str]:
        """Return labels of the private keys in the token, as another program sees them."""
        done = subprocess.run(
            [
                *("pkcs11-tool", "--module", self.hsm.module, "--token-label", TOKEN),
                *("--login", "--pin", "env:SITE_PIN", "--list-objects", "--type", "privkey"),
            ],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **self.hsm.environment, "SITE_PIN": self.pin},
        )
        return sorted(re.findall(r"label:\s+(\S+)", done.stdout))

    # -- server --------------------------------------------------------------------

    def start_server(
        self,
        *,
        keys: str = "",
        change: Callable[[str], str] = str,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        flags: Sequence[str] = (),
    ) -> Run:
        """Start the server; parameters as in `Node.start`, `keys` are those of `server { }`."""
        text = self._server_conf(port=self.port, socket=self.socket, data=self.data, keys=keys)
        self.conf.write_text(change(text))
        self.server = Run(
            "spire-hw-server",
            self.conf,
            self.log,
            env={**self.hsm.environment, **self.clock_env, **(env or {})},
            prefix=prefix,
            flags=flags,
        )
        self.runs.append(self.server)
        return self.server

    def spare_server(self, name: str, change: Callable[[str], str] = str, **named: Any) -> Run:
        """Start another server beside the first, with data directory, port and log of its own.

        Args:
            name: of its directory.
            change: last word on the text of the configuration.
            named: `env`, `prefix`, `flags` of `start_server`.
        """
        home = self.directory / name
        home.mkdir(mode=0o700, exist_ok=True)
        text = self._server_conf(port=free_port(), socket=home / "s.sock", data=home / "d")
        conf = home / "server.conf"
        conf.write_text(change(text))
        environment = {**self.hsm.environment, **self.clock_env, **named.pop("env", {})}
        made = Run("spire-hw-server", conf, home / "log", env=environment, **named)
        self.runs.append(made)
        return made

    def _server_conf(self, *, port: int, socket: Path, data: Path, keys: str = "") -> str:
        return _SERVER_CONF.format(
            td=TRUST_DOMAIN,
            port=port,
            socket=socket,
            data=data,
            module=self.hsm.module,
            token=TOKEN,
            pin_file=self.pin_file,
            roots=self.roots,
            keys=keys,
        )

    def wait_ready(self, timeout_s: float = 30) -> None:
        """Wait until the server serves."""
        self.server.wait_for("server is ready", timeout_s)

    def command(self, *arguments: str | Path) -> str:
        """Run a server command against the admin socket."""
        return run("spire-hw-server", *arguments, "-socketPath", self.socket)

    def try_command(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a server command that may fail."""
        return try_run("spire-hw-server", *arguments, "-socketPath", self.socket)

    async def authorities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return ids of the X.509 and of the JWT authorities the server publishes."""
        operator = Operator(self.socket)
        try:
            bundle = await operator.bundle()
        finally:
            await operator.close()
        return (
            tuple(sorted(r.authority_id for r in bundle.x509_authorities)),
            tuple(sorted(a.kid for a in bundle.jwt_authorities)),
        )

    # -- nodes ---------------------------------------------------------------------

    def power_on(self, name: str, *, like: Swtpm | None = None) -> Swtpm:
        """Start a TPM that its maker certified; a copy of another one's state if given."""
        tpm = Swtpm(self.directory / f"tpm-{name}", persistent_ek=False, clone_of=like)
        tpm.start()
        self._stack.callback(tpm.stop)
        if like is None:
            self.maker.equip(tpm, (EkKind.ECC_P256,))
        self.boot(tpm)
        return tpm

    def boot(self, tpm: Swtpm) -> None:
        """Measure what firmware would, after a power-on or reset."""
        for pcr in range(8):
            tpm.extend_pcr(pcr, b"boot")

    def enrol(self, tpm: Swtpm, comment: str = "rack 1") -> str:
        """Put a TPM on the server's list; return its hash."""
        ek_hash = run("spire-hw-agent", "tpm", "ek-hash", "-tcti", tpm.tcti).split()[0]
        self.command("tpm", "allow", ek_hash, "-comment", comment)
        return ek_hash

    def node(self, name: str, *, tpm: Swtpm | None = None) -> Node:
        """Set up a node, enrolled, whose agent was not started yet."""
        node = Node(self, name, tpm or self.power_on(name))
        node.bundle.write_text(self.command("bundle", "show"))
        self.enrol(node.tpm)
        return node

    def register(self, node: Node) -> None:
        """Make this process a workload of a node."""
        self.command(
            *("entry", "create", "-parentID", node.id, "-spiffeID", WORKLOAD),
            *("-selector", f"unix:uid:{os.getuid()}"),
        )

    @contextlib.contextmanager
    def small_disk(self, path: Path, size: str) -> Iterator[Path]:
        """Put a small file system in the place of a directory; needs root."""
        path.mkdir(exist_ok=True)
        options = f"size={size},mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
        try:
            yield path
        finally:
            subprocess.run(["umount", "-l", path], check=True)

    def remount(self, path: Path, how: str) -> None:
        """Make what `small_disk` gave read-only (`ro`) or writable (`rw`)."""
        subprocess.run(["mount", "-o", f"remount,{how}", path], check=True)


_SERVER_CONF: Final = """\
server {{
  trust_domain = "{td}"
  bind_address = "127.0.0.1"
  bind_port    = {port}
  socket_path  = "{socket}"
  data_dir     = "{data}"
  ca_ttl       = "24h"
  ratelimit {{ attestation = false signing = false }}
  {keys}
}}

plugins {{
  DataStore "sql" {{
    plugin_data {{ database_type = "sqlite3" connection_string = "{data}/db.sqlite3" }}
  }}
  KeyManager "pkcs11" {{
    plugin_data {{
      module_path          = "{module}"
      token_label          = "{token}"
      pin_file             = "{pin_file}"
      key_identifier_value = "site"
      start_timeout        = "2s"
      sign_timeout         = "2s"
    }}
  }}
  NodeAttestor "tpm" {{
    plugin_data {{ ek_policy = "ca_and_hash" endorsement_ca_path = "{roots}" }}
  }}
}}
"""

_AGENT_CONF: Final = """\
agent {{
  trust_domain      = "{td}"
  server_address    = "127.0.0.1"
  server_port       = {port}
  data_dir          = "{data}"
  socket_path       = "{socket}"
  trust_bundle_path = "{bundle}"
  {keys}
  experimental {{ sync_interval = "500ms" }}
}}

plugins {{
  KeyManager "tpm" {{ plugin_data {{ tcti = "{tcti}" }} }}
  NodeAttestor "tpm" {{ plugin_data {{ tcti = "{tcti}" }} }}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""

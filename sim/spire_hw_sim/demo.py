"""From a bare machine to a workload's SVID, told in plain words.

Everything is real but the hardware: swtpm stands in for the node's TPM, SoftHSM for the HSM.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from spire_hw.errors import SpireHwError
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.programs import Program, ProgramError, run
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import Swtpm

if TYPE_CHECKING:
    from collections.abc import Callable

TRUST_DOMAIN = "demo.example"
_LABEL = "spire-ca"
_PCR = 7
_BOOT = b"secure boot: on"


class DemoError(Exception):
    """A step that did not show what it should."""


@dataclass
class Demo:
    """The stage: directory, devices and programs, all released by `close`."""

    directory: Path
    stack: ExitStack = field(default_factory=ExitStack)
    step: int = 0
    started: float = field(default_factory=time.monotonic)
    agent_id: str = ""

    # -- words -------------------------------------------------------------------

    def say(self, title: str, *lines: str) -> None:
        """Print one step and what it shows."""
        self.step += 1
        print(f"\n{_bold(f'{self.step:2}. {title}')}", flush=True)
        self.note(*lines)

    def note(self, *lines: str) -> None:
        """Print what to look at."""
        for line in lines:
            print(textwrap.indent(line.rstrip(), "      "), flush=True)

    # -- places ------------------------------------------------------------------

    @property
    def server_socket(self) -> Path:
        """Return the server's admin socket."""
        return self.directory / "s" / "api.sock"

    def agent_socket(self, name: str) -> Path:
        """Return an agent's Workload API socket."""
        return self.directory / name / "p" / "api.sock"

    def server(self, *arguments: str | Path) -> str:
        """Run a server command against the demo's server."""
        return run("spire-hw-server", *arguments, "-socketPath", self.server_socket)

    # -- the play ----------------------------------------------------------------

    def play(self) -> None:
        """Run every step; the first that fails ends the demo."""
        hsm_env = self.make_token()
        maker, node = self.make_node()
        self.start_server(hsm_env, maker)
        self.show_ca_key(hsm_env)
        self.enrol(node)
        agent = self.start_agent(node)
        self.create_entry()
        self.fetch_svids()
        agent.stop()
        self.refuse_unknown_tpm(maker)
        self.refuse_key_outside_tpm(node)
        self.refuse_changed_pcr(node)

    def bring_back(self) -> None:
        """Boot the node as it should be again and start its agent."""
        self.node.reset()
        self.measure(self.node)
        self.run_agent(self.node)

    def make_token(self) -> dict[str, str]:
        """Initialise a PKCS#11 token with a random PIN in a private file."""
        hsm = SoftHsm(self.directory / "hsm")
        pin = "".join(secrets.choice("0123456789") for _ in range(8))
        hsm.init_token(_LABEL, pin)
        self.module = hsm.module
        self.pin_file = self.directory / "pin"
        self.pin_file.touch(mode=0o600)
        self.pin_file.write_text(pin)
        self.say(
            "A PKCS#11 token is initialised for the server's CA keys",
            f"module  {self.module}",
            f"token   {_LABEL}   (PIN in {self.pin_file}, mode 0600)",
        )
        return hsm.environment

    def make_node(self) -> tuple[Manufacturer, Swtpm]:
        """Power on a machine with a TPM whose maker certified its endorsement key."""
        maker = Manufacturer("Demo TPM Works")
        node = self.node = self.power_on("node1", maker)
        self.roots = maker.write_roots(self.directory / "tpm-makers.pem")
        self.measure(node)
        info = run("spire-hw-agent", "tpm", "info", "-tcti", node.tcti)
        self.say("A bare-metal node is powered on; this is its TPM 2.0", *_first(info, 14))
        return maker, node

    def power_on(self, name: str, maker: Manufacturer) -> Swtpm:
        """Start a simulated TPM with EK certificates of this maker."""
        tpm = Swtpm(self.directory / f"{name}-tpm", persistent_ek=False)
        tpm.start()
        self.stack.callback(tpm.stop)
        maker.equip(tpm, (EkKind.ECC_P256,))
        return tpm

    def measure(self, tpm: Swtpm) -> None:
        """Measure a boot: what firmware would extend, in small."""
        for pcr in range(8):
            tpm.extend_pcr(pcr, _BOOT)

    def start_server(self, hsm_env: dict[str, str], maker: Manufacturer) -> None:
        """Start the server; policy asks for one known value of one PCR."""
        self.port = _free_port()
        expected = _expected_pcr(_BOOT)
        conf = self.directory / "server.conf"
        conf.write_text(
            _SERVER_CONF.format(
                d=self.directory,
                socket=self.server_socket,
                port=self.port,
                td=TRUST_DOMAIN,
                module=self.module,
                token=_LABEL,
                pin_file=self.pin_file,
                roots=self.roots,
                pcr=_PCR,
                expected=expected,
            )
        )
        program = Program(
            "spire-hw-server",
            ["run", "-config", conf],
            self.directory / "server.log",
            env=hsm_env,
        )
        self.stack.callback(program.stop)
        program.wait_until_healthy("-socketPath", self.server_socket)
        self.bundle = self.directory / "bootstrap.pem"
        self.bundle.write_text(self.server("bundle", "show"))
        self.say(
            "The server is started; its first act is to generate the CA key inside the token",
            f"trust domain  {TRUST_DOMAIN}",
            f"listens on    127.0.0.1:{self.port}",
            f"config        {conf}",
            f"node policy   EK enrolled and certified by its maker, PCR {_PCR} = {expected[:16]}…",
        )

    def show_ca_key(self, hsm_env: dict[str, str]) -> None:
        """Ask the token, not the server, what the CA key is."""
        listed = subprocess.run(
            [
                *("pkcs11-tool", "--module", str(self.module), "--token-label", _LABEL),
                *("--login", "--pin", "env:DEMO_PIN", "--list-objects", "--type", "privkey"),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **hsm_env, "DEMO_PIN": self.pin_file.read_text()},
        )
        if "never extractable" not in listed.stdout or "local" not in listed.stdout:
            raise DemoError(
                f"the token does not vouch for its keys:\n{listed.stdout}{listed.stderr}"
            )
        self.say(
            "The token itself says where the CA key was made and that it cannot leave",
            "$ pkcs11-tool --list-objects --type privkey",
            *listed.stdout.splitlines(),
        )

    def enrol(self, node: Swtpm) -> None:
        """Put the node's endorsement key on the server's list."""
        ek_hash = run("spire-hw-agent", "tpm", "ek-hash", "-tcti", node.tcti).split()[0]
        self.server("tpm", "allow", ek_hash, "-comment", "rack 7, slot 3")
        self.say(
            "The node is enrolled by the hash of its endorsement key: no token, no shared secret",
            f"$ spire-hw-agent tpm ek-hash        →  {ek_hash}",
            "$ spire-hw-server tpm allow …",
            *self.server("tpm", "list").splitlines(),
        )

    def agent_conf(self, name: str, tpm: Swtpm, key_manager: str) -> Path:
        """Write the configuration of one agent."""
        home = self.directory / name
        home.mkdir(mode=0o700, exist_ok=True)
        conf = home / "agent.conf"
        conf.write_text(
            _AGENT_CONF.format(
                d=home,
                socket=self.agent_socket(name),
                port=self.port,
                td=TRUST_DOMAIN,
                bundle=self.bundle,
                tcti=tpm.tcti,
                key_manager=key_manager.format(tcti=tpm.tcti),
            )
        )
        return conf

    def start_agent(self, node: Swtpm) -> Program:
        """Start the agent and show what it proved."""
        agent = self.run_agent(node)
        listed = self.server("agent", "list")
        self.agent_id = _value(listed, "SPIFFE ID")
        self.say(
            "The agent attests: EK certificate, credential activation, key certification, quote",
            *self.server("agent", "show", "-spiffeID", self.agent_id).splitlines(),
            "",
            f"key:tpm says that the agent's own key was proved to live in this TPM; "
            f"pcr:sha256:{_PCR} was quoted by it.",
            "No key in clear is on the node's disk; the .tpmkey file is wrapped for this TPM alone:",
            f"  {_files(self.directory / 'node1')}",
        )
        return agent

    def run_agent(self, node: Swtpm) -> Program:
        """Start the node's agent and wait until it attested."""
        conf = self.agent_conf("node1", node, _KEY_IN_TPM)
        agent = Program("spire-hw-agent", ["run", "-config", conf], self.directory / "node1.log")
        self.stack.callback(agent.stop)
        agent.wait_until_healthy("-socketPath", self.agent_socket("node1"))
        return agent

    def create_entry(self) -> None:
        """Register a workload: this user's processes on nodes whose key is in the TPM."""
        made = self.server(
            *("entry", "create", "-parentID", self.agent_id),
            *("-spiffeID", f"spiffe://{TRUST_DOMAIN}/web", "-selector", f"unix:uid:{os.getuid()}"),
        )
        self.say("A registration entry says which processes are spiffe://demo.example/web", made)

    def fetch_svids(self) -> None:
        """Be the workload."""
        out = self.directory / "workload"
        out.mkdir(mode=0o700)
        where = ("-socketPath", self.agent_socket("node1"))
        fetched = _retry(
            lambda: run("spire-hw-agent", "api", "fetch", "x509", "-write", out, *where)
        )
        self.say("A workload asks the Workload API who it is and gets an X.509-SVID", fetched)
        checked = subprocess.run(
            ["openssl", "verify", "-CAfile", out / "bundle.0.pem", out / "svid.0.pem"],
            capture_output=True,
            text=True,
            check=False,
        )
        if checked.returncode:
            raise DemoError(f"openssl does not accept the chain: {checked.stdout}{checked.stderr}")
        self.note("$ openssl verify -CAfile bundle.0.pem svid.0.pem", checked.stdout)
        jwt = run("spire-hw-agent", "api", "fetch", "jwt", "-audience", "db", *where)
        token = jwt.split("\t", 1)[1].split()[0]
        valid = run(
            "spire-hw-agent", "api", "validate", "jwt", "-audience", "db", "-svid", token, *where
        )
        self.say("The same workload gets a JWT-SVID for the audience `db`, and it validates", valid)

    # -- three refusals ------------------------------------------------------------

    def refuse_unknown_tpm(self, maker: Manufacturer) -> None:
        """A second machine with a genuine TPM that nobody enrolled."""
        stranger = self.power_on("stranger", maker)
        self.measure(stranger)
        why = self.refused("stranger", stranger, _KEY_IN_TPM)
        self.say("Refused: a machine with a genuine TPM that nobody enrolled", why)

    def refuse_key_outside_tpm(self, node: Swtpm) -> None:
        """The enrolled machine, with the agent's key in memory instead of the TPM."""
        why = self.refused("software-key", node, _KEY_IN_MEMORY)
        self.say("Refused: the enrolled node, but its agent's key is not in the TPM", why)

    def refuse_changed_pcr(self, node: Swtpm) -> None:
        """The enrolled machine after something else was measured at boot."""
        node.extend_pcr(_PCR, b"an unknown boot loader")
        why = self.refused("changed", node, _KEY_IN_TPM)
        self.say(f"Refused: the enrolled node after PCR {_PCR} changed", why)

    def refused(self, name: str, tpm: Swtpm, key_manager: str) -> str:
        """Start an agent that must not get in; return the reason it was given.

        Raises:
            DemoError: it got in.
        """
        conf = self.agent_conf(name, tpm, key_manager)
        agent = Program("spire-hw-agent", ["run", "-config", conf], self.directory / f"{name}.log")
        self.stack.callback(agent.stop)
        status = agent.wait_for_exit()
        if status == 0:
            raise DemoError(f"agent {name!r} ended without an error")
        reasons = re.findall(r'level=error .* error="([^"]*)"', agent.log_text())
        if not reasons:
            raise DemoError(f"agent {name!r} ended with status {status} and no reason")
        return f"the server said: {reasons[-1]}\nand the agent ended with status {status}"


def play(*, keep: bool = False) -> int:
    """Run the demo; return the exit status."""
    directory = Path(tempfile.mkdtemp(prefix="spire-hw-"))
    demo = Demo(directory)
    print(f"spire-hw demo in {directory}, on loopback only")
    try:
        demo.play()
    except KeyboardInterrupt:
        demo.stack.close()
        shutil.rmtree(directory, ignore_errors=True)
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (DemoError, ProgramError, SpireHwError, OSError, subprocess.SubprocessError) as e:
        print(f"\nThe demo failed at step {demo.step + 1}: {e}", file=sys.stderr)
        print(f"Logs are in {directory}", file=sys.stderr)
        demo.stack.close()
        return 1
    print(f"\n{_bold('Done')} in {time.monotonic() - demo.started:.0f} s.")
    try:
        if keep:
            _stay(demo)
    finally:
        demo.stack.close()
    shutil.rmtree(directory, ignore_errors=True)
    return 0


def _stay(demo: Demo) -> None:
    demo.bring_back()
    programs = Path(sys.executable).parent
    print(
        textwrap.dedent(f"""
        Server, node and agent are up again. Talk to them, from another terminal:

          {programs}/spire-hw-server entry show -socketPath {demo.server_socket}
          {programs}/spire-hw-server agent list -socketPath {demo.server_socket}
          {programs}/spire-hw-agent api fetch x509 -socketPath {demo.agent_socket("node1")}
          export SPIFFE_ENDPOINT_SOCKET=unix://{demo.agent_socket("node1")}

        Logs and configuration are in {demo.directory}. Ctrl-C stops everything and removes it."""),
        flush=True,
    )
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    print("Stopping.")


def _expected_pcr(event: bytes) -> str:
    return sha256(bytes(32) + sha256(event).digest()).hexdigest()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _value(text: str, label: str) -> str:
    for line in text.splitlines():
        name, _, value = line.partition(": ")
        if name.strip() == label:
            return value.strip()
    raise DemoError(f"no {label!r} in:\n{text}")


def _first(text: str, lines: int) -> list[str]:
    return text.splitlines()[:lines]


def _files(directory: Path) -> str:
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    return ", ".join(names)


def _retry(attempt: Callable[[], str], timeout_s: float = 20) -> str:
    """Wait until the agent has synchronised the new entry."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return attempt()
        except ProgramError:
            if time.monotonic() > deadline:
                raise


def _bold(text: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\033[1m{text}\033[0m"


_SERVER_CONF = """\
server {{
  trust_domain = "{td}"
  bind_address = "127.0.0.1"
  bind_port    = {port}
  socket_path  = "{socket}"
  data_dir     = "{d}/s/data"
  log_level    = "INFO"
  ca_ttl       = "24h"
}}

plugins {{
  DataStore "sql" {{
    plugin_data {{
      database_type     = "sqlite3"
      connection_string = "{d}/s/data/datastore.sqlite3"
    }}
  }}
  KeyManager "pkcs11" {{
    plugin_data {{
      module_path          = "{module}"
      token_label          = "{token}"
      pin_file             = "{pin_file}"
      key_identifier_value = "demo-server"
    }}
  }}
  NodeAttestor "tpm" {{
    plugin_data {{
      ek_policy           = "ca_and_hash"
      endorsement_ca_path = "{roots}"
      pcrs {{
        sha256 = [{pcr}]
      }}
      pcr_values {{
        sha256 {{
          "{pcr}" = ["{expected}"]
        }}
      }}
    }}
  }}
}}
"""

_AGENT_CONF = """\
agent {{
  trust_domain      = "{td}"
  server_address    = "127.0.0.1"
  server_port       = {port}
  data_dir          = "{d}/data"
  socket_path       = "{socket}"
  trust_bundle_path = "{bundle}"
  log_level         = "INFO"
}}

plugins {{
  {key_manager}
  NodeAttestor "tpm" {{
    plugin_data {{
      tcti = "{tcti}"
    }}
  }}
  WorkloadAttestor "unix" {{
    plugin_data {{}}
  }}
}}
"""

_KEY_IN_TPM = """KeyManager "tpm" {{
    plugin_data {{
      tcti = "{tcti}"
    }}
  }}"""

_KEY_IN_MEMORY = """KeyManager "memory" {{
    plugin_data {{}}
  }}"""

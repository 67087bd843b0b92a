"""`doctor` of the server over set-ups that are well, and over ones that are really broken."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.cli.run import run
from spire_hw.clock import SystemClock
from spire_hw_server.cli.commands import PROGRAM, root
from spire_hw_sim.pki import dated_pem
from spire_hw_sim.programs import running
from spire_hw_sim.site import free_port
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import SPY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from spire_hw_sim.programs import Program

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
PIN = "4321"


class Site:
    """A server's files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hsm = SoftHsm(folder / "hsm")
        self.serial = self.hsm.init_token("spire-ca", pin=PIN)
        self.pin = folder / "pin"
        self.pin.write_text(PIN + "\n")
        self.pin.chmod(0o600)
        self.data = folder / "data"
        self.socket = folder / "api.sock"
        self.config = folder / "etc" / "server.conf"
        self.port = free_port()
        said = ["init", "-yes", "-trustDomain", "example.org", "-module", self.hsm.module]
        said += ["-environment", f"SOFTHSM2_CONF={self.hsm.conf}", "-pinFile", str(self.pin)]
        said += ["-configDir", str(self.config.parent), "-unit=false", "-pinCredential=false"]
        said += ["-dataDir", str(self.data), "-socketPath", str(self.socket)]
        said += ["-serverPort", str(self.port), "-healthPort", str(free_port())]
        assert run(root, PROGRAM, said) == 0
        self.data.mkdir(mode=0o700)

    def running(self) -> AbstractContextManager[Program]:
        """Run the server."""
        said = ["run", "-config", self.config]
        log = self.folder / "log"
        return running("spire-hw-server", said, log, "-socketPath", self.socket)

    def change(self, old: str, new: str) -> None:
        """Change the configuration."""
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))


class Doctor:
    """Runs the command; keeps what it found."""

    def __init__(self, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
        self.site = site
        self._capsys = capsys

    def __call__(self, *flags: str) -> dict[str, dict[str, Any]]:
        self._capsys.readouterr()
        said = ["doctor", "-config", str(self.site.config), "-output", "json", *flags]
        code = run(root, PROGRAM, said)
        out = self._capsys.readouterr().out
        assert PIN not in out.replace(str(self.site.folder), "")
        values = json.loads(out)
        assert code == (1 if values["problems"] else 6 if values["warnings"] else 0)
        for finding in values["findings"]:
            assert (finding["remedy"] == "") == (finding["level"] == "ok")
        return {f["check"]: f for f in values["findings"]}


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="hwdoc") as folder:
        yield Site(Path(folder))


@pytest.fixture
def doctor(site: Site, capsys: pytest.CaptureFixture[str]) -> Doctor:
    return Doctor(site, capsys)


def test_a_server_that_is_well(doctor: Doctor, site: Site) -> None:
    with site.running():
        found = doctor("-login")
        assert {c for c, f in found.items() if f["level"] == "problem"} == set()
        for check in ("config", "data_dir", "database", "socket", "port", "certificate"):
            assert found[check]["level"] == "ok", found[check]
        assert f"spire-ca/{site.serial}" in found["hsm.login"]["message"]
    found = doctor()
    assert found["socket.missing"]["level"] == "warning"
    assert "hsm.login" not in found


@pytest.mark.skipif(not SPY.exists(), reason="pkcs11-spy.so (opensc) is not installed")
def test_nobody_logs_in_unless_asked(doctor: Doctor, site: Site) -> None:
    log = site.folder / "spy.log"
    site.change(f'"{site.hsm.module}"', f'"{SPY}"')
    spied = f'PKCS11SPY = "{site.hsm.module}" PKCS11SPY_OUTPUT = "{log}" SOFTHSM2_CONF'
    site.change("SOFTHSM2_CONF", spied)

    def logins() -> int:
        return log.read_text(errors="replace").count(": C_Login\n")

    assert doctor()["hsm.token"]["level"] == "ok"
    assert logins() == 0
    assert doctor("-login")["hsm.login"]["level"] == "ok"
    assert logins() == 1
    site.pin.write_text("1111\n")
    assert doctor("-login")["hsm.login"]["level"] == "problem"
    assert logins() == 2
    # SoftHSM now warns that a wrong PIN was tried.
    assert doctor()["hsm.user_pin_count_low"]["level"] == "warning"
    assert logins() == 2


def test_modes_that_let_others_in(doctor: Doctor, site: Site) -> None:
    site.data.chmod(0o755)
    site.pin.chmod(0o644)
    found = doctor()
    assert "0755" in found["data_dir.mode"]["message"]
    assert "chmod 0700" in found["data_dir.mode"]["remedy"]
    assert "0644" in found["hsm.pin_source"]["message"]
    site.pin.unlink()
    assert "install -D -m 0600" in doctor()["hsm.pin_source"]["remedy"]
    site.pin.touch(mode=0o600)
    assert "is empty" in doctor()["hsm.pin_source"]["message"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_pin_that_the_service_cannot_read(doctor: Doctor, site: Site) -> None:
    os.chown(site.data, 65534, -1)
    assert "the program is user 65534" in doctor()["hsm.pin_source"]["message"]


def test_a_token_that_is_away_or_ambiguous(doctor: Doctor, site: Site) -> None:
    site.hsm.remove()
    found = doctor()
    assert found.get("hsm.token_missing", found.get("hsm.module"))["level"] == "problem"  # type: ignore[index]
    site.hsm.put_back()
    assert doctor()["hsm.token"]["level"] == "ok"
    site.hsm.init_token("spire-ca", pin=PIN)
    site.change("token_serial", "# token_serial")
    assert doctor()["hsm.token_ambiguous"]["remedy"] == "set token_serial"
    site.change(site.hsm.module, "/usr/lib/none.so")
    assert "not found" in doctor()["hsm.module"]["message"]


def test_a_clock_that_is_behind(doctor: Doctor, site: Site) -> None:
    later = time.time() + 3600  # noqa: TID251 - what the file system's clock will say
    (site.data / "written").touch()
    os.utime(site.data / "written", (later, later))
    found = doctor()
    assert found["time.behind"]["level"] == "problem"
    assert "set the clock" in found["time.behind"]["remedy"]


def test_a_socket_that_was_left_behind(doctor: Doctor, site: Site) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(site.socket))
    found = doctor()
    assert found["socket.dead"]["level"] == "problem"
    assert "start spire-hw-server" in found["socket.dead"]["remedy"]


def test_a_port_that_somebody_else_has(doctor: Doctor, site: Site) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", site.port))  # noqa: S104 - as the server would
        other.listen()
        assert doctor()["port.taken"]["level"] == "problem"


def test_a_database_that_is_damaged(doctor: Doctor, site: Site) -> None:
    with site.running():
        assert doctor()["database"]["level"] == "ok"
    database = site.data / "datastore.sqlite3"
    whole = database.read_bytes()
    database.write_bytes(b"\0" * 4096 + whole[4096:])
    for left in site.data.glob("datastore.sqlite3-*"):
        left.unlink()
    assert doctor()["database.unusable"]["level"] == "problem"
    database.write_bytes(whole[: len(whole) // 2])
    assert {"database.damaged", "database.unusable"} & set(doctor())


def test_a_configuration_that_is_wrong(doctor: Doctor, site: Site) -> None:
    site.change('profile      = "softhsm"', 'profile = "softhms"')
    assert 'did you mean "softhsm"' in doctor()["config.invalid"]["message"]
    site.config.write_text("server {")
    found = doctor()
    assert set(found) <= {"versions", "config.invalid"} | {c for c in found if "time" in c}


def test_an_authority_above_that_has_expired(doctor: Doctor, site: Site) -> None:
    past = SystemClock().now() - timedelta(days=30)
    (site.folder / "upstream.pem").write_text(dated_pem(past, past + timedelta(days=10)))
    (site.folder / "upstream.key").write_text("-")
    (site.folder / "upstream.key").chmod(0o644)
    site.change(
        "plugins {",
        f"""plugins {{
  UpstreamAuthority "disk" {{
    plugin_data {{
      cert_file_path = "{site.folder / "upstream.pem"}"
      key_file_path  = "{site.folder / "upstream.key"}"
    }}
  }}""",
    )
    found = doctor()
    assert "expired" in found["certificate.expired"]["message"]
    assert "0644" in found["secret.mode"]["message"]


def test_several_tokens_are_looked_at_one_by_one(doctor: Doctor, site: Site) -> None:
    site.hsm.init_token("second", pin=PIN)
    text = site.config.read_text()
    start = text.index('  KeyManager "pkcs11"')
    end = text.index("  # Nodes are let in")
    blocks = "".join(
        f"""
      token "{name}" {{
        module_path = "{site.hsm.module}"
        token_label = "{label}"
        pin_file = "{site.pin}"
        environment {{ SOFTHSM2_CONF = "{site.hsm.conf}" }}
      }}"""
        for name, label in (("one", "spire-ca"), ("two", "second"), ("three", "gone"))
    )
    manager = f"""  KeyManager "pkcs11" {{
    plugin_data {{
      mode = "spread"{blocks}
    }}
  }}

"""
    site.config.write_text(text[:start] + manager + text[end:])
    found = doctor()
    assert found["config"]["level"] == "ok", found
    assert "token three: the token is not there" in found["hsm.token_missing"]["message"]
    assert found["hsm.token"]["level"] == "ok"


def test_signers_that_cannot_be_reached(doctor: Doctor, site: Site) -> None:
    now = SystemClock().now()
    (site.folder / "a.pem").write_text(dated_pem(now, now + timedelta(days=30)))
    (site.folder / "a.key").write_text("-")
    (site.folder / "a.key").chmod(0o600)
    text = site.config.read_text()
    start = text.index('  KeyManager "pkcs11"')
    end = text.index("  # Nodes are let in")
    dead, alive = free_port(), free_port()
    manager = f"""  KeyManager "remote" {{
    plugin_data {{
      addresses = ["127.0.0.1:{dead}", "127.0.0.1:{alive}"]
      signer_ca = "{site.folder / "a.pem"}"
      signer_id = "spiffe://infra.example/signer"
      cert      = "{site.folder / "a.pem"}"
      key       = "{site.folder / "a.key"}"
    }}
  }}

"""
    site.config.write_text(text[:start] + manager + text[end:])
    assert doctor()["signer.unreachable"]["level"] == "problem"
    with socket.socket() as other:
        other.bind(("127.0.0.1", alive))
        other.listen()
        found = doctor()
        assert str(dead) in found["signer.unreachable"]["message"]
        assert found["signer.unreachable"]["level"] == "warning"
        assert found["signer.reachable"]["level"] == "ok"
        assert "signer.accepted" not in found
        site.config.write_text(
            site.config.read_text().replace(
                "      signer_id", f'      accept_log = ["127.0.0.1:{alive}"]\n      signer_id'
            )
        )
        assert "accept_log" in doctor()["signer.accepted"]["message"]


def test_text_says_what_to_do(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.pin.chmod(0o640)
    capsys.readouterr()
    assert run(root, PROGRAM, ["doctor", "-config", str(site.config)]) == 1
    out = capsys.readouterr().out
    assert "problem  hsm.pin_source" in out
    assert "-> chmod 0600" in out
    assert "1 problem" in out
    assert "ok       config" not in out

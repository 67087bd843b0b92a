"""`init` and `doctor` of the signer: a signer starts with what was written; broken ones are told."""

from __future__ import annotations

import json
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.cli.run import run
from spire_hw.clock import SystemClock
from spire_hw.x509.certificate import encode_pem
from spire_hw_signer.cli.commands import PROGRAM, root
from spire_hw_sim.pki import dated_pem, now
from spire_hw_sim.programs import Program
from spire_hw_sim.signer import CLIENT_ID, PIN, TOKEN, SignerRig
from spire_hw_sim.site import free_port
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]


class Site:
    """Files of a signer that `init` is to make."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rig = SignerRig(folder)
        assert self.rig.hsm is not None
        self.hsm = self.rig.hsm
        (folder / "clients.pem").write_bytes((folder / "ca.pem").read_bytes())
        (folder / "signer.key").chmod(0o600)
        self.pin = folder / "own-pin"
        self.pin.write_text(PIN + "\n")
        self.pin.chmod(0o600)
        self.data = folder / "own-data"
        self.config = folder / "etc" / "signer.conf"
        self.policy = folder / "etc" / "signer-policy.conf"
        self.admin = folder / "a.sock"
        self.port = free_port()

    def arguments(self, *more: str) -> list[str]:
        """Return the command line of `init`."""
        return [
            "init",
            *("-yes", "-trustDomain", "example.org", "-client", CLIENT_ID, "-unit=false"),
            *("-module", self.hsm.module, "-tokenLabel", TOKEN, "-pinFile", str(self.pin)),
            *("-environment", f"SOFTHSM2_CONF={self.hsm.conf}", "-dataDir", str(self.data)),
            *("-configDir", str(self.config.parent), "-adminSocket", str(self.admin)),
            *("-certFile", str(self.folder / "signer.pem")),
            *("-keyFile", str(self.folder / "signer.key")),
            *("-clientCA", str(self.folder / "clients.pem")),
            *("-bindAddress", "127.0.0.1", "-bindPort", str(self.port)),
            *("-healthPort", str(free_port()), *more),
        ]


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="hwsig") as folder:
        yield Site(Path(folder))


def doctor(
    site: Site, capsys: pytest.CaptureFixture[str], *flags: str
) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    code = run(root, PROGRAM, ["doctor", "-config", str(site.config), "-output", "json", *flags])
    values = json.loads(capsys.readouterr().out)
    assert code == (1 if values["problems"] else 6 if values["warnings"] else 0)
    return {f["check"]: f for f in values["findings"]}


def test_a_signer_starts_with_what_init_wrote(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, PROGRAM, site.arguments("-pinCredential=false")) == 0
    assert capsys.readouterr().err == ""
    assert run(root, PROGRAM, ["validate", "-config", str(site.config)]) == 0
    assert f'client "{CLIENT_ID}"' in site.policy.read_text()
    log = site.folder / "log"
    signer = Program(PROGRAM, ["run", "-config", site.config], log)
    try:
        signer.wait_until_healthy("-socketPath", site.admin)
        found = doctor(site, capsys, "-login")
        site.policy.write_text(site.policy.read_text().replace("per_day = 12", "per_day = 11"))
        later = doctor(site, capsys)
    finally:
        signer.stop()
    assert {c for c, f in found.items() if f["level"] == "problem"} == set(), log.read_text()
    well = ("config", "data_dir", "audit", "hsm.token", "hsm.login", "socket", "port", "policy")
    for check in well:
        assert found[check]["level"] == "ok", found[check]
    assert "policy reload" in later["policy.not_in_force"]["remedy"]


def test_what_is_missing_or_wrong_is_told(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, PROGRAM, site.arguments("-pinCredential=false")) == 0
    site.data.mkdir(mode=0o750)
    past = SystemClock().now() - timedelta(days=40)
    (site.folder / "clients.pem").write_text(dated_pem(past, past + timedelta(days=30)))
    (site.folder / "signer.key").chmod(0o644)
    site.policy.write_text(site.policy.read_text().replace("max_ca_ttl", "max_ttl"))
    site.hsm.remove()
    found = doctor(site, capsys)
    assert "0750" in found["data_dir.mode"]["message"]
    assert "expired" in found["certificate.expired"]["message"]
    assert "0644" in found["secret.mode"]["message"]
    assert "max_ca_ttl" in found["config.invalid"]["message"]
    assert found["audit.missing"]["level"] == "warning"
    assert {"hsm.token_missing", "hsm.module"} & set(found)
    assert found["socket.missing"]["level"] == "warning"


def test_faults_say_in_which_file_and_line_they_are(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, PROGRAM, site.arguments("-pinCredential=false")) == 0
    text = site.config.read_text()
    assert text.count("token_label") == 1
    site.config.write_text(text.replace("token_label", "token_lable = 1\ntoken_label"))
    lines = site.config.read_text().splitlines()
    line = next(n for n, one in enumerate(lines, start=1) if "token_lable" in one)
    message = doctor(site, capsys)["config.invalid"]["message"]
    assert message.startswith(f"{site.config}:{line}: ")
    # Those that keep it from being read at all as well, each for itself.
    site.config.write_text(text.replace("bind_port ", "bind_prt ").replace("data_dir ", "dat_dir "))
    capsys.readouterr()
    assert run(root, PROGRAM, ["doctor", "-config", str(site.config), "-output", "json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    told = [f["message"] for f in found if f["check"] == "config.invalid"]
    assert len(told) >= 3
    assert all(one.startswith(f"{site.config}:") and "\n" not in one for one in told)


def test_files_that_decide_who_is_let_in_are_looked_at(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, PROGRAM, site.arguments("-pinCredential=false")) == 0
    found = doctor(site, capsys)
    assert (found["deciding"]["level"], found["witness.none"]["level"]) == ("ok", "warning")
    site.policy.chmod(0o666)
    site.policy.write_text(site.policy.read_text().replace("raw  = false", "raw  = true"))
    authority, crl = site.rig.authority, site.folder / "crl.pem"
    (site.folder / "clients.pem").write_bytes(encode_pem([authority.der]))
    for hours, check, level in ((1, "crl", "ok"), (-1, "crl.expired", "problem")):
        crl.write_bytes(authority.revocation_list(until=now() + timedelta(hours=hours)))
        extra = f'crl_files = ["{crl}"]\n    client_ca_files'
        text = site.config.read_text()
        if "crl_files" not in text:
            site.config.write_text(
                text.replace("client_ca_files", extra).replace(
                    "  tls {",
                    f'  audit {{ checkpoint_file = "{site.folder}/far/c.log" }}\n  tls {{',
                )
            )
        found = doctor(site, capsys)
        assert found[check]["level"] == level
    assert "0666" in found["deciding.mode"]["message"]
    assert "bare digests" in found["policy.notice"]["message"]
    assert found["witness.missing"]["level"] == "problem"
    (site.folder / "far").mkdir()
    assert doctor(site, capsys)["witness"]["level"] == "ok"
    operators = f'  operators {{ required = 1 keys {{ alice = "{site.folder}/none.pub" }} }}\n'
    site.config.write_text(site.config.read_text().replace("  tls {", operators + "  tls {"))
    found = doctor(site, capsys)
    assert "none.pub" in found["config.invalid"]["message"]


def test_tls_files_that_are_not_there_yet_are_doubts(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.folder / "signer.pem").unlink()
    said = site.arguments("-dryRun", "-output", "json", "-unit", "-unitDir", str(site.folder))
    assert run(root, PROGRAM, said) == 0
    values = json.loads(capsys.readouterr().out)
    assert any("signer.pem" in doubt for doubt in values["doubts"])
    unit = values["files"][2]["content"]
    assert "ExecReload=/bin/kill -HUP $MAINPID" in unit
    tokens = site.hsm.conf.parent / "tokens"
    assert f"directories.tokendir = {tokens}\n" in site.hsm.conf.read_text()
    assert f"ReadWritePaths=-{tokens} -{site.data} -{site.folder}" in unit
    assert not site.config.exists()


def test_a_client_on_this_host_needs_no_tls(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    local = ["-client", "unix:root", "-clientSocket", str(site.folder / "c.sock")]
    assert run(root, PROGRAM, site.arguments("-pinCredential=false", *local)) == 0
    capsys.readouterr()
    assert run(root, PROGRAM, ["validate", "-config", str(site.config)]) == 0
    assert "tls {" not in site.config.read_text()


@pytest.mark.parametrize(("kind", "kept"), [("tpm", "26h"), ("disk", "0s")])
def test_what_is_said_of_replaced_keys_is_so(
    site: Site, kind: str, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = site.arguments()
    at = arguments.index("-module")
    del arguments[at : at + 6], arguments[arguments.index("-environment") :][:2]
    said = [*arguments, "-keyManager", kind, "-output", "json"]
    assert run(root, PROGRAM, said) == 0
    values = json.loads(capsys.readouterr().out)
    assert any("kept for 26 hours" in text for text in values["choices"]) == (kind == "tpm")
    assert any("are not kept" in text for text in values["doubts"]) == (kind == "disk")
    assert f'retain_replaced = "{kept}"' in site.policy.read_text()
    assert run(root, PROGRAM, ["validate", "-config", str(site.config)]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-client", "somebody"], "is no client"),
        (["-client", "unix:nobody-of-this-name"], "no user"),
        (["-maxCATTL", "long"], "do not fit together"),
        (["-adminSocket", "relative"], "absolute path"),
        (["-name", "a b"], "-name"),
        (["-server", "{x}"], "-server"),
    ],
)
def test_answers_that_will_not_do_are_refused(
    site: Site, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, PROGRAM, site.arguments(*more)) == 2
    assert words in capsys.readouterr().err
    assert not site.config.exists()

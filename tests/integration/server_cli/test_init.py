"""`init`: what it writes is valid, a server starts with it, and nothing is lost by it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw.cli.run import run
from spire_hw.cli.units import Service
from spire_hw_server.cli.commands import PROGRAM, root
from spire_hw_sim.programs import command_line, running
from spire_hw_sim.site import free_port
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
_ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose sockets' paths are short."""
    with tempfile.TemporaryDirectory(prefix="hwinit") as made:
        yield Path(made)


@pytest.fixture
def hsm(folder: Path) -> SoftHsm:
    made = SoftHsm(folder / "hsm")
    made.init_token("spire-ca", pin="4321")
    pin = folder / "pin"
    pin.write_text("4321\n")
    pin.chmod(0o600)
    return made


def arguments(folder: Path, hsm: SoftHsm, *more: str) -> list[str]:
    return [
        "init",
        *("-yes", "-trustDomain", "example.org", "-module", hsm.module),
        *("-environment", f"SOFTHSM2_CONF={hsm.conf}", "-pinFile", str(folder / "pin")),
        *("-configDir", str(folder / "etc"), "-unitDir", str(folder / "units")),
        *("-dataDir", str(folder / "data"), "-socketPath", str(folder / "api.sock")),
        *more,
    ]


def test_what_is_written_is_valid_and_a_server_starts_with_it(
    folder: Path, hsm: SoftHsm, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = ["-serverPort", str(free_port()), "-healthPort", str(free_port())]
    assert run(root, PROGRAM, arguments(folder, hsm, "-pinCredential=false", *ports)) == 0
    config = folder / "etc" / "server.conf"
    assert "never leave it (profile softhsm)" in capsys.readouterr().out
    assert config.stat().st_mode & 0o777 == 0o644
    assert run(root, PROGRAM, ["validate", "-config", str(config)]) == 0
    where = folder / "api.sock"
    flags = ["run", "-config", config]
    with running("spire-hw-server", flags, folder / "log", "-socketPath", where) as server:
        assert server.stop() == 0
        seen = server.log_text().splitlines()
    assert any("hsm.key_generated" in line for line in seen)
    assert "server stops" in seen[-1]


def test_a_dry_run_shows_everything_and_writes_nothing(
    folder: Path, hsm: SoftHsm, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert run(root, PROGRAM, arguments(folder, hsm, "-dryRun")) == 0
    text = capsys.readouterr().out
    assert 'token_label  = "spire-ca"' in text
    assert f"LoadCredential=hsm-pin:{folder / 'pin'}" in text
    assert 'pin_file     = "/run/credentials/spire-hw-server.service/hsm-pin"' in text
    assert "4321" not in text
    assert run(root, PROGRAM, arguments(folder, hsm, "--dry-run", "-output", "json")) == 0
    values = json.loads(capsys.readouterr().out)
    assert [Path(f["path"]).name for f in values["files"]] == [
        "server.conf",
        "spire-hw-server.service",
    ]
    assert values["dry_run"] is True
    assert sorted(folder.rglob("*")) == before


def test_files_that_are_there_are_replaced_only_by_force(
    folder: Path, hsm: SoftHsm, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "etc" / "server.conf"
    config.parent.mkdir()
    config.write_text("precious")
    assert run(root, PROGRAM, arguments(folder, hsm)) == 1
    assert f"not overwritten: {config}" in capsys.readouterr().err
    assert config.read_text() == "precious"
    assert not (folder / "units").exists()
    assert run(root, PROGRAM, arguments(folder, hsm, "-force")) == 0
    assert 'trust_domain = "example.org"' in config.read_text()


def test_a_token_that_is_misspelt_is_told_beside_those_there_are(
    folder: Path,
    hsm: SoftHsm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spire_hw.cli.hsmchoice.find_modules", lambda: [hsm.module])
    given = arguments(folder, hsm, "-tokenLabel", "spire-cb", "-dryRun")
    at = given.index("-module")
    assert run(root, PROGRAM, given[:at] + given[at + 2 :]) == 2
    text = capsys.readouterr().err
    assert 'no token labelled "spire-cb" was found' in text
    (serial,) = hsm.serials()
    assert f'there is "spire-ca" serial {serial}' in text


def test_doubts_about_token_and_pin_are_told(
    folder: Path, hsm: SoftHsm, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "pin").chmod(0o644)
    assert run(root, PROGRAM, arguments(folder, hsm, "-dryRun", "-output", "json")) == 0
    (doubt,) = json.loads(capsys.readouterr().out)["doubts"]
    assert "0644 lets others read it" in doubt
    (folder / "pin").chmod(0o600)
    hsm.init_token("spire-ca", pin="4321")
    assert run(root, PROGRAM, arguments(folder, hsm, "-tokenLabel", "spire-ca", "-dryRun")) == 2
    text = capsys.readouterr().err
    assert all(f'{serial} ("spire-ca" in {hsm.module})' in text for serial in hsm.serials())
    later = arguments(folder, hsm, "-tokenLabel", "later", "-dryRun", "-output", "json")
    assert run(root, PROGRAM, later) == 0
    assert any("not there yet" in d for d in json.loads(capsys.readouterr().out)["doubts"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-trustDomain", "Bad Domain"], "-trustDomain"),
        (["-bindAddress", "host"], "-bindAddress"),
        (["-keyType", "dsa"], "-keyType"),
        (["-keyManager", "paper"], "pkcs11, tpm, disk"),
        (["-pinFile", 'x"y'], "-pinFile"),
        (["-environment", "A"], "NAME=value"),
        (["-environment", 'A="'], "cannot be used"),
        (["-dataDir", '/x" y'], "-dataDir"),
        (["-user", "a b"], "-user"),
    ],
)
def test_answers_that_will_not_do_are_refused(
    folder: Path, hsm: SoftHsm, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, PROGRAM, arguments(folder, hsm, *more)) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "etc").exists()


def test_a_person_is_asked_what_no_flag_says(folder: Path, hsm: SoftHsm) -> None:
    serial = hsm.init_token("spire-ca", pin="4321")
    said = arguments(folder, hsm, "-keyManager", "pkcs11", "-unit=false")
    said.remove("-yes")
    at = said.index("-trustDomain")
    del said[at : at + 2]
    master, slave = pty.openpty()
    os.write(master, b"Not A Domain\nexample.org\n1\n\n")
    done = subprocess.run(  # noqa: S603
        command_line("spire-hw-server", *said),
        stdin=slave,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(master)
    os.close(slave)
    assert done.returncode == 0, done.stderr
    assert "-trustDomain" in done.stderr
    assert serial in done.stderr
    assert 'trust_domain = "example.org"' in (folder / "etc" / "server.conf").read_text()


def test_where_the_pin_comes_from(
    folder: Path, hsm: SoftHsm, capsys: pytest.CaptureFixture[str]
) -> None:
    said = arguments(folder, hsm, "-output", "json", "-pinFrom")
    at = said.index("-pinFile")
    del said[at : at + 2]
    for words, reason in (
        (["device"], "-pinFrom device will not do: the token has no key pad"),
        (["terminal"], "-pinFrom terminal will not do for a service"),
        (["paper"], "-pinFrom paper is not known; it is one of file"),
        (["terminal", "-unit=false", "-pinFile", "/p"], "-pinFile and -pinFrom terminal exclude"),
    ):
        assert run(root, PROGRAM, [*said, *words]) == 2
        assert reason in capsys.readouterr().err
    assert run(root, PROGRAM, [*said, "terminal", "-unit=false"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert any("the PIN is kept nowhere" in choice for choice in values["choices"])
    config = folder / "etc" / "server.conf"
    assert "pin_prompt   = true" in config.read_text()
    assert "pin_file" not in config.read_text()
    assert run(root, PROGRAM, ["validate", "-config", str(config)]) == 0
    # A token that is not there yet may have a key pad.
    said[said.index("-module") + 1] = "/nowhere/hsm.so"
    assert run(root, PROGRAM, [*said, "device", "-tokenLabel", "ca", "-force"]) == 0
    assert "protected_login = true" in config.read_text()
    unit = (folder / "units" / "spire-hw-server.service").read_text()
    assert "LoadCredential" not in unit
    assert run(root, PROGRAM, ["validate", "-config", str(config)]) == 0


@pytest.mark.parametrize("where", ["tpm", "disk"])
def test_other_key_managers_are_configured_too(
    folder: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["init", "-yes", "-trustDomain", "example.org", "-keyManager", where]
    said += ["-configDir", str(folder), "-unitDir", str(folder), "-output", "json"]
    assert run(root, PROGRAM, said) == 0
    values = json.loads(capsys.readouterr().out)
    assert any("in a file" in doubt for doubt in values["doubts"]) == (where == "disk")
    assert run(root, PROGRAM, ["validate", "-config", str(folder / "server.conf")]) == 0
    unit = (folder / "spire-hw-server.service").read_text()
    assert ("DeviceAllow=/dev/tpmrm0 rw" in unit) == (where == "tpm")
    assert ("PrivateDevices=yes" in unit) == (where == "disk")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(folder: Path, hsm: SoftHsm) -> None:
    said = arguments(folder, hsm, "-program", "/bin/true", "-user", "root")
    assert run(root, PROGRAM, said) == 0
    unit = folder / "units" / "spire-hw-server.service"
    done = subprocess.run(  # noqa: S603
        ["systemd-analyze", "verify", str(unit)],  # noqa: S607
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert str(unit) not in done.stderr, done.stderr
    assert "Unknown" not in done.stderr, done.stderr


def test_the_units_beside_the_samples_are_those_that_init_writes() -> None:
    server = Service(
        name="server",
        title="SPIFFE server (spire-hw)",
        program="/usr/local/bin/spire-hw-server",
        config="/etc/spire-hw/server.conf",
        user="spire-server",
        all_devices=True,
        writable=("/var/lib/softhsm",),
        after=("pcscd.service",),
    )
    agent = Service(
        name="agent",
        title="SPIFFE agent (spire-hw)",
        program="/usr/local/bin/spire-hw-agent",
        config="/etc/spire-hw/agent.conf",
        devices=("/dev/tpmrm0", "/dev/tpm0"),
    )
    for service in (server, agent):
        file = _ROOT / "packaging" / "systemd" / service.unit_name
        kept = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert "\n".join(kept) + "\n" == service.text()

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cryptography import x509

from spire_hw.cli.run import ExitCode, run
from spire_hw.key import check_public_key, fingerprint, spki_der
from spire_hw_agent.cli.tpm import group
from spire_hw_sim.tpm_command import ENDORSEMENT
from tests.integration.tpm.leaks import nothing_left_behind

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from spire_hw_sim.swtpm import Swtpm


def test_info_shows_the_tpm_in_words(tpm: Swtpm, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_left_behind(tpm):
        assert run(group, "tpm", ["info", "-tcti", tpm.tcti]) == 0
    shown = capsys.readouterr().out
    assert "Manufacturer      : IBM SWTPM\n" in shown
    assert "PCR bank sha256   : 0-23\n" in shown
    assert "template L-2, made on demand" in shown
    assert "template L-1, at 0x81010001" in shown
    assert "id:53494D00 swtpm id:00070001" in shown
    assert "Simulated TPM Vendor EK CA 1" in shown


def test_info_and_ek_hash_agree_as_json(tpm: Swtpm, capsys: pytest.CaptureFixture[str]) -> None:
    run(group, "tpm", ["info", "-output", "json", "-tcti", tpm.tcti])
    info = json.loads(capsys.readouterr().out)
    assert set(info["pcr_banks"]) == {"sha256", "sha384"}
    assert info["complaints"] == []
    for ek_type, index in (("ec-p256", 0), ("rsa-2048", 1), ("auto", 0)):
        run(group, "tpm", ["ek-hash", "-ekType", ek_type, "-tcti", tpm.tcti])
        assert capsys.readouterr().out == info["endorsement_keys"][index]["ek_hash"] + "\n"


def test_the_hash_is_that_of_the_certified_key(
    tpm: Swtpm, capsys: pytest.CaptureFixture[str]
) -> None:
    run(group, "tpm", ["ek-hash", "-output", "json", "-tcti", tpm.tcti])
    shown = json.loads(capsys.readouterr().out)
    certificate = x509.load_der_x509_certificate(bytes.fromhex(shown["certificate"]["der"]))
    key = check_public_key(certificate.public_key())
    assert shown["ek_hash"] == fingerprint(spki_der(key))


def test_a_tpm_without_certificate_has_a_hash(
    bare_tpm: Swtpm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(group, "tpm", ["info", "-tcti", bare_tpm.tcti]) == 0
    assert "none: enrol by hash" in capsys.readouterr().out
    assert run(group, "tpm", ["ek-hash", "-tcti", bare_tpm.tcti]) == 0
    assert len(capsys.readouterr().out) == 65


def test_a_hierarchy_password_comes_from_a_file(
    tpm: Swtpm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tpm.commands.set_password(ENDORSEMENT, b"secret")
    arguments = ["ek-hash", "-tcti", tpm.tcti]
    assert run(group, "tpm", arguments) == ExitCode.UNREACHABLE
    assert "hierarchy password required" in capsys.readouterr().err
    (tmp_path / "auth").write_text("secret\n")
    assert run(group, "tpm", [*arguments, "-endorsementAuthPath", str(tmp_path / "auth")]) == 0


def test_without_a_tpm_the_answer_is_an_error_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tcti = f"swtpm:path={tmp_path / 'none'}"
    assert run(group, "tpm", ["info", "-tcti", tcti]) == ExitCode.UNREACHABLE
    assert capsys.readouterr().err.startswith("Error: no TPM answers at swtpm:path=")
    assert run(group, "tpm", ["info", "-tcti", "x", "-tpmDevicePath", "/dev/x"]) == ExitCode.USAGE

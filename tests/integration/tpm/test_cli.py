from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from spire_hw.cli.run import ExitCode, run
from spire_hw.clock import SystemClock
from spire_hw.errors import InvalidInputError
from spire_hw.key import check_public_key, fingerprint, spki_der
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.tpm.ekcert import EkRoots, verify_ek_certificate
from spire_hw.tpm.public import ek_hash
from spire_hw.tpm.storage import StorageKey
from spire_hw_agent.cli.tpm import group
from spire_hw_server.cli.eksource import read_certificates, read_node
from spire_hw_sim.manufacturer import EkKind
from spire_hw_sim.tpm_command import ENDORSEMENT, OWNER
from tests.integration.tpm.leaks import nothing_left_behind

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_sim.swtpm import Swtpm
    from tests.integration.tpm.conftest import Factory


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


def test_info_tells_of_a_lockout(tpm: Swtpm, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong passwords of another program lock the TPM for keys that have one, not for ours."""
    commands = tpm.commands
    commands.set_dictionary_attack_limit(1)
    run(group, "tpm", ["info", "-tcti", tpm.tcti])
    assert "Wrong passwords   : 0 of 1\n" in capsys.readouterr().out
    handle, _ = commands.create_primary(OWNER, StorageKey.ECC.value, b"right")
    key = commands.create_child(handle, b"right", b"child secret")
    commands.flush(handle)
    commands.sign_with_password(key, b"wrong")
    commands.flush(key)
    with nothing_left_behind(tpm):
        assert run(group, "tpm", ["info", "-tcti", tpm.tcti]) == 0
    assert "Wrong passwords   : 1 of 1: LOCKED, keys with a password" in capsys.readouterr().out
    run(group, "tpm", ["info", "-output", "json", "-tcti", tpm.tcti])
    told = json.loads(capsys.readouterr().out)["lockout"]
    assert (told["is_locked"], told["failures"], told["max_failures"]) == (True, 1, 1)


def test_info_and_ek_hash_agree_as_json(tpm: Swtpm, capsys: pytest.CaptureFixture[str]) -> None:
    run(group, "tpm", ["info", "-output", "json", "-tcti", tpm.tcti])
    info = json.loads(capsys.readouterr().out)
    assert set(info["pcr_banks"]) == {"sha256", "sha384"}
    assert info["complaints"] == []
    for ek_type, index in (("ec-p256", 0), ("rsa-2048", 1), ("auto", 0)):
        run(group, "tpm", ["ek-hash", "-ekType", ek_type, "-tcti", tpm.tcti])
        assert capsys.readouterr().out == info["endorsement_keys"][index]["ek_hash"] + "\n"


@pytest.mark.parametrize("words", [["info"], ["ek-hash"], ["ek-hash", "-ekType", "rsa-2048"]])
def test_a_server_takes_what_is_printed(
    tpm: Swtpm, factory: Factory, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    run(group, "tpm", [*words, "-output", "json", "-tcti", tpm.tcti])
    printed = capsys.readouterr().out
    assert read_node(printed.encode()) == json.loads(printed)["ek_hash"]
    leaf, chain = read_certificates(printed.encode())
    root = factory.manufacturer.root.public_bytes(Encoding.DER)
    roots = EkRoots.of([parse_certificate(root)])
    proved = verify_ek_certificate(leaf, chain, roots, SystemClock().now())
    assert proved.model.model == "swtpm"


def test_keys_of_every_certified_type_are_shown(
    bare_tpm: Swtpm, factory: Factory, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = (EkKind.ECC_P384, EkKind.RSA_3072)
    made = factory.manufacturer.equip(bare_tpm, kinds)
    run(group, "tpm", ["info", "-output", "json", "-tcti", bare_tpm.tcti])
    info = json.loads(capsys.readouterr().out)
    keys = {key["template"]: key for key in info["endorsement_keys"]}
    assert set(keys) == {"L-1", "L-2", "H-3", "H-6"}
    for one, label, name in zip(made, ("H-3", "H-6"), ("ec-p384", "rsa-3072"), strict=True):
        assert keys[label]["ek_hash"] == ek_hash(one.public_key)
        run(group, "tpm", ["ek-hash", "-ekType", name, "-tcti", bare_tpm.tcti])
        assert capsys.readouterr().out == keys[label]["ek_hash"] + "\n"
    # What has a certificate goes before what has none.
    assert info["ek_hash"] == keys["H-3"]["ek_hash"]


def test_an_unusable_certificate_is_a_complaint(
    bare_tpm: Swtpm, capsys: pytest.CaptureFixture[str]
) -> None:
    bare_tpm.commands.nv_store(EkKind.ECC_P256.value, b"\xff" * 700)
    run(group, "tpm", ["info", "-output", "json", "-tcti", bare_tpm.tcti])
    info = json.loads(capsys.readouterr().out)
    assert info["ek_hash"] == ""
    assert "holds no certificate" in info["complaints"][0]
    with pytest.raises(InvalidInputError, match="no endorsement key its agent could attest with"):
        read_node(json.dumps(info).encode())


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

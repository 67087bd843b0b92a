"""`spire-hw-server tpm ca`: no server is needed for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.cli.run import ExitCode, run
from spire_hw.tpm.castore import load_roots
from spire_hw.tpm.certificate import encode_pem, parse_certificate
from spire_hw_server.cli.commands import root
from spire_hw_sim import ekca
from spire_hw_sim.cabinets import make_cabinet
from spire_hw_sim.ekca import CrlSpec, EkCa, ca_spec
from spire_hw_sim.softtpm import SoftTpm, make_ek, make_key
from spire_hw_sim.tpmnode import Vendor

if TYPE_CHECKING:
    from pathlib import Path

Cli = Callable[..., tuple[int, str, str]]
VENDOR = Vendor.make()
TPM = SoftTpm(ek=make_ek("L-2"))
LEAF = VENDOR.certify(TPM)


def _attestation_ca() -> bytes:
    key = make_key("secp256r1")
    spec = ca_spec("AIK CA", key.public_key())
    spec.extensions.append(ekca.eku("2.23.133.8.3"))
    return VENDOR.root.child("AIK CA", key, spec).certificate


FILES = {
    "setup.cmd": b"echo",
    "Vendor/RootCA/root.cer": VENDOR.root.certificate,
    "Vendor/IntermediateCA/ek.crt": VENDOR.intermediate.certificate,
    "Vendor/IntermediateCA/copy.crt": VENDOR.intermediate.certificate,
    "Microsoft/IntermediateCA/aik.cer": _attestation_ca(),
    "Vendor/bad.der": b"junk",
}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str) -> tuple[int, str, str]:
        code = run(root, "spire-hw-server", ["tpm", "ca", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def store(tmp_path: Path, cli: Cli) -> Path:
    """Give what an import leaves behind."""
    source = tmp_path / "TrustedTpm.cab"
    source.write_bytes(make_cabinet(FILES))
    assert cli("import", str(source), "-out", str(tmp_path / "store"))[0] == 0
    return tmp_path / "store"


def _json(cli: Cli, *words: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = cli(*words, "-output", "json")
    found: dict[str, Any] = json.loads(out)
    return code, found


def test_import_keeps_roots_and_intermediates_apart(store: Path) -> None:
    assert sorted(path.name for path in store.iterdir()) == ["intermediates", "roots"]
    found = load_roots(store)
    assert [c.der for c in found.anchors] == [VENDOR.root.certificate]
    assert [c.der for c in found.intermediates] == [VENDOR.intermediate.certificate]


def test_import_tells_what_it_took_and_what_not(tmp_path: Path, cli: Cli) -> None:
    source = tmp_path / "a.cab"
    source.write_bytes(make_cabinet(FILES))
    code, out, _ = cli("import", str(source), "-out", str(tmp_path / "out"))
    assert code == 0
    assert out.startswith("Source: cabinet, SHA-256 ")
    for line in (
        "Roots: 1\n",
        "CN=Vendor Root\n",
        "Intermediates: 1\n",
        "CN=Vendor EK CA\n",
        "Refused: 2\n",
        (
            "  not for endorsement keys: its extended key usage is 2.23.133.8.3\n"
            "    Microsoft/IntermediateCA/aik.cer\n"
        ),
        f"2 certificates taken, 2 refused, 1 twice. 2 new in {tmp_path / 'out'}.\n",
    ):
        assert line in out
    code, values = _json(cli, "import", str(source), "-out", str(tmp_path / "out"))
    assert code == 0
    assert values["counts"] == {
        "root": 1,
        "intermediate": 1,
        "duplicate": 1,
        "refused": 1,
        "faulty": 1,
        "new": 0,
    }
    assert values["source"]["kind"] == "cabinet"
    assert values["ignored"] == ["setup.cmd"]
    assert values["faulty"][0]["name"] == "Vendor/bad.der"
    kinds = {one["name"]: one["kind"] for one in values["certificates"]}
    assert kinds["Microsoft/IntermediateCA/aik.cer"] == "refused"
    assert kinds["Vendor/RootCA/root.cer"] == "root"


@pytest.mark.parametrize("form", ["directory", "PEM", "DER"])
def test_import_takes_every_form(tmp_path: Path, cli: Cli, form: str) -> None:
    source = tmp_path / "in"
    if form == "directory":
        (source / "deep").mkdir(parents=True)
        (source / "deep" / "r.pem").write_bytes(encode_pem(VENDOR.root.certificate))
    elif form == "PEM":
        source.write_bytes(b"".join(encode_pem(c) for c in FILES.values() if len(c) > 99))
    else:
        source.write_bytes(VENDOR.root.certificate)
    code, values = _json(cli, "import", str(source), "-out", str(tmp_path / "out"))
    assert (code, values["source"]["kind"], values["counts"]["root"]) == (0, form, 1)
    assert len(load_roots(tmp_path / "out").anchors) == 1


def test_dry_run_writes_nothing(tmp_path: Path, cli: Cli) -> None:
    source = tmp_path / "root.der"
    source.write_bytes(VENDOR.root.certificate)
    code, out, _ = cli("import", str(source), "--dry-run")
    assert code == 0
    assert out.endswith("1 certificate taken, 0 refused, 0 twice. Nothing was written.\n")
    assert cli("import", str(source), "-out", str(tmp_path / "out"), "-dryRun")[0] == 0
    assert not (tmp_path / "out").exists()


def test_import_of_nothing_useful_fails(tmp_path: Path, cli: Cli) -> None:
    source = tmp_path / "leaf.der"
    source.write_bytes(LEAF)
    code, out, err = cli("import", str(source), "-out", str(tmp_path / "out"))
    assert code == ExitCode.USAGE
    assert "not a CA certificate" in out
    assert "holds no CA certificate that can vouch for TPMs" in err
    assert not (tmp_path / "out").exists()
    assert cli("import", str(source))[0] == ExitCode.USAGE
    assert cli("import", str(tmp_path / "none"), "-out", str(tmp_path))[0] == ExitCode.FAILED


def test_list_shows_a_store(store: Path, cli: Cli) -> None:
    code, out, _ = cli("list", str(store))
    assert code == 0
    assert out.startswith("Roots: 1\n  ")
    assert "CN=Vendor EK CA\n" in out
    code, values = _json(cli, "list", str(store))
    assert [one["kind"] for one in values["certificates"]] == ["root", "intermediate"]
    assert cli("list")[0] == ExitCode.USAGE


def test_verify_finds_what_cannot_be_used(tmp_path: Path, store: Path, cli: Cli) -> None:
    assert cli("verify", str(store))[:2] == (0, "1 root, 1 intermediate\n")
    (store / "intermediates" / "x.pem").write_bytes(encode_pem(_attestation_ca()))
    code, out, _ = cli("verify", str(store))
    assert code == ExitCode.FAILED
    assert "Useless: 1\n  not for endorsement keys" in out
    assert cli("verify", str(tmp_path / "none"))[0] == ExitCode.FAILED


def test_verify_tells_whether_a_key_is_trusted(tmp_path: Path, store: Path, cli: Cli) -> None:
    good, bad = tmp_path / "good.der", tmp_path / "bad.pem"
    good.write_bytes(LEAF)
    bad.write_bytes(encode_pem(Vendor.make("Stranger").certify(TPM)))
    code, out, _ = cli("verify", str(store), str(good))
    assert code == 0
    assert f"{good}: trusted: id:4E544300 NPCT75x id:00070002, root " in out
    code, out, _ = cli("verify", str(store), str(good), str(bad))
    assert code == ExitCode.PARTLY
    assert f"{bad}: refused: ek: issuer is not trusted [ek_untrusted]\n" in out
    code, values = _json(cli, "verify", str(store), str(tmp_path / "none"))
    assert code == ExitCode.FAILED
    assert values["keys"][0]["trusted"] is False
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    assert "larger than" in cli("verify", str(store), str(tmp_path / "large"))[1]


def test_verify_asks_revocation_lists(tmp_path: Path, store: Path, cli: Cli) -> None:
    key, crl = tmp_path / "ek.der", tmp_path / "a.crl"
    key.write_bytes(LEAF)
    crl.write_bytes(VENDOR.intermediate.issue_crl(CrlSpec([parse_certificate(LEAF).serial])))
    code, out, _ = cli("verify", str(store), str(key), "-crl", str(crl))
    assert code == ExitCode.FAILED
    assert "ek: certificate is revoked [ek_revoked]" in out
    assert cli("verify", str(store), str(key), "-crl", str(tmp_path / "no"))[0] == ExitCode.FAILED


def test_verify_tells_which_lists_count(tmp_path: Path, store: Path, cli: Cli) -> None:
    stranger, other = Vendor.make("Stranger"), EkCa(VENDOR.root.subject, make_key("secp256r1"), b"")
    delta = CrlSpec(extensions=[ekca.extension(ekca.DELTA_CRL, ekca.integer(1), critical=True)])
    folder = tmp_path / "crls"
    folder.mkdir()
    (folder / "0.crl").write_bytes(VENDOR.intermediate.issue_crl(CrlSpec([1, 2])))
    (folder / "x.crl").write_bytes(stranger.root.issue_crl(CrlSpec(next_update=b"")))
    code, out, _ = cli("verify", str(store), "-crl", str(folder))
    assert code == 0
    assert "Revocation lists: 2\n  until 2099-01-01, 2 revoked  CN=Vendor EK CA\n" in out
    assert "  until ?, 0 revoked  CN=Stranger Root\n    its issuer is not among the CAs" in out
    for number, raw in enumerate(
        [
            VENDOR.root.issue_crl(CrlSpec(next_update=ekca.utc("20250301"))),
            VENDOR.root.issue_crl(delta),
            other.issue_crl(CrlSpec()),
        ]
    ):
        (folder / f"{number + 1}.crl").write_bytes(raw)
    code, values = _json(cli, "verify", str(store), "-crl", str(folder))
    assert code == ExitCode.FAILED
    assert sorted(one["fault"] for one in values["crls"]) == [
        "",
        "",
        "its issuer did not sign it, or may not",
        "not complete: a delta, an indirect list, or one with parts not understood",
        "not valid now",
    ]
    out = cli("verify", str(store), "-crl", str(folder))[1]
    assert "CN=Vendor Root\n    does not count: not valid now\n" in out

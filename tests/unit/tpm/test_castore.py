from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.tpm import castore
from spire_hw.tpm.caimport import Blob, Judged, Kind, judge
from spire_hw.tpm.castore import load_roots, read_source, write_certificate
from spire_hw.tpm.certificate import encode_pem, parse_certificate
from spire_hw_sim import ekca
from spire_hw_sim.cabinets import make_cabinet
from spire_hw_sim.ekca import EkCa, ca_spec
from spire_hw_sim.softtpm import SoftTpm, make_ek, make_key
from spire_hw_sim.tpmnode import Vendor
from spire_hw_sim.weakkeys import roca_modulus

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 6, 1, tzinfo=UTC)
VENDOR = Vendor.make()
ROOT, CA = VENDOR.root, VENDOR.intermediate


def pem(*ders: bytes) -> bytes:
    return b"".join(map(encode_pem, ders))


def test_folders_say_what_is_trusted(tmp_path: Path) -> None:
    other = Vendor.make("Other").root
    for folder in ("roots", "intermediates"):
        (tmp_path / folder).mkdir()
    (tmp_path / "roots" / "a.pem").write_bytes(pem(ROOT.certificate, ROOT.certificate))
    (tmp_path / "intermediates" / "b.pem").write_bytes(pem(CA.certificate, other.certificate))
    (tmp_path / "other.pem").write_bytes(pem(other.certificate))
    found = load_roots(tmp_path, ["ab"])
    assert [c.der for c in found.anchors] == [ROOT.certificate]
    assert [c.der for c in found.intermediates] == [CA.certificate, other.certificate]
    assert found.pinned == {"ab"}
    assert [c.der for c in found.intermediates_named(CA.subject)] == [CA.certificate]
    assert not found.anchors_named(other.subject)


def test_folder_of_intermediates_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    with pytest.raises(NotReadyError, match="no self-issued"):
        load_roots(tmp_path)
    (tmp_path / "roots" / "a.pem").write_bytes(pem(ROOT.certificate))
    assert load_roots(tmp_path).intermediates == ()


def test_intermediate_among_roots_is_refused(tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    (tmp_path / "roots" / "a.pem").write_bytes(pem(ROOT.certificate, CA.certificate))
    with pytest.raises(InvalidInputError, match="is not self-issued"):
        load_roots(tmp_path)


# --- sources ----------------------------------------------------------------------------------

LEAF = VENDOR.certify(SoftTpm(ek=make_ek("L-2")))
FILES = {
    "setup.cmd": b"echo",
    "Maker/RootCA/Root.cer": ROOT.certificate + b"\xff",
    "Maker/IntermediateCA/Both.crt": pem(CA.certificate, ROOT.certificate),
    "Maker/IntermediateCA/junk.der": b"junk",
    "Maker/IntermediateCA/none.pem": b"-----BEGIN",
}
FOUND = {
    "Maker/RootCA/Root.cer": ROOT.certificate,
    "Maker/IntermediateCA/Both.crt#1": CA.certificate,
    "Maker/IntermediateCA/Both.crt#2": ROOT.certificate,
}


def _check_source(path: Path, kind: str) -> castore.Source:
    source = read_source(path)
    assert source.kind == kind
    assert {blob.name: blob.der for blob in source.found} == FOUND
    assert source.ignored == ("setup.cmd",)
    assert sorted(name for name, _ in source.faults) == [
        "Maker/IntermediateCA/junk.der",
        "Maker/IntermediateCA/none.pem",
    ]
    return source


def test_directory_is_read_with_all_below_it(tmp_path: Path) -> None:
    for name, content in FILES.items():
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    secret = tmp_path / "secret.pem"
    secret.write_bytes(pem(LEAF))
    (tmp_path / "in" / "link.pem").symlink_to(secret)
    os.mkfifo(tmp_path / "in" / "pipe.pem")
    assert _check_source(tmp_path / "in", "directory").sha256 == ""


def test_cabinet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "TrustedTpm.cab"
    path.write_bytes(make_cabinet(FILES))
    source = _check_source(path, "cabinet")
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.write_bytes(b"all makers\n" + pem(ROOT.certificate, CA.certificate))
    assert [blob.name for blob in read_source(path).found] == ["bundle#1", "bundle#2"]
    path.write_bytes(ROOT.certificate)
    assert read_source(path).found == (Blob("bundle", ROOT.certificate),)
    path.write_bytes(b"")
    [(name, reason)] = read_source(path).faults
    assert (name, "ends early" in reason) == ("bundle", True)
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    assert "unexpected PEM block" in read_source(path).faults[0][1]


def test_source_that_is_not_there_or_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotReadyError, match="cannot be read"):
        read_source(tmp_path / "none")
    (tmp_path / "a.cab").write_bytes(b"MSCF")
    with pytest.raises(InvalidInputError, match="cabinet"):
        read_source(tmp_path / "a.cab")
    monkeypatch.setattr(castore, "_MAX_FILES", 0)
    with pytest.raises(InvalidInputError, match="more than 0 files"):
        read_source(tmp_path)


# --- verdicts ---------------------------------------------------------------------------------


def _ca(text: str = "Odd CA", **changes: object) -> bytes:
    spec = replace(ca_spec(text, make_key("secp256r1").public_key()), **changes)  # type: ignore[arg-type]
    return ROOT.child(text, make_key("secp256r1"), spec).certificate


def _only(raw: bytes, *others: bytes) -> Judged:
    blobs = [Blob("it", raw), *(Blob(f"other {n}", one) for n, one in enumerate(others))]
    return judge(blobs, NOW)[0]


def _with(*extensions: bytes) -> bytes:
    usage = ekca.key_usage(ekca.KEY_CERT_SIGN)
    return _ca(extensions=[ekca.basic_constraints(ca=True), usage, *extensions])


REFUSED = {
    "leaf": (LEAF, "not a CA certificate"),
    "may not sign": (
        _ca(extensions=[ekca.basic_constraints(ca=True), ekca.key_usage(ekca.CRL_SIGN)]),
        "key usage",
    ),
    "attestation keys": (
        _with(ekca.eku("1.3.6.1.4.1.311.21.36", "2.23.133.8.3")),
        "not for endorsement keys: its extended key usage is 1.3.6.1.4.1.311.21.36, 2.23.133.8.3",
    ),
    "critical extension": (
        _with(ekca.extension("1.2.3", b"\x05\x00", critical=True)),
        "critical extension 1.2.3",
    ),
    "malformed extended key usage": (
        _with(ekca.extension(ekca.EKU, b"\x05\x00")),
        "extended key usage",
    ),
    "faulty generator": (
        _ca(
            spki=ekca.tlv(
                0x30,
                ekca.tlv(0x30, ekca.oid("1.2.840.113549.1.1.1"), b"\x05\x00"),
                ekca.tlv(
                    0x03,
                    b"\x00" + ekca.tlv(0x30, ekca.integer(roca_modulus()), ekca.integer(65537)),
                ),
            )
        ),
        "CVE-2017-15361",
    ),
    "not a certificate": (b"\x30\x00", "not a certificate"),
    "another's signature": (
        EkCa(ROOT.subject, make_key("secp256r1"), b"").issue(
            ca_spec("Odd CA", make_key("secp256r1").public_key())
        ),
        "its issuer's key did not sign it",
    ),
    "self-issued, not self-signed": (
        EkCa(ekca.common_name("Odd"), make_key("secp256r1"), b"").issue(
            ca_spec("Odd", make_key("secp256r1").public_key())
        ),
        "not signed with its own key",
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_vouch_for_a_tpm_is_refused_with_its_reason(row: str) -> None:
    raw, words = REFUSED[row]
    found = _only(raw, ROOT.certificate)
    assert found.kind is Kind.REFUSED
    assert words in found.reason
    assert not found.is_taken


def test_roots_intermediates_and_copies_are_told_apart() -> None:
    blobs = [Blob("r", ROOT.certificate), Blob("c", CA.certificate), Blob("r2", ROOT.certificate)]
    found = judge(blobs, NOW)
    assert [one.kind for one in found] == [Kind.ROOT, Kind.INTERMEDIATE, Kind.DUPLICATE]
    assert found[2].reason == "same as r"
    assert found[0].notes == found[1].notes == ()
    values = found[1].values()
    assert values["subject"] == "CN=Vendor EK CA"
    assert values["issuer"] == "CN=Vendor Root"
    assert values["key"] == "secp256r1"
    assert values["fingerprint"] == hashlib.sha256(CA.certificate).hexdigest()
    assert found[1].file_name == f"Vendor-EK-CA-{values['fingerprint'][:16]}.pem"  # type: ignore[index]


@pytest.mark.parametrize(
    ("raw", "note"),
    [
        (_ca(not_after=ekca.utc("20251020")), "expired 2025-10-20"),
        (_ca(not_before=ekca.utc("20270101")), "not valid before 2027-01-01"),
        (_ca(hash="sha1"), "signed with SHA-1: sha1_ca_fingerprints has to list "),
        (Vendor.make("Stranger").intermediate.certificate, "its issuer is not among them"),
    ],
)
def test_what_is_taken_with_a_note(raw: bytes, note: str) -> None:
    found = _only(raw, ROOT.certificate)
    assert found.kind is Kind.INTERMEDIATE
    assert note in " ".join(found.notes)


def test_purpose_of_endorsement_keys_is_taken() -> None:
    for purpose in ("2.23.133.8.1", "2.5.29.37.0"):
        assert _only(_with(ekca.eku("1.2.3", purpose)), ROOT.certificate).is_taken


def test_hostile_names_make_harmless_files() -> None:
    for text in ("../../etc/passwd", "\n\x1b[31m", "a" * 500, "", "…"):
        found = _only(_ca(subject=ekca.common_name(text)), ROOT.certificate)
        assert found.file_name.isascii()
        assert "/" not in found.file_name
        assert not found.file_name.startswith((".", "-"))
        assert len(found.file_name) < 110
        assert str(found.values()["subject"]).isprintable()


def test_certificate_is_written_whole_and_once(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "roots"
    assert write_certificate(folder, "a.pem", ROOT.certificate, "CN=Root")
    assert not write_certificate(folder, "a.pem", ROOT.certificate, "CN=Root")
    assert [file.name for file in folder.iterdir()] == ["a.pem"]
    assert (folder / "a.pem").stat().st_mode & 0o777 == 0o644
    assert (folder / "a.pem").read_bytes().startswith(b"# CN=Root\n-----BEGIN")
    [anchor] = load_roots(tmp_path / "out").anchors
    assert anchor.der == parse_certificate(ROOT.certificate).der
    (folder / "b.pem").mkdir()
    with pytest.raises(NotReadyError, match=r"cannot write .*b\.pem"):
        write_certificate(folder, "b.pem", ROOT.certificate, "x")
    assert sorted(file.name for file in folder.iterdir()) == ["a.pem", "b.pem"]

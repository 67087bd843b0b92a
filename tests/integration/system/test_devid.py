"""LDevIDs for attested nodes, by the commands of both programs."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from spire_hw.key import spki_der
from spire_hw.tpm.public import parse_public
from spire_hw_sim.nodepki import PEM, Holder, make_root
from spire_hw_sim.programs import command_line
from tests.integration.tpm.leaks import loaded

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_sim.site import Node, Site
    from spire_hw_sim.swtpm import Swtpm


def agent(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the agent's program."""
    return subprocess.run(  # noqa: S603 - our own program
        command_line("spire-hw-agent", *arguments),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def create(tpm: Swtpm, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    where = ("-tcti", tpm.tcti, "-out", folder, "-commonName", "as-asked")
    return agent("tpm", "devid", "create", *where, *more)


class Office:
    """A provisioning CA with its files."""

    def __init__(self, site: Site, folder: Path, authority: Holder) -> None:
        self.site = site
        self.out = folder / "devid.crt.pem"
        self.certificate, self.key = authority.write(folder, "ca")

    def issue(self, request: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return self.site.try_command(
            *("tpm", "devid", "issue", "-request", request, "-commonName", "web-1"),
            *("-caCert", self.certificate, "-caKey", self.key, "-out", self.out, *more),
        )


@pytest.fixture
def office(site: Site, tmp_path: Path) -> Office:
    return Office(site, tmp_path, make_root("DevID Root").below(path_length=0))


@pytest.mark.parametrize("key_type", ["ec-p256", "rsa-2048"])
def test_an_attested_node_gets_a_devid(
    node: Node, office: Office, tmp_path: Path, key_type: str
) -> None:
    folder = tmp_path / "devid"
    done = create(node.tpm, folder, "-keyType", key_type)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == [
        "devid.csr.pem",
        "devid.priv.blob",
        "devid.pub.blob",
        "devid.request.json",
    ]
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}
    done = office.issue(folder / "devid.request.json")
    assert done.returncode == 0, done.stderr
    assert node.id in done.stdout
    leaf, issuer = x509.load_pem_x509_certificates(office.out.read_bytes())
    leaf.verify_directly_issued_by(issuer)
    names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert [name.value for name in names] == ["web-1"]
    public = parse_public((folder / "devid.pub.blob").read_bytes())
    assert spki_der(leaf.public_key()) == public.spki  # type: ignore[arg-type]
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    again = create(node.tpm, folder)
    assert again.returncode != 0
    assert "is not replaced" in again.stderr
    assert loaded(node.tpm) == []


def test_a_tpm_nobody_attested_with_gets_none(site: Site, office: Office, tmp_path: Path) -> None:
    stranger = site.power_on("devid-stranger")
    assert create(stranger, tmp_path / "devid").returncode == 0
    done = office.issue(tmp_path / "devid" / "devid.request.json")
    assert done.returncode == 5
    assert "no node attested with the attestation key" in done.stderr
    assert not office.out.exists()


def test_requests_that_were_tampered_with_get_none(
    node: Node, office: Office, tmp_path: Path
) -> None:
    for name in "ab":
        assert create(node.tpm, tmp_path / name).returncode == 0
    mine, other = (tmp_path / n / "devid.request.json" for n in "ab")
    lines, others = mine.read_text().splitlines(), other.read_text().splitlines()
    for swapped in ("csr", "public", "attest", "signature"):
        mixed = [o if f'"{swapped}"' in o else k for k, o in zip(lines, others, strict=True)]
        bad = tmp_path / "bad.json"
        bad.write_text("\n".join(mixed))
        done = office.issue(bad)
        assert done.returncode == 2, swapped
        assert not office.out.exists()


def test_authorities_that_are_none_issue_nothing(site: Site, node: Node, tmp_path: Path) -> None:
    assert create(node.tpm, tmp_path / "devid").returncode == 0
    request = tmp_path / "devid" / "devid.request.json"
    root = make_root("DevID Root")
    leaf = Office(site, tmp_path, root.issue())
    assert "not that of a CA" in leaf.issue(request).stderr
    mixed = Office(site, tmp_path, root)
    mixed.key.write_bytes(
        root.issue().key.private_bytes(
            PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    assert "not that of the provisioning CA" in mixed.issue(request).stderr
    mixed.key.write_bytes(b"nothing")
    assert "holds no private key" in mixed.issue(request).stderr
    assert not mixed.out.exists()


def test_what_is_missing_is_told(site: Site, tmp_path: Path) -> None:
    done = site.try_command("tpm", "devid", "issue", "-out", tmp_path / "x")
    assert done.returncode == 2
    assert "-request, -commonName, -caCert, -caKey" in done.stderr
    assert agent("tpm", "devid", "create").returncode == 2


@pytest.mark.parametrize(
    ("state", "words"), [("quarantine", "is in quarantine"), ("ban", "is banned")]
)
def test_a_node_that_is_banned_or_in_quarantine_gets_none(
    site: Site, office: Office, tmp_path: Path, state: str, words: str
) -> None:
    tpm = site.power_on(f"devid-{state}")
    site.enrol(tpm)
    node = site.node(f"devid-{state}", tpm=tpm)
    node.start()
    node.wait_in_use()
    assert create(tpm, tmp_path / "devid").returncode == 0
    site.command("agent", state, "-spiffeID", node.id)
    done = office.issue(tmp_path / "devid" / "devid.request.json")
    assert done.returncode == 4
    assert words in done.stderr
    assert not office.out.exists()
    node.agent.kill()

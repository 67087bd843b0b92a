"""Whose DevID certificates count: directories of authorities, revocation, and files that change."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.config.hcl import parse
from spire_hw.errors import AttestationError, ConfigError, ErrorKind, InvalidInputError
from spire_hw.tpm.certificate import parse_certificate
from spire_hw_sim import ekca
from spire_hw_sim.again import refused
from spire_hw_sim.devidnode import DevIdLab, pem_of
from spire_hw_sim.ekca import CrlSpec, EkCa
from spire_hw_sim.nodepki import PEM, Holder, make_root

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_sim.devidnode import DevIdNode

pytestmark = pytest.mark.asyncio
PD, UN = ErrorKind.PERMISSION_DENIED, ErrorKind.UNAVAILABLE
MINUTES = timedelta(minutes=2)
CA = ("key_cert_sign", "crl_sign")
RAN_OUT = ekca.utc("20250301")


@pytest_asyncio.fixture
async def lab(tmp_path: Path) -> DevIdLab:
    made = await DevIdLab.make(tmp_path)
    made.root = make_root("DevID Root", usage=CA)
    (tmp_path / "devid.pem").write_bytes(made.root.certificate.public_bytes(PEM))
    return made


async def configure(lab: DevIdLab, directory: Path, more: str = "", **paths: Path) -> None:
    wanted = {
        "devid_ca_path": directory / "devid.pem",
        "endorsement_ca_path": directory / "makers.pem",
        **paths,
    }
    text = "\n".join(f'{name} = "{path}"' for name, path in wanted.items())
    await lab.server.configure(parse(f"{text}\n{more}"))


def crl_of(issuer: Holder, *serials: int, **spec: bytes) -> bytes:
    subject = issuer.certificate.subject.public_bytes()
    made = CrlSpec(list(serials), **spec)  # type: ignore[arg-type]
    return EkCa(subject, issuer.key, issuer.der).issue_crl(made)


def serial_of(der: bytes) -> int:
    return parse_certificate(der).serial


def folders(directory: Path, roots: list[Holder], intermediates: list[Holder]) -> Path:
    for name, holders in (("roots", roots), ("intermediates", intermediates)):
        (directory / name).mkdir(parents=True)
        for number, holder in enumerate(holders):
            text = holder.certificate.public_bytes(PEM)
            (directory / name / f"{number}.pem").write_bytes(text)
    return directory


def node_of(lab: DevIdLab, issuer: Holder, *, sends_chain: bool) -> DevIdNode:
    node = lab.node(issuer=issuer)
    if not sends_chain:
        node.chain = node.chain[:1]
    return node


def is_code(error: object, code: str, kind: ErrorKind) -> None:
    assert isinstance(error, AttestationError), error
    assert [finding.code for finding in error.findings] == [code]
    assert error.kind is kind


async def test_intermediates_may_be_here_or_come_with_the_node(
    lab: DevIdLab, tmp_path: Path
) -> None:
    upper = lab.root.below(common_name="Upper", usage=CA)
    lower = upper.below(common_name="Lower", usage=CA)
    unused = [lab.root.below(common_name=f"Site {number}") for number in range(40)]
    store = folders(tmp_path / "store", [lab.root], [upper, lower, *unused])
    for short in (True, False):
        node = node_of(lab, lower, sends_chain=not short)
        await configure(lab, tmp_path, devid_ca_path=store)
        made = await lab.attest(node)
        assert made.selector_values.count("issuer:cn:Lower") == 1
        # The node's certificate, both intermediates and the root, wherever they came from.
        assert len([v for v in made.selector_values if v.startswith("ca:fingerprint:")]) == 3
        await configure(lab, tmp_path)
        if short:
            is_code(await refused(lambda n=node: lab.attest(n)), "devid_untrusted", PD)
        else:
            await lab.attest(node)


async def test_an_intermediate_ends_no_path(lab: DevIdLab, tmp_path: Path) -> None:
    stranger = make_root("Stranger", usage=CA)
    below = stranger.below(common_name="Theirs", usage=CA)
    store = folders(tmp_path / "store", [lab.root], [below, stranger])
    await configure(lab, tmp_path, devid_ca_path=store)
    for issuer in (below, stranger):
        node = node_of(lab, issuer, sends_chain=True)
        is_code(await refused(lambda n=node: lab.attest(n)), "devid_untrusted", PD)
    await lab.attest(lab.node())


async def test_a_revoked_devid_is_denied_and_others_are_not(lab: DevIdLab, tmp_path: Path) -> None:
    issuer = lab.root.below(usage=CA)
    gone, other = (node_of(lab, issuer, sends_chain=True) for _ in range(2))
    crls = tmp_path / "crls"
    crls.mkdir()
    (crls / "issuer.crl").write_bytes(crl_of(issuer, serial_of(gone.chain[0])))
    (crls / "root.crl").write_bytes(crl_of(lab.root))
    await configure(lab, tmp_path, "devid_crl_required = true", devid_crl_path=crls)
    error = await refused(lambda: lab.attest(gone))
    is_code(error, "devid_revoked", PD)
    assert error.message == "devid: certificate is revoked [devid_revoked]"
    assert lab.admitted == []
    await lab.attest(other)


async def test_a_revoked_intermediate_is_denied(lab: DevIdLab, tmp_path: Path) -> None:
    issuer = lab.root.below(usage=CA)
    (tmp_path / "a.crl").write_bytes(crl_of(lab.root, issuer.certificate.serial_number))
    await configure(lab, tmp_path, devid_crl_path=tmp_path / "a.crl")
    node = node_of(lab, issuer, sends_chain=True)
    is_code(await refused(lambda: lab.attest(node)), "devid_revoked", PD)
    await lab.attest(lab.node())


async def test_a_path_around_what_is_revoked_counts_alone(lab: DevIdLab, tmp_path: Path) -> None:
    """One key with certificates of two roots, of which one took its word back."""
    second = make_root("Second Root", usage=CA)
    first = lab.root.below(common_name="Shared", usage=CA)
    again = second.below(key=first.key, common_name="Shared", usage=CA)
    both = Holder(first.key, first.certificate, (again.certificate,))
    node = lab.node(issuer=both)
    folders(tmp_path / "store", [lab.root, second], [])
    (tmp_path / "a.crl").write_bytes(crl_of(lab.root, first.certificate.serial_number))
    await configure(lab, tmp_path, devid_ca_path=tmp_path / "store")
    assert len((await lab.attest(node)).selector_values) == 2 + 4
    await configure(
        lab, tmp_path, devid_ca_path=tmp_path / "store", devid_crl_path=tmp_path / "a.crl"
    )
    # The root that took its word back gives no selector either.
    assert len((await lab.attest(node)).selector_values) == 2 + 2


@pytest.mark.parametrize("row", ["ran out", "another key", "missing", "not for lists"])
async def test_an_unknown_state_may_be_tried_again(lab: DevIdLab, tmp_path: Path, row: str) -> None:
    crls = tmp_path / "crls"
    crls.mkdir()
    more = "devid_crl_required = true" if row == "missing" else ""
    if row == "ran out":
        (crls / "a.crl").write_bytes(crl_of(lab.root, next_update=RAN_OUT))
    elif row == "another key":
        (crls / "a.crl").write_bytes(crl_of(make_root("DevID Root", usage=CA)))
    elif row == "not for lists":
        lab.root = make_root("DevID Root")
        (tmp_path / "devid.pem").write_bytes(lab.root.certificate.public_bytes(PEM))
        (crls / "a.crl").write_bytes(crl_of(lab.root))
    await configure(lab, tmp_path, more, devid_crl_path=crls)
    error = await refused(lambda: lab.attest(lab.node()))
    is_code(error, "devid_revocation_unknown", UN)
    assert error.message == "devid: revocation state is not known [devid_revocation_unknown]"
    if row != "not for lists":
        (crls / "new.crl").write_bytes(crl_of(lab.root))
        await lab.clock.advance(MINUTES)
        await lab.attest(lab.node())


async def test_what_is_revoked_while_the_server_runs(lab: DevIdLab, tmp_path: Path) -> None:
    crl = tmp_path / "a.crl"
    crl.write_bytes(crl_of(lab.root))
    await configure(lab, tmp_path, devid_crl_path=crl)
    node = lab.node()
    await lab.attest(node)
    draft = tmp_path / "draft"
    draft.write_bytes(crl_of(lab.root, serial_of(node.chain[0])))
    draft.replace(crl)
    await lab.clock.advance(MINUTES)
    is_code(await refused(lambda: lab.attest(node)), "devid_revoked", PD)
    # A spoilt list takes nothing back.
    crl.write_bytes(b"spoilt")
    await lab.clock.advance(MINUTES)
    is_code(await refused(lambda: lab.attest(node)), "devid_revoked", PD)
    await lab.attest(lab.node())


async def test_authorities_come_and_go_while_the_server_runs(lab: DevIdLab, tmp_path: Path) -> None:
    await configure(lab, tmp_path)
    old, new = lab.node(), make_root("New Root", usage=CA)
    await lab.attest(old)
    is_code(await refused(lambda: lab.attest(lab.node(issuer=new))), "devid_untrusted", PD)
    (tmp_path / "devid.pem").write_bytes(new.certificate.public_bytes(PEM))
    await lab.clock.advance(MINUTES)
    await lab.attest(lab.node(issuer=new))
    is_code(await refused(lambda: lab.attest(old)), "devid_untrusted", PD)
    (tmp_path / "makers.pem").write_bytes(pem_of(ekca.EkCa.root("X", new.key).certificate))
    await lab.clock.advance(MINUTES)
    is_code(await refused(lambda: lab.attest(lab.node(issuer=new))), "ek_untrusted", PD)


async def test_makers_as_a_directory_and_their_revocations(lab: DevIdLab, tmp_path: Path) -> None:
    vendor = lab.vendor
    makers = tmp_path / "makers"
    for name, ca in (("roots", vendor.root), ("intermediates", vendor.intermediate)):
        (makers / name).mkdir(parents=True)
        (makers / name / "a.pem").write_bytes(pem_of(ca.certificate))
    await configure(lab, tmp_path, endorsement_ca_path=makers)
    node = lab.node()
    node.ek_chain = ()
    await lab.attest(node)
    spec = CrlSpec([serial_of(node.ek_certificate)])
    (tmp_path / "ek.crl").write_bytes(vendor.intermediate.issue_crl(spec))
    await configure(lab, tmp_path, endorsement_ca_path=makers, crl_path=tmp_path / "ek.crl")
    error = await refused(lambda: lab.attest(node))
    is_code(error, "ek_revoked", PD)
    other = lab.node()
    await lab.attest(other)
    more = "crl_required = true"
    await configure(lab, tmp_path, more, endorsement_ca_path=makers, crl_path=tmp_path / "ek.crl")
    is_code(await refused(lambda: lab.attest(other)), "ek_revocation_unknown", UN)


async def test_settings_that_cannot_be_meant(lab: DevIdLab, tmp_path: Path) -> None:
    for key in ("crl_required", "devid_crl_required"):
        needs = key.replace("required", "path")
        with pytest.raises(ConfigError, match=f'"{key}": needs {needs}'):
            await configure(lab, tmp_path, f"{key} = true")
    with pytest.raises(ConfigError, match="SHA-256 in hexadecimal"):
        await configure(lab, tmp_path, 'sha1_ca_fingerprints = ["ab"]')
    (tmp_path / "a.crl").write_bytes(b"no list")
    with pytest.raises(InvalidInputError, match=r"a\.crl"):
        await configure(lab, tmp_path, devid_crl_path=tmp_path / "a.crl")
    await configure(lab, tmp_path, f'sha1_ca_fingerprints = ["{"AB" * 32}"]')
    await lab.attest(lab.node())

"""Keys their maker or the mathematics disowned, and foreign chains."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spire_hw.errors import AttestationError, ErrorKind, InvalidInputError, SpireHwError
from spire_hw.tpm.certificate import parse_certificate
from spire_hw_sim import ekca
from spire_hw_sim.ekca import CrlSpec, EkCa, ca_spec, ek_spec, tlv
from spire_hw_sim.softtpm import SoftTpm, make_ek, make_key
from spire_hw_sim.tpmlab import Lab, ListedEks
from spire_hw_sim.tpmnode import TpmNode, Vendor
from spire_hw_sim.weakkeys import roca_modulus

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.asyncio
IA, PD, UN = ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED, ErrorKind.UNAVAILABLE


def _codes(error: SpireHwError) -> list[str]:
    assert isinstance(error, AttestationError)
    return [finding.code for finding in error.findings]


async def _lab(
    directory: Path, *crls: bytes, vendor: Vendor, settings: str = "", listed: str = ""
) -> Lab:
    folder = directory / "crls"
    folder.mkdir(exist_ok=True)
    for number, crl in enumerate(crls):
        (folder / f"{number}.crl").write_bytes(crl)
    (folder / "README").write_text("not a list")
    return await Lab.make(
        directory,
        f'crl_path = "{folder}"\n{settings}',
        vendor=vendor,
        ek_list=ListedEks({listed}),
    )


def _node(vendor: Vendor) -> tuple[TpmNode, int]:
    """Return a node and the serial of its certificate."""
    node = vendor.equip(TpmNode(SoftTpm(ek=make_ek("L-2"))))
    assert node.certificate is not None
    return node, parse_certificate(node.certificate).serial


async def test_revoked_key_is_denied_and_others_are_not(tmp_path: Path) -> None:
    vendor = Vendor.make()
    node, serial = _node(vendor)
    lab = await _lab(
        tmp_path,
        vendor.intermediate.issue_crl(CrlSpec([serial])),
        vendor.root.issue_crl(CrlSpec()),
        vendor=vendor,
        settings="crl_required = true\n",
    )
    error = await lab.refusal(node)
    assert error.kind is PD
    assert error.message == "ek: certificate is revoked [ek_revoked]"


async def test_revoked_intermediate_is_denied(tmp_path: Path) -> None:
    vendor = Vendor.make()
    serial = parse_certificate(vendor.intermediate.certificate).serial
    lab = await _lab(tmp_path, vendor.root.issue_crl(CrlSpec([serial])), vendor=vendor)
    error = await lab.refused(_node(vendor)[0])
    assert _codes(error) == ["ek_revoked"]


@pytest.mark.parametrize("policy", ["ca_or_hash", "ca_and_hash"])
async def test_enrolment_does_not_make_up_for_revocation(tmp_path: Path, policy: str) -> None:
    vendor = Vendor.make()
    node, serial = _node(vendor)
    crl = vendor.intermediate.issue_crl(CrlSpec([serial]))
    text = f'ek_policy = "{policy}"\n'
    lab = await _lab(tmp_path, crl, vendor=vendor, settings=text, listed=node.ek_hash)
    error = await lab.refused(node)
    assert _codes(error) == ["ek_revoked"]
    assert error.kind is PD


UNKNOWN = {
    "ran out": CrlSpec(next_update=ekca.utc("20250301")),
    "delta": CrlSpec(extensions=[ekca.extension(ekca.DELTA_CRL, ekca.integer(1), critical=True)]),
}


@pytest.mark.parametrize("row", [*UNKNOWN, "another key", "missing"])
async def test_unknown_state_may_be_tried_again(tmp_path: Path, row: str) -> None:
    vendor = Vendor.make()
    crls = [vendor.root.issue_crl(CrlSpec())]
    if row in UNKNOWN:
        crls.append(vendor.intermediate.issue_crl(UNKNOWN[row]))
    elif row == "another key":
        stranger = EkCa(vendor.intermediate.subject, make_key("secp256r1"), b"")
        crls.append(stranger.issue_crl(CrlSpec()))
    text = "crl_required = true\n" if row == "missing" else ""
    lab = await _lab(tmp_path, *crls, vendor=vendor, settings=text)
    node, _ = _node(vendor)
    error = await lab.refused(node)
    assert error.kind is UN
    assert error.message == "ek: revocation state is not known [ek_revocation_unknown]"
    (tmp_path / "crls" / "new.pem").write_bytes(vendor.intermediate.issue_crl(CrlSpec()))
    assert (await lab.refused(node)).kind is UN
    await lab.clock.advance(timedelta(minutes=2))
    await lab.attest(node)


async def test_unknown_state_does_not_hide_an_enrolment(tmp_path: Path) -> None:
    vendor = Vendor.make()
    node, _ = _node(vendor)
    text = 'crl_required = true\nek_policy = "ca_or_hash"\n'
    lab = await _lab(tmp_path, vendor=vendor, settings=text, listed=node.ek_hash)
    made = await lab.attest(node)
    assert "ek:method:hash" in made.selector_values
    assert "ek:method:ca" not in made.selector_values


async def test_spoilt_list_keeps_what_was_read(tmp_path: Path) -> None:
    vendor = Vendor.make()
    node, serial = _node(vendor)
    crl = vendor.intermediate.issue_crl(CrlSpec([serial]))
    lab = await _lab(tmp_path, crl, vendor=vendor)
    for spoil in (b"junk", b""):
        (tmp_path / "crls" / "0.crl").write_bytes(spoil)
        await lab.clock.advance(timedelta(minutes=2))
        error = await lab.refused(node)
        assert _codes(error) == ["ek_revoked"]
    (tmp_path / "crls" / "0.crl").unlink()
    await lab.clock.advance(timedelta(minutes=2))
    await lab.attest(node)


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"-----BEGIN X509 CRL-----\n", bytes((2 << 20) + 1)]
)
async def test_bad_list_at_start_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InvalidInputError, match=r"0\.crl"):
        await _lab(tmp_path, content, vendor=Vendor.make())


# --- weak and foreign keys --------------------------------------------------------------------


def _rsa_spki(modulus: int) -> bytes:
    algorithm = tlv(0x30, ekca.oid("1.2.840.113549.1.1.1"), b"\x05\x00")
    numbers = tlv(0x30, ekca.integer(modulus), ekca.integer(65537))
    return tlv(0x30, algorithm, tlv(0x03, b"\x00" + numbers))


@pytest.mark.parametrize("where", ["certificate", "public area", "chain"])
async def test_key_of_the_faulty_generator_is_denied(tmp_path: Path, where: str) -> None:
    vendor, modulus = Vendor.make(), roca_modulus()
    lab = await _lab(tmp_path, vendor=vendor, settings='ek_policy = "ca_or_hash"\n')
    node = vendor.equip(TpmNode(SoftTpm(ek=make_ek("L-1"))))
    honest = make_ek("L-1").private.public_key().public_numbers().n  # type: ignore[union-attr]
    data = node.data()
    if where == "certificate":
        spec = replace(ek_spec(node.tpm.ek.private.public_key()), spki=_rsa_spki(modulus))
        data = replace(data, ek_certificate=vendor.intermediate.issue(spec))
    elif where == "public area":
        old, new = (n.to_bytes(256, "big") for n in (honest, modulus))
        data = replace(data, ek_pub=node.tpm.ek.public.replace(old, new), ek_certificate=None)
    else:
        spec = replace(ca_spec("CA", make_key("secp256r1").public_key()), spki=_rsa_spki(modulus))
        data = replace(data, ek_chain=(*node.chain, vendor.root.issue(spec)))
    error = await lab.refusal(node, data=lambda _: data)
    assert _codes(error) == ["ek_weak"]
    assert error.kind is PD
    assert "CVE-2017-15361" in error.message


OTHER_KEYS = {
    "P-224": ec.generate_private_key(ec.SECP224R1()),
    "brainpool": ec.generate_private_key(ec.BrainpoolP256R1()),
    "DSA": dsa.generate_private_key(2048),
}


@pytest.mark.parametrize("row", OTHER_KEYS)
async def test_key_of_another_kind_is_refused(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    spki = OTHER_KEYS[row].public_key()
    spec = replace(
        ek_spec(node.tpm.ek.private.public_key()),
        spki=spki.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    )
    node.certificate = lab.vendor.intermediate.issue(spec)
    error = await lab.refusal(node)
    assert error.kind is IA
    assert "key type is not supported" in error.message


async def test_chain_of_another_tpm_does_not_help(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    # A CA in the other TPM's firmware, below the same root, as on-die CAs are.
    other = lab.vendor.root.child("On-die CA", make_key("secp384r1"))
    node.chain = (other.certificate,)
    error = await lab.refusal(node)
    assert error.message == "ek: issuer is not trusted [ek_untrusted]"
    twin = lab.vendor.root.child("Vendor EK CA", make_key("secp256r1"))
    node.chain = (twin.certificate,)
    assert _codes(await lab.refusal(node)) == ["ek_untrusted"]
    node.chain = (twin.certificate, *lab.node().chain)
    await lab.attest(node)


def _count(folder: Path) -> int:
    return len(list(folder.iterdir()))


async def test_addresses_in_a_certificate_are_not_followed(tmp_path: Path) -> None:
    calls: asyncio.Queue[int] = asyncio.Queue()

    async def called(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.put_nowait(writer.get_extra_info("peername")[1])
        writer.close()

    server = await asyncio.start_server(called, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    lab = await Lab.make(tmp_path)
    node = lab.node()
    files = _count(tmp_path)
    for host in (f"http://127.0.0.1:{port}", f"http://u:p@localhost:{port}", "file:///etc"):
        spec = ek_spec(node.tpm.ek.private.public_key())
        where = tlv(0x86, f"{host}/ca.cer".encode())
        issuers = tlv(0x30, tlv(0x30, ekca.oid("1.3.6.1.5.5.7.48.2"), where))
        spec.extensions += [
            ekca.extension("1.3.6.1.5.5.7.1.1", issuers),
            ekca.crl_points(f"{host}/ca.crl"),
        ]
        stranger = Vendor.make("Stranger").intermediate
        node.certificate = stranger.issue(spec)
        assert _codes(await lab.refusal(node)) == ["ek_untrusted"]
    # Connections are taken in their order: the first one is ours.
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await calls.get() == writer.get_extra_info("sockname")[1]
    writer.close()
    server.close()
    await server.wait_closed()
    assert _count(tmp_path) == files

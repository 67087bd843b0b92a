"""What makers really put into their TPMs is accepted, and nothing near it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import AttestationError
from spire_hw.tpm.caimport import Blob, judge
from spire_hw.tpm.castore import load_roots, write_certificate
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.tpm.crl import Revocations, parse_crl
from spire_hw.tpm.ekcert import verify_ek_certificate
from spire_hw_sim.ekca import CrlSpec, EkCa
from spire_hw_sim.makers import SHAPES, Maker, make_maker
from spire_hw_sim.softtpm import SoftTpm, make_ak, make_ek
from spire_hw_sim.tpmlab import Lab
from spire_hw_sim.tpmnode import TpmNode, Vendor

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 6, 1, tzinfo=UTC)
KINDS = [(name, label) for name, labels in SHAPES.items() for label in labels]


def _store(maker: Maker, folder: Path, *, with_intermediates: bool) -> Path:
    """Import what a maker publishes, as an operator would."""
    published = [maker.published[: len(maker.root.certificate)]]
    published += [ca.certificate for ca in maker.between] if with_intermediates else []
    found = judge([Blob(str(n), raw) for n, raw in enumerate(published)], NOW)
    assert [one.reason for one in found] == [""] * len(published)
    assert [note for one in found for note in one.notes] == []
    for one in found:
        assert one.certificate is not None
        folder_name = "roots" if one.kind.value == "root" else "intermediates"
        write_certificate(folder / folder_name, one.file_name, one.certificate.der, "x")
    return folder


@pytest.mark.asyncio
@pytest.mark.parametrize(("name", "label"), KINDS)
@pytest.mark.parametrize("ak", ["secp256r1", "rsa2048"])
async def test_every_key_of_every_maker_attests(
    tmp_path: Path, name: str, label: str, ak: str
) -> None:
    maker = make_maker(name)
    store = _store(maker, tmp_path / "store", with_intermediates=not maker.in_nv)
    vendor = Vendor(maker.root, maker.between[-1])
    lab = await Lab.make(tmp_path, f'endorsement_ca_path = "{store}"\n', vendor=vendor)
    node = TpmNode(SoftTpm(ek=make_ek(label), ak=make_ak(ak)))
    node.certificate = maker.certify(node.tpm.ek.private.public_key())
    node.chain = maker.chain if maker.in_nv else ()
    made = await lab.attest(node)
    assert "ek:method:ca" in made.selector_values
    assert any(value.startswith("model:") for value in made.selector_values)


@pytest.mark.parametrize("name", SHAPES)
def test_another_signature_of_the_same_shape_is_refused(tmp_path: Path, name: str) -> None:
    maker = make_maker(name)
    roots = load_roots(_store(maker, tmp_path, with_intermediates=True))
    key = make_ek("L-1").private.public_key()
    good = parse_certificate(maker.certify(key))
    verify_ek_certificate(good, (), roots, NOW)
    forger = EkCa(maker.between[-1].subject, make_ak(_kind_like(maker)).private, b"")
    forged = Maker(maker.root, (forger,), maker.bend, b"")
    with pytest.raises(AttestationError, match="ek_untrusted"):
        verify_ek_certificate(parse_certificate(forged.certify(key)), (), roots, NOW)


def _kind_like(maker: Maker) -> str:
    key = maker.between[-1].key
    return f"rsa{key.key_size}" if hasattr(key, "decrypt") else "secp384r1"


@pytest.mark.parametrize("name", SHAPES)
def test_root_is_taken_as_it_is_published(tmp_path: Path, name: str) -> None:
    (tmp_path / "root.cer").write_bytes(make_maker(name).published)
    [anchor] = load_roots(tmp_path).anchors
    assert anchor.der == make_maker(name).root.certificate


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("revoked", [0, -1])
def test_any_certificate_of_a_path_can_be_revoked(tmp_path: Path, name: str, revoked: int) -> None:
    maker = make_maker(name)
    roots = load_roots(_store(maker, tmp_path, with_intermediates=True))
    leaf = parse_certificate(maker.certify(make_ek("L-1").private.public_key()))
    path = [*(parse_certificate(ca.certificate) for ca in maker.between), leaf]
    issuers = [maker.root, *maker.between]
    lists = [parse_crl(one.issue_crl(CrlSpec())) for one in issuers]
    verify_ek_certificate(leaf, (), roots, NOW, revocations=Revocations(lists, required=True))
    lists[revoked] = parse_crl(issuers[revoked].issue_crl(CrlSpec([path[revoked].serial])))
    with pytest.raises(AttestationError, match="ek_revoked"):
        verify_ek_certificate(leaf, (), roots, NOW, revocations=Revocations(lists, required=True))

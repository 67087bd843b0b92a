"""Which endorsement key is found, for what vendors put into a TPM."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.errors import AttestationError, NotReadyError
from spire_hw.tpm import endorsement, wire
from spire_hw.tpm.attest import activate as open_credential
from spire_hw.tpm.attest import create_attestation_key
from spire_hw.tpm.certificate import encode_pem
from spire_hw.tpm.credential import make_credential
from spire_hw.tpm.device import TpmDevice
from spire_hw.tpm.endorsement import EkType
from spire_hw.tpm.public import EK_TEMPLATES, check_ek, ek_hash, parse_public
from spire_hw_sim.makers import SHAPES, make_maker
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.tpm_command import ENDORSEMENT
from tests.integration.tpm.leaks import nothing_left_behind
from tests.integration.tpm.parties import Bench, attest, codes, node, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from spire_hw_sim.swtpm import Swtpm
    from tests.integration.tpm.conftest import Factory

pytestmark = pytest.mark.asyncio
TEMPLATES = {template.label: endorsement.default_template(template) for template in EK_TEMPLATES}


@pytest_asyncio.fixture
async def device(bare_tpm: Swtpm) -> AsyncIterator[TpmDevice]:
    device = TpmDevice(bare_tpm.tcti)
    yield device
    await device.close()


def equip(tpm: Swtpm, factory: Factory, template: bytes, index: int) -> bytes:
    """Certify the key of a template and store the certificate; return the key's TPMT_PUBLIC."""
    handle, public = tpm.commands.create_primary(ENDORSEMENT, template)
    tpm.commands.flush(handle)
    certificate = factory.manufacturer.issue(parse_public(public).key)
    tpm.commands.nv_store(index, certificate + b"\xff" * 30)
    return public


async def activate(device: TpmDevice, ek: endorsement.Endorsement) -> None:
    ak = await device.run("make AK", create_attestation_key)
    secret = secrets.token_bytes(32)
    sealed = make_credential(ek.parsed, ak.name, secret)
    opened = await device.run(
        "activate",
        lambda c: open_credential(c, ek, sealed.id_object, sealed.encrypted_secret),
    )
    assert opened == secret


@pytest.mark.parametrize("label", ["L-1", "L-2", "H-1", "H-2", "H-3", "H-4", "H-6"])
async def test_every_template_with_a_certificate_is_found_and_activates(
    device: TpmDevice, bare_tpm: Swtpm, factory: Factory, label: str
) -> None:
    public = equip(bare_tpm, factory, TEMPLATES[label], endorsement._CERTIFICATES[label])
    with nothing_left_behind(bare_tpm):
        ek = await device.run("find EK", endorsement.find_endorsement)
        assert (ek.label, ek.parsed.raw) == (label, public)
        assert check_ek(ek.parsed).label == label
        await activate(device, ek)


async def test_a_small_certified_key_goes_before_a_large_one(
    device: TpmDevice, bare_tpm: Swtpm, factory: Factory
) -> None:
    for label in ("L-1", "H-3"):
        equip(bare_tpm, factory, TEMPLATES[label], endorsement._CERTIFICATES[label])
    assert (await device.run("find EK", endorsement.find_endorsement)).label == "L-1"
    equip(bare_tpm, factory, TEMPLATES["L-2"], endorsement._CERTIFICATES["L-2"])
    assert (await device.run("find EK", endorsement.find_endorsement)).label == "L-2"


@pytest.mark.parametrize("nonce", [b"vendor nonce", bytes(range(32))])
async def test_a_vendors_nonce_is_taken_into_the_template(
    device: TpmDevice, bare_tpm: Swtpm, factory: Factory, nonce: bytes
) -> None:
    blank = wire.sized(bytes(32)) * 2
    template = TEMPLATES["L-2"].removesuffix(blank)
    template += wire.sized(nonce.ljust(32, b"\x00")) + wire.sized(bytes(32))
    public = equip(bare_tpm, factory, template, endorsement._CERTIFICATES["L-2"])
    bare_tpm.commands.nv_store(endorsement._NONCES["L-2"], nonce)
    with nothing_left_behind(bare_tpm):
        ek = await device.run("find EK", endorsement.find_endorsement)
        assert ek.parsed.raw == public
        await activate(device, ek)


@pytest.mark.parametrize(
    ("label", "template"),
    [
        ("L-2", TEMPLATES["L-2"][:-1] + b"\x01"),
        # The default has nothing there; a vendor may have put a number.
        ("H-2", TEMPLATES["H-2"][:-4] + wire.sized(b"\x01" * 32) + wire.sized(bytes(32))),
    ],
)
async def test_a_vendors_own_template_is_used(
    device: TpmDevice, bare_tpm: Swtpm, factory: Factory, label: str, template: bytes
) -> None:
    public = equip(bare_tpm, factory, template, endorsement._CERTIFICATES[label])
    bare_tpm.commands.nv_store(endorsement._OWN_TEMPLATES[label], template)
    ek = await device.run("find EK", endorsement.find_endorsement)
    assert (ek.label, ek.parsed.raw) == (label, public)


async def test_a_template_in_the_place_of_the_nonce_is_no_nonce(
    device: TpmDevice, bare_tpm: Swtpm, factory: Factory
) -> None:
    public = equip(bare_tpm, factory, TEMPLATES["L-2"], endorsement._CERTIFICATES["L-2"])
    bare_tpm.commands.nv_store(endorsement._NONCES["L-2"], TEMPLATES["L-2"])
    assert (await device.run("find EK", endorsement.find_endorsement)).parsed.raw == public


async def test_a_persistent_key_is_used_without_making_it_again(
    device: TpmDevice, bare_tpm: Swtpm, factory: Factory
) -> None:
    public = equip(bare_tpm, factory, TEMPLATES["L-1"], endorsement._CERTIFICATES["L-1"])
    handle, _ = bare_tpm.commands.create_primary(ENDORSEMENT, TEMPLATES["L-1"])
    bare_tpm.commands.persist(handle, 0x81010005)
    bare_tpm.commands.flush(handle)
    ek = await device.run("find EK", endorsement.find_endorsement)
    assert (ek.handle, ek.parsed.raw) == (0x81010005, public)
    await activate(device, ek)


async def test_an_empty_certificate_index_is_told(device: TpmDevice, bare_tpm: Swtpm) -> None:
    bare_tpm.commands.nv_store(endorsement._CERTIFICATES["L-2"], b"\xff" * 700)
    with pytest.raises(NotReadyError, match="0x01C0000A holds no certificate"):
        await device.run("find EK", endorsement.find_endorsement)


async def test_without_certificates_the_type_may_be_chosen(device: TpmDevice) -> None:
    labels = []
    for ek_type in EkType:
        wanted = ek_type
        ek = await device.run("find EK", lambda c: endorsement.find_endorsement(c, wanted))  # noqa: B023
        labels.append((ek_type, ek.label))
    assert labels == [
        (EkType.AUTO, "L-2"),
        (EkType.EC_P256, "L-2"),
        (EkType.EC_P384, "H-3"),
        (EkType.RSA_2048, "L-1"),
        (EkType.RSA_3072, "H-6"),
    ]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", list(EkKind))
async def test_every_kind_of_key_attests_by_its_certificate_and_chain(
    bench: Bench, bare_tpm: Swtpm, kind: EkKind, wrapped: bool
) -> None:
    maker = Manufacturer(levels=3)
    padding = 0 if wrapped else 40
    bare_tpm.extend_pcr(0, b"firmware")
    [made] = maker.equip(bare_tpm, (kind,), padding=padding, wrapped=wrapped)
    roots = bench.folder / "maker.pem"
    roots.write_bytes(maker.roots_pem())
    server = await serving(bench, endorsement_ca_path=str(roots))
    async with node(bench, bare_tpm) as n:
        found = await attest(n.agent, server, n.key)
    assert f"pub_hash:{ek_hash(made.public_key)}" in found.selector_values
    assert "ek:method:ca" in found.selector_values
    assert "key:tpm" in found.selector_values


async def test_a_chain_without_its_middle_is_refused(bench: Bench, bare_tpm: Swtpm) -> None:
    maker = Manufacturer(levels=3)
    maker.equip(bare_tpm, (EkKind.ECC_P384,), with_chain=False)
    roots = bench.folder / "maker.pem"
    roots.write_bytes(maker.roots_pem() + maker.intermediates_pem())
    server = await serving(bench, endorsement_ca_path=str(roots))
    async with node(bench, bare_tpm) as n:
        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, server, n.key)
    assert codes(caught.value) == ["ek_untrusted"]


@pytest.mark.parametrize("shape", SHAPES)
async def test_what_makers_put_into_their_tpms_attests(
    bench: Bench, bare_tpm: Swtpm, shape: str
) -> None:
    maker, label = make_maker(shape), SHAPES[shape][-1]
    handle, public = bare_tpm.commands.create_primary(ENDORSEMENT, TEMPLATES[label])
    bare_tpm.commands.flush(handle)
    certificate = maker.certify(parse_public(public).key)
    bare_tpm.commands.nv_store(endorsement._CERTIFICATES[label], certificate + bytes(60))
    known = [maker.root.certificate]
    if maker.in_nv:
        for number, one in enumerate(maker.chain):
            bare_tpm.commands.nv_store(0x01C00100 + number, one.ljust(800, b"\xff"))
    else:
        known += maker.chain
    bare_tpm.extend_pcr(0, b"firmware")
    path = bench.folder / "maker.pem"
    path.write_bytes(b"".join(map(encode_pem, known)))
    server = await serving(bench, endorsement_ca_path=str(path))
    async with node(bench, bare_tpm) as n:
        found = await attest(n.agent, server, n.key)
    assert "ek:method:ca" in found.selector_values

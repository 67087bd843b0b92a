"""Existing keys that are used as they are: found, judged, never replaced, never destroyed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import ConfigError, ErrorKind, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from spire_hw_sim.tokenrig import TokenRig

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(32)
OWNER = Owner("example.org", "server-1")
P256 = KeyType.EC_P256
NO_DERIVE = "EXTRACTABLE=False, DERIVE=False, DECRYPT=False"
BY_LABEL = {"import": {"x509-CA-A": {"label": "root 2026"}}}
BY_URI = {"import": {"x509-CA-A": {"uri": "pkcs11:token=spire;object=root%202026;id=%00%01"}}}


def make_root(rig: TokenRig, cka_id: bytes = b"\0\1", attributes: str = NO_DERIVE) -> None:
    rig.meddle(f"make('root 2026', {cka_id!r}, {attributes})")


@pytest.mark.parametrize("selector", [BY_LABEL, BY_URI])
@pytest.mark.asyncio
async def test_an_existing_key_signs_and_is_left_alone(
    rig: TokenRig, selector: dict[str, object]
) -> None:
    make_root(rig)
    before = rig.objects()
    manager = await rig.start(**selector)
    (key,) = await manager.get_public_keys()
    assert key.key_id == "x509-CA-A"
    made = await manager.sign_data("x509-CA-A", DIGEST, SHA256)
    verify_digest(key.public_key, DIGEST, made.signature, SHA256)
    assert "root 2026" in (await manager.key_evidence("x509-CA-A")).location
    with pytest.raises(SpireHwError, match="never replaced") as caught:
        await manager.generate_key("x509-CA-A", P256)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    await manager.generate_key("x509-CA-B", P256)
    await manager.generate_key("x509-CA-B", P256)
    await manager.close()
    again = await rig.start(**selector)
    assert {k.key_id for k in await again.get_public_keys()} == {"x509-CA-A", "x509-CA-B"}
    assert set(before) <= set(rig.objects())


@pytest.mark.asyncio
async def test_a_key_that_proves_nothing_needs_the_operators_word(rig: TokenRig) -> None:
    make_root(rig, attributes="EXTRACTABLE=True, DERIVE=False, DECRYPT=False")
    with pytest.raises(SpireHwError, match="violates policy: EXTRACTABLE") as caught:
        await rig.start(**BY_LABEL)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    manager = await rig.start(**BY_LABEL, accept_weak_keys=["x509-CA-A"])
    await manager.sign_data("x509-CA-A", DIGEST, SHA256)


@pytest.mark.asyncio
async def test_a_name_that_fits_several_keys_or_none_is_refused(rig: TokenRig) -> None:
    with pytest.raises(SpireHwError, match="fits no private key") as caught:
        await rig.start(**BY_LABEL)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    make_root(rig)
    make_root(rig, b"\0\2")
    with pytest.raises(SpireHwError, match=r"several keys \(CKA_ID 0001, 0002\)"):
        await rig.start(**BY_LABEL)
    manager = await rig.start(**BY_URI)
    await manager.sign_data("x509-CA-A", DIGEST, SHA256)
    with pytest.raises(SpireHwError, match="names another token"):
        await rig.start(**{"import": {"b": {"uri": "pkcs11:token=other;object=root%202026"}}})


@pytest.mark.asyncio
async def test_a_key_that_leaves_is_missed_and_one_that_changes_is_noticed(rig: TokenRig) -> None:
    make_root(rig)
    manager = await rig.start(**BY_LABEL)
    rig.meddle("[o.destroy() for o in find(LABEL='root 2026')]")
    with pytest.raises(SpireHwError, match="no longer on token") as caught:
        await manager.get_public_keys()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    await manager.close()
    with pytest.raises(SpireHwError, match="no longer on token"):
        await rig.start(**BY_LABEL)
    make_root(rig)
    with pytest.raises(SpireHwError, match="another key than before") as caught:
        await rig.start(**BY_LABEL)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    await rig.start(**BY_URI)


@pytest.mark.asyncio
async def test_an_own_key_under_that_id_is_there_again_without_the_import(rig: TokenRig) -> None:
    manager = await rig.start()
    own = await manager.generate_key("x509-CA-A", P256)
    await manager.close()
    make_root(rig)
    before = rig.objects()
    manager = await rig.start(**BY_LABEL)
    (key,) = await manager.get_public_keys()
    assert key.fingerprint != own.fingerprint
    assert rig.objects() == before
    await manager.close()
    manager = await rig.start()
    assert [k.fingerprint for k in await manager.get_public_keys()] == [own.fingerprint]
    assert rig.objects() == before


@pytest.mark.asyncio
async def test_the_key_of_a_running_server_is_not_taken(rig: TokenRig) -> None:
    label = Owner("example.org", "server-2").key_label("x509-CA-A", 1)
    rig.meddle(f"make({label!r}, b'22', {NO_DERIVE})")
    with pytest.raises(SpireHwError, match="key of a running server"):
        await rig.start(**{"import": {"x509-CA-A": {"uri": "pkcs11:id=%32%32"}}})


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({}, "exactly one of uri and label"),
        ({"uri": "pkcs11:object=a", "label": "a"}, "exactly one of uri and label"),
        ({"uri": "pkcs11:token=spire"}, "names no key"),
        ({"uri": "pkcs11:object=a?pin-value=1"}, "pin-value"),
        ({"uri": "pkcs11:object=a?module-path=/x.so"}, "module-path cannot be used here"),
        ({"uri": "pkcs11:object=a;type=public"}, "type cannot be used here"),
        ({"uri": "pkcs11:id=7331"}, "percent-encoded"),
        ({"uri": "pkcs11:object=a;object=b"}, "given twice"),
    ],
)
@pytest.mark.asyncio
async def test_faults_of_an_import_are_found_without_a_token(
    rig: TokenRig, block: dict[str, str], words: str
) -> None:
    manager = rig.build()
    config = rig.config(**{"import": {"x509-CA-A": block}})
    (fault,) = manager.validate(config)
    assert words in fault.message
    with pytest.raises(ConfigError):
        await manager.configure(config)

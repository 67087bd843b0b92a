"""Templates that a token refuses, and what each profile does on a real token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.pkcs11.profile import PROFILES
from spire_hw.pkcs11.wire import Kind
from spire_hw_sim.pkcs11faults import Fault
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import SPY, TokenRig, settled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(range(32))
ALWAYS = 0
TEMPLATE_INCONSISTENT, ATTRIBUTE_VALUE_INVALID, GENERAL_ERROR = 0xD1, 0x13, 0x05


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path, tampered=True) as made:
        yield made


async def signs(manager: Pkcs11KeyManager, key_id: str) -> str:
    info = await manager.get_public_key(key_id)
    signed = await manager.sign_data(key_id, DIGEST, SHA256)
    verify_digest(info.public_key, DIGEST, signed.signature, SHA256)
    assert signed.fingerprint == info.fingerprint
    return info.fingerprint


def labels(rig: TokenRig) -> list[str]:
    shown = rig.meddle("for o in find(CLASS=PRIVATE) + find(CLASS=PUBLIC):\n    print(o.label)")
    return shown.split()


@pytest.mark.parametrize("code", [TEMPLATE_INCONSISTENT, ATTRIBUTE_VALUE_INVALID])
@pytest.mark.asyncio
async def test_fault_64_a_template_that_is_refused_for_good(rig: TokenRig, code: int) -> None:
    manager = await rig.start()
    before = (await manager.generate_key("a", KeyType.EC_P256)).fingerprint
    kept = labels(rig)
    rig.faults.set(Fault("C_GenerateKeyPair", times=ALWAYS, returns=code, instead=True))
    with pytest.raises(
        SpireHwError, match=r"refused key template .profile softhsm.*CKR_"
    ) as caught:
        await manager.generate_key("a", KeyType.EC_P256)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert "profile_overrides" in caught.value.message
    assert await signs(manager, "a") == before
    assert labels(rig) == kept
    rig.faults.clear()
    assert (await manager.generate_key("a", KeyType.EC_P256)).fingerprint != before


@pytest.mark.parametrize("code", [TEMPLATE_INCONSISTENT, ATTRIBUTE_VALUE_INVALID, GENERAL_ERROR])
@pytest.mark.asyncio
async def test_fault_64_the_smallest_template_is_tried_once(rig: TokenRig, code: int) -> None:
    # Unless it is told otherwise, SoftHSM lets a key decrypt and unwrap.
    overrides = {"usage_allowed": ["DECRYPT", "UNWRAP"]}
    manager = await rig.start(profile_overrides=overrides)
    before = rig.faults.calls("C_GenerateKeyPair")
    rig.faults.set(Fault("C_GenerateKeyPair", times=1, returns=code, instead=True))
    made = await manager.generate_key("a", KeyType.EC_P256)
    assert rig.faults.calls("C_GenerateKeyPair") == before + 2
    assert await signs(manager, "a") == made.fingerprint


@pytest.mark.asyncio
async def test_fault_64_and_65_what_the_smallest_template_makes_is_held_to_policy(
    rig: TokenRig,
) -> None:
    manager = await rig.start()
    before = (await manager.generate_key("a", KeyType.EC_P256)).fingerprint
    kept = labels(rig)
    rig.faults.set(Fault("C_GenerateKeyPair", times=1, returns=GENERAL_ERROR, instead=True))
    with pytest.raises(SpireHwError, match=r"DECRYPT, UNWRAP; the token lets it do more") as caught:
        await manager.generate_key("a", KeyType.EC_P256)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    await settled(manager)
    assert labels(rig) == kept
    assert await signs(manager, "a") == before


@pytest.mark.asyncio
async def test_fault_64_the_smallest_template_is_not_tried_twice(rig: TokenRig) -> None:
    left_out = ["DECRYPT", "UNWRAP", "DERIVE", "SIGN_RECOVER", "COPYABLE"]
    overrides = {"omit_private": left_out, "omit_public": ["ENCRYPT", "WRAP"]}
    manager = await rig.start(profile_overrides=overrides)
    before = rig.faults.calls("C_GenerateKeyPair")
    rig.faults.set(
        Fault("C_GenerateKeyPair", times=ALWAYS, returns=TEMPLATE_INCONSISTENT, instead=True)
    )
    with pytest.raises(SpireHwError, match="refused key template"):
        await manager.generate_key("a", KeyType.EC_P256)
    assert rig.faults.calls("C_GenerateKeyPair") == before + 1


@pytest.mark.parametrize("name", sorted(n for n, p in PROFILES.items() if p.generates))
@pytest.mark.asyncio
async def test_keys_are_made_proved_replaced_and_found_with_every_profile(
    rig: TokenRig, name: str
) -> None:
    # Whatever a profile leaves out, SoftHSM takes; what it leaves out must not weaken a key.
    manager = await rig.start(profile=name)
    key_types = [KeyType.EC_P256, KeyType.RSA_2048]
    for key_type in key_types:
        await manager.generate_key(key_type.config_name, key_type)
        await manager.generate_key(key_type.config_name, key_type)
    made = {t.config_name: await signs(manager, t.config_name) for t in key_types}
    evidence = (await manager.key_evidence("ec-p256")).attributes
    assert evidence["NEVER_EXTRACTABLE"] == "true"
    assert len(evidence["CKA_ID"]) == 2 * PROFILES[name].id_bytes
    has_manifest = rig.meddle("print(len(find(CLASS=DATA)))").strip() == "1"
    assert has_manifest == PROFILES[name].data_objects
    await manager.close()
    manager = await rig.start(profile=name)
    assert {key_id: await signs(manager, key_id) for key_id in made} == made


@pytest.mark.parametrize("name", sorted(n for n, p in PROFILES.items() if not p.generates))
@pytest.mark.asyncio
async def test_tokens_whose_keys_are_made_elsewhere_say_so(rig: TokenRig, name: str) -> None:
    manager = await rig.start(profile=name)
    with pytest.raises(SpireHwError, match="maker's own tool") as caught:
        await manager.generate_key("a", KeyType.EC_P256)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert rig.faults.calls("C_GenerateKeyPair") == 0


@pytest.mark.asyncio
async def test_a_token_gets_no_more_workers_than_it_serves(rig: TokenRig) -> None:
    manager = await rig.start(workers=4, profile_overrides={"max_workers": 3})
    assert len(manager.worker_pids) == 3
    await manager.generate_key("a", KeyType.EC_P256)
    await signs(manager, "a")
    await manager.close()
    manager = await rig.start(workers=4, profile="smartcard-hsm")
    assert len(manager.worker_pids) == 2
    await signs(manager, "a")


@pytest.mark.asyncio
async def test_key_generation_that_the_token_lacks_is_refused_at_once(rig: TokenRig) -> None:
    manager = await rig.start(profile_overrides={"rsa_key_gen": "x9.31"})
    with pytest.raises(SpireHwError, match="0xa needed for rsa-2048"):
        await manager.generate_key("a", KeyType.RSA_2048)
    await manager.generate_key("b", KeyType.EC_P256)


@pytest.mark.skipif(not SPY.exists(), reason="pkcs11-spy.so (opensc) is not installed")
@pytest.mark.asyncio
async def test_sessions_are_kept_awake_where_the_device_ends_idle_ones(tmp_path: Path) -> None:
    async with TokenRig(tmp_path) as rig:
        for keepalive, touched in ((False, 0), (True, 1)):
            overrides = {"keepalive": keepalive}
            manager = await rig.start(**{**rig.spied(), "profile_overrides": overrides})
            assert manager._pool is not None
            await manager._pool.ask(Kind.PING, {}, what="ping")
            assert rig.calls("C_GenerateRandom") == touched
            await manager.close()

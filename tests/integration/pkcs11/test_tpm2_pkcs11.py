"""The second module: tpm2-pkcs11, whose keys live in a TPM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw_sim import tpm2token
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import PIN, TokenRig
from spire_hw_sim.tpm2token import Tpm2Token

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.tpm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
    pytest.mark.skipif(
        bool(tpm2token.missing()), reason=f"not installed: {tpm2token.missing()} (make setup-more)"
    ),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(range(32))


@pytest.fixture
def token(tmp_path: Path) -> Iterator[Tpm2Token]:
    with Tpm2Token(tmp_path / "tpm2", PIN) as made:
        yield made


@pytest_asyncio.fixture
async def rig(tmp_path: Path, token: Tpm2Token) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path) as made:
        yield made


async def start(rig: TokenRig, token: Tpm2Token, **changes: object) -> Pkcs11KeyManager:
    place = {"module_path": token.module, "environment": token.environment}
    return await rig.start(**{**place, **changes})


async def signs(manager: Pkcs11KeyManager, key_id: str, options: SignOptions = SHA256) -> None:
    info = await manager.get_public_key(key_id)
    signed = await manager.sign_data(key_id, DIGEST, options)
    assert signed.fingerprint == info.fingerprint
    verify_digest(info.public_key, DIGEST, signed.signature, options)


@pytest.mark.asyncio
async def test_keys_of_a_tpm_are_made_proved_replaced_and_found_again(
    rig: TokenRig, token: Tpm2Token
) -> None:
    manager = await start(rig, token)
    assert manager._pool is not None
    assert manager._pool.facts.profile.name == "tpm2"
    made = {}
    for key_type in (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048):
        made[key_type] = await manager.generate_key(key_type.config_name, key_type)
        await signs(manager, key_type.config_name)
    replaced = await manager.generate_key("ec-p256", KeyType.EC_P256)
    assert replaced.fingerprint != made[KeyType.EC_P256].fingerprint
    evidence = await manager.key_evidence("rsa-2048")
    assert evidence.attributes["NEVER_EXTRACTABLE"] == "true"
    assert evidence.attributes["LOCAL"] == "true"
    await signs(manager, "rsa-2048", SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=32))
    with pytest.raises(InvalidInputError, match="the hash's only"):
        await manager.sign_data(
            "rsa-2048", DIGEST, SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=20)
        )
    with pytest.raises(SpireHwError, match="RSA ends at 3072") as caught:
        await manager.generate_key("long", KeyType.RSA_4096)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    fingerprints = {key.key_id: key.fingerprint for key in await manager.get_public_keys()}
    await manager.close()

    token.reboot()
    manager = await start(rig, token)
    found = {key.key_id: key.fingerprint for key in await manager.get_public_keys()}
    assert found == fingerprints
    for key_id in found:
        await signs(manager, key_id)


@pytest.mark.asyncio
async def test_fault_64_a_refused_template_is_tried_once_more_in_its_smallest_form(
    rig: TokenRig, token: Tpm2Token
) -> None:
    # SoftHSM's template has explicit FALSE usage flags, which tpm2-pkcs11 does not take.
    overrides = {"usage_allowed": ["DECRYPT"]}
    manager = await start(rig, token, profile="softhsm", profile_overrides=overrides)
    await manager.generate_key("a", KeyType.EC_P256)
    await signs(manager, "a")
    before = await manager.get_public_key("a")
    assert manager._keyring is not None
    await manager._keyring.disposal.wait_empty()
    assert [key.fingerprint for key in await manager.get_public_keys()] == [before.fingerprint]


@pytest.mark.asyncio
async def test_fault_18_a_locked_pin_is_not_tried_again(rig: TokenRig, token: Tpm2Token) -> None:
    manager = await start(rig, token)
    before = await manager.generate_key("a", KeyType.EC_P256)
    await manager.close()
    # A TPM warns nobody: wrong PINs count up until even the right one is refused.
    for wrong in ("1111", "2222", "3333", "4444"):
        rig.write_pin(wrong)
        with pytest.raises(SpireHwError) as caught:
            await start(rig, token, start_timeout="30s")
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert wrong not in caught.value.message
    rig.write_pin(PIN)
    manager = rig.build()
    place = {"module_path": token.module, "environment": token.environment}
    for _ in range(2):
        with pytest.raises(SpireHwError, match=r"PIN_LOCKED|not be tried again") as caught:
            await manager.configure(rig.config(**place, start_timeout="30s"))
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    await manager.close()
    token.reset_lockout()
    rig.forget_pins()
    manager = await start(rig, token)
    assert (await manager.get_public_key("a")).fingerprint == before.fingerprint
    await signs(manager, "a")

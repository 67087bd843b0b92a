"""Fault 114: what goes wrong in a device behind a signer has the code that it has in front of one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw_sim.pkcs11faults import Fault, Faults
from spire_hw_sim.signer import SignerRig, client_policy
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.slow,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
DIGEST: Final = bytes(range(32))
SHA256: Final = SignOptions(HashAlgorithm.SHA256)
SIGNING: Final = {
    "device memory": Fault("C_Sign", returns=0x31, times=1),
    "data length": Fault("C_Sign", returns=0x21, times=1),
    "function not permitted": Fault("C_SignInit", returns=0x68, times=1),
    "not its signature": Fault("C_Sign", signature="random", times=1),
}
MAKING: Final = {
    "full": Fault("C_GenerateKeyPair", returns=0x31),
    "read-only": Fault("C_GenerateKeyPair", returns=0xE2),
    "mechanism": Fault("C_GenerateKeyPair", returns=0x70),
    "prohibited": Fault("C_GenerateKeyPair", returns=0x1B),
}
SECRETS: Final = ("CKR_", "0x", "spire", "token", "/", "softhsm", "1234")


async def in_front(folder: Path) -> dict[str, ErrorKind]:
    """Return the code of each fault as a key manager on the spot tells it."""
    told = {}
    async with TokenRig(folder, tampered=True) as rig:
        manager = await rig.start()
        await manager.generate_key("x509-CA-A", KeyType.EC_P256)
        for name, fault in (SIGNING | MAKING).items():
            rig.faults.set(fault)
            trying: Awaitable[object] = (
                manager.sign_data("x509-CA-A", DIGEST, SHA256)
                if name in SIGNING
                else manager.generate_key("x509-CA-B", KeyType.EC_P256)
            )
            with pytest.raises(SpireHwError) as caught:
                await trying
            told[name] = caught.value.kind
            rig.faults.clear()
            await manager.sign_data("x509-CA-A", DIGEST, SHA256)
    return told


def reasons(rig: SignerRig) -> list[str]:
    """Return what the audit log says of requests that failed."""
    lines = [
        json.loads(line)
        for file in sorted((rig.folder / "data" / "audit").glob("*.log"))
        for line in file.read_text().splitlines()
    ]
    return [one["reason"] for one in lines if one.get("result") == "failed"]


def shown(refusal: Any) -> tuple[ErrorKind, str]:
    assert refusal.code, "it was not refused"
    return ErrorKind(refusal.code), refusal.message


@pytest.mark.asyncio
async def test_fault_114_the_same_codes_and_no_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = await in_front(tmp_path / "front")
    hsm = SoftHsm(tmp_path / "s" / "hsm")
    faults = Faults(tmp_path / "faults", hsm.module)
    for name, value in faults.environment().items():
        monkeypatch.setenv(name, value)
    policy = client_policy(raw="true")
    async with SignerRig(tmp_path / "s", policy=policy) as rig:
        await rig.generate("x509-CA-A")
        for name, fault in SIGNING.items():
            faults.set(fault)
            kind, message = shown((await rig.sign("x509-CA-A", digest=DIGEST)).refusal)
            assert (name, kind) == (name, front[name])
            assert "audit log tells why" in message
            assert not [s for s in SECRETS if s in message], message
            faults.clear()
            assert (await rig.sign("x509-CA-A", digest=DIGEST)).signature
        for name, fault in MAKING.items():
            faults.set(fault)
            with pytest.raises(SpireHwError) as caught:
                await rig.generate("x509-CA-B")
            assert (name, caught.value.kind) == (name, front[name])
            assert "audit log tells why" in caught.value.message
            assert not [s for s in SECRETS if s in caught.value.message], caught.value.message
            faults.clear()
    told = reasons(rig)
    assert len(told) >= len(SIGNING) + len(MAKING)
    assert all(told), "the log of the signer tells what its client is not told"

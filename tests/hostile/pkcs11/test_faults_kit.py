"""The kit that makes tokens fail: what is planned happens, and is counted."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw_sim.pkcs11faults import FUNCTIONS, Fault, Faults
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)


def test_the_table_has_the_functions_of_the_standard() -> None:
    assert len(FUNCTIONS) == 68
    assert list(FUNCTIONS).index("C_GetSessionInfo") == 15
    assert list(FUNCTIONS).index("C_Sign") == 43


@pytest.mark.asyncio
async def test_what_is_planned_happens_as_often_as_planned_and_is_counted(tmp_path: Path) -> None:
    async with TokenRig(tmp_path, tampered=True) as rig:
        manager = await rig.start()
        await manager.generate_key("a", KeyType.EC_P256)
        assert rig.faults.calls("C_Login") == 2
        before = rig.faults.calls("C_Sign")
        rig.faults.set(Fault("C_Sign", skip=1, times=1, returns=0x21))
        await manager.sign_data("a", bytes(32), SHA256)
        with pytest.raises(SpireHwError, match="DATA_LEN_RANGE"):
            await manager.sign_data("a", bytes(32), SHA256)
        await manager.sign_data("a", bytes(32), SHA256)
        assert rig.faults.calls("C_Sign") == before + 3
        assert rig.faults.calls("C_Sign", manager.worker_pids[0]) == 0


@pytest.mark.parametrize("how", ["flipped", "zero_r", "zero_s", "short", "random"])
@pytest.mark.asyncio
async def test_a_tampered_signature_never_leaves(tmp_path: Path, how: str) -> None:
    async with TokenRig(tmp_path, tampered=True) as rig:
        manager = await rig.start()
        await manager.generate_key("a", KeyType.EC_P256)
        rig.faults.set(Fault("C_Sign", signature=how, times=1))
        with pytest.raises(SpireHwError):
            await manager.sign_data("a", bytes(32), SHA256)


@pytest.mark.asyncio
async def test_flags_mechanisms_attributes_and_crashes(tmp_path: Path) -> None:
    async with TokenRig(tmp_path, tampered=True) as rig:
        rig.faults.set(Fault("C_GetTokenInfo", flags_on=0x0004_0000))
        with pytest.raises(SpireHwError, match="locked"):
            await rig.start()
        assert rig.faults.calls("C_Login") == 0
        rig.faults.set(Fault("C_GetMechanismList", without=(0x1040,)))
        with pytest.raises(SpireHwError, match="CKM_EC_KEY_PAIR_GEN"):
            await rig.start(key_types=["ec-p256"])
        rig.faults.clear()
        manager = await rig.start()
        rig.faults.set(Fault("C_GetAttributeValue", attributes={0x162: "01"}))
        with pytest.raises(SpireHwError, match="EXTRACTABLE"):
            await manager.generate_key("a", KeyType.EC_P256)
        rig.faults.clear()
        await manager.generate_key("a", KeyType.EC_P256)
        rig.faults.set(Fault("C_Sign", crash=signal.SIGSEGV, times=1))
        await manager.sign_data("a", bytes(32), SHA256)


@pytest.mark.asyncio
async def test_workers_of_a_host_that_has_a_configuration_only_fail_as_planned(
    tmp_path: Path,
) -> None:
    async with TokenRig(tmp_path) as rig:
        faults = Faults(tmp_path / "faults", rig.hsm.module)
        environment = {**rig.hsm.environment, **faults.environment()}
        manager = await rig.start(environment=environment)
        await manager.generate_key("a", KeyType.EC_P256)
        assert faults.calls("C_Login") == 2
        faults.set(Fault("C_Sign", times=1, returns=0x21))
        with pytest.raises(SpireHwError, match="DATA_LEN_RANGE"):
            await manager.sign_data("a", bytes(32), SHA256)

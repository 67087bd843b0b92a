"""Rows 1 to 10 of the fault list: the module's file, its start, its mechanisms."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from spire_hw.errors import ConfigError, ErrorKind, InvalidInputError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.pool.process import WORKER as PLAIN
from spire_hw_sim.pkcs11faults import Fault
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager
    from spire_hw_sim.tokenrig import TokenRig

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
PSS = SignOptions(HashAlgorithm.SHA256, pss=True)
DIGEST = bytes(32)
P256 = KeyType.EC_P256
CKM_EC_KEY_PAIR_GEN, CKM_ECDSA, CKM_RSA_PKCS_PSS = 0x1040, 0x1041, 0xD
HARDWARE, SIGNS, VERIFIES, GENERATES = 0x1, 0x800, 0x2000, 0x10000  # CKF flags of mechanisms
CKR_GENERAL_ERROR, CKR_CANT_LOCK, CKR_ALREADY_INITIALIZED = 0x05, 0x0A, 0x191
CKR_MECHANISM_INVALID = 0x70


async def refused(
    rig: TokenRig, manager: Pkcs11KeyManager, kind: ErrorKind, words: str, **changes: object
) -> SpireHwError:
    """Have a configuration refused; the one before goes on serving and no process is left."""
    before = await manager.generate_key("a", P256)
    processes, logins = set(psutil.Process().children()), rig.faults.calls("C_Login")
    with pytest.raises(SpireHwError, match=words) as caught:
        await manager.configure(rig.config(**changes))
    assert caught.value.kind is kind
    assert rig.faults.calls("C_Login") == logins
    assert set(psutil.Process().children()) == processes
    assert [k.fingerprint for k in await manager.get_public_keys()] == [before.fingerprint]
    made = await manager.sign_data("a", DIGEST, SHA256)
    assert made.fingerprint == before.fingerprint
    return caught.value


def libz() -> str:
    return str(next(Path("/usr/lib").rglob("libz.so.1")))


def world_writable(path: Path) -> str:
    path.chmod(0o777)
    return str(path)


def private_copy(source: str, target: Path) -> str:
    target.write_bytes(Path(source).read_bytes())
    target.chmod(0o700)
    return str(target)


async def test_fault_01_the_modules_file_is_missing(tampered: TokenRig, tmp_path: Path) -> None:
    error = await refused(
        tampered,
        await tampered.start(),
        ErrorKind.FAILED_PRECONDITION,
        "pkcs11 module not found: .*install it or correct module_path",
        module_path=str(tmp_path / "missing.so"),
    )
    assert isinstance(error, TokenError)
    assert error.reason == "hsm.module"


@pytest.mark.parametrize("content", [b"no library", b"", b"\x7fELF\x01\x01\x01" + bytes(64)])
async def test_fault_02_the_file_is_no_library(
    tampered: TokenRig, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "text.so"
    path.write_bytes(content)
    path.chmod(0o600)
    manager = await tampered.start()
    # The kit would load the real one: this worker is started without it.
    manager._command = PLAIN
    error = await refused(
        tampered,
        manager,
        ErrorKind.FAILED_PRECONDITION,
        "not a shared library",
        module_path=str(path),
    )
    assert isinstance(error, TokenError)
    assert error.reason == "hsm.module"


async def test_fault_03_the_library_is_no_pkcs11_module(tampered: TokenRig, tmp_path: Path) -> None:
    path = private_copy(libz(), tmp_path / "z.so")
    manager = await tampered.start()
    manager._command = PLAIN
    await refused(
        tampered,
        manager,
        ErrorKind.FAILED_PRECONDITION,
        "not a PKCS#11 module",
        module_path=path,
    )


async def test_fault_04_a_module_in_other_hands_is_not_loaded(
    tampered: TokenRig, tmp_path: Path
) -> None:
    manager = await tampered.start()
    private_copy(tampered.hsm.module, tmp_path / "open.so")
    folder = tmp_path / "folder"
    folder.mkdir()
    below = private_copy(tampered.hsm.module, folder / "m.so")
    open_file, _ = world_writable(tmp_path / "open.so"), world_writable(folder)
    link = tmp_path / "link.so"
    link.symlink_to(below)
    cases = [(open_file, "writable by others"), (below, "folder is writable by others")]
    cases += [(str(link), "folder is writable by others"), (str(folder), "not a regular file")]
    if os.geteuid() == 0:
        owned = private_copy(tampered.hsm.module, tmp_path / "owned.so")
        os.chown(owned, 12345, 12345)
        cases.append((owned, "belongs to another user"))
    for path, words in cases:
        await refused(
            tampered,
            manager,
            ErrorKind.INVALID_ARGUMENT,
            f"refusing module .*{words}",
            module_path=path,
        )
    with pytest.raises(ConfigError, match="module_path must be absolute"):
        await manager.configure(tampered.config(module_path="libsofthsm2.so"))


@pytest.mark.parametrize("code", [CKR_GENERAL_ERROR, CKR_CANT_LOCK])
async def test_fault_06_a_module_that_does_not_start_is_tried_again(
    tampered: TokenRig, code: int
) -> None:
    tampered.faults.set(Fault("C_Initialize", returns=code, instead=True))
    manager = tampered.build()
    with pytest.raises(SpireHwError, match="initialise module failed") as caught:
        await manager.configure(tampered.config(start_timeout="6s"))
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert tampered.faults.calls("C_Login") == 0
    tampered.faults.set(Fault("C_Initialize", returns=code, instead=True, times=1))
    await manager.configure(tampered.config())
    await manager.generate_key("a", P256)


async def test_fault_06_a_module_under_two_paths_is_named_with_both(tampered: TokenRig) -> None:
    tampered.faults.set(Fault("C_Initialize", returns=CKR_ALREADY_INITIALIZED, instead=True))
    with pytest.raises(SpireHwError, match=r"ALREADY_INITIALIZED.*loaded before as") as caught:
        await tampered.build().configure(tampered.config(start_timeout="3s"))
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert tampered.hsm.module.rpartition("/")[2] in caught.value.message


async def test_fault_07_a_module_never_meets_two_threads(tampered: TokenRig) -> None:
    """There is no isolation by threads: a worker is a process with one, and makes one call at a time."""
    manager = await tampered.start()
    info = await manager.generate_key("a", P256)
    worker = manager.worker_pids[1]
    signed = tampered.faults.calls("C_Sign", worker)
    tampered.faults.set(Fault("C_Sign", sleep_s=0.02))
    calls = [manager.sign_data("a", DIGEST, SHA256) for _ in range(40)]
    signing = asyncio.gather(*calls)
    await asyncio.sleep(0)
    assert [psutil.Process(pid).num_threads() for pid in manager.worker_pids] == [1, 1]
    for made in await signing:
        verify_digest(info.public_key, DIGEST, made.signature, SHA256)
    assert tampered.faults.calls("C_Sign", worker) == signed + 40
    assert tampered.faults.calls("C_Initialize", worker) == 1


async def test_fault_09_a_token_without_a_mechanism_that_is_needed(tampered: TokenRig) -> None:
    manager = await tampered.start()
    made = await manager.generate_key("a", KeyType.RSA_2048)
    await manager.close()
    tampered.faults.set(Fault("C_GetMechanismList", without=(CKM_EC_KEY_PAIR_GEN,)))
    with pytest.raises(
        SpireHwError, match="lacks CKM_EC_KEY_PAIR_GEN needed for ec-p384"
    ) as caught:
        await tampered.start(key_types=["ec-p384", "rsa-2048"])
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    # Keys of the types that work are used all the same where no type was insisted on.
    again = await tampered.start()
    assert (await again.sign_data("a", DIGEST, SHA256)).fingerprint == made.fingerprint
    with pytest.raises(SpireHwError, match="lacks CKM_EC_KEY_PAIR_GEN") as caught:
        await again.generate_key("b", P256)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("mechanism", "longest", "uses", "words"),
    [
        (CKM_EC_KEY_PAIR_GEN, 256, GENERATES, "CKM_EC_KEY_PAIR_GEN ends at 256 bits"),
        (CKM_EC_KEY_PAIR_GEN, 32, GENERATES, "CKM_EC_KEY_PAIR_GEN ends at 256 bits"),
        (CKM_ECDSA, 521, VERIFIES, "lacks CKM_ECDSA needed for ec-p384"),
        (CKM_ECDSA, 521, HARDWARE | VERIFIES, "lacks CKM_ECDSA needed for ec-p384"),
        (CKM_ECDSA, 521, HARDWARE, ""),
        (CKM_ECDSA, 66, SIGNS, ""),
        (CKM_ECDSA, 0, SIGNS, ""),
        (CKM_ECDSA, 2**64 - 1, SIGNS, ""),
    ],
)
async def test_fault_09_what_a_token_says_of_its_mechanisms_is_heard(
    tampered: TokenRig, mechanism: int, longest: int, uses: int, words: str
) -> None:
    fault = Fault("C_GetMechanismInfo", mechanism=mechanism, longest=longest, uses=uses)
    tampered.faults.set(fault)
    if words:
        with pytest.raises(SpireHwError, match=words) as caught:
            await tampered.start(key_types=["ec-p384"])
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert tampered.faults.calls("C_GenerateKeyPair") == 0
    manager = await tampered.start(key_types=["rsa-2048"] if words else ["ec-p384"])
    await manager.generate_key("a", KeyType.RSA_2048 if words else KeyType.EC_P384)


async def test_fault_09_a_token_without_pss_signs_everything_else(tampered: TokenRig) -> None:
    tampered.faults.set(Fault("C_GetMechanismList", without=(CKM_RSA_PKCS_PSS,)))
    manager = await tampered.start()
    await manager.generate_key("a", KeyType.RSA_2048)
    asked = tampered.faults.calls("C_SignInit")
    with pytest.raises(InvalidInputError, match="lacks CKM_RSA_PKCS_PSS"):
        await manager.sign_data("a", DIGEST, PSS)
    assert tampered.faults.calls("C_SignInit") == asked
    await manager.sign_data("a", DIGEST, SHA256)


async def test_fault_10_a_mechanism_that_is_listed_but_refused(tampered: TokenRig) -> None:
    manager = await tampered.start()
    made = await manager.generate_key("a", P256)
    tampered.faults.set(Fault("C_SignInit", returns=CKR_MECHANISM_INVALID, instead=True))
    asked = tampered.faults.calls("C_SignInit")
    for _ in range(3):
        with pytest.raises(TokenError, match='refuses CKM_ECDSA for key "a"') as caught:
            await manager.sign_data("a", DIGEST, SHA256)
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert caught.value.reason == "hsm.mechanism_invalid"
    assert tampered.faults.calls("C_SignInit") == asked + 3
    tampered.faults.clear()
    assert (await manager.sign_data("a", DIGEST, SHA256)).fingerprint == made.fingerprint

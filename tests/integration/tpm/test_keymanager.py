from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.config.hcl import parse
from spire_hw.errors import (
    ConfigError,
    DeviceError,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    UnavailableError,
)
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.plugin.keymanager import KeyEvidenceSource, TpmKeys
from spire_hw.tpm.keys import KeyBlob
from spire_hw.tpm.public import check_svid_key
from spire_hw.tpm.storage import StorageKey
from spire_hw_plugins.keymanager.tpm import TpmKeyManager, build
from spire_hw_plugins.keymanager.tpm_config import Settings
from tests.integration.tpm.leaks import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.plugin.info import HostInfo
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
SHA256 = SignOptions(HashAlgorithm.SHA256)


@pytest_asyncio.fixture
async def manager(agent_host: HostInfo, tpm: Swtpm) -> AsyncIterator[TpmKeyManager]:
    manager = build(agent_host)
    await manager.configure(parse(f'tcti = "{tpm.tcti}"'))
    yield manager
    await manager.close()


async def reopen(host: HostInfo, tpm: Swtpm) -> TpmKeyManager:
    manager = build(host)
    await manager.configure(parse(f'tcti = "{tpm.tcti}"'))
    return manager


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
async def test_every_type_signs_with_every_hash(
    manager: TpmKeyManager, tpm: Swtpm, key_type: KeyType
) -> None:
    with nothing_left_behind(tpm):
        info = await manager.generate_key("id", key_type)
        assert info.key_type is key_type
        for algorithm in HashAlgorithm:
            for pss in (False, True) if key_type is KeyType.RSA_2048 else (False,):
                options = SignOptions(algorithm, pss)
                digest = algorithm.digest(b"data")
                made = await manager.sign_data("id", digest, options)
                verify_digest(info.public_key, digest, made.signature, options)
                assert made.fingerprint == info.fingerprint


async def test_keys_survive_a_restart_and_a_reset_of_the_tpm(
    manager: TpmKeyManager, agent_host: HostInfo, tpm: Swtpm
) -> None:
    made = [await manager.generate_key(f"agent-svid-{slot}", KeyType.EC_P256) for slot in "AB"]
    await manager.close()
    tpm.reset()
    again = await reopen(agent_host, tpm)
    assert await again.get_public_keys() == made
    for info in made:
        await again.sign_data(info.key_id, bytes(32), SHA256)
    await again.close()


async def test_a_replaced_key_is_the_youngest_and_the_other_slot_lives_on(
    manager: TpmKeyManager, agent_host: HostInfo, tpm: Swtpm
) -> None:
    first = await manager.generate_key("A", KeyType.EC_P256)
    other = await manager.generate_key("B", KeyType.EC_P256)
    second = await manager.generate_key("A", KeyType.EC_P256)
    assert second.fingerprint != first.fingerprint
    assert await manager.get_public_keys() == [other, second]
    again = await reopen(agent_host, tpm)
    assert await again.get_public_keys() == [other, second]
    await again.close()


async def test_after_a_clear_keys_are_reported_lost_and_can_be_made_anew(
    manager: TpmKeyManager, tpm: Swtpm
) -> None:
    await manager.generate_key("A", KeyType.EC_P256)
    tpm.commands.clear()
    with nothing_left_behind(tpm):
        with pytest.raises(NotReadyError, match=r"TPM was cleared or replaced.*regenerated"):
            await manager.sign_data("A", bytes(32), SHA256)
        with pytest.raises(NotFoundError, match='key "A" not found'):
            await manager.get_public_key("A")
        await manager.generate_key("A", KeyType.EC_P256)
        await manager.sign_data("A", bytes(32), SHA256)


async def test_keys_of_another_tpm_are_left_out_at_start_and_stay_on_disk(
    manager: TpmKeyManager, agent_host: HostInfo, tpm: Swtpm, other_tpm: Swtpm
) -> None:
    made = await manager.generate_key("A", KeyType.EC_P256)
    elsewhere = await reopen(agent_host, other_tpm)
    assert await elsewhere.get_public_keys() == []
    await elsewhere.close()
    at_home = await reopen(agent_host, tpm)
    assert await at_home.get_public_keys() == [made]
    await at_home.close()


async def test_a_persistent_storage_key_of_the_right_name_is_used(
    manager: TpmKeyManager, agent_host: HostInfo, tpm: Swtpm
) -> None:
    made = await manager.generate_key("A", KeyType.EC_P256)
    handle, _ = tpm.commands.create_primary(0x40000001, StorageKey.ECC.value)
    tpm.commands.persist(handle, 0x81000001)
    tpm.commands.flush(handle)
    tpm.commands.set_password(0x40000001, b"set by somebody else")
    again = await reopen(agent_host, tpm)
    await again.sign_data("A", bytes(32), SHA256)
    assert await again.get_public_keys() == [made]
    await again.close()


async def test_a_tpm_that_is_away_raises_and_the_keys_are_kept(
    manager: TpmKeyManager, agent_host: HostInfo, tpm: Swtpm
) -> None:
    made = await manager.generate_key("A", KeyType.EC_P256)
    tpm.kill()
    with pytest.raises(UnavailableError):
        await manager.sign_data("A", bytes(32), SHA256)
    with pytest.raises(UnavailableError):
        await manager.generate_key("B", KeyType.EC_P256)
    with pytest.raises(UnavailableError):
        await reopen(agent_host, tpm)
    assert await manager.get_public_keys() == [made]
    tpm.start()
    await manager.sign_data("A", bytes(32), SHA256)


async def test_signing_and_making_keys_at_once_gives_the_fingerprint_that_signed(
    manager: TpmKeyManager, tpm: Swtpm
) -> None:
    await manager.generate_key("A", KeyType.EC_P256)

    async def sign() -> None:
        made = await manager.sign_data("A", bytes(32), SHA256)
        assert made.signature

    with nothing_left_behind(tpm):
        rotations = [manager.generate_key("A", KeyType.EC_P256) for _ in range(4)]
        infos = await asyncio.gather(*rotations, *(sign() for _ in range(20)))
    assert len({info.fingerprint for info in infos if info is not None}) == 4
    assert len(await manager.get_public_keys()) == 1


async def test_files_are_private_and_hold_no_unwrapped_key(
    manager: TpmKeyManager, agent_host: HostInfo
) -> None:
    await manager.generate_key("agent-svid-A", KeyType.EC_P256)
    await manager.generate_key("odd/../id", KeyType.EC_P256)
    directory = agent_host.data_dir / "keys-tpm"
    names = sorted(p.name for p in directory.iterdir())
    assert names[0] == "agent-svid-A.tpmkey"
    assert names[1].startswith("id.")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()} == {0o600}


async def test_damaged_files_are_left_out_and_links_are_not_followed(
    manager: TpmKeyManager, agent_host: HostInfo, tpm: Swtpm, tmp_path: Path
) -> None:
    made = await manager.generate_key("good", KeyType.EC_P256)
    directory = agent_host.data_dir / "keys-tpm"
    good = (directory / "good.tpmkey").read_bytes()
    (tmp_path / "elsewhere").write_bytes(good.replace(b'"good"', b'"link"'))
    (directory / "link.tpmkey").symlink_to(tmp_path / "elsewhere")
    (directory / "moved.tpmkey").write_bytes(good)
    (directory / "cut.tpmkey").write_bytes(good[:-20])
    (directory / "empty.tpmkey").write_bytes(b"")
    (directory / "list.tpmkey").write_bytes(b"[]")
    huge = good.replace(b'"good"', b'"huge"') + b" " * 2_097_152
    (directory / "huge.tpmkey").write_bytes(huge)
    again = await reopen(agent_host, tpm)
    assert await again.get_public_keys() == [made]
    await again.close()


async def test_a_file_whose_wrapped_part_was_altered_is_a_lost_key(
    manager: TpmKeyManager, agent_host: HostInfo, tpm: Swtpm
) -> None:
    await manager.generate_key("A", KeyType.EC_P256)
    await manager.generate_key("B", KeyType.EC_P256)
    directory = agent_host.data_dir / "keys-tpm"
    a, b = (directory / f"{name}.tpmkey" for name in "AB")
    lines = a.read_text().splitlines()
    other = b.read_text().splitlines()
    swapped = [o if '"private"' in o else line for line, o in zip(lines, other, strict=True)]
    a.write_text("\n".join(swapped))
    again = await reopen(agent_host, tpm)
    with nothing_left_behind(tpm), pytest.raises(NotReadyError, match="damaged"):
        await again.sign_data("A", bytes(32), SHA256)
    await again.sign_data("B", bytes(32), SHA256)
    await again.close()


async def test_a_disk_that_refuses_leaves_the_old_key_in_use(
    manager: TpmKeyManager, agent_host: HostInfo, tpm: Swtpm
) -> None:
    made = await manager.generate_key("A", KeyType.EC_P256)
    directory = agent_host.data_dir / "keys-tpm"
    blocker = directory / ".A.tpmkey.new"
    blocker.mkdir()
    with nothing_left_behind(tpm), pytest.raises(DeviceError, match="cannot be written"):
        await manager.generate_key("A", KeyType.EC_P256)
    assert await manager.get_public_key("A") == made
    await manager.sign_data("A", bytes(32), SHA256)


async def test_the_blob_is_of_a_key_an_attestor_accepts(manager: TpmKeyManager) -> None:
    made = await manager.generate_key("A", KeyType.EC_P256)
    assert isinstance(manager, TpmKeys)
    blob = KeyBlob.parse(*manager.tpm_key_blob("A"))
    check_svid_key(blob.parsed)
    assert blob.parsed.key == made.public_key


async def test_evidence_tells_where_the_key_lives(manager: TpmKeyManager, tpm: Swtpm) -> None:
    await manager.generate_key("A", KeyType.EC_P256)
    assert isinstance(manager, KeyEvidenceSource)
    evidence = await manager.key_evidence("A")
    assert evidence.location == f"TPM IBM SWTPM at {tpm.tcti}"
    assert "fixedTPM" in evidence.attributes["exportable"]


async def test_what_the_tpm_cannot_do_is_refused_in_words(manager: TpmKeyManager) -> None:
    with pytest.raises(InvalidInputError, match="RSA_4096 is not supported by this TPM"):
        await manager.generate_key("A", KeyType.RSA_4096)
    with pytest.raises(InvalidInputError, match="key id is required"):
        await manager.generate_key("", KeyType.EC_P256)
    with pytest.raises(NotFoundError, match='key "A" not found'):
        await manager.sign_data("A", bytes(32), SHA256)
    await manager.generate_key("A", KeyType.EC_P256)
    with pytest.raises(InvalidInputError, match="digest is 31 bytes"):
        await manager.sign_data("A", bytes(31), SHA256)
    with pytest.raises(InvalidInputError, match="PSS"):
        await manager.sign_data("A", bytes(32), SignOptions(HashAlgorithm.SHA256, pss=True))
    await manager.generate_key("R", KeyType.RSA_2048)
    with pytest.raises(InvalidInputError, match="PSS salt of 20 bytes is not possible"):
        await manager.sign_data(
            "R", bytes(32), SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=20)
        )


async def test_before_configure_nothing_works(agent_host: HostInfo) -> None:
    manager = build(agent_host)
    with pytest.raises(NotReadyError):
        await manager.generate_key("A", KeyType.EC_P256)
    with pytest.raises(NotReadyError):
        await manager.get_public_keys()
    await manager.close()


async def test_configuration_faults_are_all_told(agent_host: HostInfo) -> None:
    manager = build(agent_host)
    assert manager.validate(parse("")) == []
    both = parse('tcti = "swtpm"\ntpm_device_path = "/dev/tpmrm0"')
    assert [fault.message for fault in manager.validate(both)] == [
        "set tpm_device_path or tcti, not both"
    ]
    with pytest.raises(ConfigError):
        await manager.configure(both)
    assert "tpm_device_path" in manager.validate(parse('tpm_device_pat = "x"'))[0].message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
async def test_a_key_directory_that_cannot_be_written_is_told(
    agent_host: HostInfo, tpm: Swtpm, tmp_path: Path
) -> None:
    directory = tmp_path / "sealed"
    directory.mkdir(mode=0o500)
    with pytest.raises(NotReadyError, match="not writable"):
        await TpmKeyManager(agent_host).open(Settings(tpm.tcti, directory))

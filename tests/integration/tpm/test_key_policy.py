"""Keys bound to PCR values, kept in the TPM, and used where somebody sits on the bus."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.config.hcl import parse
from spire_hw.errors import (
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, generate_private_key, verify_digest
from spire_hw.tpm import attest, keys, persistent
from spire_hw.tpm.device import TpmDevice
from spire_hw.tpm.errors import Rc, TpmError
from spire_hw.tpm.pcrpolicy import approve, pcr_policy
from spire_hw.tpm.public import USER_WITH_AUTH, check_svid_key
from spire_hw.tpm.storage import StorageKey
from spire_hw.tpm.wire import PcrSelection
from spire_hw_plugins.keymanager.tpm import TpmKeyManager, build
from spire_hw_sim.tpm_bus import TpmBus, refusal
from spire_hw_sim.tpm_command import OWNER
from tests.integration.tpm.leaks import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.key import PrivateKey
    from spire_hw.plugin.info import HostInfo
    from spire_hw_sim.swtpm import Swtpm
    from spire_hw_sim.tpm_bus import Seen

pytestmark = pytest.mark.asyncio
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = HashAlgorithm.SHA256.digest(b"data")
PCRS = "policy_pcrs = { sha256 = [0, 7, 14] }"
SIGN, LOAD, EVICT, LOAD_EXTERNAL = 0x15D, 0x157, 0x120, 0x167
RANGE = 0x81008100


class Managers:
    """Key managers over one directory, closed at the end."""

    def __init__(self, host: HostInfo) -> None:
        self.host = host
        self.opened: list[TpmKeyManager] = []

    async def open(self, tcti: str, settings: str = "") -> TpmKeyManager:
        manager = build(self.host)
        self.opened.append(manager)
        await manager.configure(parse(f'tcti = "{tcti}"\n{settings}'))
        return manager


@pytest_asyncio.fixture
async def managers(agent_host: HostInfo) -> AsyncIterator[Managers]:
    made = Managers(agent_host)
    yield made
    for manager in made.opened:
        await manager.close()


@pytest_asyncio.fixture
async def device(tpm: Swtpm) -> AsyncIterator[TpmDevice]:
    device = TpmDevice(tpm.tcti)
    yield device
    await device.close()


class Authority:
    """Whoever approves states of a machine, with its files."""

    def __init__(self, key: PrivateKey, directory: Path) -> None:
        self.key = key
        self.public = directory / "authority.pem"
        self.public.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        self.approvals = directory / "approvals"
        self.approvals.mkdir()

    @property
    def settings(self) -> str:
        return (
            f'{PCRS}\npolicy_authority_path = "{self.public}"\n'
            f'approvals_path = "{self.approvals}"\npolicy_ref = "web"'
        )

    def approve(self, policy: bytes, name: str = "one", ref: bytes = b"web") -> None:
        approval = approve(self.key, policy, ref, "kernel 6.1")
        (self.approvals / f"{name}.json").write_bytes(approval.encode())


@pytest.fixture(params=[KeyType.EC_P256, KeyType.RSA_2048])
def authority(request: pytest.FixtureRequest, tmp_path: Path) -> Authority:
    return Authority(generate_private_key(request.param), tmp_path)


async def present(device: TpmDevice) -> bytes:
    """Return the policy of the present state, from values and not from the TPM's own sum."""
    selection = PcrSelection("sha256", (0, 7, 14))
    values = await device.run("read", lambda c: attest.read_pcrs(c, selection))
    return pcr_policy({"sha256": values})


async def works(manager: TpmKeyManager, key_id: str = "A") -> None:
    made = await manager.sign_data(key_id, DIGEST, SHA256)
    info = await manager.get_public_key(key_id)
    verify_digest(info.public_key, DIGEST, made.signature, SHA256)


async def test_a_key_bound_to_values_is_lost_when_they_change_and_made_anew(
    managers: Managers, tpm: Swtpm
) -> None:
    manager = await managers.open(tpm.tcti, PCRS)
    with nothing_left_behind(tpm):
        made = await manager.generate_key("A", KeyType.EC_P256)
        await works(manager)
        tpm.extend_pcr(3, b"not ours")
        await works(manager)
        tpm.extend_pcr(7, b"another kernel")
        with pytest.raises(NotReadyError, match="PCRs changed since the key was made"):
            await manager.sign_data("A", DIGEST, SHA256)
        with pytest.raises(NotFoundError):
            await manager.get_public_key("A")
        assert (await manager.generate_key("A", KeyType.EC_P256)) != made
        await works(manager)


async def test_a_key_bound_to_values_is_left_out_at_a_start_in_another_state(
    managers: Managers, tpm: Swtpm
) -> None:
    manager = await managers.open(tpm.tcti, PCRS)
    made = await manager.generate_key("A", KeyType.EC_P256)
    tpm.reset()
    elsewhere = await managers.open(tpm.tcti, PCRS)
    assert await elsewhere.get_public_keys() == []
    for pcr in range(8):
        tpm.extend_pcr(pcr, b"firmware", banks=("sha256", "sha384"))
    at_home = await managers.open(tpm.tcti, PCRS)
    assert await at_home.get_public_keys() == [made]
    await works(at_home)


async def test_a_bound_key_cannot_be_used_with_its_empty_password(
    managers: Managers, device: TpmDevice, tpm: Swtpm
) -> None:
    manager = await managers.open(tpm.tcti, PCRS)
    await manager.generate_key("A", KeyType.EC_P256)
    blob = keys.KeyBlob.parse(*manager.tpm_key_blob("A"))
    assert not blob.parsed.has(USER_WITH_AUTH)
    check_svid_key(blob.parsed)
    with pytest.raises(TpmError) as caught:
        await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, SHA256))
    assert caught.value.decoded.base in {Rc.AUTH_UNAVAILABLE, Rc.AUTH_TYPE}
    await device.run("make AK", attest.create_attestation_key)
    assert await device.run("certify", lambda c: attest.certify(c, blob, bytes(32)))


async def test_an_approval_lets_an_update_pass_without_a_new_key(
    managers: Managers, device: TpmDevice, tpm: Swtpm, authority: Authority
) -> None:
    manager = await managers.open(tpm.tcti, authority.settings)
    made = await manager.generate_key("A", KeyType.EC_P256)
    with nothing_left_behind(tpm):
        with pytest.raises(NotReadyError, match="not approved"):
            await manager.sign_data("A", DIGEST, SHA256)
        authority.approve(await present(device))
        await works(manager)
        tpm.extend_pcr(14, b"a key was enrolled")
        with pytest.raises(NotReadyError, match="not approved"):
            await manager.sign_data("A", DIGEST, SHA256)
        assert await manager.get_public_keys() == [made]
        authority.approve(await present(device), "two")
        await works(manager)
    again = await managers.open(tpm.tcti, authority.settings)
    assert await again.get_public_keys() == [made]
    await works(again)


async def test_what_is_no_approval_for_this_key_does_not_count(
    managers: Managers, device: TpmDevice, tpm: Swtpm, tmp_path: Path
) -> None:
    authority = Authority(generate_private_key(KeyType.EC_P256), tmp_path)
    manager = await managers.open(tpm.tcti, authority.settings)
    await manager.generate_key("A", KeyType.EC_P256)
    policy = await present(device)
    other = generate_private_key(KeyType.EC_P256)
    forged = approve(other, policy, b"web")
    renamed = type(forged)(policy, b"web", approve(authority.key, policy).signer, forged.signature)
    (authority.approvals / "stranger.json").write_bytes(forged.encode())
    (authority.approvals / "forged.json").write_bytes(renamed.encode())
    (authority.approvals / "broken.json").write_bytes(b"{")
    (authority.approvals / "list.json").write_bytes(b"[]")
    (authority.approvals / "huge.json").write_bytes(bytes(100_000))
    (authority.approvals / "gone.json").symlink_to(tmp_path / "nowhere")
    authority.approve(policy, "database", b"database")
    with nothing_left_behind(tpm), pytest.raises(NotReadyError, match="not approved"):
        await manager.sign_data("A", DIGEST, SHA256)
    authority.approve(policy)
    await works(manager)


async def test_a_pcr_that_changes_between_policy_and_signature_is_tried_once_more(
    managers: Managers, tpm: Swtpm, tmp_path: Path
) -> None:
    with TpmBus(tpm) as bus:
        manager = await managers.open(bus.tcti, PCRS)
        await manager.generate_key("A", KeyType.EC_P256)
        left = 1

        def measure(seen: Seen) -> bytes | None:
            nonlocal left
            if seen.code == SIGN and left:
                left -= 1
                tpm.extend_pcr(3, b"not ours")
            return None

        bus.on_command = measure
        with nothing_left_behind(tpm):
            await works(manager)
            assert sum(seen.code == SIGN for seen in bus.commands) == 2
            await manager.close()


async def test_pcrs_that_keep_changing_cost_no_key(
    managers: Managers, device: TpmDevice, tpm: Swtpm, tmp_path: Path
) -> None:
    authority = Authority(generate_private_key(KeyType.EC_P256), tmp_path)

    def measure(seen: Seen) -> bytes | None:
        if seen.code == SIGN:
            tpm.extend_pcr(3, b"not ours")
        return None

    for settings in (PCRS, authority.settings):
        with TpmBus(tpm) as bus:
            manager = await managers.open(bus.tcti, settings)
            await manager.generate_key("A", KeyType.EC_P256)
            authority.approve(await present(device))
            bus.on_command = measure
            with nothing_left_behind(tpm), pytest.raises(UnavailableError, match="PCRs changed"):
                await manager.sign_data("A", DIGEST, SHA256)
            bus.on_command = lambda _: None
            await works(manager)
            await manager.close()


@pytest.mark.parametrize(
    "change",
    [
        {"policy": ...},
        {"policy": {"pcrs": {"sha256": [1]}, "authority": "", "ref": ""}},
        {"policy": {"pcrs": {"sha256": [0, 7, 14]}, "authority": "", "ref": ""}},
        {"handle": "0xffffffffffff"},
        {"handle": "-1"},
        {"handle": 5},
        {"storage_name": "000b" + "00" * 32},
    ],
)
async def test_a_key_file_that_was_altered_gives_nobody_more_than_before(
    managers: Managers, device: TpmDevice, tpm: Swtpm, tmp_path: Path, change: dict[str, Any]
) -> None:
    authority = Authority(generate_private_key(KeyType.EC_P256), tmp_path)
    manager = await managers.open(tpm.tcti, authority.settings)
    await manager.generate_key("A", KeyType.EC_P256)
    await manager.close()
    path = managers.host.data_dir / "keys-tpm" / "A.tpmkey"
    content = {**json.loads(path.read_bytes()), **change}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    again = await managers.open(tpm.tcti, authority.settings)
    with nothing_left_behind(tpm), pytest.raises(SpireHwError):
        await again.sign_data("A", DIGEST, SHA256)
    await again.generate_key("A", KeyType.EC_P256)
    authority.approve(await present(device))
    with nothing_left_behind(tpm):
        await works(again)


@pytest.mark.parametrize("handle", ["0x81010001", "0x81000001", "0x81ffffff"])
async def test_a_key_file_that_names_a_handle_of_others_takes_nothing_from_them(
    managers: Managers, tpm: Swtpm, handle: str
) -> None:
    manager = await managers.open(tpm.tcti)
    await manager.generate_key("A", KeyType.EC_P256)
    await manager.close()
    before = tpm.commands.handles(0x81000000)
    path = managers.host.data_dir / "keys-tpm" / "A.tpmkey"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "handle": handle}))
    again = await managers.open(tpm.tcti)
    with nothing_left_behind(tpm):
        await works(again)
        await again.generate_key("A", KeyType.EC_P256)
        await works(again)
    assert tpm.commands.handles(0x81000000) == before


async def test_a_bank_that_is_off_binds_nothing_and_is_refused(
    managers: Managers, tpm: Swtpm
) -> None:
    with pytest.raises(InvalidInputError, match="PCR bank sha512 is not active"):
        await managers.open(tpm.tcti, "policy_pcrs = { sha512 = [0] }")


async def test_an_authority_whose_key_the_tpm_cannot_use_is_told_at_the_start(
    managers: Managers, tpm: Swtpm, tmp_path: Path
) -> None:
    authority = Authority(ec.generate_private_key(ec.SECP521R1()), tmp_path)
    with TpmBus(tpm) as bus:
        bus.on_command = lambda seen: refusal(Rc.CURVE) if seen.code == LOAD_EXTERNAL else None
        with (
            nothing_left_behind(tpm),
            pytest.raises(InvalidInputError, match="policy authority's type"),
        ):
            await managers.open(bus.tcti, authority.settings)


@pytest.mark.parametrize("settings", ["", PCRS])
@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
async def test_salted_sessions_hide_and_protect_what_is_signed(
    managers: Managers, tpm: Swtpm, key_type: KeyType, settings: str
) -> None:
    with TpmBus(tpm) as bus:
        manager = await managers.open(bus.tcti, f'session = "salted"\n{settings}')
        with nothing_left_behind(tpm):
            await manager.generate_key("A", key_type)
            await works(manager)
        blob = keys.KeyBlob.parse(*manager.tpm_key_blob("A"))
        seen = b"".join(s.data for s in bus.commands) + b"".join(bus.answers)
        assert DIGEST not in seen
        assert blob.private[2:] not in seen
        await manager.close()


async def test_without_salt_the_digest_is_on_the_bus(managers: Managers, tpm: Swtpm) -> None:
    with TpmBus(tpm) as bus:
        manager = await managers.open(bus.tcti)
        await manager.generate_key("A", KeyType.EC_P256)
        await works(manager)
        assert any(DIGEST in seen.data for seen in bus.commands)
        await manager.close()


async def test_a_digest_swapped_on_the_bus_is_not_signed(managers: Managers, tpm: Swtpm) -> None:
    """An interposer that alters one bit of a protected command gets a refusal from the TPM."""
    with TpmBus(tpm) as bus:
        manager = await managers.open(bus.tcti, 'session = "salted"')
        await manager.generate_key("A", KeyType.EC_P256)

        def alter(seen: Seen) -> bytes | None:
            if seen.code != SIGN:
                return None
            data = bytearray(seen.data)
            data[-20] ^= 1
            return tpm.transmit(bytes(data))

        bus.on_command = alter
        with nothing_left_behind(tpm), pytest.raises(SpireHwError):
            await manager.sign_data("A", DIGEST, SHA256)
        bus.on_command = lambda _: None
        await works(manager)
        await manager.close()


async def test_persistent_keys_are_used_where_they_are_and_replaced_ones_go(
    managers: Managers, tpm: Swtpm
) -> None:
    settings = f'persistent_handles = "0x{RANGE:08x}"'
    with TpmBus(tpm) as bus:
        manager = await managers.open(bus.tcti, settings)
        with nothing_left_behind(tpm):
            for key_id in ("A", "B", "A"):
                await manager.generate_key(key_id, KeyType.EC_P256)
            handles = [h for h in tpm.commands.handles(RANGE) if h < RANGE + 16]
            assert handles == [RANGE + 1, RANGE + 2]
            bus.commands.clear()
            await works(manager)
            await works(manager, "B")
            assert LOAD not in {seen.code for seen in bus.commands}
        evidence = await manager.key_evidence("A")
        assert evidence.attributes["handle"] == f"0x{RANGE + 2:08x}"
        await manager.close()
    again = await managers.open(tpm.tcti, settings)
    await works(again)


async def test_a_handle_taken_by_another_program_is_left_alone(
    managers: Managers, tpm: Swtpm
) -> None:
    settings = f'persistent_handles = "0x{RANGE:08x}"'
    handle, foreign = tpm.commands.create_primary(OWNER, StorageKey.ECC.value)
    tpm.commands.persist(handle, RANGE)
    tpm.commands.flush(handle)
    manager = await managers.open(tpm.tcti, settings)
    await manager.generate_key("A", KeyType.EC_P256)
    await works(manager)
    assert tpm.commands.read_public(RANGE) == foreign
    await manager.generate_key("A", KeyType.EC_P256)
    assert tpm.commands.read_public(RANGE) == foreign


async def test_a_handle_that_holds_another_key_by_now_is_not_used_nor_removed(
    managers: Managers, device: TpmDevice, tpm: Swtpm
) -> None:
    settings = f'persistent_handles = "0x{RANGE:08x}"'
    manager = await managers.open(tpm.tcti, settings)
    await manager.generate_key("A", KeyType.EC_P256)
    name = keys.KeyBlob.parse(*manager.tpm_key_blob("A")).parsed.name
    assert await device.run("evict", lambda c: persistent.evict(c, RANGE, name))
    handle, foreign = tpm.commands.create_primary(OWNER, StorageKey.ECC.value)
    tpm.commands.persist(handle, RANGE)
    tpm.commands.flush(handle)
    with nothing_left_behind(tpm):
        await works(manager)  # by its blob
        await manager.generate_key("A", KeyType.EC_P256)
    assert tpm.commands.read_public(RANGE) == foreign


async def test_a_range_without_a_free_handle_is_told(managers: Managers, tpm: Swtpm) -> None:
    handle, _ = tpm.commands.create_primary(OWNER, StorageKey.ECC.value)
    for number in range(RANGE, RANGE + 16):
        tpm.commands.persist(handle, number)
    tpm.commands.flush(handle)
    manager = await managers.open(tpm.tcti, f'persistent_handles = "0x{RANGE:08x}"')
    with nothing_left_behind(tpm), pytest.raises(NotReadyError, match="are taken"):
        await manager.generate_key("A", KeyType.EC_P256)
    assert await manager.get_public_keys() == []


async def test_a_tpm_without_room_for_a_key_loses_nothing(managers: Managers, tpm: Swtpm) -> None:
    with TpmBus(tpm) as bus:
        manager = await managers.open(bus.tcti, f'persistent_handles = "0x{RANGE:08x}"')
        made = await manager.generate_key("A", KeyType.EC_P256)
        bus.on_command = lambda seen: refusal(Rc.NV_SPACE) if seen.code == EVICT else None
        with (
            nothing_left_behind(tpm),
            pytest.raises(TpmError, match="persistent memory is full"),
        ):
            await manager.generate_key("A", KeyType.EC_P256)
        assert await manager.get_public_keys() == [made]
        await works(manager)
        await manager.close()

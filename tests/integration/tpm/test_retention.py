"""Replaced keys of KeyManager `tpm`: kept unused, over restarts, taken back, removed in their time."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.config.hcl import parse
from spire_hw.errors import DeviceError, LimitError, NotFoundError, NotReadyError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.plugin.keymanager import KeyRetention
from spire_hw_plugins.keymanager.tpm import TpmKeyManager, build
from spire_hw_plugins.keymanager.tpm_store import (
    MAX_REPLACED,
    Replaced,
    StoredKey,
    TpmKeyStore,
)
from spire_hw_sim.clock import SimClock
from tests.integration.tpm.leaks import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.keymanager import KeyInfo
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(range(32))
P256 = KeyType.EC_P256
RANGE = 0x81008100


class Rig:
    """A directory of keys in a TPM, opened again and again."""

    def __init__(self, host: HostInfo, tpm: Swtpm, stack: AsyncExitStack) -> None:
        self.host = host
        self.tpm = tpm
        self.directory = host.data_dir / "keys-tpm"
        self._stack = stack

    async def open(
        self, keep: str = "26h", more: str = "", tpm: Swtpm | None = None
    ) -> TpmKeyManager:
        manager = build(self.host)
        self._stack.push_async_callback(manager.close)
        await self.configure(manager, keep, more, tpm)
        return manager

    async def configure(
        self, manager: TpmKeyManager, keep: str, more: str = "", tpm: Swtpm | None = None
    ) -> None:
        tcti = (tpm or self.tpm).tcti
        text = f'tcti = "{tcti}"\nretain_replaced = "{keep}"\n{more}'
        await manager.configure(parse(text))

    async def pass_time(self, span: timedelta) -> None:
        clock = self.host.clock
        assert isinstance(clock, SimClock)
        await clock.advance(span)

    def jump(self, span: timedelta) -> None:
        clock = self.host.clock
        assert isinstance(clock, SimClock)
        clock._now += span


@pytest_asyncio.fixture
async def rig(agent_host: HostInfo, tpm: Swtpm) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        yield Rig(agent_host, tpm, stack)


async def kept(manager: TpmKeyManager, key_id: str = "A") -> list[int]:
    return [k.generation for k in await manager.retained_keys() if k.info.key_id == key_id]


async def settled(manager: TpmKeyManager, generations: list[int]) -> None:
    """Wait until what runs in the background has left these."""
    async with asyncio.timeout(20):
        while await kept(manager) != generations:  # noqa: ASYNC110 - nobody is told of it
            await asyncio.sleep(0)


async def signs(manager: TpmKeyManager, info: KeyInfo) -> None:
    made = await manager.sign_data(info.key_id, DIGEST, SHA256)
    assert made.fingerprint == info.fingerprint
    verify_digest(info.public_key, DIGEST, made.signature, SHA256)


async def test_a_replaced_key_is_kept_over_restarts_and_signs_nothing(rig: Rig) -> None:
    manager = await rig.open()
    assert isinstance(manager, KeyRetention)
    first = await manager.generate_key("A", P256)
    second = await manager.generate_key("A", P256)
    (one,) = await manager.retained_keys()
    assert (one.info, one.generation) == (first, 1)
    assert one.until == rig.host.clock.now().timestamp() + 26 * 3600
    for _ in range(2):
        await manager.close()
        rig.tpm.reset()
        manager = await rig.open()
        assert await manager.retained_keys() == [one]
        assert await manager.get_public_keys() == [second]
        await signs(manager, second)
    assert (await manager.key_evidence("A")).generation == 2


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
async def test_a_key_is_taken_back_and_the_other_is_kept_in_its_place(
    rig: Rig, key_type: KeyType
) -> None:
    manager = await rig.open()
    first = await manager.generate_key("A", key_type)
    other = await manager.generate_key("B", P256)
    second = await manager.generate_key("A", P256)
    with nothing_left_behind(rig.tpm):
        assert await manager.restore_key("A", 1) == first
        await signs(manager, first)
    for _ in range(2):
        assert await manager.get_public_keys() == [first, other]
        assert await kept(manager) == [2]
        await manager.close()
        manager = await rig.open()
    # The next has a number that none had, whatever was removed meanwhile.
    await manager.destroy_retained("A", 2)
    third = await manager.generate_key("A", P256)
    assert (await manager.key_evidence("A")).generation == 3
    assert await kept(manager) == [1]
    assert second.fingerprint not in {first.fingerprint, third.fingerprint}


async def test_what_was_kept_long_enough_is_removed(rig: Rig) -> None:
    manager = await rig.open("1h")
    await manager.generate_key("A", P256)
    await manager.generate_key("A", P256)
    await rig.pass_time(timedelta(minutes=40))
    third = await manager.generate_key("A", P256)
    assert await kept(manager) == [1, 2]
    await rig.pass_time(timedelta(minutes=21))
    await settled(manager, [2])
    with pytest.raises(NotFoundError, match='generation 1 of key "A" is not retained'):
        await manager.restore_key("A", 1)
    await rig.pass_time(timedelta(hours=1))
    await settled(manager, [])
    assert b"replaced" not in (rig.directory / "A.tpmkey").read_bytes()
    await signs(manager, third)


async def test_time_that_passed_while_nothing_ran_counts(rig: Rig) -> None:
    manager = await rig.open("1h")
    await manager.generate_key("A", P256)
    await manager.generate_key("A", P256)
    await manager.close()
    rig.jump(timedelta(hours=2))
    await settled(await rig.open("1h"), [])


async def test_a_clock_that_jumped_removes_nothing(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = await rig.open("1h")
    await manager.generate_key("A", P256)
    await manager.generate_key("A", P256)
    rig.jump(timedelta(days=30))
    await rig.pass_time(timedelta(hours=1))
    async with asyncio.timeout(20):
        told = ""
        while "The clock jumped" not in told:
            await asyncio.sleep(0)
            shown = capsys.readouterr()
            told += shown.out + shown.err
    assert await kept(manager) == [1]


async def test_without_retention_nothing_is_kept_and_what_was_goes(rig: Rig) -> None:
    manager = await rig.open()
    await manager.generate_key("A", P256)
    second = await manager.generate_key("A", P256)
    await rig.configure(manager, "0s")
    await settled(manager, [])
    third = await manager.generate_key("A", P256)
    assert await manager.retained_keys() == []
    assert third != second
    await rig.configure(manager, "1h")
    await manager.generate_key("A", P256)
    assert await kept(manager) == [3]


async def test_unknown_generations_are_not_found(rig: Rig) -> None:
    manager = await rig.open()
    await manager.generate_key("A", P256)
    await manager.generate_key("A", P256)
    for key_id, generation in (("A", 2), ("A", 3), ("A", 0), ("A", -1), ("B", 1), ("../A", 1)):
        with pytest.raises(NotFoundError, match="is not retained"):
            await manager.restore_key(key_id, generation)
        with pytest.raises(NotFoundError, match="is not retained"):
            await manager.destroy_retained(key_id, generation)
    assert await kept(manager) == [1]
    await manager.destroy_retained("A", 1)
    with pytest.raises(NotFoundError, match="is not retained"):
        await manager.destroy_retained("A", 1)


async def test_a_key_that_does_not_sign_any_more_is_not_taken_back(
    rig: Rig, other_tpm: Swtpm
) -> None:
    manager = await rig.open()
    await manager.generate_key("A", P256)
    await manager.generate_key("A", P256)
    await manager.close()
    manager = await rig.open(tpm=other_tpm)
    assert await manager.get_public_keys() == []
    third = await manager.generate_key("A", P256)
    with (
        nothing_left_behind(other_tpm),
        pytest.raises(NotReadyError, match=r'generation 1 of key "A": .*cleared or replaced'),
    ):
        await manager.restore_key("A", 1)
    await signs(manager, third)
    assert await manager.get_public_keys() == [third]
    assert await kept(manager) == [1, 2]


async def test_a_disk_that_refuses_changes_nothing(rig: Rig) -> None:
    manager = await rig.open(more=f'persistent_handles = "0x{RANGE:08x}"')
    await manager.generate_key("A", P256)
    second = await manager.generate_key("A", P256)
    (rig.directory / ".A.tpmkey.new").mkdir()
    handles = rig.tpm.commands.handles(RANGE)
    with nothing_left_behind(rig.tpm):
        for attempt in (manager.restore_key, manager.destroy_retained):
            with pytest.raises(DeviceError, match="cannot be written"):
                await attempt("A", 1)
    assert rig.tpm.commands.handles(RANGE) == handles
    assert await kept(manager) == [1]
    await signs(manager, second)


async def test_only_the_key_in_use_has_a_persistent_handle(rig: Rig) -> None:
    manager = await rig.open(more=f'persistent_handles = "0x{RANGE:08x}"')
    first = await manager.generate_key("A", P256)
    second = await manager.generate_key("A", P256)
    for info, generation in ((first, 1), (second, 2), (first, 1)):
        await manager.restore_key("A", generation)
        assert len([h for h in rig.tpm.commands.handles(RANGE) if h < RANGE + 16]) == 1
        assert "handle" in (await manager.key_evidence("A")).attributes
        await signs(manager, info)


async def test_a_key_bound_to_other_values_comes_back_with_them(rig: Rig) -> None:
    manager = await rig.open(more="policy_pcrs = { sha256 = [16] }")
    first = await manager.generate_key("A", P256)
    rig.tpm.extend_pcr(16, b"another state", banks=("sha256",))
    second = await manager.generate_key("A", P256)
    with nothing_left_behind(rig.tpm), pytest.raises(NotReadyError):
        await manager.restore_key("A", 1)
    await signs(manager, second)
    rig.tpm.reset()
    await manager.close()
    manager = await rig.open(more="policy_pcrs = { sha256 = [16] }")
    assert await manager.restore_key("A", 1) == first
    await signs(manager, first)


async def test_more_than_fit_are_refused_and_none_is_pushed_out(rig: Rig) -> None:
    manager = await rig.open()
    made = await manager.generate_key("A", P256)
    await manager.close()
    store = TpmKeyStore(rig.directory)
    ((file,), complaints) = store.load()
    assert complaints == []
    now = rig.host.clock.now().timestamp()
    key, last = file.current, MAX_REPLACED + 1
    many = tuple(Replaced(_numbered(key, n), now) for n in range(1, last))
    store.put(type(file)(_numbered(key, last), last, many))
    manager = await rig.open()
    with pytest.raises(LimitError, match=r'256 replaced keys of "A" are kept.*retain_replaced'):
        await manager.generate_key("A", P256)
    assert [k.fingerprint for k in await manager.get_public_keys()] == [made.fingerprint]
    await manager.destroy_retained("A", 1)
    await manager.generate_key("A", P256)
    assert await kept(manager) == [*range(2, last), last]


def _numbered(key: StoredKey, generation: int) -> StoredKey:
    return replace(key, generation=generation)

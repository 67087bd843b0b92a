"""What a token made is verified here or in a process, whatever becomes of the process."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import utils

from spire_hw.errors import SpireHwError
from spire_hw.key import (
    HashAlgorithm,
    KeyType,
    SignOptions,
    generate_private_key,
    sign_digest,
    spki_der,
    verify_digest,
)
from spire_hw.log import get_logger
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.pool.process import Launch
from spire_hw.pkcs11.pool.verifying import Verifying
from spire_hw.pkcs11.wire import SignItem, SignKey, decode_results, encode_items, encode_results

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OPTIONS = SignOptions(HashAlgorithm.SHA256)
PRIVATE = generate_private_key(KeyType.EC_P256)
KEY = SignKey(b"id", spki_der(PRIVATE.public_key()))
DIGESTS = [OPTIONS.hash.digest(bytes([n])) for n in range(16)]


def made(digest: bytes) -> bytes:
    """Return what a token makes of a digest."""
    r, s = utils.decode_dss_signature(sign_digest(PRIVATE, digest, OPTIONS))
    return r.to_bytes(32) + s.to_bytes(32)


RAWS = [made(digest) for digest in DIGESTS]


@asynccontextmanager
async def verifying(most: int = 1) -> AsyncIterator[Verifying]:
    one = Verifying(Launch(dict(os.environ)), most, get_logger("test"))
    try:
        yield one
    finally:
        await one.close()


async def results_of(one: Verifying, raws: list[bytes]) -> list[bytes | TokenError]:
    items = encode_items([SignItem(KEY, digest, OPTIONS) for digest in DIGESTS[: len(raws)]])
    done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def settle(body: bytes | SpireHwError) -> None:
        if isinstance(body, SpireHwError):
            done.set_exception(body)
        else:
            done.set_result(body)

    one.verify(items, encode_results(raws), len(raws), settle)
    async with asyncio.timeout(30):
        return decode_results(await done, len(raws))


async def holds(one: Verifying, count: int) -> None:
    """Check that good ones leave and wrong ones do not."""
    for digest, result in zip(DIGESTS, await results_of(one, RAWS[:count]), strict=False):
        assert isinstance(result, bytes)
        verify_digest(PRIVATE.public_key(), digest, result, OPTIONS)
    shown = await results_of(one, [RAWS[-1], *RAWS[1:count]])
    assert isinstance(shown[0], TokenError)
    assert shown[0].reason == "hsm.bad_signature"
    assert all(isinstance(result, bytes) for result in shown[1:])


async def started(one: Verifying) -> int:
    async with asyncio.timeout(30):
        while not one.pids:
            await results_of(one, RAWS)
    return one.pids[0]


@pytest.mark.asyncio
async def test_few_are_verified_without_a_process() -> None:
    async with verifying() as one:
        await holds(one, 1)
        await holds(one, 2)
        assert one.pids == []


@pytest.mark.asyncio
async def test_many_are_verified_by_a_process_that_is_none_of_the_token() -> None:
    async with verifying() as one:
        await holds(one, 16)
        pid = await started(one)
        await holds(one, 16)
        process = psutil.Process(pid)
        assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert process.cmdline()[-2].endswith("verifier")
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.asyncio
async def test_a_process_that_dies_costs_no_signature(how: signal.Signals) -> None:
    async with verifying() as one:
        pid = await started(one)
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(results_of(one, RAWS)) for _ in range(4)]
            await asyncio.sleep(0)
            os.kill(pid, how)
            os.kill(pid, signal.SIGCONT)
        for call in calls:
            assert all(isinstance(result, bytes) for result in call.result())
        await holds(one, 16)


@pytest.mark.asyncio
async def test_processes_that_are_always_at_work_get_another_beside_them_and_not_more() -> None:
    async with verifying(most=2) as one:
        first = await started(one)
        async with asyncio.timeout(60):
            while len(one.pids) < 2:
                calls = (results_of(one, RAWS) for _ in range(4))
                for results in await asyncio.gather(*calls):
                    assert all(isinstance(result, bytes) for result in results)
        for _ in range(8):
            await asyncio.gather(*(results_of(one, RAWS) for _ in range(8)))
        second = one.pids[1]
        assert one.pids == [first, second]
        await holds(one, 16)
        os.kill(first, signal.SIGKILL)
        await holds(one, 16)
    assert not psutil.pid_exists(second)


@pytest.mark.asyncio
async def test_a_process_that_has_time_stays_alone() -> None:
    async with verifying(most=2) as one:
        await started(one)
        for _ in range(50):
            await holds(one, 3)
        assert len(one.pids) == 1


@pytest.mark.parametrize("body", [b"", b"\x10", b"\xff" * 300, encode_results(RAWS[:15])])
@pytest.mark.asyncio
async def test_nonsense_of_a_worker_is_an_error(body: bytes) -> None:
    items = encode_items([SignItem(KEY, digest, OPTIONS) for digest in DIGESTS])
    async with verifying() as one:
        await started(one)
        for count in (1, 16):
            got: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            one.verify(items, body, count, got.set_result)
            async with asyncio.timeout(30):
                assert isinstance(await got, SpireHwError)

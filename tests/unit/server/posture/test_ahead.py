from __future__ import annotations

from dataclasses import replace

import pytest

from spire_hw.posture import signature
from spire_hw.posture.evaluate import evaluate
from spire_hw_server.posture.ahead import verify_ahead
from tests.unit.spire_hw.posture.samples import IMA, good, measured
from tests.unit.spire_hw.posture.test_imacheck import KEYS, listing, pem, signed

pytestmark = pytest.mark.asyncio

POLICY = listing('keyring = ["@k"]', {"k": pem(KEYS["ec"])})


async def test_signatures_are_verified_once_and_ahead() -> None:
    files = tuple(signed(KEYS["ec"], measured(b"/opt/%d" % n)) for n in range(100))
    evidence = good(ima=replace(IMA, entries=files))
    signature._is_signed.cache_clear()
    await verify_ahead(POLICY, evidence)
    verified = signature._is_signed.cache_info().misses
    assert verified == len(files)
    assert evaluate(POLICY, evidence).holds
    assert signature._is_signed.cache_info().misses == verified


async def test_nothing_is_done_ahead_where_there_is_little_to_do() -> None:
    signature._is_signed.cache_clear()
    few = tuple(signed(KEYS["ec"], measured(b"/opt/%d" % n)) for n in range(10))
    await verify_ahead(POLICY, good(ima=replace(IMA, entries=few)))
    await verify_ahead(POLICY, good(ima=None))
    await verify_ahead(None, good(ima=replace(IMA, entries=few * 10)))
    await verify_ahead(listing(), good(ima=replace(IMA, entries=few * 10)))
    assert signature._is_signed.cache_info().misses == 0

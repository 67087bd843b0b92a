"""Synchronisation against a server whose answers are chosen, over the real transport."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key

from spire_hw.config.hcl import parse
from spire_hw.errors import DeniedError, LimitError, SpireHwError, UnavailableError
from spire_hw.key import KeyType, spki_der
from spire_hw.log import get_logger
from spire_hw.rpc.convert import bundle_to_pb
from spire_hw.svid.x509svid import parse_x509_svid
from spire_hw_agent.cache import Cache
from spire_hw_agent.config import build_settings
from spire_hw_agent.storage import Storage
from spire_hw_agent.sync import Synchroniser
from spire_hw_agent.trust import Trust
from spire_hw_agent.upstream.client import Upstream
from spire_hw_sim.liar import AGENT_PATH, TRUST_DOMAIN, LyingServer
from spire_hw_sim.pki import Authority, now
from tests.unit.agent.clock import WatchedClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw._pb import types_pb2
    from spire_hw.key import PublicKey

pytestmark = pytest.mark.asyncio

LOG = get_logger("test")
MINE = f"unix:uid:{os.getuid()}"
INTERVAL_S = 5.0


@dataclass
class Site:
    """A synchroniser, what it fills and the server it asks."""

    liar: LyingServer
    cache: Cache
    upstream: Upstream
    clock: WatchedClock
    trust: Trust
    denied: list[int] = field(default_factory=list)

    def sync(self, key_type: KeyType = KeyType.EC_P256) -> Synchroniser:
        async def on_denied(error: DeniedError, version: int) -> None:
            self.denied.append(version)

        return Synchroniser(
            self.upstream,
            self.trust,
            self.cache,
            clock=self.clock,
            log=LOG,
            interval_s=INTERVAL_S,
            key_type=key_type,
            renew_at=lambda not_before, not_after: not_after - timedelta(minutes=10),
            on_synchronised=lambda: None,
            on_denied=on_denied,
        )

    def authority_of(self, entry_id: str) -> str:
        return self.cache._svids[entry_id].authority_id

    async def until(self, what: Any, step: timedelta = timedelta(seconds=1)) -> None:
        while not what():
            await self.clock.advance(step)
            await asyncio.sleep(0.005)


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    settings = build_settings(
        parse(f"""
        agent {{
          trust_domain = "{TRUST_DOMAIN}" server_address = "s" server_port = 1
          insecure_bootstrap = true
        }}
        plugins {{ KeyManager "memory" {{}} NodeAttestor "tpm" {{}} WorkloadAttestor "unix" {{}} }}
        """)
    )
    clock = WatchedClock()
    storage = Storage(tmp_path / "data")
    async with asyncio.timeout(60), LyingServer() as liar:
        trust = Trust(settings, storage, clock=clock, log=LOG)
        bundle = liar.authority.bundle()
        await trust.accept(bundle)
        upstream = Upstream(
            "127.0.0.1", liar.port, bundle.trust_domain, trust, clock=clock, log=LOG
        )
        await upstream.use_identity(liar.authority.identity(f"spiffe://{TRUST_DOMAIN}{AGENT_PATH}"))
        yield Site(liar, Cache(bundle), upstream, clock, trust)
        await upstream.close()
    storage.close()


async def test_workload_keys_are_of_the_configured_type(site: Site) -> None:
    site.liar.add("/a", MINE)
    sync = site.sync(KeyType.RSA_2048)
    await sync.sync_once()
    await sync.renew_due()
    held = site.cache._svids["/a"]
    key = load_der_private_key(held.private_key, None)
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.key_size == 2048
    assert spki_der(parse_x509_svid(held.chain).public_key) == spki_der(key.public_key())


def tainted(first: Authority, second: Authority) -> types_pb2.Bundle:
    bundle = first.bundle(second)
    return bundle_to_pb(bundle.with_tainted_x509(bundle.x509_authorities[0].authority_id))


def issue_by(site: Site, authority: Authority) -> None:
    def chain(key: PublicKey, entry: types_pb2.Entry) -> list[bytes]:
        return [authority.leaf(key, f"spiffe://{TRUST_DOMAIN}{entry.spiffe_id.path}", start=now())]

    site.liar.workload_chain = chain  # type: ignore[method-assign]


def authority_id(authority: Authority) -> str:
    return authority.bundle().x509_authorities[0].authority_id


async def test_svids_of_a_tainted_authority_are_replaced_at_once(site: Site) -> None:
    first, second = site.liar.authority, Authority(TRUST_DOMAIN)
    site.liar.add("/a", MINE)
    issue_by(site, first)
    sync = site.sync()
    await sync.sync_once()
    await sync.renew_due()
    assert site.authority_of("/a") == authority_id(first)
    site.liar.bundle_answer = lambda: tainted(first, second)  # type: ignore[method-assign]
    issue_by(site, second)
    await sync.sync_once()
    await sync.renew_due()
    assert site.authority_of("/a") == authority_id(second)
    await sync.renew_due()
    assert len(site.liar.svid_calls) == 2


async def test_a_server_that_still_signs_with_a_tainted_authority_is_not_asked_in_a_loop(
    site: Site,
) -> None:
    first, second = site.liar.authority, Authority(TRUST_DOMAIN)
    site.liar.add("/a", MINE)
    site.liar.bundle_answer = lambda: tainted(first, second)  # type: ignore[method-assign]
    issue_by(site, first)
    sync = site.sync()
    await sync.sync_once()
    for _ in range(5):
        await sync.renew_due()
    assert site.authority_of("/a") == authority_id(first)  # better than none
    assert len(site.liar.svid_calls) == 1
    issue_by(site, second)
    await site.clock.advance(timedelta(seconds=1))
    await sync.renew_due()
    assert site.authority_of("/a") == authority_id(second)


def fail_with(site: Site, error: SpireHwError) -> list[int]:
    """Have the server answer every synchronisation with an error; return a list of the tries."""
    tries: list[int] = []

    def answer() -> types_pb2.Bundle:
        tries.append(1)
        raise error

    site.liar.bundle_answer = answer  # type: ignore[method-assign]
    return tries


async def test_a_server_that_was_away_for_long_is_found_back_soon(site: Site) -> None:
    site.liar.add("/a", MINE)
    sync = site.sync()
    await sync.sync_once()
    tries = fail_with(site, UnavailableError("away"))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(sync.run_entries())
        await site.until(lambda: len(tries) >= 12)
        assert len(site.clock.slept) >= 11
        assert max(site.clock.slept) <= 2 * INTERVAL_S
        assert len(set(site.clock.slept)) > 5  # not all agents at once
        asked = site.cache.demand.version
        del site.liar.bundle_answer
        await site.until(lambda: site.cache.demand.version > asked)
        running.cancel()


async def test_a_server_that_has_too_much_to_do_is_asked_less_and_less(site: Site) -> None:
    site.liar.add("/a", MINE)
    sync = site.sync()
    await sync.sync_once()
    tries = fail_with(site, LimitError("too much"))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(sync.run_entries())
        await site.until(lambda: len(tries) >= 12, timedelta(seconds=30))
        assert max(site.clock.slept) > 60
        running.cancel()


async def test_a_refusal_of_the_agent_names_the_identity_it_was_about(site: Site) -> None:
    sync = site.sync()
    fail_with(site, DeniedError("go away"))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(sync.run_entries())
        await site.until(lambda: bool(site.denied))
        running.cancel()
    assert site.denied[0] == site.upstream.version


async def test_intermediates_are_kept_once(site: Site) -> None:
    below = site.liar.authority.below()

    def chain(key: PublicKey, entry: types_pb2.Entry) -> list[bytes]:
        spiffe_id = f"spiffe://{TRUST_DOMAIN}{entry.spiffe_id.path}"
        return [below.leaf(key, spiffe_id, start=now()), *below.chain]

    site.liar.workload_chain = chain  # type: ignore[method-assign]
    site.liar.add("/a", MINE)
    site.liar.add("/b", MINE)
    sync = site.sync()
    await sync.sync_once()
    await sync.renew_due()
    one, other = (svid.chain for svid in site.cache._svids.values())
    assert one[0] != other[0]
    assert one[1] is other[1]


async def test_one_refused_entry_waits_alone(site: Site) -> None:
    site.liar.add("/good", MINE)
    site.liar.add("/bad", MINE)
    honest = site.liar.workload_chain

    def chain(key: PublicKey, entry: types_pb2.Entry) -> Any:
        return [b"garbage"] if entry.id == "/bad" else honest(key, entry)

    site.liar.workload_chain = chain  # type: ignore[method-assign]
    sync = site.sync()
    await sync.sync_once()
    await sync.renew_due()
    await sync.renew_due()
    assert site.cache._svids.keys() == {"/good"}
    assert site.liar.svid_calls == [["/good", "/bad"]]
    await site.clock.advance(timedelta(seconds=1))
    await sync.renew_due()
    assert site.liar.svid_calls[1:] == [["/bad"]]


async def test_an_empty_agent_looks_often(site: Site) -> None:
    sync = site.sync()
    tries = fail_with(site, LimitError("too much"))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(sync.run_entries())
        await site.until(lambda: len(tries) >= 8)
        assert max(site.clock.slept) <= INTERVAL_S
        running.cancel()

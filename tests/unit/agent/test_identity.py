"""The agent's own SVID against a server whose answers are chosen, over the real transport."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.config.hcl import Body, parse
from spire_hw.errors import (
    DeniedError,
    DeniedReason,
    InvalidInputError,
    LimitError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import SoftwareSigner
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.keymanager import Keys
from spire_hw.posture.verdict import NodeState
from spire_hw.rpc.convert import bundle_to_pb
from spire_hw.x509.csr import build_csr
from spire_hw_agent.config import build_settings
from spire_hw_agent.enroll import Enroller
from spire_hw_agent.identity import AgentIdentity
from spire_hw_agent.storage import Storage
from spire_hw_agent.trust import Trust
from spire_hw_agent.upstream.client import Upstream
from spire_hw_agent.upstream.posture import Standing
from spire_hw_plugins.keymanager.memory import MemoryKeyManager
from spire_hw_plugins.nodeattestor.join_token import JoinTokenAttestor
from spire_hw_sim.clock import SimClock
from spire_hw_sim.liar import AGENT_PATH, TRUST_DOMAIN, LyingServer
from spire_hw_sim.pki import Authority, now
from tests.unit.agent.clock import WatchedClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from spire_hw.key import PublicKey
    from spire_hw.plugin.nodeattestor import AgentExchange

pytestmark = pytest.mark.asyncio

LOG = get_logger("test")
TOKEN = uuid4().hex


@dataclass
class Told:
    """What the identity told the rest of the agent."""

    ends: list[SpireHwError] = field(default_factory=list)
    lost: int = 0
    new: int = 0


@dataclass
class Site:
    """An identity, the server it asks and the directory it writes to."""

    liar: LyingServer
    identity: AgentIdentity
    upstream: Upstream
    clock: WatchedClock
    told: Told
    data: Path


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
    others, told = SimClock(), Told()
    watched = WatchedClock()
    storage = Storage(tmp_path / "data")
    host = HostInfo(
        Side.AGENT, settings.trust_domain, tmp_path / "data", LOG, others, join_token=TOKEN
    )
    keys = MemoryKeyManager(host)
    await keys.configure(Body.empty())
    async with asyncio.timeout(60), LyingServer() as liar:
        trust = Trust(settings, storage, clock=others, log=LOG)
        await trust.accept(liar.authority.bundle())
        upstream = Upstream(
            "127.0.0.1", liar.port, settings.trust_domain, trust, clock=others, log=LOG
        )
        enroller = Enroller(
            trust_domain=settings.trust_domain,
            keys=Keys(keys, "memory"),
            attestor_name="join_token",
            attestor=JoinTokenAttestor(host),
            upstream=upstream,
            trust=trust,
            storage=storage,
            clock=others,
            log=LOG,
            renew_at=lambda not_before, not_after: not_after - timedelta(minutes=10),
        )

        def lost() -> None:
            told.lost += 1

        def new() -> None:
            told.new += 1

        identity = AgentIdentity(
            enroller,
            upstream,
            trust,
            storage,
            clock=watched,
            log=LOG,
            on_end=told.ends.append,
            on_lost=lost,
            on_new=new,
            on_new_trust=lambda: None,
        )
        yield Site(liar, identity, upstream, watched, told, tmp_path / "data")
        await upstream.close()
    storage.close()


async def test_a_slow_attestor_does_not_try_the_servers_patience(site: Site) -> None:
    """A server waits for the first message a few seconds; a TPM may need longer for its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = await build_csr(SoftwareSigner(key), spiffe_id=None)

    async def drive(exchange: AgentExchange) -> None:
        with pytest.raises(SpireHwError, match="has sent nothing yet"):
            await exchange.receive()
        await asyncio.sleep(0.3)  # a call that had begun would be there by now
        assert site.liar.attestations == 0
        await exchange.send(b"who I am")

    issued, _ = await site.upstream.attest("tpm", csr, drive, site.liar.authority.bundle())
    assert len(issued.chain) == 1
    assert site.liar.attestations == 1


def fail_times(site: Site, count: int, error: SpireHwError) -> None:
    """Have the server fail so often, then be honest."""
    honest, left = site.liar.agent_chain, [count]

    def chain(key: PublicKey) -> object:
        if left[0]:
            left[0] -= 1
            raise error
        return honest(key)

    site.liar.agent_chain = chain  # type: ignore[method-assign, assignment]


async def start(site: Site) -> None:
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(site.identity.start())
        while not starting.done():
            await site.clock.advance(timedelta(seconds=30))
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("error", "is_soon"), [(UnavailableError("away"), True), (LimitError("busy"), False)]
)
async def test_enrolling_is_tried_until_it_succeeds(
    site: Site, error: SpireHwError, is_soon: bool
) -> None:
    fail_times(site, 12, error)
    await start(site)
    assert site.identity.is_alive()
    assert len(site.clock.slept) == 12
    assert (max(site.clock.slept) <= 10) is is_soon
    assert max(site.clock.slept) <= 60


async def test_a_verdict_on_this_node_is_not_argued_with(site: Site) -> None:
    fail_times(site, 1, InvalidInputError("no such token"))
    with pytest.raises(InvalidInputError, match="no such token"):
        await site.identity.start()
    assert site.clock.slept == []


def taint_first(site: Site, second: Authority) -> None:
    first = site.liar.authority
    bundle = first.bundle(second)
    tainted = bundle.with_tainted_x509(bundle.x509_authorities[0].authority_id)
    site.liar.bundle_answer = lambda: bundle_to_pb(tainted)  # type: ignore[method-assign]


def issue_by(site: Site, authority: Authority) -> list[int]:
    issued: list[int] = []

    def chain(key: PublicKey) -> list[bytes]:
        issued.append(1)
        return [authority.leaf(key, f"spiffe://{TRUST_DOMAIN}{AGENT_PATH}", start=now())]

    site.liar.agent_chain = chain  # type: ignore[method-assign]
    return issued


def authority_id(authority: Authority) -> str:
    return authority.bundle().x509_authorities[0].authority_id


async def test_an_svid_of_a_tainted_authority_is_renewed_at_once(site: Site) -> None:
    second = Authority(TRUST_DOMAIN)
    issue_by(site, site.liar.authority)
    await site.identity.start()
    taint_first(site, second)
    issued = issue_by(site, second)
    await site.identity.renew_if_due()
    assert issued == []  # nobody has told it yet
    await learn(site)
    await site.identity.renew_if_due()
    assert site.identity.current is not None
    assert site.identity.current.authority_id == authority_id(second)
    await site.identity.renew_if_due()
    assert len(issued) == 1
    assert site.told.new == 2


async def test_a_server_that_still_signs_with_a_tainted_authority_is_asked_once(
    site: Site,
) -> None:
    second = Authority(TRUST_DOMAIN)
    issued = issue_by(site, site.liar.authority)
    await site.identity.start()
    taint_first(site, second)
    await learn(site)
    for _ in range(3):
        await site.identity.renew_if_due()
    assert len(issued) == 2  # the first one and one renewal
    assert site.identity.is_alive()


async def learn(site: Site) -> None:
    """Take up the bundle the server publishes, as synchronisation does."""
    await site.identity._trust.accept(await site.upstream.get_bundle())


async def test_a_verdict_on_an_earlier_svid_is_late(site: Site) -> None:
    await site.identity.start()
    late = site.upstream.version - 1
    expired = DeniedError("expired", DeniedReason.AGENT_EXPIRED)
    await site.identity.denied(expired, late)
    assert site.identity.is_alive()
    await site.identity.denied(expired, site.upstream.version)
    assert site.identity.current is None
    with pytest.raises(UnavailableError, match="attesting"):
        await site.upstream.get_bundle()


async def test_a_ban_ends_everything(site: Site) -> None:
    await site.identity.start()
    await site.identity.denied(
        DeniedError("banned", DeniedReason.AGENT_BANNED), site.upstream.version
    )
    assert site.told.lost == 1
    assert "agent evict" in site.told.ends[0].message
    assert site.identity.current is None


async def test_a_refusal_without_a_reason_changes_nothing(site: Site) -> None:
    await site.identity.start()
    await site.identity.denied(DeniedError("no"), site.upstream.version)
    assert site.identity.is_alive()


async def test_the_loop_attests_again_when_the_svid_was_taken_away(site: Site) -> None:
    await site.identity.start()
    seen = site.told.new
    async with asyncio.TaskGroup() as group:
        running = group.create_task(site.identity.run())
        await site.identity.denied(
            DeniedError("gone", DeniedReason.AGENT_NOT_ATTESTED), site.upstream.version
        )
        await wait_for(site, lambda: site.told.new > seen)
        running.cancel()
    assert site.identity.is_alive()


# -- what the server says of the node's state ------------------------------------------------

QUARANTINED = Standing(NodeState.QUARANTINED, ("pcr_mismatch",))
ATTESTED = Standing(NodeState.ATTESTED)


async def test_a_node_in_quarantine_goes_on_attesting_with_pauses_that_grow(site: Site) -> None:
    site.liar.reattestable = True
    await site.identity.start()
    site.identity.follow(QUARANTINED)
    # Some attestations succeed and heal nobody, some are refused and end nobody.
    fail_times(site, 3, DeniedError("policy: PCR 4 is not allowed [pcr_mismatch]"))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(site.identity.run())
        await wait_for(site, lambda: site.told.new >= 6)
        slept = list(site.clock.slept)
        site.identity.follow(ATTESTED)
        running.cancel()
    assert slept[0] <= 5
    assert max(slept) <= 60
    assert max(slept[-3:]) > 10
    assert (site.told.ends, site.told.lost) == ([], 0)
    site.clock.slept.clear()
    await site.identity.renew_if_due()
    assert site.told.new == 6  # healed: nothing is due


async def test_a_node_is_attested_once_more_when_the_server_asks_for_it(site: Site) -> None:
    site.liar.reattestable = True
    await site.identity.start()
    site.identity.follow(replace(ATTESTED, reattest=True))
    for _ in range(3):
        await site.identity.renew_if_due()
    assert site.told.new == 2


async def test_a_server_that_is_never_content_is_asked_less_and_less(site: Site) -> None:
    site.liar.reattestable = True
    await site.identity.start()
    wish = replace(ATTESTED, reattest=True)
    async with asyncio.TaskGroup() as group:
        site.identity.follow(wish)
        running = group.create_task(site.identity.run())
        for count in range(2, 9):
            await wait_for(site, lambda count=count: site.told.new >= count)
            site.identity.follow(wish)
        running.cancel()
    assert max(site.clock.slept) > 20


async def test_a_node_that_attests_only_once_is_not_asked_again(site: Site) -> None:
    await site.identity.start()
    site.identity.follow(QUARANTINED)
    await site.identity.renew_if_due()
    site.identity.follow(replace(ATTESTED, reattest=True))
    await site.identity.renew_if_due()
    assert site.told.new == 1


@pytest.mark.parametrize(("standing", "ends"), [(None, 1), (ATTESTED, 0), (QUARANTINED, 0)])
async def test_a_refused_attestation_ends_only_agents_whose_server_tells_no_states(
    site: Site, standing: Standing | None, ends: int
) -> None:
    site.liar.reattestable = True
    await site.identity.start()
    site.identity.follow(standing)
    assert site.identity.current is not None
    await site.clock.advance(timedelta(hours=1))
    fail_times(site, 1, DeniedError("policy: PCR 4 is not allowed [pcr_mismatch]"))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(site.identity.run())
        await wait_for(site, lambda: bool(site.told.ends) or site.told.new > 1)
        running.cancel()
    assert len(site.told.ends) == ends


async def test_a_ban_on_the_stream_ends_everything(site: Site) -> None:
    await site.identity.start()
    site.identity.follow(Standing(NodeState.BANNED, ("ima_rollback",)))
    assert site.told.lost == 1
    assert "agent evict" in site.told.ends[0].message
    assert site.identity.current is None


async def wait_for(site: Site, what: Callable[[], bool]) -> None:
    while not what():
        await site.clock.advance(timedelta(seconds=1))
        await asyncio.sleep(0.005)

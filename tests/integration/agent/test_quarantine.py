"""What an agent does about the state a server tells it; the server says what a test wants."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw._pb import hw_posture_pb2 as pb
from spire_hw.bootid import read_boot_id
from spire_hw.errors import DeniedError, DeniedReason
from spire_hw_sim import liar
from spire_hw_sim.liar import AGENT_PATH, LyingServer
from spire_hw_sim.pki import now
from spire_hw_sim.programs import try_run
from spire_hw_sim.workload import Workload, eventually, refusal, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spire_hw.key import PublicKey
    from spire_hw_agent.app import Agent

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

MINE = f"unix:uid:{os.getuid()}"


class SteadyServer(LyingServer):
    """Issues agent SVIDs that are not due for renewal yet."""

    def agent_chain(self, key: PublicKey) -> list[bytes]:
        return [self.leaf(key, AGENT_PATH, start=now())]


class WatchfulServer(SteadyServer):
    """Tells agents whatever is put into its queue, on whichever stream is open.

    Attributes:
        told: messages for the agent.
        heard: what agents sent.
        streams: how many were opened.
        syncs: how many synchronisations were answered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.told: asyncio.Queue[pb.HeartbeatResponse] = asyncio.Queue()
        self.heard: list[pb.HeartbeatRequest] = []
        self.streams = 0
        self.syncs = 0
        self.first = state("attested")

    async def heartbeat_answers(
        self, requests: AsyncIterator[Any]
    ) -> AsyncIterator[pb.HeartbeatResponse]:
        self.streams += 1
        self.heard.append(await anext(requests))
        yield self.first

        async def listen() -> None:
            async for request in requests:
                self.heard.append(request)

        async with asyncio.TaskGroup() as group:
            listening = group.create_task(listen())
            try:
                while True:
                    yield await self.told.get()
            finally:
                listening.cancel()

    async def sync_answers(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for answer in super().sync_answers(requests):
            yield answer
        self.syncs += 1

    def say(self, word: str, *reasons: str) -> None:
        """Tell the agent a state, now and on every later stream."""
        self.first = state(word, *reasons)
        self.told.put_nowait(self.first)


def state(word: str, *reasons: str, **fields: Any) -> pb.HeartbeatResponse:
    made = pb.HeartbeatResponse.State(state=word, reasons=reasons, **fields)
    return pb.HeartbeatResponse(state=made)


def challenge(nonce: bytes = bytes(32), *pcrs: int, bank: str = "sha256") -> pb.HeartbeatResponse:
    asked = pb.HeartbeatResponse.Challenge(nonce=nonce, timeout_ms=1000)
    asked.quotes.add(bank=bank, pcrs=pcrs or (0, 7))
    return pb.HeartbeatResponse(challenge=asked)


@pytest.fixture
def home() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="shw"))
    yield made
    shutil.rmtree(made)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[WatchfulServer]:
    async with asyncio.timeout(60), WatchfulServer() as made:
        made.add("/web", MINE)
        yield made


def agent_of(server: LyingServer, home: Path) -> Agent:
    """Return an agent whose keys outlive it."""
    return liar.agent_of(
        server, home, f'KeyManager "disk" {{ plugin_data {{ directory = "{home}" }} }}'
    )


async def test_quarantine_ends_every_stream_and_healing_brings_the_identity_back(
    server: WatchfulServer, home: Path
) -> None:
    async with agent_of(server, home) as agent, Workload(home / "api.sock") as workload:
        await eventually(workload.x509_svid)
        await workload.jwt_svid(["a"])
        async with workload.x509_svids() as stream:
            await anext(stream)
            server.say("quarantined", "pcr_mismatch", "secure_boot")
            with pytest.raises(DeniedError, match=r"quarantined \(pcr_mismatch, secure_boot\)"):
                await anext(stream)
        assert (agent.cache.svid_count, len(agent.cache.entries)) == (0, 0)
        assert len(agent.cache.tokens) == 0
        for attempt in (workload.x509_svid, workload.x509_bundles, workload.jwt_bundles):
            with pytest.raises(DeniedError, match="pcr_mismatch"):
                await attempt()
        with pytest.raises(DeniedError, match="pcr_mismatch"):
            await workload.jwt_svid(["a"])
        assert not await agent.is_healthy()
        done = await asyncio.to_thread(
            try_run, "spire-hw-agent", "healthcheck", "-socketPath", home / "api.sock"
        )
        assert done.returncode == 1
        assert "quarantined (pcr_mismatch, secure_boot)" in done.stderr

        server.say("attested")
        assert (await eventually(workload.x509_svid)).svids
        assert await agent.is_healthy()


async def test_what_was_under_way_when_the_node_was_cut_off_brings_nothing_back(
    server: WatchfulServer, home: Path
) -> None:
    async with agent_of(server, home) as agent, Workload(home / "api.sock") as workload:
        await eventually(workload.x509_svid)
        server.say("quarantined", "pcr_mismatch")
        await until(lambda: agent.cache.is_cut_off)
        # This server goes on answering synchronisations, as one that was asked before would.
        server.add("/new", MINE)
        calls, syncs = len(server.svid_calls), server.syncs
        await until(lambda: server.syncs >= syncs + 3)
        assert (agent.cache.svid_count, len(agent.cache.entries)) == (0, 0)
        assert len(server.svid_calls) == calls


async def test_an_agent_that_restarts_in_quarantine_serves_nothing(
    server: WatchfulServer, home: Path
) -> None:
    async with agent_of(server, home), Workload(home / "api.sock") as workload:
        await eventually(workload.x509_svid)
    server.first = state("quarantined", "pcr_mismatch")

    async def refuse(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        raise DeniedError("agent is in quarantine: pcr_mismatch")
        yield

    server.sync_answers = refuse  # type: ignore[method-assign]
    async with agent_of(server, home) as agent, Workload(home / "api.sock") as workload:
        await refusal(workload.x509_svid, "pcr_mismatch")
        assert agent.identity.is_alive()


async def test_a_quarantine_outlasts_its_stream(server: WatchfulServer, home: Path) -> None:
    async with agent_of(server, home), Workload(home / "api.sock") as workload:
        await eventually(workload.x509_svid)
        server.first = state("quarantined", "pcr_mismatch")
        server.told.put_nowait(pb.HeartbeatResponse())  # breaks the rules: the agent hangs up
        await refusal(workload.x509_svid, "pcr_mismatch")
        streams = server.streams
        server.first = pb.HeartbeatResponse()
        server.told.put_nowait(pb.HeartbeatResponse())
        await until(lambda: server.streams >= streams + 2)
        with pytest.raises(DeniedError, match="pcr_mismatch"):
            await workload.x509_svid()


async def test_a_banned_agent_gives_everything_up_and_ends(
    server: WatchfulServer, home: Path
) -> None:
    async with agent_of(server, home) as agent, Workload(home / "api.sock") as workload:
        await eventually(workload.x509_svid)
        server.say("banned", "ima_rollback")
        with pytest.raises(DeniedError, match="banned"):
            await agent.failed()
        with pytest.raises(DeniedError, match="ima_rollback"):
            await workload.x509_svid()
        assert agent.cache.svid_count == 0
        assert not agent.identity.is_alive()


async def test_a_server_without_heartbeats_is_asked_once(home: Path) -> None:
    async with asyncio.timeout(60), SteadyServer() as server:
        server.add("/web", MINE)
        asked = 0
        unknown = server.heartbeat_answers

        def count(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
            nonlocal asked
            asked += 1
            return unknown(requests)

        server.heartbeat_answers = count  # type: ignore[method-assign, assignment]
        async with agent_of(server, home) as agent, Workload(home / "api.sock") as workload:
            await eventually(workload.x509_svid)
            await until(lambda: asked)
            assert await agent.is_healthy()
        assert asked == 1


async def test_a_node_that_cannot_answer_says_so(server: WatchfulServer, home: Path) -> None:
    async with agent_of(server, home):
        server.told.put_nowait(challenge())
        await until(lambda: len(server.heard) > 1)
    hello, answer = server.heard[:2]
    assert not hello.hello.can_answer
    assert hello.hello.boot_id == read_boot_id()
    assert "cannot answer" in answer.cannot_answer.reason


async def test_a_new_svid_gets_a_new_stream(server: WatchfulServer, home: Path) -> None:
    async with agent_of(server, home) as agent:
        await until(lambda: server.streams)
        current = agent.identity.current
        assert current is not None
        await agent.identity.denied(
            DeniedError("attest again", DeniedReason.AGENT_MUST_REATTEST), version=1
        )
        await until(lambda: server.streams > 1)
        assert agent.identity.current is not None
        assert agent.identity.current.chain != current.chain
        server.say("quarantined", "pcr_mismatch")
        await until(lambda: agent.cache.is_cut_off)


LIES = {
    "nothing": pb.HeartbeatResponse(),
    "a state nobody knows": state("splendid"),
    "no state": state(""),
    "a short nonce": challenge(bytes(31)),
    "a PCR beyond the last": challenge(bytes(32), 0, 24),
    "PCRs out of order": challenge(bytes(32), 7, 0),
    "a PCR twice": challenge(bytes(32), 7, 7),
    "no quotes": pb.HeartbeatResponse(
        challenge=pb.HeartbeatResponse.Challenge(nonce=bytes(32), timeout_ms=1)
    ),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_server_that_breaks_the_rules_is_left_and_tried_again(
    server: WatchfulServer, home: Path, lie: str
) -> None:
    async with agent_of(server, home) as agent, Workload(home / "api.sock") as workload:
        await eventually(workload.x509_svid)
        server.told.put_nowait(LIES[lie])
        await until(lambda: server.streams > 1)
        assert await workload.x509_svid()
        assert not any(m.HasField("answer") for m in server.heard)
        server.say("quarantined", "pcr_mismatch")
        await until(lambda: agent.cache.is_cut_off)


async def test_a_server_that_is_away_heals_nobody(server: WatchfulServer, home: Path) -> None:
    async with agent_of(server, home) as agent, Workload(home / "api.sock") as workload:
        await eventually(workload.x509_svid)
        server.say("quarantined", "pcr_mismatch")
        await until(lambda: agent.cache.is_cut_off)
        await server.__aexit__()
        with pytest.raises(DeniedError, match="pcr_mismatch"):
            await workload.x509_svid()

"""Heartbeats of machines and agents that lie, and of those that may not beat."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw._pb import hw_posture_pb2 as pb
from spire_hw.config import hcl
from spire_hw.errors import DeniedError, DeniedReason, ErrorKind, SpireHwError
from spire_hw.posture.verdict import NodeState
from spire_hw_agent.upstream.posture import HEARTBEAT, Asked
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_sim.again import refused
from spire_hw_sim.beater import Beater
from spire_hw_sim.fleet.keys import FleetKeys
from spire_hw_sim.servers import TIMEOUT_S, Operator, joined_agent, server_config
from spire_hw_sim.softtpm import make_ak

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatChallenge, SignedQuote
    from spire_hw_agent.upstream.posture import Standing
    from spire_hw_sim.beater import BeaterStream
    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio

ADMIN = "/spire_hw.server.v1.PostureAdmin/"


class Site:
    """A server with heartbeats, and machines."""

    def __init__(self, server: Server, operator: Operator, keys: FleetKeys, clock: Any) -> None:
        self.server = server
        self.operator = operator
        self.keys = keys
        self.clock = clock

    async def machine(self, number: int = 1) -> Beater:
        node = self.keys.node(number)
        node.tpm.pcrs = dict(node.tpm.pcrs)
        return Beater(node, self.server.port, await self.operator.bundle(), self.clock)

    async def known(self, number: int = 1) -> Beater:
        beater = await self.machine(number)
        await beater.attest()
        return beater

    async def posture(self, beater: Beater) -> tuple[pb.NodePosture, int]:
        """Return what is known of a node, and how long its history is."""
        state = await self.operator.channel.unary(
            ADMIN + "GetState",
            pb.GetStateRequest(agent_id=beater.id.text),
            pb.NodePosture,
            timeout_s=TIMEOUT_S,
        )
        history = await self.operator.channel.unary(
            ADMIN + "ListEvidence",
            pb.ListEvidenceRequest(agent_id=beater.id.text),
            pb.ListEvidenceResponse,
            timeout_s=TIMEOUT_S,
        )
        state.ClearField("connected")
        return state, len(history.records)

    async def challenge(self, stream: BeaterStream) -> HeartbeatChallenge:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(stream.challenge())
            while not asked.done():
                stream.beater.tick(5)
                await self.clock.advance(timedelta(seconds=5))
                await asyncio.wait({asked}, timeout=0.05)
        return asked.result()

    @asynccontextmanager
    async def streaming(self, beater: Beater) -> AsyncIterator[BeaterStream]:
        async with asyncio.timeout(TIMEOUT_S), beater.stream() as stream:
            await stream.state()
            yield stream

    async def said_to(
        self, stream: BeaterStream, bend: Callable[[HeartbeatAnswer], HeartbeatAnswer]
    ) -> Standing:
        """Answer the next challenge with something bent."""
        challenge = await self.challenge(stream)
        await stream.raw.answer(bend(stream.beater.answer(challenge)))
        return await stream.state()


@pytest_asyncio.fixture
async def site(short_dir: Path, clock: SimClock) -> AsyncIterator[Site]:
    keys = FleetKeys(short_dir / "fleet")
    plugin = (
        f'NodeAttestor "tpm" {{ plugin_data {{ endorsement_ca_path = "{keys.roots}"'
        " pcrs { sha256 = [0, 4, 7] } } }"
    )
    limits = "ratelimit { attestation = false signing = false }"
    text = server_config(short_dir, key_manager="memory", plugins=plugin, more=limits)
    server = Server(build_settings(hcl.parse(f"{text}\nposture {{}}", "s")), clock=clock)
    await server.start()
    operator = Operator(server.settings.socket_path)
    yield Site(server, operator, keys, clock)
    await operator.close()
    await server.close()


def first_quote(answer: HeartbeatAnswer, **changes: Any) -> HeartbeatAnswer:
    quote = replace(answer.quotes[0], **changes)
    return replace(answer, quotes=(quote, *answer.quotes[1:]))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def other_values(quote: SignedQuote) -> dict[str, dict[int, bytes]]:
    return {bank: dict.fromkeys(values, b"x" * 32) for bank, values in quote.pcrs.items()}


BENDS: dict[str, Callable[[HeartbeatAnswer], HeartbeatAnswer]] = {
    "signature": lambda a: first_quote(a, signature=flipped(a.quotes[0].signature)),
    "statement": lambda a: first_quote(a, attest=flipped(a.quotes[0].attest)),
    "cut": lambda a: first_quote(a, attest=a.quotes[0].attest[:-1]),
    "values": lambda a: first_quote(a, pcrs=other_values(a.quotes[0])),
    "no values": lambda a: first_quote(a, pcrs={}),
    "no quotes": lambda a: replace(a, quotes=()),
    "twice": lambda a: replace(a, quotes=a.quotes * 2),
    "log unasked": lambda a: replace(a, boot_log=b"x"),
    "list unasked": lambda a: replace(a, ima=(b"x",), ima_from=0),
}


@pytest.mark.parametrize("bend", BENDS)
async def test_answer_that_does_not_hold_changes_nothing(site: Site, bend: str) -> None:
    beater = await site.known()
    before = await site.posture(beater)
    async with site.streaming(beater) as stream:
        said = await site.said_to(stream, BENDS[bend])
        assert said.state is NodeState.ATTESTED
        assert said.reasons or said.message
        assert await site.posture(beater) == before
        said = await site.said_to(stream, lambda answer: answer)
        assert (said.state, said.reasons) == (NodeState.ATTESTED, ())


async def test_heartbeat_of_another_attestation_key(site: Site) -> None:
    beater = await site.known()
    before = await site.posture(beater)
    mine = beater.node.tpm.ak
    async with site.streaming(beater) as stream:
        beater.node.tpm.ak = make_ak()
        said = await site.said_to(stream, lambda answer: answer)
        assert said.state is NodeState.ATTESTED
        assert said.reasons
        assert await site.posture(beater) == before
        beater.node.tpm.ak = mine
        assert (await site.said_to(stream, lambda answer: answer)).reasons == ()


async def test_answer_to_an_earlier_challenge_is_worth_nothing(site: Site) -> None:
    beater = await site.known()
    async with site.streaming(beater) as stream:
        old = beater.answer(await site.challenge(stream))
        await stream.raw.answer(old)
        assert (await stream.state()).reasons == ()
        said = await site.said_to(stream, lambda _: old)
        assert said.reasons == ("nonce_mismatch",)


async def test_quote_bound_to_another_svid_is_worth_nothing(site: Site) -> None:
    beater, other = await site.known(), await site.known(2)
    async with site.streaming(beater) as stream:
        challenge = await site.challenge(stream)
        beater.node.key, other.node.key = other.node.key, beater.node.key
        await stream.raw.answer(beater.answer(challenge))
        assert (await stream.state()).reasons == ("nonce_mismatch",)


async def test_svid_that_was_superseded(site: Site) -> None:
    beater = await site.known()
    old = replace(beater.agent)
    await beater.attest()
    beater.agent, new = old, beater.agent

    async def act() -> None:
        async with site.streaming(beater):
            pass

    superseded = await refused(act)
    assert isinstance(superseded, DeniedError)
    assert superseded.reason is DeniedReason.AGENT_NOT_ACTIVE
    beater.agent = new
    async with site.streaming(beater) as stream:
        assert (await site.said_to(stream, lambda answer: answer)).reasons == ()


async def test_stream_does_not_outlive_its_svid(site: Site) -> None:
    beater = await site.known()
    async with site.streaming(beater) as stream:
        assert (await site.said_to(stream, lambda answer: answer)).reasons == ()
        site.clock._now += timedelta(hours=2)
        async with asyncio.TaskGroup() as group:
            ended = group.create_task(end_of(stream))
            while not ended.done():
                await site.clock.advance(timedelta(seconds=5))
                await asyncio.wait({ended}, timeout=0.05)
    error = ended.result()
    assert isinstance(error, DeniedError)
    assert error.reason is DeniedReason.AGENT_EXPIRED
    with pytest.raises(SpireHwError) as refused:  # TLS already takes no such certificate
        async with site.streaming(beater):
            pass
    assert refused.value.kind is ErrorKind.UNAVAILABLE


async def test_heartbeats_are_for_agents_alone(site: Site) -> None:
    beater = await site.machine()
    with pytest.raises(DeniedError):
        async with site.streaming(beater):
            pass
    hello = pb.HeartbeatRequest(hello=pb.HeartbeatRequest.Hello(can_answer=True))
    async with site.operator.channel.bidi(HEARTBEAT, pb.HeartbeatResponse) as call:
        await call.send(hello)
        with pytest.raises(DeniedError):
            await call.receive()


async def test_node_that_shows_no_evidence_is_told_its_state_alone(site: Site) -> None:
    agent = await joined_agent(site.server, site.operator)
    async with (
        asyncio.timeout(TIMEOUT_S),
        await agent.channel() as channel,
        channel.bidi(HEARTBEAT, pb.HeartbeatResponse) as call,
    ):
        await call.send(pb.HeartbeatRequest(hello=pb.HeartbeatRequest.Hello(can_answer=True)))
        answer = await call.receive()
        assert answer is not None
        assert (answer.state.state, answer.state.reattest) == ("attested", False)


async def test_two_machines_with_one_tpm_identity(site: Site) -> None:
    one = await site.known()
    two = await site.machine()
    two.node.tpm.clock_ms, two.node.tpm.reset_count = 5, one.node.tpm.reset_count + 2
    await site.clock.advance(timedelta(minutes=1))
    # The second machine shares all keys, also that of the SVID.
    async with site.streaming(one) as stream:
        said = await site.said_to(stream, lambda answer: answer)
        assert said.state is NodeState.ATTESTED
    await site.clock.advance(timedelta(minutes=1))
    await two.attest()
    one.agent = two.agent
    async with site.streaming(two) as stream:
        assert (await site.said_to(stream, lambda answer: answer)).reasons == ()
    async with site.streaming(one) as stream:
        said = await site.said_to(stream, lambda answer: answer)
        assert (said.state, said.reasons) == (NodeState.QUARANTINED, ("cloned_tpm",))
        # Whichever of them goes on: somebody has to look at it first.
        said = await site.said_to(stream, lambda answer: answer)
        assert said.state is NodeState.QUARANTINED
    with pytest.raises(SpireHwError, match="cloned_tpm") as denied:
        await two.attest()
    assert denied.value.kind is ErrorKind.PERMISSION_DENIED


async def test_clock_that_goes_back_is_refused_without_a_state(site: Site) -> None:
    beater = await site.known()
    async with site.streaming(beater) as stream:
        assert (await site.said_to(stream, lambda answer: answer)).reasons == ()
        before = await site.posture(beater)
        challenge = await site.challenge(stream)
        beater.node.tpm.clock_ms = 1
        await stream.raw.answer(beater.answer(challenge))
        said = await stream.state()
        assert (said.state, said.reasons) == (NodeState.ATTESTED, ("clock_rollback",))
        assert await site.posture(beater) == before


async def test_reset_count_that_fell_bans(site: Site) -> None:
    beater = await site.known()
    async with site.streaming(beater) as stream:
        beater.node.tpm.reset_count -= 1
        beater.boot_id = "another"
        said = await site.said_to(stream, lambda answer: answer)
        assert (said.state, said.reasons) == (NodeState.BANNED, ("tpm_replaced",))
        with pytest.raises(DeniedError) as ended:
            await stream.state()
        assert ended.value.reason is DeniedReason.AGENT_BANNED
    with pytest.raises(SpireHwError, match="banned"):
        await beater.attest()


def lost(beater: Beater) -> None:
    beater.node.tpm.restart_count += 1
    beater.node.tpm.pcrs["sha256", 0] = bytes(32)


def reset(beater: Beater) -> None:
    beater.node.tpm.reset_count += 1


def other_firmware(beater: Beater) -> None:
    beater.reboot()
    beater.node.tpm.firmware_version += 1


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (lost, "pcr_lost"),
        (reset, "tpm_reset_without_reboot"),
        (other_firmware, "tpm_firmware"),
    ],
)
async def test_change_that_nothing_explains_is_quarantine(
    site: Site, happens: Callable[[Beater], None], reason: str
) -> None:
    beater = await site.known()
    async with site.streaming(beater) as stream:
        assert (await site.said_to(stream, lambda answer: answer)).reasons == ()
        happens(beater)
        said = await site.said_to(stream, lambda answer: answer)
        assert (said.state, said.reasons) == (NodeState.QUARANTINED, (reason,))
    with pytest.raises(SpireHwError) as denied:
        await beater.attest()
    assert denied.value.kind is ErrorKind.PERMISSION_DENIED
    assert (await site.posture(beater))[0].state == "quarantined"


async def test_sleep_and_reboots_nobody_saw_are_no_change(site: Site) -> None:
    beater = await site.known()
    async with site.streaming(beater) as stream:
        beater.node.tpm.restart_count += 1
        assert (await site.said_to(stream, lambda answer: answer)).reasons == ()
        for _ in range(3):
            beater.reboot()
        beater.node.tpm.clock_ms, beater.node.tpm.safe = 5, 0
        said = await site.said_to(stream, lambda answer: answer)
        assert (said.state, said.reasons) == (NodeState.ATTESTED, ())


async def test_banks_the_firmware_never_used_are_a_finding(site: Site) -> None:
    beater = await site.known()
    async with site.streaming(beater) as stream:
        beater.reboot()
        for place in [("sha256", n) for n in range(8)]:
            beater.node.tpm.pcrs[place] = bytes(32)
        said = await site.said_to(stream, lambda answer: answer)
        assert (said.state, said.reasons) == (NodeState.QUARANTINED, ("bank_unused",))


async def test_withheld_answers_end_the_stream_and_are_no_excuse(site: Site) -> None:
    beater = await site.known()
    async with site.streaming(beater) as stream:
        await site.challenge(stream)
        async with asyncio.TaskGroup() as group:
            ended = group.create_task(end_of(stream))
            while not ended.done():
                await site.clock.advance(timedelta(seconds=5))
                await asyncio.wait({ended}, timeout=0.05)
        assert ended.result().kind is ErrorKind.DEADLINE_EXCEEDED
    async with site.streaming(beater) as stream, asyncio.TaskGroup() as group:
        told = group.create_task(excused(stream))
        while not told.done():
            await site.clock.advance(timedelta(seconds=5))
            await asyncio.wait({told}, timeout=0.05)
    assert told.result().reasons == ("stale",)
    assert (await site.posture(beater))[0].state == "stale"


async def excused(stream: BeaterStream) -> Standing:
    """Answer nothing until the server has another opinion of the node, and return that."""
    while True:
        message = await stream.raw.receive()
        if isinstance(message, Asked):
            await stream.raw.cannot_answer("the TPM is busy")
        elif message is not None and message.state is not NodeState.ATTESTED:
            return message


async def end_of(stream: BeaterStream) -> SpireHwError:
    """Return the error a stream ends with, after all it still says."""
    try:
        while True:
            await stream.state()
    except SpireHwError as e:
        return e


def request(**changes: Any) -> pb.HeartbeatRequest:
    return pb.HeartbeatRequest(**changes)


HELLO = pb.HeartbeatRequest.Hello
FIRST_MESSAGES = {
    "nothing in it": request(),
    "an answer": request(answer=pb.HeartbeatReply()),
    "an excuse": request(cannot_answer=pb.HeartbeatRequest.CannotAnswer(reason="x")),
    "a long boot id": request(hello=HELLO(boot_id="x" * 65)),
    "a strange boot id": request(hello=HELLO(boot_id="a\nb")),
}


@pytest.mark.parametrize("name", FIRST_MESSAGES)
async def test_stream_begins_with_hello_and_nothing_else(site: Site, name: str) -> None:
    beater = await site.known()
    async with (
        asyncio.timeout(TIMEOUT_S),
        await beater.agent.channel() as channel,
        channel.bidi(HEARTBEAT, pb.HeartbeatResponse) as call,
    ):
        await call.send(FIRST_MESSAGES[name])
        with pytest.raises(SpireHwError) as caught:
            await call.receive()
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def reply(**changes: Any) -> pb.HeartbeatRequest:
    return request(answer=pb.HeartbeatReply(**changes))


def values(*pcrs: int, bank: str = "sha256") -> Any:
    made = [pb.HeartbeatReply.PcrValue(pcr=n, value=b"x" * 32) for n in pcrs]
    return pb.HeartbeatReply.BankValues(bank=bank, pcrs=made)


QUOTE = pb.HeartbeatReply.Quote
WRONG_ANSWERS = {
    "nothing in it": request(),
    "a second hello": request(hello=HELLO()),
    "a long excuse": request(cannot_answer=pb.HeartbeatRequest.CannotAnswer(reason="x" * 1025)),
    "an excuse to steer terminals": request(
        cannot_answer=pb.HeartbeatRequest.CannotAnswer(reason="\x1b[2J")
    ),
    "PCRs out of order": reply(quotes=[QUOTE(values=[values(4, 0)])]),
    "a PCR twice": reply(quotes=[QUOTE(values=[values(4, 4)])]),
    "a PCR there is not": reply(quotes=[QUOTE(values=[values(24)])]),
    "a bank twice": reply(quotes=[QUOTE(values=[values(1), values(2)])]),
    "a strange bank": reply(quotes=[QUOTE(values=[values(1, bank="s" * 17)])]),
    "a large log": reply(boot_log=bytes((1 << 20) + 1)),
    "a large list": reply(ima=[bytes((1 << 20) + 1)], ima_from=0),
    "a large list in parts": reply(ima=[bytes(1 << 19)] * 3, ima_from=0),
    "a list in many parts": reply(ima=[b""] * 17, ima_from=0),
    "many quotes": reply(quotes=[QUOTE()] * 9),
    "a large statement": reply(quotes=[QUOTE(attest=bytes(4097))]),
    "many banks": reply(quotes=[QUOTE(values=[values(1, bank=f"b{n}") for n in range(9)])]),
}


@pytest.mark.parametrize("name", WRONG_ANSWERS)
async def test_malformed_answer_ends_the_stream_and_changes_nothing(site: Site, name: str) -> None:
    beater = await site.known()
    before = await site.posture(beater)
    async with site.streaming(beater) as stream:
        await site.challenge(stream)
        await stream.raw._call.send(WRONG_ANSWERS[name])
        ended = await end_of(stream)
        assert ended.kind in {ErrorKind.INVALID_ARGUMENT, ErrorKind.RESOURCE_EXHAUSTED}
    assert await site.posture(beater) == before
    async with site.streaming(beater) as stream:
        assert (await site.said_to(stream, lambda answer: answer)).reasons == ()

"""NodeAttestor over the wire, both halves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw._pb import plugin_agent_nodeattestor_pb2 as agent_pb
from spire_hw._pb import plugin_server_nodeattestor_pb2 as server_pb
from spire_hw.errors import (
    AttestationError,
    DeniedError,
    DeniedReason,
    ErrorKind,
    Finding,
    InvalidInputError,
    SpireHwError,
)
from spire_hw.goplugin.facade import nodeattestor
from spire_hw.goplugin.facade.link import Link
from spire_hw.plugin.info import PluginKind, Side
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity
from spire_hw.spiffeid import SpiffeId
from tests.integration.goplugin.wire import remote_of, remote_to, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NA = PluginKind.NODE_ATTESTOR
AGENT_ID = SpiffeId.parse("spiffe://example.org/spire/agent/mine/1")
ATTEST = "/spire.plugin.server.nodeattestor.v1.NodeAttestor/Attest"


class Exchange:
    """The agent's stream to a server that asks what it was told to ask."""

    def __init__(self, challenges: list[bytes], refusal: SpireHwError | None = None) -> None:
        self._challenges = challenges
        self._refusal = refusal
        self.sent: list[bytes] = []

    async def send(self, data: bytes) -> None:
        self.sent.append(data)

    async def receive(self) -> bytes:
        challenge = await self.next_challenge()
        assert challenge is not None
        return challenge

    async def next_challenge(self) -> bytes | None:
        if self._refusal is not None:
            raise self._refusal
        return self._challenges.pop(0) if self._challenges else None


class Echo:
    """An agent half: answers every challenge with itself, `rounds` times."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self.svid_keys: list[Any] = []

    async def aid_attestation(self, exchange: Any, svid_key: Any) -> None:
        self.svid_keys.append(svid_key)
        await exchange.send(b"payload")
        for _ in range(self._rounds):
            await exchange.send(b"re:" + await exchange.receive())


@pytest.mark.asyncio
@pytest.mark.parametrize("rounds", [0, 1, 3])
async def test_the_agent_half_speaks_first_and_answers_every_challenge(
    rounds: int, tmp_path: Path
) -> None:
    plugin = Echo(rounds)
    exchange = Exchange([b"c%d" % n for n in range(rounds)])
    async with remote_of(plugin, NA, tmp_path, Side.AGENT) as remote:
        await remote.aid_attestation(exchange, None)
    assert exchange.sent == [b"payload", *(b"re:c%d" % n for n in range(rounds))]
    assert plugin.svid_keys == [None]


@pytest.mark.asyncio
async def test_a_large_payload_gets_through(tmp_path: Path) -> None:
    class Large:
        async def aid_attestation(self, exchange: Any, svid_key: Any) -> None:
            await exchange.send(b"p" * (1 << 20))

    exchange = Exchange([])
    async with remote_of(Large(), NA, tmp_path, Side.AGENT) as remote:
        await remote.aid_attestation(exchange, None)
    assert exchange.sent == [b"p" * (1 << 20)]


@pytest.mark.asyncio
async def test_the_servers_refusal_reaches_the_agent_untouched(tmp_path: Path) -> None:
    refusal = DeniedError("banned", DeniedReason.AGENT_BANNED)
    async with remote_of(Echo(1), NA, tmp_path, Side.AGENT) as remote:
        with pytest.raises(DeniedError) as caught:
            await remote.aid_attestation(Exchange([], refusal), None)
    assert caught.value is refusal


@pytest.mark.asyncio
async def test_an_error_of_the_agent_half_names_the_plugin(tmp_path: Path) -> None:
    class Broken:
        async def aid_attestation(self, exchange: Any, svid_key: Any) -> None:
            raise InvalidInputError("no TPM")

    async with remote_of(Broken(), NA, tmp_path, Side.AGENT) as remote:
        with pytest.raises(InvalidInputError, match=r"^nodeattestor\(mine\): no TPM$"):
            await remote.aid_attestation(Exchange([]), None)


@pytest.mark.asyncio
async def test_an_agent_half_that_says_nothing_does_not_hold_the_agent_up(tmp_path: Path) -> None:
    class Silent:
        async def aid_attestation(self, exchange: Any, svid_key: Any) -> None:
            await asyncio.Event().wait()

    async with serving(nodeattestor.methods(Silent(), Side.AGENT), tmp_path) as channel:
        link = Link(NA, "mine", lambda: channel)
        remote = nodeattestor.RemoteAgentAttestor(link, patience_s=0.2)
        with pytest.raises(
            SpireHwError, match=r"^nodeattestor\(mine\): no payload within"
        ) as caught:
            await remote.aid_attestation(Exchange([]), None)
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED


class AgentScript:
    """An agent half that says what it was told to, taking turns, whatever it hears."""

    def __init__(self, *messages: agent_pb.PayloadOrChallengeResponse) -> None:
        self._messages = messages

    async def aid_attestation(self, requests: Any, call: Any) -> AsyncIterator[Any]:
        for message in self._messages:
            yield message
            await anext(requests, None)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "ended before its payload"),
        ([agent_pb.PayloadOrChallengeResponse()], "no payload in it"),
        ([agent_pb.PayloadOrChallengeResponse(payload=b"")], "a payload of 0 bytes"),
        ([agent_pb.PayloadOrChallengeResponse(challenge_response=b"x")], "no payload in it"),
        (
            [agent_pb.PayloadOrChallengeResponse(payload=b"p" * (1 + (1 << 20)))],
            "a payload of 1048577 bytes",
        ),
        ([agent_pb.PayloadOrChallengeResponse(payload=b"p")], "ended before its challenge"),
        ([agent_pb.PayloadOrChallengeResponse(payload=b"p")] * 2, "no challenge response in it"),
    ],
)
async def test_an_agent_half_that_breaks_the_order_is_refused(
    messages: list[Any], words: str, tmp_path: Path
) -> None:
    script = AgentScript(*messages)
    async with remote_to(script, agent_pb.DESCRIPTOR, NA, tmp_path, Side.AGENT) as remote:
        with pytest.raises(SpireHwError, match=words) as caught:
            await remote.aid_attestation(Exchange([b"c", b"c"]), None)
    assert caught.value.message.startswith("nodeattestor(mine): ")


@pytest.mark.asyncio
async def test_a_server_cannot_keep_an_agent_half_busy_for_ever(tmp_path: Path) -> None:
    async with remote_of(Echo(1000), NA, tmp_path, Side.AGENT) as remote:
        with pytest.raises(InvalidInputError, match="more than 16 challenges"):
            await remote.aid_attestation(Exchange([b"c"] * 1000), None)


class Asking:
    """A server half: asks `rounds` times, then decides."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self.requests: list[AttestationRequest] = []
        self.answers: list[bytes] = []

    async def attest(self, request: AttestationRequest) -> AttestedIdentity:
        self.requests.append(request)
        await request.admit(AGENT_ID)
        for number in range(self._rounds):
            self.answers.append(await request.challenge(b"c%d" % number))
        return AttestedIdentity(AGENT_ID, ["ca:ok", "x:1"], can_reattest=True)


async def answer(challenge: bytes) -> bytes:
    return b"re:" + challenge


async def admit(agent_id: SpiffeId) -> None:
    del agent_id


def request(source: str = "") -> AttestationRequest:
    return AttestationRequest(b"payload", answer, b"spki", admit, source)


@pytest.mark.asyncio
@pytest.mark.parametrize("rounds", [0, 1, 3])
async def test_the_server_half_asks_and_decides(rounds: int, tmp_path: Path) -> None:
    plugin = Asking(rounds)
    async with remote_of(plugin, NA, tmp_path) as remote:
        found = await remote.attest(request("192.0.2.7"))
    assert found == AttestedIdentity(AGENT_ID, ["ca:ok", "x:1"], can_reattest=True)
    assert plugin.answers == [b"re:c%d" % n for n in range(rounds)]
    seen = plugin.requests[0]
    assert (seen.payload, seen.csr_spki, seen.source) == (b"payload", None, "192.0.2.7")


@pytest.mark.asyncio
async def test_findings_of_the_server_half_keep_their_kind(tmp_path: Path) -> None:
    class Refusing:
        async def attest(self, request: AttestationRequest) -> AttestedIdentity:
            finding = Finding("ek_unlisted", "ek: not registered", ErrorKind.PERMISSION_DENIED)
            raise AttestationError([finding])

    async with remote_of(Refusing(), NA, tmp_path) as remote:
        with pytest.raises(DeniedError, match=r"^nodeattestor\(mine\): ek: not registered \[ek_"):
            await remote.attest(request())


@pytest.mark.asyncio
async def test_the_agents_failure_to_answer_reaches_the_server_untouched(tmp_path: Path) -> None:
    error = SpireHwError("agent hung up")

    async def hang_up(challenge: bytes) -> bytes:
        raise error

    async with remote_of(Asking(1), NA, tmp_path) as remote:
        with pytest.raises(SpireHwError) as caught:
            await remote.attest(AttestationRequest(b"p", hang_up, None, admit))
    assert caught.value is error


class ServerScript:
    """A server half that says what it was told to, taking turns, whatever it hears."""

    def __init__(self, *messages: server_pb.AttestResponse) -> None:
        self._messages = messages

    async def attest(self, requests: Any, call: Any) -> AsyncIterator[Any]:
        for message in self._messages:
            yield message
            await anext(requests, None)


def attributes(**values: Any) -> server_pb.AttestResponse:
    given = {"spiffe_id": str(AGENT_ID)} | values
    return server_pb.AttestResponse(agent_attributes=server_pb.AgentAttributes(**given))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no agent attributes"),
        ([server_pb.AttestResponse()], "no agent attributes"),
        ([server_pb.AttestResponse(challenge=b"c")] * 17, "more than 16 challenges"),
        ([server_pb.AttestResponse(challenge=b"c" * (1 + (1 << 20)))], "a challenge of 1048577"),
        ([attributes(spiffe_id="")], "SPIFFE ID"),
        ([attributes(spiffe_id="spiffe://Example.org/x")], "SPIFFE ID"),
        ([attributes(selector_values=[""])], "selector value is empty"),
        ([attributes(selector_values=["x" * 2049])], "longer than 2048"),
        ([attributes(selector_values=["a\0b"])], "NUL"),
        ([attributes(selector_values=["x"] * 1001)], "1001 selectors"),
    ],
)
async def test_a_server_half_that_answers_nonsense_is_refused(
    messages: list[Any], words: str, tmp_path: Path
) -> None:
    script = ServerScript(*messages)
    async with remote_to(script, server_pb.DESCRIPTOR, NA, tmp_path) as remote:
        with pytest.raises(SpireHwError, match=words) as caught:
            await remote.attest(request())
    assert caught.value.kind is ErrorKind.INTERNAL
    assert caught.value.message.startswith("nodeattestor(mine): ")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "sent",
    [
        [],
        [server_pb.AttestRequest()],
        [server_pb.AttestRequest(payload=b"")],
        [server_pb.AttestRequest(challenge_response=b"x")],
        [server_pb.AttestRequest(payload=b"p")],
        [server_pb.AttestRequest(payload=b"p"), server_pb.AttestRequest(payload=b"p")],
    ],
)
async def test_a_host_that_breaks_the_order_is_told_so(sent: list[Any], tmp_path: Path) -> None:
    async with (
        serving(nodeattestor.methods(Asking(1), Side.SERVER), tmp_path) as channel,
        channel.bidi(ATTEST, server_pb.AttestResponse, timeout_s=30) as call,
    ):
        for message in sent:
            await call.send(message)
        await call.done_sending()

        async def listen() -> None:
            while await call.receive() is not None:
                continue

        with pytest.raises(InvalidInputError):
            await listen()

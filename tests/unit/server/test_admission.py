from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from structlog.testing import capture_logs

from spire_hw.errors import (
    AttestationError,
    DeniedError,
    ErrorKind,
    Finding,
    InvalidInputError,
    LimitError,
    NotReadyError,
    PluginError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import spki_der
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain, server_id
from spire_hw_server.admission import Admission, Admissions
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import JoinToken, KeyRole, NodeFilter
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore

TD = TrustDomain("example.org")
SPKI = spki_der(ec.generate_private_key(ec.SECP256R1()).public_key())
LOG = structlog.get_logger()


class Scripted:
    """An attestor that does what a test says."""

    def __init__(self, script: Callable[[AttestationRequest], Awaitable[AttestedIdentity]]) -> None:
        self._script = script

    async def attest(self, request: AttestationRequest) -> AttestedIdentity:
        return await self._script(request)


class Generous(Scripted):
    """One that may take larger messages and more time."""

    max_message_bytes = 10 << 20
    timeout_s = 3600.0


def identity(name: str = "n1", *values: str, attestor: str = "tpm") -> AttestedIdentity:
    return AttestedIdentity(TD.member("spire", "agent", attestor, name), list(values), True)


def answering(answer: AttestedIdentity) -> Scripted:
    async def script(_: AttestationRequest) -> AttestedIdentity:
        return answer

    return Scripted(script)


def failing(error: Exception) -> Scripted:
    async def script(_: AttestationRequest) -> AttestedIdentity:
        raise error

    return Scripted(script)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


async def no_challenge(_: bytes) -> bytes:
    raise AssertionError("nobody is to be challenged")


@pytest.fixture
def clock() -> SimClock:
    return SimClock()


@pytest_asyncio.fixture
async def store(tmp_path: Path, clock: SimClock) -> AsyncIterator[Datastore]:
    config = DatastoreConfig("sqlite3", str(tmp_path / "d"))
    store = await open_datastore(config, clock=clock, log=LOG)
    yield store
    await store.close()


@pytest.fixture
def admissions(store: Datastore, clock: SimClock) -> Callable[..., Admissions]:
    def build(*attestors: Scripted, **options: Any) -> Admissions:
        named = dict(zip(("tpm", "other"), attestors, strict=False))
        return Admissions(store, trust_domain=TD, attestors=named, clock=clock, log=LOG, **options)

    return build


async def admit(
    desk: Admissions, kind: str = "tpm", payload: bytes = b"p", **more: Any
) -> Admission:
    challenge = more.pop("challenge", no_challenge)
    return await desk.admit(kind, payload, more.pop("spki", SPKI), challenge, **more)


async def store_it(desk: Admissions, admission: Admission, clock: SimClock) -> None:
    await desk.store(admission, serial_number="5", expires_at=clock.now() + timedelta(hours=1))


@pytest.mark.asyncio
async def test_admitted_node_has_prefixed_sorted_selectors(
    admissions: Any, store: Datastore, clock: SimClock
) -> None:
    desk = admissions(answering(identity("n1", "b", "a:c", "b")), agent_id_as_selector=True)
    admission = await admit(desk)
    agent = TD.member("spire", "agent", "tpm", "n1")
    assert admission == Admission(
        agent_id=agent,
        attestation_type="tpm",
        selectors=(
            Selector("spiffe_id", str(agent)),
            Selector("tpm", "a:c"),
            Selector("tpm", "b"),
        ),
        can_reattest=True,
        csr_spki=SPKI,
        keys={KeyRole.SVID: sha256(SPKI)},
    )
    assert await store.count_nodes(NodeFilter()) == 0
    await store_it(desk, admission, clock)
    node = await store.get_node(agent)
    assert (node.serial_number, node.selectors) == ("5", admission.selectors)


@pytest.mark.asyncio
async def test_attestor_sees_the_request_and_challenges_through(admissions: Any) -> None:
    seen: list[Any] = []

    async def script(request: AttestationRequest) -> AttestedIdentity:
        seen.append((request.payload, request.csr_spki))
        await request.admit(TD.member("spire", "agent", "tpm", "n1"))
        seen.append(await request.challenge(b"one"))
        seen.append(await request.challenge(b"two"))
        return identity()

    async def challenge(data: bytes) -> bytes:
        return data[::-1]

    await admit(admissions(Scripted(script)), challenge=challenge)
    assert seen == [(b"p", SPKI), b"eno", b"owt"]


@pytest.mark.asyncio
async def test_unknown_attestor_is_a_failed_precondition(admissions: Any) -> None:
    with pytest.raises(NotReadyError):
        await admit(admissions(), "nope")


@pytest.mark.parametrize(
    "spki", [b"", b"\x30\x00", SPKI + b"\0"], ids=["empty", "bare_sequence", "one_byte_more"]
)
@pytest.mark.asyncio
async def test_unusable_key_is_refused_before_a_token_is_spent(
    admissions: Any, store: Datastore, clock: SimClock, spki: bytes
) -> None:
    await store.create_join_token(JoinToken("t", clock.now() + timedelta(hours=1)))
    with pytest.raises(InvalidInputError):
        await admit(admissions(), "join_token", b"t", spki=spki)
    assert (await store.take_join_token("t")).value == "t"


@pytest.mark.asyncio
async def test_weak_key_is_refused(admissions: Any) -> None:
    weak = spki_der(rsa.generate_private_key(65537, 1024).public_key())  # noqa: S505
    with pytest.raises(InvalidInputError):
        await admit(admissions(answering(identity())), spki=weak)


@pytest.mark.asyncio
async def test_join_token_admits_once(admissions: Any, store: Datastore, clock: SimClock) -> None:
    desk = admissions()
    await store.create_join_token(JoinToken("t-1", clock.now() + timedelta(hours=1)))
    admission = await admit(desk, "join_token", b"t-1")
    assert admission.agent_id == TD.member("spire", "agent", "join_token", "t-1")
    assert (admission.selectors, admission.can_reattest) == ((), False)
    with pytest.raises(InvalidInputError):
        await admit(desk, "join_token", b"t-1")


@pytest.mark.asyncio
async def test_what_is_wrong_with_a_join_token_is_not_told(
    admissions: Any, store: Datastore, clock: SimClock
) -> None:
    desk = admissions()
    for name in ("used", "expired"):
        await store.create_join_token(JoinToken(name, clock.now() + timedelta(minutes=1)))
    await admit(desk, "join_token", b"used")
    await clock.advance(timedelta(minutes=1))
    told = set()
    with capture_logs() as logs:
        for payload in (
            b"used",
            b"expired",
            b"unknown",
            b"a/b",
            b"..",
            b"expired\n",
            "tökén".encode(),
            b"\xff",
            b"\0",
            b"x" * 5000,
        ):
            with pytest.raises(InvalidInputError) as caught:
                await admit(desk, "join_token", payload, caller="192.0.2.1")
            told.add(str(caught.value))
            assert caught.value.__cause__ is None
    assert len(told) == 1
    assert len(logs) == 10
    assert all(r["type"] == "audit" and r["caller_addr"] == "192.0.2.1" for r in logs)
    assert not any("unknown" in str(v) for r in logs for k, v in r.items() if k != "status_message")
    # The expired one is consumed too.
    with pytest.raises(SpireHwError):
        await store.take_join_token("expired")


@pytest.mark.asyncio
async def test_join_token_is_spent_by_one_of_many(
    admissions: Any, store: Datastore, clock: SimClock
) -> None:
    desk = admissions()
    await store.create_join_token(JoinToken("t", clock.now() + timedelta(hours=1)))
    work = [admit(desk, "join_token", b"t") for _ in range(10)]
    results = await asyncio.gather(*work, return_exceptions=True)
    assert sum(isinstance(r, Admission) for r in results) == 1


@pytest.mark.asyncio
async def test_banned_node_is_refused_early_late_and_when_stored(
    admissions: Any, store: Datastore, clock: SimClock
) -> None:
    reached: list[str] = []

    async def early(request: AttestationRequest) -> AttestedIdentity:
        await request.admit(identity().agent_id)
        reached.append("costly part")
        return identity()

    desk = admissions(answering(identity()))
    admission = await admit(desk)
    await store_it(desk, admission, clock)
    meanwhile = await admit(desk)
    await store.ban_node(admission.agent_id)
    for attestor in (answering(identity()), Scripted(early)):
        with pytest.raises(DeniedError) as caught:
            await admit(admissions(attestor))
        assert caught.value.reason is None
    assert reached == []
    with pytest.raises(DeniedError) as caught:
        await store_it(desk, meanwhile, clock)
    assert caught.value.reason is None
    assert (await store.get_node(admission.agent_id)).banned
    await store.delete_node(admission.agent_id)
    await store_it(desk, await admit(desk), clock)


@pytest.mark.asyncio
async def test_banned_node_known_from_memory_is_refused_before_the_costly_part(
    admissions: Any, store: Datastore
) -> None:
    asked: list[SpiffeId] = []

    async def early(request: AttestationRequest) -> AttestedIdentity:
        await request.admit(identity().agent_id)
        return identity()

    def is_banned(agent_id: SpiffeId) -> bool:
        asked.append(agent_id)
        return len(asked) == 1

    desk = admissions(Scripted(early), is_banned=is_banned)
    with pytest.raises(DeniedError, match="is banned"):
        await admit(desk)
    await admit(desk)
    assert asked == [identity().agent_id] * 2


@pytest.mark.asyncio
async def test_key_of_another_node_raises_the_alarm_on_both(
    admissions: Any, store: Datastore, clock: SimClock
) -> None:
    key = spki_der(ec.generate_private_key(ec.SECP256R1()).public_key())
    other = spki_der(ec.generate_private_key(ec.SECP256R1()).public_key())
    desk = admissions(answering(replace(identity("n1"), attestation_key=key)))
    await store_it(desk, await admit(desk), clock)
    second = admissions(answering(replace(identity("n2"), attestation_key=key)))
    racing = replace(
        await admit(admissions(answering(identity("n3"))), spki=other),
        keys={KeyRole.SVID: sha256(SPKI)},
    )

    async def refused(step: Awaitable[object], reason: str) -> None:
        with capture_logs() as lines, pytest.raises(SpireHwError, match=reason) as caught:
            await step
        assert caught.value.kind is ErrorKind.PERMISSION_DENIED
        alarm, audit = lines
        assert alarm["log_level"] == "error"
        assert alarm["owner_id"].endswith("/n1")
        assert alarm["agent_id"] != alarm["owner_id"]
        assert (audit["type"], audit["reasons"]) == ("audit", [reason])
        assert "n1" not in caught.value.message

    await refused(admit(second, spki=other), "ak_reused")
    await refused(admit(second), "ak_reused")
    await refused(admit(admissions(answering(identity("n2")))), "key_reused")
    await refused(store_it(desk, racing, clock), "key_reused")
    assert await store.count_nodes(NodeFilter()) == 1


@pytest.mark.asyncio
async def test_banned_join_token_agent_does_not_spend_a_token(
    admissions: Any, store: Datastore, clock: SimClock
) -> None:
    desk = admissions()
    later = clock.now() + timedelta(hours=1)
    await store.create_join_token(JoinToken("t", later))
    admission = await admit(desk, "join_token", b"t")
    await store_it(desk, admission, clock)
    await store.ban_node(admission.agent_id)
    await store.create_join_token(JoinToken("t", later))
    with pytest.raises(DeniedError):
        await admit(desk, "join_token", b"t")
    assert (await store.take_join_token("t")).value == "t"


@pytest.mark.parametrize(
    "wrong",
    [
        server_id(TD),
        TD.id,
        TD.member("workload"),
        TD.member("spire", "agent"),
        TD.member("spire", "agent", "tpm"),
        TD.member("spire", "agent", "other", "n"),
        TD.member("spire", "agent", "join_token", "n"),
        TD.member("spire", "agent", "tpm2", "n"),
        TD.member("spire", "agents", "tpm", "n"),
        TrustDomain("other.test").member("spire", "agent", "tpm", "n"),
    ],
)
@pytest.mark.asyncio
async def test_attestor_cannot_give_an_id_that_is_not_its_own(
    admissions: Any, wrong: SpiffeId
) -> None:
    desk = admissions(answering(AttestedIdentity(wrong, [], True)), answering(identity()))
    with pytest.raises(PluginError) as caught:
        await admit(desk)
    assert caught.value.kind is ErrorKind.INTERNAL
    assert caught.value.message.startswith("nodeattestor(tpm): ")


@pytest.mark.asyncio
async def test_lenient_ids_still_spare_other_attestors(admissions: Any) -> None:
    async def result(*segments: str) -> Admission:
        answer = AttestedIdentity(TD.member("spire", "agent", *segments), [], True)
        return await admit(admissions(answering(answer), answering(identity()), strict_ids=False))

    with capture_logs() as logs:
        assert (await result("cn", "host")).agent_id.path == "/spire/agent/cn/host"
    assert [r["event"] for r in logs] == ["Agent ID is outside its attestor's namespace"]
    for segments in (("other", "n"), ("join_token", "n")):
        with pytest.raises(PluginError):
            await result(*segments)


@pytest.mark.asyncio
async def test_id_stays_with_the_attestor_that_first_gave_it(
    admissions: Any, clock: SimClock
) -> None:
    shared = AttestedIdentity(TD.member("spire", "agent", "cn", "host"), [], True)
    desk = admissions(answering(shared), answering(shared), strict_ids=False)
    await store_it(desk, await admit(desk), clock)
    await admit(desk)
    with pytest.raises(DeniedError):
        await admit(desk, "other")


@pytest.mark.parametrize("value", ["", "a\0b", "x" * 2049, "\ud800"])
@pytest.mark.asyncio
async def test_bad_selector_is_the_attestors_fault(admissions: Any, value: str) -> None:
    with pytest.raises(PluginError) as caught:
        await admit(admissions(answering(identity("n", "fine", value))))
    assert caught.value.kind is ErrorKind.INTERNAL


@pytest.mark.asyncio
async def test_too_many_selectors_are_refused(admissions: Any) -> None:
    with pytest.raises(PluginError):
        await admit(admissions(answering(identity("n", *map(str, range(1001))))))


@pytest.mark.asyncio
async def test_refusal_is_audited_with_reason_codes_and_nothing_is_stored(
    admissions: Any, store: Datastore
) -> None:
    error = AttestationError(
        [Finding("quote_nonce_mismatch", "nonce differs"), Finding("pcr", "PCR 7 differs")]
    )
    with capture_logs() as logs, pytest.raises(PluginError) as caught:
        await admit(admissions(failing(error)), caller="192.0.2.7")
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert caught.value.message.startswith("nodeattestor(tpm): nonce differs")
    (record,) = logs
    assert record["reasons"] == ["quote_nonce_mismatch", "pcr"]
    assert record["type"] == "audit"
    assert record["caller_addr"] == "192.0.2.7"
    assert await store.count_nodes(NodeFilter()) == 0
    assert await store.last_change() == 0


@pytest.mark.asyncio
async def test_error_of_the_stream_is_not_blamed_on_the_attestor(admissions: Any) -> None:
    async def script(request: AttestationRequest) -> AttestedIdentity:
        await request.challenge(b"c")
        return identity()

    gone = UnavailableError("the agent went away")

    async def challenge(_: bytes) -> bytes:
        raise gone

    with pytest.raises(UnavailableError) as caught:
        await admit(admissions(Scripted(script)), challenge=challenge)
    assert caught.value is gone


@pytest.mark.asyncio
async def test_attestor_that_crashes_is_contained(admissions: Any) -> None:
    with capture_logs() as logs, pytest.raises(PluginError) as caught:
        await admit(admissions(failing(KeyError("secret"))))
    assert caught.value.kind is ErrorKind.INTERNAL
    assert "secret" not in caught.value.message
    assert [r["event"] for r in logs] == [
        "Node attestor failed unexpectedly",
        "Node attestation refused",
    ]


@pytest.mark.parametrize(
    ("payload", "refusal"), [(b"", InvalidInputError), (b"x" * 65537, LimitError)]
)
@pytest.mark.asyncio
async def test_payload_is_bounded(
    admissions: Any, payload: bytes, refusal: type[SpireHwError]
) -> None:
    with pytest.raises(refusal):
        await admit(admissions(answering(identity())), payload=payload)


@pytest.mark.asyncio
async def test_attestor_may_ask_for_larger_messages_up_to_a_bound(admissions: Any) -> None:
    async def script(request: AttestationRequest) -> AttestedIdentity:
        await request.challenge(b"c")
        return identity()

    async def one_mebibyte(_: bytes) -> bytes:
        return b"x" * (1 << 20)

    async def more(_: bytes) -> bytes:
        return b"x" * ((1 << 20) + 1)

    await admit(admissions(Generous(script)), challenge=one_mebibyte)
    for attestor, challenge in ((Generous(script), more), (Scripted(script), one_mebibyte)):
        with pytest.raises(LimitError):
            await admit(admissions(attestor), challenge=challenge)


@pytest.mark.asyncio
async def test_endless_exchange_is_cut_off(admissions: Any) -> None:
    async def script(request: AttestationRequest) -> AttestedIdentity:
        while True:
            await request.challenge(b"again")

    rounds: list[bytes] = []

    async def challenge(data: bytes) -> bytes:
        rounds.append(data)
        return b"answer"

    with pytest.raises(SpireHwError) as caught:
        await admit(admissions(Scripted(script)), challenge=challenge)
    assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED
    assert len(rounds) == 16


@pytest.mark.asyncio
async def test_slow_exchange_is_cut_off(admissions: Any) -> None:
    async def script(request: AttestationRequest) -> AttestedIdentity:
        await request.challenge(b"c")
        return identity()

    async def never(_: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    with capture_logs() as logs, pytest.raises(SpireHwError) as caught:
        await admit(admissions(Scripted(script), timeout_s=0.01), challenge=never)
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
    assert logs[0]["status_code"] == "DEADLINE_EXCEEDED"

"""What a refused attestation leaves behind on a server with real sockets and a real store: a record.

Each case changes one thing of an exchange that would be good. The whole database is compared
before and after, row by row, besides signatures of the CA, open files, threads and tasks.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import threading
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
import pytest_asyncio
from google.protobuf import empty_pb2

from spire_hw import log as logs
from spire_hw._pb import server_agent_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.errors import DeniedError, DeviceError, ErrorKind, SpireHwError
from spire_hw.rpc import convert
from spire_hw_plugins.nodeattestor.tpm.wire import (
    decode_challenge,
    encode_attestation_data,
    encode_response,
)
from spire_hw_sim import again
from spire_hw_sim.firmware import Firmware
from spire_hw_sim.imawriter import ImaList
from spire_hw_sim.servers import AGENT, TIMEOUT_S, ScriptedAgent, make_csr
from spire_hw_sim.softtpm import AK_ATTRIBUTES, make_ak
from spire_hw_sim.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from spire_hw_plugins.nodeattestor.tpm.wire import AttestationData, Response
    from spire_hw_sim.beater import Beater
    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio

IA, PD, RE = (
    ErrorKind.INVALID_ARGUMENT,
    ErrorKind.PERMISSION_DENIED,
    ErrorKind.RESOURCE_EXHAUSTED,
)
METHOD = AGENT + "AttestAgent"
NAMES = [f"/usr/bin/tool{n}" for n in range(5)]
FILES = [f"{hashlib.sha256(name.encode()).hexdigest()}  {name}" for name in NAMES]
POLICY = f"""policy "web" {{
  boot {{ secure_boot = "on" }}
  ima {{ allow = {json.dumps(FILES)} }}
  allow_pcr7_only = true
}}"""
A_MINUTE = timedelta(minutes=1)


def boot(beater: Beater, firmware: Firmware | None = None) -> None:
    """Start a machine, and a few programs."""
    started = (firmware or Firmware()).boot()
    node = beater.node
    node.tpm.pcrs |= started.pcrs("sha256")
    node.boot_log = started.log()
    listed = ImaList.start(started.values("sha256")).files(5)
    node.ima, node.tpm.pcrs["sha256", 10] = listed.ascii(), listed.pcr()


@dataclass
class Site:
    """A server that asks for logs, and machines."""

    watch: Watch
    database: Path
    log: StringIO
    signed: int = 0

    @classmethod
    async def open(cls, directory: Path, clock: SimClock) -> Self:
        log = StringIO()
        logs.configure(logs.LogSettings(format=logs.Format.JSON), stream=log)
        watch = Watch(directory, clock)
        watch.write_policy(POLICY)
        site = cls(watch, directory / "db.sqlite3", log)
        await site.start()
        return site

    async def start(self) -> None:
        await self.watch.start()
        issuer = self.watch.server.manager._issuer
        plain = issuer.agent_svid

        async def counted(*arguments: Any) -> Any:
            self.signed += 1
            return await plain(*arguments)

        issuer.agent_svid = counted  # type: ignore[method-assign]

    async def close(self) -> None:
        await self.watch.close()
        logs.unconfigure()

    async def machine(self) -> Beater:
        beater = await self.watch.machine()
        boot(beater)
        return beater

    async def known(self) -> Beater:
        beater = await self.machine()
        await beater.attest()
        await self.watch.pass_time(A_MINUTE, beater)
        return beater

    def stored(self) -> list[str]:
        """Return all that the database holds."""
        with closing(sqlite3.connect(self.database)) as database:
            return list(database.iterdump())

    def audit(self) -> list[dict[str, Any]]:
        """Return the audit records so far."""
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [line for line in lines if line.get("type") == "audit"]

    async def attest(self, node: Bent) -> pb.AttestAgentResponse.Result:
        """Let a machine attest; what it says may be bent."""
        key = node.beater.node.key
        assert key is not None
        csr = node.csr or await make_csr(key.private)
        data = types_pb2.AttestationData(type="tpm", payload=node.first())
        params = pb.AttestAgentRequest.Params(data=data, params=pb.AgentX509SVIDParams(csr=csr))
        server = self.watch.server
        stranger = ScriptedAgent(server.port, node.beater.bundle, server.clock)
        async with (
            await stranger.channel() as channel,
            channel.bidi(METHOD, pb.AttestAgentResponse, timeout_s=TIMEOUT_S) as call,
        ):
            await call.send(pb.AttestAgentRequest(params=params))
            message: Any = await call.receive()
            while message.WhichOneof("step") == "challenge":
                said = node.answer(message.challenge)
                await call.send(pb.AttestAgentRequest(challenge_response=said))
                message = await call.receive()
            assert isinstance(message, pb.AttestAgentResponse)
            return message.result

    async def afresh(self, beater: Beater) -> pb.AttestAgentResponse.Result:
        """Let a machine attest, with a log of its own."""
        self.log.seek(0)
        self.log.truncate()
        return await self.attest(Bent(beater))

    async def operate(self, method: str, request: Any) -> None:
        await self.watch.operator.channel.unary(
            AGENT + method, request, empty_pb2.Empty, timeout_s=TIMEOUT_S
        )


@dataclass
class Bent:
    """What a machine says, with one thing changed."""

    beater: Beater
    data: Callable[[AttestationData], AttestationData] | None = None
    response: Callable[[Response], Response] | None = None
    payload: bytes | None = None
    csr: bytes = b""

    def first(self) -> bytes:
        if self.payload is not None:
            return self.payload
        data = self.beater.node.data()
        return encode_attestation_data(data if self.data is None else self.data(data))

    def answer(self, message: bytes) -> bytes:
        if self.response is None or b'"EC"' not in message:
            return self.beater.node.answer(message)
        return encode_response(self.response(self.beater.node.respond(decode_challenge(message))))


@pytest_asyncio.fixture
async def site(short_dir: Path, clock: SimClock) -> AsyncIterator[Site]:
    site = await Site.open(short_dir, clock)
    yield site
    await site.close()


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes((data[-1] ^ 1,))


async def bad_certificate(beater: Beater) -> Bent:
    assert beater.node.certificate is not None
    beater.node.certificate = flipped(beater.node.certificate)
    return Bent(beater)


async def free_key(beater: Beater) -> Bent:
    beater.node.tpm.ak = make_ak(attributes=AK_ATTRIBUTES & ~(1 << 16))
    return Bent(beater)


async def broken_csr(beater: Beater) -> Bent:
    assert beater.node.key is not None
    return Bent(beater, csr=flipped(await make_csr(beater.node.key.private)))


async def other_signature(beater: Beater) -> Bent:
    def bend(response: Response) -> Response:
        quote = response.quotes[0]
        return replace(response, quotes=(replace(quote, sig=flipped(quote.sig)),))

    return Bent(beater, response=bend)


async def later_log(beater: Beater) -> Bent:
    beater.node.tpm.pcrs["sha256", 7] = bytes(31) + b"\1"
    return Bent(beater)


async def shorter_list(beater: Beater) -> Bent:
    lines = (beater.node.ima or b"").splitlines(keepends=True)
    beater.node.ima = b"".join(lines[:-1])
    return Bent(beater)


async def no_secure_boot(beater: Beater) -> Bent:
    boot(beater, Firmware(secure_boot=False))
    return Bent(beater)


async def clock_back(beater: Beater) -> Bent:
    beater.node.tpm.clock_ms = 1
    return Bent(beater)


def says(**changes: Any) -> Callable[[Beater], Any]:
    async def bend(beater: Beater) -> Bent:
        return Bent(beater, **changes)

    return bend


CASES: dict[str, tuple[Callable[[Beater], Any], ErrorKind, str]] = {
    "envelope": (says(payload=b"[" * 1000), IA, "envelope: "),
    "payload too large": (says(payload=b" " * (65 << 10)), RE, "payload is "),
    "endorsement key": (bad_certificate, PD, "ek: "),
    "attestation key": (free_key, IA, "ak: key is not restricted [ak_attributes]"),
    "secret": (
        says(response=lambda r: replace(r, secret=flipped(r.secret))),
        IA,
        "challenge: secret does not match [secret_mismatch]",
    ),
    "certify": (
        says(response=lambda r: replace(r, certify=None)),
        IA,
        "certify: evidence asked for is missing [evidence_missing]",
    ),
    "certificate request": (broken_csr, IA, "CSR"),
    "quote": (other_signature, IA, "quote: signature does not verify"),
    "boot log": (later_log, IA, "log: PCR 7 does not replay [log_replay]"),
    "measured files": (shorter_list, IA, "ima: list does not replay to PCR 10 [ima_replay]"),
    "policy": (no_secure_boot, PD, "policy: Secure Boot is off [secureboot]"),
}
# A known node is put in quarantine, and shows the rest of its list alone.
STATEFUL = {"policy", "measured files"}


class Remains:
    """What a process has open, for comparison."""

    def __init__(self) -> None:
        self.files = len(list(Path("/proc/self/fd").iterdir()))
        self.threads = threading.active_count()
        self.tasks = len(asyncio.all_tasks())

    async def are_all(self) -> None:
        """Wait until nothing more is open than at first."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                now = Remains()
                if now.files <= self.files and now.tasks <= self.tasks:
                    break
                await asyncio.sleep(0.02)
        assert now.threads <= self.threads


async def refused(site: Site, bent: Bent, kind: ErrorKind, words: str) -> SpireHwError:
    """Make sure of the refusal, and that an audit record is all that is left of it."""
    await site.watch.operator.bundle()  # what a server opens at its first call stays open
    before, signed, records, remains = site.stored(), site.signed, len(site.audit()), Remains()
    with pytest.raises(SpireHwError) as caught:
        await site.attest(bent)
    assert (caught.value.kind, words in caught.value.message) == (kind, True), caught.value
    assert site.stored() == before
    assert site.signed == signed
    written = site.audit()[records:]
    if "CSR" not in words:  # no exchange begins with such a request
        (record,) = written
        assert record["status_code"] == kind.name
        assert record["status_message"] == caught.value.message
        assert record["caller_addr"] == "127.0.0.1"
        assert [f"[{reason}]" in record["status_message"] for reason in record["reasons"]].count(
            False
        ) == max(len(record["reasons"]) - 1, 0)
    await remains.are_all()
    return caught.value


@pytest.mark.parametrize("case", CASES)
async def test_refusal_leaves_an_audit_record_alone(site: Site, case: str) -> None:
    bend, kind, words = CASES[case]
    error = await refused(site, await bend(await site.machine()), kind, words)
    assert error.message.count("nodeattestor(tpm): ") == ("CSR" not in words)
    assert (await site.attest(Bent(await site.known()))).svid.cert_chain


@pytest.mark.parametrize("case", [*sorted(set(CASES) - STATEFUL), "counters"])
async def test_refusal_changes_nothing_about_a_known_node(site: Site, case: str) -> None:
    bend, kind, words = CASES.get(
        case, (clock_back, PD, "counters: clock went back [clock_rollback]")
    )
    beater = await site.known()
    spoilt = replace(beater, node=replace(beater.node, tpm=replace(beater.node.tpm)))
    spoilt.node.tpm.pcrs = dict(beater.node.tpm.pcrs)
    await refused(site, await bend(spoilt), kind, words)
    assert (await site.watch.state(beater)).state == "attested"
    assert (await site.attest(Bent(beater))).svid.cert_chain


# -- our own side fails ------------------------------------------------------------------


@contextmanager
def failing(database: Path, table: str) -> Iterator[None]:
    """Make every new row of one table fail, as a damaged store does."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        damage = "BEGIN INSERT INTO gone VALUES (1); END"
        connection.execute(f"CREATE TRIGGER damage BEFORE INSERT ON {table} {damage}")
        yield
        connection.execute("DROP TRIGGER damage")


TABLES = [
    "nodes",
    "node_selectors",
    "node_keys",
    "node_postures",
    "node_evidence",
    "node_ima",
    "changes",
]


@pytest.mark.parametrize("table", TABLES)
async def test_store_that_fails_at_any_statement_stores_nothing(site: Site, table: str) -> None:
    beater = await site.machine()
    before = site.stored()
    with failing(site.database, table):
        error = await again.refused(lambda: site.afresh(beater))
    assert error.kind is ErrorKind.INTERNAL
    assert error.message == "internal error"
    assert "node: cannot store the attestation now" in site.log.getvalue()
    assert site.stored() == before
    assert (await site.attest(Bent(beater))).svid.cert_chain


async def test_ca_that_cannot_sign_makes_no_node(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    beater = await site.machine()
    before = site.stored()

    async def away(*_: Any) -> Any:
        raise DeviceError("token is away", device="token", operation="sign", code=0x32)

    with monkeypatch.context() as patched:
        patched.setattr(site.watch.server.manager._issuer, "agent_svid", away)
        error = await again.refused(lambda: site.afresh(beater))
    assert error.kind is ErrorKind.INTERNAL
    assert error.message == "internal error"
    assert "node: cannot issue now" in site.log.getvalue()
    assert "token is away" in site.log.getvalue()
    assert site.stored() == before
    assert (await site.attest(Bent(beater))).svid.cert_chain


async def test_node_that_goes_away_after_its_answer_is_known_or_not(site: Site) -> None:
    beater = await site.machine()
    node = Bent(beater)
    assert beater.node.key is not None
    data = types_pb2.AttestationData(type="tpm", payload=node.first())
    csr = await make_csr(beater.node.key.private)
    params = pb.AttestAgentRequest.Params(data=data, params=pb.AgentX509SVIDParams(csr=csr))
    stranger = ScriptedAgent(site.watch.server.port, beater.bundle, site.watch.server.clock)
    remains = Remains()
    async with (
        await stranger.channel() as channel,
        channel.bidi(METHOD, pb.AttestAgentResponse, timeout_s=TIMEOUT_S) as call,
    ):
        await call.send(pb.AttestAgentRequest(params=params))
        message: Any = await call.receive()
        said = node.answer(message.challenge)
        await call.send(pb.AttestAgentRequest(challenge_response=said))
    await remains.are_all()
    with closing(sqlite3.connect(site.database)) as database:
        parts = ("nodes", "node_postures", "node_evidence")
        counts = {
            database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608
            for table in parts
        }
    assert len(counts) == 1
    assert (await site.attest(node)).svid.cert_chain


# -- nodes that were sent away -----------------------------------------------------------


async def test_ban_outlives_restarts_and_new_certificates(site: Site) -> None:
    beater = await site.known()
    await site.operate("BanAgent", pb.BanAgentRequest(id=convert.id_to_pb(beater.id)))
    error = await refused(site, Bent(beater), PD, "is banned")
    assert isinstance(error, DeniedError)
    assert error.reason is None
    await site.watch.stop()
    await site.start()
    beater.port = site.watch.server.port
    await refused(site, Bent(beater), PD, "is banned")
    beater.node.certificate = site.watch.keys.node(1).certificate
    beater.boot_id = "another"
    await refused(site, Bent(beater), PD, "is banned")
    assert (await site.watch.state(beater)).state == "banned"


async def test_evicted_node_is_let_in_anew_but_not_by_its_last_exchange(site: Site) -> None:
    beater = await site.machine()
    said: list[Response] = []

    def keep(response: Response) -> Response:
        said.append(response)
        return response

    await site.attest(Bent(beater, response=keep))
    await site.operate("DeleteAgent", pb.DeleteAgentRequest(id=convert.id_to_pb(beater.id)))
    replay = Bent(beater, response=lambda _: said[0])
    await refused(site, replay, IA, "challenge: secret does not match")
    assert (await site.attest(Bent(beater))).svid.cert_chain


async def test_one_source_does_not_fill_the_audit_log(site: Site) -> None:
    other = await free_key(await site.machine())
    for _ in range(130):
        with pytest.raises(SpireHwError, match="ak_attributes"):
            await site.attest(other)
    assert len(site.audit()) == 100
    assert site.log.getvalue().count("TPM attestation refused") == 100
    await site.watch.pass_time(A_MINUTE)
    with pytest.raises(SpireHwError, match="ak_attributes"):
        await site.attest(other)
    assert site.audit()[-1]["left_out"] == 30
    error = await again.refused(lambda: site.attest(other))
    assert "[ak_attributes]" in error.message
    assert (await site.attest(Bent(await site.machine()))).svid.cert_chain

"""A server that lies: nothing wrong is stored or served, and the reason can be read."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw._pb import server_entry_pb2 as entry_pb
from spire_hw._pb import server_svid_pb2, types_pb2
from spire_hw.errors import SpireHwError, UnavailableError, VerificationError
from spire_hw_sim.again import refused
from spire_hw_sim.liar import AGENT_PATH, TRUST_DOMAIN, LyingServer, agent_of
from spire_hw_sim.pki import Authority, now
from spire_hw_sim.workload import Workload, eventually, refusal, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.asyncio

MINE = f"unix:uid:{os.getuid()}"
OTHER_KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
STRANGER = Authority(TRUST_DOMAIN)
FOREIGN = Authority("foreign.example")


@pytest.fixture
def home() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="liar"))
    yield made
    shutil.rmtree(made)


@pytest_asyncio.fixture
async def liar() -> AsyncIterator[LyingServer]:
    async with asyncio.timeout(60), LyingServer() as server:
        yield server


# -- the agent's own SVID ------------------------------------------------------------------


def _wrong_agent_chains(liar: LyingServer, key: Any) -> dict[str, list[bytes]]:
    good = liar.leaf(key, AGENT_PATH)
    return {
        "nothing": [],
        "garbage": [b"garbage"],
        "cut": [good[:-10]],
        "another key": [liar.leaf(OTHER_KEY, AGENT_PATH)],
        "another trust domain": [liar.authority.leaf(key, "spiffe://else.example" + AGENT_PATH)],
        "a workload's ID": [liar.leaf(key, "/web")],
        "expired": [
            liar.leaf(key, AGENT_PATH, start=now() - timedelta(2), end=now() - timedelta(1))
        ],
        "a CA": [liar.leaf(key, AGENT_PATH, ca=True)],
        "of a stranger": [STRANGER.leaf(key, f"spiffe://{TRUST_DOMAIN}{AGENT_PATH}")],
        "garbage behind": [good, b"garbage"],
        "much too long": [good] * 50,
    }


@pytest.mark.parametrize(
    "lie",
    [
        "a CA",
        "a workload's ID",
        "another key",
        "another trust domain",
        "cut",
        "expired",
        "garbage",
        "garbage behind",
        "much too long",
        "nothing",
        "of a stranger",
    ],
)
async def test_a_wrong_agent_svid_is_not_stored(liar: LyingServer, home: Path, lie: str) -> None:
    lies = liar.agent_chain
    told = asyncio.Event()

    def chain(key: Any) -> list[bytes]:
        if told.is_set():
            return list(lies(key))
        told.set()
        return _wrong_agent_chains(liar, key)[lie]

    liar.agent_chain = chain  # type: ignore[method-assign]
    agent = agent_of(liar, home)
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(agent.start())
        await told.wait()
        assert not (home / "data" / "agent-data.json").exists()
        assert agent.identity.current is None
        await starting  # the truth at the second attempt
    assert agent.identity.is_alive()
    await agent.close()


@pytest.mark.parametrize(
    "lie", ["a workload's ID", "another key", "another trust domain", "expired", "of a stranger"]
)
async def test_a_wrong_agent_svid_is_refused_as_often_as_it_comes(
    liar: LyingServer, home: Path, lie: str
) -> None:
    agent = agent_of(liar, home)
    await agent.start()
    held = agent.identity.current
    lies = liar.agent_chain
    liar.agent_chain = lambda key: _wrong_agent_chains(liar, key)[lie]  # type: ignore[method-assign]
    try:
        error = await refused(lambda: agent.identity._enroller.attest(held))
        assert isinstance(error, VerificationError)
        assert error.message.startswith("result: ")
        assert agent.identity.current == held
    finally:
        liar.agent_chain = lies  # type: ignore[method-assign]
        await agent.close()


@pytest.mark.parametrize("lie", ["another key", "garbage", "of a stranger"])
async def test_a_wrong_renewal_leaves_the_svid_that_holds(
    liar: LyingServer, home: Path, lie: str
) -> None:
    honest = liar.agent_chain
    liar.agent_chain = lambda key: [  # type: ignore[method-assign]
        liar.leaf(
            key, AGENT_PATH, start=now() - timedelta(hours=1), end=now() + timedelta(minutes=9)
        )
    ]
    async with agent_of(liar, home) as agent:
        before = agent.identity.current
        stored = (home / "data" / "agent-data.json").read_bytes()
        liar.agent_chain = lambda key: _wrong_agent_chains(liar, key)[lie]  # type: ignore[method-assign]
        with pytest.raises(VerificationError, match=r"^result: "):
            await agent.identity.renew_if_due()
        assert agent.identity.current is before
        assert (home / "data" / "agent-data.json").read_bytes() == stored
        liar.agent_chain = honest  # type: ignore[method-assign]
        await agent.identity.renew_if_due()
        assert agent.identity.current is not before


# -- bundles -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        types_pb2.Bundle(trust_domain="foreign.example"),
        types_pb2.Bundle(trust_domain=TRUST_DOMAIN),
        types_pb2.Bundle(trust_domain=""),
        types_pb2.Bundle(
            trust_domain=TRUST_DOMAIN, x509_authorities=[types_pb2.X509Certificate(asn1=b"x")]
        ),
    ],
    ids=["foreign", "empty", "nameless", "garbage"],
)
async def test_a_wrong_bundle_does_not_replace_the_good_one(
    liar: LyingServer, home: Path, lie: types_pb2.Bundle
) -> None:
    liar.add("/a", MINE)
    # Not at half of its life already: a renewal would change the file.
    liar.agent_chain = lambda key: [liar.leaf(key, AGENT_PATH, start=now())]  # type: ignore[method-assign]
    async with agent_of(liar, home) as agent, Workload(home / "api.sock") as workload:
        await eventually(workload.x509_svid)
        stored = (home / "data" / "agent-data.json").read_bytes()
        bundle = agent.cache.bundle
        told = asyncio.Event()

        def answer() -> types_pb2.Bundle:
            told.set()
            return lie

        liar.bundle_answer = answer  # type: ignore[method-assign]
        await told.wait()
        with pytest.raises(SpireHwError):
            await agent._sync.sync_once()
        assert agent.cache.bundle == bundle
        assert (home / "data" / "agent-data.json").read_bytes() == stored
        assert (await workload.x509_svid()).svids[0].bundle == liar.authority.der


# -- synchronisation -------------------------------------------------------------------------

Page = entry_pb.SyncAuthorizedEntriesResponse


def _entry(number: int) -> types_pb2.Entry:
    return types_pb2.Entry(
        id=str(number),
        spiffe_id=types_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path=f"/{number}"),
        selectors=[types_pb2.Selector(type="unix", value="uid:1")],
    )


def _revisions(*numbers: int, more: bool = False) -> Page:
    revisions = [entry_pb.EntryRevision(id=str(n), revision_number=1) for n in numbers]
    return Page(entry_revisions=revisions, more=more)


def _endless() -> Iterator[Page]:
    number = 0
    while True:
        number += 1
        yield _revisions(*range(number * 2000, number * 2000 + 2000), more=True)


LIES: dict[str, Any] = {
    "the same entry twice": [Page(entries=[_entry(1), _entry(1)])],
    "the same entry on every page": [Page(entries=[_entry(1)], more=True)] * 100,
    "an entry without an id": [Page(entries=[types_pb2.Entry(spiffe_id=_entry(1).spiffe_id)])],
    "empty pages for ever": [Page(more=True)] * 100,
    "pages for ever": _endless(),
    "an end in the middle": [_revisions(1, more=True)],
    "an entry nobody asked for": [_revisions(1), Page(entries=[_entry(2)])],
    "revisions instead of entries": [_revisions(1), _revisions(1)],
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_wrong_synchronisation_changes_nothing(
    liar: LyingServer, home: Path, lie: str
) -> None:
    liar.add("/a", MINE)
    async with agent_of(liar, home) as agent, Workload(home / "api.sock") as workload:
        await eventually(workload.x509_svid)
        entries = dict(agent.cache.entries)

        async def answers(requests: AsyncIterator[Any]) -> AsyncIterator[Page]:
            await anext(requests)
            for page in LIES[lie]:
                yield page

        liar.sync_answers = answers  # type: ignore[method-assign]
        with pytest.raises(SpireHwError):
            await agent._sync.sync_once()
        assert agent.cache.entries == entries
        assert (await workload.x509_svid()).svids


async def test_an_entry_that_cannot_be_served_does_not_stop_the_others(
    liar: LyingServer, home: Path
) -> None:
    liar.add("/a", MINE)
    wrong = liar.add("/foreign", MINE)
    wrong.spiffe_id.trust_domain = "foreign.example"
    del liar.add("/nobody", MINE).selectors[:]
    liar.add("/no path", MINE)
    liar.add("/hint", MINE, hint="h" * 2000)
    async with agent_of(liar, home) as agent, Workload(home / "api.sock") as workload:
        answer = await eventually(workload.x509_svid)
        assert [s.spiffe_id for s in answer.svids] == [f"spiffe://{TRUST_DOMAIN}/a"]
        assert set(agent.cache.entries) == {"/a"}


# -- SVIDs of workloads --------------------------------------------------------------------------


def _wrong_chains(liar: LyingServer, key: Any) -> dict[str, list[bytes]]:
    return {
        "nothing": [],
        "garbage": [b"garbage"],
        "another key": [liar.leaf(OTHER_KEY, "/a")],
        "another ID": [liar.leaf(key, "/b")],
        "another trust domain": [FOREIGN.leaf(key, "spiffe://foreign.example/a")],
        "of a stranger": [STRANGER.leaf(key, f"spiffe://{TRUST_DOMAIN}/a")],
        "expired": [liar.leaf(key, "/a", start=now() - timedelta(2), end=now() - timedelta(1))],
    }


@pytest.mark.parametrize(
    "lie",
    [
        "nothing",
        "garbage",
        "another key",
        "another ID",
        "another trust domain",
        "of a stranger",
        "expired",
    ],
)
async def test_a_wrong_svid_is_never_served_and_holds_up_nobody_else(
    liar: LyingServer, home: Path, lie: str
) -> None:
    honest = liar.workload_chain

    def chain(key: Any, entry: types_pb2.Entry) -> Any:
        return _wrong_chains(liar, key)[lie] if entry.id == "/a" else honest(key, entry)

    liar.workload_chain = chain  # type: ignore[method-assign]
    liar.add("/a", MINE)
    for number in range(3):
        liar.add(f"/z{number}", "unix:uid:4000000000")
    async with agent_of(liar, home) as agent, Workload(home / "api.sock") as workload:
        await until(lambda: agent.cache.svid_count == 3)
        async with workload.x509_svids() as stream, asyncio.TaskGroup() as group:
            first = group.create_task(anext(stream))
            await until(lambda: sum("/a" in ids for ids in liar.svid_calls) > 1)
            assert not first.done()
            liar.workload_chain = honest  # type: ignore[method-assign]
            assert [s.spiffe_id for s in (await first).svids] == [f"spiffe://{TRUST_DOMAIN}/a"]


@pytest.mark.parametrize("count", [0, 2, 500])
async def test_another_number_of_results_is_refused(
    liar: LyingServer, home: Path, count: int
) -> None:
    honest = liar.x509_results
    liar.x509_results = lambda params: [  # type: ignore[method-assign]
        liar.x509_result(params[0]) for _ in range(count)
    ]
    liar.add("/a", MINE)
    async with agent_of(liar, home) as agent:
        await until(lambda: len(liar.svid_calls) > 1)
        assert agent.cache.svid_count == 0
        liar.x509_results = honest  # type: ignore[method-assign]
        await until(lambda: agent.cache.svid_count == 1)


async def test_a_huge_answer_is_refused(liar: LyingServer, home: Path) -> None:
    result = server_svid_pb2.BatchNewX509SVIDResponse.Result(
        svid=types_pb2.X509SVID(cert_chain=[bytes(65 << 20)])
    )
    honest = liar.x509_results
    liar.x509_results = lambda params: [result] * len(params)  # type: ignore[method-assign]
    liar.add("/a", MINE)
    async with agent_of(liar, home) as agent:
        await until(lambda: len(liar.svid_calls) > 1)
        assert agent.cache.svid_count == 0
        liar.x509_results = honest  # type: ignore[method-assign]
        await until(lambda: agent.cache.svid_count == 1)


# -- tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", ["garbage", "nothing", "another ID", "another audience"])
async def test_a_wrong_token_is_never_served(liar: LyingServer, home: Path, lie: str) -> None:
    tokens = {
        "garbage": "a.b.c",
        "nothing": "",
        "another ID": await liar.token("/b", ["db"]),
        "another audience": await liar.token("/a", ["db", "web"]),
    }

    async def jwt_svid(entry: types_pb2.Entry, audience: Any) -> types_pb2.JWTSVID:
        return types_pb2.JWTSVID(id=entry.spiffe_id, token=tokens[lie], expires_at=2**62)

    honest = liar.jwt_svid
    liar.jwt_svid = jwt_svid  # type: ignore[method-assign]
    liar.add("/a", MINE)
    async with agent_of(liar, home) as agent, Workload(home / "api.sock") as workload:
        error = await refusal(lambda: workload.jwt_svid(["db"]), "server sent a JWT-SVID")
        assert isinstance(error, UnavailableError)
        assert len(agent.cache.tokens) == 0
        liar.jwt_svid = honest  # type: ignore[method-assign]
        assert (await workload.jwt_svid(["db"])).svids

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import json_format

from spire_hw._pb import server_bundle_pb2, server_entry_pb2, types_pb2
from spire_hw._pb import workload_pb2 as pb
from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.bundle.document import parse_jwks
from spire_hw.errors import DeniedError, InvalidInputError, SpireHwError
from spire_hw.rpc.convert import bundle_to_pb
from spire_hw.spiffeid import TrustDomain
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.x509.certificate import encode_pem, load_chain
from spire_hw_sim.clock import SimClock
from spire_hw_sim.pki import Authority
from spire_hw_sim.workload import Workload, eventually, refusal, until
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from spire_hw.spiffeid import SpiffeId
    from spire_hw_agent.app import Agent

pytestmark = pytest.mark.asyncio


def agent_id(agent: Agent) -> SpiffeId:
    assert agent.identity.current is not None
    return agent.identity.current.spiffe_id


def ids(answer: pb.X509SVIDResponse) -> list[str]:
    return [s.spiffe_id.removeprefix("spiffe://sim.example") for s in answer.svids]


def serial(answer: pb.X509SVIDResponse) -> int:
    return load_chain(answer.svids[0].x509_svid)[0].serial_number


@asynccontextmanager
async def running(world: World, **more: str) -> AsyncIterator[tuple[Agent, Workload]]:
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(await world.agent(**more))
        yield agent, await stack.enter_async_context(Workload(world.socket()))


async def moved_on(
    clock: SimClock, attempt: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool]
) -> Any:
    """Try again and again while simulated time passes."""

    async def step() -> Any:
        await clock.advance(timedelta(milliseconds=500))
        return await attempt()

    return await eventually(step, holds)


async def test_an_svid_that_everybody_can_verify(world: World, tmp_path: Path) -> None:
    async with running(world) as (agent, workload):
        await world.create_entry("/web", parent=agent_id(agent), hint="main")
        answer = await eventually(workload.x509_svid)
    svid = answer.svids[0]
    chain = load_chain(svid.x509_svid)
    bundle = await world.bundle()
    made = parse_x509_svid(chain)
    assert (
        str(verify_x509_svid(made, {bundle.trust_domain: bundle}, made.not_before))
        == svid.spiffe_id
    )
    assert svid.hint == "main"
    (tmp_path / "ca.pem").write_bytes(encode_pem(r.der for r in bundle.x509_authorities))
    (tmp_path / "svid.pem").write_bytes(encode_pem(made.chain))
    files = ("-CAfile", str(tmp_path / "ca.pem"), str(tmp_path / "svid.pem"))
    checked = await asyncio.create_subprocess_exec(
        *("openssl", "verify", "-x509_strict", *files), stdout=asyncio.subprocess.DEVNULL
    )
    assert await checked.wait() == 0


async def test_identities_come_and_go_on_an_open_stream(world: World) -> None:
    async with running(world) as (agent, workload):
        first = await world.create_entry("/a", parent=agent_id(agent))
        await eventually(workload.x509_svid)
        async with workload.x509_svids() as stream:
            assert ids(await anext(stream)) == ["/a"]
            second = await world.create_entry("/b", parent=agent_id(agent), hint="b")
            assert sorted(ids(await anext(stream))) == ["/a", "/b"]
            await world.delete_entry(first)
            assert ids(await anext(stream)) == ["/b"]
            await world.delete_entry(second)
            with pytest.raises(DeniedError, match="no identity issued"):
                await anext(stream)
        await refusal(workload.x509_svid, "no identity issued")


async def test_a_changed_entry_is_issued_anew(world: World) -> None:
    async with running(world) as (agent, workload):
        entry = await world.create_entry("/a", parent=agent_id(agent))
        await eventually(workload.x509_svid)
        async with workload.x509_svids() as stream:
            before = await anext(stream)
            request = server_entry_pb2.BatchUpdateEntryRequest(
                entries=[types_pb2.Entry(id=entry, dns_names=["a.example.org"])],
                input_mask=types_pb2.EntryMask(dns_names=True),
            )
            await world.call(
                "/spire.api.server.entry.v1.Entry/BatchUpdateEntry",
                request,
                server_entry_pb2.BatchUpdateEntryResponse,
            )
            after = await anext(stream)
    assert serial(before) != serial(after)
    assert b"a.example.org" in after.svids[0].x509_svid


async def test_rotation_on_an_open_stream_at_half_of_the_life() -> None:
    clock = SimClock()
    async with (
        World(clock=clock) as world,
        running(world, sync_interval="5s") as (agent, workload),
    ):
        await world.create_entry("/a", parent=agent_id(agent))
        await moved_on(clock, workload.x509_svid, lambda _: True)
        async with workload.x509_svids() as stream:
            before = await anext(stream)
            own = agent.identity.current
            await clock.advance(timedelta(minutes=35))
            after = await anext(stream)
            assert serial(before) != serial(after)
            assert before.svids[0].x509_svid_key != after.svids[0].x509_svid_key
            await until(lambda: agent.identity.current is not own)
        assert (await workload.x509_svid()).svids  # over the agent's own new SVID, too


async def test_jwt_svids(world: World) -> None:
    async with running(world) as (agent, workload):
        one = await world.create_entry("/a", parent=agent_id(agent), hint="x")
        await world.create_entry("/b", parent=agent_id(agent))
        answer = await eventually(
            lambda: workload.jwt_svid(["db", "web"]), lambda a: len(a.svids) == 2
        )
        by_id = {s.spiffe_id: s for s in answer.svids}
        token = by_id["spiffe://sim.example/a"].svid
        assert by_id["spiffe://sim.example/a"].hint == "x"
        again = await workload.jwt_svid(["web", "db"], "spiffe://sim.example/a")
        assert [s.svid for s in again.svids] == [token]  # from the cache

        checked = await workload.validate("db", token)
        assert checked.spiffe_id == "spiffe://sim.example/a"
        assert set(json_format.MessageToDict(checked.claims)["aud"]) == {"db", "web"}
        for audience, wrong in (("other", token), ("db", token[:-4] + "AAAA"), ("db", "x.y.z")):
            with pytest.raises(InvalidInputError):
                await workload.validate(audience, wrong)
        with pytest.raises(DeniedError):
            await workload.jwt_svid(["db"], "spiffe://sim.example/else")
        nobody: list[str] = []
        for audiences, wanted in ((nobody, ""), ([""], ""), (["db"], "not an id")):
            with pytest.raises(InvalidInputError):
                await workload.jwt_svid(audiences, wanted)
        keys = await workload.jwt_bundles()
        own = TrustDomain("sim.example")
        assert parse_jwks(own, keys.bundles["spiffe://sim.example"]).jwt_authorities

        assert len(agent.cache.tokens) == 2
        await world.delete_entry(one)
        await until(lambda: len(agent.cache.tokens) == 1)
        with pytest.raises(DeniedError):
            await workload.jwt_svid(["db"], "spiffe://sim.example/a")


async def test_tokens_with_an_id_are_never_shared(world: World) -> None:
    async with running(world) as (agent, workload):
        attributes = types_pb2.Entry.AdditionalAttributes(jwt_svid_include_jti=True)
        await world.create_entry("/a", parent=agent_id(agent), additional_attributes=attributes)
        first = await eventually(lambda: workload.jwt_svid(["db"]))
        second = await workload.jwt_svid(["db"])
    assert first.svids[0].svid != second.svids[0].svid


async def federate(world: World) -> TrustDomain:
    other = Authority("other.example")
    bundle = Bundle(other.trust_domain, (X509Root(other.der),))
    request = server_bundle_pb2.BatchSetFederatedBundleRequest(bundle=[bundle_to_pb(bundle)])
    await world.call(
        "/spire.api.server.bundle.v1.Bundle/BatchSetFederatedBundle",
        request,
        server_bundle_pb2.BatchSetFederatedBundleResponse,
    )
    return other.trust_domain


async def test_bundles_are_for_those_with_an_identity(world: World) -> None:
    async with running(world) as (agent, workload):
        await refusal(workload.x509_bundles, "no identity issued")
        await refusal(workload.jwt_bundles, "no identity issued")
        with pytest.raises(DeniedError):
            await workload.validate("a", "x.y.z")
        await world.create_entry("/a", parent=agent_id(agent))
        answer = await eventually(workload.x509_bundles)
    assert set(answer.bundles) == {"spiffe://sim.example"}


async def test_open_bundles_grow_with_the_entries_on_the_same_stream(world: World) -> None:
    await federate(world)
    async with running(world, keys="allow_unauthenticated_verifiers = true") as (agent, workload):
        await eventually(workload.x509_bundles)
        request = pb.X509BundlesRequest()
        stream = workload.stream("FetchX509Bundles", request, pb.X509BundlesResponse)
        assert set((await anext(stream)).bundles) == {"spiffe://sim.example"}
        entry = await world.create_entry(
            "/a", parent=agent_id(agent), federates_with=["other.example"]
        )
        both = {"spiffe://sim.example", "spiffe://other.example"}
        assert set((await anext(stream)).bundles) == both
        svid = await eventually(workload.x509_svid)
        assert set(svid.federated_bundles) == {"spiffe://other.example"}
        await world.delete_entry(entry)
        assert set((await anext(stream)).bundles) == {"spiffe://sim.example"}
        await stream.aclose()
        with pytest.raises(DeniedError):
            await workload.x509_svid()


async def test_a_process_that_does_not_match_gets_nothing(world: World) -> None:
    async with running(world) as (agent, workload):
        nobody = ("unix:uid:4000000000",)
        await world.create_entry("/other", parent=agent_id(agent), selectors=nobody)
        both = (f"unix:uid:{os.getuid()}", "unix:gid:4000000000")
        await world.create_entry("/half", parent=agent_id(agent), selectors=both)
        await until(lambda: len(agent.cache.entries) == 2)
        for attempt in (workload.x509_svid, lambda: workload.jwt_svid(["a"])):
            with pytest.raises(DeniedError, match="no identity issued"):
                await attempt()


async def test_methods_not_served(world: World) -> None:
    async with running(world) as (_, workload):
        for method in ("FetchWITSVID", "FetchWITBundles"):
            with pytest.raises(SpireHwError) as caught:
                await workload.call(method, pb.WITSVIDRequest(), pb.WITSVIDResponse)
            assert caught.value.kind.name == "UNIMPLEMENTED"

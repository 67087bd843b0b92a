# ruff: noqa: S106
"""Registration entries: written by operators, synchronised by agents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from spire_hw._pb import server_entry_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.errors import (
    DeniedError,
    DeniedReason,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    SpireHwError,
)
from spire_hw.rpc import convert
from spire_hw.spiffeid import SpiffeId
from spire_hw_sim.servers import ENTRY, TIMEOUT_S, Operator, ScriptedAgent, entry_message

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.asyncio

PARENT = SpiffeId("spiffe://example.org/spire/agent/x/1")


async def ask(operator: Operator, name: str, request: Any, answer: Any) -> Any:
    return await operator.channel.unary(ENTRY + name, request, answer, timeout_s=TIMEOUT_S)


async def update(operator: Operator, *entries: types_pb2.Entry, **masks: Any) -> list[Any]:
    request = pb.BatchUpdateEntryRequest(entries=entries, **masks)
    answer = await ask(operator, "BatchUpdateEntry", request, pb.BatchUpdateEntryResponse)
    return list(answer.results)


async def get(operator: Operator, entry_id: str) -> types_pb2.Entry:
    entry: types_pb2.Entry = await ask(
        operator, "GetEntry", pb.GetEntryRequest(id=entry_id), types_pb2.Entry
    )
    return entry


def codes(results: Sequence[Any]) -> list[int]:
    return [r.status.code for r in results]


async def test_each_item_of_a_batch_has_its_own_answer_in_order(operator: Operator) -> None:
    bad = entry_message("/bad", PARENT)
    bad.ClearField("selectors")
    results = await operator.create(
        entry_message("/a", PARENT),
        bad,
        entry_message("/a", PARENT),
        entry_message("/b", PARENT, id="mine"),
        entry_message("/c", PARENT, id="mine"),
    )
    assert codes(results) == [0, 3, 6, 0, 6]
    assert results[0].status.message == "OK"
    assert results[0].entry.revision_number == 0
    assert results[0].entry.created_at
    assert not results[1].HasField("entry")
    assert results[2].entry.id == results[0].entry.id
    assert results[3].entry.id == "mine"


async def test_an_output_mask_cuts_the_answer(operator: Operator) -> None:
    request = pb.BatchCreateEntryRequest(
        entries=[entry_message("/a", PARENT, hint="h")],
        output_mask=types_pb2.EntryMask(hint=True),
    )
    answer = await ask(operator, "BatchCreateEntry", request, pb.BatchCreateEntryResponse)
    entry = answer.results[0].entry
    assert entry.hint == "h"
    assert entry.id
    assert not entry.HasField("spiffe_id")
    whole = await get(operator, entry.id)
    assert whole.spiffe_id.path == "/a"
    cut = pb.GetEntryRequest(id=entry.id, output_mask=types_pb2.EntryMask())
    assert await ask(operator, "GetEntry", cut, types_pb2.Entry) == types_pb2.Entry(id=entry.id)


async def test_an_update_counts_the_revision_and_keeps_the_creation_time(
    operator: Operator,
) -> None:
    (created,) = await operator.create(entry_message("/a", PARENT, hint="old", admin=True))
    changed = types_pb2.Entry(id=created.entry.id, hint="new")
    (done,) = await update(operator, changed, input_mask=types_pb2.EntryMask(hint=True))
    assert done.status.code == 0
    assert done.entry.hint == "new"
    assert done.entry.admin
    assert done.entry.revision_number == 1
    assert done.entry.created_at == created.entry.created_at
    (again,) = await update(operator, changed, input_mask=types_pb2.EntryMask(hint=True))
    assert again.entry.revision_number == 2


async def test_a_refused_update_changes_nothing(operator: Operator) -> None:
    (created,) = await operator.create(entry_message("/a", PARENT, hint="old"))
    bad = entry_message("/a", PARENT, id=created.entry.id, hint="x" * 2000)
    results = await update(operator, bad, types_pb2.Entry(id="nobody"), types_pb2.Entry())
    assert codes(results) == [3, 5, 3]
    assert await get(operator, created.entry.id) == created.entry


async def test_deleting(operator: Operator) -> None:
    (created,) = await operator.create(entry_message("/a", PARENT))
    request = pb.BatchDeleteEntryRequest(ids=[created.entry.id, "nobody", ""])
    answer = await ask(operator, "BatchDeleteEntry", request, pb.BatchDeleteEntryResponse)
    assert codes(answer.results) == [0, 5, 3]
    assert [r.id for r in answer.results] == [created.entry.id, "nobody", ""]
    with pytest.raises(NotFoundError):
        await get(operator, created.entry.id)
    with pytest.raises(InvalidInputError):
        await get(operator, "")


async def test_an_empty_batch_is_fine(operator: Operator) -> None:
    assert await operator.create() == []


async def test_listing_filters_and_pages(operator: Operator) -> None:
    await operator.create(
        *(entry_message(f"/w/{i}", PARENT, [f"unix:uid:{i}", "unix:gid:1"]) for i in range(5)),
        entry_message("/down", PARENT, downstream=True, hint="h"),
    )

    async def found(**fields: Any) -> int:
        listed = await ask(
            operator,
            "ListEntries",
            pb.ListEntriesRequest(filter=pb.ListEntriesRequest.Filter(**fields)),
            pb.ListEntriesResponse,
        )
        counted = await ask(
            operator,
            "CountEntries",
            pb.CountEntriesRequest(filter=pb.CountEntriesRequest.Filter(**fields)),
            pb.CountEntriesResponse,
        )
        assert counted.count == len(listed.entries)
        return len(listed.entries)

    gid = {"selectors": [{"type": "unix", "value": "gid:1"}]}
    assert await found() == 6
    assert await found(by_spiffe_id={"trust_domain": "example.org", "path": "/w/3"}) == 1
    assert await found(by_parent_id=convert.id_to_pb(PARENT)) == 6
    assert await found(by_selectors=gid | {"match": "MATCH_SUPERSET"}) == 5
    assert await found(by_selectors=gid | {"match": "MATCH_EXACT"}) == 0
    assert await found(by_downstream={"value": True}) == 1
    assert await found(by_downstream={"value": False}) == 6
    assert await found(by_hint={"value": "h"}) == 1
    seen, token = [], ""
    while True:
        page = await ask(
            operator,
            "ListEntries",
            pb.ListEntriesRequest(page_size=4, page_token=token),
            pb.ListEntriesResponse,
        )
        seen += [e.id for e in page.entries]
        token = page.next_page_token
        if not token:
            break
    assert len(seen) == len(set(seen)) == 6
    with pytest.raises(SpireHwError) as caught:
        await ask(
            operator,
            "ListEntries",
            pb.ListEntriesRequest(page_size=4, page_token="junk"),
            pb.ListEntriesResponse,
        )
    assert caught.value.kind is ErrorKind.INTERNAL


async def test_entries_of_an_agent_follow_parents_and_aliases(
    operator: Operator, agent: ScriptedAgent
) -> None:
    assert agent.spiffe_id is not None
    child = SpiffeId("spiffe://example.org/child")
    await operator.create(
        entry_message("/child", agent.spiffe_id),
        entry_message("/grandchild", child),
        entry_message("/other", PARENT),
    )
    answer = await agent.call(
        ENTRY + "GetAuthorizedEntries",
        pb.GetAuthorizedEntriesRequest(output_mask=types_pb2.EntryMask(spiffe_id=True)),
        pb.GetAuthorizedEntriesResponse,
    )
    assert {e.spiffe_id.path for e in answer.entries} == {"/child", "/grandchild"}
    assert not any(e.selectors for e in answer.entries)


class Sync:
    """One SyncAuthorizedEntries stream."""

    def __init__(self, agent: ScriptedAgent) -> None:
        self._agent = agent

    async def run(
        self, first: pb.SyncAuthorizedEntriesRequest, *batches: Sequence[str]
    ) -> list[list[pb.SyncAuthorizedEntriesResponse]]:
        """Return the pages that answered the first request and each batch of ids."""
        path = ENTRY + "SyncAuthorizedEntries"
        async with (
            await self._agent.channel() as channel,
            channel.bidi(path, pb.SyncAuthorizedEntriesResponse, timeout_s=TIMEOUT_S) as call,
        ):
            await call.send(first)
            pages = [await self._pages(call)]
            for ids in batches:
                await call.send(pb.SyncAuthorizedEntriesRequest(ids=ids))
                pages.append(await self._pages(call))
            await call.done_sending()
            assert await call.receive() is None
        return pages

    async def _pages(self, call: Any) -> list[pb.SyncAuthorizedEntriesResponse]:
        pages = []
        while True:
            page = await call.receive()
            assert page is not None
            pages.append(page)
            if not page.more:
                return pages


MASK = types_pb2.EntryMask(spiffe_id=True, revision_number=True)


async def test_few_entries_come_whole_and_the_stream_ends(
    operator: Operator, agent: ScriptedAgent
) -> None:
    assert agent.spiffe_id is not None
    await operator.create(*(entry_message(f"/w/{i}", agent.spiffe_id) for i in range(3)))
    ((page,),) = await Sync(agent).run(pb.SyncAuthorizedEntriesRequest(output_mask=MASK))
    assert {e.spiffe_id.path for e in page.entries} == {"/w/0", "/w/1", "/w/2"}
    assert not page.entry_revisions


async def test_many_entries_come_as_revisions_and_on_request(
    operator: Operator, agent: ScriptedAgent
) -> None:
    assert agent.spiffe_id is not None
    count = 500 + 1
    results = await operator.create(
        *(entry_message(f"/w/{i}", agent.spiffe_id) for i in range(count))
    )
    ids = [r.entry.id for r in results]
    request = pb.SyncAuthorizedEntriesRequest(output_mask=MASK)
    first, some, none, many = await Sync(agent).run(request, [*ids[:2], "nobody"], [], ids)
    assert [len(p.entry_revisions) for p in first] == [500, 1]
    assert [p.more for p in first] == [True, False]
    assert {r.id for p in first for r in p.entry_revisions} == set(ids)
    assert all(r.created_at for p in first for r in p.entry_revisions)
    assert [e.id for p in some for e in p.entries] == ids[:2]
    assert not some[0].entries[0].selectors
    assert [len(p.entries) for p in none] == [0]
    assert [len(p.entries) for p in many] == [500, 1]


@pytest.mark.parametrize(
    "first",
    [
        pb.SyncAuthorizedEntriesRequest(ids=["x"]),
        pb.SyncAuthorizedEntriesRequest(output_mask=types_pb2.EntryMask(spiffe_id=True)),
    ],
)
async def test_a_sync_that_starts_wrongly_is_refused(
    agent: ScriptedAgent, first: pb.SyncAuthorizedEntriesRequest
) -> None:
    with pytest.raises(InvalidInputError):
        await Sync(agent).run(first)


async def test_a_sync_without_a_request_just_ends(agent: ScriptedAgent) -> None:
    path = ENTRY + "SyncAuthorizedEntries"
    async with (
        await agent.channel() as channel,
        channel.bidi(path, pb.SyncAuthorizedEntriesResponse, timeout_s=TIMEOUT_S) as call,
    ):
        await call.done_sending()
        assert await call.receive() is None


async def test_an_admin_entry_gives_rights_until_it_is_taken_away(
    operator: Operator, agent: ScriptedAgent
) -> None:
    assert agent.spiffe_id is not None
    (created,) = await operator.create(entry_message("/tool", agent.spiffe_id))
    tool = await agent.workload(created.entry.id)
    for is_admin in (False, True, False):
        message = types_pb2.Entry(id=created.entry.id, admin=is_admin)
        await update(operator, message, input_mask=types_pb2.EntryMask(admin=True))
        request = pb.ListEntriesRequest()
        if is_admin:
            answer = await tool.call(ENTRY + "ListEntries", request, pb.ListEntriesResponse)
            assert len(answer.entries) == 1
        else:
            with pytest.raises(DeniedError):
                await tool.call(ENTRY + "ListEntries", request, pb.ListEntriesResponse)


async def test_a_workload_is_no_agent(operator: Operator, agent: ScriptedAgent) -> None:
    assert agent.spiffe_id is not None
    (created,) = await operator.create(entry_message("/tool", agent.spiffe_id))
    tool = await agent.workload(created.entry.id)
    with pytest.raises(DeniedError) as caught:
        await tool.call(
            ENTRY + "GetAuthorizedEntries",
            pb.GetAuthorizedEntriesRequest(),
            pb.GetAuthorizedEntriesResponse,
        )
    assert caught.value.reason is DeniedReason.AGENT_NOT_ATTESTED

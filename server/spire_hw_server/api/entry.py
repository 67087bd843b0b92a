"""Registration entries: operators write and list them, agents fetch those they may serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from spire_hw._pb import server_entry_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.rpc.status import item_status
from spire_hw_server.api.authorize import caller_agent
from spire_hw_server.api.entry_message import (
    encode_entry,
    parse_entry,
    parse_filter,
    parse_update,
)
from spire_hw_server.datastore.records import Entry, EntryFilter, Page, SimilarEntryError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence

    from spire_hw.rpc.service import Call
    from spire_hw.spiffeid import TrustDomain
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.entries import EntryCache

SYNC_PAGE: Final = 500

T = TypeVar("T")


class EntryService:
    """`spire.api.server.entry.v1.Entry`."""

    def __init__(
        self,
        *,
        trust_domain: TrustDomain,
        store: Datastore,
        entries: EntryCache,
        audit: Audit,
        sync_page: int = SYNC_PAGE,
    ) -> None:
        self._trust_domain = trust_domain
        self._store = store
        self._entries = entries
        self._audit = audit
        self._sync_page = sync_page

    async def count_entries(
        self, request: pb.CountEntriesRequest, call: Call
    ) -> pb.CountEntriesResponse:
        """Return how many entries there are."""
        del call
        where = EntryFilter()
        if request.HasField("filter"):
            where = parse_filter(request.filter, self._trust_domain)
        return pb.CountEntriesResponse(count=await self._store.count_entries(where))

    async def list_entries(
        self, request: pb.ListEntriesRequest, call: Call
    ) -> pb.ListEntriesResponse:
        """Return entries, whole or page by page."""
        del call
        where = EntryFilter()
        if request.HasField("filter"):
            where = parse_filter(request.filter, self._trust_domain)
        mask = request.output_mask if request.HasField("output_mask") else None
        page = await listed(
            self._store.list_entries(where, parse_page(request.page_size, request.page_token))
        )
        return pb.ListEntriesResponse(
            entries=[encode_entry(e, mask) for e in page.entries],
            next_page_token=page.next_token,
        )

    async def get_entry(self, request: pb.GetEntryRequest, call: Call) -> types_pb2.Entry:
        """Return one entry."""
        self._audit.note(call, registration_id=request.id)
        if not request.id:
            raise InvalidInputError("missing entry id")
        entry = await self._store.get_entry(request.id)
        return encode_entry(entry, request.output_mask if request.HasField("output_mask") else None)

    async def batch_create_entry(
        self, request: pb.BatchCreateEntryRequest, call: Call
    ) -> pb.BatchCreateEntryResponse:
        """Create entries; each item has its own status."""
        mask = request.output_mask if request.HasField("output_mask") else None
        response = pb.BatchCreateEntryResponse()
        for message in request.entries:
            entry, error = await tried(self._create(message))
            if isinstance(error, SimilarEntryError):
                entry = error.entry
            self._audit.item(call, error, **_fields(message, entry))
            result = response.results.add(status=item_status(error))
            if entry is not None:
                result.entry.CopyFrom(encode_entry(entry, mask))
        await self._entries.refresh()
        return response

    async def _create(self, message: types_pb2.Entry) -> Entry:
        return await self._store.create_entry(parse_entry(message, self._trust_domain))

    async def batch_update_entry(
        self, request: pb.BatchUpdateEntryRequest, call: Call
    ) -> pb.BatchUpdateEntryResponse:
        """Change entries; each item has its own status."""
        input_mask = request.input_mask if request.HasField("input_mask") else None
        mask = request.output_mask if request.HasField("output_mask") else None
        response = pb.BatchUpdateEntryResponse()
        for message in request.entries:
            entry, error = await tried(self._update(message, input_mask))
            self._audit.item(call, error, **_fields(message, entry))
            result = response.results.add(status=item_status(error))
            if entry is not None:
                result.entry.CopyFrom(encode_entry(entry, mask))
        await self._entries.refresh()
        return response

    async def _update(self, message: types_pb2.Entry, mask: types_pb2.EntryMask | None) -> Entry:
        if not message.id:
            raise InvalidInputError("missing entry id")
        stored = await self._store.get_entry(message.id)
        entry, named = parse_update(message, mask, self._trust_domain, stored)
        return await self._store.update_entry(entry, named)

    async def batch_delete_entry(
        self, request: pb.BatchDeleteEntryRequest, call: Call
    ) -> pb.BatchDeleteEntryResponse:
        """Delete entries; each item has its own status."""
        response = pb.BatchDeleteEntryResponse()
        for entry_id in request.ids:
            _, error = await tried(self._delete(entry_id))
            self._audit.item(call, error, registration_id=entry_id)
            response.results.add(status=item_status(error), id=entry_id)
        await self._entries.refresh()
        return response

    async def _delete(self, entry_id: str) -> Entry:
        if not entry_id:
            raise InvalidInputError("missing entry id")
        return await self._store.delete_entry(entry_id)

    async def get_authorized_entries(
        self, request: pb.GetAuthorizedEntriesRequest, call: Call
    ) -> pb.GetAuthorizedEntriesResponse:
        """Return every entry the calling agent may serve."""
        mask = request.output_mask if request.HasField("output_mask") else None
        authorized = self._entries.authorized(caller_agent(call))
        return pb.GetAuthorizedEntriesResponse(
            entries=[encode_entry(e, mask) for e in authorized.values()]
        )

    async def sync_authorized_entries(
        self, requests: AsyncIterator[pb.SyncAuthorizedEntriesRequest], call: Call
    ) -> AsyncIterator[pb.SyncAuthorizedEntriesResponse]:
        """Bring an agent's entries up to date: all at once when few, else only what it asks for."""
        first = await anext(requests, None)
        if first is None:
            return
        if first.ids:
            raise InvalidInputError("specifying IDs on initial request is not supported")
        mask = first.output_mask if first.HasField("output_mask") else None
        if mask is not None and not mask.revision_number:
            raise InvalidInputError("revision number cannot be masked")
        authorized = self._entries.authorized(caller_agent(call))
        held = list(authorized.values())
        if len(held) <= self._sync_page:
            yield pb.SyncAuthorizedEntriesResponse(entries=[encode_entry(e, mask) for e in held])
            return
        for part, more in _pages(held, self._sync_page):
            yield pb.SyncAuthorizedEntriesResponse(
                entry_revisions=[_revision(e) for e in part], more=more
            )
        async for request in requests:
            ids = dict.fromkeys(request.ids)  # naming one a million times costs us nothing
            wanted = [e for e in map(authorized.get, ids) if e is not None]
            for part, more in _pages(wanted, self._sync_page):
                yield pb.SyncAuthorizedEntriesResponse(
                    entries=[encode_entry(e, mask) for e in part], more=more
                )


def parse_page(size: int, token: str) -> Page:
    """Return the page a list request asks for.

    Raises:
        InvalidInputError: a negative size.
    """
    if size < 0:
        raise InvalidInputError("page size is negative")
    return Page(size, token)


async def listed(answer: Awaitable[T]) -> T:
    """Return a page; as upstream, a token that the store cannot read is INTERNAL."""
    try:
        return await answer
    except InvalidInputError as e:
        raise SpireHwError(f"could not list: {e.message}", kind=ErrorKind.INTERNAL) from e


def _revision(entry: Entry) -> pb.EntryRevision:
    created = 0 if entry.created_at is None else int(entry.created_at.timestamp())
    return pb.EntryRevision(
        id=entry.entry_id, revision_number=entry.revision_number, created_at=created
    )


def _pages(items: Sequence[T], size: int) -> Iterator[tuple[Sequence[T], bool]]:
    """Yield parts of a list and whether another follows; one empty part for an empty list."""
    for start in range(0, max(len(items), 1), size):
        yield items[start : start + size], start + size < len(items)


async def tried(action: Awaitable[T]) -> tuple[T | None, SpireHwError | None]:
    """Return what one item of a batch came to, or its error."""
    try:
        return await action, None
    except SpireHwError as e:
        return None, e


def _fields(message: types_pb2.Entry, entry: Entry | None) -> dict[str, str]:
    if entry is not None:
        return {
            "registration_id": entry.entry_id,
            "spiffe_id": str(entry.spiffe_id),
            "parent_id": str(entry.parent_id),
        }
    return {"registration_id": message.id}

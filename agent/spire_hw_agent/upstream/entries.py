"""The agent's entries, kept by asking only for those that changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw._pb import server_entry_pb2, types_pb2
from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.rpc.convert import id_from_pb, selector_from_pb
from spire_hw.spiffeid import TrustDomain
from spire_hw_agent.entry import AgentEntry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.log import Logger
    from spire_hw.rpc.client import Bidi

_PAGE = 500
_MAX_ENTRIES = 100_000
_MAX_HINT_BYTES = 1024

# Members of an entry the agent works with (the mask of every synchronisation).
_MASK = types_pb2.EntryMask(
    spiffe_id=True,
    selectors=True,
    federates_with=True,
    admin=True,
    downstream=True,
    revision_number=True,
    store_svid=True,
    hint=True,
    created_at=True,
    additional_attributes=True,
)


class EntryBook:
    """The entries as of the last synchronisation, and those that could not be served.

    Args:
        trust_domain: whose entries they must be.
    """

    def __init__(self, trust_domain: TrustDomain, log: Logger) -> None:
        self._trust_domain = trust_domain
        self._log = log
        self._known: dict[str, AgentEntry] = {}
        self._passed_over: dict[str, tuple[int, int]] = {}

    async def synchronise(
        self, stream: Bidi[server_entry_pb2.SyncAuthorizedEntriesResponse]
    ) -> list[AgentEntry]:
        """Return all entries of this agent; only those that changed cross the wire.

        Args:
            stream: an open SyncAuthorizedEntries.

        Raises:
            SpireHwError: the server is away, or its answer breaks a rule.
        """
        await stream.send(server_entry_pb2.SyncAuthorizedEntriesRequest(output_mask=_MASK))
        pages = _Pages(stream)
        await pages.collect()
        entries, changed = self._sort_out(pages)
        for start in range(0, len(changed), _PAGE):
            ids = changed[start : start + _PAGE]
            await stream.send(server_entry_pb2.SyncAuthorizedEntriesRequest(ids=ids))
            asked = _Pages(stream, wanted=frozenset(ids))
            await asked.collect()
            entries |= self._parse(asked.entries)
        await stream.done_sending()
        seen = pages.entries.keys() | pages.revisions.keys()
        self._passed_over = {i: r for i, r in self._passed_over.items() if i in seen}
        self._known = entries
        return list(entries.values())

    def _sort_out(self, pages: _Pages) -> tuple[dict[str, AgentEntry], list[str]]:
        """Return the entries at hand, and the ids of those that have to be asked for."""
        entries = self._parse(pages.entries)
        changed: list[str] = []
        for r in pages.revisions.values():
            known = self._known.get(r.id)
            if known and (known.revision, known.created_at) == (r.revision_number, r.created_at):
                entries[r.id] = known
            elif self._passed_over.get(r.id) != (r.revision_number, r.created_at):
                changed.append(r.id)
        return entries, changed

    def _parse(self, messages: Mapping[str, types_pb2.Entry]) -> dict[str, AgentEntry]:
        """Return the entries that can be served; one that cannot must not stop the others."""
        entries: dict[str, AgentEntry] = {}
        for message in messages.values():
            revision = (message.revision_number, message.created_at)
            try:
                entries[message.id] = _entry(message, self._trust_domain)
            except InvalidInputError as e:
                if self._passed_over.get(message.id) != revision:
                    self._log.error(
                        "Entry cannot be served, it is passed over",
                        entry_id=message.id,
                        error=e.message,
                    )
                self._passed_over[message.id] = revision
            else:
                self._passed_over.pop(message.id, None)
        return entries


class _Pages:
    """One answer of a synchronisation in pages, within bounds.

    Args:
        wanted: ids that were asked for; None for the first answer, which may hold any.
    """

    def __init__(
        self,
        stream: Bidi[server_entry_pb2.SyncAuthorizedEntriesResponse],
        wanted: frozenset[str] | None = None,
    ) -> None:
        self._stream = stream
        self._wanted = wanted
        self.entries: dict[str, types_pb2.Entry] = {}
        self.revisions: dict[str, server_entry_pb2.EntryRevision] = {}

    async def collect(self) -> None:
        """Take all pages.

        Raises:
            SpireHwError: INTERNAL, the answer breaks a rule.
        """
        more = True
        while more:
            answer = await self._stream.receive()
            if answer is None:
                raise SpireHwError("server ended the synchronisation early")
            more = answer.more
            if more and not answer.entries and not answer.entry_revisions:
                raise SpireHwError("server sent an empty page and announced another")
            self._take(answer)

    def _take(self, answer: server_entry_pb2.SyncAuthorizedEntriesResponse) -> None:
        if self._wanted is not None and answer.entry_revisions:
            raise SpireHwError("server sent revisions where entries were asked for")
        for e in answer.entries:
            if self._wanted is not None and e.id not in self._wanted:
                raise SpireHwError("server sent an entry that was not asked for")
            self._once(e.id)
            self.entries[e.id] = e
        for r in answer.entry_revisions:
            self._once(r.id)
            self.revisions[r.id] = r

    def _once(self, entry_id: str) -> None:
        if not entry_id or entry_id in self.entries or entry_id in self.revisions:
            raise SpireHwError("server sent an entry twice, or one without an id")
        if len(self.entries) + len(self.revisions) >= _MAX_ENTRIES:
            raise SpireHwError(f"server sent more than {_MAX_ENTRIES} entries")


def _entry(e: types_pb2.Entry, trust_domain: TrustDomain) -> AgentEntry:
    if not e.selectors:
        raise InvalidInputError("it has no selectors")
    spiffe_id = id_from_pb(e.spiffe_id)
    if not spiffe_id.is_member_of(trust_domain):
        raise InvalidInputError(f"{spiffe_id} is of another trust domain")
    if len(e.hint.encode()) > _MAX_HINT_BYTES:
        raise InvalidInputError(f"its hint is longer than {_MAX_HINT_BYTES} bytes")
    return AgentEntry(
        entry_id=e.id,
        spiffe_id=spiffe_id,
        selectors=frozenset(selector_from_pb(s) for s in e.selectors),
        federates_with=tuple(TrustDomain.parse(t) for t in e.federates_with),
        hint=e.hint,
        revision=e.revision_number,
        created_at=e.created_at,
        prefetch=not e.additional_attributes.disable_x509_svid_prefetch,
        jwt_jti=e.additional_attributes.jwt_svid_include_jti,
        store_svid=e.store_svid,
    )

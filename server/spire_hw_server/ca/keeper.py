"""Keeps this server's CA journal in the store, and beside it the mark by which it is found again.

What is in a journal says `ca.journal`; which one is this server's, `ca.restore`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from spire_hw.errors import EncodingError
from spire_hw_server.ca.journal import Journal, encode_journal, parse_journal
from spire_hw_server.datastore.records import JournalRow

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.log import Logger
    from spire_hw_server.ca.mark import AuthorityMark
    from spire_hw_server.datastore.interface import Datastore


class JournalKeeper:
    """The journal of one server; empty until one is taken over or saved."""

    def __init__(self, store: Datastore, mark: AuthorityMark, log: Logger) -> None:
        self._store = store
        self._mark = mark
        self._log = log
        self._row = JournalRow(0, "", b"")
        self._journal = Journal()

    @property
    def journal(self) -> Journal:
        """Return the journal as it is in the store."""
        return self._journal

    def take_over(self, row: JournalRow) -> None:
        """Go on with a journal that the store has.

        Raises:
            EncodingError: it is no journal.
        """
        self._journal = parse_journal(row.data)
        self._row = row

    async def save(self, journal: Journal, active_id: str) -> None:
        """Store a journal.

        The mark comes first, and names the authority before as well: whichever of the two the
        store has after a crash, it is found.

        Args:
            journal: the new one.
            active_id: id of its active X.509 authority.

        Raises:
            SpireHwError: the store or the file of the mark failed.
        """
        if active_id != self._row.active_x509_authority_id:
            ids = (active_id, self._row.active_x509_authority_id)
            await asyncio.to_thread(self._mark.store, tuple(i for i in ids if i))
        row = JournalRow(self._row.row_id, active_id, encode_journal(journal))
        self._row = await self._store.save_journal(row)
        self._journal = journal

    async def prune(self, before: datetime) -> None:
        """Drop journals of servers that are gone: all of their authorities ended before a time.

        Raises:
            SpireHwError: the store failed.
        """
        for row in await self._store.list_journals():
            if row.row_id == self._row.row_id:
                continue
            try:
                end = parse_journal(row.data).latest_end()
            except EncodingError as e:
                self._log.warning("a CA journal cannot be read", row_id=row.row_id, error=e.message)
                continue
            if end is None or end < before:
                await self._store.delete_journal(row.row_id)

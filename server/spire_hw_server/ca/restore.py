"""Finds at start what this server signed with before: journal, mark and KeyManager side by side.

Where they do not agree, a new CA would replace keys that may be in use elsewhere or are away for
the moment. That is refused, unless the operator gave them up or the KeyManager forgets its keys by
nature.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from spire_hw.errors import NotReadyError
from spire_hw.key import spki_der
from spire_hw.x509.certificate import key_identifier
from spire_hw_server.ca.line import X509Line
from spire_hw_server.ca.slots import Record, Slots, Status

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import ManagedSigner
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.ca.line import Line
    from spire_hw_server.ca.mark import AuthorityMark
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import JournalRow

R = TypeVar("R", bound=Record)


class Restorer:
    """What one start finds.

    Args:
        listed: the KeyManager's keys at this start, by key id.
        keys_name: what messages call the KeyManager.
        bundles: what is published.
        keys_persist: False for a KeyManager that forgets its keys by nature.
        accept_lost: authority ids whose keys the operator gave up for lost.
    """

    def __init__(
        self,
        listed: Mapping[str, ManagedSigner],
        *,
        keys_name: str,
        bundles: Bundles,
        keys_persist: bool,
        accept_lost: frozenset[str],
        log: Logger,
    ) -> None:
        self._listed = listed
        self._keys_name = keys_name
        self._bundles = bundles
        self._keys_persist = keys_persist
        self._accept_lost = accept_lost
        self._log = log

    async def find_journal(self, store: Datastore, mark: AuthorityMark) -> JournalRow | None:
        """Find this server's journal by the mark, or else by the keys that are listed.

        Returns:
            The journal; None when a first CA may be made.

        Raises:
            NotReadyError: keys of a CA are there that this store knows nothing of.
            SpireHwError: the store or the file of the mark failed.
        """
        marked = await asyncio.to_thread(mark.load)
        row = await store.find_journal(marked) if marked else None
        ids = tuple(
            key_identifier(spki_der(signer.public_key)).hex()
            for key_id, signer in self._listed.items()
            if key_id.startswith(X509Line.key_prefix)
        )
        if row is None and ids:
            row = await store.find_journal(ids)
        if row is None and self._keys_persist:
            await self._begin(mark, marked, ids)
        return row

    async def _begin(
        self, mark: AuthorityMark, marked: tuple[str, ...], listed: tuple[str, ...]
    ) -> None:
        """Note that a first CA is being made, unless that would replace one the store ignores.

        A first start that was cut short is recognised by the note, or by its authority being in
        the store's bundle already, and goes on.
        """
        begun = await asyncio.to_thread(mark.exists)
        unknown = marked or (() if begun else listed)
        published = {root.authority_id for root in self._bundles.own.x509_authorities}
        accepted = self._accept_lost
        if unknown and published.isdisjoint(unknown) and accepted.isdisjoint(unknown):
            raise NotReadyError(
                f"this server has a CA already (authority {unknown[0]}), but the datastore knows "
                "nothing of it. Is it another database, or an empty one; or are the keys in "
                f"KeyManager({self._keys_name}) another server's? No new CA is started, it would "
                "replace those keys. Restore the database, correct its connection_string, or give "
                "this server a key identifier of its own. If the old CA is given up, set "
                f'experimental.accept_lost_authorities = ["{unknown[0]}"] in the server section '
                "and start again"
            )
        if unknown:
            self._log.warning(
                "the datastore holds no CA journal for this server's authority; a new CA is started",
                authority_id=unknown[0],
            )
        if not begun:
            await asyncio.to_thread(mark.store, ())

    def fill(self, line: Line[R], records: tuple[R, ...], now: datetime) -> None:
        """Put the records that can be used again into the slots; the active one signs.

        Raises:
            NotReadyError: the key of the active authority is not listed, or it ended and is not for
                this server to replace.
        """
        active = Slots.restore(records).active
        if active is not None and now >= active.not_after and line.is_by_hand(active):
            self._refuse_ended(line, active)
        if active is not None and now < active.not_after and not line.holds(active, self._listed):
            self._refuse_lost(line, active)
        usable = []
        for record in records:
            fault = self._fault(line, record, now)
            if fault is None:
                usable.append(record)
            elif record.status is not Status.OLD:
                self._log.warning(
                    "authority of the journal is not used again",
                    kind=line.name,
                    authority_id=record.authority_id,
                    status=record.status.name,
                    reason=fault,
                )
        line.slots = Slots.restore(usable)
        for record in line.slots.records():
            line.signers[record.authority_id] = self._listed[line.key_id(record.slot)]
        if line.slots.active is not None:
            line.adopt(line.slots.active, line.signers[line.slots.active.authority_id])

    def _fault(self, line: Line[R], record: R, now: datetime) -> str | None:
        if now >= record.not_after:
            return "expired"
        if not line.holds(record, self._listed):
            return "its key is not in the KeyManager"
        if not line.is_published(record, self._bundles.own):
            return "it is no longer in the trust bundle"
        return line.misfit(record)

    def _refuse_ended(self, line: Line[R], record: R) -> None:
        """Raise unless leaving an offline root is what the operator wants."""
        if record.authority_id in self._accept_lost:
            self._log.warning(
                "a self-signed authority takes the place of one under an offline root, as configured",
                kind=line.name,
                authority_id=record.authority_id,
            )
            return
        raise NotReadyError(
            f"{line.name} authority {record.authority_id} was signed under an offline root and ended at "
            f"{record.not_after.isoformat()}; no authority of its own is made in its place. To go on "
            "with a self-signed one, and to have the next one signed from there (spire-hw-server ca "
            f'csr), set experimental.accept_lost_authorities = ["{record.authority_id}"] in the server '
            "section and start again"
        )

    def _refuse_lost(self, line: Line[R], record: R) -> None:
        """Raise unless a new authority in place of a lost one is what the operator wants."""
        if not self._keys_persist:
            self._log.info("the KeyManager keeps no keys over a restart; a new CA is started")
            return
        if record.authority_id in self._accept_lost:
            self._log.warning(
                "a lost authority is replaced, as configured",
                kind=line.name,
                authority_id=record.authority_id,
            )
            return
        names = ", ".join(sorted(self._listed)) or "no key at all"
        raise NotReadyError(
            f"the CA journal says that {line.name} authority {record.authority_id} signs with key "
            f'"{line.key_id(record.slot)}" until {record.not_after.isoformat()}, but '
            f"KeyManager({self._keys_name}) does not have that key (it lists {names}). Is the "
            "token away, or another one? No new CA is started. If the key is lost for good, set "
            f'experimental.accept_lost_authorities = ["{record.authority_id}"] in the server '
            "section and start again"
        )

"""Replaced key pairs wait here to be destroyed; none is dropped because a token was busy."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from spire_hw.aio.backoff import Backoff
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.pkcs11.wire import Kind, pack_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.log import Logger
    from spire_hw.pkcs11.pool.pool import Pool

_DAY_S: Final = 86400.0


class Disposal:
    """Destroys pairs one after the other, private halves first."""

    def __init__(self, pool: Pool, log: Logger) -> None:
        self._pool = pool
        self._log = log
        self._waiting: dict[bytes, str] = {}
        self._turn = asyncio.Lock()
        self._added = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

    @property
    def waiting(self) -> int:
        """Return how many pairs are still to be destroyed."""
        return len(self._waiting)

    def add(self, pairs: Iterable[tuple[bytes, str]]) -> None:
        """Queue pairs, given as (CKA_ID, label)."""
        for cka_id, label in pairs:
            self._waiting[cka_id] = label
        self._show()
        if self._waiting:
            self._emptied.clear()
            self._added.set()

    async def wait_empty(self) -> None:
        """Return once nothing is left to be destroyed."""
        await self._emptied.wait()

    async def now(self) -> int:
        """Try once to destroy everything that waits; return how many pairs went."""
        before = len(self._waiting)
        for cka_id, label in list(self._waiting.items()):
            await self._destroy(cka_id, label)
        return before - len(self._waiting)

    async def run(self) -> None:
        """Destroy what is queued, with growing pauses when the token refuses; never ends."""
        while True:
            await self._added.wait()
            self._added.clear()
            backoff = Backoff(1.0, 60.0, factor=2.0)
            while self._waiting:
                cka_id, label = next(iter(self._waiting.items()))
                kind = await self._destroy(cka_id, label)
                if kind is None:
                    continue
                # To the end: one pair that cannot go must not keep the others.
                self._waiting[cka_id] = self._waiting.pop(cka_id)
                refused_for_good = kind is ErrorKind.FAILED_PRECONDITION and len(self._waiting) == 1
                with suppress(TimeoutError):
                    async with asyncio.timeout(_DAY_S if refused_for_good else backoff.next_s()):
                        await self._added.wait()
                self._added.clear()

    def _show(self) -> None:
        self._pool.metrics.gauge(("hsm", "keys_awaiting_disposal"), len(self._waiting))

    async def _destroy(self, cka_id: bytes, label: str) -> ErrorKind | None:
        async with self._turn:
            # Who cannot wait for its turn may have been there first.
            return await self._ask(cka_id, label) if cka_id in self._waiting else None

    async def _ask(self, cka_id: bytes, label: str) -> ErrorKind | None:
        try:
            await self._pool.ask(
                Kind.DESTROY, {"id": pack_bytes(cka_id), "label": label}, what="destroy key pair"
            )
        except SpireHwError as e:
            self._log.warning(
                "hsm.disposal_failed", label=label, error=e.message, waiting=len(self._waiting)
            )
            return e.kind
        self._waiting.pop(cka_id, None)
        self._show()
        if not self._waiting:
            self._emptied.set()
        self._log.info("hsm.key_destroyed", label=label)
        return None

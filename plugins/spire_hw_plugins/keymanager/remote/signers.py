"""Several signers as one: who is asked, who is asked next, and when one is asked again.

One is in use until it fails. Then the next that holds our keys takes its place, and gives it back to
the one before it in the configuration once that has answered again. While none answers, calls wait a
little for the first that does; after that they fail at once, and a prober alone goes on trying.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

from spire_hw.aio.backoff import Backoff
from spire_hw.aio.tasks import Tasks
from spire_hw.aio.watch import Watch
from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.telemetry.metrics import count_fault
from spire_hw_plugins.keymanager.remote.retry import RetryBudget, jitter_s

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_plugins.keymanager.remote.link import Link

T = TypeVar("T")

_AWAY: Final = {ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED, ErrorKind.UNAUTHENTICATED}
_SHORTLY: Final = {ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED}
_PROBE_S: Final = 5.0
_HOLD_S: Final = 5.0
_PROBE_FIRST_S: Final = 0.1
_PROBE_CAP_S: Final = 5.0


class Signers:
    """The signers of a configuration, in order of preference."""

    def __init__(
        self,
        links: Sequence[Link],
        check: Callable[[Link, float], Awaitable[None]],
        *,
        patience_s: float,
        clock: Clock,
        metrics: Metrics,
        log: Logger,
    ) -> None:
        """Describe the set.

        Args:
            links: in order of preference.
            check: asks a signer whether it holds our keys; takes seconds it may last, raises when
                it does not.
            patience_s: how long calls wait for a signer to come back.
            clock: for waiting.
            metrics: counts how often one cannot be used.
            log: where it is said who is used.
        """
        self.links = tuple(links)
        self._check = check
        self._patience_s = patience_s
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._budget = RetryBudget()
        self._current: Link | None = None
        self._away_since = clock.monotonic()
        self._changes = Watch(0)
        self._probing: set[Link] = set()
        self._tasks = Tasks(self._failed)

    @property
    def current(self) -> Link | None:
        """Return who is asked, None while nobody can be."""
        return self._current

    @property
    def trouble(self) -> SpireHwError:
        """Return why nobody can be asked: what will not heal by itself comes first."""
        troubles = [link.trouble for link in self.links if link.trouble is not None]
        for kinds in (set(ErrorKind) - _AWAY, set(ErrorKind) - _SHORTLY, set(ErrorKind)):
            for trouble in troubles:
                if trouble.kind in kinds:
                    return trouble
        return UnavailableError("no signer can be asked now")

    async def start(self, timeout_s: float) -> None:
        """Ask all of them, and wait for the first that can be used.

        Raises:
            SpireHwError: why none can be; what the operator has to decide comes before what may heal.
        """
        for link in self.links:
            self._probe(link, 0)
        try:
            async with asyncio.timeout(timeout_s):
                await self._first_answer()
        except TimeoutError:
            raise self.trouble from None
        if self._current is None:
            raise self.trouble

    async def call(
        self, use: Callable[[Link, float], Awaitable[T]], timeout_s: float, *, again: bool = True
    ) -> T:
        """Call a signer, another one or the same again where that helps, within a time.

        Args:
            use: what to do with a signer in how many seconds at most; safe to be repeated.
            timeout_s: for all tries.
            again: whether another signer may be asked while the first may still be at work.

        Raises:
            SpireHwError: what the last one said.
        """
        end = self._clock.monotonic() + timeout_s
        self._budget.earn()
        attempt = 0
        while True:
            link = self._current or await self._returned(end)
            left = end - self._clock.monotonic()
            spare = again and self.has_spare(link)
            try:
                return await use(link, left / 2 if spare else left)
            except SpireHwError as e:
                if e.kind not in _AWAY:
                    raise
                self._lose(link, e)
                attempt += 1
                late = e.kind is ErrorKind.DEADLINE_EXCEEDED and not spare
                if late or not self._budget.spend():
                    raise
            await self._clock.sleep(min(jitter_s(attempt), max(0.0, end - self._clock.monotonic())))

    def has_spare(self, link: Link) -> bool:
        """Tell whether another signer could be asked."""
        return any(one.trouble is None for one in self.links if one is not link)

    async def another(self, asked: Collection[Link], timeout_s: float) -> Link | None:
        """Wait a while for a signer that was not asked yet; None when there is none."""
        end = self._clock.monotonic() + timeout_s
        while any(one not in asked for one in self.links):
            seen = self._changes.version
            for one in self.links:
                if one.trouble is None and one not in asked:
                    return one
            try:
                async with asyncio.timeout(max(0.0, end - self._clock.monotonic())):
                    await self._changes.wait(seen)
            except TimeoutError:
                return None
        return None

    def changed_by(self, link: Link) -> None:
        """Use the signer that has made a key; the others first have to be seen to hold it too."""
        for one in self.links:
            if one is not link:
                one.trouble = UnavailableError(
                    f"signer {one.name} was not asked for the new key yet"
                )
                self._probe(one, 0)
        link.trouble, self._current = None, link

    async def close(self) -> None:
        """End all connections."""
        self._current = None
        await self._tasks.close()
        for link in self.links:
            await link.close()

    async def _returned(self, end: float) -> Link:
        """Wait for a signer that can be used."""
        seen = self._changes.version
        last = min(end, self._away_since + self._patience_s)
        while self._current is None:
            left = last - self._clock.monotonic()
            if left <= 0 or self.trouble.kind not in _SHORTLY:
                raise self.trouble
            try:
                async with asyncio.timeout(left):
                    _, seen = await self._changes.wait(seen)
            except TimeoutError:
                raise self.trouble from None
        return self._current

    async def _first_answer(self) -> None:
        """Wait until one can be used, or each has said something that waiting will not heal."""
        while self._current is None:
            troubles = [link.trouble for link in self.links]
            if all(t is not None and t.kind not in _AWAY for t in troubles):
                return
            await self._changes.wait(self._changes.version)

    def _lose(self, link: Link, error: SpireHwError) -> None:
        if link.trouble is None or link.trouble.message != error.message:
            count_fault(self._metrics, "signer.away")
            self._log.warning("signer cannot be used", signer=link.name, reason=error.message)
        link.trouble = error
        if self._current is link:
            self._current = next((one for one in self.links if one.trouble is None), None)
            if self._current is None:
                self._away_since = self._clock.monotonic()
            else:
                self._log.warning("another signer is used", signer=self._current.name)
        # One that lists keys and does not sign is not to come and go with every call.
        self._probe(link, 0 if self._current is None else _HOLD_S)

    def _gain(self, link: Link) -> None:
        link.trouble = None
        best = next(one for one in self.links if one.trouble is None)
        if best is not self._current:
            self._current = best
            self._log.info("signer is used", signer=best.name)

    def _probe(self, link: Link, hold_s: float) -> None:
        if link not in self._probing:
            self._probing.add(link)
            self._tasks.start(f"probe {link.name}", self._probe_until_good(link, hold_s))

    async def _probe_until_good(self, link: Link, hold_s: float) -> None:
        pause = Backoff(_PROBE_FIRST_S, _PROBE_CAP_S)
        try:
            await self._clock.sleep(hold_s)
            while True:
                try:
                    await self._check(link, _PROBE_S)
                except SpireHwError as e:
                    self._lose(link, e)
                else:
                    self._gain(link)
                    return
                finally:
                    self._changes.set(0)
                await self._clock.sleep(pause.next_s())
        finally:
            self._probing.discard(link)

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("task failed", task=name, exc_info=error)

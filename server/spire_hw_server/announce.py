"""Tells Notifier and BundlePublisher plugins about the trust bundle.

A notifier that does not want the bundle at start keeps the server from starting; later failures are
logged. Publishers get the bundle at every change and every half minute all the same: a place that
was away or was emptied is filled again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import PluginError, SpireHwError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from spire_hw.aio.watch import Watch
    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.bundlepublisher import BundlePublisher
    from spire_hw.plugin.notifier import Notifier

PUBLISH_INTERVAL_S: Final = 30.0
_TOLD_S: Final = 60.0


class Announcer:
    """The plugins of one server that want to hear of its bundle.

    Args:
        bundle: the server's own.
        notifiers: by name, in the order of the configuration.
        publishers: likewise.
        clock: time between publications.
        log: where failures go.
    """

    def __init__(
        self,
        bundle: Watch[Bundle],
        *,
        notifiers: Sequence[tuple[str, Notifier]],
        publishers: Sequence[tuple[str, BundlePublisher]],
        clock: Clock,
        log: Logger,
    ) -> None:
        self._bundle = bundle
        self._notifiers = tuple(notifiers)
        self._publishers = tuple(publishers)
        self._clock = clock
        self._log = log
        self._tasks = Tasks(self._failed)

    async def start(self) -> None:
        """Tell notifiers which bundle there is; then follow its changes in the background.

        Raises:
            PluginError: a notifier does not want the server to start.
        """
        seen = self._bundle.version
        for name, notifier in self._notifiers:
            try:
                await notifier.notify_and_advise_bundle_loaded(self._bundle.value)
            except SpireHwError as e:
                raise PluginError(f"notifier({name})", e) from e
        for name, notifier in self._notifiers:
            told = notifier.notify_bundle_updated
            self._tasks.start(f"notifier({name})", self._notify(name, told, seen))
        for name, publisher in self._publishers:
            self._tasks.start(f"bundlepublisher({name})", self._publish(name, publisher))

    async def close(self) -> None:
        """Tell nobody any more."""
        await self._tasks.close()

    async def _notify(
        self, name: str, tell: Callable[[Bundle], Awaitable[None]], seen: int
    ) -> None:
        while True:
            bundle, seen = await self._bundle.wait(seen)
            await self._tell("notifier", name, tell, bundle)

    async def _publish(self, name: str, publisher: BundlePublisher) -> None:
        while True:
            bundle, seen = self._bundle.value, self._bundle.version
            await self._tell("bundlepublisher", name, publisher.publish_bundle, bundle)
            await self._changed_or_due(seen)

    async def _changed_or_due(self, seen: int) -> None:
        async with asyncio.TaskGroup() as group:
            waiting = {
                group.create_task(self._clock.sleep(PUBLISH_INTERVAL_S)),
                group.create_task(self._changed(seen)),
            }
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()

    async def _changed(self, seen: int) -> None:
        await self._bundle.wait(seen)

    async def _tell(
        self, kind: str, name: str, tell: Callable[[Bundle], Awaitable[None]], bundle: Bundle
    ) -> None:
        try:
            async with asyncio.timeout(_TOLD_S):
                await tell(bundle)
        except (SpireHwError, TimeoutError) as e:
            self._log.error(
                "Plugin was not told about the trust bundle",
                plugin_name=name,
                plugin_kind=kind,
                error=str(e) or f"no answer within {_TOLD_S:g} s",
            )

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("Telling about the trust bundle broke down", task=name, exc_info=error)

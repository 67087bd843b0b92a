"""Reads the device's log again and again, and keeps it in the audit log.

What is new is on the disk in the audit log before the device is told that it was read. What is
wrong is an alarm: a record, a line in the log, a metric, and trouble that health tells.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import EncodingError, NotReadyError, UnavailableError
from spire_hw_signer.audit.record import Kind, cut
from spire_hw_signer.devicelog.continuity import compare
from spire_hw_signer.devicelog.entries import DeviceLogError
from spire_hw_signer.devicelog.program import run
from spire_hw_signer.devicelog.standing import (
    ALARM,
    MAX_ENTRIES,
    TAKEN,
    Standing,
    fields_of,
    find_standing,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_signer.audit.log import AuditLog
    from spire_hw_signer.devicelog.continuity import News
    from spire_hw_signer.devicelog.entries import Dump, Entry
    from spire_hw_signer.devicelog.settings import DeviceLogSettings

OUTPUT: Final = "output"
CONSUME: Final = "consume"
_SAID_S: Final = 12 * 3600.0
_SOON_S: Final = 1.0
_ALARM: Final = ("alarm",)
_READ: Final = ("device_log",)
_ENTRIES: Final = ("device_log_entries",)


class DeviceLog:
    """The log of the device, as far as it was taken.

    Args:
        settings: how it is read.
        audit: where it is kept; open.
        metrics: counts entries and alarms.
        clock: when it is read again.
        log: where alarms are told.
    """

    def __init__(
        self,
        settings: DeviceLogSettings,
        audit: AuditLog,
        *,
        metrics: Metrics,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._settings = settings
        self._audit = audit
        self._metrics = metrics
        self._clock = clock
        self._log = log
        self._tasks = Tasks(self._failed)
        self._standing = Standing()
        self._said_at: float | None = None
        self._is_sure = True  # what was taken is on the disk
        self._is_filling = False
        self._trouble = "the device's log was not read yet"
        self._told = ""

    @property
    def trouble(self) -> str:
        """Return what is wrong with the device's log, "" while all is well."""
        return self._trouble

    async def check(self) -> None:
        """Make sure that nothing is wrong with it.

        Raises:
            NotReadyError: something is.
        """
        if self._trouble:
            raise NotReadyError(self._trouble)

    async def start(self) -> None:
        """Find out how far the log was taken, and begin to read it.

        Raises:
            NotReadyError: a file of the audit log cannot be read.
        """
        self._standing = await asyncio.to_thread(find_standing, self._audit.directory)
        self._tasks.start("device log", self._run())

    async def close(self) -> None:
        """Stop; a program that runs is killed."""
        await self._tasks.close()

    async def _run(self) -> None:
        while True:
            await self.look()
            pause_s = self._settings.interval_s
            await self._clock.sleep(min(_SOON_S, pause_s) if self._is_filling else pause_s)

    async def look(self) -> None:
        """Read the log once, keep what is new, tell what is wrong."""
        try:
            news = await self._read()
        except DeviceLogError as e:
            self._alarm(e.reason, e.message, again=False)
            self._trouble = e.message
            result = "failed"
        except UnavailableError as e:  # of the audit log, which tells it itself
            self._trouble, result = e.message, "failed"
        else:
            self._trouble = "; ".join(fault.text for fault in news.faults)
            self._told = ""
            result = "fault" if news.faults else "done"
        self._metrics.count(_READ, labels={"result": result})

    async def _read(self) -> News:
        settings = self._settings
        self._is_filling = False
        self._check_audit()
        dump = self._parse(await self._call(settings.read))
        known = self._standing
        news = compare(dump, known.mark, known.unlogged, settings.capacity)
        for fault in news.faults:
            self._alarm(fault.reason, fault.text, again=True)
        await self._keep(news.entries, dump)
        self._is_filling = 2 * len(news.entries) > settings.capacity
        if settings.consume and dump.entries:
            await self._consume(dump.entries[-1].number)
        return news

    async def _call(self, command: Sequence[str]) -> bytes:
        settings = self._settings
        return await run(
            command,
            settings.secret_file,
            timeout_s=settings.timeout_s,
            limit=settings.max_output_bytes,
        )

    def _parse(self, output: bytes) -> Dump:
        try:
            return self._settings.parse(output)
        except EncodingError as e:
            raise DeviceLogError(
                OUTPUT, f"{self._settings.read[0]} printed rubbish: {e.message}"
            ) from e

    async def _keep(self, entries: Sequence[Entry], dump: Dump) -> None:
        """Write entries into the audit log; they are on the disk once this returns.

        Raises:
            UnavailableError: they are not, yet.
        """
        known = self._standing
        parts = [entries[n : n + MAX_ENTRIES] for n in range(0, len(entries), MAX_ENTRIES)]
        if not parts and (self._is_due() or not self._is_sure or dump.unlogged != known.unlogged):
            parts = [()]
        for part in parts:
            mark = part[-1].mark if part else known.mark
            standing = Standing(mark, dump.unlogged, known=True)
            await self._write(part, standing)

    def _is_due(self) -> bool:
        """Tell whether it has to be said how far the log was taken, though there is nothing new."""
        return self._said_at is None or self._clock.monotonic() - self._said_at >= _SAID_S

    async def _write(self, entries: Sequence[Entry], standing: Standing) -> None:
        self._check_audit()
        body = {"event": TAKEN, "fields": fields_of(entries, standing, self._settings.format)}
        # From here on the record has its place in the chain, even if the disk takes it later.
        self._standing, self._is_sure = standing, False
        await self._audit.record(Kind.NOTE, body)
        self._is_sure, self._said_at = True, self._clock.monotonic()
        self._metrics.count(_ENTRIES, by=len(entries))

    def _check_audit(self) -> None:
        if self._audit.trouble:
            raise UnavailableError(f"audit log unavailable: {self._audit.trouble}")

    async def _consume(self, number: int) -> None:
        try:
            await self._call(self._settings.consuming(number))
        except DeviceLogError as e:
            text = f"the device was not told that its log was read: {e.message}"
            raise DeviceLogError(CONSUME, text) from e

    def _alarm(self, reason: str, text: str, *, again: bool) -> None:
        """Tell that something is wrong; what was told just before is not told again unless `again`."""
        self._metrics.count(_ALARM, labels={"reason": f"device_log_{reason}"})
        if not again:
            if text == self._told:
                return
            self._told = text
        self._audit.note(ALARM, {"reason": reason, "error": cut(text)})
        self._log.error("Signer alarm: the device's log", reason=reason, error=text)

    def _failed(self, name: str, error: BaseException) -> None:
        self._trouble = f"the device's log is not read any more: {type(error).__name__}"
        self._log.error("Device log ended", task=name, exc_info=error)

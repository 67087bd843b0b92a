"""What is the calling process: asks all workload attestors at once and merges their selectors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from spire_hw.clock import Clock, SystemClock
from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.logsample import Sampler
from spire_hw.selector import Selector
from spire_hw.telemetry.metrics import NO_METRICS, Timed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.log import Logger
    from spire_hw.plugin.workloadattestor import WorkloadAttestor
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw.transport.peer import CallerProcess

_TIMEOUT_S = 10.0
_ATTESTATION = ("workload_api", "workload_attestation")
_ATTESTOR = ("workload_api", "workload_attestor")
_SELECTORS = ("workload_api", "discovered_selectors")


class Attestors:
    """All configured workload attestors, by name.

    Args:
        log_selectors: note what was found; it may tell about people.
        clock: by which lines that callers cause are counted.
        metrics: takes down how long it took.
    """

    def __init__(
        self,
        attestors: Sequence[tuple[str, WorkloadAttestor]],
        log: Logger,
        *,
        log_selectors: bool = False,
        clock: Clock | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._metrics = metrics
        self._attestors = tuple(attestors)
        self._log = log
        self._log_selectors = log_selectors
        self._lines = Sampler(clock or SystemClock())

    async def attest(self, process: CallerProcess) -> frozenset[Selector]:
        """Return the selectors of a process.

        Raises:
            UnavailableError: every attestor failed.
            SpireHwError: UNAUTHENTICATED, the process ended meanwhile or is not who connected.
        """
        with Timed(self._metrics, _ATTESTATION):
            return await self._attest(process)

    async def _attest(self, process: CallerProcess) -> frozenset[Selector]:
        results = await asyncio.gather(*(self._one(n, a, process) for n, a in self._attestors))
        if not process.alive():
            raise SpireHwError("the calling process has ended", kind=ErrorKind.UNAUTHENTICATED)
        found = [r for r in results if r is not None]
        if not found:
            raise UnavailableError("workload attestation failed")
        selectors = frozenset(s for selectors in found for s in selectors)
        self._metrics.sample(_SELECTORS, len(selectors))
        if self._log_selectors:
            left_out = self._lines.admit((process.uid, selectors))
            if left_out is not None:
                self._log.info(
                    "PID attested to have selectors",
                    pid=process.pid,
                    selectors=[str(s) for s in sorted(selectors)],
                    left_out=left_out,
                )
        return selectors

    async def _one(
        self, name: str, attestor: WorkloadAttestor, process: CallerProcess
    ) -> list[Selector] | None:
        try:
            with Timed(self._metrics, _ATTESTOR, {"attestor": name}):
                async with asyncio.timeout(_TIMEOUT_S):
                    values = await attestor.attest(process)
            return [Selector(type=name, value=value) for value in values]
        except (SpireHwError, TimeoutError) as e:
            if isinstance(e, SpireHwError) and e.kind is ErrorKind.UNAUTHENTICATED:
                raise
            left_out = self._lines.admit((process.uid, name))
            if left_out is not None:
                self._log.error(
                    "Failed to collect all selectors for PID",
                    plugin_name=name,
                    plugin_type="WorkloadAttestor",
                    pid=process.pid,
                    error=str(e) or "timed out",
                    left_out=left_out,
                )
            return None

"""Is this process able to do its work: its checks, and the HTTP probes that answer with them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

from spire_hw.errors import SpireHwError, UnavailableError

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from aiohttp import web

    from spire_hw.clock import Clock
    from spire_hw.config.host import HealthSettings
    from spire_hw.log import Logger

# Raises SpireHwError, whose message tells the operator what is wrong.
Check = Callable[[], Awaitable[None]]

_FIRST_INTERVAL_S: Final = 1.0
_INTERVAL_S: Final = 60.0


_NO_CHECKS: Final[Mapping[str, Check]] = {}


class Health:
    """Runs checks: quick ones whenever somebody asks, costly ones once a minute.

    Args:
        quick: what a process must be able to do to be alive.
        waiting: quick as well, but a restart would not help when they fail.
        costly: what else it must be able to do to be ready.
    """

    def __init__(
        self,
        *,
        quick: Mapping[str, Check] = _NO_CHECKS,
        waiting: Mapping[str, Check] = _NO_CHECKS,
        costly: Mapping[str, Check] = _NO_CHECKS,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._quick = quick
        self._waiting = waiting
        self._costly = costly
        self._clock = clock
        self._log = log
        self._faults: dict[str, str] = dict.fromkeys(costly, "not checked yet")

    async def faults(self) -> dict[str, str]:
        """Return what is wrong by the name of its check; "" where all is well."""
        return {**self._faults, **await self._run({**self._quick, **self._waiting})}

    async def is_healthy(self) -> bool:
        """Tell whether every check holds."""
        return not any((await self.faults()).values())

    async def is_live(self) -> bool:
        """Tell whether the quick checks hold."""
        return not any((await self._run(self._quick)).values())

    async def check_costly(self) -> None:
        """Run the costly checks now."""
        before = self._faults
        self._faults = await self._run(self._costly)
        for name, fault in self._faults.items():
            if fault and fault != before.get(name):
                self._log.warning("health check failed", check=name, error=fault)

    async def run(self) -> None:
        """Run the costly checks again and again; ends only when cancelled."""
        while True:
            await self.check_costly()
            bad = any(self._faults.values())
            await self._clock.sleep(_FIRST_INTERVAL_S if bad else _INTERVAL_S)

    async def _run(self, checks: Mapping[str, Check]) -> dict[str, str]:
        faults = {}
        for name, check in checks.items():
            try:
                await check()
            except SpireHwError as e:
                faults[name] = e.message or "failed"
            else:
                faults[name] = ""
        return faults


class HealthListener:
    """Answers GET on the live and ready paths: 200 or 500 and a JSON object of all checks."""

    def __init__(self, health: Health, where: HealthSettings) -> None:
        self._health = health
        self._where = where
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        """Return the port, the real one once started."""
        addresses = self._runner.addresses if self._runner is not None else ()
        return int(addresses[0][1]) if addresses else self._where.bind_port

    @property
    def address(self) -> str:
        """Return where it listens, for people."""
        return f"{self._where.bind_address}:{self.port}"

    async def start(self) -> None:
        """Listen.

        Raises:
            UnavailableError: the address is taken.
        """
        from aiohttp import web  # noqa: PLC0415 - 9 MiB that processes without probes do not need

        where = self._where
        application = web.Application()
        application.router.add_get(where.live_path, self._live)
        application.router.add_get(where.ready_path, self._ready)
        self._runner = runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, where.bind_address, where.bind_port).start()
        except OSError as e:
            await runner.cleanup()
            raise UnavailableError(
                f"cannot listen for health checks on {self.address}: {e.strerror or e}"
            ) from e

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _live(self, request: web.Request) -> web.Response:
        del request
        return await self._answer(healthy=await self._health.is_live())

    async def _ready(self, request: web.Request) -> web.Response:
        del request
        return await self._answer(healthy=await self._health.is_healthy())

    async def _answer(self, *, healthy: bool) -> web.Response:
        from aiohttp import web  # noqa: PLC0415 - loaded by `start`

        details = {n: {"err": f} if f else {} for n, f in (await self._health.faults()).items()}
        return web.Response(
            status=200 if healthy else 500,
            text=json.dumps(details),
            content_type="application/json",
        )


async def answer_probes(
    health: Health, where: HealthSettings | None, stack: AsyncExitStack
) -> HealthListener | None:
    """Answer probes where the configuration says, None where it says nowhere.

    Raises:
        UnavailableError: the address is taken.
    """
    if where is None:
        return None
    listener = HealthListener(health, where)
    await listener.start()
    stack.push_async_callback(listener.close)
    return listener

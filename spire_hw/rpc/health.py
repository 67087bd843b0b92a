"""The health service, `grpc.health.v1.Health`: is this process able to do its work?

The empty service name is known, others where a program says so. The answer comes from a function of
the program's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw.clock import Clock, SystemClock
from spire_hw.errors import InvalidInputError
from spire_hw.rpc.service import bind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection

    from spire_hw.rpc.service import Call, Method

_WATCH_INTERVAL_S: Final = 5.0


class _Health:
    """The three methods of the service."""

    def __init__(
        self, check: Callable[[], Awaitable[bool]], clock: Clock, names: Collection[str]
    ) -> None:
        self._is_healthy = check
        self._clock = clock
        self._names = names

    async def check(self, request: Any, call: Call) -> Any:
        self._check_name(request.service)
        return await self._answer()

    async def list(self, request: Any, call: Call) -> Any:
        answer = await self._answer()
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._names, answer))

    async def watch(self, request: Any, call: Call) -> AsyncIterator[Any]:
        self._check_name(request.service)
        told = None
        while True:
            answer = await self._answer()
            if answer != told:
                told = answer
                yield answer
            await self._clock.sleep(_WATCH_INTERVAL_S)

    async def _answer(self) -> Any:
        healthy = await self._is_healthy()
        return health_pb2.HealthCheckResponse(status="SERVING" if healthy else "NOT_SERVING")

    def _check_name(self, service: str) -> None:
        if service not in self._names:
            known = ", ".join(f'"{name}"' for name in self._names)
            raise InvalidInputError(f"only the service names {known} are known here")


def health_methods(
    check: Callable[[], Awaitable[bool]],
    clock: Clock | None = None,
    *,
    names: Collection[str] = ("",),
) -> list[Method]:
    """Return the methods of the health service.

    Args:
        check: whether the process can do its work; asked at every call and, for watchers, every
            few seconds.
        clock: how watchers wait.
        names: service names that may be asked for.
    """
    descriptor = health_pb2.DESCRIPTOR.services_by_name["Health"]
    return bind(descriptor, _Health(check, clock or SystemClock(), names))

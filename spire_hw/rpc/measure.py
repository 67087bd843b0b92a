"""Counts and times every call, with upstream's names.

Source: upstream's `middleware.WithMetrics`.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from spire_hw.telemetry.metrics import Timed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spire_hw.rpc.service import Call, Response, StreamNext, UnaryNext
    from spire_hw.telemetry.metrics import Metrics, Name

_SHORT: Final = {
    "SpiffeWorkloadAPI": "WorkloadAPI",
    "envoy.service.secret.v3.SecretDiscoveryService": "SDS.v3",
    "grpc.health.v1.Health": "Health",
    "spire.api.server.logger.v1.Logger": "Logger",
    "spire.api.agent.logger.v1.Logger": "Logger",
    "spire.agent.debug.v1.Debug": "Debug",
    "spire.api.agent.delegatedidentity.v1.DelegatedIdentity": "DelegatedIdentity",
}
_SERVER_PREFIX: Final = "spire.api.server."
_METHOD_WORDS: Final = {"SubscribeToX509SVIDs": "subscribe_to_x509_svids"}


@lru_cache(maxsize=512)
def metric_name(method: str) -> Name:
    """Return the name of a method's metrics; `method` is the path `/service/method`."""
    service, _, name = method.removeprefix("/").rpartition("/")
    service = _SHORT.get(service, service).removeprefix(_SERVER_PREFIX)
    words = (_words(part) for part in service.split("."))
    return ("rpc", *words, _METHOD_WORDS.get(name) or _words(name))


def _words(text: str) -> str:
    """Return PascalCase as snake_case, the way upstream does it."""
    out = ""
    for at, char in enumerate(text):
        if not char.isalnum():
            out += "_"
            continue
        begins = (
            char.isupper()
            and 0 < at < len(text) - 1
            and (text[at + 1].islower() or text[at - 1].islower())
        )
        if begins and not out.endswith("_"):
            out += "_"
        out += char.lower()
    return out


class OpenCalls:
    """An interceptor: how many calls of a service there were and are, as upstream's connections."""

    def __init__(self, metrics: Metrics, name: str, prefix: str) -> None:
        """Count the methods whose path has a prefix under `<name>.connection(s)`."""
        self._metrics = metrics
        self._begun = (name, "connection")
        self._open_now = (name, "connections")
        self._prefix = prefix
        self._open = 0

    async def unary(self, request: Any, call: Call, proceed: UnaryNext) -> Response:
        """Run the call between two changes of the gauge."""
        with self._opened(call):
            return await proceed(request, call)

    async def stream(
        self, request: Any, call: Call, proceed: StreamNext
    ) -> AsyncIterator[Response]:
        """Run the call between two changes of the gauge."""
        with self._opened(call):
            async for response in proceed(request, call):
                yield response

    @contextmanager
    def _opened(self, call: Call) -> Iterator[None]:
        if not call.method.startswith(self._prefix):
            yield
            return
        self._metrics.count(self._begun)
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        self._open += by
        self._metrics.gauge(self._open_now, self._open)


class Measure:
    """An interceptor: how often each method is called, how it ends, how long it takes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def unary(self, request: Any, call: Call, proceed: UnaryNext) -> Response:
        """Run the call and take it down."""
        with Timed(self._metrics, metric_name(call.method)):
            return await proceed(request, call)

    async def stream(
        self, request: Any, call: Call, proceed: StreamNext
    ) -> AsyncIterator[Response]:
        """Run the call and take it down when it ends."""
        with Timed(self._metrics, metric_name(call.method)):
            async for response in proceed(request, call):
                yield response

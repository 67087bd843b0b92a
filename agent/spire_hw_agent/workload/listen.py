"""The agent's public socket: every local user may connect, each caller known by its process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw._pb import workload_pb2
from spire_hw.rpc.health import health_methods
from spire_hw.rpc.interceptors import Guard, Interceptor, RequestId, RequiredHeader
from spire_hw.rpc.measure import Measure, OpenCalls
from spire_hw.rpc.server import RpcLimits, RpcServer
from spire_hw.rpc.service import bind
from spire_hw.telemetry.metrics import NO_METRICS
from spire_hw.transport.unixfront import UnixFront

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_agent.workload.api import WorkloadApi

_SERVICE = workload_pb2.DESCRIPTOR.services_by_name["SpiffeWorkloadAPI"]
_NAME = "workload_api"
_SOCKET_MODE = 0o777
_DIRECTORY_MODE = 0o755
# Any local user may connect: what one connection can hold is small.
_LIMITS = RpcLimits(max_request_bytes=64 << 10, max_streams=64, max_header_bytes=8 << 10)


def workload_server(
    path: Path,
    api: WorkloadApi,
    *,
    is_healthy: Callable[[], Awaitable[bool]],
    log: Logger,
    metrics: Metrics = NO_METRICS,
) -> RpcServer:
    """Build the server of the Workload API socket; it is not started yet.

    Args:
        path: where the socket goes.
        api: the service.
        is_healthy: what the gRPC health service answers.
        log: calls get loggers derived from it.
        metrics: takes the calls down.
    """
    prefix = f"/{_SERVICE.full_name}/"
    measure: list[Interceptor | Guard] = []
    if metrics is not NO_METRICS:
        measure = [Measure(metrics), OpenCalls(metrics, _NAME, prefix)]
    server = RpcServer(
        [*bind(_SERVICE, api), *health_methods(is_healthy)],
        [*measure, RequestId(), RequiredHeader("workload.spiffe.io", "true", prefix)],
        log,
        limits=_LIMITS,
    )
    server.add_front(UnixFront(path, _SOCKET_MODE, directory_mode=_DIRECTORY_MODE, log=log))
    return server

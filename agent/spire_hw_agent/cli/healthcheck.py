"""Is the agent well?"""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw._pb import workload_pb2
from spire_hw.cli.program import healthcheck_command
from spire_hw.errors import SpireHwError
from spire_hw_agent.cli.connect import Workload, workload_flags


def _ask(workload: Workload, request: Any) -> Any:
    return workload.run(
        lambda session: session.channel.unary(
            "/grpc.health.v1.Health/Check",
            request,
            health_pb2.HealthCheckResponse,
            timeout_s=session.timeout_s,
        )
    )


def _why(workload: Workload) -> str:
    """Return what the Workload API tells callers, such as that this node is in quarantine."""
    request, answer_type = workload_pb2.X509BundlesRequest(), workload_pb2.X509BundlesResponse
    try:
        workload.run(lambda session: session.first("FetchX509Bundles", request, answer_type))
    except SpireHwError as e:
        return e.message
    return ""


healthcheck = healthcheck_command("agent", workload_flags, _ask, _why)

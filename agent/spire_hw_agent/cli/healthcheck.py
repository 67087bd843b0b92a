"""Is the agent well?"""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw.cli.program import healthcheck_command
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


healthcheck = healthcheck_command("agent", workload_flags, _ask)

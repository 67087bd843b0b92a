"""Is the signer well?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw.cli.program import healthcheck_command
from spire_hw_signer.cli.connect import admin_flags

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]


def _ask(admin: Admin, request: Any) -> Any:
    return admin.call(_HEALTH, "Check", request)


healthcheck = healthcheck_command("signer", admin_flags, _ask)

"""Structured logs with upstream's key names, as text or JSON."""

from __future__ import annotations

import structlog
from structlog.typing import FilteringBoundLogger

Logger = FilteringBoundLogger


def get_logger(subsystem: str) -> Logger:
    """Return a logger bound to a subsystem name, such as `ca_manager`."""
    logger: Logger = structlog.get_logger(subsystem_name=subsystem)
    return logger

"""What all interoperability tests share: the marker, and upstream's programs or the reason to skip."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark the tests here; what has a deployment in common is not tried again."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.interop)
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "deployment" in callspec.params:
            if "PYTEST_XDIST_WORKER" in os.environ:
                reason = "steps of one deployment need one process: run `make interop`"
                item.add_marker(pytest.mark.skip(reason=reason))
            # A step that was made cannot be made again in the same deployment.
            item.add_marker(pytest.mark.flaky(reruns=0))

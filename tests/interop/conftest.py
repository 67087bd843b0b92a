"""What all interoperability tests share: the marker, and upstream's programs or the reason to skip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark the tests here, and keep those of one deployment in one worker of pytest-xdist."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.interop)
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "deployment" in callspec.params:
            group = f"{item.path.stem}-{callspec.params['deployment']}"
            item.add_marker(pytest.mark.xdist_group(group))
            # A step that was made cannot be made again in the same deployment.
            item.add_marker(pytest.mark.flaky(reruns=0))

"""Throw-away database servers: one that cannot be made says why."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw_sim import databases

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    bool(databases.missing_mariadb()), reason=databases.missing_mariadb()
)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a directory in front of the search path that other users may read."""
    directory = Path(tempfile.mkdtemp(prefix="programs"))
    directory.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/sbin:/usr/bin:/sbin:/bin")
    yield directory
    shutil.rmtree(directory)


def put_installer(programs: Path, failures: int) -> None:
    """Put a mariadb-install-db that fails some times before it does its work."""
    real = shutil.which("mariadb-install-db")
    count = programs / "count"
    count.touch()
    count.chmod(0o666)
    program = programs / "mariadb-install-db"
    program.write_text(
        f"#!/bin/sh\necho x >> {count}\n"
        f'[ "$(wc -l < {count})" -le {failures} ] && {{ echo "no room left" >&2; exit 1; }}\n'
        f'exec {real} "$@"\n'
    )
    program.chmod(0o755)


def test_what_the_installer_wrote_is_told(programs: Path) -> None:
    put_installer(programs, 99)
    with pytest.raises(RuntimeError, match="no room left"), databases.mariadb():
        pass
    assert (programs / "count").read_text().count("x") == 3


def test_an_installer_that_failed_once_is_tried_again(programs: Path) -> None:
    put_installer(programs, 1)
    with databases.mariadb() as target:
        assert target.endswith("/spire")

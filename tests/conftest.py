"""What all tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from spire_hw.log import output
from spire_hw.rpc import engine

if TYPE_CHECKING:
    from collections.abc import Iterator

_READABLE_BYTES = 12

# How fast examples come says something about the machine, not about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a test by its parameter, not by bytes: keys and signatures differ in every process.

    Workers of pytest-xdist have to collect the same names.
    """
    if isinstance(val, bytes | bytearray) and len(val) > _READABLE_BYTES:
        return argname
    return None


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Undo what a command that ran in this process did to the log's level."""
    yield
    output().reset_level()


@pytest.fixture(params=[engine.H2, engine.GRPCIO])
def rpc_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each RPC engine and return its name."""
    name: str = request.param
    monkeypatch.setenv(engine.VARIABLE, name)
    return name


@pytest.fixture
def grpcio_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the engine that needs private sockets."""
    monkeypatch.setenv(engine.VARIABLE, engine.GRPCIO)

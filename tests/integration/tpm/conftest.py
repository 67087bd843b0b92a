"""TPMs for the tests: one is made per run, each test gets a copy of its state and a process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_sim.clock import SimClock
from spire_hw_sim.manufacturer import Manufacturer
from spire_hw_sim.swtpm import Swtpm, is_available
from tests.integration.tpm.parties import Bench

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Factory:
    """A manufacturer, two TPMs that left its factory and one that nobody touched."""

    manufacturer: Manufacturer
    first: Swtpm
    second: Swtpm
    bare: Swtpm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.tpm)
            if not is_available():
                item.add_marker(pytest.mark.skip(reason="swtpm or swtpm_setup is not installed"))


@pytest.fixture(scope="session")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    manufacturer = Manufacturer()
    first, second = (
        Swtpm(tmp_path_factory.mktemp(name), banks=("sha256", "sha384"))
        for name in ("first", "second")
    )
    for tpm in (first, second):
        with tpm:
            manufacturer.equip(tpm, padding=7)
    bare = Swtpm(tmp_path_factory.mktemp("bare"), persistent_ek=False)
    return Factory(manufacturer, first, second, bare)


def _copy(source: Swtpm, state_dir: Path) -> Iterator[Swtpm]:
    with Swtpm(state_dir, clone_of=source) as tpm:
        for pcr in range(8):
            tpm.extend_pcr(pcr, b"firmware", banks=("sha256", "sha384"))
        yield tpm


@pytest.fixture
def tpm(factory: Factory, tmp_path: Path) -> Iterator[Swtpm]:
    yield from _copy(factory.first, tmp_path / "tpm")


@pytest.fixture
def other_tpm(factory: Factory, tmp_path: Path) -> Iterator[Swtpm]:
    yield from _copy(factory.second, tmp_path / "other-tpm")


@pytest.fixture
def bare_tpm(factory: Factory, tmp_path: Path) -> Iterator[Swtpm]:
    """Give a TPM without certificates and without persistent keys."""
    with Swtpm(tmp_path / "bare", clone_of=factory.bare) as tpm:
        yield tpm


@pytest.fixture
def agent_host(tmp_path: Path) -> HostInfo:
    return _host(Side.AGENT, tmp_path)


@pytest.fixture
def server_host(tmp_path: Path) -> HostInfo:
    return _host(Side.SERVER, tmp_path)


def _host(side: Side, data_dir: Path) -> HostInfo:
    return HostInfo(
        side, TrustDomain.parse("example.org"), data_dir, get_logger("test"), SimClock()
    )


@pytest.fixture
def bench(factory: Factory, agent_host: HostInfo, server_host: HostInfo, tmp_path: Path) -> Bench:
    return Bench(factory, agent_host, server_host, tmp_path)

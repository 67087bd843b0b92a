"""One running trust domain for all tests of this folder: server, token, node with TPM, workload."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw_sim.site import Site, find_faketime
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import is_available

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw_sim.site import Node


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            for marker in (pytest.mark.tpm, pytest.mark.hsm, pytest.mark.slow):
                item.add_marker(marker)
            if not is_available() or SoftHsm.find_module() is None:
                item.add_marker(pytest.mark.skip(reason="swtpm or SoftHSM is not installed"))


class Town:
    """The shared trust domain; `up` repairs what the test before has left."""

    def __init__(self, site: Site) -> None:
        self.site = site
        site.start_server()
        site.wait_ready()
        self.node: Node = site.node("n")
        self.node.start()
        self.node.wait_in_use()
        site.register(self.node)

    def up(self) -> None:
        """Start what does not run."""
        if not self.site.server.is_running:
            self.site.start_server()
            self.site.wait_ready()
        if not self.node.tpm.is_running:
            self.node.tpm.start()
            self.site.boot(self.node.tpm)
        if not self.node.agent.is_running:
            self.node.start()
            self.node.wait_in_use()


@pytest.fixture(scope="session")
def shared_town() -> Iterator[Town]:
    with Site() as site:
        yield Town(site)


@pytest.fixture
def town(shared_town: Town) -> Town:
    """Return the shared trust domain, everything running."""
    shared_town.up()
    return shared_town


@pytest.fixture
def site(town: Town) -> Site:
    """Return the site of the shared trust domain."""
    return town.site


@pytest.fixture
def node(town: Town) -> Node:
    """Return the node of the shared trust domain."""
    return town.node


@pytest.fixture
def new_site() -> Iterator[Site]:
    """Return a site of the test's own; nothing runs."""
    with Site() as made:
        yield made


@pytest.fixture
def clock_site() -> Iterator[Site]:
    """Return a site of the test's own whose clock can be shifted."""
    library = find_faketime()
    if library is None:
        pytest.skip("libfaketime is not installed")
    with Site() as made:
        made.use_shifted_clock(library)
        yield made

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import DeniedError, UnavailableError
from spire_hw.x509.certificate import load_certificate
from spire_hw_sim.fleet.fleet import local_address
from spire_hw_sim.fleet.keys import FleetKeys
from spire_hw_sim.fleet.tally import Tally, quantile, reason_of

if TYPE_CHECKING:
    from pathlib import Path


def test_the_same_directory_is_the_same_fleet(tmp_path: Path) -> None:
    first, again = FleetKeys(tmp_path / "a"), FleetKeys(tmp_path / "a")
    other = FleetKeys(tmp_path / "b")
    assert first.node(3).ek_hash == again.node(3).ek_hash
    assert first.node(3).tpm.ak.public == again.node(3).tpm.ak.public
    assert first.node(3).spki == again.node(3).spki
    assert len({f.node(n).ek_hash for f in (first, other) for n in (3, 4)}) == 4
    assert (tmp_path / "a" / "fleet.seed").stat().st_mode & 0o777 == 0o600


def test_certificates_of_a_later_run_chain_to_the_root_of_the_first(tmp_path: Path) -> None:
    root = load_certificate(FleetKeys(tmp_path).roots.read_bytes())
    machine = FleetKeys(tmp_path).node(0)
    (intermediate,) = map(load_certificate, machine.chain)
    intermediate.verify_directly_issued_by(root)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0), ([7], 0.99, 7), ([3, 1, 2], 0.5, 2), (range(1, 101), 0.99, 99)],
)
def test_quantiles_are_values_that_occurred(
    values: list[float], share: float, expected: float
) -> None:
    assert quantile(values, share) == expected


def test_failures_are_counted_by_reason() -> None:
    tally = Tally("attestations")
    tally.failed(DeniedError("policy: PCR 4 is not allowed [pcr_mismatch]"))
    tally.failed(DeniedError("policy: PCR 7 is not allowed [pcr_mismatch]"))
    tally.failed(UnavailableError("away"))
    assert tally.summary()["failures"] == {"pcr_mismatch": 2, "unavailable": 1}
    assert "  pcr_mismatch: 2" in list(tally.lines())
    assert reason_of(UnavailableError("away")) == "unavailable"


def test_nodes_of_a_server_on_this_machine_call_from_addresses_of_their_own() -> None:
    assert len({local_address("127.0.0.1", n) for n in range(2000)}) == 2000
    assert local_address("127.0.0.1", 0) == "127.1.0.1"
    assert local_address("192.0.2.1", 0) == ""
    assert local_address("spire.example.org", 0) == ""

"""Who has keys on a token and whose may be cleared away; row 72 of the fault list."""

from __future__ import annotations

from typing import Any

import pytest

from spire_hw.errors import NotReadyError
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.pkcs11.inventory.manifest import Manifest
from spire_hw.pkcs11.inventory.tenants import Tenancy, Tenant, read_tenancy
from spire_hw.pkcs11.wire import pack_bytes

NOW = 1_800_000_000.0
DAY = 86400.0
OWN = Owner("example.org", "server-1")
DEAD = Owner("example.org", "server-2")
FOREIGN = Owner("example.com", "server-2")


def half(label: str, cka_id: bytes) -> dict[str, Any]:
    return {"label": label, "id": pack_bytes(cka_id), "private": True}


def manifest(owner: Owner, time: float) -> dict[str, Any]:
    value = Manifest(owner, "nonce", {}, time).encode()
    return {"label": owner.manifest_label, "value": pack_bytes(value)}


def tenancy_of(*data: dict[str, Any], halves: tuple[dict[str, Any], ...] = ()) -> Tenancy:
    return read_tenancy({"halves": list(halves), "data": list(data)}, OWN)


def test_a_listing_is_sorted_by_owner() -> None:
    keys = [half(DEAD.key_label("a", n), bytes([n])) for n in (1, 2)]
    found = tenancy_of(
        manifest(DEAD, NOW - 30 * DAY),
        manifest(OWN, NOW),
        {"label": "something else", "value": ""},
        halves=(*keys, keys[0], half("payroll", b"9"), half("", b"9"), half("x", b"")),
    )
    own, dead = found.tenants
    assert own == Tenant(OWN.prefix, OWN, True, NOW, ())
    assert dead.owner == DEAD
    assert [label for _, label in dead.pairs] == [DEAD.key_label("a", 1), DEAD.key_label("a", 2)]
    assert (found.foreign, found.nameless) == (1, 2)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (manifest(OWN, NOW - 90 * DAY), "this server"),
        (manifest(FOREIGN, NOW - 90 * DAY), "another trust domain"),
        (manifest(DEAD, 0.0), "does not say"),
        (manifest(DEAD, NOW - 13 * DAY), "too recently"),
        (manifest(DEAD, NOW + DAY), "too recently"),
        ({"label": DEAD.manifest_label, "value": pack_bytes(b"{")}, "no manifest"),
        ({"label": DEAD.manifest_label, "value": manifest(OWN, 1.0)["value"]}, "no manifest"),
        ({"label": DEAD.manifest_label, "value": pack_bytes(b'{"time": NaN}')}, "no manifest"),
    ],
)
def test_what_is_kept(data: dict[str, Any], why: str) -> None:
    found = tenancy_of(data)
    assert why in found.tenants[0].why_kept(OWN, NOW, 14 * DAY)


def test_what_may_go() -> None:
    found = tenancy_of(manifest(DEAD, NOW - 15 * DAY))
    assert found.tenants[0].why_kept(OWN, NOW, 14 * DAY) == ""


def test_two_manifests_that_disagree_are_none() -> None:
    liar = {"label": DEAD.manifest_label, "value": manifest(FOREIGN, NOW)["value"]}
    found = tenancy_of(manifest(DEAD, NOW - 90 * DAY), liar)
    (dead,) = found.tenants
    # One of them belongs to another prefix; the newer time counts all the same.
    assert dead.owner == DEAD
    assert dead.why_kept(OWN, NOW, 14 * DAY) == "seen too recently"


@pytest.mark.parametrize("off", [30 * DAY, 3700.0, -3700.0])
def test_fault_72_a_clock_that_jumped_is_not_believed(off: float) -> None:
    found = tenancy_of(manifest(OWN, NOW), manifest(DEAD, NOW - 90 * DAY))
    with pytest.raises(NotReadyError, match="nothing is destroyed"):
        found.check_clock(NOW + off)
    found.check_clock(NOW + 3500.0)
    with pytest.raises(NotReadyError, match="nobody has marked"):
        tenancy_of(manifest(OWN, 0.0)).check_clock(NOW)

from __future__ import annotations

import pytest

from spire_hw.errors import InvalidInputError
from spire_hw.pkcs11.inventory.labels import MAX_GENERATION, KeyLabel, Owner, key_name

OWNER = Owner("example.org", "server-1")


@pytest.mark.parametrize(
    "key_id", ["x509-CA-A", "JWT-Signer-A", "bundle-acme-example.org+rsa", "é"]
)
def test_labels_fit_the_shortest_field_and_come_back(key_id: str) -> None:
    label = OWNER.key_label(key_id, 71)
    assert len(label) <= 37
    assert OWNER.parse(label) == KeyLabel(key_name(key_id), 71)


def test_long_ids_are_hashed_and_short_ones_are_readable() -> None:
    assert key_name("x509-CA-A") == "x509-CA-A"
    assert key_name("JWT-Signer-AB") != key_name("JWT-Signer-AC")
    assert key_name("JWT-Signer-AB").startswith("~")


@pytest.mark.parametrize(
    "label",
    [
        "",
        "key",
        "sh1:x:y:z:000001",
        "{p}manifest",
        "{p}a:1",
        "{p}a:00000A",
        "{p}:000001",
        "{p}a:000001\n",
    ],
)
def test_foreign_labels_are_not_ours(label: str) -> None:
    assert OWNER.parse(label.replace("{p}", OWNER.prefix)) is None


def test_another_server_or_trust_domain_has_another_prefix() -> None:
    prefixes = {Owner(td, s).prefix for td in ("a.org", "b.org") for s in ("s1", "s2")}
    assert len(prefixes) == 4


@pytest.mark.parametrize("generation", [0, -1, MAX_GENERATION + 1])
def test_generations_out_of_range_are_refused(generation: int) -> None:
    with pytest.raises(InvalidInputError):
        OWNER.key_label("a", generation)

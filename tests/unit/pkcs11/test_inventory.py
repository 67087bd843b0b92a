from __future__ import annotations

from typing import Any

import pytest

from spire_hw.errors import ErrorKind
from spire_hw.key import KeyType
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.evidence import check_evidence
from spire_hw.pkcs11.inventory.inventory import read_listing
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.pkcs11.inventory.manifest import Manifest
from spire_hw.pkcs11.keys import CKM_EC_KEY_PAIR_GEN
from spire_hw.pkcs11.profile import PROFILES
from spire_hw.pkcs11.wire import pack_bytes

OWNER = Owner("example.org", "s1")
GOOD: dict[str, bool | int | None] = {
    "LOCAL": True,
    "KEY_GEN_MECHANISM": CKM_EC_KEY_PAIR_GEN,
    "TOKEN": True,
    "SENSITIVE": True,
    "ALWAYS_SENSITIVE": True,
    "EXTRACTABLE": False,
    "NEVER_EXTRACTABLE": True,
    "SIGN": True,
    "DECRYPT": False,
}


def half(cka_id: bytes, generation: int, *, private: bool, key_id: str = "a") -> dict[str, Any]:
    return {
        "id": pack_bytes(cka_id),
        "label": OWNER.key_label(key_id, generation),
        "private": private,
        "material": None if private else {"kind": 3, "params": "", "point": pack_bytes(b"x")},
        "evidence": dict(GOOD),
    }


def pair(cka_id: bytes, generation: int, key_id: str = "a") -> list[dict[str, Any]]:
    return [half(cka_id, generation, private=p, key_id=key_id) for p in (True, False)]


def test_fault_30_the_highest_complete_generation_is_current() -> None:
    found = read_listing(OWNER, {"halves": pair(b"1", 1) + pair(b"2", 2), "data": []})
    assert found.current["a"].cka_id == b"2"
    assert [p.cka_id for p in found.retired] == [b"1"]
    assert found.top == {"a": 2}


@pytest.mark.parametrize("private", [True, False])
def test_faults_27_28_61_a_half_does_not_hide_the_complete_pair(*, private: bool) -> None:
    halves = [*pair(b"1", 1), half(b"2", 2, private=private)]
    found = read_listing(OWNER, {"halves": halves, "data": []})
    assert found.current["a"].cka_id == b"1"
    assert [p.cka_id for p in found.halves] == [b"2"]
    assert found.top == {"a": 2}


def test_fault_28_a_lone_private_half_counts_when_its_public_key_is_known() -> None:
    halves = [half(b"2", 2, private=True)]
    assert read_listing(OWNER, {"halves": halves, "data": []}).current == {}
    known = read_listing(OWNER, {"halves": halves, "data": []}, {"a": b"2"})
    assert known.current["a"].cka_id == b"2"


def test_fault_31_two_pairs_with_one_generation_are_not_chosen_from() -> None:
    with pytest.raises(TokenError, match="will not choose") as caught:
        read_listing(OWNER, {"halves": pair(b"1", 1) + pair(b"2", 1), "data": []})
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert b"1".hex() in caught.value.message
    twice = pair(b"1", 1) + pair(b"1", 1)
    with pytest.raises(TokenError):
        read_listing(OWNER, {"halves": twice, "data": []})


def test_fault_39_a_manifest_of_another_server_is_a_collision() -> None:
    value = Manifest(Owner("other.org", "s9"), "n", {}).encode()
    data = [{"label": OWNER.manifest_label, "value": pack_bytes(value)}]
    with pytest.raises(TokenError, match="choose another server id"):
        read_listing(OWNER, {"halves": [], "data": data})


def test_two_manifests_after_a_crash_add_up_and_belong_to_nobody() -> None:
    data = [
        {
            "label": OWNER.manifest_label,
            "value": pack_bytes(Manifest(OWNER, nonce, {key: key}).encode()),
        }
        for nonce, key in (("1", "a"), ("2", "b"))
    ]
    manifest = read_listing(OWNER, {"halves": [], "data": data}).manifest
    assert manifest == Manifest(OWNER, "", {"a": "a", "b": "b"}, before=("1", "2"))


def test_of_two_manifests_the_newest_tells_whose_the_keys_are() -> None:
    one = Manifest(OWNER, "1", {"a": "a"}, 20.0, before=("0",))
    two = Manifest(OWNER, "2", {"b": "b"}, 10.0, before=("1",))
    data = [
        {"label": OWNER.manifest_label, "value": pack_bytes(manifest.encode())}
        for manifest in (one, two)
    ]
    manifest = read_listing(OWNER, {"halves": [], "data": data}).manifest
    assert manifest == Manifest(OWNER, "1", {"a": "a", "b": "b"}, 20.0, before=("0", "2"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOCAL", False),
        ("SENSITIVE", False),
        ("ALWAYS_SENSITIVE", False),
        ("EXTRACTABLE", True),
        ("NEVER_EXTRACTABLE", False),
        ("NEVER_EXTRACTABLE", None),
        ("KEY_GEN_MECHANISM", None),
        ("KEY_GEN_MECHANISM", 0),
        ("TOKEN", False),
        ("SIGN", False),
        ("SIGN", None),
        ("DECRYPT", True),
    ],
)
def test_faults_33_34_a_key_that_is_not_proven_is_refused(name: str, value: bool | None) -> None:
    check_evidence("key", GOOD, KeyType.EC_P256, PROFILES["generic"])
    with pytest.raises(TokenError, match=name) as caught:
        check_evidence("key", {**GOOD, name: value}, KeyType.EC_P256, PROFILES["generic"])
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION

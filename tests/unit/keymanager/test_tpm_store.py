from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import InvalidInputError, NotFoundError, NotReadyError
from spire_hw.key import KeyType
from spire_hw.tpm import wire
from spire_hw.tpm.keys import KeyBlob
from spire_hw_plugins.keymanager.tpm_store import (
    MAX_REPLACED,
    KeyFile,
    StoredKey,
    TpmKeyStore,
    decode,
    encode,
    file_name,
)

if TYPE_CHECKING:
    from pathlib import Path


def blob() -> KeyBlob:
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    public = bytes.fromhex("0023000b00040472000000100010000300100020") + numbers.x.to_bytes(
        32, "big"
    )
    public += b"\x00\x20" + numbers.y.to_bytes(32, "big")
    return KeyBlob.parse(wire.sized(public), wire.sized(b"wrapped"))


def stored(key_id: str, serial: int = 1, generation: int = 1) -> StoredKey:
    storage_name = b"\x00\x0b" + bytes(32)
    made = "2026-01-01T00:00:00+00:00"
    return StoredKey(key_id, serial, blob(), storage_name, made, generation)


def alone(key_id: str, serial: int = 1) -> KeyFile:
    return KeyFile(stored(key_id, serial))


def test_keys_come_back_oldest_first(tmp_path: Path) -> None:
    store = TpmKeyStore(tmp_path / "keys")
    keys = [alone(key_id, serial) for serial, key_id in enumerate(["b", "a", "ü/..", "x" * 300])]
    for key in reversed(keys):
        store.put(key)
    assert store.load() == (keys, [])
    assert {key.current.key_type for key in keys} == {KeyType.EC_P256}


def test_a_replaced_key_has_one_file(tmp_path: Path) -> None:
    store = TpmKeyStore(tmp_path)
    store.put(alone("a"))
    second = alone("a", 2)
    store.put(second)
    assert store.load() == ([second], [])
    assert [p.name for p in tmp_path.iterdir()] == ["a.tpmkey"]


def test_what_is_kept_stands_in_the_file_of_its_successor(tmp_path: Path) -> None:
    store = TpmKeyStore(tmp_path)
    file = alone("a")
    for number in range(2, MAX_REPLACED + 2):
        file = file.followed(stored("a", number, number), float(number))
    assert len(file.replaced) == MAX_REPLACED
    store.put(file)
    assert store.load() == ([file], [])
    assert [p.name for p in tmp_path.iterdir()] == ["a.tpmkey"]
    # What was taken back is kept no more, what it took the place of is, and no number is used twice.
    back = file.followed(file.find(3).key, 1e9)
    assert (back.current.generation, back.made) == (3, MAX_REPLACED + 1)
    assert back.replaced[-1].key == file.current
    with pytest.raises(NotFoundError, match=r"generation 3 .* is not retained"):
        back.find(3)
    assert {r.key.generation for r in back.without({1, 2}).replaced}.isdisjoint({1, 2})


def test_a_file_of_before_numbers_were_kept_is_the_first() -> None:
    document = json.loads(encode(alone("a", 7)))
    del document["generation"], document["made"]
    file = decode(json.dumps(document).encode())
    assert (file.current.serial, file.current.generation, file.made) == (7, 1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 2},
        {"generation": 0},
        {"generation": 9},
        {"made": 0},
        {"made": None},
        {"replaced": 3},
        {"replaced": [3]},
        {"replaced": "x"},
        {"replaced": {"a": 1}},
        {"key_id": "b"},
        {"since": float("nan")},
        {"since": "x"},
        {"times": MAX_REPLACED + 1},
    ],
)
def test_keys_that_do_not_fit_together_are_refused(change: dict[str, Any]) -> None:
    document = json.loads(encode(alone("a").followed(stored("a", 2, 2), 5.0)))
    kept = document["replaced"][0]
    for name, value in change.items():
        if name in {"since", "key_id"}:
            kept[name] = value
        elif name == "times":
            document["replaced"] = [{**kept, "generation": n + 3} for n in range(value)]
            document["made"] = value + 3
        else:
            document[name] = value
    if change == {"generation": 2}:
        kept["generation"] = 2
    with pytest.raises(InvalidInputError):
        decode(json.dumps(document).encode())


def test_a_draft_of_a_crash_is_passed_over_and_replaced(tmp_path: Path) -> None:
    store = TpmKeyStore(tmp_path)
    first = alone("a")
    store.put(first)
    (tmp_path / ".a.tpmkey.new").write_bytes(b"half")
    assert store.load() == ([first], [])
    second = alone("a", 2)
    store.put(second)
    assert store.load() == ([second], [])


def test_a_draft_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    store = TpmKeyStore(tmp_path / "keys")
    (tmp_path / "victim").write_bytes(b"untouched")
    (tmp_path / "keys" / ".a.tpmkey.new").symlink_to(tmp_path / "victim")
    store.put(alone("a"))
    assert (tmp_path / "victim").read_bytes() == b"untouched"


def test_a_file_in_place_of_the_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"")
    with pytest.raises(NotReadyError, match="key directory"):
        TpmKeyStore(tmp_path / "keys")


CHANGES: dict[str, Any] = {
    "version": 2,
    "key_id": "",
    "serial": "x",
    "storage_name": "zz",
    "public": "AAAA",
    "private": "!",
    "created_at": None,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("missing", [False, True])
def test_a_wrong_or_missing_field_is_refused(name: str, missing: bool) -> None:
    document = json.loads(encode(alone("a")))
    if missing:
        del document[name]
    else:
        document[name] = CHANGES[name]
    with pytest.raises(InvalidInputError):
        decode(json.dumps(document).encode())


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_content_is_read_or_refused(content: bytes) -> None:
    with pytest.raises(InvalidInputError):
        decode(content)


@given(st.text(min_size=1, max_size=300))
def test_every_id_has_a_file_name_of_its_own_in_the_directory(key_id: str) -> None:
    name = file_name(key_id)
    assert "/" not in name
    assert len(name.encode()) <= 255
    assert name != file_name(key_id + "x")

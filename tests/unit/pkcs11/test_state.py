"""The host's note on disk: everything in it comes back, what is damaged is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import ErrorKind, InvalidInputError
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.choice import Choice
from spire_hw.pkcs11.inventory.inventory import Inventory
from spire_hw.pkcs11.inventory.labels import Owner, key_name
from spire_hw.pkcs11.inventory.manifest import Manifest
from spire_hw.pkcs11.keyring.ledger import Ledger
from spire_hw.pkcs11.keyring.state import Existing, NotedKey, Retained, State, StateFile

if TYPE_CHECKING:
    from pathlib import Path

OWNER = Owner("example.org", "server-1")
KNOWN = NotedKey(7, b"\0\1", b"spki")
STATE = State(
    OWNER,
    "spire",
    "1234",
    keys={"a": KNOWN},
    halves={"00ff": 1.5},
    retained={"0002": Retained("a", NotedKey(3, b"\0\2", b"older"), 1000.25)},
    choices={"a": Choice(3, 7, 2)},
    existing={"b": Existing("pkcs11:object=b", b"its key")},
)


def test_what_is_noted_comes_back(tmp_path: Path) -> None:
    file = StateFile(tmp_path, OWNER)
    assert file.load() == State(OWNER)
    file.save(STATE)
    assert file.load() == STATE
    assert file.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"keys": {"a": {}}},
        {"retained": [{"key_id": "a"}]},
        {"retained": 7},
        {"choices": {"a": {"generation": "x", "over": 1, "revision": 1}}},
        {"choices": []},
        {"existing": {"b": {"selector": "s", "public_key": "?"}}},
    ],
)
def test_a_damaged_note_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    file = StateFile(tmp_path, OWNER)
    file.save(STATE)
    fields = json.loads(file.path.read_text())
    file.path.write_text(json.dumps({**fields, **change}))
    with pytest.raises(TokenError, match="does not decode") as caught:
        file.load()
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION


def test_a_note_of_somebody_else_is_refused(tmp_path: Path) -> None:
    file = StateFile(tmp_path, OWNER)
    file.save(STATE)
    fields = json.loads(file.path.read_text())
    file.path.write_text(json.dumps({**fields, "server": "server-2"}))
    with pytest.raises(TokenError, match='belongs to server "server-2"'):
        file.load()


def test_key_ids_that_look_alike_in_labels_are_refused(tmp_path: Path) -> None:
    ledger = Ledger(OWNER, StateFile(tmp_path, OWNER))
    taken = Manifest(OWNER, "nonce", {key_name("a rather long key id"): "another long key id"})
    inventory = Inventory({}, (), (), taken, {})
    with pytest.raises(InvalidInputError, match="cannot be told from"):
        ledger.check_name("a rather long key id", inventory)
    ledger.check_name("yet another long key id", inventory)
    ledger.check_name("x509-CA-A", inventory)

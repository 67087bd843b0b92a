"""The host's own note of which keys it had on which token.

A token that went away lists nothing, without any error; without this note that would read as "no
keys yet" and a server would make itself a new CA. No secret is in it.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import ErrorKind
from spire_hw.files import NotWrittenError, replace_file
from spire_hw.key import spki_der
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.inventory.choice import Choice
from spire_hw.pkcs11.inventory.labels import Owner

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.pkcs11.inventory.entry import Entry

_MAX_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class NotedKey:
    """A key on note: as it was when it was last seen.

    Attributes:
        generation: its generation.
        cka_id: its CKA_ID.
        spki: its DER SubjectPublicKeyInfo.
    """

    generation: int
    cka_id: bytes
    spki: bytes

    @classmethod
    def of(cls, entry: Entry) -> NotedKey:
        """Return what is noted of a key."""
        return cls(entry.generation, entry.cka_id, spki_der(entry.public_key))


@dataclass(frozen=True, slots=True)
class Retained:
    """A replaced generation that is kept for a while.

    Attributes:
        key_id: whose generation.
        known: the key.
        since: when it was replaced, Unix seconds.
    """

    key_id: str
    known: NotedKey
    since: float


@dataclass(frozen=True, slots=True)
class Existing:
    """A key made elsewhere that was taken into use.

    Attributes:
        selector: how the configuration names it.
        spki: its DER SubjectPublicKeyInfo.
    """

    selector: str
    spki: bytes


@dataclass(frozen=True, slots=True)
class State:
    """What the note holds.

    Attributes:
        owner: whose keys.
        token_label: label of the token.
        token_serial: serial number of the token; empty before the first key.
        keys: by key id, oldest first.
        halves: CKA_ID in hex of halves of pairs, to when they were first seen (Unix seconds).
        retained: CKA_ID in hex of replaced generations that are kept.
        choices: key ids of which an older generation was taken back.
        existing: by key id, keys made elsewhere.
    """

    owner: Owner
    token_label: str = ""
    token_serial: str = ""
    keys: dict[str, NotedKey] = field(default_factory=dict)
    halves: dict[str, float] = field(default_factory=dict)
    retained: dict[str, Retained] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    existing: dict[str, Existing] = field(default_factory=dict)

    def with_entry(self, entry: Entry) -> State:
        """Return the state with one key added or replaced, as the newest.

        A choice that this generation is beyond is forgotten, as is that it was kept.
        """
        keys = {key_id: known for key_id, known in self.keys.items() if key_id != entry.key_id}
        keys[entry.key_id] = NotedKey.of(entry)
        choices = {
            key_id: choice
            for key_id, choice in self.choices.items()
            if key_id != entry.key_id or choice.holds(entry.generation)
        }
        retained = {i: kept for i, kept in self.retained.items() if i != entry.cka_id.hex()}
        return replace(self, keys=keys, choices=choices, retained=retained)

    def without(self, key_id: str) -> State:
        """Return the state without a key and without choices about it."""
        keys = {k: known for k, known in self.keys.items() if k != key_id}
        choices = {k: choice for k, choice in self.choices.items() if k != key_id}
        return replace(self, keys=keys, choices=choices)

    def retaining(self, entry: Entry, since: float) -> State:
        """Return the state with a replaced generation that is kept from now on."""
        kept = Retained(entry.key_id, NotedKey.of(entry), since)
        return replace(self, retained={**self.retained, entry.cka_id.hex(): kept})


class StateFile:
    """Where the note is kept: one JSON file, replaced atomically."""

    def __init__(self, directory: Path, owner: Owner) -> None:
        self._owner = owner
        name = owner.prefix.strip(":").replace(":", "-")
        self.path = directory / f"pkcs11-{name}.json"

    @property
    def owner(self) -> Owner:
        """Return whose keys it tells of."""
        return self._owner

    def load(self) -> State:
        """Return the note; an empty one when there is no file.

        Raises:
            TokenError: FAILED_PRECONDITION, the file cannot be read or is not ours.
        """
        try:
            with self.path.open("rb") as file:
                content = file.read(_MAX_BYTES)
        except FileNotFoundError:
            return State(self._owner)
        except OSError as e:
            raise self._unusable(e.strerror or "cannot be read") from e
        try:
            state = _parse(json.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError):
            raise self._unusable("does not decode") from None
        if state.owner != self._owner:
            raise self._unusable(f'belongs to server "{state.owner.server}"')
        return state

    def save(self, state: State) -> None:
        """Write the note and make it durable.

        Raises:
            TokenError: INTERNAL, it cannot be written; the old one is intact.
        """
        try:
            replace_file(self.path, _encode(state), "key manifest")
        except NotWrittenError as e:
            raise TokenError(
                e.message,
                reason="hsm.state_write",
                operation="write manifest",
            ) from e

    def _unusable(self, reason: str) -> TokenError:
        return TokenError(
            f"key manifest {self.path} {reason}; bring a copy back, or move it away to go by what "
            "the token shows",
            reason="hsm.state_read",
            operation="read manifest",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )


def _encode(state: State) -> bytes:
    fields = {
        "version": 1,
        "trust_domain": state.owner.trust_domain,
        "server": state.owner.server,
        "token": {"label": state.token_label, "serial": state.token_serial},
        "keys": {key_id: _key_fields(known) for key_id, known in state.keys.items()},
        "halves": state.halves,
        "retained": [
            {"key_id": kept.key_id, "since": kept.since, **_key_fields(kept.known)}
            for kept in state.retained.values()
        ],
        "choices": {key_id: choice.fields() for key_id, choice in state.choices.items()},
        "existing": {
            key_id: {"selector": key.selector, "public_key": _base64(key.spki)}
            for key_id, key in state.existing.items()
        },
    }
    return json.dumps(fields, indent="\t").encode("utf-8")


def _key_fields(known: NotedKey) -> dict[str, Any]:
    return {
        "generation": known.generation,
        "cka_id": known.cka_id.hex(),
        "public_key": _base64(known.spki),
    }


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _parse(fields: Any) -> State:
    if fields["version"] != 1:
        raise ValueError("unknown version")
    retained = [
        Retained(str(kept["key_id"]), _known(kept), float(kept["since"]))
        for kept in fields.get("retained", ())
    ]
    return State(
        owner=Owner(str(fields["trust_domain"]), str(fields["server"])),
        token_label=str(fields["token"]["label"]),
        token_serial=str(fields["token"]["serial"]),
        keys={str(key_id): _known(known) for key_id, known in fields["keys"].items()},
        halves={str(cka_id): float(seen) for cka_id, seen in fields["halves"].items()},
        retained={kept.known.cka_id.hex(): kept for kept in retained},
        choices={
            str(key_id): Choice.of_fields(choice)
            for key_id, choice in fields.get("choices", {}).items()
        },
        existing={
            str(key_id): Existing(
                str(key["selector"]), base64.b64decode(key["public_key"], validate=True)
            )
            for key_id, key in fields.get("existing", {}).items()
        },
    )


def _known(fields: Any) -> NotedKey:
    return NotedKey(
        int(fields["generation"]),
        bytes.fromhex(fields["cka_id"]),
        base64.b64decode(fields["public_key"], validate=True),
    )

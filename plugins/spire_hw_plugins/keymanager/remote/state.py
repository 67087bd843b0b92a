"""The server's own note of its keys at signers, and of the logs it has witnessed.

Without it a signer that was taken over could hand out other keys, or none, and the server would make
itself a new CA. No secret is in it.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError
from spire_hw.files import NoFileError, NotWrittenError, read_bounded, replace_file
from spire_hw.key import KeyType, parse_spki
from spire_hw_plugins.keymanager.remote.witness import LogHead

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.plugin.keymanager import KeyInfo

FILE_NAME: Final = "remote-signer.json"
REQUEST_ID_BYTES: Final = 16
_WHAT: Final = "note of keys at the signer"
_MAX_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Pending:
    """A key that was asked for, and whose answer is not known.

    Attributes:
        request_id: what it was asked for with, and is again: the same key is the answer.
        key_type: its type.
        before: fingerprint of the key it replaces, "" when there is none. A key of this id with
            another one is what was asked for, and nobody has used it yet.
    """

    request_id: bytes
    key_type: KeyType
    before: str = ""

    def is_answered_by(self, info: KeyInfo) -> bool:
        """Tell whether a key of the id is what was asked for."""
        return info.key_type is self.key_type and info.fingerprint != self.before


@dataclass(frozen=True, slots=True)
class LogNote:
    """What is known of one signer's log.

    Attributes:
        head: the newest head on note.
        log_key: DER SubjectPublicKeyInfo of the key that signs its checkpoints; empty when unknown.
        fault: what speaks against it, "" as long as nothing does.
    """

    head: LogHead | None = None
    log_key: bytes = b""
    fault: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """What the note holds.

    Attributes:
        trust_domain: whose keys.
        keys: DER SubjectPublicKeyInfo by key id, oldest first.
        pending: keys asked for, by key id.
        logs: by the signer's name.
    """

    trust_domain: str
    keys: dict[str, bytes] = field(default_factory=dict)
    pending: dict[str, Pending] = field(default_factory=dict)
    logs: dict[str, LogNote] = field(default_factory=dict)


class StateFile:
    """Where the note is kept: one JSON file, replaced atomically."""

    def __init__(self, directory: Path, trust_domain: str) -> None:
        self.path = directory / FILE_NAME
        self.trust_domain = trust_domain

    def load(self) -> State | None:
        """Return the note, None when there is no file.

        Raises:
            NotReadyError: the file cannot be read or is not ours.
        """
        try:
            content = read_bounded(self.path, _MAX_BYTES, _WHAT)
        except NoFileError:
            return None
        except InvalidInputError as e:
            raise NotReadyError(e.message) from e
        try:
            state = _parse(json.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError):
            raise self._unusable("does not decode") from None
        if state.trust_domain != self.trust_domain:
            raise self._unusable(f'belongs to trust domain "{state.trust_domain}"')
        return state

    def save(self, state: State) -> None:
        """Write the note and make it durable.

        Raises:
            SpireHwError: INTERNAL, it cannot be written; the old one is intact.
        """
        try:
            replace_file(self.path, _encode(state), _WHAT)
        except NotWrittenError as e:
            raise SpireHwError(e.message) from e

    def _unusable(self, reason: str) -> NotReadyError:
        return NotReadyError(
            f"{_WHAT} {self.path} {reason}; restore it, or move it away and start once with "
            "accept_listed_keys after comparing the keys"
        )


def _encode(state: State) -> bytes:
    fields = {
        "version": 1,
        "trust_domain": state.trust_domain,
        "keys": {key_id: _text(spki) for key_id, spki in state.keys.items()},
        "pending": {
            key_id: {
                "request_id": p.request_id.hex(),
                "key_type": p.key_type.config_name,
                "before": p.before,
            }
            for key_id, p in state.pending.items()
        },
        "logs": {
            name: {
                "seq": 0 if note.head is None else note.head.seq,
                "hash": "" if note.head is None else note.head.hash.hex(),
                "log_key": _text(note.log_key),
                "fault": note.fault,
            }
            for name, note in state.logs.items()
        },
    }
    return json.dumps(fields, indent="\t").encode("utf-8")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _key(spki: bytes) -> bytes:
    parse_spki(spki)
    return spki


def _parse(fields: Any) -> State:
    if fields["version"] != 1:
        raise ValueError("unknown version")
    decode = base64.b64decode
    return State(
        trust_domain=str(fields["trust_domain"]),
        keys={str(k): _key(decode(text, validate=True)) for k, text in fields["keys"].items()},
        pending={
            str(k): Pending(
                bytes.fromhex(p["request_id"]), KeyType.parse(p["key_type"]), str(p["before"])
            )
            for k, p in fields["pending"].items()
        },
        logs={
            str(name): LogNote(
                LogHead(int(n["seq"]), bytes.fromhex(n["hash"])) if n["seq"] else None,
                decode(n["log_key"], validate=True),
                str(n["fault"]),
            )
            for name, n in fields["logs"].items()
        },
    )

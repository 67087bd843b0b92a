"""Wrapped TPM keys in a directory: one file per key id, replaced atomically.

A file has the key that is used and those before it that are kept, so that no crash leaves a key in
two places or in none. It holds nothing secret outside the TPM that wrapped it, but whoever changes it
can lose a key, so files are 0600 in a 0700 directory and links are not followed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import DeviceError, InvalidInputError, NotFoundError, NotReadyError
from spire_hw.files import NotWrittenError, read_bounded, replace_file
from spire_hw.key import KeyType, key_type_of
from spire_hw.tpm.keys import CreationProof, KeyBlob
from spire_hw.tpm.pcrpolicy import Binding

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_SUFFIX: Final = ".tpmkey"
_VERSION: Final = 1
_PROOF_PARTS: Final = ("data", "digest", "ticket")
_MAX_FILE_BYTES: Final = 2 * 1024 * 1024
# How many replaced keys of one id are kept at most; they fit into a file.
MAX_REPLACED: Final = 256
_HANDLE: Final = re.compile(r"0x81[0-9a-f]{6}")
_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """One key as it is kept.

    Attributes:
        key_id: the host's name for it.
        serial: counts up with every key made; the order of age.
        blob: the key itself.
        storage_name: Name of the storage primary it is wrapped by.
        created_at: when it was made, RFC 3339.
        generation: how many keys of its id there were, this one included.
        handle: persistent handle it was given, None for none.
        binding: PCRs it is bound to, None for none.
    """

    key_id: str
    serial: int
    blob: KeyBlob
    storage_name: bytes
    created_at: str
    generation: int = 1
    handle: int | None = None
    binding: Binding | None = None

    @property
    def name(self) -> bytes:
        """Return its Name."""
        return self.blob.parsed.name

    @property
    def key_type(self) -> KeyType:
        """Return its type."""
        return key_type_of(self.blob.parsed.key)


@dataclass(frozen=True, slots=True)
class Replaced:
    """A key that is kept although another took its place, at `since`, Unix seconds."""

    key: StoredKey
    since: float


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What there is of one key id.

    Attributes:
        current: the key that is used.
        made: how many keys of the id there were; a number is not given twice.
        replaced: keys before it that are kept, in the order in which they were replaced.
    """

    current: StoredKey
    made: int = 1
    replaced: tuple[Replaced, ...] = ()

    @property
    def key_id(self) -> str:
        """Return the host's name for the key."""
        return self.current.key_id

    @property
    def keys(self) -> tuple[StoredKey, ...]:
        """Return all of them."""
        return (self.current, *(one.key for one in self.replaced))

    def find(self, generation: int) -> Replaced:
        """Return a key that is kept.

        Raises:
            NotFoundError: it is not.
        """
        for one in self.replaced:
            if one.key.generation == generation:
                return one
        raise NotFoundError(f'generation {generation} of key "{self.key_id}" is not retained')

    def followed(self, key: StoredKey, since: float | None) -> KeyFile:
        """Return the file with another key in use.

        Args:
            key: a new one, or one that is kept.
            since: when that is; the key before is kept from then on. None keeps it not.
        """
        replaced = tuple(r for r in self.replaced if r.key.generation != key.generation)
        if since is not None:
            # Persistent handles are few: a key that signs nothing has none.
            replaced = (*replaced, Replaced(replace(self.current, handle=None), since))
        return KeyFile(key, max(self.made, key.generation), replaced)

    def without(self, generations: Collection[int]) -> KeyFile:
        """Return the file without some of the keys that are kept."""
        kept = tuple(r for r in self.replaced if r.key.generation not in generations)
        return replace(self, replaced=kept)


class TpmKeyStore:
    """The directory; calls block on the disk."""

    def __init__(self, directory: Path) -> None:
        """Make the directory if it is missing.

        Raises:
            NotReadyError: it cannot be made, or is no directory.
        """
        self.directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise NotReadyError(f"key directory {directory}: {e.strerror}") from e
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise NotReadyError(f"key directory {directory} is not writable")

    def load(self) -> tuple[list[KeyFile], list[str]]:
        """Return what there is, oldest key first, and what was wrong with files that are none.

        Raises:
            NotReadyError: the directory cannot be read.
        """
        found: list[KeyFile] = []
        complaints: list[str] = []
        try:
            paths = sorted(p for p in self.directory.iterdir() if p.suffix == _SUFFIX)
        except OSError as e:
            raise NotReadyError(f"key directory {self.directory}: {e.strerror}") from e
        for path in paths:
            try:
                file = _load(path)
            except InvalidInputError as e:
                complaints.append(f"{path.name}: {e.message}")
            except NotReadyError as e:
                complaints.append(e.message)
            else:
                found.append(file)
        return sorted(found, key=lambda f: f.current.serial), complaints

    def put(self, file: KeyFile) -> None:
        """Write a file; after a crash it is the old one or the new one.

        Raises:
            DeviceError: the disk refused.
        """
        path = self.directory / file_name(file.key_id)
        try:
            replace_file(path, encode(file), "key file")
        except NotWrittenError as e:
            raise DeviceError(
                e.message,
                device=str(self.directory),
                operation="store key",
            ) from e


def file_name(key_id: str) -> str:
    """Return the name of a key's file; ids that are no plain words are hashed."""
    if _PLAIN_ID.fullmatch(key_id):
        return key_id + _SUFFIX
    return "id." + hashlib.sha256(key_id.encode()).hexdigest() + _SUFFIX


def encode(file: KeyFile) -> bytes:
    """Return the content of a file."""
    document = {"version": _VERSION, **_document(file.current), "made": file.made}
    if file.replaced:
        document["replaced"] = [{**_document(r.key), "since": r.since} for r in file.replaced]
    return json.dumps(document, indent="\t").encode()


def decode(content: bytes) -> KeyFile:
    """Read the content of a file.

    Raises:
        InvalidInputError: not that format.
    """
    try:
        document = json.loads(content)
        _check_version(document["version"])
        current = _key(document)
        file = KeyFile(
            current,
            # Releases before counted none and kept none.
            int(document.get("made", current.generation)),
            tuple(Replaced(_key(one), float(one["since"])) for one in document.get("replaced", ())),
        )
    except InvalidInputError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, AttributeError) as e:
        raise InvalidInputError("is not a TPM key file") from e
    _check(file)
    return file


def _document(key: StoredKey) -> dict[str, object]:
    document: dict[str, object] = {
        "key_id": key.key_id,
        "serial": key.serial,
        "generation": key.generation,
        "created_at": key.created_at,
        "storage_name": key.storage_name.hex(),
        "public": base64.b64encode(key.blob.public).decode(),
        "private": base64.b64encode(key.blob.private).decode(),
    }
    if key.handle is not None:
        document["handle"] = f"0x{key.handle:08x}"
    if key.binding is not None:
        document["policy"] = key.binding.document()
    proof = key.blob.creation
    if proof is not None:
        document["creation"] = {
            part: base64.b64encode(getattr(proof, part)).decode() for part in _PROOF_PARTS
        }
    return document


def _key(document: dict[str, Any]) -> StoredKey:
    key = StoredKey(
        key_id=_text(document["key_id"]),
        serial=int(document["serial"]),
        generation=int(document.get("generation", 1)),
        blob=replace(
            KeyBlob.parse(_bytes(document["public"]), _bytes(document["private"])),
            creation=_proof(document.get("creation")),
        ),
        storage_name=bytes.fromhex(document["storage_name"]),
        created_at=_text(document["created_at"]),
        handle=_handle(document["handle"]) if "handle" in document else None,
        binding=Binding.parse(document["policy"]) if "policy" in document else None,
    )
    key_type_of(key.blob.parsed.key)
    return key


def _check(file: KeyFile) -> None:
    generations = [key.generation for key in file.keys]
    fits = (
        len(file.replaced) <= MAX_REPLACED
        and all(key.key_id == file.key_id for key in file.keys)
        and len(set(generations)) == len(generations)
        and 1 <= min(generations) <= max(generations) <= file.made
        and all(math.isfinite(one.since) for one in file.replaced)
    )
    if not fits:
        raise InvalidInputError("is not a TPM key file: its keys do not fit together")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _proof(parts: dict[str, str] | None) -> CreationProof | None:
    if parts is None:  # releases before kept none
        return None
    return CreationProof(**{part: _bytes(parts[part]) for part in _PROOF_PARTS})


def _check_version(version: object) -> None:
    if version != _VERSION:
        raise InvalidInputError(f"format {version!r} is not known")


def _handle(value: object) -> int:
    if not isinstance(value, str) or not _HANDLE.fullmatch(value):
        raise InvalidInputError("is not a TPM key file: handle is none of a persistent key")
    return int(value, 16)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidInputError("is not a TPM key file: text is missing")
    return value


def _load(path: Path) -> KeyFile:
    file = decode(read_bounded(path, _MAX_FILE_BYTES, links=False))
    if path.name != file_name(file.key_id):
        raise InvalidInputError("is the file of another key")
    return file

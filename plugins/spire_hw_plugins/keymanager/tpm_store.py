"""Wrapped TPM keys in a directory: one file per key id, replaced atomically.

A file holds nothing secret outside the TPM that wrapped it, but whoever changes it can lose a key,
so files are 0600 in a 0700 directory and links are not followed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from spire_hw.errors import DeviceError, InvalidInputError, NotReadyError
from spire_hw.files import NotWrittenError, read_bounded, replace_file
from spire_hw.key import KeyType, key_type_of
from spire_hw.tpm.keys import CreationProof, KeyBlob
from spire_hw.tpm.pcrpolicy import Binding

if TYPE_CHECKING:
    from pathlib import Path

_SUFFIX: Final = ".tpmkey"
_VERSION: Final = 1
_PROOF_PARTS: Final = ("data", "digest", "ticket")
_MAX_FILE_BYTES: Final = 64 * 1024
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
        handle: persistent handle it was given, None for none.
        binding: PCRs it is bound to, None for none.
    """

    key_id: str
    serial: int
    blob: KeyBlob
    storage_name: bytes
    created_at: str
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

    def load(self) -> tuple[list[StoredKey], list[str]]:
        """Return the keys, oldest first, and what was wrong with files that are none.

        Raises:
            NotReadyError: the directory cannot be read.
        """
        keys: list[StoredKey] = []
        complaints: list[str] = []
        try:
            paths = sorted(p for p in self.directory.iterdir() if p.suffix == _SUFFIX)
        except OSError as e:
            raise NotReadyError(f"key directory {self.directory}: {e.strerror}") from e
        for path in paths:
            try:
                key = _load(path)
            except InvalidInputError as e:
                complaints.append(f"{path.name}: {e.message}")
            except NotReadyError as e:
                complaints.append(e.message)
            else:
                keys.append(key)
        return sorted(keys, key=lambda k: k.serial), complaints

    def put(self, key: StoredKey) -> None:
        """Write a key; after a crash the file is the old one or the new one.

        Raises:
            DeviceError: the disk refused.
        """
        path = self.directory / file_name(key.key_id)
        try:
            replace_file(path, encode(key), "key file")
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


def encode(key: StoredKey) -> bytes:
    """Return the content of a key's file."""
    document: dict[str, object] = {
        "version": _VERSION,
        "key_id": key.key_id,
        "serial": key.serial,
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
    return json.dumps(document, indent="\t").encode()


def decode(content: bytes) -> StoredKey:
    """Read the content of a key's file.

    Raises:
        InvalidInputError: not that format.
    """
    try:
        document = json.loads(content)
        _check_version(document["version"])
        key = StoredKey(
            key_id=_text(document["key_id"]),
            serial=int(document["serial"]),
            blob=replace(
                KeyBlob.parse(_bytes(document["public"]), _bytes(document["private"])),
                creation=_proof(document.get("creation")),
            ),
            storage_name=bytes.fromhex(document["storage_name"]),
            created_at=_text(document["created_at"]),
            handle=_handle(document["handle"]) if "handle" in document else None,
            binding=Binding.parse(document["policy"]) if "policy" in document else None,
        )
    except InvalidInputError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise InvalidInputError("is not a TPM key file") from e
    key_type_of(key.blob.parsed.key)
    return key


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


def _load(path: Path) -> StoredKey:
    key = decode(read_bounded(path, _MAX_FILE_BYTES, links=False))
    if path.name != file_name(key.key_id):
        raise InvalidInputError("is the file of another key")
    return key

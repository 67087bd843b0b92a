"""A file in the data directory that names this server's X.509 authority.

The journal in the store is found by the keys that the KeyManager lists. When it lists none, because
the token is away, wrong or wiped, the journal would not be found and a new CA would be started
without a word. This file is the second way to the journal. It holds nothing secret.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError, SpireHwError

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME: Final = "ca-authority.json"
_FIELD: Final = "x509_authority_ids"
_MAX_BYTES: Final = 4096


class AuthorityMark:
    """The ids of the authority that signs and of the one before it, on disk."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE_NAME

    def exists(self) -> bool:
        """Tell whether this server made a CA before, or began to."""
        return self._path.exists()

    def load(self) -> tuple[str, ...]:
        """Return the stored ids, none when nothing was stored yet.

        Raises:
            EncodingError: the file is not what `store` wrote.
            SpireHwError: it cannot be read.
        """
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return ()
        except OSError as e:
            raise SpireHwError(f"cannot read {self._path}: {e.strerror}") from e
        with os.fdopen(fd, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        try:
            ids = json.loads(data)[_FIELD]
        except (ValueError, KeyError, TypeError) as e:
            raise EncodingError(str(self._path), "is not a record of CA authorities") from e
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise EncodingError(str(self._path), "is not a record of CA authorities")
        return tuple(ids)

    def store(self, ids: tuple[str, ...]) -> None:
        """Replace the ids; they survive a power cut once this returns.

        Raises:
            SpireHwError: the file cannot be written.
        """
        data = json.dumps({_FIELD: list(ids)}).encode() + b"\n"
        temporary = self._path.with_name(f".{FILE_NAME}.new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(temporary, flags, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as e:
            raise SpireHwError(f"cannot write {self._path}: {e.strerror}") from e

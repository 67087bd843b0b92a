"""A file in the data directory that names this server's X.509 authority.

The journal in the store is found by the keys that the KeyManager lists. When it lists none, because
the token is away, wrong or wiped, the journal would not be found and a new CA would be started
without a word. This file is the second way to the journal. It holds nothing secret.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError
from spire_hw.files import NoFileError, read_bounded, replace_file

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME: Final = "ca-authority.json"
REQUEST_FILE_NAME: Final = "ca-request.json"
_FIELD: Final = "x509_authority_ids"
_KEY_FIELD: Final = "requested_key"
_MAX_BYTES: Final = 4096


class AuthorityMark:
    """The ids of the authority that signs and of the one before it, on disk.

    Beside it, of which key a certificate was asked for by hand.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE_NAME
        self._request = data_dir / REQUEST_FILE_NAME

    def load_request(self) -> str:
        """Return the fingerprint of the key that a certificate was asked for, "" for none.

        Raises:
            InvalidInputError: the file is not what `store_request` wrote.
            NotReadyError: it cannot be read.
        """
        try:
            data = read_bounded(self._request, _MAX_BYTES, links=False)
        except NoFileError:
            return ""
        try:
            found = json.loads(data)[_KEY_FIELD]
        except (ValueError, KeyError, TypeError) as e:
            raise EncodingError(str(self._request), "is not a record of a CA request") from e
        return str(found)

    def store_request(self, fingerprint: str) -> None:
        """Note the key that a certificate is asked for, "" once it is there.

        Raises:
            NotWrittenError: the file cannot be written.
        """
        replace_file(self._request, json.dumps({_KEY_FIELD: fingerprint}).encode() + b"\n")

    def exists(self) -> bool:
        """Tell whether this server made a CA before, or began to."""
        return self._path.exists()

    def load(self) -> tuple[str, ...]:
        """Return the stored ids, none when nothing was stored yet.

        Raises:
            InvalidInputError: the file is not what `store` wrote.
            NotReadyError: it cannot be read.
        """
        try:
            data = read_bounded(self._path, _MAX_BYTES, links=False)
        except NoFileError:
            return ()
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
            NotWrittenError: the file cannot be written.
        """
        data = json.dumps({_FIELD: list(ids)}).encode() + b"\n"
        replace_file(self._path, data)

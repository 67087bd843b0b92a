"""Revocation lists in files that somebody else keeps up to date.

When a file is spoilt while the server runs, the lists that were read before stay, until their own
time runs out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError
from spire_hw.files import parse_file
from spire_hw.tpm.crl import MAX_CRL_BYTES, Revocations, parse_crl, split_crls
from spire_hw.tpm.watched import Watched

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.tpm.crl import Crl

_SUFFIXES: Final = frozenset({".crl", ".pem", ".der"})
_MAX_FILES: Final = 256


def watch_crls(path: Path, *, required: bool) -> Watched[Revocations]:
    """Read the lists of a file, or of a directory of files named .crl, .pem or .der.

    Args:
        path: the file or directory.
        required: every certificate below a root needs a list that counts.

    Raises:
        NotReadyError: cannot be read.
        InvalidInputError: a file holds something other than revocation lists.
    """

    def read() -> Revocations:
        found = [crl for file in _files_of(path) for crl in _read_file(file)]
        return Revocations(found, required=required)

    return Watched(f"revocation lists at {path}", lambda: _files_of(path), read)


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [name for name in sorted(path.iterdir()) if name.suffix.lower() in _SUFFIXES]
    if len(found) > _MAX_FILES:
        raise InvalidInputError(f"{path}: more than {_MAX_FILES} revocation lists")
    return found


def _read_file(path: Path) -> list[Crl]:
    def parse(blob: bytes) -> list[Crl]:
        return [parse_crl(one) for one in split_crls(blob)]

    return parse_file(path, 2 * MAX_CRL_BYTES, parse)

"""Is this file fit to be loaded as a PKCS#11 module? Asked before anything runs its code."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from spire_hw.errors import ErrorKind, InvalidInputError
from spire_hw.pkcs11.errors import Cure, TokenError

_NO_MODULE: Final = {
    "C_GetFunctionList": "not a PKCS#11 module",
    "OS exception": "not a shared library that can be loaded",
}


def load_fault(error: BaseException, missing: str) -> str:
    """Return why a file could not be loaded as a module, "" when something else went wrong.

    Args:
        error: what loading raised.
        missing: what to say when a library is not there, this one or one that it needs.
    """
    signs = {"cannot open shared object": missing, **_NO_MODULE}
    return next((words for sign, words in signs.items() if sign in str(error)), "")


def check_module_path(path: str) -> str:
    """Return the resolved path of a module.

    Loading a module runs its constructors with our rights, so the file and every directory above
    it must be out of other users' hands.

    Raises:
        InvalidInputError: `refusing module …` with the reason; nothing was loaded.
        TokenError: FAILED_PRECONDITION, there is no such file.
    """
    if not path.startswith("/"):
        raise InvalidInputError(f"refusing module {path}: the path is not absolute")
    try:
        resolved = Path(path).resolve(strict=True)
        status = resolved.stat()
    except OSError as e:
        raise TokenError(
            f"pkcs11 module not found: {path} ({e.strerror}); install it or correct module_path",
            reason="hsm.module",
            operation="find module",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        ) from e
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInputError(f"refusing module {path}: it is not a regular file")
    for place in (resolved, *resolved.parents):
        _check_place(path, place)
    return str(resolved)


def _check_place(path: str, place: Path) -> None:
    status = place.stat()
    if status.st_uid not in {0, os.geteuid()}:
        raise InvalidInputError(f"refusing module {path}: {place} belongs to another user")
    sticky_directory = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky_directory:
        raise InvalidInputError(
            f"refusing module {path}: {place} is writable by others "
            f"(mode {stat.S_IMODE(status.st_mode):04o})"
        )

"""A program's data directory: made, looked at, held by one process."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw.hardening import check_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw.log import Logger


def prepare_data_dir(data_dir: Path, log: Logger, *, strict: bool = False) -> None:
    """Make a data directory, open to its owner alone.

    Args:
        data_dir: the directory.
        log: takes what is not as it should be.
        strict: refuse a directory that others may write to, instead of telling of it.

    Raises:
        UnavailableError: it cannot be made, is no directory, or was made by another user where
            everybody may make one.
        NotReadyError: others may write to it.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = data_dir.stat().st_mode & 0o777
        remark = check_directory(data_dir)
    except OSError as e:
        raise UnavailableError(f"data_dir {data_dir} cannot be used: {e.strerror}") from e
    if mode & 0o022 and strict:
        raise NotReadyError(
            f"others may write to data_dir {data_dir} (mode {mode:04o}); run: chmod go-w {data_dir}"
        )
    if remark is not None:
        log.warning("data_dir is not safe from other users", remark=remark)
    if mode & 0o022:
        log.warning("others may write to data_dir", data_dir=str(data_dir), mode=f"{mode:04o}")


def lock_data_dir(data_dir: Path, program: str) -> Callable[[], None]:
    """Make sure that no other process of a program runs on a data directory.

    Args:
        data_dir: the directory.
        program: `server` or `signer`; `<program>.lock` is what is held.

    Returns:
        What lets go of it.

    Raises:
        UnavailableError: another process has it, or the lock file cannot be written.
    """
    path = data_dir / f"{program}.lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise UnavailableError(f"cannot open {path}: {e.strerror}") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        raise UnavailableError(
            f"another {program} runs on data_dir {data_dir} (it holds {path}); stop it first"
        ) from e
    return lambda: os.close(fd)

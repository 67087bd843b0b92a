"""The signer's data directory: made, looked at, held by one process."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw.hardening import check_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw.log import Logger

LOCK_FILE: Final = "signer.lock"
_UMASK: Final = 0o077


def tighten_umask() -> None:
    """Have files made for their owner alone."""
    os.umask(_UMASK)


def prepare_data_dir(data_dir: Path, log: Logger) -> None:
    """Make the data directory, open to its owner alone.

    Raises:
        UnavailableError: it cannot be made or used.
        NotReadyError: others may write to it.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = data_dir.stat().st_mode & 0o777
        remark = check_directory(data_dir)
    except OSError as e:
        raise UnavailableError(f"data_dir {data_dir} cannot be used: {e.strerror}") from e
    if mode & 0o022:
        raise NotReadyError(
            f"others may write to data_dir {data_dir} (mode {mode:04o}); run: chmod go-w {data_dir}"
        )
    if remark is not None:
        log.warning("data_dir is not safe from other users", remark=remark)


def lock_data_dir(data_dir: Path) -> Callable[[], None]:
    """Make sure that no other signer runs on a data directory.

    Returns:
        What lets go of it.

    Raises:
        UnavailableError: another process has it, or the lock file cannot be written.
    """
    path = data_dir / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise UnavailableError(f"cannot open {path}: {e.strerror}") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        raise UnavailableError(
            f"another signer runs on data_dir {data_dir} (it holds {path}); stop it first"
        ) from e
    return lambda: os.close(fd)

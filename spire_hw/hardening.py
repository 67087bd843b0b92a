"""What a long-running program of ours does to itself before it holds any secret."""

from __future__ import annotations

import ctypes
import os
import resource
import stat
from typing import TYPE_CHECKING, Final

from spire_hw.errors import UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

_PR_SET_DUMPABLE: Final = 4
_MAX_DESCRIPTORS: Final = 65_536
_ROOT: Final = 0


def harden() -> None:
    """Keep secrets out of core files and of other users' reach, and make room for connections.

    No core file is written and no other process of the same user may look into this one's memory;
    the soft limit of descriptors rises to the hard one.

    Raises:
        UnavailableError: the kernel refuses.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise UnavailableError(f"core files cannot be switched off: {reason}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_directory(directory: Path) -> str | None:
    """Look for somebody else's hand on a directory that will hold a socket or secrets.

    Anybody can make a directory in one that is open to all, such as /tmp, and keep the right to
    exchange what is put into it.

    Args:
        directory: an existing one.

    Returns:
        What an operator should be warned of, None when there is nothing.

    Raises:
        UnavailableError: it, or one above it, lies in a directory open to all and belongs to
            another user.
    """
    warning = None
    shown, real = directory.absolute(), directory.resolve()
    for one in dict.fromkeys((shown, *shown.parents, real, *real.parents)):
        found = one.stat(follow_symlinks=False)
        if found.st_uid not in {_ROOT, os.geteuid()}:
            above = one.parent.stat()
            if above.st_mode & stat.S_IWOTH:
                raise UnavailableError(
                    f"{one} belongs to user {found.st_uid}, who made it where everybody may; "
                    "remove it or use another path"
                )
            warning = warning or f"{one} belongs to user {found.st_uid}"
        open_to_all = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        if open_to_all and not stat.S_ISLNK(found.st_mode):
            warning = warning or f"everybody may exchange what is in {one}"
    return warning

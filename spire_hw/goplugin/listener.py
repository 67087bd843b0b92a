"""Is the socket that a plugin names really its own, and will it stay so?"""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.hardening import check_directory
from spire_hw.transport.process import peer_credentials

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


_PINNED: Final = "pinned.sock"


def pin_socket(path: Path, directory: Path, owns: Callable[[int], bool]) -> Path:
    """Return a path that leads to the plugin's socket and to no other one, now and later.

    A socket outside the plugin's own directory is linked into it: whatever is done to its first
    name, connections go where they went when it was checked. Across file systems there are no
    links; then the checks of the place it is in have to do.

    Args:
        path: as the plugin says.
        directory: the plugin's, open to nobody else.
        owns: tells whether a process id is the plugin's.

    Raises:
        InvalidInputError, UnavailableError: as `check_socket`.
    """
    check_socket(path, owns)
    if path.parent == directory:
        return path
    pinned = directory / _PINNED
    try:
        os.link(path, pinned, follow_symlinks=False)
    except OSError:
        return path
    check_socket(pinned, owns)
    return pinned


def check_socket(path: Path, owns: Callable[[int], bool]) -> None:
    """Make sure that a socket is the plugin's and will stay so.

    Args:
        path: as the plugin says.
        owns: tells whether a process id is the plugin's.

    Raises:
        InvalidInputError: something else is there, or somebody else listens.
        UnavailableError: nobody listens, or others may put their own socket in its place.
    """
    try:
        found = path.stat(follow_symlinks=False)
    except OSError as e:
        raise UnavailableError(f"its socket {path} cannot be found: {e.strerror}") from e
    if not stat.S_ISSOCK(found.st_mode):
        raise InvalidInputError(f"{path}, where it says it listens, is not a socket")
    if found.st_uid != os.geteuid():
        raise InvalidInputError(
            f"the socket {path}, where it says it listens, belongs to user {found.st_uid}; "
            "a plugin runs as its host's user"
        )
    remark = check_directory(path.parent)
    if remark is not None:
        raise UnavailableError(f"its socket {path} is not safe from other users: {remark}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError as e:
            raise UnavailableError(f"its socket {path} takes no connection: {e.strerror}") from e
        listener = peer_credentials(probe)[0]
    if not owns(listener):
        raise InvalidInputError(
            f"the socket {path}, where it says it listens, belongs to another process "
            f"(pid {listener}), which the plugin did not start"
        )

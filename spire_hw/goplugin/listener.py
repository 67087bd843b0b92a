"""Is the socket that a plugin names really its own, and will it stay so?"""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING

from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.hardening import check_directory
from spire_hw.transport.process import peer_credentials

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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

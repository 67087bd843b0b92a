"""Runs between fork and exec of an external plugin: `python -I -S launcher.py PARENT PIPE IMAGE PROGRAM ...`.

Takes the standard library alone, for it starts in an isolated interpreter. Binds the plugin's life
to the host's, undoes what Python changed about signals, and becomes the plugin. When that fails the
error number goes into the pipe, which a successful exec closes.

Source: prctl(2), PR_SET_PDEATHSIG; execve(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_FAILED = 127
_SCRIPT = b"#!"


def main(arguments: list[str]) -> int:
    """Become the plugin.

    Args:
        arguments: the host's process id, the descriptor of the pipe, the descriptor of the sealed
            program or -1 for the file itself, the program's path, its arguments.
    """
    parent, pipe, image = (int(number) for number in arguments[:3])
    program, *rest = arguments[3:]
    os.set_inheritable(pipe, False)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        return _FAILED
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        if image < 0:
            os.execv(program, [program, *rest])  # noqa: S606 - the point of it
        # A script's interpreter opens the descriptor by its path; a binary needs it no more.
        os.set_inheritable(image, os.pread(image, len(_SCRIPT), 0) == _SCRIPT)
        os.execve(image, [program, *rest], os.environ)  # noqa: S606
    except OSError as e:
        os.write(pipe, str(e.errno).encode())
    return _FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

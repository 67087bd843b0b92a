from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.transport.process import Process, is_own_process

if TYPE_CHECKING:
    from pathlib import Path

CONNECT = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
sys.stdin.read()
"""


def test_a_caller_is_pinned_until_it_ends(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        command = [sys.executable, "-c", CONNECT, str(tmp_path / "s")]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:  # noqa: S603 - ourselves
            connection, _ = listening.accept()
            with connection:
                process = Process(connection)
                assert not is_own_process(connection)
                assert process.pid == child.pid
                assert process.alive()
                descriptor = process.open_file("exe")
                assert os.read(descriptor, 4) == b"\x7fELF"
                os.close(descriptor)
                assert CONNECT.encode() in process.read_file("cmdline", 1000)
                assert len(process.read_file("cmdline", 3)) == 3
                child.send_signal(signal.SIGKILL)
                child.wait()
                assert not process.alive()
                for read in (process.read_link, process.open_file):
                    with pytest.raises(UnavailableError, match="has ended"):
                        read("exe")
                process.close()
                with pytest.raises(UnavailableError):
                    Process(connection)


def test_only_names_below_the_directory_are_read() -> None:
    one, two = socket.socketpair()
    with one, two:
        assert is_own_process(one)
        process = Process(one)
        for name in ("/etc/passwd", "../1/exe", "a/../../1/exe", ""):
            with pytest.raises(InvalidInputError):
                process.open_file(name)
        with pytest.raises(UnavailableError, match="No such file"):
            process.read_file("nothing", 10)
        process.close()
        process.close()
        assert not process.alive()

"""Programs that are no plugins, or never get to be one: `rude_guest.py MODE`.

Standard library alone, so that they start at once.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

MODE = sys.argv[1]


def say(text: str) -> None:
    os.write(1, text.encode("latin-1"))


def main() -> None:  # noqa: C901, PLR0912, PLR0915 - one branch for each mode
    """Go wrong."""
    here = Path(os.environ["PLUGIN_UNIX_SOCKET_DIR"])
    match MODE:
        case "exits":
            sys.stderr.write("cannot go on \x1b[31mlike this\n")
            sys.exit(3)
        case "garbage":
            say("\x00\xffgarbage\n")
        case "endless_line":
            while True:
                say("x" * 65536)
        case "silent":
            time.sleep(3600)
        case "closes_stdout":
            os.close(1)
            time.sleep(3600)
        case "banner":
            say("Welcome to the plugin!\n")
        case "core_version":
            say("2|1|unix|/x|grpc\n")
        case "app_version":
            say("1|7|unix|/x|grpc\n")
        case "netrpc":
            say("1|1|unix|/x\n")
        case "tls":
            say("1|1|unix|/x|grpc|" + "A" * 60 + "\n")
        case "tcp":
            say("1|1|tcp|127.0.0.1:22|grpc\n")
        case "relative":
            say("1|1|unix|plugin.sock|grpc\n")
        case "no_socket":
            say(f"1|1|unix|{here}/nothing|grpc\n")
        case "file":
            (here / "file").write_text("x")
            say(f"1|1|unix|{here}/file|grpc\n")
        case "symlink":
            (here / "link").symlink_to(sys.argv[2])
            say(f"1|1|unix|{here}/link|grpc\n")
        case "foreign_socket":
            say(f"1|1|unix|{sys.argv[2]}|grpc\n")
        case "deaf_socket":
            with socket.socket(socket.AF_UNIX) as deaf:
                deaf.bind(str(here / "deaf"))
                say(f"1|1|unix|{here}/deaf|grpc\n")
                time.sleep(3600)
        case "not_grpc":
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(here / "s"))
                listening.listen()
                say(f"1|1|unix|{here}/s|grpc\n")
                while True:
                    connection, _ = listening.accept()
                    connection.sendall(b"SSH-2.0-OpenSSH\r\n" * 100)
    time.sleep(3600)


if __name__ == "__main__":
    main()

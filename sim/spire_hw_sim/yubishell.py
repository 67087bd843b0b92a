"""A stand-in for `yubihsm-shell` and for the log of a YubiHSM 2 behind it; not tried with a device.

with a folder of its own:
log = YubiHsmLog(folder)
log.do(SIGN_ECDSA, target=0x1234)
log.command("get-logs")     # what runs `yubihsm-shell -a get-logs` on it

Sources: yubihsm-shell 2.7, `src/commands.c` and `src/main.c`; Yubico, "YubiHSM 2 User Guide": Logging
and Logs, GET LOG ENTRIES, SET LOG INDEX. That the counters start anew at SET LOG INDEX, and what the
first entry follows, are guesses.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import secrets
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from spire_hw.files import replace_file
from spire_hw_signer.devicelog.yubihsm import CAPACITY, PACKED, chained

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CREATE_SESSION, AUTHENTICATE, CLOSE_SESSION = 0x03, 0x04, 0x40
GET_LOG_ENTRIES, SIGN_ECDSA, SET_LOG_INDEX = 0x4D, 0x56, 0x67
NO_KEY: Final = 0xFFFF
_DONE: Final = 0x80
_NUMBERS: Final = 1 << 16
_RESET: Final = [1, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFF, 0xFFFFFFFF]
_LOG_FULL: Final = "Log buffer is full and forced audit is set"


class LogFullError(Exception):
    """The device does nothing more until its log was read."""


@dataclass(slots=True)
class State:
    """What the device remembers.

    Attributes:
        items: numbers of each entry, in the order in which they are hashed.
        digests: of each entry.
        before: digest of what came before the first.
        boots, authentications: events that were not logged.
        force: nothing is done that finds no room in the log.
        password: of the authentication key.
        tick: time since the device was switched on.
    """

    items: list[list[int]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    before: str = ""
    number: int = 0
    boots: int = 0
    authentications: int = 0
    force: bool = False
    password: str = "password"  # noqa: S105 - the one devices come with
    tick: int = 0

    def add(self, item: Sequence[int]) -> None:
        """Write an entry, over the oldest one where there is no room."""
        before = self.digests[-1] if self.digests else self.before
        self.items.append(list(item))
        self.digests.append(chained(PACKED.pack(*item), bytes.fromhex(before)).hex())
        self.number = item[0]
        if len(self.items) > CAPACITY:
            self.drop(1)

    def drop(self, count: int) -> None:
        """Take the oldest entries away."""
        if count:
            self.before = self.digests[count - 1]
            del self.items[:count], self.digests[:count]


class YubiHsmLog:
    """The device; several processes may use it.

    Args:
        folder: of its state and of the program.
        password: of the authentication key.
        force: force-audit is on.
    """

    def __init__(self, folder: Path, *, password: str = "password", force: bool = False) -> None:  # noqa: S107
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = folder / "device.json"
        self._lock = folder / "lock"
        self.program = folder / "yubihsm-shell"
        self.secret_file = folder / "password"
        if self._file.exists():
            return
        self._lock.touch()
        self._store(State(password=password, force=force))
        self.program.write_text(
            f"#!{sys.executable}\nimport sys\nfrom spire_hw_sim.yubishell import main\n"
            f"sys.exit(main({str(folder)!r}, sys.argv[1:]))\n"
        )
        self.program.chmod(0o700)
        self.secret_file.write_text(password + "\n")
        self.secret_file.chmod(0o600)
        self.reset()

    def command(self, action: str, *more: str) -> list[str]:
        """Return the command line that has an action done."""
        return [str(self.program), "--authkey", "1", "-a", action, *more]

    def reset(self) -> None:
        """Reset it to factory settings: its log begins anew."""
        with self.change() as state:
            state.items, state.digests, state.before = [], [], secrets.token_hex(16)
            state.add(_RESET)
        self.boot()

    def boot(self) -> None:
        """Switch it on."""
        with self.change() as state:
            state.tick = 0
            if state.force and len(state.items) >= CAPACITY:
                state.boots += 1
            else:
                number = (state.number + 1) % _NUMBERS
                state.add([number, 0, 0, NO_KEY, 0, 0, 0, 0])

    def do(self, command: int, *, length: int = 34, target: int = NO_KEY) -> None:
        """Have a command done.

        Raises:
            LogFullError: there is no room for it in the log.
        """
        session = NO_KEY if command in {CREATE_SESSION, AUTHENTICATE} else 1
        with self.change() as state:
            state.tick += 7
            if state.force and len(state.items) >= CAPACITY:
                if command == AUTHENTICATE:
                    state.authentications += 1
                if command in {CREATE_SESSION, AUTHENTICATE, GET_LOG_ENTRIES, CLOSE_SESSION}:
                    return
                raise LogFullError
            number = (state.number + 1) % _NUMBERS
            result = command | _DONE
            state.add([number, command, length, session, target, NO_KEY, result, state.tick])

    def consume(self, number: int) -> bool:
        """Let go of the entries up to one; tell whether there is such an entry."""
        with self.change() as state:
            numbers = [item[0] for item in state.items]
            if number not in numbers:
                return False
            state.drop(numbers.index(number) + 1)
            state.boots = state.authentications = 0
        return True

    @property
    def state(self) -> State:
        """Return what it remembers; changing that changes nothing."""
        return State(**json.loads(self._file.read_bytes()))

    @contextmanager
    def change(self) -> Iterator[State]:
        """Change what it remembers, whatever a device would say to that."""
        with self._lock.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            state = self.state
            yield state
            self._store(state)

    def _store(self, state: State) -> None:
        replace_file(self._file, json.dumps(asdict(state)).encode())


def text_of(state: State) -> str:
    """Return what `get-logs` prints."""
    count = len(state.items)
    found = {0: "No logs to extract", 1: "Found 1 item"}.get(count, f"Found {count} items")
    lines = [
        f"{state.boots} unlogged boots found",
        f"{state.authentications} unlogged authentications found",
        found,
    ]
    for item, digest in zip(state.items, state.digests, strict=True):
        number, command, length, session, target, second, result, tick = item
        lines.append(
            f"item: {number:5} -- cmd: 0x{command:02x} -- length: {length:4}"
            f" -- session key: 0x{session:04x} -- target key: 0x{target:04x}"
            f" -- second key: 0x{second:04x} -- result: 0x{result:02x} -- tick: {tick}"
            f" -- hash: {digest}"
        )
    return "".join(f"{line}\n" for line in lines)


def main(folder: str, arguments: list[str]) -> int:
    """Do what the program does; return its exit status."""
    given = _arguments(arguments)
    log = YubiHsmLog(Path(folder))
    _say("Session keepalive set up to run every 15 seconds")
    _say("Enter password:")
    password = sys.stdin.readline().removesuffix("\n")
    log.do(CREATE_SESSION, length=10, target=given.authkey)
    if password != log.state.password:
        _say("Failed to create session: Authentication error\nFailed to open session")
        return 1
    log.do(AUTHENTICATE, length=17, target=given.authkey)
    _say("Created session 0")
    if given.action == "get-logs":
        sys.stdout.write(text_of(log.state))
        log.do(GET_LOG_ENTRIES, length=0)
    elif not log.consume(given.log_index):
        _say("Failed to set log index: Invalid ID\nUnable to set log index")
        return 1
    else:
        log.do(SET_LOG_INDEX, length=2)
    log.do(CLOSE_SESSION, length=0)
    return 0


def _arguments(arguments: list[str]) -> Any:
    reader = argparse.ArgumentParser(prog="yubihsm-shell")
    reader.add_argument("-a", "--action", choices=["get-logs", "set-log-index"], required=True)
    reader.add_argument("--authkey", type=int, default=1)
    reader.add_argument("--log-index", type=int, default=-1)
    return reader.parse_args(arguments)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")

"""Where a PIN comes from, and the rule that a refused one is never sent again.

Three wrong PINs lock many tokens for good, so a refusal latches on the PIN's content: until its
source holds something else nobody in this process may try.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import stat
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakValueDictionary

from spire_hw.aio.terminal import ask_hidden
from spire_hw.errors import ErrorKind, NotReadyError
from spire_hw.pkcs11.errors import Cure, TokenError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable
    from pathlib import Path

_MAX_BYTES: Final = 256
# How long somebody has to enter a PIN, at the device or at the terminal.
BY_HAND_S: Final = 120.0


class PinSource(Protocol):
    """Something that holds a PIN."""

    def read(self) -> str | None:
        """Return the PIN as it is now, None when the device itself asks for it.

        Raises:
            TokenError: FAILED_PRECONDITION, it cannot be had; the message never shows content.
        """
        ...


class FilePin:
    """A PIN in a file that only its owner may read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> str:
        """Return the file's content without exactly one trailing newline."""
        try:
            # Non-blocking, so that a FIFO in this place cannot hold the server up.
            handle = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            why = e.strerror or "cannot be opened"
            raise self._unusable(
                f"{why}; put the PIN there, mode 0600, or name another file"
            ) from e
        try:
            self._check(os.fstat(handle))
            content = os.read(handle, _MAX_BYTES + 2)
        except OSError as e:
            raise self._unusable(e.strerror or "cannot be read") from e
        finally:
            os.close(handle)
        return _checked(content.removesuffix(b"\n"), self._unusable)

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise self._unusable("is not a regular file")
        others = stat.S_IRWXG | stat.S_IRWXO
        if self._is_credential():
            # systemd lets the service read it by an access list, whose mask shows as the group's.
            others &= ~stat.S_IRGRP
        if status.st_mode & others:
            mode = stat.S_IMODE(status.st_mode)
            raise self._unusable(f"mode {mode:04o} lets others read it; use 0600")
        if status.st_uid not in {0, os.geteuid()}:
            raise self._unusable("belongs to another user")

    def _is_credential(self) -> bool:
        folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
        return folder != "" and str(self._path.parent) == folder

    def _unusable(self, reason: str) -> TokenError:
        return _unusable(f"PIN file {self._path}: {reason}")


class EnvironmentPin:
    """A PIN from an environment variable, which is cleared once read."""

    def __init__(self, name: str) -> None:
        self._name = name
        value = os.environ.pop(name, None)
        self._pin = None if value is None else value.encode("utf-8", "surrogateescape")

    def read(self) -> str:
        """Return what the variable held when this was made."""
        if self._pin is None:
            raise self._unusable("is not set")
        return _checked(self._pin, self._unusable)

    def _unusable(self, reason: str) -> TokenError:
        return _unusable(f"PIN variable {self._name}: {reason}")


class DevicePin:
    """A PIN that is entered at the device, by its protected authentication path.

    Spec: PKCS #11 v2.40, 4.2 CKF_PROTECTED_AUTHENTICATION_PATH.
    """

    def read(self) -> None:
        """Return that there is none to send."""


class TerminalPin:
    """A PIN that is entered at the terminal; nobody is asked twice while the program runs.

    Args:
        what: whose PIN it is, in words.
        turn: held while somebody is asked, so that one question is there at a time.
    """

    def __init__(self, what: str, turn: asyncio.Lock) -> None:
        self._what = what
        self._turn = turn
        self._pin: str | None = None
        self._failure: TokenError | None = None

    async def ask(self) -> None:
        """Have it entered, unless that was done or tried already; `read` tells what came of it."""
        async with self._turn:
            if self._pin is None and self._failure is None:
                try:
                    self._pin = await self._entered()
                except TokenError as e:
                    self._failure = e

    def read(self) -> str:
        """Return what was entered.

        Raises:
            TokenError: FAILED_PRECONDITION, it was not.
        """
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._pin is None:
            raise self._unusable("was not asked for")
        return self._pin

    async def _entered(self) -> str:
        try:
            entered = await ask_hidden(f"PIN of {self._what}", BY_HAND_S)
        except NotReadyError as e:
            raise self._unusable(e.message) from e
        if not entered:
            raise self._unusable("nothing was entered")
        pin = _checked(entered, self._unusable)
        if not pin.isprintable():
            raise self._unusable("holds characters of keys such as arrows; nothing was sent")
        return pin

    def _unusable(self, reason: str) -> TokenError:
        remedy = "start the program again, from a terminal, and enter it there, or set pin_file"
        return _unusable(f"PIN of {self._what} from the terminal: {reason}; {remedy}")


class TerminalPins:
    """What is entered at the terminal: known to all of a process, whoever needs it."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._pins: dict[Hashable, TerminalPin] = {}

    def of(self, token: Hashable, what: str) -> TerminalPin:
        """Return the PIN of a token.

        Args:
            token: what tells it from others.
            what: the same in words.
        """
        return self._pins.setdefault(token, TerminalPin(what, self._turn))


class Refusals:
    """What tokens said to PINs: known to all of a process, whoever sent them.

    Tokens are told apart by what they call themselves, so that one is the same by whatever module and
    configuration it is reached; two that call themselves the same count as one.
    """

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(32)
        self._refused: dict[bytes, str] = {}
        self._doubted: set[bytes] = set()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def turn(self, token: str) -> asyncio.Lock:
        """Return what is held from the last look at these notes until a token has answered a login."""
        turn = self._turns.get(token)
        if turn is None:
            turn = self._turns[token] = asyncio.Lock()
        return turn

    def check(self, token: str, pin: str | None) -> None:
        """Refuse a PIN that a token refused; None is what is entered at the device.

        Raises:
            TokenError: it did.
        """
        refusal = self._refused.get(self._mark(token, pin))
        if refusal is not None:
            raise TokenError(
                refusal,
                reason="hsm.pin_latched",
                operation="login",
                cure=Cure.OPERATOR,
                kind=ErrorKind.FAILED_PRECONDITION,
            )

    def refuse(self, token: str, pin: str | None, message: str) -> None:
        """Remember that a token refused a PIN, and in what words."""
        self._refused[self._mark(token, pin)] = message

    def doubt(self, token: str, pin: str | None, message: str) -> None:
        """Remember that a login failed and nobody knows why; at the second time it is a refusal.

        Tokens that count wrong PINs allow three, so one more try does not lock them.
        """
        mark = self._mark(token, pin)
        if mark in self._doubted:
            self._refused[mark] = (
                f"{message}; two logins failed so, which may have been counted as wrong PINs: this "
                "PIN will not be tried again; correct it at its source or, if it is right, see to "
                "the token and restart"
            )
        self._doubted.add(mark)

    def accept(self, token: str, pin: str | None) -> None:
        """Forget doubts: the token took this PIN."""
        self._doubted.discard(self._mark(token, pin))

    def _mark(self, token: str, pin: str | None) -> bytes:
        text = f"{token}\0{pin or ''}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, key=self._salt, digest_size=32).digest()


OF_THIS_PROCESS: Final = Refusals()
ENTERED: Final = TerminalPins()


class PinGuard:
    """Hands a PIN out unless the token refused that very PIN before.

    Args:
        source: where the PIN is.
        refusals: what is known of PINs.
        turn: that of an earlier guard of the same token.

    Attributes:
        turn: held while one worker is started, so that the first login decides about the rest.
    """

    def __init__(
        self,
        source: PinSource,
        refusals: Refusals = OF_THIS_PROCESS,
        turn: asyncio.Lock | None = None,
    ) -> None:
        self.turn = turn or asyncio.Lock()
        self._source = source
        self._refusals = refusals
        self._token = ""

    @property
    def by_hand(self) -> bool:
        """Tell whether somebody enters the PIN at the device, at each login."""
        return isinstance(self._source, DevicePin)

    async def ready(self) -> None:
        """Wait until `take` has an answer: somebody may have to enter it first."""
        if isinstance(self._source, TerminalPin):
            await self._source.ask()

    def take(self) -> str | None:
        """Return the PIN, None when the device asks for it.

        Raises:
            TokenError: the source cannot be read, or holds a PIN that the token met last refused.
        """
        pin = self._source.read()
        self._refusals.check(self._token, pin)
        return pin

    @asynccontextmanager
    async def meeting(self, token: str, pin: str | None) -> AsyncIterator[Refusals]:
        """Let nobody else log in to a token until it is known what it says to a PIN.

        Args:
            token: what the token calls itself.
            pin: what `take` gave.

        Raises:
            TokenError: it has refused this one before.
        """
        self._token = token
        async with self._refusals.turn(token):
            self._refusals.check(token, pin)
            yield self._refusals


def _checked(content: bytes, unusable: Callable[[str], TokenError]) -> str:
    if not content:
        raise unusable("is empty; the token's user PIN belongs there")
    if len(content) > _MAX_BYTES:
        raise unusable(f"is longer than {_MAX_BYTES} bytes")
    try:
        pin = content.decode("utf-8")
    except UnicodeDecodeError:
        raise unusable("is not UTF-8") from None
    if "\0" in pin:
        raise unusable("holds a NUL")
    return pin


def _unusable(message: str) -> TokenError:
    return TokenError(
        message,
        reason="hsm.pin_source",
        operation="read PIN",
        cure=Cure.OPERATOR,
        kind=ErrorKind.FAILED_PRECONDITION,
    )

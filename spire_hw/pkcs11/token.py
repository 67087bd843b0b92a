"""One token in one worker process: load the module, choose the token, log in, keep a session.

Runs in the worker only. Two sessions are open: an anchor that holds the login for ever, and a
working session that is thrown away after any failed operation, because a failure may leave the
operation active for good.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final

import pkcs11
from pkcs11 import Attribute, ObjectClass, Session, Token, TokenFlag
from pkcs11.exceptions import PKCS11Error, SessionCount, SessionReadOnly, TokenWriteProtected

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import Cure, TokenError, ckr_of
from spire_hw.pkcs11.functions import CkrError, Functions

_CKS_LOGGED_IN: Final = frozenset({1, 3})  # CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS
_CKR_CRYPTOKI_NOT_INITIALIZED: Final = 0x190
_TOUCH_BITS: Final = 128
_LOCAL: Final = (
    "look at the device or its service, and at the module's own configuration and directories"
)


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """Which token; both may be given, one must.

    Attributes:
        module: resolved path of the module.
        label: CKA token label without padding, None for any.
        serial: serial number without padding, None for any.
        uri_attributes: further text attributes of an RFC 7512 URI that must match.
        slot_id: slot number of an RFC 7512 URI; a hint where the token is named otherwise.
    """

    module: str
    label: str | None
    serial: str | None
    uri_attributes: dict[str, str]
    slot_id: int | None = None

    @property
    def is_named(self) -> bool:
        """Tell whether more than a slot number says which token it is."""
        return self.label is not None or self.serial is not None or bool(self.uri_attributes)

    def describe(self) -> str:
        """Return the choice in an operator's words."""
        parts = [f'"{self.label}"'] if self.label is not None else []
        parts += [f"serial {self.serial}"] if self.serial is not None else []
        parts += [f"slot-id {self.slot_id}"] if self.slot_id is not None else []
        return " ".join(["token", *parts])


class TokenSession:
    """A logged-in token.

    Attributes:
        token: the token.
        functions: functions of its module, None when they are not those that python-pkcs11 calls:
            p11-kit's client makes a list for each that asks, which knows nothing of others' sessions.
        device: label and serial, for messages.
        can_write: False when the token is write-protected.
    """

    def __init__(self, choice: TokenChoice) -> None:
        self._choice = choice
        self._library = _load(choice.module)
        self.functions = _functions_of(choice.module)
        self.token = _choose(self._library, choice)
        self.device = f"{self.token.label}/{serial_of(self.token)}"
        self._anchor: Session | None = None
        self._session: Session | None = None
        self.can_write = True
        self.is_pin_count_low = False
        self._read_write = True

    def words(self) -> list[str]:
        """Return what token, slot, library and module file call themselves."""
        token, slot, library = self.token, self.token.slot, self._library
        return [
            *(token.manufacturer_id, token.model, slot.manufacturer_id, slot.slot_description),
            *(library.manufacturer_id, library.library_description),
            PurePath(self._choice.module).name,
        ]

    def log_in(self, pin: str, *, read_write_only: bool = False) -> None:
        """Log in, once.

        Args:
            pin: the user PIN.
            read_write_only: the module has no read-only sessions, whatever the token's flags say.

        Raises:
            TokenError: the PIN was or may have been refused (cure OPERATOR), the token would be put
                at risk, or it is in no state to log in.
        """
        flags = self.token.flags
        if flags & TokenFlag.USER_PIN_LOCKED:
            raise self._operator("hsm.pin_locked", "user PIN locked; an operator must unlock it")
        if flags & TokenFlag.USER_PIN_FINAL_TRY:
            raise self._operator(
                "hsm.pin_final_try",
                "the next wrong PIN locks the token; log in once by hand to reset its counter",
            )
        self.is_pin_count_low = bool(flags & TokenFlag.USER_PIN_COUNT_LOW)
        self.can_write = not flags & TokenFlag.WRITE_PROTECTED
        self._read_write = self.can_write or read_write_only
        # Before the login, which is then the only thing left to fail in what follows.
        self._session = self._first_session()
        try:
            self._anchor = self.token.open(rw=self._read_write, user_pin=pin)
        except Exception as e:
            raise TokenError.of_login(e, self.device) from e
        self._session_state()

    def _first_session(self) -> Session:
        try:
            try:
                return self.token.open(rw=self._read_write)
            except (TokenWriteProtected, SessionReadOnly):
                # What is exported write-protected by p11-kit does not say so in its flags.
                self.can_write = self._read_write = False
                return self.token.open(rw=False)
        except SessionCount as e:
            raise TokenError(
                "token has no session left: CKR_SESSION_COUNT; close what else uses it, or have "
                "fewer workers",
                reason="hsm.session_count",
                operation="open session",
                device=self.device,
                code=ckr_of(e).value,
                cure=Cure.RESTART,
                kind=ErrorKind.UNAVAILABLE,
            ) from e
        except PKCS11Error as e:
            raise TokenError.of(e, "open session", self.device) from e

    def _operator(self, reason: str, message: str) -> TokenError:
        return TokenError(
            message,
            reason=reason,
            operation="login",
            device=self.device,
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    @property
    def session(self) -> Session:
        """Return the working session."""
        if self._session is None:
            raise TokenError(
                "no session is open",
                reason="hsm.no_session",
                operation="session",
                device=self.device,
                cure=Cure.RESTART,
                kind=ErrorKind.UNAVAILABLE,
            )
        return self._session

    @property
    def handle(self) -> int:
        """Return the working session's handle."""
        handle: int = self.session.handle  # type: ignore[attr-defined]  # missing in the stubs
        return handle

    def renew(self) -> None:
        """Throw the working session away and open another; the login stays with the anchor.

        Raises:
            TokenError: none can be opened, or the login is gone: the worker must be replaced.
        """
        old, self._session = self._session, None
        try:
            self._session = self._another(old)
        except PKCS11Error as e:
            raise self._lost("a new session cannot be opened") from e
        self.check_logged_in()

    def _another(self, old: Session | None) -> Session:
        try:
            opened = self.token.open(rw=self._read_write)
        except SessionCount:
            # No room for one more: the old one goes first, the anchor keeps the login.
            if old is not None:
                _close_quietly(old)
            return self.token.open(rw=self._read_write)
        if old is not None:
            _close_quietly(old)
        return opened

    def check_logged_in(self) -> None:
        """Ask the token whether this process is logged in.

        A token that is not lists public halves only, so nothing may be concluded from a listing
        before this was asked.

        Raises:
            TokenError: it is not; the worker must be replaced.
        """
        state = self._session_state()
        is_logged_in = self._takes_private_object() if state is None else state in _CKS_LOGGED_IN
        if not is_logged_in:
            raise self._lost("the session is not logged in")

    def _session_state(self) -> int | None:
        """Return the CKS state of the session, -1 when unknown, None when nobody can be asked."""
        if self.functions is None:
            return None
        try:
            return self.functions.session_state(self.handle)
        except CkrError as e:
            if e.code != _CKR_CRYPTOKI_NOT_INITIALIZED:
                return -1
        self.functions = None
        return None

    def _takes_private_object(self) -> bool:
        """Tell whether a private object may be made, which takes a login; it is gone at once."""
        wanted = {Attribute.CLASS: ObjectClass.DATA, Attribute.TOKEN: False}
        try:
            self.session.create_object({**wanted, Attribute.PRIVATE: True}).destroy()
        except PKCS11Error:
            return False
        return True

    def touch(self) -> None:
        """Have the device do something, so that it does not end a session that rests.

        Raises:
            TokenError: it cannot; the worker must be replaced.
        """
        try:
            self.session.generate_random(_TOUCH_BITS)
        except PKCS11Error as e:
            raise self._lost(f"the session ended: CKR_{ckr_of(e).name}") from e

    def _lost(self, message: str) -> TokenError:
        return TokenError(
            message,
            reason="hsm.session_lost",
            operation="session",
            device=self.device,
            cure=Cure.RESTART,
            kind=ErrorKind.UNAVAILABLE,
        )

    def mechanisms(self) -> list[int]:
        """Return the mechanism numbers the token lists."""
        try:
            return sorted(int(m) for m in self.token.slot.get_mechanisms())
        except PKCS11Error as e:
            raise TokenError.of(e, "list mechanisms", self.device) from e


def serial_of(token: Token) -> str:
    """Return a token's serial number as text, without padding."""
    return token.serial.decode("ascii", "replace").strip("\0 ")


def _load(module: str) -> Any:
    try:
        return pkcs11.lib(module)
    except PKCS11Error as e:
        text = str(e)
        named = (
            ("cannot open shared object", "pkcs11 module not found"),
            ("C_GetFunctionList", "not a PKCS#11 module"),
            ("OS exception", "not a shared library that can be loaded"),
        )
        reason = next((words for sign, words in named if sign in text), None)
        if reason is None:
            raise _uninitialised(module, e) from e
        raise TokenError(
            f"{reason}: {module}",
            reason="hsm.module",
            operation="load module",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        ) from e


def _uninitialised(module: str, error: PKCS11Error) -> TokenError:
    """Tell that a module does not find what it works with; it may do so later."""
    row = ckr_of(error)
    remedy = _remote(module) or _LOCAL
    if row.name == "CRYPTOKI_ALREADY_INITIALIZED":
        others = ", ".join(_loaded_modules(module)) or "a path that is not known"
        remedy = f"it was loaded before as {others}: name that one, or what it stands for"
    return TokenError(
        f"initialise module failed: CKR_{row.name} from {module}; {remedy}",
        reason=f"hsm.{row.name.lower()}",
        operation="initialise module",
        code=row.value,
        cure=Cure.RESTART,
        kind=ErrorKind.UNAVAILABLE if row.kind is ErrorKind.INTERNAL else row.kind,
    )


def _loaded_modules(module: str) -> list[str]:
    """Return other libraries in this process that show a PKCS#11 function list."""
    maps = Path("/proc/self/maps").read_text()
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if ".so" in line}
    found = []
    for path in sorted(paths - {module}):
        try:
            ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_LAZY).C_GetFunctionList  # noqa: B018 - is it there?
        except (OSError, AttributeError):
            continue
        found.append(path)
    return found


def _remote(module: str) -> str:
    """Return what to look at when a module that speaks to another host finds nothing."""
    if "p11-kit-client" not in PurePath(module).name:
        return ""
    return (
        "look at the far end (p11-kit server with its token) and at the tunnel or socket in between"
    )


def _remote_address() -> str:
    return os.environ.get("P11_KIT_SERVER_ADDRESS", "the default address")


def _choose(library: Any, choice: TokenChoice) -> Token:
    seen: list[Token] = []
    for slot in library.get_slots(token_present=True):
        try:
            seen.append(slot.get_token())
        except PKCS11Error:
            # One broken slot must not hide the others; a token that stays unseen is reported below.
            continue
    found = [t for t in seen if t.flags & TokenFlag.TOKEN_INITIALIZED and _matches(t, choice)]
    if choice.slot_id is not None and (len(found) > 1 or not choice.is_named):
        # Slots are numbered anew now and then: what a token is called goes first.
        found = [t for t in found if t.slot.slot_id == choice.slot_id]
    if len(found) == 1:
        return found[0]
    if found:
        serials = ", ".join(serial_of(t) for t in found)
        raise TokenError(
            f"{choice.describe()} is ambiguous: serials {serials}; set token_serial",
            reason="hsm.token_ambiguous",
            operation="find token",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )
    if not seen and (remote := _remote(choice.module)) and not library.get_slots():
        raise TokenError(
            f"p11-kit: no slots at {_remote_address()}; {remote}",
            reason="hsm.no_slots",
            operation="find token",
            cure=Cure.RESTART,
            kind=ErrorKind.UNAVAILABLE,
        )
    names = ", ".join(f'"{t.label}"' for t in seen if t.label) or "none"
    raise TokenError(
        f"{choice.describe()} not present; tokens seen: {names}. Connect it, or correct which "
        "token is meant",
        reason="hsm.token_missing",
        operation="find token",
        cure=Cure.RESTART,
        kind=ErrorKind.UNAVAILABLE,
    )


def _matches(token: Token, choice: TokenChoice) -> bool:
    slot = token.slot
    have = {
        "token": token.label,
        "serial": serial_of(token),
        "model": token.model,
        "manufacturer": token.manufacturer_id,
        "slot-description": slot.slot_description,
        "slot-manufacturer": slot.manufacturer_id,
    }
    want = dict(choice.uri_attributes)
    if choice.label is not None:
        want["token"] = choice.label
    if choice.serial is not None:
        want["serial"] = choice.serial
    return all(have.get(name, "").strip("\0 ") == value.strip() for name, value in want.items())


def _close_quietly(session: Session) -> None:
    try:
        session.close()
    except PKCS11Error:
        # It was given up because it failed; the token drops it with the process.
        return


def _functions_of(module: str) -> Functions | None:
    try:
        return Functions(module)
    except CkrError:
        return None

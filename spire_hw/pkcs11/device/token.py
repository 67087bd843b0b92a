"""One token in one worker process: log in, keep a session, notice when it is lost.

Runs in the worker only. Two sessions are open: an anchor that holds the login for ever, and a
working session that is thrown away after any failed operation, because a failure may leave the
operation active for good.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

from pkcs11 import PROTECTED_AUTH, Attribute, ObjectClass, Session, TokenFlag
from pkcs11.exceptions import PKCS11Error, SessionCount, SessionReadOnly, TokenWriteProtected

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.device.functions import CkrError, Functions
from spire_hw.pkcs11.device.slots import (
    TokenChoice,
    choose,
    load,
    mechanisms_of,
    serial_of,
)
from spire_hw.pkcs11.errors import Cure, TokenError, ckr_of
from spire_hw.pkcs11.memory import Memory

_CKS_LOGGED_IN: Final = frozenset({1, 3})  # CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS
_CKR_CRYPTOKI_NOT_INITIALIZED: Final = 0x190
_TOUCH_BITS: Final = 128


class TokenSession:
    """A logged-in token.

    Attributes:
        token: the token.
        functions: functions of its module, None when they are not those that python-pkcs11 calls:
            p11-kit's client makes a list for each that asks, which knows nothing of others' sessions.
        device: label and serial, for messages.
        can_write: False when the token is write-protected, or its user may not write.
    """

    def __init__(self, choice: TokenChoice) -> None:
        self._choice = choice
        self._library = load(choice.module)
        self.functions = _functions_of(choice.module)
        self.token = choose(self._library, choice)
        self.device = f"{self.token.label}/{serial_of(self.token)}"
        self._anchor: Session | None = None
        self._session: Session | None = None
        self.can_write = True
        self.is_pin_count_low = False
        self._read_write = True
        self._reopened = 0

    @property
    def name(self) -> str:
        """Return what tells the token from others, by whatever module it is reached."""
        token = self.token
        parts = (token.manufacturer_id, token.model, serial_of(token), token.label)
        return "\0".join(part.strip("\0 ") for part in parts)

    def words(self) -> list[str]:
        """Return what token, slot, library and module file call themselves."""
        token, slot, library = self.token, self.token.slot, self._library
        return [
            *(token.manufacturer_id, token.model, slot.manufacturer_id, slot.slot_description),
            *(library.manufacturer_id, library.library_description),
            PurePath(self._choice.module).name,
        ]

    def log_in(
        self, pin: str | None, *, read_write_only: bool = False, crypto_user: int | None = None
    ) -> None:
        """Log in, once.

        Args:
            pin: the user PIN, None to have the device ask for it.
            read_write_only: the module has no read-only sessions, whatever the token's flags say.
            crypto_user: CKU number of a user who may write nothing, None for the token's user.

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
        if pin is None and not flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            raise self._operator(
                "hsm.no_protected_login",
                "token has no key pad or reader of its own (CKF_PROTECTED_AUTHENTICATION_PATH); put "
                "pin_file in place of protected_login",
            )
        self.is_pin_count_low = bool(flags & TokenFlag.USER_PIN_COUNT_LOW)
        self.can_write = crypto_user is None and not flags & TokenFlag.WRITE_PROTECTED
        self._read_write = self.can_write or read_write_only
        # Before the login, which is then the only thing left to fail in what follows.
        self._session = self._first_session()
        try:
            given = PROTECTED_AUTH if pin is None else pin
            self._anchor = self.token.open(
                rw=self._read_write,
                user_pin=given,
                user_type=crypto_user,  # type: ignore[arg-type]  # any number goes
            )
        except Exception as e:
            raise TokenError.of_login(e, self.device, by_hand=pin is None) from e
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
        self._reopened += 1
        self.check_logged_in()

    def take_reopened(self) -> int:
        """Return how often a session was thrown away since this was asked last."""
        reopened, self._reopened = self._reopened, 0
        return reopened

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

    def memory(self) -> Memory:
        """Return how much room the token says that it has now."""
        if self.functions is None:
            return Memory()
        try:
            return self.functions.memory(self.token.slot.slot_id)
        except CkrError:
            return Memory()

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

    def mechanisms(self) -> tuple[list[int], dict[int, int]]:
        """Return mechanisms and lengths of keys, see `spire_hw.pkcs11.device.slots.mechanisms_of`."""
        try:
            return mechanisms_of(self.token.slot)
        except PKCS11Error as e:
            raise TokenError.of(e, "list mechanisms", self.device) from e


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

"""What a token's refusal means: CKR code, what cures it, what the caller is told.

python-pkcs11 keeps no return codes, only exception classes (and a text for those it has no class
for), so the table is by class name; that also keeps this module free of the library.

Spec: PKCS #11 v2.40 section 11.1 (return values).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from spire_hw.errors import DeviceError, ErrorKind
from spire_hw.pkcs11.remedies import remedy_of


class Cure(Enum):
    """What may make the same call succeed."""

    NONE = "none"
    SESSION = "session"
    KEY = "key"
    RESTART = "restart"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Ckr:
    """One return code.

    Attributes:
        name: without the `CKR_` in front.
        value: number; 0 when the library hides it.
        cure: what to try.
        kind: what the caller is told when it persists.
    """

    name: str
    value: int
    cure: Cure
    kind: ErrorKind

    @property
    def text(self) -> str:
        """Return name and number for messages."""
        if not self.value or self.name.startswith("0x"):
            return f"CKR_{self.name}" if self.value else self.name
        return f"CKR_{self.name} (0x{self.value:02x})"


_AWAY: Final = (Cure.RESTART, ErrorKind.UNAVAILABLE)
_PIN: Final = (Cure.OPERATOR, ErrorKind.FAILED_PRECONDITION)
_STATE: Final = (Cure.NONE, ErrorKind.FAILED_PRECONDITION)
_FULL: Final = (Cure.NONE, ErrorKind.RESOURCE_EXHAUSTED)
_INTERNAL: Final = (Cure.NONE, ErrorKind.INTERNAL)

_BY_CLASS: Final[dict[str, Ckr]] = {
    class_name: Ckr(name, value, *meaning)
    for class_name, name, value, meaning in (
        ("HostMemory", "HOST_MEMORY", 0x02, _FULL),
        ("SlotIDInvalid", "SLOT_ID_INVALID", 0x03, _AWAY),
        ("GeneralError", "GENERAL_ERROR", 0x05, _AWAY),
        ("FunctionFailed", "FUNCTION_FAILED", 0x06, _AWAY),
        ("ArgumentsBad", "ARGUMENTS_BAD", 0x07, _INTERNAL),
        ("AttributeReadOnly", "ATTRIBUTE_READ_ONLY", 0x10, _STATE),
        ("AttributeSensitive", "ATTRIBUTE_SENSITIVE", 0x11, _STATE),
        ("AttributeTypeInvalid", "ATTRIBUTE_TYPE_INVALID", 0x12, _STATE),
        ("AttributeValueInvalid", "ATTRIBUTE_VALUE_INVALID", 0x13, _STATE),
        ("DataInvalid", "DATA_INVALID", 0x20, _STATE),
        ("DataLenRange", "DATA_LEN_RANGE", 0x21, _STATE),
        ("DeviceError", "DEVICE_ERROR", 0x30, _AWAY),
        ("DeviceMemory", "DEVICE_MEMORY", 0x31, _FULL),
        ("DeviceRemoved", "DEVICE_REMOVED", 0x32, _AWAY),
        ("FunctionCancelled", "FUNCTION_CANCELED", 0x50, _AWAY),
        (
            "FunctionNotSupported",
            "FUNCTION_NOT_SUPPORTED",
            0x54,
            (Cure.NONE, ErrorKind.UNIMPLEMENTED),
        ),
        ("KeyHandleInvalid", "KEY_HANDLE_INVALID", 0x60, (Cure.KEY, ErrorKind.UNAVAILABLE)),
        ("KeySizeRange", "KEY_SIZE_RANGE", 0x62, _STATE),
        ("KeyTypeInconsistent", "KEY_TYPE_INCONSISTENT", 0x63, _STATE),
        ("MechanismInvalid", "MECHANISM_INVALID", 0x70, _STATE),
        ("MechanismParamInvalid", "MECHANISM_PARAM_INVALID", 0x71, _STATE),
        ("ObjectHandleInvalid", "OBJECT_HANDLE_INVALID", 0x82, (Cure.KEY, ErrorKind.UNAVAILABLE)),
        ("OperationActive", "OPERATION_ACTIVE", 0x90, (Cure.SESSION, ErrorKind.UNAVAILABLE)),
        (
            "OperationNotInitialized",
            "OPERATION_NOT_INITIALIZED",
            0x91,
            (Cure.SESSION, ErrorKind.UNAVAILABLE),
        ),
        ("PinIncorrect", "PIN_INCORRECT", 0xA0, _PIN),
        ("PinInvalid", "PIN_INVALID", 0xA1, _PIN),
        ("PinLenRange", "PIN_LEN_RANGE", 0xA2, _PIN),
        ("PinExpired", "PIN_EXPIRED", 0xA3, _PIN),
        ("PinLocked", "PIN_LOCKED", 0xA4, _PIN),
        ("SessionClosed", "SESSION_CLOSED", 0xB0, (Cure.SESSION, ErrorKind.UNAVAILABLE)),
        ("SessionCount", "SESSION_COUNT", 0xB1, (Cure.NONE, ErrorKind.RESOURCE_EXHAUSTED)),
        (
            "SessionHandleInvalid",
            "SESSION_HANDLE_INVALID",
            0xB3,
            (Cure.SESSION, ErrorKind.UNAVAILABLE),
        ),
        ("SessionReadOnly", "SESSION_READ_ONLY", 0xB5, _STATE),
        ("SessionReadOnlyExists", "SESSION_READ_ONLY_EXISTS", 0xB7, _AWAY),
        ("SessionReadWriteSOExists", "SESSION_READ_WRITE_SO_EXISTS", 0xB8, _AWAY),
        ("TemplateIncomplete", "TEMPLATE_INCOMPLETE", 0xD0, _STATE),
        ("TemplateInconsistent", "TEMPLATE_INCONSISTENT", 0xD1, _STATE),
        ("TokenNotPresent", "TOKEN_NOT_PRESENT", 0xE0, _AWAY),
        ("TokenNotRecognised", "TOKEN_NOT_RECOGNIZED", 0xE1, _AWAY),
        ("TokenWriteProtected", "TOKEN_WRITE_PROTECTED", 0xE2, _STATE),
        ("UserAlreadyLoggedIn", "USER_ALREADY_LOGGED_IN", 0x100, _AWAY),
        ("UserNotLoggedIn", "USER_NOT_LOGGED_IN", 0x101, _AWAY),
        ("UserPinNotInitialized", "USER_PIN_NOT_INITIALIZED", 0x102, _PIN),
        ("AnotherUserAlreadyLoggedIn", "USER_ANOTHER_ALREADY_LOGGED_IN", 0x104, _AWAY),
        ("UserTooManyTypes", "USER_TOO_MANY_TYPES", 0x105, _AWAY),
        ("NoSuchToken", "TOKEN_NOT_PRESENT", 0xE0, _AWAY),
    )
}
_BY_VALUE: Final[dict[int, Ckr]] = {
    0x1B: Ckr("ACTION_PROHIBITED", 0x1B, *_STATE),
    0x68: Ckr("KEY_FUNCTION_NOT_PERMITTED", 0x68, *_STATE),
    0x190: Ckr("CRYPTOKI_NOT_INITIALIZED", 0x190, *_AWAY),
    0x191: Ckr("CRYPTOKI_ALREADY_INITIALIZED", 0x191, *_STATE),
} | {row.value: row for row in _BY_CLASS.values()}
# What C_Login answers for other reasons than the PIN: device, session or user are in a wrong state.
_BEFORE_PIN: Final = frozenset(
    {
        *("CRYPTOKI_NOT_INITIALIZED", "HOST_MEMORY", "FUNCTION_CANCELED", "OPERATION_ACTIVE"),
        *("DEVICE_ERROR", "DEVICE_MEMORY", "DEVICE_REMOVED", "SLOT_ID_INVALID"),
        *("SESSION_CLOSED", "SESSION_COUNT", "SESSION_HANDLE_INVALID", "SESSION_READ_ONLY_EXISTS"),
        *("SESSION_READ_WRITE_SO_EXISTS", "TOKEN_NOT_PRESENT", "TOKEN_NOT_RECOGNIZED"),
        *("TOKEN_WRITE_PROTECTED", "USER_ALREADY_LOGGED_IN", "USER_ANOTHER_ALREADY_LOGGED_IN"),
        "USER_TOO_MANY_TYPES",
    }
)
# SoftHSM says so when it cannot read the token just now, others may when the PIN is wrong.
_UNCLEAR: Final = frozenset({"GENERAL_ERROR", "FUNCTION_FAILED"})
# With a PIN entered at the device: nobody did, or somebody pressed cancel.
_BY_HAND: Final = frozenset({"FUNCTION_CANCELED"})
# Refusals that are not about this PIN being wrong.
_REFUSED_WORDS: Final = {
    "PIN_LOCKED": "user PIN locked: {code} says token {device}; an operator must unlock it, no login "
    "is tried before the PIN's source changes",
    "PIN_EXPIRED": "user PIN expired: {code} says token {device}; set a new one with the token's own "
    "tool and put it at its source",
    "USER_PIN_NOT_INITIALIZED": "token {device} has no user PIN yet ({code}); have its security "
    "officer set one and put it at its source",
}
_LOGIN_REFUSED: Final = "hsm.login_refused"
_UNMAPPED = re.compile(r"0x([0-9a-fA-F]{1,16})")
_VENDOR_DEFINED: Final = 0x80000000


def ckr_of(error: BaseException) -> Ckr:
    """Return what an exception raised by python-pkcs11 stands for.

    Anything that is no PKCS#11 error (the library raises ValueError, AttributeError and
    NotImplementedError on odd tokens) is reported as INTERNAL with value 0.
    """
    for known in type(error).__mro__:
        row = _BY_CLASS.get(known.__name__)
        if row is not None:
            return row
    text = str(error)
    if "not initialized" in text:
        return _BY_VALUE[0x190]
    if "already initialized" in text:
        return _BY_VALUE[0x191]
    number = _UNMAPPED.search(text)
    if number is None:
        return Ckr(type(error).__name__, 0, *_INTERNAL)
    return _row_of(int(number.group(1), 16))


def _row_of(value: int) -> Ckr:
    cure = Cure.RESTART if value >= _VENDOR_DEFINED else Cure.NONE
    return _BY_VALUE.get(value, Ckr(f"0x{value:x}", value, cure, ErrorKind.INTERNAL))


class TokenError(DeviceError):
    """A token, its module or the worker that holds it refused an operation.

    Attributes:
        reason: stable code for logs and counters, such as `hsm.token_missing`.
        cure: what may help; RESTART errors are also `retryable`.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        operation: str,
        device: str = "",
        code: int = 0,
        cure: Cure = Cure.NONE,
        kind: ErrorKind = ErrorKind.INTERNAL,
    ) -> None:
        super().__init__(
            message,
            device=device,
            operation=operation,
            code=code,
            retryable=cure in {Cure.SESSION, Cure.KEY, Cure.RESTART},
            kind=kind,
        )
        self.reason = reason
        self.cure = cure

    @classmethod
    def of(cls, error: BaseException, operation: str, device: str = "") -> TokenError:
        """Translate an exception of python-pkcs11; its own text is not repeated."""
        if isinstance(error, TokenError):
            return error
        return cls._of_row(ckr_of(error), operation, device)

    @classmethod
    def of_code(cls, code: int, operation: str, device: str = "") -> TokenError:
        """Translate a return code."""
        return cls._of_row(_row_of(code), operation, device)

    @classmethod
    def _of_row(cls, row: Ckr, operation: str, device: str) -> TokenError:
        place = f"token {device}: " if device else ""
        remedy = remedy_of(row.name, row.value, operation)
        return cls(
            f"{place}{operation} failed: {row.text}; {remedy}",
            reason=f"hsm.{row.name.lower()}",
            operation=operation,
            device=device,
            code=row.value,
            cure=row.cure,
            kind=row.kind,
        )

    @classmethod
    def of_login(cls, error: BaseException, device: str, *, by_hand: bool = False) -> TokenError:
        """Translate what came of sending a PIN, or of having it entered at the device.

        Many tokens count wrong PINs and some have codes of their own for them. So a code that does
        not name another cause is a refusal, cured by an operator and not by trying again.
        """
        row = ckr_of(error)
        passing = (_BEFORE_PIN | _UNCLEAR) - (_BY_HAND if by_hand else frozenset())
        if row.cure is not Cure.OPERATOR and row.name in passing:
            return cls.of(error, "login", device)
        code = row.text
        is_plain = row.cure is Cure.OPERATOR
        message = _REFUSED_WORDS.get(
            row.name,
            "PIN refused: {code} says token {device}; correct the PIN at its source, the refused "
            "one will not be tried again",
        ).format(code=code, device=device)
        if not is_plain:
            message = (
                f"login refused: {code} says token {device}, which may have counted it as a wrong "
                "PIN; this PIN will not be tried again: correct it at its source or, if it is right, "
                "see to the token and restart"
            )
        if by_hand:
            message = (
                f"login at the device failed: {code} says token {device}, which may count it; nobody "
                "is asked again: see to the token, then restart"
            )
        return cls(
            message,
            reason=f"hsm.{row.name.lower()}" if is_plain else _LOGIN_REFUSED,
            operation="login",
            device=device,
            code=row.value,
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    def about_key(self, key_id: str, device: str) -> TokenError:
        """Return the same error with key and token in front of its message, as they are once.

        Args:
            key_id: which key was to be used or made.
            device: label and serial number of the token.
        """
        if self.message.startswith('key "'):
            return self
        text = self.message.removeprefix(f"token {device}: ")
        return TokenError(
            f'key "{key_id}" on token {device}: {text}',
            reason=self.reason,
            operation=self.operation,
            device=device,
            code=self.code,
            cure=self.cure,
            kind=self.kind,
        )

    @property
    def is_pin_refusal(self) -> bool:
        """Tell whether the token was given a PIN and did not take it."""
        # Flags that forbid a login have a reason of their own and no code: no PIN was sent.
        was_sent = self.code != 0 or self.reason == _LOGIN_REFUSED
        return self.operation == "login" and self.cure is Cure.OPERATOR and was_sent

    @property
    def may_be_pin_refusal(self) -> bool:
        """Tell whether the token was given a PIN and does not say what it did not like."""
        return self.operation == "login" and self.reason in {f"hsm.{n.lower()}" for n in _UNCLEAR}

    def to_dict(self) -> dict[str, str | int]:
        """Return the fields that travel from a worker to its host."""
        return {
            "message": self.message,
            "reason": self.reason,
            "operation": self.operation,
            "device": self.device,
            "code": self.code,
            "cure": self.cure.value,
            "kind": self.kind.value,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, object]) -> TokenError:
        """Rebuild what `to_dict` gave.

        Raises:
            ValueError: fields are missing or of the wrong type.
        """
        code, kind = fields.get("code"), fields.get("kind")
        if not isinstance(code, int) or not isinstance(kind, int):
            raise ValueError("error without code or kind")  # noqa: TRY004 - one type for the caller
        texts = {n: str(fields.get(n, "")) for n in ("message", "reason", "operation", "device")}
        return cls(**texts, code=code, cure=Cure(str(fields.get("cure"))), kind=ErrorKind(kind))

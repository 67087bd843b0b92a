from __future__ import annotations

import pytest
from pkcs11 import exceptions

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import Cure, TokenError, ckr_of


@pytest.mark.parametrize(
    ("error", "name", "cure", "kind"),
    [
        (
            exceptions.SessionHandleInvalid(),
            "SESSION_HANDLE_INVALID",
            Cure.SESSION,
            ErrorKind.UNAVAILABLE,
        ),
        (
            exceptions.ObjectHandleInvalid(),
            "OBJECT_HANDLE_INVALID",
            Cure.KEY,
            ErrorKind.UNAVAILABLE,
        ),
        (exceptions.UserNotLoggedIn(), "USER_NOT_LOGGED_IN", Cure.RESTART, ErrorKind.UNAVAILABLE),
        (exceptions.DeviceError(), "DEVICE_ERROR", Cure.RESTART, ErrorKind.UNAVAILABLE),
        (exceptions.PinIncorrect(), "PIN_INCORRECT", Cure.OPERATOR, ErrorKind.FAILED_PRECONDITION),
        (exceptions.PinLocked(), "PIN_LOCKED", Cure.OPERATOR, ErrorKind.FAILED_PRECONDITION),
        (exceptions.DeviceMemory(), "DEVICE_MEMORY", Cure.NONE, ErrorKind.RESOURCE_EXHAUSTED),
        (
            exceptions.TokenWriteProtected(),
            "TOKEN_WRITE_PROTECTED",
            Cure.NONE,
            ErrorKind.FAILED_PRECONDITION,
        ),
        (
            exceptions.MechanismInvalid(),
            "MECHANISM_INVALID",
            Cure.NONE,
            ErrorKind.FAILED_PRECONDITION,
        ),
        (
            exceptions.PKCS11Error("Unmapped error code 0x1b"),
            "ACTION_PROHIBITED",
            Cure.NONE,
            ErrorKind.FAILED_PRECONDITION,
        ),
        (
            exceptions.PKCS11Error("Unmapped error code 0x80000001"),
            "0x80000001",
            Cure.RESTART,
            ErrorKind.INTERNAL,
        ),
        (
            exceptions.PKCS11Error("Initialisation error (not initialized)"),
            "CRYPTOKI_NOT_INITIALIZED",
            Cure.RESTART,
            ErrorKind.UNAVAILABLE,
        ),
        (ValueError("x"), "ValueError", Cure.NONE, ErrorKind.INTERNAL),
    ],
)
def test_section_7_table(error: Exception, name: str, cure: Cure, kind: ErrorKind) -> None:
    row = ckr_of(error)
    assert (row.name, row.cure, row.kind) == (name, cure, kind)
    made = TokenError.of(error, "sign", "token/1")
    again = TokenError.from_dict(dict(made.to_dict()))
    assert again.to_dict() == made.to_dict()
    assert made.device == "token/1"


def test_every_exception_of_the_library_is_known_or_internal() -> None:
    for value in vars(exceptions).values():
        if isinstance(value, type) and issubclass(value, exceptions.PKCS11Error):
            assert ckr_of(value()).kind in ErrorKind


def test_a_login_that_names_no_other_cause_is_a_refusal() -> None:
    unclear = {"GeneralError", "FunctionFailed"}
    states = {"TokenNotPresent", "DeviceRemoved", "DeviceError", "SessionCount", "HostMemory"}
    states |= {"UserAlreadyLoggedIn", "AnotherUserAlreadyLoggedIn", "SessionReadWriteSOExists"}
    for name in unclear | states:
        error = TokenError.of_login(getattr(exceptions, name)(), "token/1")
        assert not error.is_pin_refusal
        assert error.may_be_pin_refusal == (name in unclear)
        assert error.operation == "login"
    refusals: list[Exception] = [ValueError("odd"), exceptions.PKCS11Error("no number")]
    refusals += [exceptions.PKCS11Error(f"Unmapped error code {c}") for c in ("0x80000001", "0x1b")]
    refusals += [exceptions.ArgumentsBad(), exceptions.DataInvalid(), exceptions.PinIncorrect()]
    for cause in refusals:
        error = TokenError.from_dict(dict(TokenError.of_login(cause, "token/1").to_dict()))
        assert error.is_pin_refusal
        assert error.kind is ErrorKind.FAILED_PRECONDITION
        assert error.cure is Cure.OPERATOR
    assert not TokenError.of(exceptions.PinIncorrect(), "find key").is_pin_refusal

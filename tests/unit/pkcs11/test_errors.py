from __future__ import annotations

import re

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


STEPS = ["sign", "generate key pair", "list objects", "destroy key pair", "write data object"]
FALLBACK = "look the code up in its maker's documentation"


@pytest.mark.parametrize("step", [*STEPS, "open session", "login"])
def test_every_code_is_told_with_token_step_name_number_and_remedy(step: str) -> None:
    classes = [v for v in vars(exceptions).values() if isinstance(v, type)]
    raised = [c() for c in classes if issubclass(c, exceptions.PKCS11Error)]
    rows = {ckr_of(error) for error in raised} - {ckr_of(exceptions.PKCS11Error())}
    rows = {row for row in rows if row.value}
    named = {row.name for row in rows} | {"ACTION_PROHIBITED", "KEY_FUNCTION_NOT_PERMITTED"}
    named |= {"CRYPTOKI_NOT_INITIALIZED", "CRYPTOKI_ALREADY_INITIALIZED"}
    told = {}
    for code in range(1, 0x200):
        error = TokenError.of_code(code, step, "a; b/1")
        found = re.fullmatch(
            rf"token a; b/1: {step} failed: CKR_([A-Z_]+) \(0x([0-9a-f]+)\); (\S.*)", error.message
        )
        if found is not None:
            assert int(found[2], 16) == code == error.code
            assert found[3] != FALLBACK
            told[found[1]] = error
        else:
            assert error.message == f"token a; b/1: {step} failed: CKR_0x{code:x}; {FALLBACK}"
    assert set(told) == named
    assert all(row.text in told[row.name].message for row in rows)
    odd = TokenError.of(AttributeError("x"), step, "a; b/1")
    assert odd.message.startswith(f"token a; b/1: {step} failed: AttributeError; ")


def test_a_code_that_means_something_else_at_a_step_has_another_remedy() -> None:
    def remedy(code: int, step: str) -> str:
        return TokenError.of_code(code, step).message.partition("; ")[2]

    assert remedy(0x31, "generate key pair") == "the token is full: make room on it"
    assert "full" not in remedy(0x31, "sign")
    assert "CKA_SIGN" in remedy(0x1B, "sign")
    assert "CKA_DESTROYABLE" in remedy(0x1B, "destroy key pair")
    assert "import it" in remedy(0x54, "generate key pair")


def test_the_key_is_named_once_and_nothing_else_of_an_error_changes() -> None:
    error = TokenError.of_code(0x54, "sign", "token/1")
    told = error.about_key("x", "token/1")
    assert told.message.startswith(
        'key "x" on token token/1: sign failed: CKR_FUNCTION_NOT_SUPPORTED'
    )
    assert {**told.to_dict(), "message": ""} == {**error.to_dict(), "message": ""}
    assert told.about_key("x", "token/1") is told
    worker = TokenError("hsm worker died", reason="hsm.worker_died", operation="run")
    assert worker.about_key("x", "token/1").message == 'key "x" on token token/1: hsm worker died'


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

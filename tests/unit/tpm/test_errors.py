from __future__ import annotations

import pytest

from spire_hw.errors import ErrorKind
from spire_hw.tpm.errors import (
    STALE,
    TRANSIENT,
    Decoded,
    Rc,
    TpmError,
    decode,
    is_transport_failure,
)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0x101, Decoded("TPM", 0x101, "TPM_RC_FAILURE", "")),
        (0x18B, Decoded("TPM", 0x08B, "TPM_RC_HANDLE", "handle 1")),
        (0x1C4, Decoded("TPM", 0x084, "TPM_RC_VALUE", "parameter 1")),
        (0x2C4, Decoded("TPM", 0x084, "TPM_RC_VALUE", "parameter 2")),
        (0x2E7, Decoded("TPM", 0x0A7, "TPM_RC_ECC_POINT", "parameter 2")),
        (0x1DF, Decoded("TPM", 0x09F, "TPM_RC_INTEGRITY", "parameter 1")),
        (0x98E, Decoded("TPM", 0x08E, "TPM_RC_AUTH_FAIL", "session 1")),
        (0x9A2, Decoded("TPM", 0x0A2, "TPM_RC_BAD_AUTH", "session 1")),
        (0xA9D, Decoded("TPM", 0x09D, "TPM_RC_POLICY_FAIL", "session 2")),
        (0x902, Decoded("TPM", 0x902, "TPM_RC_OBJECT_MEMORY", "")),
        (0xB0902, Decoded("TPM", 0x902, "TPM_RC_OBJECT_MEMORY", "")),
        (0x921, Decoded("TPM", 0x921, "TPM_RC_LOCKOUT", "")),
        (0x128, Decoded("TPM", 0x128, "TPM_RC_PCR_CHANGED", "")),
        (0x7FF, Decoded("TPM", 0x0BF, "0xbf", "parameter 7")),
        (0x70007, Decoded("ESYS", 0x7, "0x70007", "")),
        (0xA000A, Decoded("TCTI", 0xA, "0xa000a", "")),
        (0x550001, Decoded("layer 85", 0x1, "0x550001", "")),
    ],
)
def test_a_code_is_taken_apart(code: int, expected: Decoded) -> None:
    assert decode(code) == expected


def test_every_number_decodes_and_every_error_has_words() -> None:
    for code in range(0x1000):
        error = TpmError(code, device="tpm", operation="do")
        assert error.message.startswith("do: TPM answered ")
        assert error.code == code


def test_what_passes_by_itself_is_retryable_and_unavailable() -> None:
    for rc in (*TRANSIENT, Rc.OBJECT_MEMORY, Rc.LOCKOUT):
        error = TpmError(rc, device="tpm", operation="do")
        assert error.retryable
        assert error.kind is ErrorKind.UNAVAILABLE


def test_a_wrong_password_is_never_retried() -> None:
    for code in (0x98E, 0x9A2):
        assert not TpmError(code, device="tpm", operation="do").retryable


def test_a_hint_of_the_caller_replaces_the_general_one() -> None:
    error = TpmError(0x1DF, device="tpm", operation="load", hint="wrong file")
    assert error.message == "load: TPM answered TPM_RC_INTEGRITY (parameter 1): wrong file"
    assert error.is_any(STALE)


def test_a_code_of_the_software_stack_is_never_taken_for_one_of_the_tpm() -> None:
    error = TpmError(0x70000 | Rc.RETRY, device="tpm", operation="do")
    assert not error.is_any(TRANSIENT)
    assert error.kind is ErrorKind.INTERNAL
    assert is_transport_failure(0xA000A)
    assert not is_transport_failure(0x902)

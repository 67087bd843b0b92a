"""Is this the right token, and can it do what is asked of it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.errors import ErrorKind
from spire_hw.key import KeyType
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.keys import CKM_RSA_PKCS_PSS, MECHANISM_NAMES, mechanisms_for

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.log import Logger
    from spire_hw.pkcs11.policy import Policy
    from spire_hw.pkcs11.seat import TokenFacts
    from spire_hw.pkcs11.state import State


def check_mechanisms(facts: TokenFacts, policy: Policy, log: Logger) -> None:
    """Refuse a token that lacks what the allowed key types need.

    Where the operator named no key types, one that works is enough.

    Raises:
        TokenError: FAILED_PRECONDITION, names the mechanisms.
    """
    wanted = policy.key_types
    usable = [t for t in wanted if not _lacking(t, facts)]
    if not usable or (wanted != frozenset(KeyType) and len(usable) < len(wanted)):
        for key_type in sorted(wanted, key=lambda t: t.value):
            check_type(key_type, facts)
    if CKM_RSA_PKCS_PSS not in facts.mechanisms:
        log.warning("hsm.no_pss", hsm=facts.device)


def check_type(key_type: KeyType, facts: TokenFacts) -> None:
    """Refuse a key type that the token has no mechanisms for.

    Raises:
        TokenError: FAILED_PRECONDITION, names them.
    """
    lacking = _lacking(key_type, facts)
    if lacking:
        raise TokenError(
            f"token lacks {mechanism_text(lacking)} needed for {key_type.config_name}",
            reason="hsm.mechanism_missing",
            operation="check mechanisms",
            device=facts.device,
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )


def check_writable(facts: TokenFacts) -> None:
    """Refuse to generate on a token that cannot be written to.

    Raises:
        TokenError: FAILED_PRECONDITION.
    """
    if not facts.can_write:
        raise TokenError(
            "token is read-only: keys cannot be generated",
            reason="hsm.read_only",
            operation="generate key pair",
            device=facts.device,
            kind=ErrorKind.FAILED_PRECONDITION,
        )


def check_token(facts: TokenFacts, state: State, policy: Policy) -> None:
    """Refuse a token that is not the one this host knows.

    Raises:
        TokenError: FAILED_PRECONDITION, names both serial numbers.
    """
    known = state.token_serial
    if known in {"", facts.serial} or policy.accept_token == facts.serial:
        return
    raise TokenError(
        f"token serial changed: found {facts.serial}, expected {known}; "
        f'set accept_token = "{facts.serial}" if that is meant',
        reason="hsm.token_changed",
        operation="open token",
        device=facts.device,
        cure=Cure.OPERATOR,
        kind=ErrorKind.FAILED_PRECONDITION,
    )


def mechanism_text(mechanisms: Iterable[int]) -> str:
    """Return mechanism names for a message."""
    return ", ".join(MECHANISM_NAMES.get(m, f"0x{m:x}") for m in mechanisms)


def _lacking(key_type: KeyType, facts: TokenFacts) -> list[int]:
    return [m for m in mechanisms_for(key_type) if m not in facts.mechanisms]

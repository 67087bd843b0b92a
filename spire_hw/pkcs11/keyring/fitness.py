"""Is this the right token, and can it do what is asked of it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.errors import ErrorKind, InvalidInputError
from spire_hw.key import KeyType
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.keys import (
    CKM_RSA_PKCS_PSS,
    MECHANISM_NAMES,
    is_ec,
    key_bits,
    mechanisms_for,
    modulus_bits,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.key import SignOptions
    from spire_hw.log import Logger
    from spire_hw.pkcs11.keyring.policy import Policy
    from spire_hw.pkcs11.keyring.state import State
    from spire_hw.pkcs11.pool.seat import TokenFacts


def check_mechanisms(facts: TokenFacts, policy: Policy, log: Logger) -> None:
    """Refuse a token that lacks what the allowed key types need.

    Where the operator named no key types, one that works is enough.

    Raises:
        TokenError: FAILED_PRECONDITION, names the mechanisms.
    """
    wanted = policy.key_types
    usable = [t for t in wanted if not _unfit(t, facts)]
    if not usable or (wanted != frozenset(KeyType) and len(usable) < len(wanted)):
        for key_type in sorted(wanted, key=lambda t: t.value):
            check_type(key_type, facts)
    if CKM_RSA_PKCS_PSS not in facts.mechanisms:
        log.warning("hsm.no_pss", hsm=facts.device)


def warn_of_pin(facts: TokenFacts, log: Logger) -> None:
    """Tell that somebody gave the token wrong PINs: the next ones may lock it."""
    if facts.is_pin_count_low:
        log.warning(
            "hsm.pin_count_low",
            hsm=facts.device,
            remedy="find out who gave it a wrong PIN; some more lock it",
        )


def check_type(key_type: KeyType, facts: TokenFacts) -> None:
    """Refuse a key type that the token has no mechanisms for, or that is too long for it.

    Raises:
        TokenError: FAILED_PRECONDITION, says which.
    """
    unfit = _unfit(key_type, facts)
    if unfit:
        raise TokenError(
            unfit,
            reason="hsm.mechanism_missing",
            operation="check mechanisms",
            device=facts.device,
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )


def check_pss(options: SignOptions, facts: TokenFacts) -> None:
    """Refuse a PSS signature that the token cannot make.

    It is not asked first: a refused salt leaves the key of some tokens busy for good.

    Raises:
        InvalidInputError: no such mechanism, or no such salt.
    """
    if CKM_RSA_PKCS_PSS not in facts.mechanisms:
        raise InvalidInputError("token lacks CKM_RSA_PKCS_PSS")
    if facts.profile.pss_salts == "hash" and options.salt_bytes != options.hash.digest_size:
        raise InvalidInputError(
            f"salt length {options.salt_length} not supported by token: it takes the hash's only"
        )


def check_writable(facts: TokenFacts) -> None:
    """Refuse to generate on a token that cannot be written to.

    Raises:
        TokenError: FAILED_PRECONDITION.
    """
    if not facts.can_write:
        raise TokenError(
            "token is read-only: keys cannot be generated; lift its write protection, or, where "
            "login_as is crypto-user, make keys as its user",
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


def _unfit(key_type: KeyType, facts: TokenFacts) -> str:
    profile = facts.profile
    generate, sign = mechanisms_for(key_type)
    if not is_ec(key_type):
        generate = profile.rsa_mechanism
        if modulus_bits(key_type) > profile.max_rsa_bits:
            return (
                f"token (profile {profile.name}) makes no {key_type.config_name} keys: RSA ends at "
                f"{profile.max_rsa_bits} bits; choose another key type"
            )
    lacking = [m for m in (generate, sign) if m not in facts.mechanisms]
    if lacking:
        return f"token lacks {mechanism_text(lacking)} needed for {key_type.config_name}"
    for mechanism in (generate, sign):
        most = facts.longest.get(mechanism)
        if most is not None and most < key_bits(key_type):
            return (
                f"token makes no {key_type.config_name} keys: its {mechanism_text([mechanism])} ends "
                f"at {most} bits; choose another key type"
            )
    return ""

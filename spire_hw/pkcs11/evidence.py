"""What a private key's attributes prove about where it was made and what may be done with it.

Values in, values out. These are the device's own words; nothing here talks to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.keys import MECHANISM_NAMES, is_ec, mechanisms_for
from spire_hw.pkcs11.profile import RSA_KEY_GEN, USAGES, Profile

if TYPE_CHECKING:
    from spire_hw.key import KeyType

Evidence = Mapping[str, bool | int | None]
# What a private key has to prove (PKCS #11 v2.40 section 4.9): made here, never readable.
_REQUIRED: Final = {
    "TOKEN": True,
    "LOCAL": True,
    "SENSITIVE": True,
    "ALWAYS_SENSITIVE": True,
    "EXTRACTABLE": False,
    "NEVER_EXTRACTABLE": True,
    "SIGN": True,
}

_USES: Final = (
    "; the token lets it do more than sign: set the token's profile, or say in profile_overrides "
    "(usage_allowed) what this kind of token lets every key do"
)


def read_evidence(described: Mapping[str, Any]) -> Evidence:
    """Return the evidence in a worker's description of a private key."""
    fields = described.get("evidence")
    if not isinstance(fields, dict):
        return {}
    return {
        str(name): value if isinstance(value, bool | int) else None
        for name, value in fields.items()
    }


def check_evidence(key: str, evidence: Evidence, key_type: KeyType, profile: Profile) -> None:
    """Refuse a private key that is not proven to have been made in the token for signing only.

    Args:
        key: how a message calls it.
        evidence: what the token says.
        key_type: its type.
        profile: may allow what this kind of token permits every key.

    Raises:
        TokenError: FAILED_PRECONDITION, names the attributes that do not hold.
    """
    wrong = [n for n, wanted in _REQUIRED.items() if evidence.get(n) is not wanted]
    wrong += [n for n in sorted(USAGES - profile.usage_allowed) if evidence.get(n) is True]
    if evidence.get("KEY_GEN_MECHANISM") not in _made_by(key_type):
        wrong.append("KEY_GEN_MECHANISM")
    if wrong:
        uses = "" if set(wrong) - USAGES else _USES
        raise TokenError(
            f"{key} violates policy: {', '.join(wrong)}{uses}",
            reason="hsm.key_policy",
            operation="inventory",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )


def _made_by(key_type: KeyType) -> set[int]:
    return {mechanisms_for(key_type)[0]} if is_ec(key_type) else set(RSA_KEY_GEN.values())


def evidence_texts(evidence: Evidence) -> dict[str, str]:
    """Return evidence for an operator's eyes."""
    texts = {}
    for name, value in evidence.items():
        if value is None:
            texts[name] = "unknown"
        elif isinstance(value, bool):
            texts[name] = "true" if value else "false"
        else:
            texts[name] = MECHANISM_NAMES.get(value, f"0x{value:x}")
    return texts

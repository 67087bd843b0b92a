"""Which token: load the module, find the one token that is meant, and say why there is none.

Runs in the worker only.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final

import pkcs11
from pkcs11 import Mechanism, MechanismFlag, Token, TokenFlag
from pkcs11.exceptions import PKCS11Error

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11 import keys
from spire_hw.pkcs11.errors import Cure, TokenError, ckr_of
from spire_hw.pkcs11.module import load_fault
from spire_hw.pkcs11.profile import RSA_KEY_GEN

_LOCAL: Final = (
    "look at the device or its service, and at the module's own configuration and directories"
)
# What we use a mechanism for, and up to which size the longest key cannot be meant in bits.
_USES: Final = {
    keys.CKM_RSA_PKCS_KEY_PAIR_GEN: (MechanismFlag.GENERATE_KEY_PAIR, 1024),
    RSA_KEY_GEN["x9.31"]: (MechanismFlag.GENERATE_KEY_PAIR, 1024),
    keys.CKM_EC_KEY_PAIR_GEN: (MechanismFlag.GENERATE_KEY_PAIR, 128),
    keys.CKM_RSA_PKCS: (MechanismFlag.SIGN, 1024),
    keys.CKM_RSA_PKCS_PSS: (MechanismFlag.SIGN, 1024),
    keys.CKM_ECDSA: (MechanismFlag.SIGN, 128),
}
_ANY_USE: Final = 0xFFF00  # CKF_ENCRYPT to CKF_DERIVE
_UNKNOWN: Final = 1 << 31  # CK_UNAVAILABLE_INFORMATION and the like


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


def serial_of(token: Token) -> str:
    """Return a token's serial number as text, without padding."""
    return token.serial.decode("ascii", "replace").strip("\0 ")


def mechanisms_of(slot: Any) -> tuple[list[int], dict[int, int]]:
    """Return the mechanisms that can be used, and the longest keys of some in bits.

    A slot may list what it only verifies with, or does with short keys alone. What it names no use or
    length of, or answers with an error, it is believed to do.

    Raises:
        PKCS11Error: the slot does not list them.

    Spec: PKCS #11 v2.40 section 5.5 (C_GetMechanismInfo).
    """
    listed = sorted(int(m) for m in slot.get_mechanisms())
    longest: dict[int, int] = {}
    for number in [m for m in listed if m in _USES]:
        use, bytes_up_to = _USES[number]
        try:
            info = slot.get_mechanism_info(Mechanism(number))
        except (PKCS11Error, ValueError):
            continue
        if info.flags & _ANY_USE and not info.flags & use:
            listed.remove(number)
        size = info.max_key_length or 0
        if 0 < size < _UNKNOWN:
            # In bits, says the standard for these mechanisms; some modules count bytes.
            longest[number] = size * 8 if size <= bytes_up_to else size
    return listed, longest


def load(module: str) -> Any:
    """Load and initialise a module.

    Raises:
        TokenError: it is none, or cannot be used now.
    """
    try:
        return pkcs11.lib(module)
    except PKCS11Error as e:
        reason = load_fault(e, "pkcs11 module not found")
        if not reason:
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


def choose(library: Any, choice: TokenChoice) -> Token:
    """Return the one token that is meant.

    Raises:
        TokenError: there is none, or there are several.
    """
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

"""What a TPM response code means: its name, what it points at, the likely cause and a remedy.

Knows codes only; no TPM library is loaded here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from spire_hw.errors import DeviceError, ErrorKind


class Rc(IntEnum):
    """Response codes we act on, with handle, parameter and session number stripped.

    Spec: TPM 2.0 Library, Part 2 "TPM_RC".
    """

    INITIALIZE = 0x100
    FAILURE = 0x101
    AUTH_TYPE = 0x124
    AUTH_UNAVAILABLE = 0x12F
    PCR_CHANGED = 0x128
    REBOOT = 0x130
    NV_UNINITIALIZED = 0x14A
    NV_SPACE = 0x14B
    NV_DEFINED = 0x14C
    COMMAND_CODE = 0x143
    ASYMMETRIC = 0x081
    ATTRIBUTES = 0x082
    VALUE = 0x084
    HIERARCHY = 0x085
    KEY_SIZE = 0x087
    TYPE = 0x08A
    HANDLE = 0x08B
    RANGE = 0x08D
    AUTH_FAIL = 0x08E
    SCHEME = 0x092
    SIZE = 0x095
    INSUFFICIENT = 0x09A
    POLICY_FAIL = 0x09D
    INTEGRITY = 0x09F
    TICKET = 0x0A0
    BAD_AUTH = 0x0A2
    CURVE = 0x0A6
    ECC_POINT = 0x0A7
    CONTEXT_GAP = 0x901
    OBJECT_MEMORY = 0x902
    SESSION_MEMORY = 0x903
    SESSION_HANDLES = 0x905
    OBJECT_HANDLES = 0x906
    YIELDED = 0x908
    TESTING = 0x90A
    NV_RATE = 0x920
    LOCKOUT = 0x921
    RETRY = 0x922


# Codes that only say "ask again"; the device room waits and repeats the command.
TRANSIENT: Final = frozenset({Rc.YIELDED, Rc.TESTING, Rc.NV_RATE, Rc.RETRY})

# Codes that mean a saved context, blob or handle is of another TPM, reset or owner.
STALE: Final = frozenset({Rc.HANDLE, Rc.INTEGRITY, Rc.VALUE, Rc.SIZE, Rc.HIERARCHY})

# Codes that say that a free slot is missing, which whoever holds them may give back.
FULL: Final = frozenset(
    {Rc.OBJECT_MEMORY, Rc.SESSION_MEMORY, Rc.SESSION_HANDLES, Rc.OBJECT_HANDLES}
)

# What a TPM says to the parameters of a key it cannot make.
NOT_SUPPORTED: Final = frozenset(
    {Rc.VALUE, Rc.KEY_SIZE, Rc.CURVE, Rc.SCHEME, Rc.TYPE, Rc.ASYMMETRIC, Rc.RANGE}
)

# What a TPM says to a wrong password; a further try may lock it.
WRONG_PASSWORD: Final = frozenset({Rc.AUTH_FAIL, Rc.BAD_AUTH})

_LAYERS: Final = {
    6: "ESYS resource manager",
    7: "ESYS",
    8: "SYS",
    9: "marshalling",
    10: "TCTI",
    11: "resource manager",
    12: "resource manager",
    13: "driver",
}
_TPM_LAYERS: Final = {0, 11}
_TCTI_LAYER: Final = 10

_FORMAT_ONE, _IS_PARAMETER, _NUMBER, _IS_SESSION = 0x80, 0x40, 0xF00, 0x800
_NUMBER_MASK, _SESSION_NUMBER_MASK = 0xF, 0x7

_OTHER_NAMES: Final = {
    0x103: "SEQUENCE",
    0x10B: "PRIVATE",
    0x119: "HMAC",
    0x120: "DISABLED",
    0x121: "EXCLUSIVE",
    0x125: "AUTH_MISSING",
    0x126: "POLICY",
    0x127: "PCR",
    0x12D: "UPGRADE",
    0x12E: "TOO_MANY_CONTEXTS",
    0x131: "UNBALANCED",
    0x142: "COMMAND_SIZE",
    0x144: "AUTHSIZE",
    0x145: "AUTH_CONTEXT",
    0x146: "NV_RANGE",
    0x147: "NV_SIZE",
    0x148: "NV_LOCKED",
    0x149: "NV_AUTHORIZATION",
    0x150: "BAD_CONTEXT",
    0x151: "CPHASH",
    0x152: "PARENT",
    0x153: "NEEDS_TEST",
    0x154: "NO_RESULT",
    0x155: "SENSITIVE",
    0x083: "HASH",
    0x088: "MGF",
    0x089: "MODE",
    0x08C: "KDF",
    0x08F: "NONCE",
    0x090: "PP",
    0x096: "SYMMETRIC",
    0x097: "TAG",
    0x098: "SELECTOR",
    0x09B: "SIGNATURE",
    0x09C: "KEY",
    0x0A1: "RESERVED_BITS",
    0x0A3: "EXPIRED",
    0x0A4: "POLICY_CC",
    0x0A5: "BINDING",
    0x904: "MEMORY",
    0x907: "LOCALITY",
    0x909: "CANCELED",
    0x923: "NV_UNAVAILABLE",
}

_HINTS: Final[dict[int, str]] = {
    Rc.INITIALIZE: "the TPM was not started; firmware sends TPM2_Startup, reboot the machine",
    Rc.FAILURE: "the TPM is in failure mode; power the machine off and on, then look for a "
    "firmware update",
    Rc.AUTH_TYPE: "the object wants a policy session for this command",
    Rc.AUTH_UNAVAILABLE: "the object has no password or no private part",
    Rc.REBOOT: "the TPM wants a restart of the machine, as after a firmware update",
    Rc.NV_UNINITIALIZED: "the NV index was never written",
    Rc.NV_SPACE: "the TPM's persistent memory is full; list it with tpm2_getcap handles-persistent "
    "and remove what nobody needs with tpm2_evictcontrol",
    Rc.NV_DEFINED: "the handle is taken",
    Rc.COMMAND_CODE: "this TPM does not have the command",
    Rc.ATTRIBUTES: "the attributes of the key do not allow this",
    Rc.VALUE: "a value is out of range or not supported by this TPM",
    Rc.HIERARCHY: "the hierarchy is disabled; enable it in the firmware setup",
    Rc.KEY_SIZE: "this TPM does not have the key size",
    Rc.HANDLE: "there is no such object; it was flushed, evicted or never made",
    Rc.AUTH_FAIL: "wrong password; the failure was counted, repeated ones lock the TPM",
    Rc.SCHEME: "the key is bound to another signature scheme or hash",
    Rc.POLICY_FAIL: "the policy of the object is not met, for one because a PCR changed",
    Rc.INTEGRITY: "the data was damaged, or made under another storage key: the TPM was cleared "
    "or replaced",
    Rc.TICKET: "a restricted key signs only what the TPM itself hashed",
    Rc.BAD_AUTH: "hierarchy password required: set owner_auth_path or endorsement_auth_path to "
    "the file that holds it",
    Rc.CURVE: "this TPM does not have the curve",
    Rc.ECC_POINT: "the point is not on the curve",
    Rc.CONTEXT_GAP: "too many saved sessions; flush them or restart the resource manager",
    Rc.OBJECT_MEMORY: "no free slot for a key: another program holds them all; use the kernel's "
    "resource manager /dev/tpmrm0, or flush with tpm2_flushcontext -t",
    Rc.SESSION_MEMORY: "no free slot for a session: another program holds them all; use the "
    "kernel's resource manager /dev/tpmrm0, or flush with tpm2_flushcontext -l",
    Rc.SESSION_HANDLES: "too many sessions; flush leftovers with tpm2_flushcontext -s",
    Rc.OBJECT_HANDLES: "too many loaded objects; flush leftovers with tpm2_flushcontext -t",
    Rc.LOCKOUT: "the TPM is locked after wrong passwords; wait for its recovery time or reset the "
    "lock with tpm2_dictionarylockout -c",
    Rc.YIELDED: "the TPM is busy",
    Rc.TESTING: "the TPM is busy testing itself",
    Rc.NV_RATE: "the TPM protects its flash from too many writes",
    Rc.RETRY: "the TPM is busy",
}

# What passes by itself, or by an administrator's hand, without a change on our side.
_UNAVAILABLE: Final = frozenset(
    {
        *TRANSIENT,
        Rc.INITIALIZE,
        Rc.REBOOT,
        Rc.BAD_AUTH,
        *FULL,
        Rc.CONTEXT_GAP,
        Rc.LOCKOUT,
    }
)
_RETRYABLE: Final = _UNAVAILABLE - {Rc.BAD_AUTH, Rc.INITIALIZE, Rc.REBOOT}


@dataclass(frozen=True, slots=True)
class Decoded:
    """A response code taken apart.

    Attributes:
        layer: who answered: `TPM` or a layer of the software stack.
        base: the code without handle, parameter and session number.
        name: its name in the specification, or its number.
        place: `parameter 2`, `handle 1`, `session 1` or empty.
    """

    layer: str
    base: int
    name: str
    place: str


def decode(code: int) -> Decoded:
    """Take a response code apart.

    Spec: TPM 2.0 Library, Part 1 "Response Code Details"; TSS 2.0 Overview "Response codes".
    """
    layer, rc = code >> 16 & 0xFF, code & 0xFFFF
    if layer not in _TPM_LAYERS:
        return Decoded(_LAYERS.get(layer, f"layer {layer}"), rc, f"0x{code:x}", "")
    if not rc & _FORMAT_ONE:
        return Decoded("TPM", rc, _name(rc), "")
    base = rc & 0xBF
    number = rc >> 8 & _NUMBER_MASK
    if rc & _IS_PARAMETER:
        place = f"parameter {number}"
    elif rc & _IS_SESSION:
        place = f"session {number & _SESSION_NUMBER_MASK}"
    else:
        place = f"handle {number}" if number else ""
    return Decoded("TPM", base, _name(base), place)


def _name(base: int) -> str:
    try:
        return f"TPM_RC_{Rc(base).name}"
    except ValueError:
        known = _OTHER_NAMES.get(base)
        return f"TPM_RC_{known}" if known else f"0x{base:x}"


def is_transport_failure(code: int) -> bool:
    """Tell whether the code says that the TPM cannot be reached at all."""
    return code >> 16 & 0xFF == _TCTI_LAYER


class TpmError(DeviceError):
    """A TPM refused a command.

    Attributes:
        decoded: the response code taken apart.
    """

    def __init__(self, code: int, *, device: str, operation: str, hint: str = "") -> None:
        """Put a response code into words.

        Args:
            code: as the TPM or the software stack gave it.
            device: TCTI.
            operation: the command, or what it was for.
            hint: replaces the general cause and remedy where the caller knows better.
        """
        decoded = decode(code)
        where = f" ({decoded.place})" if decoded.place else ""
        why = hint or (_HINTS.get(decoded.base, "") if decoded.layer == "TPM" else "")
        tail = f": {why}" if why else ""
        unavailable = decoded.layer == "TPM" and decoded.base in _UNAVAILABLE
        super().__init__(
            f"{operation}: {decoded.layer} answered {decoded.name}{where}{tail}",
            device=device,
            operation=operation,
            code=code,
            retryable=decoded.layer == "TPM" and decoded.base in _RETRYABLE,
            kind=ErrorKind.UNAVAILABLE if unavailable else None,
        )
        self.decoded = decoded

    @property
    def reason(self) -> str:
        """Return a stable code for logs and counters, such as `tpm.lockout`."""
        return "tpm." + self.decoded.name.lower().removeprefix("tpm_rc_")

    def is_any(self, codes: frozenset[Rc]) -> bool:
        """Tell whether the TPM itself gave one of these codes."""
        return self.decoded.layer == "TPM" and self.decoded.base in codes

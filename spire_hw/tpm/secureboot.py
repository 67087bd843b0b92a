"""The state of Secure Boot as PCR 7 proves it; whatever is ambiguous is refused.

Only the order and the digests of PCR 7's events are authentic. An event counts when its digest is
that of its data, when its type may occur there, and when it says something once.

Spec: PC Client Platform Firmware Profile, 3.3.4.8; UEFI Specification, 32.4.1 (signature lists).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID

from spire_hw.errors import AttestationError, Finding, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EV_SEPARATOR: Final = 0x00000004
EV_EFI_VARIABLE_DRIVER_CONFIG: Final = 0x80000001
EV_EFI_ACTION: Final = 0x80000007
EV_EFI_VARIABLE_AUTHORITY: Final = 0x800000E0

DEBUG_MODE: Final = b"UEFI Debug Mode"
DMA_DISABLED: Final = b"DMA Protection Disabled"


def _guid(text: str) -> bytes:
    return UUID(text).bytes_le


GLOBAL: Final = _guid("8be4df61-93ca-11d2-aa0d-00e098032b8c")
IMAGE_SECURITY: Final = _guid("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
CERT_X509: Final = _guid("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
CERT_SHA256: Final = _guid("c1c41626-504c-4092-aca9-41f936934328")

_OWNERS: Final = {
    "SecureBoot": GLOBAL,
    "PK": GLOBAL,
    "KEK": GLOBAL,
    "db": IMAGE_SECURITY,
    "dbx": IMAGE_SECURITY,
}
# What shim says about itself under the type of authorities.
_SBAT: Final = "SbatLevel"
_NOT_AUTHORITIES: Final = frozenset({_SBAT, "MokListTrusted"})

_VARIABLE: Final = struct.Struct("<16sQQ")
_LIST: Final = struct.Struct("<16sIII")
_OWNER_BYTES: Final = 16
_SHA256_BYTES: Final = 32
_MAX_NAME: Final = 128
_SHIM_PADDING: Final = 5
_DER_SEQUENCE: Final = 0x30
_DER_LONG_2: Final = 0x82

# Number of the event in the log, its type, its digest and its data.
Measured = tuple[int, int, bytes, bytes]


@dataclass(slots=True)
class SecureBoot:
    """What PCR 7 says; see `BootFacts` for the fields."""

    on: bool = False
    debug_mode: bool = False
    dma_protection: bool = True
    variables: dict[str, str] = field(default_factory=dict)
    db: tuple[str, ...] = ()
    dbx: frozenset[str] = frozenset()
    sbat: str = ""
    authorities: tuple[str, ...] = ()


def read(
    events: Sequence[Measured],
    bank: str,
    *,
    empty_secure_boot: bool = False,
    early_authority: bool = False,
) -> SecureBoot:
    """Return the state that all events of PCR 7 together prove.

    Args:
        events: the events of PCR 7 in order, no-action events included; that they replay, and that
            there is exactly one separator, is already known.
        bank: hash of the digests.
        empty_secure_boot: an empty SecureBoot variable means off.
        early_authority: authorities may come before the separator.

    Raises:
        AttestationError: codes `log_type`, `log_event_digest`, `log_order`,
            `secureboot_ambiguous`.
        InvalidInputError: a variable or signature list is malformed.
    """
    reader = _Reader(getattr(hashlib, bank), early_authority=early_authority)
    for number, kind, digest, data in events:
        reader.take(number, kind, digest, data)
    return reader.judge(empty_secure_boot=empty_secure_boot)


class _Reader:
    """Goes through PCR 7 once."""

    def __init__(self, new: Callable[[bytes], hashlib._Hash], *, early_authority: bool) -> None:
        self._new = new
        self._early_authority = early_authority
        self._separated = False
        self._authorised = False
        self._values: dict[str, bytes] = {}
        self._authorities: list[str] = []
        self._state = SecureBoot()

    def take(self, number: int, kind: int, digest: bytes, data: bytes) -> None:
        if kind == EV_SEPARATOR:
            self._separated = True
        elif kind == EV_EFI_VARIABLE_DRIVER_CONFIG:
            self._check_digest(number, digest, data)
            self._take_variable(number, data)
        elif kind == EV_EFI_VARIABLE_AUTHORITY:
            padding = 0
            if self._new(data).digest() != digest:
                # Old releases of shim measure some zeros, and log one byte more than they measure.
                data, padding = data[:-1], _SHIM_PADDING
            self._check_digest(number, digest, data)
            self._take_authority(number, data, padding)
        elif kind == EV_EFI_ACTION:
            self._check_digest(number, digest, data)
            self._take_action(number, data)
        else:
            text = f"event type {kind:08X} is not allowed in PCR 7"
            raise _refusal("log_type", text)

    def judge(self, *, empty_secure_boot: bool) -> SecureBoot:
        state, values = self._state, self._values
        value = values.get("SecureBoot")
        if value is None or value not in {b"\x00", b"\x01", b""}:
            raise _ambiguous()
        if value == b"" and not empty_secure_boot:
            raise _ambiguous()
        state.on = value == b"\x01"
        keyed = all(values.get(name) for name in ("PK", "KEK", "db"))
        if state.on and not (keyed and self._authorised):
            raise _ambiguous()
        state.variables = {name: hashlib.sha256(v).hexdigest() for name, v in values.items()}
        state.authorities = tuple(self._authorities)
        state.db = tuple(signature_list(values.get("db", b"")))
        state.dbx = frozenset(signature_list(values.get("dbx", b"")))
        return state

    def _check_digest(self, number: int, digest: bytes, data: bytes) -> None:
        if self._new(data).digest() != digest:
            raise _refusal("log_event_digest", f"event {number} does not match its digest")

    def _take_variable(self, number: int, data: bytes) -> None:
        owner, name, value = _variable(number, data)
        if self._separated:
            raise _refusal("log_order", f"variable event {number} comes after the separator")
        if name in self._values or owner != _OWNERS.get(name, owner):
            raise _ambiguous()
        self._values[name] = value

    def _take_authority(self, number: int, data: bytes, padding: int) -> None:
        _, name, value = _variable(number, data, padding)
        if name in _OWNERS and name != "db":  # a variable relabelled
            raise _ambiguous()
        if name == _SBAT:
            self._take_sbat(number, value)
        if name in _NOT_AUTHORITIES:
            return
        if not self._separated and not self._early_authority:
            raise _ambiguous()
        self._authorised = self._authorised or self._separated
        self._authorities.append(hashlib.sha256(_certificate(value)).hexdigest())

    def _take_sbat(self, number: int, value: bytes) -> None:
        line = value.split(b"\n", 1)[0].rstrip(b"\x00")
        if not (line.isascii() and line.decode("ascii").isprintable() and len(line) <= _MAX_NAME):
            raise _malformed(number)
        if self._state.sbat or not line:
            raise _ambiguous()
        self._state.sbat = line.decode("ascii")

    def _take_action(self, number: int, data: bytes) -> None:
        action = data.rstrip(b"\x00")
        if action == DEBUG_MODE:
            self._state.debug_mode = True
        elif action == DMA_DISABLED:
            self._state.dma_protection = False
        else:
            raise _refusal("log_type", f"action of event {number} is not allowed in PCR 7")


def signature_list(data: bytes) -> Iterator[str]:
    """Yield each entry of a signature database as lower-case hex.

    SHA-256 hashes are given as they are, everything else (certificates) by its SHA-256.

    Raises:
        InvalidInputError: malformed.
    """
    offset = 0
    while offset < len(data):
        if len(data) - offset < _LIST.size:
            raise _bad_list()
        kind, size, header, step = _LIST.unpack_from(data, offset)
        end = offset + size
        start = offset + _LIST.size + header
        if end > len(data) or start > end or step <= _OWNER_BYTES or (end - start) % step:
            raise _bad_list()
        is_hash = kind == CERT_SHA256
        if is_hash and step != _OWNER_BYTES + _SHA256_BYTES:
            raise _bad_list()
        for at in range(start, end, step):
            entry = data[at + _OWNER_BYTES : at + step]
            yield entry.hex() if is_hash else hashlib.sha256(entry).hexdigest()
        offset = end


def _variable(number: int, data: bytes, padding: int = 0) -> tuple[bytes, str, bytes]:
    """Read a UEFI_VARIABLE_DATA with up to `padding` zeros behind: owner, name, value."""
    if len(data) < _VARIABLE.size:
        raise _malformed(number)
    owner, units, size = _VARIABLE.unpack_from(data)
    middle = _VARIABLE.size + 2 * units
    end = middle + size
    if units > _MAX_NAME or not end <= len(data) <= end + padding or any(data[end:]):
        raise _malformed(number)
    try:
        name = data[_VARIABLE.size : middle].decode("utf-16-le")
    except UnicodeDecodeError as e:
        raise _malformed(number) from e
    if not (name and name.isprintable()):
        raise _malformed(number)
    return owner, name, data[middle:end]


def _certificate(value: bytes) -> bytes:
    """Return the certificate of an authority, which has its owner in front unless it is shim's."""
    return value if _is_der(value) or len(value) <= _OWNER_BYTES else value[_OWNER_BYTES:]


def _is_der(value: bytes) -> bool:
    head = 4
    if len(value) < head or value[:2] != bytes((_DER_SEQUENCE, _DER_LONG_2)):
        return False
    return int.from_bytes(value[2:head], "big") == len(value) - head


def _refusal(code: str, text: str) -> AttestationError:
    return AttestationError([Finding(code, f"log: {text}")])


def _ambiguous() -> AttestationError:
    return _refusal("secureboot_ambiguous", "Secure Boot state is ambiguous")


def _malformed(number: int) -> InvalidInputError:
    return InvalidInputError(f"log: variable event {number} is malformed")


def _bad_list() -> InvalidInputError:
    return InvalidInputError("log: signature list is malformed")

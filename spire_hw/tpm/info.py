"""Which TPM is this: manufacturer, firmware, algorithms, PCR banks, endorsement keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotReadyError
from spire_hw.tpm.connection import Capability
from spire_hw.tpm.endorsement import EkType, Endorsement, certified_types, find_endorsement

if TYPE_CHECKING:
    from spire_hw.tpm.connection import Connection

_FAMILY, _LEVEL, _REVISION = 0x100, 0x101, 0x102
_MANUFACTURER, _VENDOR_FIRST, _VENDOR_LAST = 0x105, 0x106, 0x109
_FIRMWARE_1, _FIRMWARE_2 = 0x10B, 0x10C
_FIRST, _LAST = 0x100, 0x1FF
_PERMANENT, _FAILURES, _MAX_FAILURES, _INTERVAL = 0x200, 0x20E, 0x20F, 0x210
_IN_LOCKOUT = 1 << 9

_ALGORITHMS: Final = {
    0x0001: "rsa",
    0x0003: "tdes",
    0x0004: "sha1",
    0x0005: "hmac",
    0x0006: "aes",
    0x0007: "mgf1",
    0x0008: "keyedhash",
    0x000A: "xor",
    0x000B: "sha256",
    0x000C: "sha384",
    0x000D: "sha512",
    0x0012: "sm3-256",
    0x0013: "sm4",
    0x0014: "rsassa",
    0x0015: "rsaes",
    0x0016: "rsapss",
    0x0017: "oaep",
    0x0018: "ecdsa",
    0x0019: "ecdh",
    0x001A: "ecdaa",
    0x001B: "sm2",
    0x001C: "ecschnorr",
    0x001D: "ecmqv",
    0x0020: "kdf1-sp800-56a",
    0x0021: "kdf2",
    0x0022: "kdf1-sp800-108",
    0x0023: "ecc",
    0x0025: "symcipher",
    0x0026: "camellia",
    0x0027: "sha3-256",
    0x0028: "sha3-384",
    0x0029: "sha3-512",
    0x003F: "cmac",
    0x0040: "ctr",
    0x0041: "ofb",
    0x0042: "cbc",
    0x0043: "cfb",
    0x0044: "ecb",
}
_CURVES: Final = {
    1: "P-192",
    2: "P-224",
    3: "P-256",
    4: "P-384",
    5: "P-521",
    16: "BN-256",
    17: "BN-638",
    32: "SM2-P256",
}


@dataclass(frozen=True, slots=True)
class TpmIdentity:
    """What a TPM says about its make.

    Attributes:
        manufacturer: the vendor's four letters, such as `IFX`.
        vendor: the vendor's free text.
        firmware: firmware version as four numbers.
        specification: family, level and revision of the TPM specification.
    """

    manufacturer: str
    vendor: str
    firmware: str
    specification: str


@dataclass(frozen=True, slots=True)
class Lockout:
    """What a TPM does about wrong passwords, of all programs together.

    Attributes:
        is_locked: keys and hierarchies it counts for are refused, whatever the password.
        failures: wrong passwords that count now.
        max_failures: so many lock it.
        interval_s: after so many seconds one is forgiven.

    Spec: TPM 2.0 Library, Part 1 "Dictionary Attack Protection".
    """

    is_locked: bool
    failures: int
    max_failures: int
    interval_s: int


@dataclass(frozen=True, slots=True)
class TpmInfo:
    """All an operator wants to know about a TPM.

    Attributes:
        identity: its make.
        algorithms: names of what it can do.
        curves: elliptic curves.
        pcr_banks: PCR numbers by hash; only active banks.
        ek_hash: hash of the endorsement key that an attestor takes by itself, "" without any.
        lockout: where it stands with wrong passwords.
        endorsement_keys: with and without certificate.
        complaints: endorsement keys that cannot be used, and why.
    """

    identity: TpmIdentity
    algorithms: tuple[str, ...]
    curves: tuple[str, ...]
    pcr_banks: dict[str, tuple[int, ...]]
    ek_hash: str
    lockout: Lockout
    endorsement_keys: tuple[Endorsement, ...]
    complaints: tuple[str, ...]


def read_identity(connection: Connection) -> TpmIdentity:
    """Ask the TPM for its make; part of a job."""
    values = {
        number: value
        for number, value in connection.capability(Capability.PROPERTIES, _FIRST)
        if number <= _LAST
    }
    high, low = values.get(_FIRMWARE_1, 0), values.get(_FIRMWARE_2, 0)
    revision = values.get(_REVISION, 0)
    vendor = "".join(_text(values.get(n, 0)) for n in range(_VENDOR_FIRST, _VENDOR_LAST + 1))
    return TpmIdentity(
        manufacturer=_text(values.get(_MANUFACTURER, 0)),
        vendor=vendor.strip(),
        firmware=f"{high >> 16}.{high & 0xFFFF}.{low >> 16}.{low & 0xFFFF}",
        specification=(
            f"{_text(values.get(_FAMILY, 0))} level {values.get(_LEVEL, 0)} "
            f"revision {revision // 100}.{revision % 100:02}"
        ),
    )


def read_info(connection: Connection) -> TpmInfo:
    """Ask the TPM for everything; part of a job."""
    algorithms = (n for n, _ in connection.capability(Capability.ALGORITHMS))
    curves = (n for (n,) in connection.capability(Capability.CURVES))
    keys: list[Endorsement] = []
    complaints: list[str] = []
    # Keys of other types take a TPM minutes to make: only where they have certificates.
    for kind in dict.fromkeys((EkType.EC_P256, EkType.RSA_2048, *certified_types(connection))):
        try:
            keys.append(find_endorsement(connection, kind))
        except NotReadyError as e:
            complaints.append(e.message)
    return TpmInfo(
        identity=read_identity(connection),
        algorithms=tuple(_ALGORITHMS.get(n, f"0x{n:04x}") for n in algorithms),
        curves=tuple(_CURVES.get(n, f"0x{n:04x}") for n in curves),
        pcr_banks={bank: pcrs for bank, pcrs in connection.pcr_banks().items() if pcrs},
        ek_hash=_automatic(connection),
        lockout=_read_lockout(connection),
        endorsement_keys=tuple(keys),
        complaints=tuple(complaints),
    )


def _read_lockout(connection: Connection) -> Lockout:
    found = connection.capability(Capability.PROPERTIES, _PERMANENT)
    values = {number: value for number, value in found if number >= _PERMANENT}
    return Lockout(
        is_locked=bool(values.get(_PERMANENT, 0) & _IN_LOCKOUT),
        failures=values.get(_FAILURES, 0),
        max_failures=values.get(_MAX_FAILURES, 0),
        interval_s=values.get(_INTERVAL, 0),
    )


def _automatic(connection: Connection) -> str:
    try:
        return find_endorsement(connection).hash
    except NotReadyError:  # told already, by type
        return ""


def _text(value: int) -> str:
    """Return the printable letters of a property that holds four of them."""
    return "".join(c for c in value.to_bytes(4, "big").decode("latin-1") if " " <= c <= "~").strip()

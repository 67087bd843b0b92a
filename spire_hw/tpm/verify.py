"""Check what a TPM signed: creation, certify, quote and time statements.

Each function takes bytes and what is expected, collects every fault it finds as a `Finding` with
a stable code, and either raises `AttestationError` with all of them or returns what was proved.
The signing key must already be an attestation key by its attributes (`public.check_ak`); its
attributes become facts once its Name was activated (`credential`).

Spec: TPM 2.0 Library, Part 2 "Attestation Structures", Part 3 "Attestation Commands".
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from spire_hw.errors import AttestationError, EncodingError, ErrorKind, Finding
from spire_hw.tpm import public, wire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spire_hw.tpm.public import TpmPublic
    from spire_hw.tpm.wire import Attest, ClockInfo, PcrSelection

_DOMAIN: Final = b"spire-hw tpm v2\x00"
ROLES: Final = frozenset({"quote", "certify", "time", "heartbeat"})
NONCE_BYTES: Final = 32
# The CSR field of a qualifier under a host that cannot tell which key the CSR is for.
NO_CSR: Final = bytes(32)

_HASHES: Final[dict[int, hashes.HashAlgorithm]] = {
    wire.ALG_SHA256: hashes.SHA256(),
    wire.ALG_SHA384: hashes.SHA384(),
    wire.ALG_SHA512: hashes.SHA512(),
}
_ECDSA: Final = {number: ec.ECDSA(algorithm) for number, algorithm in _HASHES.items()}
_ORDERS: Final[dict[str, int]] = {
    "secp256r1": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    "secp384r1": int(
        "ffffffffffffffffffffffffffffffffffffffffffffffff"
        "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
        16,
    ),
    "secp521r1": int(
        "01fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffa"
        "51868783bf2f966b7fcc0148f709a5d03bb5c9b8899c47aebb6fb71e91386409",
        16,
    ),
}
_FIRMWARE_PCRS: Final = range(8)
_HANDLE_BYTES: Final = 4
# Head and body of a time statement are read one after the other.
_MOST_APART_MS: Final = 1000
_BLANKS: Final = {size: (bytes(size), b"\xff" * size) for _, size in wire.HASHES.values()}


def qualifier(
    role: str, nonce: bytes, csr_spki_sha256: bytes, secret: bytes, ak_name: bytes
) -> bytes:
    """Return the qualifying data of one statement of one exchange.

    Args:
        role: `quote`, `certify` or `time`, keeps statements of one attestation apart; `heartbeat`
            for a quote of a node that attested before.
        nonce: 32 random bytes of the server.
        csr_spki_sha256: SHA-256 of the CSR's DER SubjectPublicKeyInfo, or `NO_CSR`; in a heartbeat
            of that of the SVID which authenticates its stream.
        secret: what activation gave, binds the statement to this activation; empty in a heartbeat.
        ak_name: Name of the signing key.

    Returns:
        32 bytes.

    Raises:
        ValueError: an argument is not of its shape (a fault of the caller).
    """
    if role not in ROLES or len(nonce) != NONCE_BYTES or len(csr_spki_sha256) != len(NO_CSR):
        raise ValueError("qualifier needs a known role, a 32-byte nonce and a SHA-256")
    bound = nonce + csr_spki_sha256 + hashlib.sha256(secret).digest() + ak_name
    return hashlib.sha256(_DOMAIN + role.encode() + b"\x00" + bound).digest()


@dataclass(frozen=True, slots=True)
class Statement:
    """A signed TPM structure as it came: TPMS_ATTEST bytes and TPMT_SIGNATURE bytes."""

    attest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Creation:
    """What a creation statement proved.

    Attributes:
        hierarchy: `endorsement` or `owner`.
        qualified_name: the key's place, to be demanded of every later statement.
        clock: counters at creation.
    """

    hierarchy: str
    qualified_name: bytes
    clock: ClockInfo


@dataclass(frozen=True, slots=True)
class Certification:
    """What a certify statement proved: the key is in the signer's TPM."""

    name: bytes
    qualified_name: bytes
    clock: ClockInfo
    firmware_version: int


@dataclass(frozen=True, slots=True)
class Quote:
    """What a quote proved.

    Attributes:
        pcrs: (bank, PCR number) to value.
        clock: counters when it was made.
        firmware_version: the TPM's own.
    """

    pcrs: dict[tuple[str, int], bytes]
    clock: ClockInfo
    firmware_version: int


class _Faults:
    """Collects findings of one stage."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.found: list[Finding] = []

    def add(self, code: str, text: str, kind: ErrorKind = ErrorKind.INVALID_ARGUMENT) -> None:
        self.found.append(Finding(code, f"{self.stage}: {text}", kind))

    def check(self, holds: bool, code: str, text: str) -> None:
        if not holds:
            self.add(code, text)

    def done(self) -> None:
        if self.found:
            raise AttestationError(self.found)


@dataclass(frozen=True, slots=True)
class TrueTime:
    """What a time statement proved: counters as they are, from any attestation key."""

    clock: ClockInfo
    firmware_version: int


def verify_creation(
    ak: TpmPublic,
    creation_data: bytes,
    statement: Statement,
    parents: tuple[TpmPublic, ...] = (),
) -> Creation:
    """Check that a key vouches for its own creation, and tell where it lives.

    Args:
        ak: the attestation key; signs the statement itself.
        creation_data: TPMS_CREATION_DATA bytes.
        statement: the creation statement, any qualifying data.
        parents: public areas of its ancestors, the primary first; empty for a primary key.

    Raises:
        AttestationError: codes `creation_malformed`, `creation_scheme`, `creation_signature`,
            `magic`, `creation_type`, `creation_name`, `creation_hash`, `creation_parent`,
            `ak_hierarchy`, `ak_qualified_name`.

    Spec: TPM 2.0 Library, Part 3 "TPM2_CertifyCreation".
    """
    return _verify_creation(ak, creation_data, statement, tuple(p.name for p in parents))


def verify_child_creation(ak: TpmPublic, creation_data: bytes, statement: Statement) -> Creation:
    """Do the same without the parent's public area.

    The creation data has the parent's Name, which suffices where that parent is a primary key, as
    storage and endorsement keys are.

    Raises:
        AttestationError: as `verify_creation`.
    """
    return _verify_creation(ak, creation_data, statement, None)


def _verify_creation(
    ak: TpmPublic, creation_data: bytes, statement: Statement, names: tuple[bytes, ...] | None
) -> Creation:
    faults = _Faults("ak")
    attest = _open(faults, ak, statement, wire.ST_CREATION, "creation")
    try:
        data = wire.parse_creation_data(creation_data, "ak: creation data")
    except EncodingError as e:
        raise AttestationError([*faults.found, Finding("creation_malformed", e.message)]) from e
    if attest is None:
        raise AttestationError(faults.found)
    body = _name_pair(faults, attest, "creation")
    digest = hashlib.new(wire.HASHES[ak.name_alg][0], creation_data).digest()
    faults.check(body.name == ak.name, "creation_name", "creation proof is for another key")
    faults.check(body.second == digest, "creation_hash", "creation hash does not match")
    faults.done()
    if names is None:
        is_primary = len(data.parent_name) == _HANDLE_BYTES
        names = () if is_primary else (data.parent_name,)
    hierarchy = public.hierarchy_of(attest.qualified_signer, ak.name, names)
    _check_parent(faults, data, hierarchy, names)
    faults.done()
    return Creation(hierarchy, attest.qualified_signer, attest.clock)


def _check_parent(
    faults: _Faults, data: wire.CreationData, hierarchy: str, parents: tuple[bytes, ...]
) -> None:
    handle = wire.RH_ENDORSEMENT if hierarchy == "endorsement" else wire.RH_OWNER
    qualified = handle.to_bytes(4, "big")
    for parent in parents:
        qualified = public.qualified_name(qualified, parent)
    name = parents[-1] if parents else qualified
    faults.check(
        data.parent_name == name and data.parent_qualified_name == qualified,
        "creation_parent",
        "creation data names another parent",
    )


def verify_certify(
    ak: TpmPublic,
    ak_qualified_name: bytes,
    *,
    key: TpmPublic,
    expected: bytes,
    statement: Statement,
) -> Certification:
    """Check that a TPM vouches for a key of its own.

    Args:
        ak: the attestation key that signs.
        ak_qualified_name: its place, from `verify_creation`.
        key: the public area that should be certified.
        expected: the qualifier of this exchange, role `certify`.
        statement: the certify statement.

    Raises:
        AttestationError: codes `certify_malformed`, `certify_scheme`, `certify_signature`,
            `magic`, `certify_type`, `certify_signer`, `nonce_mismatch`, `certify_name`.

    Spec: TPM 2.0 Library, Part 3 "TPM2_Certify".
    """
    faults = _Faults("certify")
    attest = _open(faults, ak, statement, wire.ST_CERTIFY, "certify")
    if attest is None:
        raise AttestationError(faults.found)
    _check_head(faults, attest, ak_qualified_name, expected, "certify")
    body = _name_pair(faults, attest, "certify")
    faults.check(body.name == key.name, "certify_name", "statement is about another key")
    faults.done()
    return Certification(body.name, body.second, attest.clock, attest.firmware_version)


def verify_key_creation(
    ak: TpmPublic,
    ak_qualified_name: bytes,
    *,
    key: TpmPublic,
    creation_data: bytes,
    expected: bytes,
    statement: Statement,
) -> ClockInfo:
    """Check that a TPM vouches for having made another key than the one that signs.

    Args:
        ak: the attestation key that signs.
        ak_qualified_name: its place, from `verify_creation`.
        key: the public area that should have been made there.
        creation_data: TPMS_CREATION_DATA bytes of that key.
        expected: what the statement has to hold.
        statement: the creation statement.

    Returns:
        Counters when the statement was made.

    Raises:
        AttestationError: codes `creation_malformed`, `creation_scheme`, `creation_signature`,
            `magic`, `creation_type`, `creation_signer`, `nonce_mismatch`, `creation_name`,
            `creation_hash`.

    Spec: TPM 2.0 Library, Part 3 "TPM2_CertifyCreation".
    """
    faults = _Faults("creation")
    attest = _open(faults, ak, statement, wire.ST_CREATION, "creation")
    if attest is None:
        raise AttestationError(faults.found)
    _check_head(faults, attest, ak_qualified_name, expected, "creation")
    body = _name_pair(faults, attest, "creation")
    digest = hashlib.new(wire.HASHES[key.name_alg][0], creation_data).digest()
    faults.check(body.name == key.name, "creation_name", "statement is about another key")
    faults.check(body.second == digest, "creation_hash", "creation hash does not match")
    faults.done()
    return attest.clock


def verify_quote(
    ak: TpmPublic,
    ak_qualified_name: bytes,
    *,
    expected: bytes,
    selections: Sequence[PcrSelection],
    statement: Statement,
    values: Mapping[str, Mapping[int, bytes]],
) -> Quote:
    """Check a quote and the PCR values that came with it.

    Args:
        ak: the attestation key that signs.
        ak_qualified_name: its place, from `verify_creation`.
        expected: the qualifier of this exchange, role `quote`.
        selections: what was asked for, in that order, each bank once.
        statement: the quote.
        values: bank to PCR number to value, as claimed.

    Raises:
        AttestationError: codes `quote_malformed`, `quote_scheme`, `quote_signature`, `magic`,
            `quote_type`, `quote_signer`, `nonce_mismatch`, `pcr_selection`, `pcr_values`,
            `quote_digest_size`, `pcr_digest`.

    Spec: TPM 2.0 Library, Part 3 "TPM2_Quote".
    """
    faults = _Faults("quote")
    attest = _open(faults, ak, statement, wire.ST_QUOTE, "quote")
    if attest is None:
        raise AttestationError(faults.found)
    _check_head(faults, attest, ak_qualified_name, expected, "quote")
    try:
        body = wire.parse_quote_body(attest.body, "quote: structure")
    except EncodingError as e:
        raise AttestationError([Finding("quote_malformed", e.message), *faults.found]) from e
    _check_selection(faults, body.selections, selections)
    ordered = _check_values(faults, selections, values)
    _check_digest(faults, ak, body.pcr_digest, ordered)
    faults.done()
    pcrs = {(bank, n): values[bank][n] for bank, n in wire.order_selection(selections)}
    return Quote(pcrs, attest.clock, attest.firmware_version)


def verify_time(
    ak: TpmPublic,
    ak_qualified_name: bytes,
    *,
    expected: bytes,
    statement: Statement,
    quote: Quote,
) -> TrueTime:
    """Check a time statement, which has the counters in clear whatever key signs it.

    Args:
        ak: the attestation key that signs.
        ak_qualified_name: its place, from `verify_creation`.
        expected: the qualifier of this exchange, role `time`.
        statement: the time statement.
        quote: a quote of the same exchange: both heads must be scrambled alike.

    Raises:
        AttestationError: codes `time_malformed`, `time_scheme`, `time_signature`, `magic`,
            `time_type`, `time_signer`, `nonce_mismatch`.

    Spec: TPM 2.0 Library, Part 3 "TPM2_GetTime".
    """
    faults = _Faults("counters")
    attest = _open(faults, ak, statement, wire.ST_TIME, "time")
    if attest is None:
        raise AttestationError(faults.found)
    _check_head(faults, attest, ak_qualified_name, expected, "time")
    try:
        body = wire.parse_time_body(attest.body, "counters: structure")
    except EncodingError as e:
        raise AttestationError([Finding("time_malformed", e.message), *faults.found]) from e
    heads = [
        (clock.reset_count, clock.restart_count, firmware)
        for clock, firmware in (
            (attest.clock, attest.firmware_version),
            (quote.clock, quote.firmware_version),
        )
    ]
    faults.check(
        heads[0] == heads[1] and abs(attest.clock.clock_ms - body.clock.clock_ms) <= _MOST_APART_MS,
        "nonce_mismatch",
        "not for this exchange: head and body do not belong together",
    )
    faults.done()
    return TrueTime(body.clock, body.firmware_version)


def find_unused_banks(pcrs: Mapping[tuple[str, int], bytes]) -> list[Finding]:
    """Return `bank_unused` for each bank of quoted PCRs that the firmware measured nothing into.

    Such a quote is sound, and worth nothing: whoever runs later fills the bank as they like.
    """
    found = []
    for bank in dict.fromkeys(bank for bank, _ in pcrs):
        values = [pcrs[bank, n] for n in _FIRMWARE_PCRS if (bank, n) in pcrs]
        size = wire.HASHES[wire.BANKS[bank]][1]
        if values and any(values.count(blank) == len(values) for blank in _BLANKS[size]):
            text = f"quote: bank {bank} was not used by the firmware"
            found.append(Finding("bank_unused", text, ErrorKind.PERMISSION_DENIED))
    return found


def _check_selection(
    faults: _Faults, quoted: Sequence[PcrSelection], asked: Sequence[PcrSelection]
) -> None:
    by_bank: dict[str, set[int]] = {}
    for entry in quoted:
        if entry.bank in by_bank:
            faults.add("pcr_selection", f"bank {entry.bank} was quoted twice")
        by_bank.setdefault(entry.bank, set()).update(entry.pcrs)
    wanted = {entry.bank: set(entry.pcrs) for entry in asked}
    for bank in by_bank.keys() - wanted.keys():
        faults.add("pcr_selection", f"bank {bank} was not asked for")
    for bank, pcrs in wanted.items():
        _check_bank_selection(faults, bank, by_bank, pcrs)
    if not faults.found and [e.bank for e in quoted] != [e.bank for e in asked]:
        faults.add("pcr_selection", "banks are in another order than asked")


def _check_bank_selection(
    faults: _Faults, bank: str, by_bank: Mapping[str, set[int]], wanted: set[int]
) -> None:
    if bank not in by_bank:
        faults.add("pcr_selection", f"PCRs asked for were not quoted: bank {bank}")
        return
    quoted = by_bank[bank]
    if not quoted:
        faults.add("pcr_selection", f"bank {bank} is not active on this TPM")
        return
    for n in sorted(wanted - quoted):
        faults.add("pcr_selection", f"PCR {n} was not quoted")
    for n in sorted(quoted - wanted):
        faults.add("pcr_selection", f"PCR {n} was not asked for")


def _check_values(
    faults: _Faults, asked: Sequence[PcrSelection], values: Mapping[str, Mapping[int, bytes]]
) -> bytes | None:
    """Return the values in digest order, None when they do not fit the selection."""
    before = len(faults.found)
    wanted = {entry.bank: set(entry.pcrs) for entry in asked}
    for bank, pcrs in wanted.items():
        size = wire.HASHES[wire.BANKS[bank]][1]
        given = values.get(bank, {})
        for n in sorted(pcrs - given.keys()):
            faults.add("pcr_values", f"value of PCR {n} is missing")
        for n in sorted(given.keys() - pcrs):
            faults.add("pcr_values", f"value of PCR {n} was not asked for")
        for n in sorted(pcrs & given.keys()):
            if len(given[n]) != size:
                faults.add("pcr_values", f"PCR {n} has {len(given[n])} bytes, expected {size}")
    if values.keys() - wanted.keys():
        faults.add("pcr_values", "values of a bank that was not asked for")
    if len(faults.found) > before:
        return None
    return b"".join(values[bank][n] for bank, n in wire.order_selection(asked))


def _check_digest(faults: _Faults, ak: TpmPublic, digest: bytes, ordered: bytes | None) -> None:
    name, size = wire.HASHES[ak.scheme_hash]
    if len(digest) != size:
        faults.add("quote_digest_size", "digest has the wrong length")
    elif ordered is not None and not hmac.compare_digest(
        digest, hashlib.new(name, ordered).digest()
    ):
        faults.add("pcr_digest", "PCR values do not match the signed digest")


def _name_pair(faults: _Faults, attest: Attest, stage: str) -> wire.NamePairBody:
    try:
        return wire.parse_name_pair(attest.body, f"{faults.stage}: statement")
    except EncodingError as e:
        malformed = Finding(f"{stage}_malformed", e.message)
        raise AttestationError([malformed, *faults.found]) from e


def _check_head(
    faults: _Faults, attest: Attest, qualified_name: bytes, expected: bytes, stage: str
) -> None:
    faults.check(
        attest.qualified_signer == qualified_name,
        f"{stage}_signer",
        "signer is not the activated key",
    )
    faults.check(
        hmac.compare_digest(attest.extra_data, expected),
        "nonce_mismatch",
        "not for this exchange",
    )


def _open(
    faults: _Faults, ak: TpmPublic, statement: Statement, kind: int, stage: str
) -> Attest | None:
    """Read and authenticate a statement; None when its body must not be read."""
    try:
        attest = wire.parse_attest(statement.attest, f"{faults.stage}: structure")
    except EncodingError as e:
        faults.add(f"{stage}_malformed", e.message.removeprefix(f"{faults.stage}: "))
        return None
    _check_signature(faults, ak, statement, stage)
    faults.check(attest.magic == wire.MAGIC, "magic", "not made by a TPM")
    faults.check(
        attest.type == kind,
        f"{stage}_type",
        f"attestation type {attest.type:04X}, expected {kind:04X}",
    )
    return attest if attest.magic == wire.MAGIC and attest.type == kind else None


def _check_signature(faults: _Faults, ak: TpmPublic, statement: Statement, stage: str) -> None:
    try:
        signature = wire.parse_signature(statement.signature)
    except EncodingError as e:
        faults.add(
            f"{stage}_scheme", f"signature is malformed or does not fit the key: {e.message}"
        )
        return
    if signature.scheme != ak.scheme:
        faults.add(f"{stage}_scheme", "signature does not fit the key")
    elif signature.hash != ak.scheme_hash or signature.hash not in _HASHES:
        faults.add(f"{stage}_scheme", "signature hash is not the one of the key")
    elif (encoded := _encode_signature(ak.key, signature)) is None:
        faults.add(f"{stage}_signature", "signature is malformed")
    elif not _is_signed(ak.key, encoded, statement.attest, signature):
        faults.add(f"{stage}_signature", "signature does not verify")


def _encode_signature(key: object, signature: wire.Signature) -> bytes | None:
    if isinstance(key, ec.EllipticCurvePublicKey):
        size = (key.curve.key_size + 7) // 8
        if len(signature.parts) != 2 or any(len(part) > size for part in signature.parts):  # noqa: PLR2004
            return None
        r, s = (int.from_bytes(part, "big") for part in signature.parts)
        order = _ORDERS[key.curve.name]
        in_range = 0 < r < order and 0 < s < order
        return utils.encode_dss_signature(r, s) if in_range else None
    if isinstance(key, rsa.RSAPublicKey) and len(signature.parts) == 1:
        part = signature.parts[0]
        return part if len(part) * 8 == key.key_size else None
    return None


def _is_signed(key: object, encoded: bytes, data: bytes, signature: wire.Signature) -> bool:
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(encoded, data, _ECDSA[signature.hash])
            return True
        if isinstance(key, rsa.RSAPublicKey):
            algorithm = _HASHES[signature.hash]
            key.verify(encoded, data, _padding(signature.scheme, algorithm), algorithm)
            return True
    except InvalidSignature:
        return False
    return False


def _padding(scheme: int, algorithm: hashes.HashAlgorithm) -> padding.AsymmetricPadding:
    if scheme == wire.ALG_RSAPSS:
        return padding.PSS(padding.MGF1(algorithm), padding.PSS.AUTO)
    return padding.PKCS1v15()

"""Messages of the `tpm` node attestor: dialect 2, an object beside what the Go plugin sends.

One round trip: attestation data, challenge, response. All are JSON objects; byte fields are
canonical padded base64, PCR values lower-case hex. Outer members we do not know are ignored, our
own object `spire_hw` is closed. Every `quote` entry of a challenge names one bank and is answered
by one quote in the same place of `quotes`, with the values of that bank alone. What the first
answer has no room for is asked for in further rounds (`rounds`); peers that know nothing of all
that are in `dialects`.

Reading is strict and total: hostile bytes give an `InvalidInputError` whose text begins with
`envelope: `, `ek: ` or `quote: `, or a `LimitError` for size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.bootid import is_boot_id
from spire_hw.errors import InvalidInputError
from spire_hw.tpm.wire import BANKS, HASHES, PCR_COUNT, PcrSelection
from spire_hw_plugins.nodeattestor import strictjson
from spire_hw_plugins.nodeattestor.tpm import pem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw_plugins.nodeattestor.strictjson import StrictObject

NAME: Final = "tpm"
DIALECT: Final = 2
MAX_PAYLOAD_BYTES: Final = 64 * 1024
MAX_CHALLENGE_BYTES: Final = 64 * 1024
MAX_RESPONSE_BYTES: Final = 1024 * 1024
MAX_CHAIN: Final = 6
NONCE_BYTES: Final = 32
SECRET_BYTES: Final = 32
MAX_QUOTES: Final = len(BANKS)

_MEMBERS: Final = (
    *("v", "ek_pub", "ek_chain", "key_pub", "ak_parent_pub", "log", "ima", "boot_id", "csr"),
)
_CHALLENGE_MEMBERS: Final = (
    *("v", "nonce", "quote", "want", "ima_from", "ima_reset", "limits", "expires_ms", "csr"),
)
_WANTS: Final = frozenset({"log", "ima", "time"})
_HEX = re.compile(r"[0-9a-f]*")
_PCR = re.compile(r"[0-9]|1[0-9]|2[0-3]")


@dataclass(frozen=True, slots=True)
class AkEvidence:
    """The attestation key as it came.

    Attributes:
        public: TPMT_PUBLIC without size prefix.
        create_data: TPMS_CREATION_DATA.
        create_attestation: TPMS_ATTEST of type creation, signed by the key itself.
        create_signature: TPMT_SIGNATURE.
    """

    public: bytes
    create_data: bytes
    create_attestation: bytes
    create_signature: bytes


@dataclass(frozen=True, slots=True)
class LogAnnouncement:
    """A boot log the node could send: its size in bytes and lower-case hex SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class AttestationData:
    """The agent's first message.

    Attributes:
        ek_certificate: DER, None when the TPM has none.
        ek_spki: DER SubjectPublicKeyInfo of the endorsement key; None when only the certificate
            was sent.
        ak: attestation key and proof of its creation.
        ek_pub: TPMT_PUBLIC of the endorsement key; None in dialects A and B, which have none of
            what follows.
        ek_chain: DER intermediates, leaf side first.
        key_pub: TPMT_PUBLIC of the CSR's key, None when it is not in the TPM.
        ak_parent_pub: TPMT_PUBLIC of the AK's parent, None for a primary key.
        log: announcement of a boot log.
        ima_entries: how long the node's IMA list is, None without one.
        boot_id: the kernel's boot id.
        csr: whether this half knows the CSR's key and can bind its evidence to it; a foreign host
            does not show it.
    """

    ek_certificate: bytes | None
    ek_spki: bytes | None
    ak: AkEvidence
    ek_pub: bytes | None
    ek_chain: tuple[bytes, ...] = ()
    key_pub: bytes | None = None
    ak_parent_pub: bytes | None = None
    log: LogAnnouncement | None = None
    ima_entries: int | None = None
    boot_id: str | None = None
    csr: bool = True


@dataclass(frozen=True, slots=True)
class ChallengeMessage:
    """The server's challenge.

    Attributes:
        credential: TPM2B_ID_OBJECT with size prefix.
        secret: TPM2B_ENCRYPTED_SECRET with size prefix.
        nonce: 32 bytes.
        quote: what to quote; one quote per entry, in this order.
        want: further evidence asked for, of `log`, `ima` and `time`.
        ima_from: first IMA entry wanted, unless the TPM was reset.
        ima_reset: reset count of the boot `ima_from` is about; under another one the list is
            wanted from its start. None when it is wanted from there anyway.
        limits: name to bytes or entries the server takes.
        expires_ms: how long the challenge lives.
        csr: whether evidence has to be bound to the CSR's key; false when one of both halves does
            not know it, and then nothing is said about that key.
    """

    credential: bytes
    secret: bytes
    nonce: bytes
    quote: tuple[PcrSelection, ...]
    want: tuple[str, ...] = ()
    ima_from: int = 0
    ima_reset: int | None = None
    limits: tuple[tuple[str, int], ...] = (("response_bytes", MAX_RESPONSE_BYTES),)
    expires_ms: int = 30_000
    csr: bool = True


@dataclass(frozen=True, slots=True)
class SignedStatement:
    """TPMS_ATTEST and TPMT_SIGNATURE."""

    attest: bytes
    sig: bytes


@dataclass(frozen=True, slots=True)
class QuoteEvidence:
    """One quote and the PCR values it covers: bank to PCR number to value."""

    attest: bytes
    sig: bytes
    pcrs: Mapping[str, Mapping[int, bytes]]


@dataclass(frozen=True, slots=True)
class Response:
    """The agent's answer.

    Attributes:
        secret: what activation gave.
        quotes: one per entry asked for.
        certify: statement about the CSR's key; None when `key_pub` was not sent.
        time: TPM2_GetTime statement, only for owner-hierarchy AKs.
        log: boot log, zlib.
        ima: part of the IMA list, zlib.
        ima_from: first entry of that part.
        ima_left: how many entries follow that part.
    """

    secret: bytes
    quotes: tuple[QuoteEvidence, ...]
    certify: SignedStatement | None = None
    time: SignedStatement | None = None
    log: bytes | None = None
    ima: bytes | None = None
    ima_from: int | None = None
    ima_left: int | None = None


# --- writing ---------------------------------------------------------------------------------


def encode_attestation_data(data: AttestationData) -> bytes:
    """Return the first message; certificate before key, as dialects A and B read it."""
    ek = pem.join(data.ek_certificate, data.ek_spki)
    ak = {
        "Public": data.ak.public,
        "UseTCSDActivationFormat": False,
        "CreateData": data.ak.create_data,
        "CreateAttestation": data.ak.create_attestation,
        "CreateSignature": data.ak.create_signature,
    }
    outer: dict[str, object] = {"EK": ek, "AK": ak}
    if data.ek_pub is not None:
        outer["spire_hw"] = _our_data(data, data.ek_pub)
    return strictjson.dump(outer)


def _our_data(data: AttestationData, ek_pub: bytes) -> dict[str, object]:
    ours: dict[str, object] = {"v": DIALECT, "ek_pub": ek_pub, "ek_chain": data.ek_chain}
    if data.key_pub is not None:
        ours["key_pub"] = data.key_pub
    if data.ak_parent_pub is not None:
        ours["ak_parent_pub"] = data.ak_parent_pub
    if data.log is not None:
        ours["log"] = {"size": data.log.size, "sha256": data.log.sha256}
    if data.ima_entries is not None:
        ours["ima"] = {"entries": data.ima_entries}
    if data.boot_id is not None:
        ours["boot_id"] = data.boot_id
    if not data.csr:
        ours["csr"] = False
    return ours


def encode_challenge(message: ChallengeMessage) -> bytes:
    """Return the challenge message."""
    ours: dict[str, object] = {
        "v": DIALECT,
        "nonce": message.nonce,
        "quote": [{"bank": s.bank, "pcrs": list(s.pcrs)} for s in message.quote],
        "want": list(message.want),
        "ima_from": message.ima_from,
        "limits": dict(message.limits),
        "expires_ms": message.expires_ms,
    }
    if message.ima_reset is not None:
        ours["ima_reset"] = message.ima_reset
    if not message.csr:
        ours["csr"] = False
    ec = {"Credential": message.credential, "Secret": message.secret}
    return strictjson.dump({"EC": ec, "spire_hw": ours})


def encode_response(response: Response) -> bytes:
    """Return the answer to a challenge."""
    ours: dict[str, object] = {"v": DIALECT, "quotes": [_quote_json(q) for q in response.quotes]}
    for name, statement in (("certify", response.certify), ("time", response.time)):
        if statement is not None:
            ours[name] = {"attest": statement.attest, "sig": statement.sig}
    rest = {
        "log": response.log,
        "ima": response.ima,
        "ima_from": response.ima_from,
        "ima_left": response.ima_left,
    }
    ours |= {name: value for name, value in rest.items() if value is not None}
    return strictjson.dump({"Secret": response.secret, "spire_hw": ours})


def _quote_json(quote: QuoteEvidence) -> dict[str, object]:
    pcrs = {
        bank: {str(n): value.hex() for n, value in sorted(values.items())}
        for bank, values in quote.pcrs.items()
    }
    return {"attest": quote.attest, "sig": quote.sig, "pcrs": pcrs}


# --- reading ---------------------------------------------------------------------------------


def decode_attestation_data(payload: bytes) -> AttestationData:
    """Read the agent's first message.

    Raises:
        LimitError: larger than 64 KiB.
        InvalidInputError: anything else that is wrong with it.
    """
    if not payload:
        raise InvalidInputError("envelope: attestation data is missing")
    outer = strictjson.load(payload, MAX_PAYLOAD_BYTES)
    if "EC" in outer or ("Secret" in outer and "EK" not in outer):
        raise InvalidInputError("envelope: expected attestation data, got an answer")
    certificate, spki = pem.split(outer.blob("EK"))
    ak = _read_ak(outer.child("AK"))
    if "spire_hw" not in outer:
        return AttestationData(certificate, spki, ak, None, csr=False)
    ours = outer.child("spire_hw")
    check_version(ours)
    if found := {"quotes", "certify", "time"} & ours.names():
        raise InvalidInputError(f"envelope: evidence sent before it was asked for: {min(found)}")
    ours.closed(*_MEMBERS)
    return AttestationData(
        ek_certificate=certificate,
        ek_spki=spki,
        ak=ak,
        ek_pub=ours.blob("ek_pub"),
        ek_chain=_read_chain(ours),
        key_pub=ours.optional_blob("key_pub"),
        ak_parent_pub=ours.optional_blob("ak_parent_pub"),
        log=_read_log(ours),
        ima_entries=_read_ima(ours),
        boot_id=_read_boot_id(ours),
        csr=_read_csr(ours),
    )


def decode_challenge(data: bytes) -> ChallengeMessage:
    """Read the server's challenge.

    Raises:
        LimitError: larger than 64 KiB.
        InvalidInputError: anything else that is wrong with it.
    """
    outer = strictjson.load(data, MAX_CHALLENGE_BYTES)
    if "EC" not in outer:
        raise InvalidInputError("challenge: credential is missing")
    ours = outer.child("spire_hw")
    check_version(ours)
    ours.closed(*_CHALLENGE_MEMBERS)
    credential, sealed = read_credential(outer)
    nonce = ours.blob("nonce")
    if len(nonce) != NONCE_BYTES:
        raise InvalidInputError(f"challenge: nonce must be {NONCE_BYTES} bytes")
    want = tuple(ours.texts("want")) if "want" in ours else ()
    if set(want) - _WANTS or len(set(want)) != len(want):
        raise InvalidInputError("challenge: evidence asked for is not known")
    limits = ours.child("limits") if "limits" in ours else None
    return ChallengeMessage(
        credential=credential,
        secret=sealed,
        nonce=nonce,
        quote=tuple(_read_request(entry) for entry in ours.children("quote", MAX_QUOTES)),
        want=want,
        ima_from=ours.number("ima_from") if "ima_from" in ours else 0,
        ima_reset=ours.number("ima_reset") if "ima_reset" in ours else None,
        limits=_read_limits(limits),
        expires_ms=ours.number("expires_ms"),
        csr=_read_csr(ours),
    )


def read_credential(outer: StrictObject) -> tuple[bytes, bytes]:
    """Return TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET of a challenge of any dialect.

    Raises:
        InvalidInputError: one is missing or malformed.
    """
    ec = outer.child("EC")
    return (
        _check_sized(ec.blob("Credential"), "credential"),
        _check_sized(ec.blob("Secret"), "secret"),
    )


def decode_response(data: bytes) -> Response:
    """Read the agent's answer.

    Raises:
        LimitError: larger than 1 MiB.
        InvalidInputError: anything else that is wrong with it.
    """
    if not data:
        raise InvalidInputError("envelope: expected a challenge response")
    outer = strictjson.load(data, MAX_RESPONSE_BYTES)
    if "Secret" not in outer:
        raise InvalidInputError("envelope: expected a challenge response")
    secret = outer.blob("Secret", empty=True)
    ours = outer.child("spire_hw")
    check_version(ours)
    ours.closed("v", "quotes", "certify", "time", "log", "ima", "ima_from", "ima_left")
    return Response(
        secret=secret,
        quotes=tuple(_read_quote(entry) for entry in ours.children("quotes", MAX_QUOTES)),
        certify=_read_statement(ours, "certify"),
        time=_read_statement(ours, "time"),
        log=ours.optional_blob("log", empty=True),
        ima=ours.optional_blob("ima", empty=True),
        ima_from=ours.number("ima_from") if "ima_from" in ours else None,
        ima_left=ours.number("ima_left") if "ima_left" in ours else None,
    )


def _read_ak(ak: StrictObject) -> AkEvidence:
    if "UseTCSDActivationFormat" in ak and ak.flag("UseTCSDActivationFormat"):
        raise InvalidInputError("ak: TPM 1.2 format is not supported")
    return AkEvidence(
        public=ak.blob("Public"),
        create_data=ak.blob("CreateData"),
        create_attestation=ak.blob("CreateAttestation"),
        create_signature=ak.blob("CreateSignature"),
    )


def check_version(ours: StrictObject) -> None:
    """Refuse another version of our object.

    Raises:
        InvalidInputError: it is of another version.
    """
    version = ours.number("v", signed=True)
    if version != DIALECT:
        raise InvalidInputError(
            f"envelope: dialect {version} is not supported, this server speaks {DIALECT}"
        )


def _read_chain(ours: StrictObject) -> tuple[bytes, ...]:
    if "ek_chain" not in ours:
        return ()
    entries = ours.texts("ek_chain")
    if len(entries) > MAX_CHAIN:
        raise InvalidInputError(f"ek: chain is longer than {MAX_CHAIN} certificates")
    return tuple(strictjson.decode64(entry, "spire_hw.ek_chain") for entry in entries)


def _read_log(ours: StrictObject) -> LogAnnouncement | None:
    if "log" not in ours:
        return None
    log = ours.child("log", "envelope: evidence sent before it was asked for: log")
    log.closed("size", "sha256")
    digest = log.text("sha256")
    if not _HEX.fullmatch(digest) or len(digest) != 64:  # noqa: PLR2004
        raise InvalidInputError("envelope: spire_hw.log.sha256 is not a lower-case hex SHA-256")
    return LogAnnouncement(log.number("size"), digest)


def _read_ima(ours: StrictObject) -> int | None:
    if "ima" not in ours:
        return None
    ima = ours.child("ima", "envelope: evidence sent before it was asked for: ima")
    ima.closed("entries")
    return ima.number("entries")


def _read_boot_id(ours: StrictObject) -> str | None:
    if "boot_id" not in ours:
        return None
    value = ours.text("boot_id")
    if not is_boot_id(value):
        raise InvalidInputError("envelope: spire_hw.boot_id is not a UUID")
    return value


def _read_csr(ours: StrictObject) -> bool:
    known = ours.flag("csr") if "csr" in ours else True
    if not known and "key_pub" in ours:
        raise InvalidInputError(
            "envelope: key_pub says what the CSR's key is, csr that it is unknown"
        )
    return known


def _read_request(entry: StrictObject) -> PcrSelection:
    entry.closed("bank", "pcrs")
    bank, pcrs = entry.text("bank"), entry.numbers("pcrs")
    if bank not in BANKS or not pcrs or len(set(pcrs)) != len(pcrs) or max(pcrs) >= PCR_COUNT:
        raise InvalidInputError("challenge: PCR request is malformed")
    return PcrSelection(bank, tuple(sorted(pcrs)))


def _read_quote(entry: StrictObject) -> QuoteEvidence:
    entry.closed("attest", "sig", "pcrs")
    banks = entry.child("pcrs")
    if unknown := banks.names() - BANKS.keys():
        raise InvalidInputError(f"quote: bank {strictjson.shown(min(unknown))} is not known")
    values = {bank: _read_pcrs(banks.child(bank)) for bank in banks.names()}
    return QuoteEvidence(entry.blob("attest"), entry.blob("sig"), values)


def _read_pcrs(bank: StrictObject) -> dict[int, bytes]:
    found = {}
    for key in bank.names():
        if not _PCR.fullmatch(key):
            raise InvalidInputError("quote: PCR number is malformed")
        value = bank.text(key)
        if not _HEX.fullmatch(value) or len(value) % 2:
            raise InvalidInputError("quote: PCR value is not lower-case hex")
        found[int(key)] = bytes.fromhex(value)
    return found


def _read_limits(limits: StrictObject | None) -> tuple[tuple[str, int], ...]:
    if limits is None:
        return ()
    return tuple((name, limits.number(name)) for name in sorted(limits.names()))


def _read_statement(ours: StrictObject, name: str) -> SignedStatement | None:
    if name not in ours:
        return None
    entry = ours.child(name)
    entry.closed("attest", "sig")
    return SignedStatement(entry.blob("attest"), entry.blob("sig"))


def _check_sized(data: bytes, what: str) -> bytes:
    """Return a TPM2B when its size prefix is right and its size plausible."""
    limit = 2 + 2 * 66 + max(size for _, size in HASHES.values()) + 512
    if not 2 < len(data) <= limit or int.from_bytes(data[:2], "big") != len(data) - 2:  # noqa: PLR2004
        raise InvalidInputError(f"challenge: {what} is malformed")
    return data

"""The evidence document: what is said about one key, at one time, for one nonce, under a signature.

It is a compact JWS of type `key-evidence+jwt`. The key that signs is named in it; what that
signature is worth depends on whether the reader knows this key (`evidence.verify`). A statement
that the device itself signed travels inside, as the device gave it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, VerificationError
from spire_hw.jose import jws
from spire_hw.jose.text import encode_json, parse_json_object
from spire_hw.key import fingerprint, parse_spki, spki_der
from spire_hw.plugin.custody import Custody, DeviceStatement
from spire_hw.plugin.keymanager import KeyEvidence

if TYPE_CHECKING:
    from spire_hw.key import PublicKey, Signer

TYPE: Final = "key-evidence+jwt"
MIN_NONCE_BYTES, MAX_NONCE_BYTES = 8, 64
_VERSION: Final = 1
_WHAT: Final = "evidence"
_DOMAIN: Final = b"spire-hw key evidence v1\x00"
_MAX_TEXTS: Final = 64
_MAX_TEXT: Final = 1024
_MAX_PARTS: Final = 16

# What a reader is told of each kind of custody: the strongest thing that stands behind it.
WORDS: Final = {
    Custody.HSM_ATTESTED: "the HSM's statement, signed by its maker's key",
    Custody.HSM_REPORTED: "the device's word, read back by this process",
    Custody.TPM_CERTIFIED: "the TPM's statement, signed by its attestation key",
    Custody.SOFTWARE: "nobody's word: the key is in software",
    Custody.SIGNER_STATED: "the word of a signer on another host, which did not sign it",
    Custody.UNKNOWN: "nobody's word: the KeyManager does not say where the key is",
}


@dataclass(frozen=True, slots=True)
class KeyReport:
    """What is said about one key.

    Attributes:
        key_id: the KeyManager's name for it.
        spki: DER SubjectPublicKeyInfo.
        evidence: where it lives.
        last_used: when it signed last, None when that is not known.
    """

    key_id: str
    spki: bytes
    evidence: KeyEvidence
    last_used: datetime | None = None

    @property
    def fingerprint(self) -> str:
        """Return the lower-case hex SHA-256 of the public key."""
        return fingerprint(self.spki)


@dataclass(frozen=True, slots=True)
class Document:
    """What an evidence document holds.

    Attributes:
        trust_domain: whose server says so.
        key: the key it is about.
        signer: the key that signs the document, and where that one lives.
        nonce: the requester's.
        made_at: when.
        statement: what the device signed, None when it signs nothing.
    """

    trust_domain: str
    key: KeyReport
    signer: KeyReport
    nonce: bytes
    made_at: datetime
    statement: DeviceStatement | None = field(default=None, repr=False)


def challenge(nonce: bytes, trust_domain: str, spki: bytes) -> bytes:
    """Return the 32 bytes a device's statement has to hold: nonce, trust domain and key."""
    bound = (nonce, trust_domain.encode(), hashlib.sha256(spki).digest())
    return hashlib.sha256(
        _DOMAIN + b"".join(len(part).to_bytes(2) + part for part in bound)
    ).digest()


async def sign(document: Document, signer: Signer) -> str:
    """Return the document under the signature of the key it names.

    Raises:
        SpireHwError: the signer failed.
    """
    payload = encode_json(_encode(document))
    return await jws.sign_compact(payload, signer, document.signer.fingerprint, typ=TYPE)


def parse(text: str) -> tuple[Document, PublicKey]:
    """Read a document and check that the key it names signed it; return both.

    Raises:
        EncodingError: not such a document.
        VerificationError: the signature does not hold.
    """
    compact = jws.parse_compact(text.strip(), types=frozenset({TYPE}))
    document = _decode(parse_json_object(compact.payload, _WHAT))
    if compact.header.get("typ") != TYPE:
        raise VerificationError("the text is a token, but no evidence about a key")
    if compact.kid != document.signer.fingerprint:
        raise VerificationError("the document names another key than its signature does")
    key = parse_spki(document.signer.spki)
    jws.verify(compact, key)
    return document, key


def _encode(document: Document) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "version": _VERSION,
        "trust_domain": document.trust_domain,
        "nonce": document.nonce.hex(),
        "made_at": _time(document.made_at),
        "word": WORDS[document.key.evidence.custody],
        "key": encode_report(document.key),
        "signer": encode_report(document.signer),
    }
    if document.statement is not None:
        parts = {name: part.hex() for name, part in document.statement.parts.items()}
        fields["statement"] = {"kind": document.statement.kind, "parts": parts}
    return fields


def encode_report(report: KeyReport) -> dict[str, Any]:
    """Return what is said about a key as plain values."""
    evidence = report.evidence
    return {
        "id": report.key_id,
        "fingerprint": report.fingerprint,
        "spki": report.spki.hex(),
        "custody": evidence.custody.value,
        "location": _plain(evidence.location),
        "device": _plain(evidence.device),
        "token": _plain(evidence.token),
        "generation": evidence.generation,
        "created": _time(evidence.created),
        "last_used": _time(report.last_used),
        "attributes": {_plain(k): _plain(v) for k, v in evidence.attributes.items()},
    }


def _plain(text: str) -> str:
    """Return what a device says of itself as readers take it."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_TEXT])


def _time(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _decode(fields: dict[str, Any]) -> Document:
    reader = _Reader(fields)
    if reader.number("version") != _VERSION:
        raise EncodingError(_WHAT, "has a version that is not known")
    made_at = reader.moment("made_at")
    if made_at is None:
        raise EncodingError(_WHAT, "has no time")
    nonce = reader.raw("nonce")
    if not MIN_NONCE_BYTES <= len(nonce) <= MAX_NONCE_BYTES:
        raise EncodingError(_WHAT, f"has a nonce of {len(nonce)} bytes")
    statement = fields.get("statement")
    return Document(
        trust_domain=reader.text("trust_domain"),
        key=_decode_report(reader.table("key")),
        signer=_decode_report(reader.table("signer")),
        nonce=nonce,
        made_at=made_at,
        statement=None if statement is None else _decode_statement(reader.table("statement")),
    )


def _decode_report(fields: dict[str, Any]) -> KeyReport:
    reader = _Reader(fields)
    try:
        custody = Custody(reader.text("custody"))
    except ValueError as e:
        raise EncodingError(_WHAT, "names a custody that is not known") from e
    evidence = KeyEvidence(
        reader.text("location"),
        reader.texts("attributes"),
        custody,
        reader.text("device"),
        reader.text("token"),
        reader.number("generation"),
        reader.moment("created"),
    )
    report = KeyReport(
        reader.text("id"),
        spki_der(parse_spki(reader.raw("spki"))),
        evidence,
        reader.moment("last_used"),
    )
    if report.fingerprint != reader.text("fingerprint"):
        raise EncodingError(_WHAT, "has a fingerprint that is not that of its key")
    return report


def _decode_statement(fields: dict[str, Any]) -> DeviceStatement:
    reader = _Reader(fields)
    parts = reader.table("parts")
    if len(parts) > _MAX_PARTS:
        raise EncodingError(_WHAT, "has a statement of too many parts")
    inner = _Reader(parts)
    return DeviceStatement(reader.text("kind"), {name: inner.raw(name) for name in parts})


class _Reader:
    """Takes members of an object that anybody may have written."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def text(self, name: str) -> str:
        found = self._fields.get(name)
        if not isinstance(found, str) or len(found) > _MAX_TEXT or not found.isprintable():
            raise EncodingError(_WHAT, f'has no proper text "{name[:32]}"')
        return found

    def texts(self, name: str) -> dict[str, str]:
        found = self.table(name)
        if len(found) > _MAX_TEXTS:
            raise EncodingError(_WHAT, f'has too many members of "{name}"')
        inner = _Reader(found)
        return {key: inner.text(key) for key in found if len(key) <= _MAX_TEXT}

    def table(self, name: str) -> dict[str, Any]:
        found = self._fields.get(name)
        if not isinstance(found, dict):
            raise EncodingError(_WHAT, f'has no object "{name[:32]}"')
        return found

    def number(self, name: str) -> int:
        found = self._fields.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 2**53:
            raise EncodingError(_WHAT, f'has no proper number "{name}"')
        return found

    def moment(self, name: str) -> datetime | None:
        if self._fields.get(name) is None:
            return None
        seconds = self.number(name)
        if seconds >= 2**37:  # beyond any date
            raise EncodingError(_WHAT, f'has no proper time "{name}"')
        return datetime.fromtimestamp(seconds, UTC)

    def raw(self, name: str) -> bytes:
        found = self._fields.get(name)
        try:
            return bytes.fromhex(found if isinstance(found, str) else "?")
        except ValueError as e:
            raise EncodingError(_WHAT, f'has no proper bytes "{name[:32]}"') from e

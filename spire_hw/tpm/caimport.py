"""Which certificates of a published collection may vouch for TPMs, and as what.

Collections hold more than that: CAs of attestation keys, platform certificates, leaves, copies.
Every certificate gets a verdict with its reason; nothing is dropped in silence.

Spec: TCG EK Credential Profile, section 3.4.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Final

from spire_hw.errors import AttestationError, InvalidInputError
from spire_hw.tpm.certificate import Certificate, KeyUsage, parse_certificate
from spire_hw.tpm.certsig import is_sha1, verify_signature
from spire_hw.tpm.ekcert import EK_PURPOSE, EXTENDED_KEY_USAGE, UNDERSTOOD, read_purposes
from spire_hw.tpm.names import common_name, format_name
from spire_hw.tpm.public import key_label

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

_ANY_PURPOSE: Final = "2.5.29.37.0"
_FINGERPRINT_CHARS: Final = 16
_MAX_SLUG_CHARS: Final = 80
_UNSAFE = re.compile(r"[^A-Za-z0-9]+")


class Kind(Enum):
    """What became of a certificate."""

    ROOT = "root"
    INTERMEDIATE = "intermediate"
    DUPLICATE = "duplicate"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Blob:
    """One certificate as it was found; `name` tells where, with `#2` for the second of a file."""

    name: str
    der: bytes


@dataclass(frozen=True, slots=True)
class Judged:
    """One certificate of a collection and what became of it.

    Attributes:
        name: where it was found.
        kind: what became of it.
        reason: why it was refused, or which it is a copy of; "" otherwise.
        certificate: None when it does not parse.
        notes: what an operator should know of one that was taken.
    """

    name: str
    kind: Kind
    reason: str = ""
    certificate: Certificate | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_taken(self) -> bool:
        """Tell whether it is a root or an intermediate."""
        return self.kind in {Kind.ROOT, Kind.INTERMEDIATE}

    @property
    def fingerprint(self) -> str:
        """Return the lower-case hex SHA-256 of its DER, "" when it does not parse."""
        return "" if self.certificate is None else hashlib.sha256(self.certificate.der).hexdigest()

    @property
    def file_name(self) -> str:
        """Return a file name that says what it is and is its own alone."""
        name = "" if self.certificate is None else common_name(self.certificate.subject)
        slug = _UNSAFE.sub("-", name)[:_MAX_SLUG_CHARS].strip("-") or "ca"
        return f"{slug}-{self.fingerprint[:_FINGERPRINT_CHARS]}.pem"

    def values(self) -> dict[str, object]:
        """Return the same as plain values."""
        out: dict[str, object] = {
            "name": self.name,
            "kind": self.kind.value,
            "reason": self.reason,
            "notes": list(self.notes),
            "fingerprint": self.fingerprint,
        }
        if self.certificate is not None:
            out |= describe(self.certificate)
        return out


def describe(found: Certificate) -> dict[str, object]:
    """Return what people want to know of a CA certificate, as plain values."""
    return {
        "subject": format_name(found.subject),
        "issuer": format_name(found.issuer),
        "not_before": found.not_before.isoformat(),
        "not_after": found.not_after.isoformat(),
        "key": key_label(found.key),
    }


def judge(blobs: Iterable[Blob], at: datetime) -> list[Judged]:
    """Return a verdict for every certificate, in order.

    Args:
        blobs: certificates; nothing about them was checked.
        at: the time for notes about dates. Dates alone refuse nothing: issuers are judged for the
            time a TPM was made.
    """
    seen: dict[bytes, str] = {}
    found: list[Judged] = []
    for blob in blobs:
        if blob.der in seen:
            found.append(Judged(blob.name, Kind.DUPLICATE, f"same as {seen[blob.der]}"))
            continue
        seen[blob.der] = blob.name
        found.append(_judge_alone(blob))
    by_subject: dict[bytes, list[Certificate]] = defaultdict(list)
    for one in found:
        if one.is_taken and one.certificate is not None:
            by_subject[one.certificate.subject].append(one.certificate)
    return [_judge_among(one, by_subject, at) for one in found]


def _judge_alone(blob: Blob) -> Judged:
    try:
        parsed = parse_certificate(blob.der, "certificate")
        reason = _fault(parsed)
    except InvalidInputError as e:
        return Judged(blob.name, Kind.REFUSED, e.message)
    if reason:
        return Judged(blob.name, Kind.REFUSED, reason, parsed)
    kind = Kind.ROOT if parsed.is_self_issued else Kind.INTERMEDIATE
    return Judged(blob.name, kind, "", parsed)


def _fault(found: Certificate) -> str:
    """Return why a certificate cannot be a CA of endorsement keys, "" when it can."""
    if not found.is_ca:
        return "not a CA certificate"
    if found.key_usage is not None and not found.key_usage & KeyUsage.KEY_CERT_SIGN:
        return "its key usage does not let it sign certificates"
    for oid, one in found.extensions.items():
        if one.critical and oid not in UNDERSTOOD:
            return f"critical extension {oid} is not understood"
    extension = found.extensions.get(EXTENDED_KEY_USAGE)
    if extension is not None:
        purposes = read_purposes(extension.value)
        if not purposes & {EK_PURPOSE, _ANY_PURPOSE}:
            listed = ", ".join(sorted(purposes)) or "none"
            return f"not for endorsement keys: its extended key usage is {listed}"
    if found.is_self_issued and not _is_signed(found, found):
        return "self-issued, but not signed with its own key"
    return ""


def _is_signed(subject: Certificate, issuer: Certificate) -> bool:
    try:
        verify_signature(subject, issuer.key, allow_sha1=True)
    except (AttestationError, InvalidInputError):
        return False
    return True


def _judge_among(
    one: Judged, by_subject: Mapping[bytes, Sequence[Certificate]], at: datetime
) -> Judged:
    """Look at a certificate's issuer, and at what may be said of one that is taken."""
    found = one.certificate
    if not one.is_taken or found is None:
        return one
    notes = []
    if one.kind is Kind.INTERMEDIATE:
        issuers = by_subject.get(found.issuer, ())
        if not issuers:
            notes.append("its issuer is not among them")
        elif not any(_is_signed(found, issuer) for issuer in issuers):
            return replace(one, kind=Kind.REFUSED, reason="its issuer's key did not sign it")
        if is_sha1(found):
            notes.append(f"signed with SHA-1: sha1_ca_fingerprints has to list {one.fingerprint}")
    if found.not_after < at:
        notes.append(f"expired {found.not_after:%Y-%m-%d}: good for TPMs made before that")
    if found.not_before > at:
        notes.append(f"not valid before {found.not_before:%Y-%m-%d}")
    return replace(one, notes=tuple(notes))

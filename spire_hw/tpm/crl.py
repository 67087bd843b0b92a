"""Certificate revocation lists of TPM manufacturers: is a certificate revoked, or is that unknown?

A list counts when its issuer's key signed it, it is complete for the certificate asked about and
its time has not run out. A list that is there but does not count leaves the state unknown, which
is never the same as "not revoked". A certificate on a list that ran out stays revoked.

Spec: RFC 5280, sections 5 and 6.3.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from spire_hw.errors import AttestationError, ErrorKind, Finding, InvalidInputError
from spire_hw.tpm import der
from spire_hw.tpm.certificate import Certificate, Extension, KeyUsage, read_extensions
from spire_hw.tpm.certsig import verify_signature

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

MAX_CRL_BYTES: Final = 1 << 20
_DELTA: Final = "2.5.29.27"
_SCOPE: Final = "2.5.29.28"
_ENTRY_ISSUER: Final = "2.5.29.29"
_DISTRIBUTION_POINTS: Final = "2.5.29.31"
_UNDERSTOOD: Final = frozenset({_DELTA, _SCOPE, "2.5.29.20", "2.5.29.35"})
_ENTRY_UNDERSTOOD: Final = frozenset({"2.5.29.21", "2.5.29.23", "2.5.29.24"})
_TIMES: Final = frozenset({der.UTC_TIME, der.GENERALIZED_TIME})
_POINT, _USERS, _CAS, _REASONS, _INDIRECT, _ATTRIBUTES = 0xA0, 0x81, 0x82, 0x83, 0x84, 0x85
_TRUE: Final = b"\xff"
_MAX_RELATED: Final = 16
_DENIED: Final = ErrorKind.PERMISSION_DENIED
_PEM = re.compile(rb"-----BEGIN X509 CRL-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END X509 CRL-----")


@dataclass(frozen=True, slots=True)
class Scope:
    """Which certificates of its issuer a list is about.

    Attributes:
        users: end entities.
        cas: CAs.
        points: raw names of distribution points; empty for all.
    """

    users: bool = True
    cas: bool = True
    points: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Crl:
    """A parsed list; equal to another only when it is the same object.

    Attributes:
        tbs: the signed part, as it came.
        signature_algorithm: raw AlgorithmIdentifier.
        signature: the signature.
        issuer: raw name.
        this_update: when it was made.
        next_update: when it runs out; None where it does not say, and then it never counts.
        revoked: serials.
        is_complete: neither a delta nor an indirect list nor one of some reasons, and without a
            critical extension that is not understood.
        scope: which certificates it is about.
    """

    tbs: bytes = field(repr=False)
    signature_algorithm: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    issuer: bytes = field(repr=False)
    this_update: datetime
    next_update: datetime | None
    revoked: frozenset[int] = field(repr=False)
    is_complete: bool
    scope: Scope

    def concerns(self, subject: Certificate) -> bool:
        """Tell whether a certificate of its issuer is one it is about."""
        if not (self.scope.cas if subject.is_ca else self.scope.users):
            return False
        return not self.scope.points or bool(self.scope.points & _points_of(subject))

    def is_fresh(self, at: datetime) -> bool:
        """Tell whether its time has come and not run out."""
        return self.next_update is not None and self.this_update <= at <= self.next_update


def split_crls(blob: bytes) -> list[bytes]:
    """Return the DER of every list of a file: PEM blocks, or DER.

    Raises:
        InvalidInputError: a PEM block of another kind, or not base64.
    """
    if b"-----BEGIN" not in blob:
        return [blob]
    blocks = _PEM.findall(blob)
    if len(blocks) != blob.count(b"-----BEGIN"):
        raise InvalidInputError("unexpected or malformed PEM block beside revocation lists")
    try:
        return [base64.b64decode(b"".join(one.split()), validate=True) for one in blocks]
    except binascii.Error as e:
        raise InvalidInputError("PEM block is not base64") from e


def parse_crl(raw: bytes, what: str = "revocation list") -> Crl:
    """Read one list that fills the input.

    Raises:
        EncodingError: not DER, not a list, malformed dates.
        InvalidInputError: larger than 1 MiB.
    """
    if len(raw) > MAX_CRL_BYTES:
        raise InvalidInputError(f"{what}: larger than {MAX_CRL_BYTES} bytes")
    outer = der.read_all(raw, what, der.SEQUENCE)
    parts = outer.members()
    if len(parts) != 3:  # noqa: PLR2004 - tbs, algorithm, signature
        raise outer.fail("not a revocation list")
    tbs = parts[0].expect(der.SEQUENCE)
    fields = tbs.members()
    if fields and fields[0].tag == der.INTEGER:
        fields = fields[1:]
    if len(fields) < 3:  # noqa: PLR2004 - algorithm, issuer, thisUpdate
        raise tbs.fail("not a revocation list")
    inner, issuer, this_update, *rest = fields
    if inner.raw != parts[1].raw:
        raise parts[1].fail("signature algorithms inside and outside differ")
    began = der.time(this_update)
    ends = der.time(rest.pop(0)) if rest and rest[0].tag in _TIMES else None
    if ends is not None and ends < began:
        raise tbs.fail("it runs out before it begins")
    revoked, plain = frozenset[int](), True
    if rest and rest[0].tag == der.SEQUENCE:
        revoked, plain = _read_entries(rest.pop(0))
    extensions = read_extensions(tbs, rest, 0xA0)
    scope, whole = _read_scope(extensions, what)
    known = all(oid in _UNDERSTOOD for oid, e in extensions.items() if e.critical)
    return Crl(
        tbs=tbs.raw,
        signature_algorithm=parts[1].raw,
        signature=der.bit_string(parts[2]),
        issuer=issuer.expect(der.SEQUENCE).raw,
        this_update=began,
        next_update=ends,
        revoked=revoked,
        is_complete=plain and whole and known and _DELTA not in extensions,
        scope=scope,
    )


def _read_entries(listed: der.Value) -> tuple[frozenset[int], bool]:
    """Return the serials, and whether no entry needs more than the serial to be understood."""
    found, plain = set(), True
    for entry in listed.members():
        parts = entry.expect(der.SEQUENCE).members()
        if len(parts) not in {2, 3} or parts[1].tag not in _TIMES:
            raise entry.fail("entry is malformed")
        found.add(der.any_integer(parts[0]))
        if len(parts) == 3:  # noqa: PLR2004 - with extensions
            plain = plain and _is_plain(parts[2].raw, listed.what)
    return frozenset(found), plain


@lru_cache(maxsize=64)
def _is_plain(raw: bytes, what: str) -> bool:
    """Tell whether an entry's extensions can be passed over; a list has the same few."""
    plain = True
    for one in der.read_all(raw, what, der.SEQUENCE).members():
        parts = one.expect(der.SEQUENCE).members()
        if len(parts) not in {2, 3}:
            raise one.fail("extension is malformed")
        oid = der.oid(parts[0])
        critical = len(parts) == 3 and der.boolean(parts[1])  # noqa: PLR2004 - with the flag
        plain = plain and oid != _ENTRY_ISSUER and not (critical and oid not in _ENTRY_UNDERSTOOD)
    return plain


def _read_scope(extensions: dict[str, Extension], what: str) -> tuple[Scope, bool]:
    """Return the scope, and whether the list has all revocations within it."""
    extension = extensions.get(_SCOPE)
    if extension is None:
        return Scope(), True
    users, cas, points, whole = True, True, frozenset[bytes](), True
    for part in der.read_all(extension.value, f"{what}: scope", der.SEQUENCE).members():
        if part.tag == _POINT:
            points = _full_names(part)
            whole = whole and bool(points)
        elif part.tag == _USERS:
            cas = part.content != _TRUE
        elif part.tag == _CAS:
            users = part.content != _TRUE
        elif part.tag in {_REASONS, _INDIRECT, _ATTRIBUTES}:
            whole = False
        else:
            raise part.fail("malformed")
    return Scope(users, cas, points), whole


def _full_names(point: der.Value) -> frozenset[bytes]:
    """Return the raw names of a DistributionPointName, none for a relative one."""
    names = der.read(point.content, point.what)
    if names.tag != _POINT or len(names.raw) != len(point.content):
        return frozenset()
    return frozenset(name.raw for name in names.members())


def _points_of(subject: Certificate) -> frozenset[bytes]:
    extension = subject.extensions.get(_DISTRIBUTION_POINTS)
    return frozenset() if extension is None else _read_points(extension.value)


@lru_cache(maxsize=64)
def _read_points(value: bytes) -> frozenset[bytes]:
    found: set[bytes] = set()
    what = "ek: CRL distribution points"
    for point in der.read_all(value, what, der.SEQUENCE).members():
        for part in point.expect(der.SEQUENCE).members():
            if part.tag == _POINT:
                found |= _full_names(part)
    return frozenset(found)


@lru_cache(maxsize=256)
def is_signed_by(crl: Crl, issuer: Certificate) -> bool:
    """Tell whether a list is this issuer's; looked at once for each pair of objects."""
    usage = issuer.key_usage
    if usage is not None and not usage & KeyUsage.CRL_SIGN:
        return False
    try:
        verify_signature(crl, issuer.key)
    except (AttestationError, InvalidInputError):
        return False
    return True


class Revocations:
    """Lists in lookup form."""

    def __init__(self, crls: Iterable[Crl] = (), *, required: bool = False) -> None:
        """Sort lists by issuer.

        Args:
            crls: parsed lists; nothing about them was checked.
            required: every certificate below a root needs a list that counts.
        """
        by_issuer: dict[bytes, list[Crl]] = defaultdict(list)
        for crl in crls:
            by_issuer[crl.issuer].append(crl)
        self._by_issuer = {
            # The newest first: one issuer's old lists do not hide its new one.
            issuer: tuple(sorted(found, key=lambda c: c.this_update, reverse=True)[:_MAX_RELATED])
            for issuer, found in by_issuer.items()
        }
        self._required = required

    @property
    def crls(self) -> tuple[Crl, ...]:
        """Return all lists that are looked at."""
        return tuple(crl for found in self._by_issuer.values() for crl in found)

    def check(
        self, subject: Certificate, issuer: Certificate, at: datetime, stage: str = "ek"
    ) -> None:
        """Demand that a certificate is not revoked.

        Args:
            subject: the certificate.
            issuer: whose key was found to have signed it.
            at: the time to check for.
            stage: what the certificate is for, in codes and messages.

        Raises:
            AttestationError: `ek_revoked` (denied); `ek_revocation_unknown` (unavailable) when
                lists of this issuer exist and none counts, or when there is none and one is
                required. Another stage stands for `ek` in them.
            EncodingError: the certificate's distribution points are malformed.

        Spec: RFC 5280, section 6.3.3.
        """
        related = [c for c in self._by_issuer.get(subject.issuer, ()) if c.concerns(subject)]
        counts = False
        for crl in related:
            if not is_signed_by(crl, issuer):
                continue
            if crl.is_complete and subject.serial in crl.revoked:
                raise _refuse(stage, "revoked", "certificate is revoked", _DENIED)
            counts = counts or (crl.is_complete and crl.is_fresh(at))
        if not counts and (related or self._required):
            text = "revocation state is not known"
            raise _refuse(stage, "revocation_unknown", text, ErrorKind.UNAVAILABLE)


def _refuse(stage: str, code: str, text: str, kind: ErrorKind) -> AttestationError:
    return AttestationError([Finding(f"{stage}_{code}", f"{stage}: {text}", kind)])

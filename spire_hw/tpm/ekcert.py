"""Endorsement certificates and the roots of TPM manufacturers.

Answers whether a certificate leads to a configured root and what it says about the TPM. Genuine
certificates have oddities that general libraries refuse (sets out of order, OAEP key identifiers,
negative serials, empty subjects), so reading is done here over the original bytes, and only
signatures are left to `cryptography`. Path validation itself is not relaxed: dates, CA flag, path
length, key usage and unknown critical extensions are all checked.

Spec: TCG EK Credential Profile, section 3; RFC 5280, section 6.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from spire_hw.errors import (
    AttestationError,
    EncodingError,
    ErrorKind,
    Finding,
    InvalidInputError,
    WeakKeyError,
)
from spire_hw.tpm import certificate, der, ekmodel
from spire_hw.tpm.certificate import Certificate, KeyUsage, parse_certificate
from spire_hw.tpm.certsig import verify_signature
from spire_hw.tpm.ekmodel import TpmModel, read_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from spire_hw.tpm.crl import Revocations

MAX_DEPTH: Final = 6
_MAX_SIGNATURE_CHECKS: Final = 64

EK_PURPOSE: Final = "2.23.133.8.1"
EXTENDED_KEY_USAGE: Final = "2.5.29.37"
_NEVER_OF_EK: Final = (KeyUsage.DIGITAL_SIGNATURE, KeyUsage.KEY_CERT_SIGN, KeyUsage.CRL_SIGN)
UNDERSTOOD: Final = frozenset(
    {
        ekmodel.SAN,
        EXTENDED_KEY_USAGE,
        certificate.BASIC_CONSTRAINTS,
        certificate.KEY_USAGE,
        "2.5.29.32",
    }
)


class ChainTime(Enum):
    """When the certificates of a path have to be valid.

    Manufacturers let issuers expire long before the TPMs they vouched for are retired; the
    default asks the leaf to be valid now and its issuers to have been valid when it was made.
    """

    STRICT = "strict"
    ISSUER_AT_LEAF_ISSUANCE = "issuer_at_leaf_issuance"
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True)
class VerifiedEk:
    """An endorsement certificate that leads to a root.

    Attributes:
        certificate: the leaf.
        model: what it says about the TPM.
        root_fingerprint: lower-case hex SHA-256 of the root's DER.
    """

    certificate: Certificate
    model: TpmModel
    root_fingerprint: str


@dataclass(frozen=True, slots=True)
class EkRoots:
    """Trusted certificates of manufacturers.

    Attributes:
        anchors: self-issued certificates; a path ends at one.
        intermediates: helpers for building paths; trusted for nothing by themselves.
        pinned: SHA-256 fingerprints of certificates that may be signed with SHA-1.
    """

    anchors: tuple[Certificate, ...]
    intermediates: tuple[Certificate, ...] = ()
    pinned: frozenset[str] = field(default=frozenset())
    _anchors: _BySubject = field(init=False, repr=False)
    _intermediates: _BySubject = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Make both findable by subject: published collections hold hundreds."""
        object.__setattr__(self, "_anchors", _by_subject(self.anchors))
        object.__setattr__(self, "_intermediates", _by_subject(self.intermediates))

    def anchors_named(self, subject: bytes) -> Sequence[Certificate]:
        """Return the anchors with this raw name."""
        return self._anchors.get(subject, ())

    def intermediates_named(self, subject: bytes) -> Sequence[Certificate]:
        """Return the intermediates with this raw name."""
        return self._intermediates.get(subject, ())

    @classmethod
    def of(cls, certificates: Iterable[Certificate], pinned: Iterable[str] = ()) -> EkRoots:
        """Sort certificates into roots and intermediates."""
        found = {c.der: c for c in certificates}.values()
        return cls(
            anchors=tuple(c for c in found if c.is_self_issued),
            intermediates=tuple(c for c in found if not c.is_self_issued),
            pinned=frozenset(pinned),
        )


_BySubject = dict[bytes, list[Certificate]]


def _by_subject(found: Iterable[Certificate]) -> _BySubject:
    out: _BySubject = {}
    for one in found:
        out.setdefault(one.subject, []).append(one)
    return out


def verify_ek_certificate(
    leaf: Certificate,
    chain: Sequence[bytes],
    roots: EkRoots,
    at: datetime,
    *,
    chain_time: ChainTime = ChainTime.ISSUER_AT_LEAF_ISSUANCE,
    revocations: Revocations | None = None,
) -> VerifiedEk:
    """Check that an endorsement certificate leads to a configured root.

    Args:
        leaf: the parsed certificate.
        chain: DER intermediates the node sent, at most 6.
        roots: what is trusted.
        at: the time to check for.
        chain_time: how dates are judged.
        revocations: revocation lists; None to ask none.

    Raises:
        InvalidInputError: the chain is too long or does not parse, or the leaf's names are
            malformed.
        AttestationError: not trusted; codes `ek_untrusted`, `ek_ca`, `ek_issuer`, `ek_expired`,
            `ek_issuer_expired`, `ek_critical_extension`, `ek_extended_key_usage`,
            `ek_key_usage`, `ek_signature_algorithm`, `ek_weak`, `ek_revoked`, all denied;
            `ek_revocation_unknown`, unavailable.
    """
    if len(chain) > MAX_DEPTH:
        raise InvalidInputError(f"ek: chain is longer than {MAX_DEPTH} certificates")
    try:
        supplied = [_parse_intermediate(one) for one in chain]
    except WeakKeyError as e:
        raise _deny("ek_weak", e.message.removeprefix("ek: ")) from e
    model = read_model(leaf)
    _check_leaf(leaf, at, chain_time)
    pool = [c for c in supplied if not c.is_self_issued]
    root = _Search(leaf, roots, pool, at, chain_time, revocations=revocations).run()
    return VerifiedEk(leaf, model, hashlib.sha256(root.der).hexdigest())


@functools.lru_cache(maxsize=128)
def _parse_intermediate(raw: bytes) -> Certificate:
    """Read an intermediate; a fleet sends the same few over and over."""
    return parse_certificate(raw, "ek: intermediate certificate")


@functools.lru_cache(maxsize=256)
def _verify_link(subject: Certificate, issuer: Certificate, *, allow_sha1: bool) -> None:
    """Check a signature between issuers, once for each pair of objects; failures are not kept.

    Whatever depends on time or on the path is checked anew each time.
    """
    verify_signature(subject, issuer.key, allow_sha1=allow_sha1)


def _deny(code: str, text: str) -> AttestationError:
    return AttestationError([Finding(code, f"ek: {text}", ErrorKind.PERMISSION_DENIED)])


def _check_leaf(leaf: Certificate, at: datetime, chain_time: ChainTime) -> None:
    if chain_time is not ChainTime.IGNORE and not leaf.not_before <= at <= leaf.not_after:
        dates = f"{leaf.not_before:%Y-%m-%d} to {leaf.not_after:%Y-%m-%d}"
        raise _deny("ek_expired", f"certificate is not valid now ({dates})")
    if leaf.is_ca:
        raise _deny("ek_ca", "endorsement certificate claims to be a CA")
    _check_critical(leaf)
    extension = leaf.extensions.get(EXTENDED_KEY_USAGE)
    if extension is not None and EK_PURPOSE not in read_purposes(extension.value):
        raise _deny("ek_extended_key_usage", "certificate is not for an endorsement key")
    usage = leaf.key_usage
    needed = KeyUsage.KEY_ENCIPHERMENT if leaf.is_rsa else KeyUsage.KEY_AGREEMENT
    if usage is None or needed not in usage or any(bit in usage for bit in _NEVER_OF_EK):
        raise _deny("ek_key_usage", "key usage does not fit")


@functools.lru_cache(maxsize=64)
def read_purposes(value: bytes) -> frozenset[str]:
    """Return the purposes an extended key usage extension names, as dotted OIDs.

    Raises:
        EncodingError: malformed.
    """
    what = "ek: extended key usage"
    return frozenset(der.oid(one) for one in der.read_all(value, what, der.SEQUENCE).members())


def _check_critical(found: Certificate) -> None:
    for oid, extension in found.extensions.items():
        if extension.critical and oid not in UNDERSTOOD:
            raise _deny("ek_critical_extension", f"critical extension {oid} is not understood")


class _Search:
    """Looks for one path from a leaf to an anchor, with a budget of signature checks."""

    def __init__(
        self,
        leaf: Certificate,
        roots: EkRoots,
        pool: Sequence[Certificate],
        at: datetime,
        chain_time: ChainTime,
        *,
        revocations: Revocations | None,
    ) -> None:
        self._leaf = leaf
        self._roots = roots
        self._pool = pool
        self._at = at
        self._chain_time = chain_time
        self._revocations = revocations
        self._checks = 0
        self._reason: AttestationError | None = None

    def run(self) -> Certificate:
        """Return the anchor of the first path that holds.

        Raises:
            AttestationError: there is none; the most telling reason met on the way.
        """
        root = self._extend([self._leaf])
        if root is None:
            raise self._reason or _deny("ek_untrusted", "issuer is not trusted")
        return root

    def _extend(self, path: list[Certificate]) -> Certificate | None:
        last = path[-1]
        for anchor in self._roots.anchors_named(last.issuer):
            if self._links(path, anchor) and self._is_unrevoked([*path, anchor]):
                return anchor
        if len(path) >= MAX_DEPTH:
            return None
        supplied = (c for c in self._pool if c.subject == last.issuer)
        for issuer in (*self._roots.intermediates_named(last.issuer), *supplied):
            if any(issuer.der == c.der for c in path):
                continue
            if self._links(path, issuer):
                root = self._extend([*path, issuer])
                if root is not None:
                    return root
        return None

    def _links(self, path: list[Certificate], issuer: Certificate) -> bool:
        try:
            self._check_issuer(path, issuer)
            self._check_link(path[-1], issuer)
        except AttestationError as e:
            self._reason = self._reason or e
            return False
        return True

    def _is_unrevoked(self, path: list[Certificate]) -> bool:
        """Ask revocation lists, last: issuers that lead nowhere must not cost a look at them."""
        if self._revocations is None:
            return True
        try:
            for subject, issuer in itertools.pairwise(path):
                self._revocations.check(subject, issuer, self._at)
        except AttestationError as e:
            if self._reason is None or e.findings[0].code == "ek_revoked":
                self._reason = e
            return False
        return True

    def _check_issuer(self, path: list[Certificate], issuer: Certificate) -> None:
        if not issuer.is_ca:
            raise _deny("ek_issuer", "issuer is not a CA certificate")
        usage = issuer.key_usage
        if usage is not None and KeyUsage.KEY_CERT_SIGN not in usage:
            raise _deny("ek_issuer", "issuer may not sign this certificate: key usage")
        below = sum(1 for c in path[1:] if not c.is_self_issued)
        if issuer.path_length is not None and below > issuer.path_length:
            raise _deny("ek_issuer", "issuer may not sign this certificate: path length")
        _check_critical(issuer)
        self._check_dates(issuer)

    def _check_dates(self, issuer: Certificate) -> None:
        if self._chain_time is ChainTime.STRICT:
            if not issuer.not_before <= self._at <= issuer.not_after:
                raise _deny("ek_issuer_expired", "issuer certificate is not valid now")
        elif self._chain_time is ChainTime.ISSUER_AT_LEAF_ISSUANCE:
            made = self._leaf.not_before
            if not issuer.not_before <= made <= issuer.not_after:
                text = "issuer was expired when this certificate was made"
                if made < issuer.not_before:
                    text = "issuer was not yet valid when this certificate was made"
                raise _deny("ek_issuer_expired", text)

    def _check_link(self, subject: Certificate, issuer: Certificate) -> None:
        self._checks += 1
        if self._checks > _MAX_SIGNATURE_CHECKS:
            raise _deny("ek_untrusted", "issuer is not trusted: too many candidates")
        pinned = self._roots.pinned
        weak = bool(pinned) and hashlib.sha256(subject.der).hexdigest() in pinned
        try:
            if subject is self._leaf:
                verify_signature(subject, issuer.key, allow_sha1=weak)
            else:
                _verify_link(subject, issuer, allow_sha1=weak)
        except EncodingError as e:
            raise _deny("ek_signature_algorithm", e.message) from e
        except InvalidInputError as e:
            raise _deny("ek_signature_algorithm", e.message.removeprefix("ek: ")) from e
        except AttestationError as e:
            known = issuer in self._roots.anchors
            text = "signature does not verify"
            raise _deny("ek_untrusted", text + (" with the trusted issuer" if known else "")) from e

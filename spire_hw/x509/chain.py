"""Is there a path from a certificate to one of the roots we were given.

The path rules of RFC 5280 are those of `cryptography`; this module bounds the work, fits the policy
to SPIFFE (no host names, roots without key usage) and says why there is no path.

Spec: RFC 5280 section 6; SPIFFE X509-SVID section 5.
"""

from __future__ import annotations

from itertools import islice, product
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509 import verification

from spire_hw.errors import ChainError, InvalidInputError
from spire_hw.key import spki_der
from spire_hw.x509.certificate import public_key_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime

MAX_CHAIN: Final = 10
_MAX_INTERMEDIATES: Final = MAX_CHAIN - 1
_MAX_CHOICES: Final = 8


class UnknownAuthorityError(ChainError):
    """Nothing in the chain was signed by any of the roots."""


def verify_chain(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    at: datetime,
) -> list[x509.Certificate]:
    """Find a valid path from a leaf to a root.

    Args:
        leaf: not a CA; its names and key usage are the caller's business.
        intermediates: in any order, untrusted; with the leaf at most 10.
        roots: the trust anchors, of one trust domain only.
        at: the time at which all of the path has to be valid, aware.

    Returns:
        The path, leaf first, root last.

    Raises:
        UnknownAuthorityError: no root signed anything of it.
        ChainError: too long, weak keys, expired, or against another rule.
    """
    if len(intermediates) > _MAX_INTERMEDIATES:
        raise ChainError(f"chain has more than {MAX_CHAIN} certificates")
    if not roots:
        raise UnknownAuthorityError("there is no root to verify the chain with")
    for certificate in (leaf, *intermediates):
        _check_key(certificate)
    builder = (
        verification.PolicyBuilder()
        .store(verification.Store(list(roots)))
        .time(at)
        .max_chain_depth(_MAX_INTERMEDIATES)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY)
    )
    verifier = builder.build_client_verifier()
    cause: Exception | None = None
    for choice in _choices(intermediates):
        try:
            path = list(verifier.verify(leaf, choice).chain)
        except (verification.VerificationError, ValueError, UnsupportedAlgorithm) as e:
            cause = e
            continue
        if len(path) == 1:
            raise ChainError("leaf is itself in the list of roots; a root has to have signed it")
        return path
    raise _explain(leaf, intermediates, roots, at) from cause


def find_paths(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    roots: Iterable[x509.Certificate],
    at: datetime,
) -> list[list[x509.Certificate]]:
    """Find a valid path from a leaf to each root that there is one to, at least one.

    Arguments and the form of a path are those of `verify_chain`.

    Raises:
        UnknownAuthorityError: no root has the name of an issuer.
        ChainError: what is wrong with the first that has.
    """
    paths: list[list[x509.Certificate]] = []
    issuers = {certificate.issuer for certificate in (leaf, *intermediates)}
    fault: ChainError | None = None
    for root in roots:
        if root.subject not in issuers:
            continue
        try:
            paths.append(verify_chain(leaf, intermediates, [root], at))
        except ChainError as e:
            fault = fault or e
    if not paths:
        raise fault or UnknownAuthorityError("is signed by no authority that is trusted here")
    return paths


def _check_basic_constraints(
    _policy: verification.Policy, _certificate: x509.Certificate, value: x509.BasicConstraints
) -> None:
    if not value.ca:
        raise ValueError("issuer is not a CA")


def _check_key_usage(
    _policy: verification.Policy, _certificate: x509.Certificate, value: x509.KeyUsage | None
) -> None:
    if value is not None and not value.key_cert_sign:
        raise ValueError("issuer may not sign certificates")


def _check_not_ca(
    _policy: verification.Policy,
    _certificate: x509.Certificate,
    value: x509.BasicConstraints | None,
) -> None:
    if value is not None and value.ca:
        raise ValueError("leaf is a CA")


_CA_POLICY: Final = (
    verification.ExtensionPolicy.permit_all()
    .require_present(
        x509.BasicConstraints, verification.Criticality.AGNOSTIC, _check_basic_constraints
    )
    .may_be_present(x509.KeyUsage, verification.Criticality.AGNOSTIC, _check_key_usage)
)
_LEAF_POLICY: Final = verification.ExtensionPolicy.permit_all().may_be_present(
    x509.BasicConstraints, verification.Criticality.AGNOSTIC, _check_not_ca
)


def _check_key(certificate: x509.Certificate) -> None:
    try:
        public_key_of(certificate)
    except InvalidInputError as e:
        raise ChainError(f"a certificate of the chain has an unusable key: {e.message}") from e


def _choices(intermediates: Sequence[x509.Certificate]) -> Iterator[list[x509.Certificate]]:
    """Yield selections in which each (subject, key) stands once.

    With that, every certificate has at most one issuer among the others, and the path search
    stays linear: certificates that sign each other in all combinations cannot blow it up.
    """
    groups: dict[tuple[bytes, bytes], list[x509.Certificate]] = {}
    for certificate in intermediates:
        name = certificate.subject.public_bytes(), spki_der(public_key_of(certificate))
        groups.setdefault(name, []).append(certificate)
    for choice in islice(product(*groups.values()), _MAX_CHOICES):
        yield list(choice)


def _explain(
    leaf: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    at: datetime,
) -> ChainError:
    for certificate in (leaf, *intermediates):
        if wrong := _out_of_time(certificate, at):
            return ChainError(f"certificate {wrong}")
    issuers = [r for r in roots if any(_is_issued_by(c, r) for c in (leaf, *intermediates))]
    for root in issuers:
        if wrong := _out_of_time(root, at):
            return ChainError(f"certificate's authority {wrong}")
    if issuers:
        return ChainError("chain leads to a root, but breaks a rule of path validation")
    return UnknownAuthorityError("certificate is signed by an unknown authority")


def _out_of_time(certificate: x509.Certificate, at: datetime) -> str:
    """Return how a certificate is out of its time, with the clock to compare, "" if it is not."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = at.replace(microsecond=0).isoformat()
    if at > end:
        return f"has expired at {end.isoformat()}; the clock here says {now}"
    if at < begin:
        return f"is not valid before {begin.isoformat()}; the clock here says {now}"
    return ""


def _is_issued_by(certificate: x509.Certificate, root: x509.Certificate) -> bool:
    if certificate.issuer != root.subject:
        return False
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True

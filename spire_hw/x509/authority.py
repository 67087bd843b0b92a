"""An X.509 authority: a CA certificate, the key behind it, and the parts of DER it puts in others.

The parts are prepared once, so that issuing is joining bytes and one signature.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cryptography import x509

from spire_hw.errors import InvalidInputError
from spire_hw.key import Signer, spki_der
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509 import extension
from spire_hw.x509.certificate import load_certificate, public_key_of, subject_key_id
from spire_hw.x509.scheme import SignatureScheme, scheme_of

if TYPE_CHECKING:
    from datetime import datetime


class Issuing(Protocol):
    """What an issuer puts into a certificate, and what signs it."""

    @property
    def signer(self) -> Signer:
        """Return its key."""
        ...

    @property
    def scheme(self) -> SignatureScheme:
        """Return how it signs."""
        ...

    @property
    def issuer_part(self) -> bytes:
        """Return DER of signature algorithm and issuer name."""
        ...

    @property
    def key_id_part(self) -> bytes:
        """Return DER of the authority key identifier extension."""
        ...

    @property
    def not_after(self) -> datetime:
        """Return its end, which nothing it issues outlives."""
        ...


def _load(certificate: bytes, signer: Signer) -> x509.Certificate:
    loaded = load_certificate(certificate)
    if spki_der(public_key_of(loaded)) != spki_der(signer.public_key):
        raise InvalidInputError("the CA certificate is not about the signer's key")
    return loaded


def _parts(certificate: x509.Certificate, key_id: bytes) -> dict[str, object]:
    """Return the fields that every authority prepares."""
    scheme, subject = scheme_of(public_key_of(certificate)), certificate.subject.public_bytes()
    return {
        "subject_der": subject,
        "not_before": certificate.not_valid_before_utc,
        "not_after": certificate.not_valid_after_utc,
        "scheme": scheme,
        "issuer_part": scheme.algorithm + subject,
        "key_id_part": extension.authority_key_id(key_id),
    }


@dataclass(frozen=True, slots=True)
class ParentCa:
    """A CA above those of trust domains: it issues their CA certificates and no SVIDs.

    Args:
        certificate: DER of the CA certificate.
        signer: its key.

    Attributes:
        subject_der: its subject.
        not_before: start of its validity.
        not_after: end of its validity.

    Raises:
        EncodingError: certificate does not parse.
        InvalidInputError: not a CA, one that may have no CA below, or another key's.

    Spec: RFC 5280 sections 4.2.1.3 and 4.2.1.9.
    """

    certificate: bytes
    signer: Signer
    subject_der: bytes = field(init=False, repr=False)
    not_before: datetime = field(init=False)
    not_after: datetime = field(init=False)
    scheme: SignatureScheme = field(init=False, repr=False)
    issuer_part: bytes = field(init=False, repr=False)
    key_id_part: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        certificate = _load(self.certificate, self.signer)
        check_parent_certificate(certificate)
        for name, value in _parts(certificate, subject_key_id(certificate)).items():
            object.__setattr__(self, name, value)


def check_parent_certificate(certificate: x509.Certificate, below: int = 1) -> None:
    """Check that a certificate may issue CA certificates.

    Args:
        certificate: of a root or an intermediate.
        below: how many CA certificates shall stand between it and a leaf.

    Raises:
        InvalidInputError: it may not; the message says why.
    """
    name = certificate.subject.rfc4514_string()
    extensions = certificate.extensions
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound as e:
        raise InvalidInputError(f'certificate of "{name}" is not a CA: no basic constraints') from e
    if not constraints.ca:
        raise InvalidInputError(f'certificate of "{name}" is not a CA')
    if constraints.path_length is not None and constraints.path_length < below:
        raise InvalidInputError(
            f'path length {constraints.path_length} of "{name}" leaves no room for a CA below it: '
            f"it takes at least {below}"
        )
    try:
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not usage.key_cert_sign:
        raise InvalidInputError(f'key usage of "{name}" does not let it sign certificates')


@dataclass(frozen=True, slots=True)
class X509Authority:
    """Something that issues certificates of one trust domain.

    Args:
        certificate: DER of the CA certificate; has to pass `check_ca_certificate`.
        signer: its key.
        chain: what peers get after a leaf: DER of this certificate and the intermediates above
            it, without the root; empty for a self-signed authority, which is a root itself.

    Attributes:
        trust_domain: from the certificate's URI SAN.
        subject_der: its subject, the issuer of what it issues.
        subject_key_id: its subject key identifier; hex of it is the authority ID.
        not_before: start of its validity.
        not_after: end of its validity, which nothing it issues outlives.
        scheme: how it signs.

    Raises:
        EncodingError: certificate does not parse.
        InvalidInputError: not a CA certificate, or the signer's key is another one.
    """

    certificate: bytes
    signer: Signer
    chain: tuple[bytes, ...] = ()
    trust_domain: TrustDomain = field(init=False)
    subject_der: bytes = field(init=False, repr=False)
    subject_key_id: bytes = field(init=False)
    not_before: datetime = field(init=False)
    not_after: datetime = field(init=False)
    scheme: SignatureScheme = field(init=False, repr=False)
    issuer_part: bytes = field(init=False, repr=False)
    key_id_part: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        certificate = _load(self.certificate, self.signer)
        key_id = subject_key_id(certificate)
        prepared = {
            **_parts(certificate, key_id),
            "trust_domain": check_ca_certificate(certificate),
            "subject_key_id": key_id,
        }
        for name, value in prepared.items():
            object.__setattr__(self, name, value)

    @property
    def authority_id(self) -> str:
        """Return upstream's name for it: the subject key identifier in lower-case hex."""
        return self.subject_key_id.hex()

    def svid_chain(self, leaf: bytes) -> tuple[bytes, ...]:
        """Return a leaf of this authority with all that peers need to reach the root."""
        return (leaf, *self.chain)


def check_ca_certificate(
    certificate: x509.Certificate, trust_domain: TrustDomain | None = None
) -> TrustDomain:
    """Check that a certificate may sign SVIDs of a trust domain.

    Args:
        certificate: ours, or what an upstream authority made of our request.
        trust_domain: whose it has to be, None when it may be anybody's.

    Returns:
        The trust domain its URI SAN names.

    Raises:
        InvalidInputError: not a CA, wrong key usage, or not exactly the trust domain's URI.
    """
    extensions = certificate.extensions
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as e:
        raise InvalidInputError(f"CA certificate lacks an extension: {e}") from e
    if not constraints.ca:
        raise InvalidInputError("CA certificate does not have CA set")
    foreign = (
        usage.content_commitment
        or usage.key_encipherment
        or usage.data_encipherment
        or usage.key_agreement
    )
    if not usage.key_cert_sign or foreign:
        raise InvalidInputError(
            "CA certificate must have keyCertSign, and cRLSign and digitalSignature at most beside it"
        )
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise InvalidInputError("CA certificate must have exactly one URI SAN")
    owner = SpiffeId.parse(uris[0])
    if owner.path:
        raise InvalidInputError(f'URI SAN "{owner}" of the CA certificate has a path')
    if trust_domain not in {None, owner.trust_domain}:
        raise InvalidInputError(
            f'CA certificate is of "{owner.trust_domain}", not "{trust_domain}"'
        )
    return owner.trust_domain

"""X509-SVIDs: what a chain says, and whether it is true.

Spec: SPIFFE X509-SVID sections 2 to 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509

from spire_hw.bundle.bundle import Bundle
from spire_hw.errors import InvalidInputError, SpiffeIdError, SvidError
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509.certificate import encode_der, load_certificate, public_key_of
from spire_hw.x509.chain import MAX_CHAIN, verify_chain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from spire_hw.key import PublicKey


@dataclass(frozen=True, slots=True)
class X509Svid:
    """A chain that has the form of an X509-SVID; nothing of it is proved.

    Attributes:
        spiffe_id: the leaf's only URI SAN.
        chain: DER certificates, leaf first.
        certificates: the same, parsed.
        public_key: the leaf's key.
        not_before: start of the leaf's validity.
        not_after: end of the leaf's validity.
    """

    spiffe_id: SpiffeId
    chain: tuple[bytes, ...] = field(repr=False)
    certificates: tuple[x509.Certificate, ...] = field(repr=False)
    public_key: PublicKey = field(repr=False)
    not_before: datetime
    not_after: datetime

    @property
    def leaf(self) -> x509.Certificate:
        """Return the leaf certificate."""
        return self.certificates[0]

    @property
    def serial_number(self) -> int:
        """Return the leaf's serial number."""
        return self.certificates[0].serial_number


def parse_x509_svid(chain: Sequence[bytes | x509.Certificate]) -> X509Svid:
    """Read a chain and check the form of its leaf.

    Args:
        chain: DER or parsed certificates, leaf first, 1 to 10.

    Raises:
        SvidError: a certificate does not parse, or the leaf breaks a rule for SVIDs.
    """
    if not 1 <= len(chain) <= MAX_CHAIN:
        raise SvidError(f"chain does not have 1 to {MAX_CHAIN} certificates")
    try:
        certificates = tuple(
            load_certificate(item) if isinstance(item, bytes) else item for item in chain
        )
        leaf = certificates[0]
        spiffe_id = _check_leaf(leaf)
        public_key = public_key_of(leaf)
    except InvalidInputError as e:
        raise SvidError(e.message) from e
    return X509Svid(
        spiffe_id,
        tuple(item if isinstance(item, bytes) else encode_der(item) for item in chain),
        certificates,
        public_key,
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
    )


def verify_x509_svid(
    chain: Sequence[bytes | x509.Certificate] | X509Svid,
    bundles: Bundle | Mapping[TrustDomain, Bundle],
    at: datetime,
) -> SpiffeId:
    """Prove who a chain belongs to.

    Args:
        chain: DER or parsed certificates, leaf first, or a parsed SVID.
        bundles: of one or several trust domains; only that of the ID's own domain is used.
        at: the current time.

    Returns:
        The SPIFFE ID.

    Raises:
        SvidError: not an SVID, or of a trust domain without bundle.
        ChainError: no valid path to that trust domain's roots; `UnknownAuthorityError` when none
            of them signed anything of it.
    """
    svid = chain if isinstance(chain, X509Svid) else parse_x509_svid(chain)
    owner = svid.spiffe_id.trust_domain
    if isinstance(bundles, Bundle):
        bundle = bundles if bundles.trust_domain == owner else None
    else:
        bundle = bundles.get(owner)
    if bundle is None or bundle.trust_domain != owner:
        raise SvidError(f'no bundle for trust domain "{owner}"')
    verify_chain(svid.leaf, svid.certificates[1:], bundle.root_certificates(), at)
    return svid.spiffe_id


def spiffe_id_of(certificate: x509.Certificate) -> SpiffeId:
    """Return the SPIFFE ID a certificate claims: its only URI SAN.

    Raises:
        SvidError: none, several, or something else than a SPIFFE ID.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as e:
        raise SvidError("certificate has no URI SAN") from e
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise SvidError("certificate does not have exactly one URI SAN")
    try:
        return SpiffeId.parse(uris[0])
    except SpiffeIdError as e:
        raise SvidError(f"URI SAN: {e.message}") from e


def _check_leaf(leaf: x509.Certificate) -> SpiffeId:
    if leaf.version != x509.Version.v3:
        raise SvidError("certificate is not X.509 version 3")
    spiffe_id = spiffe_id_of(leaf)
    if not spiffe_id.path:
        raise SvidError(f'"{spiffe_id}" has no path: a signing certificate is not an SVID leaf')
    for extension in leaf.extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            raise SvidError("leaf is a CA")
        if isinstance(value, x509.KeyUsage):
            if value.key_cert_sign or value.crl_sign:
                raise SvidError("leaf may sign certificates or revocation lists")
            if not value.digital_signature:
                raise SvidError("leaf may not make digital signatures")
    return spiffe_id

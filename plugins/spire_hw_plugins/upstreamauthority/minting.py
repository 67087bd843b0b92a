"""What all authorities that sign here have in common: certificates in files, requests, new CAs.

Where the key is, is the business of each plugin.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.bundle.bundle import X509Root
from spire_hw.errors import ChainError, InvalidInputError, NotReadyError, SpireHwError
from spire_hw.files import parse_file
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key, spki_der
from spire_hw.plugin.upstreamauthority import UpstreamX509Ca
from spire_hw.x509.authority import ParentCa, X509Authority, check_parent_certificate
from spire_hw.x509.certificate import encode_der, load_certificate, parse_pem, public_key_of
from spire_hw.x509.chain import verify_chain
from spire_hw.x509.csr import Csr, parse_csr
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid
from spire_hw.x509.name import CA_SUBJECT

if TYPE_CHECKING:
    from cryptography import x509

    from spire_hw.key import PublicKey, Signer
    from spire_hw.plugin.info import HostInfo
    from spire_hw.spiffeid import TrustDomain

_MAX_FILE_BYTES: Final = 1 << 20
_BACKDATE: Final = timedelta(seconds=10)
_DEFAULT_TTL: Final = timedelta(hours=1)
_CHECK_TTL: Final = timedelta(minutes=1)
_CHECK_PATH: Final = ("for", "upstream", "check", "only")


@dataclass(frozen=True, slots=True)
class Certificates:
    """The certificates above the server's CA.

    Attributes:
        issuing: DER of the certificate whose key signs.
        between: DER of those from there up to, not including, a root.
        roots: DER of the roots.
    """

    issuing: bytes
    between: tuple[bytes, ...]
    roots: tuple[bytes, ...]

    @property
    def public_key(self) -> PublicKey:
        """Return the key that signs."""
        return public_key_of(load_certificate(self.issuing))


def load_certificates(cert_file_path: str, bundle_file_path: str) -> Certificates:
    """Read the certificates above.

    Args:
        cert_file_path: PEM file: the certificate whose key signs, then intermediates.
        bundle_file_path: PEM file with the roots; "" when the first file holds one alone.

    Raises:
        NotReadyError: a file cannot be read.
        InvalidInputError: a file holds something else, or a certificate that may not be there.
    """
    path = Path(cert_file_path)
    certificates = parse_file(path, _MAX_FILE_BYTES, parse_pem)
    loaded = [load_certificate(data) for data in certificates]
    if bundle_file_path:
        bundle = Path(bundle_file_path)
        roots = parse_file(bundle, _MAX_FILE_BYTES, parse_pem)
    elif len(loaded) == 1 and _is_self_issued(loaded[0]):
        roots = certificates
    else:
        raise InvalidInputError(
            f"{path} is not one self-signed certificate alone: bundle_file_path has to name its roots"
        )
    for below, certificate in enumerate(loaded, 1):
        try:
            check_parent_certificate(certificate, below)
        except InvalidInputError as e:
            raise InvalidInputError(f"{path}: {e.message}") from e
    ends = set(roots)
    between = [
        encode_der(c) for c in loaded if encode_der(c) not in ends and not _is_self_issued(c)
    ]
    return Certificates(certificates[0], tuple(between), tuple(roots))


def _is_self_issued(certificate: x509.Certificate) -> bool:
    return certificate.issuer == certificate.subject


def read_request(data: bytes, trust_domain: TrustDomain) -> Csr:
    """Return a request for a CA of a trust domain.

    Raises:
        InvalidInputError: it is no request, for another key than it shows, or for something else.
    """
    try:
        csr = parse_csr(data)
    except SpireHwError as e:
        raise InvalidInputError(f"unable to sign CSR: {e.message}") from e
    if csr.uris != (str(trust_domain.id),) or csr.dns_names:
        names = ", ".join((*csr.uris, *csr.dns_names)) or "nothing"
        raise InvalidInputError(
            f"unable to sign CSR: it is for {names[:256]!a}; a CA of this trust domain asks for "
            f'"{trust_domain.id}" alone'
        )
    return csr


class Minter:
    """Signs CA certificates of one trust domain with whatever key it is given."""

    def __init__(self, host: HostInfo) -> None:
        self._trust_domain = host.trust_domain
        self._clock = host.clock

    async def check(self, certificates: Certificates, signer: Signer) -> None:
        """Make sure that what is signed will be believed: sign a CA for nobody, and verify it.

        Raises:
            InvalidInputError: key and certificate do not belong together.
            NotReadyError: what is signed would not be believed; the message says why.
            SpireHwError: the signer failed.
        """
        nobody = SoftwareSigner(generate_private_key(KeyType.EC_P256))
        now = self._clock.now()
        made = await self._issue(certificates, signer, spki_der(nobody.public_key), _CHECK_TTL)
        chain = (made, *certificates.between)
        leaf = await issue_x509_svid(
            X509Authority(made, nobody, chain),
            spki=spki_der(nobody.public_key),
            spiffe_id=self._trust_domain.member(*_CHECK_PATH),
            not_before=now - _BACKDATE,
            not_after=now + _CHECK_TTL,
        )
        roots = [load_certificate(der) for der in certificates.roots]
        try:
            verify_chain(load_certificate(leaf), [load_certificate(c) for c in chain], roots, now)
        except ChainError as e:
            raise NotReadyError(
                f"what this authority signs would not be believed: {e.message}; correct "
                "cert_file_path and bundle_file_path"
            ) from e

    async def mint(
        self, certificates: Certificates, signer: Signer, csr: bytes, ttl: timedelta
    ) -> UpstreamX509Ca:
        """Sign a CA certificate for a request.

        Raises:
            InvalidInputError: the request is not acceptable.
            NotReadyError: this authority has ended.
            SpireHwError: the signer failed.
        """
        request = read_request(csr, self._trust_domain)
        lifetime = ttl if ttl > timedelta(0) else _DEFAULT_TTL
        made = await self._issue(certificates, signer, request.spki, lifetime, request.subject)
        roots = tuple(X509Root(der) for der in certificates.roots)
        return UpstreamX509Ca((made, *certificates.between), roots)

    async def _issue(
        self,
        certificates: Certificates,
        signer: Signer,
        spki: bytes,
        ttl: timedelta,
        subject_der: bytes = CA_SUBJECT,
    ) -> bytes:
        parent = ParentCa(certificates.issuing, signer)
        now = self._clock.now()
        if now >= parent.not_after:
            raise NotReadyError(
                f"the authority above ended at {parent.not_after.isoformat()}: have its certificate "
                "renewed and put it into cert_file_path"
            )
        return await issue_ca_certificate(
            parent,
            trust_domain=self._trust_domain,
            not_before=now - _BACKDATE,
            not_after=now + ttl,
            spki=spki,
            subject_der=subject_der,
        )

"""The files of the way to a signer: whom to believe, what to show; and who a named signer is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.errors import InvalidInputError, VerificationError
from spire_hw.files import parse_file
from spire_hw.keyfile import load_private_key
from spire_hw.transport.tls import TlsIdentity
from spire_hw.x509.certificate import encode_der, load_certificate, load_pem, public_key_of
from spire_hw.x509.chain import verify_chain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path

    from spire_hw.spiffeid import SpiffeId
    from spire_hw_plugins.keymanager.remote.config import TlsFiles

_MAX_FILE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Papers:
    """What the files hold.

    Attributes:
        roots: whom to believe.
        identity: what to show.
        expires_at: when our certificate ends.
    """

    roots: tuple[x509.Certificate, ...]
    identity: TlsIdentity
    expires_at: datetime

    def bundle_for(self, signer_id: SpiffeId | None) -> Callable[[], Bundle] | None:
        """Return whom to believe about a SPIFFE ID; None for a signer that is known by name."""
        if signer_id is None:
            return None
        roots = tuple(X509Root(encode_der(root)) for root in self.roots)
        bundle = Bundle(signer_id.trust_domain, roots)
        return lambda: bundle


def read_papers(tls: TlsFiles) -> Papers:
    """Return what the files hold.

    Raises:
        NotReadyError: a file cannot be read.
        InvalidInputError: it is not what it should be, or key and certificate are no pair.
    """
    chain = parse_file(tls.cert, _MAX_FILE_BYTES, load_pem, "cert")
    roots = parse_file(tls.ca, _MAX_FILE_BYTES, load_pem, "signer_ca")
    key = load_private_key(tls.key)
    if key.public_key() != public_key_of(chain[0]):
        raise InvalidInputError(f"key {tls.key} does not belong to the certificate in {tls.cert}")
    identity = TlsIdentity(tuple(encode_der(one) for one in chain), private_key=key)
    return Papers(tuple(roots), identity, chain[0].not_valid_after_utc)


def stamp_of(tls: TlsFiles) -> tuple[object, ...]:
    """Return what changes whenever one of the files is replaced."""
    return tuple(_stamp(path) for path in tls.paths)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_named(
    chain: Sequence[bytes], roots: Sequence[x509.Certificate], name: str, at: datetime
) -> None:
    """Refuse a server that is not the one of a DNS name.

    Args:
        chain: DER certificates it showed, leaf first.
        roots: one of these has to have signed it.
        name: has to be among its DNS names, without wildcards.
        at: the time.

    Raises:
        VerificationError: it is another one.

    Spec: RFC 9525 sections 4 and 6.3.
    """
    try:
        shown = [load_certificate(data) for data in chain]
    except InvalidInputError as e:
        raise VerificationError(f"server certificate: {e.message}") from e
    if not shown:
        raise VerificationError("the server showed no certificate")
    leaf, *others = shown
    verify_chain(leaf, others, roots, at)
    names, uses = _names(leaf), _uses(leaf)
    if name.lower() not in names:
        found = ", ".join(sorted(names)) or "no DNS name"
        raise VerificationError(f"the server is {found}, expected {name}")
    if uses is not None and ExtendedKeyUsageOID.SERVER_AUTH not in uses:
        raise VerificationError("the server's certificate is not for servers")


def _names(leaf: x509.Certificate) -> set[str]:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return set()
    return {name.lower() for name in found.value.get_values_for_type(x509.DNSName)}


def _uses(leaf: x509.Certificate) -> x509.ExtendedKeyUsage | None:
    try:
        return leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return None

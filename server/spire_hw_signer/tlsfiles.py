"""The files of the TCP door: certificate and key of the signer, whom it believes, who was revoked.

They are read at the start and again when the operator says so; what cannot be used changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from spire_hw.errors import ChainError, InvalidInputError, NotReadyError
from spire_hw.files import parse_file
from spire_hw.key import spki_der
from spire_hw.keyfile import load_private_key
from spire_hw.transport.mutual import Pins
from spire_hw.transport.tls import TlsIdentity
from spire_hw.x509.certificate import encode_der, load_pem, public_key_of
from spire_hw.x509.chain import verify_chain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from pathlib import Path

_MAX_BYTES: Final = 1 << 20
_MAX_BELIEVED: Final = 1024


@dataclass(frozen=True, slots=True)
class TlsPaths:
    """Where the files are.

    Attributes:
        cert_file: the signer's certificate and those above it, PEM, leaf first, root left out.
        key_file: its private key, PEM.
        client_ca_files: authorities of clients, PEM.
        crl_files: revocation lists of those authorities, PEM.
    """

    cert_file: Path
    key_file: Path
    client_ca_files: tuple[Path, ...]
    crl_files: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class _Loaded:
    identity: TlsIdentity
    pins: Pins
    not_after: datetime
    revoked: frozenset[tuple[x509.Name, int]]
    crls_until: datetime | None
    believed: dict[tuple[x509.Certificate, ...], datetime] = field(default_factory=dict)


class TlsFiles:
    """What the files hold now; `load` reads them."""

    def __init__(self, paths: TlsPaths) -> None:
        self._paths = paths
        self._version = 0
        self._loaded: _Loaded | None = None

    def load(self) -> None:
        """Read all files; blocks on the disk.

        Raises:
            NotReadyError: a file cannot be read.
            InvalidInputError: a file does not hold what it should, or they do not fit together.
        """
        paths = self._paths
        chain = parse_file(paths.cert_file, _MAX_BYTES, load_pem, "cert_file")
        key = load_private_key(paths.key_file)
        if spki_der(key.public_key()) != spki_der(public_key_of(chain[0])):
            raise InvalidInputError(
                f"key_file {paths.key_file} is not the key of cert_file {paths.cert_file}"
            )
        authorities = tuple(
            certificate
            for path in paths.client_ca_files
            for certificate in parse_file(path, _MAX_BYTES, load_pem, "client_ca_files")
        )
        lists = [
            parse_file(path, _MAX_BYTES, lambda data: _read_crl(data, authorities), "crl_files")
            for path in paths.crl_files
        ]
        self._version += 1
        self._loaded = _Loaded(
            TlsIdentity(
                tuple(encode_der(c) for c in chain), private_key=key, version=self._version
            ),
            Pins(authorities, self._version),
            chain[0].not_valid_after_utc,
            frozenset().union(*(_serials(crl) for crl in lists)),
            _earliest(crl.next_update_utc for crl in lists),
        )

    def identity(self) -> TlsIdentity:
        """Return what the signer shows."""
        return self._now.identity

    def pins(self) -> Pins:
        """Return whom it believes."""
        return self._now.pins

    @property
    def not_after(self) -> datetime:
        """Return the end of the signer's certificate."""
        return self._now.not_after

    def is_revoked(self, chain: Sequence[x509.Certificate]) -> bool:
        """Tell whether a client's certificate, or one above it, is on a revocation list."""
        revoked = self._now.revoked
        return bool(revoked) and any((c.issuer, c.serial_number) in revoked for c in chain)

    def is_believed(self, chain: tuple[x509.Certificate, ...], now: datetime) -> bool:
        """Tell whether a client's certificate leads to an authority as they are now.

        It did when the connection was made; authorities may have been taken out since.

        Args:
            chain: as the client showed it, its own first.
            now: the time.
        """
        loaded = self._now
        until = loaded.believed.get(chain)
        if until is None or now > until:  # another path may last longer
            try:
                path = verify_chain(chain[0], chain[1:], loaded.pins.authorities, now)
            except ChainError:
                return False
            if len(loaded.believed) >= _MAX_BELIEVED:
                loaded.believed.clear()
            loaded.believed[chain] = min(c.not_valid_after_utc for c in path)
        return True

    def crls_are_old(self, now: datetime) -> bool:
        """Tell whether a revocation list has run out."""
        until = self._now.crls_until
        return until is not None and now >= until

    def fault(self, now: datetime) -> str:
        """Return what an operator has to do something about, "" for nothing."""
        loaded = self._now
        if now >= loaded.not_after:
            return f"certificate {self._paths.cert_file} has expired; renew it and send SIGHUP"
        if self.crls_are_old(now):
            return "a revocation list of crl_files has run out; fetch a new one and send SIGHUP"
        return ""

    @property
    def _now(self) -> _Loaded:
        if self._loaded is None:
            raise NotReadyError("the TLS files were not read yet")
        return self._loaded


def _read_crl(
    data: bytes, authorities: tuple[x509.Certificate, ...]
) -> x509.CertificateRevocationList:
    try:
        crl = x509.load_pem_x509_crl(data)
        issuers = [a for a in authorities if a.subject == crl.issuer]
        signed = any(crl.is_signature_valid(public_key_of(issuer)) for issuer in issuers)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise InvalidInputError("holds no revocation list in PEM") from e
    if not signed:
        raise InvalidInputError("is signed by none of client_ca_files")
    return crl


def _serials(crl: x509.CertificateRevocationList) -> frozenset[tuple[x509.Name, int]]:
    # As a name, not its bytes: the same one can be written with other kinds of text.
    issuer = crl.issuer
    return frozenset((issuer, entry.serial_number) for entry in crl)


def _earliest(times: Iterable[datetime | None]) -> datetime | None:
    return min((time for time in times if time is not None), default=None)

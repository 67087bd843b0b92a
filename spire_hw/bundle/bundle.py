"""What a trust domain's verifiers trust: its X.509 roots and JWT keys.

A bundle is a value: every change makes a new one, and a change that changes nothing returns the
bundle itself. Counting the sequence number up is left to who stores it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from spire_hw.errors import EncodingError, InvalidInputError, NotFoundError, NotReadyError
from spire_hw.key import PublicKey, parse_spki
from spire_hw.x509.certificate import load_certificate, subject_key_id

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from cryptography import x509

    from spire_hw.spiffeid import TrustDomain


@dataclass(frozen=True)
class X509Root:
    """An X.509 authority of a trust domain.

    Attributes:
        der: the certificate.
        tainted: compromised or about to be withdrawn; what chains to it has to be replaced.
    """

    der: bytes
    tainted: bool = False

    @cached_property
    def certificate(self) -> x509.Certificate:
        """Return the parsed certificate.

        Raises:
            EncodingError: not a certificate.
        """
        return load_certificate(self.der)

    @cached_property
    def authority_id(self) -> str:
        """Return the lower-case hex subject key identifier, upstream's name for the authority."""
        return subject_key_id(self.certificate).hex()

    @property
    def expires_at(self) -> datetime:
        """Return the end of the certificate's validity."""
        return self.certificate.not_valid_after_utc


@dataclass(frozen=True)
class JwtAuthority:
    """A key that signs JWT-SVIDs of a trust domain.

    Attributes:
        kid: key ID, not empty.
        pkix: DER SubjectPublicKeyInfo.
        expires_at: None when it does not expire.
        tainted: compromised or about to be withdrawn.
    """

    kid: str
    pkix: bytes
    expires_at: datetime | None = None
    tainted: bool = False

    @cached_property
    def public_key(self) -> PublicKey:
        """Return the parsed key.

        Raises:
            InvalidInputError: not a key, or one that is too weak.
        """
        return parse_spki(self.pkix)


@dataclass(frozen=True)
class Bundle:
    """The authorities of one trust domain.

    Attributes:
        trust_domain: whose they are.
        x509_authorities: oldest first, without duplicates.
        jwt_authorities: oldest first, each kid once.
        refresh_hint_s: seconds after which consumers should look again, 0 when not stated.
        sequence: grows with every change.
    """

    trust_domain: TrustDomain
    x509_authorities: tuple[X509Root, ...] = ()
    jwt_authorities: tuple[JwtAuthority, ...] = ()
    refresh_hint_s: int = 0
    sequence: int = 0

    @cached_property
    def _roots(self) -> tuple[x509.Certificate, ...]:
        roots = []
        for root in self.x509_authorities:
            try:
                roots.append(root.certificate)
            except EncodingError:
                continue  # one unusable authority does not disable the others
        return tuple(roots)

    @cached_property
    def _jwt_by_kid(self) -> dict[str, JwtAuthority]:
        return {authority.kid: authority for authority in self.jwt_authorities}

    def root_certificates(self) -> list[x509.Certificate]:
        """Return the parsed roots; those that do not parse are left out."""
        return list(self._roots)

    def jwt_key(self, kid: str) -> JwtAuthority | None:
        """Return the JWT authority with that key ID, None when there is none."""
        return self._jwt_by_kid.get(kid)

    def merged(self, other: Bundle) -> Bundle:
        """Return the union of both bundles' authorities; a taint on either side stays.

        Roots are the same when their bytes are, JWT keys when their kid is: a kid never changes
        its key. Refresh hint and sequence are this bundle's.

        Raises:
            InvalidInputError: another trust domain's bundle, or a kid with a different key.
        """
        if other.trust_domain != self.trust_domain:
            raise InvalidInputError(
                f'bundle of "{other.trust_domain}" cannot be merged into that of "{self.trust_domain}"'
            )
        roots = {root.der: root for root in self.x509_authorities}
        for root in other.x509_authorities:
            known = roots.get(root.der)
            if known is None or (root.tainted and not known.tainted):
                roots[root.der] = root
        keys = dict(self._jwt_by_kid)
        for key in other.jwt_authorities:
            held = keys.get(key.kid)
            if held is not None and held.pkix != key.pkix:
                raise InvalidInputError(f'JWT key ID "{key.kid}" is taken by a different key')
            if held is None:
                keys[key.kid] = key
            elif key.tainted and not held.tainted:
                keys[key.kid] = replace(held, tainted=True)
        return self._with(roots.values(), keys.values())

    def pruned(self, before: datetime) -> Bundle:
        """Return the bundle without the authorities that expired before a moment.

        Raises:
            NotReadyError: no X.509 authority, or no JWT authority, would be left.
        """
        roots = [root for root in self.x509_authorities if root.expires_at >= before]
        keys = [
            key
            for key in self.jwt_authorities
            if key.expires_at is None or key.expires_at >= before
        ]
        if self.x509_authorities and not roots:
            raise NotReadyError("every X.509 authority has expired; the bundle is left as it is")
        if self.jwt_authorities and not keys:
            raise NotReadyError("every JWT authority has expired; the bundle is left as it is")
        return self._with(roots, keys)

    def with_tainted_x509(self, authority_id: str) -> Bundle:
        """Return the bundle with the roots of that subject key ID marked tainted.

        Raises:
            NotFoundError: no such root.
            InvalidInputError: it is tainted already.
        """
        found = self._roots_of(authority_id)
        if all(root.tainted for root in found):
            raise InvalidInputError(f'X.509 authority "{authority_id}" is already tainted')
        return self._with(
            (replace(r, tainted=True) if r in found else r for r in self.x509_authorities),
            self.jwt_authorities,
        )

    def without_x509(self, authority_id: str) -> Bundle:
        """Return the bundle without the tainted roots of that subject key ID.

        Raises:
            NotFoundError: no such root.
            InvalidInputError: it is not tainted.
        """
        found = self._roots_of(authority_id)
        if not all(root.tainted for root in found):
            raise InvalidInputError(
                f'X.509 authority "{authority_id}" is not tainted; taint it first'
            )
        return self._with(
            (r for r in self.x509_authorities if r not in found), self.jwt_authorities
        )

    def with_tainted_jwt(self, kid: str) -> Bundle:
        """Return the bundle with one JWT key marked tainted.

        Raises:
            NotFoundError: no such key.
            InvalidInputError: it is tainted already.
        """
        found = self._jwt_of(kid)
        if found.tainted:
            raise InvalidInputError(f'JWT authority "{kid}" is already tainted')
        return self._with(
            self.x509_authorities,
            (replace(k, tainted=True) if k is found else k for k in self.jwt_authorities),
        )

    def without_jwt(self, kid: str) -> Bundle:
        """Return the bundle without one tainted JWT key.

        Raises:
            NotFoundError: no such key.
            InvalidInputError: it is not tainted.
        """
        found = self._jwt_of(kid)
        if not found.tainted:
            raise InvalidInputError(f'JWT authority "{kid}" is not tainted; taint it first')
        return self._with(
            self.x509_authorities, (k for k in self.jwt_authorities if k is not found)
        )

    def _roots_of(self, authority_id: str) -> list[X509Root]:
        found = [root for root in self.x509_authorities if root.authority_id == authority_id]
        if not found:
            raise NotFoundError(f'no X.509 authority with subject key ID "{authority_id}"')
        return found

    def _jwt_of(self, kid: str) -> JwtAuthority:
        found = self._jwt_by_kid.get(kid)
        if found is None:
            raise NotFoundError(f'no JWT authority with key ID "{kid}"')
        return found

    def _with(self, roots: Iterable[X509Root], keys: Iterable[JwtAuthority]) -> Bundle:
        changed = replace(self, x509_authorities=tuple(roots), jwt_authorities=tuple(keys))
        return self if changed == self else changed

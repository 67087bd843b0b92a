from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.bundle.bundle import JwtAuthority, X509Root
from spire_hw.key import SoftwareSigner, spki_der
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.issue import issue_ca_certificate

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


class Material:
    """Makes roots and JWT keys of example.org."""

    def root(self, *, ends_in: timedelta = timedelta(hours=1), tainted: bool = False) -> X509Root:
        issuing = issue_ca_certificate(
            None,
            signer=SoftwareSigner(ec.generate_private_key(ec.SECP256R1())),
            trust_domain=TrustDomain("example.org"),
            not_before=NOW - timedelta(days=30),
            not_after=NOW + ends_in,
        )
        try:
            issuing.send(None)
        except StopIteration as done:
            return X509Root(done.value, tainted)
        raise AssertionError("a software key signs at once")

    def key(
        self, kid: str, *, ends_in: timedelta | None = None, tainted: bool = False
    ) -> JwtAuthority:
        public_key = ec.generate_private_key(ec.SECP256R1()).public_key()
        ends_at = None if ends_in is None else NOW + ends_in
        return JwtAuthority(kid, spki_der(public_key), ends_at, tainted)


@pytest.fixture(scope="session")
def material() -> Material:
    return Material()

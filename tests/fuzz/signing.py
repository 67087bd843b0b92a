"""What a signer reads before it signs: bodies of certificates and requests, tokens' signing input."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.jose.text import encode_base64url
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, SoftwareSigner, spki_der
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.csr import build_csr
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid
from spire_hw_signer import policyfile, purpose, tokenpurpose
from spire_hw_signer.policy import JwtRule, Pattern, X509Rule

if TYPE_CHECKING:
    from collections.abc import Sequence

NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
_DAY: Final = timedelta(days=1)
_DOMAIN: Final = TrustDomain("example.org")
_SIGNER: Final = SoftwareSigner(ec.derive_private_key(7, ec.SECP256R1()))
_SPKI: Final = spki_der(_SIGNER.public_key)
_OTHER: Final = spki_der(ec.derive_private_key(8, ec.SECP256R1()).public_key())
_KEY: Final = purpose.SigningKey.of(KeyType.EC_P256, _SPKI)
_OPTIONS: Final = SignOptions(HashAlgorithm.SHA256)
_X509: Final = X509Rule((Pattern("*"),), _DAY, _DAY, downstream=True)
_JWT: Final = JwtRule((Pattern("*"),), _DAY)


def certificate(raw: bytes) -> None:
    """Check the body of a certificate."""
    purpose.check_certificate(raw, _OPTIONS, key=_KEY, trust_domain=_DOMAIN, rule=_X509, now=NOW)


def request(raw: bytes) -> None:
    """Check the body of a request."""
    purpose.check_request(raw, key=_KEY, trust_domain=_DOMAIN)


def token(raw: bytes) -> None:
    """Check a token's signing input, and its two parts as they are inside."""
    header, _, claims = raw.partition(b"\n")
    parts = f"{encode_base64url(header)}.{encode_base64url(claims)}"
    for data in (raw, parts.encode("ascii")):
        tokenpurpose.check_token(data, _OPTIONS, key=_KEY, trust_domain=_DOMAIN, rule=_JWT, now=NOW)


def policy(raw: bytes) -> None:
    """Read a policy file."""
    policyfile.parse_policy(raw.decode(errors="replace"))


async def _bodies() -> tuple[list[bytes], bytes]:
    root = await issue_ca_certificate(
        None, trust_domain=_DOMAIN, not_before=NOW, not_after=NOW + _DAY, signer=_SIGNER
    )
    authority = X509Authority(root, _SIGNER)
    leaf = await issue_x509_svid(
        authority,
        spki=_OTHER,
        spiffe_id=_DOMAIN.member("web"),
        not_before=NOW,
        not_after=NOW + _DAY,
        dns_names=("web.example.org",),
    )
    below = await issue_ca_certificate(
        authority, trust_domain=_DOMAIN, not_before=NOW, not_after=NOW + _DAY, spki=_OTHER
    )
    whole = [x509.load_der_x509_certificate(der) for der in (root, leaf, below)]
    csr = await build_csr(_SIGNER, spiffe_id=_DOMAIN.id)
    asked = x509.load_der_x509_csr(csr).tbs_certrequest_bytes
    return [one.tbs_certificate_bytes for one in whole], asked


def seeds() -> tuple[list[bytes], bytes]:
    """Return bodies of certificates, and one of a request."""
    return asyncio.run(_bodies())


_HEADER: Final = {"alg": "ES256", "kid": "k", "typ": "JWT"}
_CLAIMS: Final = {"sub": "spiffe://example.org/web", "aud": ["a"], "exp": NOW.timestamp() + 60}
TOKENS: Final[Sequence[bytes]] = [
    json.dumps(_HEADER).encode() + b"\n" + json.dumps(_CLAIMS).encode(),
    b".".join(encode_base64url(json.dumps(p).encode()).encode() for p in (_HEADER, _CLAIMS)),
]
POLICY: Final = b"""client "unix:0" {
 trust_domain = "a" server = "b" keys = ["k*"] types = { "*" = ["ec-p256"] }
 sign_rate = { "*" = "1/s burst 2" } x509 { max_ca_ttl = "1h" max_svid_ttl = "1h" }
}
"""

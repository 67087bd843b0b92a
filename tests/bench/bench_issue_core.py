"""Print `x509_issue_core_vs_openssl`: issuing against the two OpenSSL operations it cannot avoid.

One issue is: CSR in, its signature verified, certificate out, software P-256 keys on both sides.
The limit is one raw ECDSA verify and one raw sign through `cryptography`. Both are measured in CPU
seconds of this process, interleaved, best of many; nothing is asserted.
"""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.key import KeyType, SoftwareSigner, generate_private_key
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.csr import build_csr, parse_csr
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ROUNDS = 150
CALLS = 20
START = datetime(2026, 11, 1, tzinfo=UTC)


async def _best(*functions: Callable[[], Awaitable[None]]) -> list[float]:
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for i, function in enumerate(functions):
            before = time.process_time()
            await function()
            best[i] = min(best[i], (time.process_time() - before) / CALLS)
    return best


async def main() -> None:
    domain = TrustDomain("example.org")
    ca_key = generate_private_key(KeyType.EC_P256)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    signer = SoftwareSigner(ca_key)
    root = await issue_ca_certificate(
        None, signer=signer, trust_domain=domain, not_before=START, not_after=START + timedelta(1)
    )
    authority = X509Authority(root, signer)
    spiffe_id = SpiffeId.parse("spiffe://example.org/ns/payments/sa/checkout")
    csr = await build_csr(
        SoftwareSigner(generate_private_key(KeyType.EC_P256)), spiffe_id=spiffe_id
    )
    until = START + timedelta(hours=1)

    async def parse() -> None:
        for _ in range(CALLS):
            parse_csr(csr)

    async def issue() -> None:
        for _ in range(CALLS):
            await issue_x509_svid(
                authority,
                spki=parse_csr(csr).spki,
                spiffe_id=spiffe_id,
                not_before=START,
                not_after=until,
            )

    data = bytes(400)
    scheme = ec.ECDSA(hashes.SHA256())
    public_key, signature = ca_key.public_key(), ca_key.sign(data, scheme)

    async def limit() -> None:
        for _ in range(CALLS):
            public_key.verify(signature, data, scheme)
            ca_key.sign(data, scheme)

    issued, walked, raw = await _best(issue, parse, limit)
    sys.stdout.write(
        f"raw verify + sign        {raw * 1e6:8.1f} us\n"
        f"CSR parsed and verified  {walked * 1e6:8.1f} us\n"
        f"CSR to certificate       {issued * 1e6:8.1f} us  ({1 / issued:,.0f} per CPU second)\n"
        f"x509_issue_core_vs_openssl {raw / issued:.3f}\n"
    )


if __name__ == "__main__":
    asyncio.run(main())

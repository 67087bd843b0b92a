"""A CA certificate that somebody else signed for us: checked like a stranger's before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.bundle.bundle import X509Root
from spire_hw.errors import InvalidInputError
from spire_hw.key import KeyType, fingerprint, generate_private_key, spki_der
from spire_hw.x509.authority import (
    X509Authority,
    check_ca_certificate,
    check_parent_certificate,
)
from spire_hw.x509.certificate import load_certificate, public_key_of, subject_key_id
from spire_hw.x509.chain import verify_chain
from spire_hw.x509.issue import issue_x509_svid
from spire_hw_server.ca.profile import BACKDATE

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.key import Signer
    from spire_hw.spiffeid import TrustDomain

Roots = tuple[X509Root, ...]
_THROW_AWAY: Final = ("for", "upstream", "check", "only")


@dataclass(frozen=True, slots=True)
class MintedCa:
    """A CA certificate that the authority above has signed.

    Attributes:
        certificate: DER.
        chain: DER of it and the intermediates above, without the root.
        roots: the upstream roots.
        root_id: subject key id of the root it chains to, in hex.
        authority_id: its own.
        not_after: its end.
    """

    certificate: bytes
    chain: tuple[bytes, ...]
    roots: Roots
    root_id: str
    authority_id: str
    not_after: datetime


async def check_minted(
    chain: tuple[bytes, ...],
    roots: Roots,
    signer: Signer,
    trust_domain: TrustDomain,
    now: datetime,
) -> MintedCa:
    """Check that SVIDs of a CA will be believed: one is issued for nobody, and verified.

    Args:
        chain: DER, the CA first, then intermediates.
        roots: what it has to lead to; tainted ones do not count.
        signer: our key, which it has to be about.
        trust_domain: ours, which it has to name.
        now: the time.

    Raises:
        SpireHwError: it cannot be used; the message says why.
    """
    if not chain:
        raise InvalidInputError("there is none in its answer")
    usable = [root.certificate for root in roots if not root.tainted]
    certificate = load_certificate(chain[0])
    check_ca_certificate(certificate, trust_domain)
    authority = X509Authority(chain[0], signer, chain)
    leaf = await issue_x509_svid(
        authority,
        spki=spki_der(generate_private_key(KeyType.EC_P256).public_key()),
        spiffe_id=trust_domain.member(*_THROW_AWAY),
        not_before=now - BACKDATE,
        not_after=authority.not_after,
    )
    path = verify_chain(
        load_certificate(leaf), [load_certificate(der) for der in chain], usable, now
    )
    return MintedCa(
        certificate=chain[0],
        chain=chain,
        roots=roots,
        root_id=subject_key_id(path[-1]).hex(),
        authority_id=authority.authority_id,
        not_after=authority.not_after,
    )


async def check_imported(
    chain: tuple[bytes, ...],
    root: bytes,
    signer: Signer,
    *,
    bundle: Bundle,
    trust_domain: TrustDomain,
    now: datetime,
) -> MintedCa:
    """Check a CA that was signed by hand; as `check_minted`.

    Args:
        chain: DER, the CA first, then intermediates; the root among them is passed over.
        root: DER of the root.
        signer: the key that the certificate was asked for.
        bundle: ours; a root that is tainted there is refused.
        trust_domain: ours.
        now: the time.

    Raises:
        InvalidInputError: it cannot be used; the message says why.
    """
    top = X509Root(root)
    check_parent_certificate(top.certificate)
    without = tuple(der for der in chain if der != root)
    if not without:
        raise InvalidInputError("the chain has no certificate below the root")
    if any(r.authority_id == top.authority_id and r.tainted for r in bundle.x509_authorities):
        raise InvalidInputError(f"the root {top.authority_id} is tainted")
    asked = fingerprint(spki_der(signer.public_key))
    given = fingerprint(spki_der(public_key_of(load_certificate(without[0]))))
    if given != asked:
        raise InvalidInputError(
            f"the first certificate is for key {given}, the request was for {asked}: was another "
            "request made since?"
        )
    for below, der in enumerate(without[1:], 1):
        check_parent_certificate(load_certificate(der), below)
    return await check_minted(without, (top,), signer, trust_domain, now)

"""What a certificate or token of ours looks like: lifetimes, subjects, back-dating (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.x509.name import CA_SUBJECT, with_organizational_unit

if TYPE_CHECKING:
    from spire_hw.spiffeid import TrustDomain

# Certificates start a little early, for clocks that are a little late.
BACKDATE: Final = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Profile:
    """What the operator decides about what is issued.

    Attributes:
        trust_domain: whose identities they are.
        x509_svid_ttl: life of an X509-SVID whose entry does not say.
        jwt_svid_ttl: life of a JWT-SVID whose entry does not say.
        agent_ttl: life of an agent's SVID.
        jwt_issuer: the `iss` claim, "" for none.
        ca_subject: DER Name of self-signed authorities.
    """

    trust_domain: TrustDomain
    x509_svid_ttl: timedelta = timedelta(hours=1)
    jwt_svid_ttl: timedelta = timedelta(minutes=5)
    agent_ttl: timedelta = timedelta(hours=1)
    jwt_issuer: str = ""
    ca_subject: bytes = CA_SUBJECT

    def x509_ttl(self, wish_s: int) -> timedelta:
        """Return the life of an X509-SVID for which so many seconds are wished, 0 for none."""
        return wished(wish_s, self.x509_svid_ttl)

    def jwt_ttl(self, wish_s: int) -> timedelta:
        """Return the life of a JWT-SVID for which so many seconds are wished, 0 for none."""
        return wished(wish_s, self.jwt_svid_ttl)


def wished(seconds: int, default: timedelta) -> timedelta:
    """Return a wished life, or the default for 0.

    Raises:
        InvalidInputError: the wish is negative.
    """
    if seconds < 0:
        raise InvalidInputError("ttl is negative")
    return timedelta(seconds=seconds) if seconds else default


def capped(now: datetime, ttl: timedelta, authority_end: datetime) -> datetime:
    """Return when something issued now ends: after its ttl, but not after its authority.

    Raises:
        NotReadyError: the authority has ended.
    """
    if now >= authority_end:
        raise NotReadyError(f"the authority that signs ended at {authority_end.isoformat()}")
    if authority_end - now <= ttl:
        return authority_end
    return now + ttl


def downstream_subject(issuer_subject: bytes, chain_length: int) -> bytes:
    """Return the subject of a CA below ours: the issuer's, with a unit that tells its depth."""
    return with_organizational_unit(issuer_subject, f"DOWNSTREAM-{chain_length}")

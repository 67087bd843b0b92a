"""CredentialComposer: may amend what the server is about to sign.

The contract is upstream's `spire.plugin.server.credentialcomposer.v1.CredentialComposer`. Composers
run in the order of the configuration, each seeing what the one before made. The SPIFFE ID is not
theirs to change, and what they made is checked like anything else before it is signed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.key import PublicKey
    from spire_hw.spiffeid import SpiffeId
    from spire_hw.x509.extension import Extension


@dataclass(frozen=True, slots=True)
class DistinguishedName:
    """A subject in words; "" and () leave an attribute out.

    Attributes:
        extra_names: (dotted OID, text) of attributes without a field of their own.
    """

    country: tuple[str, ...] = ()
    organization: tuple[str, ...] = ()
    organizational_unit: tuple[str, ...] = ()
    locality: tuple[str, ...] = ()
    province: tuple[str, ...] = ()
    street_address: tuple[str, ...] = ()
    postal_code: tuple[str, ...] = ()
    serial_number: str = ""
    common_name: str = ""
    extra_names: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class X509CaAttributes:
    """What may be amended of the server's CA certificate.

    Attributes:
        policy_identifiers: dotted OIDs.
        extra_extensions: besides those the server writes itself.
    """

    subject: DistinguishedName
    policy_identifiers: tuple[str, ...] = ()
    extra_extensions: tuple[Extension, ...] = ()


@dataclass(frozen=True, slots=True)
class X509SvidAttributes:
    """What may be amended of an X509-SVID."""

    subject: DistinguishedName
    dns_names: tuple[str, ...] = ()
    extra_extensions: tuple[Extension, ...] = ()


@dataclass(frozen=True, slots=True)
class JwtSvidAttributes:
    """What may be amended of a JWT-SVID: its claims, values as JSON has them."""

    claims: Mapping[str, Any] = field(default_factory=dict)


class CredentialComposer(Protocol):
    """What a CredentialComposer plugin implements.

    Every method returns None to leave things as they are; whoever derives from this class
    overrides only what it amends.
    """

    async def compose_server_x509_ca(self, attributes: X509CaAttributes) -> X509CaAttributes | None:
        """Amend the server's own CA certificate."""
        return None

    async def compose_server_x509_svid(
        self, attributes: X509SvidAttributes
    ) -> X509SvidAttributes | None:
        """Amend the server's own X509-SVID."""
        return None

    async def compose_agent_x509_svid(
        self, spiffe_id: SpiffeId, public_key: PublicKey, attributes: X509SvidAttributes
    ) -> X509SvidAttributes | None:
        """Amend an agent's X509-SVID."""
        return None

    async def compose_workload_x509_svid(
        self, spiffe_id: SpiffeId, public_key: PublicKey, attributes: X509SvidAttributes
    ) -> X509SvidAttributes | None:
        """Amend a workload's X509-SVID."""
        return None

    async def compose_workload_jwt_svid(
        self, spiffe_id: SpiffeId, attributes: JwtSvidAttributes
    ) -> JwtSvidAttributes | None:
        """Amend a workload's JWT-SVID."""
        return None

"""An external CredentialComposer amends what a real server issues, within bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from spire_hw.errors import SpireHwError
from spire_hw.key import KeyType, generate_private_key, spki_der
from spire_hw.spiffeid import SpiffeId
from spire_hw.svid.jwtsvid import parse_issued_jwt_svid
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from datetime import timedelta

    from spire_hw_server.ca.authority import Issuer
    from tests.integration.plugins.conftest import Outside

KEYS = 'KeyManager "disk" { plugin_data { keys_path = "HOME/keys.json" } }\n'
WEB = SpiffeId.parse("spiffe://sim.example/web")


def issuer_of(world: World) -> Issuer:
    return world.server.manager._issuer


def texts(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> list[object]:
    return [a.value for a in certificate.subject.get_attributes_for_oid(oid)]


def life(world: World) -> timedelta:
    return world.server.settings.x509_svid_ttl


@pytest.mark.asyncio
async def test_what_is_issued_carries_what_the_composer_added(outside: Outside) -> None:
    plugins = KEYS + outside.block("CredentialComposer", "muse")
    async with World(server_plugins=plugins) as world:
        issuer = issuer_of(world)
        ca = x509.load_der_x509_certificate(issuer.x509.certificate)
        assert texts(ca, NameOID.ORGANIZATIONAL_UNIT_NAME) == ["composed CA"]
        assert texts(ca, NameOID.ORGANIZATION_NAME) == ["SPIFFE"]
        spki = spki_der(generate_private_key(KeyType.EC_P256).public_key())
        issued = await issuer.x509_svid(spki=spki, spiffe_id=WEB, ttl=life(world))
        leaf = x509.load_der_x509_certificate(issued.chain[0])
        assert leaf.subject.rfc4514_string() == "2.5.4.5=7,CN=composed,O=SPIRE,C=US"
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [str(WEB)]
        assert names.get_values_for_type(x509.DNSName) == ["composed.example"]
        extra = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")
        assert leaf.extensions.get_extension_for_oid(extra)
        # The server's own SVID is left as it is.
        own = x509.load_der_x509_certificate(world.server.identity.svid.chain[0])
        assert own.subject.rfc4514_string() == "O=SPIRE,C=US"
        token = await issuer.jwt_svid(spiffe_id=WEB, audience=["a"], ttl=life(world))
        claims = parse_issued_jwt_svid(token.token).claims
        assert (claims["colour"], claims["level"]) == ("blue", 3)
        assert claims["exp"] == int(token.expires_at.timestamp())
        async with await world.agent() as agent:
            svid = agent.identity.current
            assert svid is not None
            leaf = x509.load_der_x509_certificate(svid.chain[0])
            assert texts(leaf, NameOID.ORGANIZATIONAL_UNIT_NAME) == ["composed"]


@pytest.mark.asyncio
async def test_it_cannot_say_whose_identity_it_is(outside: Outside) -> None:
    plugins = KEYS + outside.block("CredentialComposer", "muse")
    async with World(server_plugins=plugins) as world:
        outside.set("takes_over")
        issuer = issuer_of(world)
        spki = spki_der(generate_private_key(KeyType.EC_P256).public_key())
        with pytest.raises(SpireHwError) as caught:
            await issuer.x509_svid(spki=spki, spiffe_id=WEB, ttl=life(world))
        assert "extension" in caught.value.message
        with pytest.raises(SpireHwError) as refused:
            await issuer.jwt_svid(spiffe_id=WEB, audience=["a"], ttl=life(world))
        assert "sub" in refused.value.message

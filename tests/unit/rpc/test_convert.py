from __future__ import annotations

from datetime import UTC, datetime

import pytest

from spire_hw._pb import types_pb2
from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import InvalidInputError
from spire_hw.key import KeyType, generate_private_key, spki_der
from spire_hw.rpc import convert
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_sim.pki import Authority

KEY = spki_der(generate_private_key(KeyType.EC_P256).public_key())
LATER = datetime(2027, 1, 1, tzinfo=UTC)


def a_bundle() -> Bundle:
    return Bundle(
        TrustDomain.parse("example.org"),
        (X509Root(Authority("example.org").der), X509Root(Authority("example.org").der, True)),
        (JwtAuthority("one", KEY, LATER), JwtAuthority("two", KEY, None, tainted=True)),
        300,
        7,
    )


@pytest.mark.parametrize("text", ["spiffe://a.org/b/c", "spiffe://a.org"])
def test_ids_go_both_ways(text: str) -> None:
    spiffe_id = SpiffeId.parse(text)
    assert convert.id_from_pb(convert.id_to_pb(spiffe_id)) == spiffe_id


@pytest.mark.parametrize(
    ("trust_domain", "path"),
    [
        ("", "/a"),
        ("A.org", "/a"),
        ("a.org", "b"),
        ("a.org", "/"),
        ("a.org", "/a/"),
        ("a.org", "/a//b"),
        ("a.org", "/.."),
        ("a.org/b", "/c"),
        ("spiffe://a.org", "/c"),
        ("a.org", "/ä"),
        ("a.org", "/a\n"),
    ],
)
def test_bad_ids_are_refused_as_they_are(trust_domain: str, path: str) -> None:
    message = types_pb2.SPIFFEID(trust_domain=trust_domain, path=path)
    with pytest.raises(InvalidInputError, match=r"^parent ID: "):
        convert.id_from_pb(message, "parent ID")


def test_selectors_go_both_ways() -> None:
    selectors = {Selector("unix", "uid:1"), Selector("unix", "gid:2")}
    messages = [convert.selector_to_pb(selector) for selector in selectors]
    assert convert.selectors_from_pb(messages) == selectors
    with pytest.raises(InvalidInputError):
        convert.selectors_from_pb([types_pb2.Selector(type="a:b", value="c")])


def test_an_unknown_way_to_match_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="unknown"):
        convert.match_from_pb(9)


def test_bundles_go_both_ways() -> None:
    bundle = a_bundle()
    assert convert.bundle_from_pb(convert.bundle_to_pb(bundle)) == bundle


@pytest.mark.parametrize(
    "field", ["x509_authorities", "jwt_authorities", "refresh_hint", "sequence_number"]
)
def test_a_mask_keeps_what_it_names(field: str) -> None:
    mask = types_pb2.BundleMask()
    setattr(mask, field, True)
    message = convert.bundle_to_pb(a_bundle(), mask)
    assert message.trust_domain == "example.org"
    assert [f.name for f, _ in message.ListFields()] == ["trust_domain", field]


def test_an_empty_mask_keeps_the_name_alone() -> None:
    message = convert.bundle_to_pb(a_bundle(), types_pb2.BundleMask())
    assert [f.name for f, _ in message.ListFields()] == ["trust_domain"]


@pytest.mark.parametrize(
    "change",
    [
        {"trust_domain": "NO"},
        {"refresh_hint": -1},
        {"x509_authorities": [types_pb2.X509Certificate(asn1=b"no")]},
        {"jwt_authorities": [types_pb2.JWTKey(key_id="", public_key=KEY)]},
        {"jwt_authorities": [types_pb2.JWTKey(key_id="a", public_key=b"no")]},
        {"jwt_authorities": [types_pb2.JWTKey(key_id="a", public_key=KEY, expires_at=-1)]},
        {"jwt_authorities": [types_pb2.JWTKey(key_id="a", public_key=KEY, expires_at=2**62)]},
        {"jwt_authorities": [types_pb2.JWTKey(key_id="a", public_key=KEY)] * 2},
    ],
)
def test_bad_bundles_are_refused(change: dict[str, object]) -> None:
    values: dict[str, object] = {"trust_domain": "example.org", **change}
    with pytest.raises(InvalidInputError):
        convert.bundle_from_pb(types_pb2.Bundle(**values))  # type: ignore[arg-type]


def test_svids() -> None:
    spiffe_id = SpiffeId.parse("spiffe://a.org/b")
    x509 = convert.x509_svid_to_pb([b"leaf", b"ca"], spiffe_id, LATER, "hint")
    assert (list(x509.cert_chain), x509.id.path, x509.hint) == ([b"leaf", b"ca"], "/b", "hint")
    jwt = convert.jwt_svid_to_pb("token", spiffe_id, LATER, LATER)
    assert jwt.expires_at == jwt.issued_at == x509.expires_at == int(LATER.timestamp())


def test_a_trust_domain_is_named_or_identified() -> None:
    """Upstream's commands send `spiffe://a.org` where the field wants a name."""
    for text in ("a.org", "spiffe://a.org"):
        assert convert.trust_domain_from_pb(text) == TrustDomain("a.org")
    for text in ("", "spiffe://", "spiffe://a.org/b", "spiffe://spiffe://a.org", "A.org", "a.org/"):
        with pytest.raises(InvalidInputError):
            convert.trust_domain_from_pb(text)

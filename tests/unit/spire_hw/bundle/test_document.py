from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from spire_hw.bundle.bundle import Bundle, JwtAuthority
from spire_hw.bundle.document import (
    MAX_DOCUMENT_BYTES,
    encode_document,
    encode_jwks,
    encode_pem,
    parse_document,
    parse_jwks,
    parse_pem,
)
from spire_hw.errors import EncodingError
from spire_hw.key import spki_der
from spire_hw.spiffeid import TrustDomain

if TYPE_CHECKING:
    from tests.unit.spire_hw.bundle.conftest import Material

DOMAIN = TrustDomain("example.org")


@pytest.fixture(scope="module")
def bundle(material: Material) -> Bundle:
    rsa_key = rsa.generate_private_key(65537, 2048).public_key()
    keys = (material.key("k1"), JwtAuthority("k2", spki_der(rsa_key)))
    return Bundle(DOMAIN, (material.root(), material.root()), keys, refresh_hint_s=300, sequence=42)


def _read(bundle: Bundle) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(encode_document(bundle))
    return document


def _parse(document: dict[str, Any]) -> Bundle:
    return parse_document(DOMAIN, json.dumps(document).encode())


def test_a_bundle_comes_back(bundle: Bundle) -> None:
    assert parse_document(DOMAIN, encode_document(bundle)) == bundle
    assert parse_document(DOMAIN, encode_document(bundle, indent=None)) == bundle


def test_what_stands_in_a_document(bundle: Bundle) -> None:
    document = _read(bundle)
    assert document["spiffe_sequence"] == 42
    assert document["spiffe_refresh_hint"] == 300
    roots = [key for key in document["keys"] if key["use"] == "x509-svid"]
    keys = [key for key in document["keys"] if key["use"] == "jwt-svid"]
    assert [set(key) for key in roots] == [{"kty", "crv", "x", "y", "use", "x5c"}] * 2
    assert all(len(key["x5c"]) == 1 for key in roots)
    assert [set(key) for key in keys] == [
        {"kty", "crv", "x", "y", "use", "kid"},
        {"kty", "n", "e", "use", "kid"},
    ]
    assert encode_document(bundle).startswith(b'{\n    "keys": [\n        {\n')


def test_an_empty_bundle_still_has_keys() -> None:
    assert json.loads(encode_document(Bundle(DOMAIN))) == {"keys": []}
    assert parse_document(DOMAIN, b'{"keys":[]}') == Bundle(DOMAIN)


def test_workload_key_sets_hold_jwt_keys_without_use(bundle: Bundle) -> None:
    keys = json.loads(encode_jwks(bundle))["keys"]
    assert [set(key) for key in keys] == [{"kty", "crv", "x", "y", "kid"}, {"kty", "n", "e", "kid"}]
    read = parse_jwks(DOMAIN, encode_jwks(bundle))
    assert read == Bundle(DOMAIN, jwt_authorities=bundle.jwt_authorities)


def test_pem_holds_the_roots(bundle: Bundle) -> None:
    assert parse_pem(DOMAIN, encode_pem(bundle)).x509_authorities == bundle.x509_authorities
    twice = encode_pem(bundle) * 2
    assert parse_pem(DOMAIN, twice).x509_authorities == bundle.x509_authorities
    with pytest.raises(EncodingError):
        parse_pem(DOMAIN, b"")


@pytest.mark.parametrize(
    "change",
    [
        {"use": "other"},
        {"use": None},
        {"use": ["jwt-svid"]},
        {"kty": "oct"},
        {"kty": None},
        {"crv": "P-257"},
        {"kid": ""},
        {"kid": 1},
        {"kid": None},
        {"x": "AAAA"},
        {"d": "AAAA"},
    ],
)
def test_unusable_jwt_keys_are_skipped_one_by_one(bundle: Bundle, change: dict[str, Any]) -> None:
    document = _read(bundle)
    document["keys"][2] |= change
    read = _parse(document)
    assert read.x509_authorities == bundle.x509_authorities
    assert read.jwt_authorities == bundle.jwt_authorities[1:]


@pytest.mark.parametrize(
    "chain", [None, [], "x", [1], ["!"], ["AAAA"], ["AAAA", "AAAA"], [None], {}]
)
def test_unusable_roots_are_skipped_one_by_one(bundle: Bundle, chain: Any) -> None:
    document = _read(bundle)
    document["keys"][0]["x5c"] = chain
    assert _parse(document).x509_authorities == bundle.x509_authorities[1:]


def test_a_root_has_to_be_about_the_key_beside_it(bundle: Bundle) -> None:
    document = _read(bundle)
    first, second = document["keys"][:2]
    first["x5c"] = second["x5c"]
    assert _parse(document).x509_authorities == bundle.x509_authorities[1:]


def test_a_key_id_used_for_two_keys_is_used_for_none(bundle: Bundle) -> None:
    document = _read(bundle)
    document["keys"][3]["kid"] = "k1"
    assert _parse(document).jwt_authorities == ()
    document = _read(bundle)
    document["keys"].append(document["keys"][2])
    assert _parse(document).jwt_authorities == bundle.jwt_authorities


def test_keys_that_are_no_objects_are_skipped() -> None:
    assert _parse({"keys": [1, "x", None, [], {}]}) == Bundle(DOMAIN)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"keys":null}',
        b'{"keys":{}}',
        b'{"keys":[],"keys":[]}',
        b'{"keys":[],"spiffe_sequence":-1}',
        b'{"keys":[],"spiffe_sequence":1.5}',
        b'{"keys":[],"spiffe_sequence":"1"}',
        b'{"keys":[],"spiffe_sequence":true}',
        b'{"keys":[],"spiffe_sequence":18446744073709551616}',
        b'{"keys":[],"spiffe_refresh_hint":-1}',
        b'{"keys":[],"spiffe_refresh_hint":null}',
        b'{"keys":[],"spiffe_refresh_hint":1e3}',
        b'{"keys":[],"x":NaN}',
        b'{"keys":[' + b"1," * 10_001 + b"1]}",
        b" " * (MAX_DOCUMENT_BYTES + 1),
    ],
)
def test_malformed_documents_are_refused(data: bytes) -> None:
    with pytest.raises(EncodingError):
        parse_document(DOMAIN, data)

"""What a client's keys may sign: tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import InvalidInputError, SpireHwError, VerificationError
from spire_hw.jose.text import encode_base64url
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, spki_der
from spire_hw.spiffeid import TrustDomain
from spire_hw_signer.policy import JwtRule, Pattern
from spire_hw_signer.purpose import SigningKey
from spire_hw_signer.tokenpurpose import KeyIds, check_token

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
DOMAIN = TrustDomain("example.org")
RSA_KEY = rsa.generate_private_key(65537, 2048)
SHA256 = SignOptions(HashAlgorithm.SHA256)
JWT = JwtRule((Pattern("*"),), max_ttl=HOUR)
KEY = SigningKey.of(KeyType.EC_P256, spki_der(ec.generate_private_key(ec.SECP256R1()).public_key()))
CLAIMS = {"sub": "spiffe://example.org/web", "aud": ["a"], "exp": int(NOW.timestamp()) + 300}
HEADER = {"alg": "ES256", "kid": "k1", "typ": "JWT"}


def signing_input(header: object, claims: object) -> bytes:
    parts = (json.dumps(part).encode() for part in (header, claims))
    return ".".join(encode_base64url(part) for part in parts).encode()


def token(
    data: bytes, rule: JwtRule = JWT, options: SignOptions = SHA256, key: SigningKey = KEY
) -> str:
    return check_token(data, options, key=key, trust_domain=DOMAIN, rule=rule, now=NOW)


def test_a_good_token_is_signed_and_its_key_is_told() -> None:
    assert token(signing_input(HEADER, CLAIMS)) == "k1"
    assert token(signing_input(HEADER, {**CLAIMS, "aud": "a", "iat": 5, "nbf": 5.5})) == "k1"


@pytest.mark.parametrize(
    "header",
    [
        {**HEADER, "alg": "none"},
        {**HEADER, "alg": "ES384"},
        {**HEADER, "alg": "RS256"},
        {**HEADER, "alg": None},
        {"alg": "ES256"},
        {**HEADER, "kid": ""},
        {**HEADER, "kid": "k" * 300},
        {**HEADER, "kid": 5},
        {**HEADER, "typ": "at+jwt"},
        {**HEADER, "typ": []},
        {**HEADER, "crit": ["exp"]},
        {**HEADER, "jwk": {}},
        [],
    ],
)
def test_headers_that_are_not_signed(header: object) -> None:
    with pytest.raises(SpireHwError):
        token(signing_input(header, CLAIMS))


@pytest.mark.parametrize(
    "change",
    [
        {"sub": "spiffe://evil.org/web"},
        {"sub": "spiffe://example.org"},
        {"sub": None},
        {"sub": "web"},
        {"exp": int(NOW.timestamp()) + 7200},
        {"exp": 1e300},
        {"exp": "1"},
        {"exp": True},
        {"exp": None},
        {"exp": -1},
        {"iat": 2**50},
        {"nbf": int(NOW.timestamp()) + 400},
        {"iss": "https://evil.org"},
        {"aud": []},
        {"aud": ""},
        {"aud": [""]},
        {"aud": [1]},
        {"aud": None},
        {"SUB": "spiffe://evil.org/web"},
        {"\u017fub": "spiffe://evil.org/web"},
        {"Exp": 2**40},
    ],
)
def test_claims_that_are_not_signed(change: dict[str, object]) -> None:
    with pytest.raises(SpireHwError):
        token(signing_input(HEADER, {**CLAIMS, **change}))


@pytest.mark.parametrize("missing", CLAIMS)
def test_claims_that_have_to_be_there(missing: str) -> None:
    claims = {k: v for k, v in CLAIMS.items() if k != missing}
    with pytest.raises(VerificationError):
        token(signing_input(HEADER, claims))


@pytest.mark.parametrize("data", [b"", b".", b"a.", b"a.b.c", b"e30", "e30.\u00e9".encode()])
def test_other_texts_are_no_signing_input(data: bytes) -> None:
    with pytest.raises(SpireHwError):
        token(data)


def test_members_that_stand_twice_are_refused() -> None:
    header = encode_base64url(b'{"alg":"ES256","kid":"k","kid":"l"}')
    payload = encode_base64url(json.dumps(CLAIMS).encode())
    with pytest.raises(InvalidInputError, match="strict JSON"):
        token(f"{header}.{payload}".encode())


def test_issuer_and_audiences_go_by_the_rule() -> None:
    rule = replace(JWT, issuer="https://oidc.example.org", audiences=frozenset({"a", "b"}))
    good = {**CLAIMS, "iss": "https://oidc.example.org"}
    token(signing_input(HEADER, good), rule)
    for change in ({"iss": "https://evil.org"}, {"aud": ["a", "c"]}):
        with pytest.raises(VerificationError):
            token(signing_input(HEADER, {**good, **change}), rule)
    with pytest.raises(VerificationError, match="issuer"):
        token(signing_input(HEADER, CLAIMS), rule)


@pytest.mark.parametrize(
    ("algorithm", "options", "fits"),
    [
        ("RS256", SHA256, True),
        ("RS384", SignOptions(HashAlgorithm.SHA384), True),
        ("PS256", SignOptions(HashAlgorithm.SHA256, pss=True), True),
        ("PS256", SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=20), False),
        ("RS256", SignOptions(HashAlgorithm.SHA256, pss=True), False),
        ("RS384", SHA256, False),
        ("ES256", SHA256, False),
    ],
)
def test_the_algorithm_fits_key_hash_and_padding(
    algorithm: str, options: SignOptions, fits: bool
) -> None:
    key = SigningKey.of(KeyType.RSA_2048, spki_der(RSA_KEY.public_key()))
    data = signing_input({**HEADER, "alg": algorithm}, CLAIMS)
    if fits:
        assert token(data, options=options, key=key) == "k1"
    else:
        with pytest.raises(VerificationError):
            token(data, options=options, key=key)


def test_an_elliptic_key_signs_with_its_own_hash_alone() -> None:
    with pytest.raises(VerificationError):
        token(signing_input(HEADER, CLAIMS), options=SignOptions(HashAlgorithm.SHA512))


def test_the_name_of_a_key_is_not_put_on_another_ones_tokens() -> None:
    names = KeyIds(limit=2)
    names.check("a", "f1")
    names.check("a", "f1")
    with pytest.raises(VerificationError, match="another key"):
        names.check("a", "f2")
    names.check("b", "f2")
    names.check("c", "f3")
    assert len(names._names) == 2


@given(st.binary(max_size=200))
def test_bytes_are_no_token(data: bytes) -> None:
    with pytest.raises(SpireHwError):
        token(data)

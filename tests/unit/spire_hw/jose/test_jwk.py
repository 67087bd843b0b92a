from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw.errors import InvalidInputError
from spire_hw.jose.jwk import jwk_of, parse_jwk
from spire_hw.jose.text import encode_base64url
from spire_hw.key import PublicKey, spki_der

RSA_KEY = rsa.generate_private_key(65537, 2048).public_key()
EC_KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
KEYS: list[PublicKey] = [
    EC_KEY,
    ec.generate_private_key(ec.SECP384R1()).public_key(),
    ec.generate_private_key(ec.SECP521R1()).public_key(),
    RSA_KEY,
]


@pytest.mark.parametrize("key", KEYS)
def test_public_keys_come_back(key: PublicKey) -> None:
    jwk = jwk_of(key, kid="k", use="jwt-svid")
    assert spki_der(parse_jwk(jwk)) == spki_der(key)
    assert jwk["kid"] == "k"
    assert jwk["use"] == "jwt-svid"


def test_only_the_members_asked_for_are_written() -> None:
    assert set(jwk_of(EC_KEY)) == {"kty", "crv", "x", "y"}
    assert set(jwk_of(RSA_KEY)) == {"kty", "n", "e"}


def _changed(key: PublicKey, **members: Any) -> dict[str, Any]:
    return {k: v for k, v in (jwk_of(key) | members).items() if v is not None}


@pytest.mark.parametrize(
    "jwk",
    [
        {},
        _changed(EC_KEY, kty="oct"),
        _changed(EC_KEY, kty="OKP"),
        _changed(EC_KEY, kty=["EC"]),
        _changed(EC_KEY, crv="secp256k1"),
        _changed(EC_KEY, crv=["P-256"]),
        _changed(EC_KEY, crv="P-384"),
        _changed(EC_KEY, d="AAAA"),
        _changed(EC_KEY, x=None),
        _changed(EC_KEY, x=5),
        _changed(EC_KEY, x=jwk_of(EC_KEY)["x"] + "="),
        _changed(EC_KEY, x="A" * 43),
        _changed(EC_KEY, x="A" * 100_000),
        _changed(EC_KEY, y=encode_base64url(b"\0" + bytes(32))),
        _changed(RSA_KEY, n="AQAB"),
        _changed(RSA_KEY, n="AA" + jwk_of(RSA_KEY)["n"]),
        _changed(RSA_KEY, n="A" * 2000),
        _changed(RSA_KEY, e="Aw"),
        _changed(RSA_KEY, e=""),
        _changed(RSA_KEY, e="AAEAAQ"),
        _changed(RSA_KEY, e="AQAA"),
        _changed(RSA_KEY, p="AQAB"),
        jwk_of(rsa.generate_private_key(65537, 1024).public_key()),  # noqa: S505 - to be refused
    ],
)
def test_unusable_keys_are_refused(jwk: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        parse_jwk(jwk)


def test_a_curve_without_a_jose_name_is_refused() -> None:
    with pytest.raises(InvalidInputError):
        jwk_of(ec.generate_private_key(ec.SECP256K1()).public_key())

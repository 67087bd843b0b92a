from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from spire_hw.errors import EncodingError, InvalidInputError, SpireHwError, VerificationError
from spire_hw.jose.jws import MAX_TOKEN_BYTES, parse_compact, sign_compact, verify
from spire_hw.jose.text import encode_base64url
from spire_hw.key import PrivateKey, SignOptions, SoftwareSigner

P256 = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)
KEYS: dict[str, PrivateKey] = {
    "ES256": P256,
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "RS256": RSA,
}


def _token(header: Any, payload: bytes = b"{}", signature: bytes = b"x" * 64) -> str:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return ".".join(encode_base64url(part) for part in (head, payload, signature))


@pytest.mark.parametrize("algorithm", list(KEYS))
@pytest.mark.asyncio
async def test_signed_tokens_verify(algorithm: str) -> None:
    signer = SoftwareSigner(KEYS[algorithm])
    token = await sign_compact(b'{"a":1}', signer, "kid-1")
    jws = parse_compact(token)
    verify(jws, signer.public_key)
    assert jws.header == {"alg": algorithm, "kid": "kid-1", "typ": "JWT"}
    assert (jws.algorithm, jws.kid, jws.payload) == (algorithm, "kid-1", b'{"a":1}')


@pytest.mark.asyncio
async def test_anything_changed_is_noticed() -> None:
    token = await sign_compact(b'{"a":1}', SoftwareSigner(P256), "k")
    _, payload, tail = token.split(".")
    other = await sign_compact(b'{"a":1}', SoftwareSigner(P256), "l")
    for changed in (
        _swap(token, 1, b'{"a":2}'),
        f"{other.split('.')[0]}.{payload}.{tail}",
        _swap(token, 2, bytes(64)),
        _swap(token, 2, b"\xff" * 64),
        _swap(token, 2, bytes(63)),
        _swap(token, 2, bytes(96)),
    ):
        with pytest.raises(VerificationError):
            verify(parse_compact(changed), P256.public_key())


def _swap(token: str, index: int, data: bytes) -> str:
    parts = token.split(".")
    parts[index] = encode_base64url(data)
    return ".".join(parts)


@pytest.mark.asyncio
async def test_the_algorithm_has_to_fit_the_key() -> None:
    tokens = {
        name: await sign_compact(b"{}", SoftwareSigner(key), "k") for name, key in KEYS.items()
    }
    for name, token in tokens.items():
        for other, key in KEYS.items():
            if name != other:
                with pytest.raises(VerificationError):
                    verify(parse_compact(token), key.public_key())


@pytest.mark.parametrize("bits", ["256", "384", "512"])
@pytest.mark.parametrize("family", ["RS", "PS"])
def test_all_rsa_algorithms_verify(family: str, bits: str) -> None:
    algorithm = getattr(hashes, f"SHA{bits}")()
    scheme: padding.AsymmetricPadding = padding.PKCS1v15()
    if family == "PS":
        scheme = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
    unsigned = _token({"alg": family + bits, "kid": "k"}).rsplit(".", 1)[0]
    signature = RSA.sign(unsigned.encode(), scheme, algorithm)
    verify(parse_compact(f"{unsigned}.{encode_base64url(signature)}"), RSA.public_key())
    with pytest.raises(VerificationError):
        verify(parse_compact(f"{unsigned}.{encode_base64url(signature[:-1])}"), RSA.public_key())


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"kid": "k"},
        {"alg": "none", "kid": "k"},
        {"alg": "None", "kid": "k"},
        {"alg": "HS256", "kid": "k"},
        {"alg": "EdDSA", "kid": "k"},
        {"alg": ["ES256"], "kid": "k"},
        {"alg": "ES256"},
        {"alg": "ES256", "kid": ""},
        {"alg": "ES256", "kid": 7},
        {"alg": "ES256", "kid": None},
        {"alg": "ES256", "kid": "k", "typ": "wit+jwt"},
        {"alg": "ES256", "kid": "k", "typ": "jwt"},
        {"alg": "ES256", "kid": "k", "typ": ""},
        {"alg": "ES256", "kid": "k", "typ": None},
        {"alg": "ES256", "kid": "k", "typ": ["JWT"]},
        {"alg": "ES256", "kid": "k", "crit": ["exp"]},
        {"alg": "ES256", "kid": "k", "jwk": {}},
        {"alg": "ES256", "kid": "k", "jku": "https://x"},
        {"alg": "ES256", "kid": "k", "x5c": []},
        {"alg": "ES256", "kid": "k", "b64": False},
        b'{"alg":"ES256","kid":"k","kid":"l"}',
        b"[]",
        b"",
        b"\xff",
    ],
)
def test_headers_hold_nothing_but_what_is_allowed(header: Any) -> None:
    with pytest.raises((VerificationError, EncodingError)):
        parse_compact(_token(header))


@pytest.mark.parametrize("typ", ["JWT", "JOSE", None])
def test_types_that_are_allowed(typ: str | None) -> None:
    header = {"alg": "ES256", "kid": "k"} | ({} if typ is None else {"typ": typ})
    assert parse_compact(_token(header)).kid == "k"


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c.d",
        _token({"alg": "ES256", "kid": "k"}) + ".",
        _token({"alg": "ES256", "kid": "k"}) + "=",
        _token({"alg": "ES256", "kid": "k"}) + "\n",
        " " + _token({"alg": "ES256", "kid": "k"}),
        _token({"alg": "ES256", "kid": "k"}, b"{}", b""),
        _token({"alg": "ES256", "kid": "k"}, b"{}", b"x")[:-1] + "B",
        _token({"alg": "ES256", "kid": "k"}, bytes(MAX_TOKEN_BYTES)),
        "é.é.é",
    ],
)
def test_the_compact_form_is_exact(token: str) -> None:
    with pytest.raises(EncodingError):
        parse_compact(token)


class _Device:
    """A signer elsewhere that answers with whatever it is told to."""

    def __init__(self, answer: bytes | None) -> None:
        self._answer = answer

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        return P256.public_key()

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        if self._answer is not None:
            return self._answer
        return await SoftwareSigner(P256).sign(digest, options)


@pytest.mark.asyncio
async def test_a_device_is_checked() -> None:
    await sign_compact(b"{}", _Device(None), "k")
    for answer in (b"", b"junk", P256.sign(b"other", ec.ECDSA(hashes.SHA256()))):
        with pytest.raises(SpireHwError, match="does not verify"):
            await sign_compact(b"{}", _Device(answer), "k")
    with pytest.raises(SpireHwError, match="ECDSA"):
        await sign_compact(b"{}", _Device(b"junk"), "k", check_signature=False)


@pytest.mark.asyncio
async def test_a_curve_without_an_algorithm_does_not_sign() -> None:
    with pytest.raises(InvalidInputError):
        await sign_compact(b"{}", SoftwareSigner(ec.generate_private_key(ec.SECP256K1())), "k")

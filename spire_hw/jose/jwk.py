"""Public keys as JSON Web Keys, in and out; never a private one.

Spec: RFC 7517, RFC 7518 section 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.jose.text import decode_base64url, encode_base64url
from spire_hw.key import PublicKey, check_public_key

if TYPE_CHECKING:
    from collections.abc import Mapping

_WHAT: Final = "JWK"
_CURVES: Final[dict[str, ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1(),
    "P-384": ec.SECP384R1(),
    "P-521": ec.SECP521R1(),
}
_CURVE_NAMES: Final = {curve.name: name for name, curve in _CURVES.items()}
_PRIVATE: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_MAX_MODULUS_TEXT: Final = 1024
_MAX_EXPONENT_TEXT: Final = 12


def jwk_of(
    public_key: PublicKey, *, kid: str | None = None, use: str | None = None
) -> dict[str, Any]:
    """Return a key as a JWK.

    Args:
        public_key: EC on P-256, P-384 or P-521, or RSA.
        kid: key ID, None leaves it out.
        use: such as `jwt-svid`, None leaves it out.

    Raises:
        InvalidInputError: a curve JOSE has no name for.
    """
    jwk: dict[str, Any] = {}
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        name = _CURVE_NAMES.get(public_key.curve.name)
        if name is None:
            raise InvalidInputError(f"curve {public_key.curve.name} has no JWK name")
        numbers, size = public_key.public_numbers(), (public_key.key_size + 7) // 8
        jwk |= {
            "kty": "EC",
            "crv": name,
            "x": encode_base64url(numbers.x.to_bytes(size)),
            "y": encode_base64url(numbers.y.to_bytes(size)),
        }
    else:
        modulus = public_key.public_numbers()
        jwk |= {"kty": "RSA", "n": _unsigned(modulus.n), "e": _unsigned(modulus.e)}
    if use is not None:
        jwk["use"] = use
    if kid is not None:
        jwk["kid"] = kid
    return jwk


def parse_jwk(jwk: Mapping[str, Any]) -> PublicKey:
    """Return the public key of a JWK.

    Raises:
        EncodingError: a member is missing or malformed.
        InvalidInputError: kty or curve unknown, private members, or a weak key.
    """
    if not _PRIVATE.isdisjoint(jwk):
        raise InvalidInputError("JWK holds a private key")
    kind = jwk.get("kty")
    if kind == "EC":
        return _parse_ec(jwk)
    if kind == "RSA":
        return _parse_rsa(jwk)
    raise InvalidInputError("JWK is of a key type other than EC and RSA")


def _parse_ec(jwk: Mapping[str, Any]) -> PublicKey:
    name = jwk.get("crv")
    curve = _CURVES.get(name) if isinstance(name, str) else None
    if curve is None:
        raise InvalidInputError("JWK is on a curve other than P-256, P-384 and P-521")
    size = (curve.key_size + 7) // 8
    x, y = (decode_base64url(_member(jwk, m, 2 * size), _WHAT) for m in ("x", "y"))
    if len(x) != size or len(y) != size:
        raise EncodingError(_WHAT, f"coordinates are not {size} bytes each")
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\x04" + x + y)
    except ValueError as e:
        raise EncodingError(_WHAT, "point is not on the curve") from e
    return check_public_key(key)


def _parse_rsa(jwk: Mapping[str, Any]) -> PublicKey:
    modulus = decode_base64url(_member(jwk, "n", _MAX_MODULUS_TEXT), _WHAT)
    exponent = decode_base64url(_member(jwk, "e", _MAX_EXPONENT_TEXT), _WHAT)
    if not modulus or not exponent or not modulus[0] or not exponent[0]:
        raise EncodingError(_WHAT, "a number is empty or starts with a zero byte")
    try:
        key = rsa.RSAPublicNumbers(int.from_bytes(exponent), int.from_bytes(modulus)).public_key()
    except ValueError as e:
        raise EncodingError(_WHAT, "is not an RSA key") from e
    return check_public_key(key)


def _member(jwk: Mapping[str, Any], name: str, limit: int) -> str:
    value = jwk.get(name)
    if not isinstance(value, str) or len(value) > limit:
        raise EncodingError(_WHAT, f'"{name}" is missing or malformed')
    return value


def _unsigned(number: int) -> str:
    return encode_base64url(number.to_bytes((number.bit_length() + 7) // 8))

"""Compact signatures: made by any Signer, read strictly.

Only the header members SPIFFE allows, only the nine algorithms, each with the one kind of key it
fits. Claims are not looked at here.

Spec: RFC 7515 section 7.1; RFC 7518 section 3; SPIFFE JWT-SVID section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from spire_hw.errors import (
    EncodingError,
    ErrorKind,
    InvalidInputError,
    SpireHwError,
    VerificationError,
)
from spire_hw.jose.text import decode_base64url, encode_base64url, encode_json, parse_json_object
from spire_hw.key import (
    HashAlgorithm,
    PublicKey,
    Purpose,
    Signer,
    SignOptions,
    needs_check,
    sign_content,
    verify_digest,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives import hashes

MAX_TOKEN_BYTES: Final = 16 * 1024
_WHAT: Final = "token"
_PARTS: Final = 3
_TYPES: Final = frozenset({"JWT", "JOSE"})
_HEADER: Final = frozenset({"alg", "kid", "typ"})
_CURVE_ALGORITHMS: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_HASHES: Final[dict[str, HashAlgorithm]] = {
    "256": HashAlgorithm.SHA256,
    "384": HashAlgorithm.SHA384,
    "512": HashAlgorithm.SHA512,
}
ALGORITHMS: Final = frozenset(family + bits for family in ("ES", "RS", "PS") for bits in _HASHES)


@dataclass(frozen=True, slots=True)
class Jws:
    """A compact signature taken apart; nothing of it is proved.

    Attributes:
        algorithm: one of the nine.
        kid: key ID, not empty.
        payload: what was signed, decoded.
        signing_input: the bytes under the signature.
        signature: `r || s` or RSA.
        header: all members of the header.
    """

    algorithm: str
    kid: str
    payload: bytes
    signing_input: bytes
    signature: bytes
    header: dict[str, Any]


async def sign_compact(
    payload: bytes,
    signer: Signer,
    kid: str,
    *,
    typ: str = "JWT",
    check_signature: bool | None = None,
) -> str:
    """Sign a payload.

    Args:
        payload: what is signed.
        signer: EC on P-256, P-384 or P-521, or RSA (RS256).
        kid: key ID.
        typ: media type of the whole.
        check_signature: None verifies the new signature when `needs_check` says so.

    Raises:
        SpireHwError: what the signer raises, or its signature does not hold (INTERNAL).
    """
    key = signer.public_key
    algorithm = algorithm_of(key)
    signing_input = f"{_header(algorithm, kid, typ)}.{encode_base64url(payload)}"
    options = SignOptions(_HASHES[algorithm[2:]])
    content = signing_input.encode("ascii")
    digest = options.hash.digest(content)
    signature = await sign_content(signer, Purpose.JWT, content, digest, options)
    if check_signature or (check_signature is None and needs_check(signer)):
        verify_digest(key, digest, signature, options)
    if isinstance(key, ec.EllipticCurvePublicKey):
        signature = _raw(signature, (key.key_size + 7) // 8)
    return f"{signing_input}.{encode_base64url(signature)}"


def algorithm_of(public_key: PublicKey) -> str:
    """Return the algorithm we sign with: ES256, ES384 or ES512 by curve, RS256 for RSA.

    Raises:
        InvalidInputError: a curve JOSE has no algorithm for.
    """
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        return "RS256"
    found = _CURVE_ALGORITHMS.get(public_key.curve.name)
    if found is None:
        raise InvalidInputError(f"curve {public_key.curve.name} has no JWS algorithm")
    return found


def parse_compact(token: str, *, types: frozenset[str] = _TYPES) -> Jws:
    """Take a token apart.

    Args:
        token: three canonical base64url parts, at most 16 KiB.
        types: values the header's typ may have; it may also be absent.

    Raises:
        EncodingError: not such a token.
        VerificationError: a header member we do not accept.
    """
    if len(token) > MAX_TOKEN_BYTES:
        raise EncodingError(_WHAT, f"is longer than {MAX_TOKEN_BYTES} bytes")
    parts = token.split(".")
    if len(parts) != _PARTS or not all(parts):
        raise EncodingError(_WHAT, "is not made of three parts")
    header = parse_json_object(decode_base64url(parts[0], _WHAT), "token header")
    payload = decode_base64url(parts[1], _WHAT)
    signature = decode_base64url(parts[2], _WHAT)
    algorithm, kid = _check_header(header, types)
    signing_input = f"{parts[0]}.{parts[1]}".encode("ascii")
    return Jws(algorithm, kid, payload, signing_input, signature, header)


def verify(jws: Jws, public_key: PublicKey) -> None:
    """Check the signature of a token.

    Raises:
        VerificationError: the algorithm does not fit the key, or the signature does not hold.
    """
    family, algorithm = jws.algorithm[:2], _HASHES[jws.algorithm[2:]].instance
    try:
        if isinstance(public_key, ec.EllipticCurvePublicKey):
            if _CURVE_ALGORITHMS.get(public_key.curve.name) != jws.algorithm:
                raise VerificationError("algorithm of the token does not fit the key")
            signature = _der(jws.signature, (public_key.key_size + 7) // 8)
            public_key.verify(signature, jws.signing_input, ec.ECDSA(algorithm))
        elif family == "ES":
            raise VerificationError("algorithm of the token does not fit the key")
        else:
            scheme = _rsa_padding(family, algorithm)
            public_key.verify(jws.signature, jws.signing_input, scheme, algorithm)
    except InvalidSignature as e:
        raise VerificationError("signature of the token does not hold") from e


def _check_header(header: dict[str, Any], types: frozenset[str]) -> tuple[str, str]:
    if not _HEADER.issuperset(header):
        raise VerificationError("token header has members other than alg, kid and typ")
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise VerificationError("token algorithm is not accepted")
    if not isinstance(kid, str) or not kid:
        raise VerificationError("token has no key ID")
    kind = header.get("typ", "")
    if not isinstance(kind, str) or ("typ" in header and kind not in types):
        raise VerificationError("token type is not accepted")
    return algorithm, kid


@lru_cache(maxsize=64)
def _header(algorithm: str, kid: str, typ: str) -> str:
    return encode_base64url(encode_json({"alg": algorithm, "kid": kid, "typ": typ}))


def _rsa_padding(family: str, algorithm: hashes.HashAlgorithm) -> padding.AsymmetricPadding:
    if family == "PS":
        return padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
    return padding.PKCS1v15()


def _raw(signature: bytes, size: int) -> bytes:
    try:
        r, s = decode_dss_signature(signature)
        return r.to_bytes(size) + s.to_bytes(size)
    except (ValueError, OverflowError) as e:
        raise SpireHwError(
            "signer did not return an ECDSA signature", kind=ErrorKind.INTERNAL
        ) from e


def _der(signature: bytes, size: int) -> bytes:
    if len(signature) != 2 * size:
        raise VerificationError("signature of the token has the wrong length")
    return encode_dss_signature(int.from_bytes(signature[:size]), int.from_bytes(signature[size:]))

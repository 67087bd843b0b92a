"""Tokens to be signed, read and held against what a client's keys may sign (pure).

As `purpose` for certificates: what is not strict JSON is refused before it is understood in two ways.

Spec: SPIFFE JWT-SVID sections 2 and 3; RFC 7515; RFC 7519 section 4.1.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import VerificationError
from spire_hw.jose.text import decode_base64url, parse_json_object
from spire_hw.key import KeyType, SignOptions
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_signer.purpose import LEEWAY, SigningKey, bounded

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw_signer.policy import JwtRule

_EC: Final = {KeyType.EC_P256: "ES256", KeyType.EC_P384: "ES384"}
_HEADER: Final = frozenset({"alg", "kid", "typ"})
_TYPES: Final = frozenset({"JWT", "JOSE"})
_REGISTERED: Final = frozenset({"iss", "sub", "aud", "exp", "nbf", "iat", "jti"})
_MAX_KID: Final = 256
_MAX_EPOCH: Final = 253_402_300_799  # the last second of year 9999


def check_token(
    signing_input: bytes,
    options: SignOptions,
    *,
    key: SigningKey,
    trust_domain: TrustDomain,
    rule: JwtRule,
    now: datetime,
) -> str:
    """Check that a token may be signed.

    Args:
        signing_input: `header.payload` of a compact JWS.
        options: hash and padding that were asked for.
        key: the key that will sign.
        trust_domain: the client's.
        rule: what the client's keys may sign.
        now: the time, aware.

    Returns:
        Its key ID (`kid`), which is the server's own name for the key.

    Raises:
        EncodingError: not such a text, or not strict JSON in it.
        VerificationError: it is against the rule; the message says which.
    """
    try:
        header_text, dot, payload_text = bounded(signing_input).decode("ascii").partition(".")
    except UnicodeDecodeError as e:
        raise VerificationError("signing input is not ASCII") from e
    if not dot or not header_text or not payload_text:
        raise VerificationError("signing input is not made of two parts")
    header = parse_json_object(decode_base64url(header_text, "token header"), "token header")
    claims = parse_json_object(decode_base64url(payload_text, "token claims"), "token claims")
    kid = _check_header(header, key, options)
    _check_claims(claims, trust_domain, rule, now)
    return kid


def _check_header(header: dict[str, Any], key: SigningKey, options: SignOptions) -> str:
    if not _HEADER.issuperset(header):
        raise VerificationError("token header has members other than alg, kid and typ")
    bits = options.hash.digest_size * 8
    expected = _EC.get(key.key_type) or ("PS" if options.pss else "RS") + str(bits)
    if header.get("alg") != expected or not expected.endswith(str(bits)):
        raise VerificationError("token algorithm does not fit the key and its hash")
    if options.pss and options.salt_bytes != options.hash.digest_size:
        raise VerificationError("salt of the token's signature is not as long as its hash")
    kid = header.get("kid")
    if not isinstance(kid, str) or not 1 <= len(kid) <= _MAX_KID:
        raise VerificationError("token has no key ID, or a long one")
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise VerificationError("token type is not accepted")
    return kid


def _check_claims(
    claims: dict[str, Any], trust_domain: TrustDomain, rule: JwtRule, now: datetime
) -> None:
    for name in claims:
        # Go's JSON takes "SUB" for "sub", and the last of them counts.
        if name not in _REGISTERED and name.casefold() in _REGISTERED:
            raise VerificationError("a claim has the name of a registered one in other letters")
    subject = claims.get("sub")
    if not isinstance(subject, str):
        raise VerificationError("token has no subject")
    spiffe_id = SpiffeId.parse(subject)
    if spiffe_id.trust_domain != trust_domain or not spiffe_id.path:
        raise VerificationError(f"subject is not a member of trust domain {trust_domain.name}")
    expiry = _epoch(claims, "exp")
    if expiry is None:
        raise VerificationError("token does not expire")
    if expiry > (now + rule.max_ttl + LEEWAY).timestamp():
        raise VerificationError(f"it expires more than {rule.max_ttl} from now")
    for name in ("iat", "nbf"):
        start = _epoch(claims, name)
        if start is not None and start > expiry:
            raise VerificationError(f"{name} is after exp")
    if claims.get("iss", "") != rule.issuer:
        wanted = f'has to be "{rule.issuer}"' if rule.issuer else "may not be there"
        raise VerificationError(f"issuer {wanted}")
    _check_audience(claims.get("aud"), rule)


def _check_audience(audience: object, rule: JwtRule) -> None:
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or not audiences:
        raise VerificationError("token has no audience")
    if not all(isinstance(a, str) and a for a in audiences):
        raise VerificationError("an audience is not text")
    if rule.audiences and not rule.audiences.issuperset(audiences):
        raise VerificationError("an audience is not allowed")


def _epoch(claims: dict[str, Any], name: str) -> float | None:
    if name not in claims:
        return None
    value = claims[name]
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= _MAX_EPOCH
    ):
        raise VerificationError(f"{name} is not a time")
    return float(value)


class KeyIds:
    """Which key each `kid` stands for: a name of one key is never put on another one's tokens."""

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._names: OrderedDict[str, str] = OrderedDict()

    def check(self, kid: str, fingerprint: str) -> None:
        """Remember the name of a key, or refuse it.

        Raises:
            VerificationError: it is another key's.
        """
        known = self._names.get(kid)
        if known is None:
            while len(self._names) >= self._limit:
                self._names.popitem(last=False)
            self._names[kid] = fingerprint
        elif known != fingerprint:
            raise VerificationError("key ID of the token is that of another key")

"""JWT-SVIDs: issued by any Signer, accepted only when every rule holds.

Spec: SPIFFE JWT-SVID; RFC 7519 section 4.1.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import (
    EncodingError,
    InvalidInputError,
    SpiffeIdError,
    SvidError,
    VerificationError,
)
from spire_hw.jose import jws
from spire_hw.jose.text import encode_base64url, encode_json, parse_json_object
from spire_hw.spiffeid import SpiffeId, TrustDomain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.key import Signer

MAX_LEEWAY: Final = timedelta(seconds=60)
_JTI_BYTES: Final = 16
_REGISTERED: Final = frozenset({"sub", "aud", "exp", "iat", "iss", "jti", "nbf"})
_LAST_SECOND: Final = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp())


@dataclass(frozen=True, slots=True)
class JwtSvid:
    """A JWT-SVID whose signature and claims were verified, or that we issued.

    Attributes:
        spiffe_id: whose it is.
        audience: who may accept it.
        claims: all claims as they stand in the token.
        issued_at: iat, None when the token does not say.
        expires_at: exp.
        token: the compact form; a secret.
    """

    spiffe_id: SpiffeId
    audience: tuple[str, ...]
    claims: dict[str, Any] = field(repr=False)
    issued_at: datetime | None
    expires_at: datetime
    token: str = field(repr=False)


async def issue_jwt_svid(
    signer: Signer,
    kid: str,
    *,
    spiffe_id: SpiffeId,
    audience: Sequence[str],
    issued_at: datetime,
    expires_at: datetime,
    issuer: str = "",
    with_jti: bool = False,
    extra_claims: Mapping[str, Any] | None = None,
    check_signature: bool | None = None,
) -> str:
    """Issue a token.

    Args:
        signer: JWT key of the trust domain.
        kid: its key ID in the bundle.
        spiffe_id: subject, with a path.
        audience: who may accept it; empty values are dropped.
        issued_at: aware; fractions of a second are dropped.
        expires_at: aware, after issued_at.
        issuer: iss claim, "" leaves it out.
        with_jti: add a random token ID.
        extra_claims: further claims, none of the registered ones.
        check_signature: None verifies the new signature unless the key is in this process.

    Returns:
        The compact token.

    Raises:
        InvalidInputError: no audience, no path, an empty life, a registered extra claim, or a
            token above 16 KiB.
        SpireHwError: what the signer raises, or its signature does not hold (INTERNAL).
    """
    extra = dict(extra_claims or {})
    if not _REGISTERED.isdisjoint(extra):
        raise InvalidInputError("extra claims hold a registered claim")
    claims = build_claims(
        spiffe_id=spiffe_id,
        audience=audience,
        issued_at=issued_at,
        expires_at=expires_at,
        issuer=issuer,
        with_jti=with_jti,
    )
    return await sign_claims(signer, kid, {**extra, **claims}, check_signature=check_signature)


def build_claims(
    *,
    spiffe_id: SpiffeId,
    audience: Sequence[str],
    issued_at: datetime,
    expires_at: datetime,
    issuer: str = "",
    with_jti: bool = False,
) -> dict[str, Any]:
    """Return the claims of a token; arguments and errors as in `issue_jwt_svid`."""
    wanted = [value for value in audience if value]
    if not wanted:
        raise InvalidInputError("audience is required")
    if not spiffe_id.path:
        raise InvalidInputError(f'"{spiffe_id}" has no path')
    if expires_at <= issued_at:
        raise InvalidInputError("token would expire before it is issued")
    claims: dict[str, Any] = {
        "sub": str(spiffe_id),
        "aud": wanted,
        "exp": int(expires_at.timestamp()),
        "iat": int(issued_at.timestamp()),
    }
    if issuer:
        claims["iss"] = issuer
    if with_jti:
        claims["jti"] = encode_base64url(secrets.token_bytes(_JTI_BYTES))
    return claims


async def sign_claims(
    signer: Signer, kid: str, claims: Mapping[str, Any], *, check_signature: bool | None = None
) -> str:
    """Return the token of claims that were built and checked; errors as in `issue_jwt_svid`."""
    token = await jws.sign_compact(
        encode_json(claims), signer, kid, check_signature=check_signature
    )
    if len(token) > jws.MAX_TOKEN_BYTES:
        raise InvalidInputError(f"token would be longer than {jws.MAX_TOKEN_BYTES} bytes")
    return token


def verify_jwt_svid(
    token: str,
    *,
    audience: str,
    bundles: Mapping[TrustDomain, Bundle],
    at: datetime,
    leeway: timedelta = MAX_LEEWAY,
) -> JwtSvid:
    """Verify a token: form, key, signature, then claims, in that order.

    Args:
        token: compact form.
        audience: value that has to be among the token's, exactly.
        bundles: by trust domain; the key is looked for in that of the subject only.
        at: the current time.
        leeway: tolerance for clocks, at most 60 seconds.

    Raises:
        SvidError: any rule that does not hold; the token is never in the message.
        InvalidInputError: no audience given.
    """
    if not audience:
        raise InvalidInputError("audience is required")
    spiffe_id, parsed, claims = _take_apart(token)
    bundle = bundles.get(spiffe_id.trust_domain)
    if bundle is None:
        raise SvidError(f'no bundle for trust domain "{spiffe_id.trust_domain}"')
    authority = bundle.jwt_key(parsed.kid)
    if authority is None:
        raise SvidError(
            f'no JWT authority of "{spiffe_id.trust_domain}" has the key ID of the token'
        )
    try:
        jws.verify(parsed, authority.public_key)
    except (VerificationError, InvalidInputError) as e:
        raise SvidError(e.message) from e
    now, tolerance = at.timestamp(), min(max(leeway, timedelta(0)), MAX_LEEWAY).total_seconds()
    issued_at, expires_at = _check_times(claims, now, tolerance)
    named = _audience(claims)
    if audience not in named:
        raise SvidError("token is for another audience")
    return JwtSvid(spiffe_id, named, claims, issued_at, expires_at, token)


def parse_issued_jwt_svid(token: str) -> JwtSvid:
    """Read a token that came from a trusted source over a trusted channel, unverified.

    An agent does so with what its server answers, to learn when the token ends.

    Raises:
        SvidError: not a JWT-SVID.
    """
    spiffe_id, _, claims = _take_apart(token)
    issued_at, expires_at = _times(claims)
    return JwtSvid(spiffe_id, _audience(claims), claims, issued_at, expires_at, token)


def _take_apart(token: str) -> tuple[SpiffeId, jws.Jws, dict[str, Any]]:
    try:
        parsed = jws.parse_compact(token)
        claims = parse_json_object(parsed.payload, "token claims")
        subject = claims.get("sub")
        if not isinstance(subject, str):
            raise SvidError("token has no subject")
        spiffe_id = SpiffeId.parse(subject)
    except SpiffeIdError as e:
        raise SvidError("subject of the token is not a SPIFFE ID") from e
    except (EncodingError, VerificationError) as e:
        raise SvidError(e.message) from e
    if not spiffe_id.path:
        raise SvidError("subject of the token has no path")
    return spiffe_id, parsed, claims


def _audience(claims: dict[str, Any]) -> tuple[str, ...]:
    named = claims.get("aud")
    if isinstance(named, str):
        return (named,)
    if not isinstance(named, list) or not all(isinstance(value, str) for value in named):
        raise SvidError("audience of the token is not a string or a list of strings")
    return tuple(named)


def _seconds(claims: dict[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if name not in claims:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SvidError(f'claim "{name}" is not a number')
    if isinstance(value, float) and not math.isfinite(value):
        raise SvidError(f'claim "{name}" is not finite')
    if not 0 <= value <= _LAST_SECOND:
        raise SvidError(f'claim "{name}" is not a time')
    return value


def _times(claims: dict[str, Any]) -> tuple[datetime | None, datetime]:
    expires, issued = _seconds(claims, "exp"), _seconds(claims, "iat")
    if expires is None:
        raise SvidError("token has no expiry")
    return (
        None if issued is None else datetime.fromtimestamp(issued, UTC),
        datetime.fromtimestamp(expires, UTC),
    )


def _check_times(
    claims: dict[str, Any], now: float, tolerance: float
) -> tuple[datetime | None, datetime]:
    issued_at, expires_at = _times(claims)
    not_before = _seconds(claims, "nbf")
    if now >= expires_at.timestamp() + tolerance:
        raise SvidError("token has expired")
    if not_before is not None and now < not_before - tolerance:
        raise SvidError("token is not valid yet")
    if issued_at is not None and now < issued_at.timestamp() - tolerance:
        raise SvidError("token is issued in the future")
    return issued_at, expires_at

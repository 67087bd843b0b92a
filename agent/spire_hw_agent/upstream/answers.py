"""Bundles and tokens out of the server's answers, checked for form."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from spire_hw.errors import InvalidInputError, SpireHwError, VerificationError
from spire_hw.jose.jws import parse_compact
from spire_hw.rpc.convert import bundle_from_pb
from spire_hw.svid.jwtsvid import parse_issued_jwt_svid
from spire_hw_agent.entry import JwtToken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw._pb import types_pb2
    from spire_hw.bundle.bundle import Bundle
    from spire_hw.spiffeid import SpiffeId, TrustDomain

_EPOCH = datetime.fromtimestamp(0, UTC)


def read_bundle(message: types_pb2.Bundle, wanted: TrustDomain) -> Bundle:
    """Return a bundle.

    Raises:
        SpireHwError: INTERNAL, it does not parse or is of another trust domain.
    """
    try:
        bundle = bundle_from_pb(message)
    except InvalidInputError as e:
        raise SpireHwError(f"server sent a bundle that does not parse: {e.message}") from e
    if bundle.trust_domain != wanted:
        raise SpireHwError(
            f"asked for the bundle of {wanted}, the server sent that of {bundle.trust_domain}"
        )
    return bundle


def read_token(svid: types_pb2.JWTSVID, wanted: SpiffeId, audience: Sequence[str]) -> JwtToken:
    """Return a JWT-SVID.

    Raises:
        SpireHwError: INTERNAL, it does not parse, or is for another identity or audience.
    """
    try:
        made = parse_issued_jwt_svid(svid.token)
    except VerificationError as e:
        raise SpireHwError(f"server sent a JWT-SVID that does not parse: {e.message}") from e
    if made.spiffe_id != wanted:
        raise SpireHwError(f"server sent a JWT-SVID for {made.spiffe_id} instead of {wanted}")
    if set(made.audience) != set(audience):
        raise SpireHwError("server sent a JWT-SVID for another audience")
    return JwtToken(
        made.token,
        made.issued_at or _EPOCH,
        made.expires_at,
        parse_compact(made.token).kid,
    )

"""How often callers may ask for costly things: the rate classes, per IP address."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.rpc.interceptors import CallerRate, RateLimiter

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.rpc.service import Call

ATTEST_PER_S: Final = 1
SIGN_PER_S: Final = 500
PUBLISH_PER_S: Final = 500
STATUS_PER_S: Final = 10


class Limits:
    """The buckets; each method waits for the caller's turn, or raises LimitError."""

    def __init__(self, *, clock: Clock, attestation: bool = True, signing: bool = True) -> None:
        self._attest = CallerRate(RateLimiter(ATTEST_PER_S, clock=clock)) if attestation else None
        self._x509 = CallerRate(RateLimiter(SIGN_PER_S, clock=clock)) if signing else None
        self._jwt = CallerRate(RateLimiter(SIGN_PER_S, clock=clock)) if signing else None
        self._publish = CallerRate(RateLimiter(PUBLISH_PER_S, clock=clock))
        self._status = CallerRate(RateLimiter(STATUS_PER_S, clock=clock))

    async def attest(self, call: Call) -> None:
        """AttestAgent."""
        if self._attest is not None:
            await self._attest.take(call)

    async def sign_x509(self, call: Call, count: int = 1) -> None:
        """BatchNewX509SVID, NewDownstreamX509CA and RenewAgent together."""
        if self._x509 is not None:
            await self._x509.take(call, count)

    async def sign_jwt(self, call: Call) -> None:
        """NewJWTSVID."""
        if self._jwt is not None:
            await self._jwt.take(call)

    async def publish(self, call: Call) -> None:
        """PublishJWTAuthority."""
        await self._publish.take(call)

    async def post_status(self, call: Call) -> None:
        """PostStatus."""
        await self._status.take(call)

"""What happens around every call: request id, log, header check, rate limit.

Engine-independent. An interceptor sees calls with one response in `unary` and calls with a stream
of responses in `stream`, whatever their request shape, and awaits or iterates `proceed` to go on.
Error translation is not here: an interceptor raises `SpireHwError`, the engine's adapter answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from uuid import uuid4

from typing_extensions import override

from spire_hw.clock import Clock, SystemClock
from spire_hw.errors import InvalidInputError, LimitError
from spire_hw.log import LateLogger
from spire_hw.transport.peer import Peer, TcpPeer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from spire_hw.log import Logger
    from spire_hw.rpc.service import Call, Handler, Response, StreamNext, UnaryNext

_GENERATION_S: Final = 60.0
_MAX_WAIT_S: Final = 120.0


class Interceptor(Protocol):
    """Runs around calls."""

    async def unary(self, request: Any, call: Call, proceed: UnaryNext) -> Response:
        """Answer a call that has one response."""
        ...

    def stream(self, request: Any, call: Call, proceed: StreamNext) -> AsyncIterator[Response]:
        """Answer a call that has a stream of responses."""
        ...


class Guard:
    """An interceptor that only looks before the call: derive and write `check`.

    It costs a stream nothing once the stream runs.
    """

    async def check(self, request: Any, call: Call) -> None:
        """Raise SpireHwError to refuse the call; may fill `call.attributes`."""
        raise NotImplementedError


def chain(
    handler: Handler, interceptors: Sequence[Interceptor | Guard], *, streaming: bool
) -> Handler:
    """Wrap a handler in interceptors, the first one outermost."""
    guards: list[Guard] = []  # those in a row are one step
    for interceptor in reversed(interceptors):
        if isinstance(interceptor, Guard):
            guards.insert(0, interceptor)
            continue
        handler = _guarded(handler, guards, streaming=streaming)
        handler = _wrapped(handler, interceptor, streaming=streaming)
        guards = []
    return _guarded(handler, guards, streaming=streaming)


def _wrapped(handler: Handler, interceptor: Interceptor, *, streaming: bool) -> Handler:
    if streaming:
        return lambda request, call: interceptor.stream(request, call, handler)
    return lambda request, call: interceptor.unary(request, call, handler)


def _guarded(handler: Handler, guards: Sequence[Guard], *, streaming: bool) -> Handler:
    if not guards:
        return handler
    checks = [guard.check for guard in guards]
    if not streaming:

        async def unary(request: Any, call: Call) -> Response:
            for check in checks:
                await check(request, call)
            response: Response = await handler(request, call)
            return response

        return unary

    async def stream(request: Any, call: Call) -> AsyncIterator[Response]:
        for check in checks:
            await check(request, call)
        async for response in handler(request, call):
            yield response

    return stream


class RequestId(Guard):
    """Binds a fresh `request_id` and the method to the call's log, upstream's way."""

    @override
    async def check(self, request: Any, call: Call) -> None:
        """Bind the logger."""
        late = LateLogger(call.log, partial(call_fields, call.method, call.peer))
        call.log = cast("Logger", late)


def call_fields(path: str, peer: Peer) -> dict[str, str | int]:
    """Return log fields that name a call, with an id of its own each time."""
    service, _, method = path[1:].rpartition("/")
    return {
        "request_id": str(uuid4()),
        "service": service.rpartition(".")[2],
        "method": method,
        **caller_fields(peer),
    }


def caller_fields(peer: Peer) -> dict[str, str | int]:
    """Return log fields that name a caller, as upstream calls them."""
    if isinstance(peer, TcpPeer):
        fields: dict[str, str | int] = {"caller_addr": _host_port(peer)}
        if peer.spiffe_id is not None:
            fields["caller_id"] = str(peer.spiffe_id)
        return fields
    process = peer.process
    return {"caller_pid": process.pid, "caller_uid": process.uid, "caller_gid": process.gid}


def _host_port(peer: TcpPeer) -> str:
    return f"[{peer.address}]:{peer.port}" if ":" in peer.address else f"{peer.address}:{peer.port}"


class RequiredHeader(Guard):
    """Refuses calls that lack a header, such as `workload.spiffe.io: true`.

    Browsers and naive proxies cannot set it: this keeps server-side request forgery out.
    """

    def __init__(self, name: str, value: str, prefix: str) -> None:
        """Demand exactly one header `name` with `value` on methods whose path has a prefix."""
        self._name = name
        self._value = value
        self._prefix = prefix

    @override
    async def check(self, request: Any, call: Call) -> None:
        """Refuse a call without the header.

        Raises:
            InvalidInputError: missing, repeated or different.
        """
        if call.method.startswith(self._prefix) and call.header(self._name) != [self._value]:
            raise InvalidInputError("security header missing from request")


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimiter:
    """Token buckets by key, burst as large as the rate; a call that must wait waits.

    Tokens are reserved in order of arrival. A caller that would have to wait past its deadline, or
    longer than `max_wait_s`, is refused at once and takes nothing.

    Contract: errors.md section 6.
    """

    def __init__(
        self, per_second: int, *, clock: Clock | None = None, max_wait_s: float = _MAX_WAIT_S
    ) -> None:
        self.per_second = per_second
        self._clock = clock or SystemClock()
        self._max_wait_s = max_wait_s
        self._young: dict[str, _Bucket] = {}
        self._old: dict[str, _Bucket] = {}
        self._turned_at = self._clock.monotonic()

    async def take(self, key: str, count: int = 1, deadline_s: float | None = None) -> None:
        """Wait until `count` calls of a key may go on.

        Raises:
            LimitError: more than the burst was asked for, or the wait would be too long.
        """
        if count > self.per_second:
            raise LimitError(f"rate (={count}) exceeds burst size (={self.per_second})")
        bucket = self._bucket(key)
        now = self._clock.monotonic()
        bucket.tokens = min(
            float(self.per_second), bucket.tokens + (now - bucket.at) * self.per_second
        )
        bucket.at = now
        wait_s = max(0.0, (count - bucket.tokens) / self.per_second)
        if wait_s > (self._max_wait_s if deadline_s is None else min(deadline_s, self._max_wait_s)):
            raise LimitError(f"too many requests: the next one may come in {wait_s:.1f} s")
        bucket.tokens -= count
        if wait_s == 0.0:
            return
        try:
            await self._clock.sleep(wait_s)
        except BaseException:
            bucket.tokens += count
            raise

    def _bucket(self, key: str) -> _Bucket:
        now = self._clock.monotonic()
        if now - self._turned_at >= max(_GENERATION_S, 2 * self._max_wait_s):
            self._old, self._young, self._turned_at = self._young, {}, now
        bucket = self._young.get(key)
        if bucket is None:
            bucket = self._old.pop(key, None) or _Bucket(float(self.per_second), now)
            self._young[key] = bucket
        return bucket


class CallerRate:
    """A rate limit for TCP callers by address (IPv6: by /64); callers on unix sockets are exempt."""

    def __init__(self, limiter: RateLimiter) -> None:
        self._limiter = limiter

    async def take(self, call: Call, count: int = 1) -> None:
        """Wait until the caller may have `count` more; see `RateLimiter.take`."""
        if isinstance(call.peer, TcpPeer):
            await self._limiter.take(call.peer.source, count, call.deadline_s)

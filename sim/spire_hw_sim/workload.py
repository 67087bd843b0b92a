"""A workload: calls a Workload API and waits for what it should see."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Self, TypeVar

from google.protobuf.message import Message

from spire_hw._pb import workload_pb2 as pb
from spire_hw.clock import SystemClock
from spire_hw.errors import SpireHwError
from spire_hw.rpc.client import Channel, connect_unix

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from spire_hw.rpc.client import Metadata

M = TypeVar("M", bound=Message)
T = TypeVar("T")

HEADER: Final[Metadata] = (("workload.spiffe.io", "true"),)
_SERVICE: Final = "/SpiffeWorkloadAPI/"
_TIMEOUT_S: Final = 20.0
_TICK_S: Final = 0.02


class Workload:
    """One connection of a workload.

    Args:
        path: the Workload API socket.
        header: metadata of every call.
    """

    def __init__(self, path: Path, header: Metadata = HEADER) -> None:
        self.channel: Channel = connect_unix(path)
        self._header = header

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    def stream(
        self, method: str, request: Message, response_type: type[M]
    ) -> AsyncGenerator[M, None]:
        """Call a streaming method."""
        return self.channel.server_stream(
            _SERVICE + method, request, response_type, timeout_s=_TIMEOUT_S, metadata=self._header
        )

    @asynccontextmanager
    async def x509_svids(self) -> AsyncIterator[AsyncGenerator[pb.X509SVIDResponse, None]]:
        """Hold a stream of X509-SVIDs open."""
        stream = self.stream("FetchX509SVID", pb.X509SVIDRequest(), pb.X509SVIDResponse)
        try:
            yield stream
        finally:
            await stream.aclose()

    async def x509_svid(self) -> pb.X509SVIDResponse:
        """Return the first answer of FetchX509SVID."""
        async with self.x509_svids() as stream:
            return await anext(stream)

    async def x509_bundles(self) -> pb.X509BundlesResponse:
        """Return the first answer of FetchX509Bundles."""
        stream = self.stream("FetchX509Bundles", pb.X509BundlesRequest(), pb.X509BundlesResponse)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    async def jwt_bundles(self) -> pb.JWTBundlesResponse:
        """Return the first answer of FetchJWTBundles."""
        stream = self.stream("FetchJWTBundles", pb.JWTBundlesRequest(), pb.JWTBundlesResponse)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    async def jwt_svid(self, audience: Sequence[str], spiffe_id: str = "") -> pb.JWTSVIDResponse:
        """Call FetchJWTSVID."""
        return await self.call(
            "FetchJWTSVID",
            pb.JWTSVIDRequest(audience=audience, spiffe_id=spiffe_id),
            pb.JWTSVIDResponse,
        )

    async def validate(self, audience: str, token: str) -> pb.ValidateJWTSVIDResponse:
        """Call ValidateJWTSVID."""
        return await self.call(
            "ValidateJWTSVID",
            pb.ValidateJWTSVIDRequest(audience=audience, svid=token),
            pb.ValidateJWTSVIDResponse,
        )

    async def call(self, method: str, request: Message, response_type: type[M]) -> M:
        """Call a unary method."""
        return await self.channel.unary(
            _SERVICE + method, request, response_type, timeout_s=_TIMEOUT_S, metadata=self._header
        )


async def eventually(
    attempt: Callable[[], Awaitable[T]], holds: Callable[[T], bool] = lambda _: True
) -> T:
    """Try until an attempt succeeds and its result is as wanted; the caller sets the time limit."""
    while True:
        try:
            result = await attempt()
        except SpireHwError:
            pass
        else:
            if holds(result):
                return result
        await SystemClock().sleep(_TICK_S)


async def until(holds: Callable[[], object]) -> None:
    """Wait until something holds; the caller sets the time limit."""
    while not holds():
        await SystemClock().sleep(_TICK_S)


async def refusal(attempt: Callable[[], Awaitable[object]], word: str) -> SpireHwError:
    """Try until it is refused with a word in the message, and return the error."""
    while True:
        try:
            await attempt()
        except SpireHwError as e:
            if word in e.message:
                return e
        await SystemClock().sleep(_TICK_S)

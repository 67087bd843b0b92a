"""The grpcio client: calls by path, errors of our own tree, deadlines.

A channel goes to a unix socket, or through a `Dialer` to a server known by its SPIFFE ID; why the
dialer could not connect is told in place of grpcio's "socket closed".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, Self, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from spire_hw.errors import EncodingError, ErrorKind, SpireHwError, UnavailableError
from spire_hw.rpc.status import from_grpc

if TYPE_CHECKING:
    from types import TracebackType

    from spire_hw.transport.dialer import Dialer

M = TypeVar("M", bound=Message)
Metadata = Sequence[tuple[str, str]]

MAX_RESPONSE_BYTES: Final = 64 * 1024 * 1024
_NO_METADATA: Final[Metadata] = ()


def _options(max_response_bytes: int, authority: str) -> list[tuple[str, int | str]]:
    return [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_receive_message_length", max_response_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.enable_retries", 0),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 20_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.default_authority", authority),
    ]


def connect_unix(path: str | Path, *, max_response_bytes: int = MAX_RESPONSE_BYTES) -> Channel:
    """Return a channel to a unix socket; it connects at the first call."""
    target = f"unix:{Path(path).absolute()}"
    return Channel(
        grpc.aio.insecure_channel(target, options=_options(max_response_bytes, "localhost")),
        where=str(path),
    )


async def connect(dialer: Dialer, *, max_response_bytes: int = MAX_RESPONSE_BYTES) -> Channel:
    """Return a channel through a dialer, which is started if need be and closed with the channel."""
    target = await dialer.start()
    where = f"{dialer.address}:{dialer.port}"
    return Channel(
        grpc.aio.insecure_channel(target, options=_options(max_response_bytes, where)),
        where=where,
        dialer=dialer,
    )


class Channel:
    """Calls to one server; close it when done."""

    def __init__(self, channel: grpc.aio.Channel, *, where: str, dialer: Dialer | None = None):
        self._channel: Any = channel  # bytes in, bytes out: the stubs know only messages
        self._where = where
        self._closed = False
        self.dialer = dialer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End it; calls in progress fail."""
        self._closed = True
        await self._channel.close(None)
        if self.dialer is not None:
            await self.dialer.close()

    async def unary(
        self,
        path: str,
        request: Message | bytes,
        response_type: type[M],
        timeout_s: float | None = None,
        metadata: Metadata = _NO_METADATA,
    ) -> M:
        """Call a method with one request and one response.

        Args:
            path: `/package.Service/Method`.
            request: the request; bytes when it is encoded already.
            response_type: what to decode the answer as.
            timeout_s: deadline, told to the server; None waits for ever.
            metadata: headers.

        Raises:
            SpireHwError: what the server answered (`DeniedError` with its reason), UNAVAILABLE
                when it cannot be reached, DEADLINE_EXCEEDED.
        """
        try:
            call = self._channel.unary_unary(path)(
                _encode(request), timeout=timeout_s, metadata=_headers(metadata)
            )
            raw = await call
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as e:
            self._raise(e)
        return _decode(response_type, raw)

    async def server_stream(
        self,
        path: str,
        request: Message | bytes,
        response_type: type[M],
        timeout_s: float | None = None,
        metadata: Metadata = _NO_METADATA,
    ) -> AsyncGenerator[M, None]:
        """Call a method with one request and iterate over its responses.

        Closing the iterator cancels the call. Arguments and errors as in `unary`.
        """
        call: Any = None
        try:
            call = self._channel.unary_stream(path)(
                _encode(request), timeout=timeout_s, metadata=_headers(metadata)
            )
            async for raw in call:
                yield _decode(response_type, raw)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as e:
            self._raise(e)
        finally:
            if call is not None:
                call.cancel()

    def bidi(
        self,
        path: str,
        response_type: type[M],
        timeout_s: float | None = None,
        metadata: Metadata = _NO_METADATA,
    ) -> Bidi[M]:
        """Open a call with streams both ways; use it as an async context manager.

        Arguments and errors as in `unary`.
        """
        return Bidi(
            lambda: self._channel.stream_stream(path)(
                timeout=timeout_s, metadata=_headers(metadata)
            ),
            response_type,
            self._raise,
        )

    def _raise(self, error: BaseException) -> NoReturn:
        """Raise the error of our tree that a grpcio error stands for."""
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise error
            raise UnavailableError(f"the connection to {self._where} was closed") from error
        if not isinstance(error, grpc.aio.AioRpcError):
            raise UnavailableError(f"the connection to {self._where} is closed") from error
        found = from_grpc(error)
        if found.kind is not ErrorKind.UNAVAILABLE:
            raise found from error
        cause = None if self.dialer is None else self.dialer.last_error
        if cause is not None:
            raise UnavailableError(f"cannot reach {self._where}: {cause.message}") from cause
        if "failed to connect" in found.message:
            raise UnavailableError(f"cannot connect to {self._where}") from error
        raise found from error


class Bidi(Generic[M]):
    """One call with streams both ways."""

    def __init__(
        self,
        opened: Callable[[], Any],
        response_type: type[M],
        fail: Callable[[BaseException], NoReturn],
    ) -> None:
        self._opened = opened
        self._response_type = response_type
        self._fail = fail
        self._call: Any = None

    async def __aenter__(self) -> Self:
        try:
            self._call = self._opened()
        except grpc.aio.UsageError as e:
            self._fail(e)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call.cancel()

    async def send(self, message: Message | bytes) -> None:
        """Send one message.

        Raises:
            SpireHwError: the call has ended; the error is the server's, see `Channel.unary`.
        """
        try:
            await self._call.write(_encode(message))
        except asyncio.InvalidStateError:  # ended already: what it ended with says why
            await self._ended()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as e:
            self._fail(e)

    async def done_sending(self) -> None:
        """Say that no more messages come."""
        try:
            await self._call.done_writing()
        except asyncio.InvalidStateError:
            await self._ended()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as e:
            self._fail(e)

    async def receive(self) -> M | None:
        """Return the next message, None when the server has ended the call well.

        Raises:
            SpireHwError: see `Channel.unary`.
        """
        try:
            raw = await self._call.read()
            if raw is grpc.aio.EOF:
                await self._ended()
                return None
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as e:
            self._fail(e)
        return _decode(self._response_type, raw)

    async def _ended(self) -> None:
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return
        self._fail(
            grpc.aio.AioRpcError(
                code,
                await self._call.initial_metadata(),
                await self._call.trailing_metadata(),
                details=await self._call.details(),
            )
        )


def _encode(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _headers(metadata: Metadata) -> tuple[tuple[str, str], ...]:
    return tuple(metadata)


def _decode(response_type: type[M], raw: bytes) -> M:
    try:
        return response_type.FromString(raw)
    except DecodeError as e:
        error = EncodingError(response_type.DESCRIPTOR.full_name, "the answer does not decode")
        raise SpireHwError(error.message, kind=ErrorKind.INTERNAL) from e

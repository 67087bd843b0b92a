"""The grpcio engine's calling side."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from typing_extensions import override

from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.rpc.client import Channel, Metadata
from spire_hw.rpc.status import DETAILS_KEY, from_code

if TYPE_CHECKING:
    from spire_hw.transport.dialer import Dialer


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


def unix_channel(path: str, max_response_bytes: int) -> Channel:
    """Return a channel to a unix socket."""
    options = _options(max_response_bytes, "localhost")
    return GrpcioChannel(grpc.aio.insecure_channel(f"unix:{path}", options=options), path)


async def dialed_channel(dialer: Dialer, max_response_bytes: int) -> Channel:
    """Return a channel through a dialer's private socket, which is opened if need be."""
    target = await dialer.start()
    where = f"{dialer.address}:{dialer.port}"
    options = _options(max_response_bytes, where)
    return GrpcioChannel(grpc.aio.insecure_channel(target, options=options), where, dialer)


class GrpcioChannel(Channel):
    """A channel of grpcio."""

    def __init__(self, channel: grpc.aio.Channel, where: str, dialer: Dialer | None = None) -> None:
        super().__init__(where, dialer)
        self._channel: Any = channel  # bytes in, bytes out: the stubs know only messages
        self._closed = False

    @override
    async def close(self) -> None:
        self._closed = True
        await self._channel.close(None)
        if self.dialer is not None:
            await self.dialer.close()

    @override
    async def open(self, path: str, timeout_s: float | None, metadata: Metadata) -> _Call:
        try:
            method = self._channel.stream_stream(path)  # unary calls look the same on the wire
            return _Call(method(timeout=timeout_s, metadata=tuple(metadata)), self)
        except grpc.aio.UsageError as e:
            self.fail(e)

    def fail(self, error: BaseException) -> NoReturn:
        """Raise the error of our tree that a grpcio error stands for."""
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise error
            raise UnavailableError(f"the connection to {self.where} was closed") from error
        if not isinstance(error, grpc.aio.AioRpcError):
            raise UnavailableError(f"the connection to {self.where} is closed") from error
        found = _error(error)
        if found.kind is not ErrorKind.UNAVAILABLE:
            raise found from error
        cause = None if self.dialer is None else self.dialer.last_error
        if cause is not None:
            raise UnavailableError(f"cannot reach {self.where}: {cause.message}") from cause
        if "failed to connect" in found.message:
            raise UnavailableError(f"cannot connect to {self.where}") from error
        raise found from error


def _error(error: grpc.aio.AioRpcError) -> SpireHwError:
    details = None
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            details = value
    return from_code(error.code().value[0], error.details() or "", details)


class _Call:
    """One call of grpcio."""

    is_unprocessed = False

    def __init__(self, call: Any, channel: GrpcioChannel) -> None:
        self._call = call
        self._channel = channel

    async def send(self, message: bytes, *, end: bool = False) -> None:
        """Send a message; see `RawCall`."""
        try:
            await self._call.write(message)
            if end:
                await self._call.done_writing()
        except asyncio.InvalidStateError:  # ended already: what it ended with says why
            await self._ended()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as e:
            self._channel.fail(e)

    async def done_sending(self) -> None:
        """Say that no more messages come."""
        try:
            await self._call.done_writing()
        except asyncio.InvalidStateError:
            await self._ended()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as e:
            self._channel.fail(e)

    async def receive(self) -> bytes | None:
        """Return the next message; see `RawCall`."""
        try:
            raw: Any = await self._call.read()
            if raw is grpc.aio.EOF:
                await self._ended()
                return None
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as e:
            self._channel.fail(e)
        return bytes(raw)

    def cancel(self) -> None:
        """Let go of the call."""
        self._call.cancel()

    async def _ended(self) -> None:
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return
        self._channel.fail(
            grpc.aio.AioRpcError(
                code,
                await self._call.initial_metadata(),
                await self._call.trailing_metadata(),
                details=await self._call.details(),
            )
        )

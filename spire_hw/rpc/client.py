"""The calling side: calls by path, errors of our own tree, deadlines; see `spire_hw.rpc.engine`.

A channel goes to a unix socket, or through a `Dialer` to a server known by its SPIFFE ID. It
connects at the first call and again whenever the connection was lost.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, Protocol, Self, TypeVar

from google.protobuf.message import DecodeError, Message

from spire_hw.errors import EncodingError, ErrorKind, SpireHwError, UnavailableError
from spire_hw.rpc.engine import load

if TYPE_CHECKING:
    from types import TracebackType

    from spire_hw.transport.dialer import Dialer

M = TypeVar("M", bound=Message)
Metadata = Sequence[tuple[str, str]]

MAX_RESPONSE_BYTES: Final = 64 * 1024 * 1024
_NO_METADATA: Final[Metadata] = ()


def connect_unix(path: str | Path, *, max_response_bytes: int = MAX_RESPONSE_BYTES) -> Channel:
    """Return a channel to a unix socket; it connects at the first call."""
    channel: Channel = load("client").unix_channel(str(Path(path).absolute()), max_response_bytes)
    return channel


async def connect(dialer: Dialer, *, max_response_bytes: int = MAX_RESPONSE_BYTES) -> Channel:
    """Return a channel through a dialer, which is closed with the channel."""
    channel: Channel = await load("client").dialed_channel(dialer, max_response_bytes)
    return channel


class RawCall(Protocol):
    """One call as an engine makes it: bytes both ways. Every method raises `SpireHwError`."""

    async def send(self, message: bytes, *, end: bool = False) -> None:
        """Send a message, and the end with it when it is the last one."""
        ...

    async def done_sending(self) -> None:
        """Say that no more messages come."""
        ...

    async def receive(self) -> bytes | None:
        """Return the next message, None when the server has ended the call well."""
        ...

    def cancel(self) -> None:
        """Let go of the call, whatever its state."""
        ...

    @property
    def is_unprocessed(self) -> bool:
        """Tell whether the server is known not to have looked at the call."""
        ...


class Channel(ABC):
    """Calls to one server; close it when done."""

    def __init__(self, where: str, dialer: Dialer | None = None) -> None:
        self.where = where
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

    @abstractmethod
    async def close(self) -> None:
        """End it; calls in progress fail."""

    @abstractmethod
    async def open(self, path: str, timeout_s: float | None, metadata: Metadata) -> RawCall:
        """Begin a call; arguments and errors as in `unary`."""

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
        encoded = _encode(request)
        begun = asyncio.get_running_loop().time()
        for last in (False, True):
            if last and timeout_s is not None:
                timeout_s = max(0.0, timeout_s - (asyncio.get_running_loop().time() - begun))
            call = await self.open(path, timeout_s, metadata)
            try:
                return _decode(response_type, await _only_answer(call, encoded))
            except UnavailableError:
                if last or not call.is_unprocessed:
                    raise
            finally:
                call.cancel()
        raise AssertionError

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
        call = await self.open(path, timeout_s, metadata)
        try:
            await call.send(_encode(request), end=True)
            while (raw := await call.receive()) is not None:
                yield _decode(response_type, raw)
        finally:
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
        return Bidi(self, path, response_type, timeout_s, metadata)


class Bidi(Generic[M]):
    """One call with streams both ways."""

    _call: RawCall

    def __init__(
        self,
        channel: Channel,
        path: str,
        response_type: type[M],
        timeout_s: float | None,
        metadata: Metadata,
    ) -> None:
        self._channel = channel
        self._path = path
        self._response_type = response_type
        self._timeout_s = timeout_s
        self._metadata = metadata

    async def __aenter__(self) -> Self:
        self._call = await self._channel.open(self._path, self._timeout_s, self._metadata)
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
        await self._call.send(_encode(message))

    async def done_sending(self) -> None:
        """Say that no more messages come."""
        await self._call.done_sending()

    async def receive(self) -> M | None:
        """Return the next message, None when the server has ended the call well.

        Raises:
            SpireHwError: see `Channel.unary`.
        """
        raw = await self._call.receive()
        return None if raw is None else _decode(self._response_type, raw)


async def _only_answer(call: RawCall, request: bytes) -> bytes:
    await call.send(request, end=True)
    raw = await call.receive()
    if raw is None or await call.receive() is not None:
        raise SpireHwError("the server did not answer with one message", kind=ErrorKind.INTERNAL)
    return raw


def _encode(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _decode(response_type: type[M], raw: bytes) -> M:
    try:
        return response_type.FromString(raw)
    except DecodeError as e:
        error = EncodingError(response_type.DESCRIPTOR.full_name, "the answer does not decode")
        raise SpireHwError(error.message, kind=ErrorKind.INTERNAL) from e

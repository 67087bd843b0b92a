"""The grpcio engine: serves bound methods behind fronts.

grpcio never decodes: requests arrive as bytes and are decoded here, so an undecodable one costs
nothing and is answered INVALID_ARGUMENT. Every connection comes through a front; a call on any
other is refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message import DecodeError, Message
from typing_extensions import override

from spire_hw.errors import ErrorKind, InvalidInputError, NotReadyError, SpireHwError
from spire_hw.log import Logger, get_logger
from spire_hw.rpc.interceptors import Guard, Interceptor, chain
from spire_hw.rpc.service import Call, Method, Response
from spire_hw.rpc.status import WireStatus, to_grpc
from spire_hw.transport.relay import Callers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from spire_hw.transport.front import Front

    _Context = grpc.aio.ServicerContext[Any, Any]
    _RpcMethodHandler = grpc.RpcMethodHandler[Any, Any]

_INTERNAL: Final = {ErrorKind.INTERNAL, ErrorKind.UNKNOWN}
_IDENTITY_ONLY: Final = 1


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """What one inner server allows.

    Attributes:
        max_request_bytes: per message.
        max_response_bytes: per message, -1 for any.
        max_streams: concurrent calls on one connection.
        max_header_bytes: all headers of a call.
        max_connection_age_s: then clients are asked to leave (GOAWAY), None for never.
        max_connection_age_grace_s: how long calls in progress may take from there.
        max_connection_idle_s: without any call; then the connection ends, None for never.
        keepalive_s: ping a silent client this often, None for never.
        keepalive_timeout_s: a ping unanswered this long ends the connection.
        max_calls: in progress at once over all connections, None for any.
    """

    max_request_bytes: int = 4 * 1024 * 1024
    max_response_bytes: int = -1
    max_streams: int = 256
    max_header_bytes: int = 16 * 1024
    max_connection_age_s: float | None = None
    max_connection_age_grace_s: float = 60.0
    max_connection_idle_s: float | None = None
    keepalive_s: float | None = None
    keepalive_timeout_s: float = 20.0
    max_calls: int | None = None


# Strangers may connect here: what one connection can hold is small.
TCP_RPC_LIMITS: Final = RpcLimits(
    max_streams=100,
    max_header_bytes=8 * 1024,
    max_connection_age_s=180.0,
    max_connection_idle_s=120.0,
    keepalive_s=60.0,
)


def _options(limits: RpcLimits) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        ("grpc.max_send_message_length", limits.max_response_bytes),
        ("grpc.max_concurrent_streams", limits.max_streams),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if limits.max_connection_age_s is not None:
        options += [
            ("grpc.max_connection_age_ms", _ms(limits.max_connection_age_s)),
            ("grpc.max_connection_age_grace_ms", _ms(limits.max_connection_age_grace_s)),
        ]
    if limits.max_connection_idle_s is not None:
        options.append(("grpc.max_connection_idle_ms", _ms(limits.max_connection_idle_s)))
    if limits.keepalive_s is not None:
        options += [
            ("grpc.keepalive_time_ms", _ms(limits.keepalive_s)),
            ("grpc.keepalive_timeout_ms", _ms(limits.keepalive_timeout_s)),
        ]
    return options


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


class RpcServer:
    """Serves methods to whoever the fronts let in; one start, one close."""

    def __init__(
        self,
        methods: Sequence[Method],
        interceptors: Sequence[Interceptor | Guard] = (),
        log: Logger | None = None,
        *,
        limits: RpcLimits | None = None,
        show_internal: bool = False,
    ) -> None:
        """Describe the server.

        Args:
            methods: what is served, from `bind`.
            interceptors: run around every call, the first one outermost.
            log: calls get loggers derived from it.
            limits: see `RpcLimits`.
            show_internal: tell callers the text of internal errors; for operators' sockets only.
        """
        self._log = log or get_logger("api")
        self._methods = list(methods)
        self._interceptors = list(interceptors)
        self._limits = limits or RpcLimits()
        self._show_internal = show_internal
        self._fronts: list[Front] = []
        self._server: grpc.aio.Server | None = None
        self.callers = Callers()

    def add_front(self, front: Front) -> None:
        """Put a front before the server.

        Raises:
            NotReadyError: the server was started.
        """
        if self._server is not None:
            raise NotReadyError("fronts are added before the server starts")
        self._fronts.append(front)

    async def start(self) -> None:
        """Serve.

        Raises:
            UnavailableError: a front cannot listen; everything is closed again.
        """
        if self._server is not None:
            raise NotReadyError("this server was started before")
        server = self._server = grpc.aio.server(
            options=_options(self._limits), maximum_concurrent_rpcs=self._limits.max_calls
        )
        server.add_generic_rpc_handlers((_Handlers(self._adapters()),))
        server.add_insecure_port(self.callers.target)
        await server.start()
        os.chmod(self.callers.path, 0o600)  # noqa: PTH101 - no I/O worth a thread
        try:
            for front in self._fronts:
                await front.start(self.callers)
        except BaseException:
            await self.close(0)
            raise

    async def close(self, grace_s: float = 5.0) -> None:
        """Take no more calls, let those in progress finish for a while, cut the rest."""
        for front in self._fronts:
            await front.stop_accepting()
        if self._server is not None:
            await self._server.stop(grace_s)
        for front in self._fronts:
            await front.close()
        self.callers.close()

    def _adapters(self) -> dict[str, _RpcMethodHandler]:
        return {method.path: self._adapter(method) for method in self._methods}

    def _adapter(self, method: Method) -> _RpcMethodHandler:
        serve = _Adapter(
            method,
            chain(method.handler, self._interceptors, streaming=method.server_streaming),
            self.callers,
            self._log,
            show_internal=self._show_internal,
        )
        match method.client_streaming, method.server_streaming:
            case False, False:
                return grpc.unary_unary_rpc_method_handler(serve.unary_unary)
            case False, True:
                return grpc.unary_stream_rpc_method_handler(serve.unary_stream)
            case True, False:
                return grpc.stream_unary_rpc_method_handler(serve.stream_unary)
            case _:
                return grpc.stream_stream_rpc_method_handler(serve.stream_stream)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, handlers: dict[str, _RpcMethodHandler]) -> None:
        self._handlers = handlers

    @override
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> _RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)


class _Adapter:
    """One method, seen from grpcio."""

    __slots__ = ("_callers", "_decode", "_handler", "_log", "_path", "_show_internal")

    def __init__(
        self,
        method: Method,
        handler: Callable[[Any, Call], Any],
        callers: Callers,
        log: Logger,
        *,
        show_internal: bool,
    ) -> None:
        self._path = method.path
        self._decode = method.request_type.FromString
        self._handler = handler
        self._callers = callers
        self._log = log
        self._show_internal = show_internal

    async def unary_unary(self, raw: bytes, context: _Context) -> bytes:
        call: Call | None = None
        try:
            call = self._call(context)
            return _encode(await self._handler(self._message(raw), call))
        except Exception as e:  # noqa: BLE001 - the edge: everything becomes a status
            status = self._status(e, call)
        await _abort(context, status)
        return b""

    async def unary_stream(self, raw: bytes, context: _Context) -> None:
        call: Call | None = None
        try:
            call = self._call(context)
            message = self._message(raw)
            del raw
            async for response in self._handler(message, call):
                await context.write(_encode(response))
        except Exception as e:  # noqa: BLE001
            await _abort(context, self._status(e, call))

    async def stream_unary(self, raws: AsyncIterator[bytes], context: _Context) -> bytes:
        call: Call | None = None
        try:
            call = self._call(context)
            return _encode(await self._handler(self._messages(raws), call))
        except Exception as e:  # noqa: BLE001
            status = self._status(e, call)
        await _abort(context, status)
        return b""

    async def stream_stream(self, raws: AsyncIterator[bytes], context: _Context) -> None:
        call: Call | None = None
        try:
            call = self._call(context)
            async for response in self._handler(self._messages(raws), call):
                await context.write(_encode(response))
        except Exception as e:  # noqa: BLE001
            await _abort(context, self._status(e, call))

    def _call(self, context: _Context) -> Call:
        peer = self._callers.of(context.peer())
        if peer is None:
            raise SpireHwError("the caller is unknown", kind=ErrorKind.UNAUTHENTICATED)
        metadata = tuple(
            (key, value)
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        )
        return Call(self._path, peer, metadata, self._log, context.time_remaining())

    def _message(self, raw: bytes) -> Message:
        try:
            return self._decode(raw)
        except DecodeError as e:
            raise InvalidInputError("the request does not decode") from e

    async def _messages(self, raws: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for raw in raws:
            yield self._message(raw)

    def _status(self, error: Exception, call: Call | None) -> WireStatus:
        """Say what a caller is told, and log what it is not."""
        log = self._log if call is None else call.log
        if not isinstance(error, SpireHwError):
            log.error("Unexpected error", rpc=self._path, exc_info=error)
            return to_grpc(SpireHwError("internal error"))
        if error.kind in _INTERNAL:
            log.error("Call failed", rpc=self._path, error=error.message, exc_info=error.__cause__)
            if not self._show_internal:
                return to_grpc(SpireHwError("internal error", kind=error.kind))
        return to_grpc(error)


def _encode(response: Response) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


async def _abort(context: _Context, status: WireStatus) -> None:
    await context.abort(status.code, status.message, status.trailing)

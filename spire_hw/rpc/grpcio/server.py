"""The grpcio engine: an inner server behind the relay of the transport."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import grpc
from typing_extensions import override

from spire_hw.transport.relay import Callers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spire_hw.log import Logger
    from spire_hw.rpc.endpoint import Endpoint, RpcLimits
    from spire_hw.rpc.service import Call, Reply, Response
    from spire_hw.rpc.status import WireStatus
    from spire_hw.transport.half import Half
    from spire_hw.transport.peer import Peer

    _Context = grpc.aio.ServicerContext[Any, Any]
    _RpcMethodHandler = grpc.RpcMethodHandler[Any, Any]

_IDENTITY_ONLY: Final = 1
_CODES: Final[dict[int, grpc.StatusCode]] = {code.value[0]: code for code in grpc.StatusCode}


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


class GrpcioEngine:
    """Serves calls through grpcio; every connection is dialled in the name of its peer."""

    descriptors = 2  # the two ends of the private connection

    def __init__(self, endpoints: dict[str, Endpoint], limits: RpcLimits) -> None:
        self._endpoints = endpoints
        self._limits = limits
        self._callers = Callers()
        self._server: grpc.aio.Server | None = None

    def __len__(self) -> int:
        return len(self._callers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._callers)

    @property
    def path(self) -> str:
        """Return the path of the private socket."""
        return self._callers.path

    async def start(self) -> None:
        """Listen on the private socket."""
        server = self._server = grpc.aio.server(
            options=_options(self._limits), maximum_concurrent_rpcs=self._limits.max_calls
        )
        handlers = {path: self._handler(endpoint) for path, endpoint in self._endpoints.items()}
        server.add_generic_rpc_handlers((_Handlers(handlers),))
        server.add_insecure_port(self._callers.target)
        await server.start()
        os.chmod(self._callers.path, 0o600)  # noqa: PTH101 - no I/O worth a thread

    async def attach(self, outer: Half, peer: Peer) -> None:
        """Relay a connection to the private socket; see `Callers.attach`."""
        await self._callers.attach(outer, peer)

    async def stop(self, grace_s: float) -> None:
        """Let calls finish for a while, then cut the rest."""
        if self._server is not None:
            await self._server.stop(grace_s)
        self._callers.close()

    def _handler(self, endpoint: Endpoint) -> _RpcMethodHandler:
        serve = _Adapter(endpoint, self._callers)
        match endpoint.client_streaming, endpoint.server_streaming:
            case False, False:
                return grpc.unary_unary_rpc_method_handler(serve.unary_unary)
            case False, True:
                return grpc.unary_stream_rpc_method_handler(serve.unary_stream)
            case True, False:
                return grpc.stream_unary_rpc_method_handler(serve.stream_unary)
            case _:
                return grpc.stream_stream_rpc_method_handler(serve.stream_stream)


def build(endpoints: dict[str, Endpoint], limits: RpcLimits, _log: Logger) -> GrpcioEngine:
    """Return an engine; grpcio logs by itself."""
    return GrpcioEngine(endpoints, limits)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, handlers: dict[str, _RpcMethodHandler]) -> None:
        self._handlers = handlers

    @override
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> _RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)


class _Adapter:
    """One method, seen from grpcio."""

    __slots__ = ("_callers", "_endpoint")

    def __init__(self, endpoint: Endpoint, callers: Callers) -> None:
        self._endpoint = endpoint
        self._callers = callers

    async def unary_unary(self, raw: bytes, context: _Context) -> bytes:
        endpoint, call = self._endpoint, None
        try:
            call = self._call(context)
            return endpoint.encode(await endpoint.handler(endpoint.decode(raw), call))
        except Exception as e:  # noqa: BLE001 - the edge: everything becomes a status
            status = endpoint.status(e, call)
        await _abort(context, status)
        return b""

    async def unary_stream(self, raw: bytes, context: _Context) -> None:
        endpoint, call = self._endpoint, None
        try:
            call = self._call(context)
            call.reply = self._replies(context)
            message = endpoint.decode(raw)
            del raw
            async for response in endpoint.handler(message, call):
                await context.write(endpoint.encode(response))
        except Exception as e:  # noqa: BLE001
            await _abort(context, endpoint.status(e, call))

    async def stream_unary(self, raws: AsyncIterator[bytes], context: _Context) -> bytes:
        endpoint, call = self._endpoint, None
        try:
            call = self._call(context)
            return endpoint.encode(await endpoint.handler(self._messages(raws), call))
        except Exception as e:  # noqa: BLE001
            status = endpoint.status(e, call)
        await _abort(context, status)
        return b""

    async def stream_stream(self, raws: AsyncIterator[bytes], context: _Context) -> None:
        endpoint, call = self._endpoint, None
        try:
            call = self._call(context)
            call.reply = self._replies(context)
            async for response in endpoint.handler(self._messages(raws), call):
                await context.write(endpoint.encode(response))
        except Exception as e:  # noqa: BLE001
            await _abort(context, endpoint.status(e, call))

    def _call(self, context: _Context) -> Call:
        metadata = tuple(
            (key, value)
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        )
        peer = self._callers.of(context.peer())
        return self._endpoint.call(peer, metadata, context.time_remaining())

    def _replies(self, context: _Context) -> Reply:
        async def reply(response: Response) -> None:
            await context.write(self._endpoint.encode(response))

        return reply

    async def _messages(self, raws: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for raw in raws:
            yield self._endpoint.decode(raw)


async def _abort(context: _Context, status: WireStatus) -> None:
    await context.abort(_CODES[status.code], status.message, status.trailing)

"""What every engine does with one method: decode, call, encode, and say what went wrong.

Engines never decode: requests arrive as bytes and are decoded here, so an undecodable one costs
nothing and is answered INVALID_ARGUMENT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError, Message

from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.rpc.interceptors import Guard, Interceptor, chain
from spire_hw.rpc.service import Call, Method, Response
from spire_hw.rpc.status import WireStatus, to_wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.log import Logger
    from spire_hw.transport.peer import Peer

_INTERNAL: Final = {ErrorKind.INTERNAL, ErrorKind.UNKNOWN}


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
        max_held_bytes: of messages that proved callers have sent, incomplete, unread or being
            worked on, over all connections.
        max_stranger_streams: concurrent calls of a caller who showed no certificate.
        max_stranger_held_bytes: as `max_held_bytes`, of callers who showed none.

    The last three are of our own engine; grpcio has no such limits.
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
    max_held_bytes: int = 256 * 1024 * 1024
    max_stranger_streams: int = 16
    max_stranger_held_bytes: int = 64 * 1024 * 1024


# Strangers may connect here: what one connection can hold is small.
TCP_RPC_LIMITS: Final = RpcLimits(
    max_streams=100,
    max_header_bytes=8 * 1024,
    max_connection_age_s=180.0,
    max_connection_idle_s=120.0,
    keepalive_s=60.0,
)


class Endpoint:
    """One method, ready to be served by an engine.

    Attributes:
        path: `/package.Service/Method`.
        client_streaming: whether requests are a stream.
        server_streaming: whether responses are.
        handler: the method inside its interceptors.
    """

    __slots__ = (
        "_decode",
        "_log",
        "_show_internal",
        "client_streaming",
        "handler",
        "path",
        "server_streaming",
    )

    def __init__(
        self,
        method: Method,
        interceptors: Sequence[Interceptor | Guard],
        log: Logger,
        *,
        show_internal: bool,
    ) -> None:
        self.path = method.path
        self.client_streaming = method.client_streaming
        self.server_streaming = method.server_streaming
        self.handler = chain(method.handler, interceptors, streaming=method.server_streaming)
        self._decode = method.request_type.FromString
        self._log = log
        self._show_internal = show_internal

    def call(
        self, peer: Peer | None, metadata: tuple[tuple[str, str], ...], deadline_s: float | None
    ) -> Call:
        """Return the call of a request.

        Raises:
            SpireHwError: UNAUTHENTICATED, nobody knows who is calling.
        """
        if peer is None:
            raise SpireHwError("the caller is unknown", kind=ErrorKind.UNAUTHENTICATED)
        return Call(self.path, peer, metadata, self._log, deadline_s)

    def decode(self, raw: bytes) -> Message:
        """Return a request.

        Raises:
            InvalidInputError: it does not decode.
        """
        try:
            return self._decode(raw)
        except DecodeError as e:
            raise InvalidInputError("the request does not decode") from e

    @staticmethod
    def encode(response: Response) -> bytes:
        """Return the bytes of a response, which may be encoded already."""
        return response if isinstance(response, bytes) else response.SerializeToString()

    def status(self, error: Exception, call: Call | None) -> WireStatus:
        """Say what a caller is told, and log what it is not."""
        log = self._log if call is None else call.log
        if not isinstance(error, SpireHwError):
            log.error("Unexpected error", rpc=self.path, exc_info=error)
            return to_wire(SpireHwError("internal error"))
        if error.kind in _INTERNAL:
            log.error("Call failed", rpc=self.path, error=error.message, exc_info=error.__cause__)
            if not self._show_internal:
                return to_wire(SpireHwError("internal error", kind=error.kind))
        return to_wire(error)

"""The doors: TCP with mutual TLS, a unix socket for clients on this host, one for operators.

What is for operators is not even registered at the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.rpc.health import health_methods
from spire_hw.rpc.interceptors import RequestId
from spire_hw.rpc.measure import Measure
from spire_hw.rpc.server import RpcLimits, RpcServer
from spire_hw.transport.front import FrontLimits
from spire_hw.transport.mutual import MutualFront
from spire_hw.transport.unixfront import UnixFront

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.rpc.interceptors import Guard, Interceptor
    from spire_hw.rpc.service import Method
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_signer.admission import Gate
    from spire_hw_signer.config import SignerSettings
    from spire_hw_signer.tlsfiles import TlsFiles

MAX_MESSAGE_BYTES: Final = 64 * 1024
SOCKET_MODE: Final = 0o660
ADMIN_SOCKET_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o750

LIMITS: Final = RpcLimits(
    max_request_bytes=MAX_MESSAGE_BYTES,
    max_response_bytes=4 * 1024 * 1024,
    max_streams=64,
    max_header_bytes=8 * 1024,
    max_connection_age_s=180.0,
    max_connection_age_grace_s=30.0,
    max_connection_idle_s=120.0,
    keepalive_s=60.0,
    max_calls=8192,  # twice what one source of connections can hold: others have room
    max_held_bytes=32 * 1024 * 1024,
)
_LOCAL_LIMITS: Final = FrontLimits(max_connections=256, max_per_caller=64, first_byte_s=5.0)


class Doors:
    """All of them; one start, one close."""

    def __init__(
        self,
        settings: SignerSettings,
        clients: Sequence[Method],
        gate: Gate,
        tls: TlsFiles | None,
        *,
        admin: Sequence[Method] = (),
        is_healthy: Callable[[], Awaitable[bool]],
        metrics: Metrics,
        clock: Clock,
        log: Logger,
    ) -> None:
        """Describe them.

        Args:
            settings: where they are.
            clients: what clients call besides the health service.
            gate: told of callers that did not prove themselves.
            tls: of the TCP door.
            admin: what operators call besides the health service.
            is_healthy: whether the signer can do its work.
            metrics: counts calls.
            clock: what time certificates are held against.
            log: where calls are noted.
        """
        around: list[Interceptor | Guard] = [RequestId(), Measure(metrics)]
        healthy = health_methods(is_healthy, clock)
        self._front: MutualFront | None = None
        self._servers = [RpcServer([*admin, *healthy], around, log, show_internal=True)]
        self._servers[0].add_front(
            UnixFront(
                settings.admin_socket_path,
                ADMIN_SOCKET_MODE,
                directory_mode=DIRECTORY_MODE,
                limits=_LOCAL_LIMITS,
                log=log,
            )
        )
        for_clients = RpcServer([*clients, *healthy], around, log, limits=LIMITS)
        if settings.socket_path is not None:
            front = UnixFront(
                settings.socket_path,
                SOCKET_MODE,
                directory_mode=DIRECTORY_MODE,
                limits=_LOCAL_LIMITS,
                log=log,
            )
            for_clients.add_front(front)
        if tls is not None:
            self._front = MutualFront(
                settings.bind_address,
                settings.bind_port,
                identity=tls.identity,
                pins=tls.pins,
                refused=gate.stranger,
                clock=clock,
                log=log,
            )
            for_clients.add_front(self._front)
        self._servers.append(for_clients)

    @property
    def port(self) -> int:
        """Return the TCP port, the real one once started; 0 without one."""
        return 0 if self._front is None else self._front.port

    async def start(self) -> None:
        """Open all.

        Raises:
            UnavailableError: an address is taken; what was opened is closed again.
        """
        for number, server in enumerate(self._servers):
            try:
                await server.start()
            except BaseException:
                for one in self._servers[:number]:
                    await one.close(0)
                raise

    async def close(self, grace_s: float) -> None:
        """Close all, that of clients first; calls in progress have a while to finish."""
        for server in reversed(self._servers):
            await server.close(grace_s)

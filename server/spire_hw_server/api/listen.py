"""The two doors of the server: TCP with TLS for agents, a unix socket for operators.

Both serve the same services behind the same checks; what is for operators alone is not even
registered on TCP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw._pb import (
    hw_admin_pb2,
    hw_ca_pb2,
    hw_devid_pb2,
    hw_keys_pb2,
    hw_policy_pb2,
    hw_posture_pb2,
    server_agent_pb2,
    server_bundle_pb2,
    server_debug_pb2,
    server_entry_pb2,
    server_localauthority_pb2,
    server_logger_pb2,
    server_svid_pb2,
)
from spire_hw.rpc.health import health_methods
from spire_hw.rpc.server import TCP_RPC_LIMITS, RpcServer
from spire_hw.rpc.service import Method, bind
from spire_hw.transport.tcpfront import TcpFront
from spire_hw.transport.unixfront import UnixFront

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.rpc.interceptors import Guard, Interceptor
    from spire_hw.spiffeid import SpiffeId, TrustDomain
    from spire_hw.transport.tls import TlsIdentity
    from spire_hw_server.api.services import Services

SOCKET_MODE: Final = 0o770
DIRECTORY_MODE: Final = 0o750


def shared_methods(services: Services) -> list[Method]:
    """Return the methods of both doors."""
    pairs = (
        (server_agent_pb2, "Agent", services.agent),
        (server_bundle_pb2, "Bundle", services.bundle),
        (server_entry_pb2, "Entry", services.entry),
        (server_svid_pb2, "SVID", services.svid),
        (server_localauthority_pb2, "LocalAuthority", services.local_authority),
        (hw_posture_pb2, "Posture", services.posture),
    )
    return [
        method
        for module, name, service in pairs
        for method in bind(module.DESCRIPTOR.services_by_name[name], service)
    ]


def local_methods(
    services: Services, is_healthy: Callable[[], Awaitable[bool]], clock: Clock
) -> list[Method]:
    """Return the methods of the unix socket alone."""
    return [
        *bind(server_debug_pb2.DESCRIPTOR.services_by_name["Debug"], services.debug),
        *bind(server_logger_pb2.DESCRIPTOR.services_by_name["Logger"], services.logger),
        *bind(hw_admin_pb2.DESCRIPTOR.services_by_name["Tpm"], services.tpm),
        *bind(hw_ca_pb2.DESCRIPTOR.services_by_name["Ca"], services.ca),
        *bind(hw_devid_pb2.DESCRIPTOR.services_by_name["DevId"], services.devid),
        *bind(hw_posture_pb2.DESCRIPTOR.services_by_name["PostureAdmin"], services.posture_admin),
        *bind(hw_keys_pb2.DESCRIPTOR.services_by_name["Keys"], services.keys),
        *bind(hw_policy_pb2.DESCRIPTOR.services_by_name["Policy"], services.policy),
        *health_methods(is_healthy, clock),
    ]


@dataclass(frozen=True, slots=True)
class Doors:
    """Where the server listens and what it shows there.

    Attributes:
        identity: the server's SVID, asked at every connection.
        bundles: whom to believe, asked at every connection.
    """

    trust_domain: TrustDomain
    address: str
    port: int
    socket_path: Path
    admin_ids: frozenset[SpiffeId]
    identity: Callable[[], TlsIdentity]
    bundles: Callable[[], Mapping[TrustDomain, Bundle]]


class Endpoints:
    """Both doors; one start, one close."""

    def __init__(
        self,
        doors: Doors,
        services: Services,
        interceptors: Sequence[Interceptor | Guard],
        *,
        is_healthy: Callable[[], Awaitable[bool]],
        clock: Clock,
        log: Logger,
    ) -> None:
        self._doors = doors
        shared = shared_methods(services)
        self._tcp = RpcServer(shared, interceptors, log, limits=TCP_RPC_LIMITS)
        self._local = RpcServer(
            [*shared, *local_methods(services, is_healthy, clock)],
            interceptors,
            log,
            show_internal=True,
        )
        self._front = TcpFront(
            doors.address,
            doors.port,
            identity=doors.identity,
            bundles=self._trusted,
            admit=self._is_admitted,
            clock=clock,
            log=log,
        )
        self._tcp.add_front(self._front)
        self._local.add_front(
            UnixFront(doors.socket_path, SOCKET_MODE, directory_mode=DIRECTORY_MODE)
        )

    @property
    def port(self) -> int:
        """Return the TCP port, the real one once started."""
        return self._front.port

    async def start(self) -> None:
        """Open both doors.

        Raises:
            UnavailableError: an address is taken.
        """
        await self._local.start()
        try:
            await self._tcp.start()
        except BaseException:
            await self._local.close(0)
            raise

    async def close(self, grace_s: float) -> None:
        """Close both doors; calls in progress have a while to finish."""
        await self._tcp.close(grace_s)
        await self._local.close(grace_s)

    def _is_admitted(self, spiffe_id: SpiffeId) -> bool:
        return (
            spiffe_id.is_member_of(self._doors.trust_domain) or spiffe_id in self._doors.admin_ids
        )

    def _trusted(self) -> Mapping[TrustDomain, Bundle]:
        """Return the bundles of those who may be let in: ours, and those of foreign admins."""
        bundles = self._doors.bundles()
        wanted = {self._doors.trust_domain, *(i.trust_domain for i in self._doors.admin_ids)}
        return {t: bundles[t] for t in wanted if t in bundles}

"""Serves bound methods behind fronts, with whichever engine runs; see `spire_hw.rpc.engine`.

Every connection comes through a front, which has proved who is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from spire_hw.errors import NotReadyError
from spire_hw.log import Logger, get_logger
from spire_hw.rpc.endpoint import TCP_RPC_LIMITS, Endpoint, RpcLimits
from spire_hw.rpc.engine import load

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spire_hw.rpc.interceptors import Guard, Interceptor
    from spire_hw.rpc.service import Method
    from spire_hw.transport.front import Front
    from spire_hw.transport.half import Half
    from spire_hw.transport.peer import Peer

__all__ = ["TCP_RPC_LIMITS", "RpcLimits", "RpcServer"]


class Engine(Protocol):
    """Serves calls on connections that fronts have proved; iterates over who is connected."""

    @property
    def descriptors(self) -> int:
        """Return how many it opens for each connection."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Peer]: ...

    async def start(self) -> None:
        """Be ready for connections."""
        ...

    async def attach(self, outer: Half, peer: Peer) -> None:
        """Serve a connection.

        Raises:
            UnavailableError: that is not possible.
        """
        ...

    async def stop(self, grace_s: float) -> None:
        """Let calls finish for a while, then cut the rest."""
        ...


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
        log = log or get_logger("api")
        endpoints = {
            method.path: Endpoint(method, interceptors, log, show_internal=show_internal)
            for method in methods
        }
        self.engine: Engine = load("server").build(endpoints, limits or RpcLimits(), log)
        self._fronts: list[Front] = []
        self._started = False

    def add_front(self, front: Front) -> None:
        """Put a front before the server.

        Raises:
            NotReadyError: the server was started.
        """
        if self._started:
            raise NotReadyError("fronts are added before the server starts")
        self._fronts.append(front)

    async def start(self) -> None:
        """Serve.

        Raises:
            UnavailableError: a front cannot listen; everything is closed again.
        """
        if self._started:
            raise NotReadyError("this server was started before")
        self._started = True
        try:
            await self.engine.start()
            for front in self._fronts:
                await front.start(self.engine)
        except BaseException:
            await self.close(0)
            raise

    async def close(self, grace_s: float = 5.0) -> None:
        """Take no more calls, let those in progress finish for a while, cut the rest."""
        for front in self._fronts:
            await front.stop_accepting()
        await self.engine.stop(grace_s)
        for front in self._fronts:
            await front.close()

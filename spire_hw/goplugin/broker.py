"""The reverse connection: how an external plugin reaches what its host offers it.

The host listens on a socket of its own for each plugin and tells where on a stream that it opens
and keeps open for the plugin's life. Connection 1 is the only one SPIRE uses.

Source: contract of go-plugin, section 6.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from spire_hw._pb import goplugin_pb2 as pb
from spire_hw.aio.tasks import Tasks
from spire_hw.errors import DeniedError, SpireHwError
from spire_hw.rpc.interceptors import Guard
from spire_hw.rpc.server import RpcServer
from spire_hw.transport.front import FrontLimits
from spire_hw.transport.peer import UnixPeer
from spire_hw.transport.unixfront import UnixFront

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from spire_hw.log import Logger
    from spire_hw.rpc.client import Channel
    from spire_hw.rpc.service import Call, Method

HOST_SERVICES_ID: Final = 1
_START_STREAM: Final = "/plugin.GRPCBroker/StartStream"
_SOCKET_MODE: Final = 0o600
_LIMITS: Final = FrontLimits(max_connections=64, max_per_caller=64)


class Broker:
    """Serves the host's services to one plugin.

    Attributes:
        ended: done when the plugin has ended the stream; its result says why.
    """

    def __init__(
        self, methods: Sequence[Method], path: Path, *, owns: Callable[[int], bool], log: Logger
    ) -> None:
        """Describe it.

        Args:
            methods: the host's services.
            path: of the socket, in a directory nobody else can enter.
            owns: tells whether a process id is the plugin's.
            log: where trouble goes.
        """
        self._path = path
        self._server = RpcServer(methods, [_PluginOnly(owns)], log)
        self._server.add_front(UnixFront(path, _SOCKET_MODE, limits=_LIMITS, log=log))
        self._tasks = Tasks(lambda _name, _error: None)
        self._loop = asyncio.get_running_loop()
        self._announced: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[str] = self._loop.create_future()

    async def start(self) -> None:
        """Listen.

        Raises:
            UnavailableError: the socket cannot be made.
        """
        await self._server.start()

    async def announce(self, channel: Channel) -> None:
        """Open the stream and tell the plugin where we listen.

        Raises:
            SpireHwError: the plugin does not serve the stream.
        """
        self._tasks.start("plugin broker", self._keep_open(channel))
        waiting: set[asyncio.Future[Any]] = {self._announced, self.ended}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        self.check()

    def check(self) -> None:
        """Make sure that the plugin has not ended the stream.

        Raises:
            SpireHwError: it has, or never served it.
        """
        if self.ended.done():
            raise SpireHwError(f"it does not serve plugin.GRPCBroker ({self.ended.result()})")

    async def hang_up(self) -> None:
        """Close the stream."""
        await self._tasks.close()

    async def close(self, grace_s: float = 0.0) -> None:
        """Close stream and socket; the plugin's calls in progress may have a while."""
        await self.hang_up()
        await self._server.close(grace_s)

    async def _keep_open(self, channel: Channel) -> None:
        why = "it ended the stream"
        try:
            async with channel.bidi(_START_STREAM, pb.ConnInfo) as stream:
                await stream.send(
                    pb.ConnInfo(
                        service_id=HOST_SERVICES_ID, network="unix", address=str(self._path)
                    )
                )
                if not self._announced.done():
                    self._announced.set_result(None)
                # What it announces of its own is of no use to a SPIRE host.
                while await stream.receive() is not None:
                    pass
        except SpireHwError as e:
            why = e.message
        if not self.ended.done():
            self.ended.set_result(why)


class _PluginOnly(Guard):
    """Lets in nobody but the plugin's own processes."""

    def __init__(self, owns: Callable[[int], bool]) -> None:
        self._owns = owns

    @override
    async def check(self, request: Any, call: Call) -> None:
        """Refuse strangers.

        Raises:
            DeniedError: the caller is not of the plugin.
        """
        if not isinstance(call.peer, UnixPeer) or not self._owns(call.peer.process.pid):
            raise DeniedError("this socket is for the plugin it was made for")

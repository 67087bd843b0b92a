"""What a guest serves beside its plugin: go-plugin's own services and SPIRE's Init.

Source: contract of go-plugin, sections 4 to 8.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, TypeVar

from google.protobuf.message import Message
from typing_extensions import override

from spire_hw._pb import goplugin_pb2, plugin_config_pb2, plugin_init_pb2
from spire_hw.errors import EncodingError, UnavailableError
from spire_hw.goplugin.facade import hostservices, table
from spire_hw.goplugin.handshake import check_address
from spire_hw.goplugin.slot import CONFIG
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw.rpc.health import health_methods
from spire_hw.rpc.service import bind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.protobuf.empty_pb2 import Empty

    from spire_hw.goplugin.slot import Offer, Slot
    from spire_hw.log import Logger
    from spire_hw.rpc.service import Call, Method

M = TypeVar("M", bound=Message)

_HEALTH_NAME: Final = "plugin"
_HOST_SERVICES_ID: Final = 1
# Go hosts forget what they announced, and their plugins give up waiting for it, after so long.
_ANNOUNCED_S: Final = 5.0
_GONE_S: Final = 5.0


class Greeting:
    """The host's side of a guest's life.

    Attributes:
        over: set when the host has asked this process to end.
    """

    def __init__(self, offer: Offer, slot: Slot, log: Logger) -> None:
        self._offer = offer
        self._slot = slot
        self._log = log
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._channel: Channel | None = None
        self.over = asyncio.Event()

    def methods(self) -> list[Method]:
        """Return all services."""
        own = goplugin_pb2.DESCRIPTOR.services_by_name
        found = [
            *bind(own["GRPCBroker"], self),
            *bind(own["GRPCController"], self),
            *bind(own["GRPCStdio"], self),
            *bind(plugin_init_pb2.DESCRIPTOR.services_by_name["Init"], self),
            *bind(plugin_config_pb2.DESCRIPTOR.services_by_name["Config"], self._slot),
            *self._slot.methods(),
        ]
        return found + health_methods(self._is_healthy, names=("", _HEALTH_NAME))

    async def close(self) -> None:
        """Let go of the host's services."""
        if self._channel is not None:
            await self._channel.close()

    # -- plugin.GRPCBroker, GRPCController, GRPCStdio -----------------------------------------

    def start_stream(
        self, requests: AsyncIterator[goplugin_pb2.ConnInfo], call: Call
    ) -> AsyncIterator[goplugin_pb2.ConnInfo]:
        """Serve StartStream: hear where the host's services are; open until the host ends it."""
        return _Silence(lambda: self._hear(requests))

    async def _hear(self, requests: AsyncIterator[goplugin_pb2.ConnInfo]) -> None:
        try:
            await self._take_addresses(requests)
        finally:
            # The end of the stream is the last but one thing a host does. One that does not get to
            # the last is gone, even where a process between us and it lives on.
            asyncio.get_running_loop().call_later(_GONE_S, self.over.set)

    async def _take_addresses(self, requests: AsyncIterator[goplugin_pb2.ConnInfo]) -> None:
        async for info in requests:
            if info.service_id != _HOST_SERVICES_ID or self._address.done():
                continue
            try:
                address = check_address(info.network, info.address)
            except EncodingError as e:
                self._log.warning("Host services cannot be reached", error=e.message)
                continue
            if address.network != "unix":
                self._log.warning("Host services are not on a unix socket, they are not used")
                continue
            self._address.set_result(address.address)

    async def shutdown(self, request: goplugin_pb2.Empty, call: Call) -> goplugin_pb2.Empty:
        """Serve Shutdown: the process ends once this is answered."""
        self.over.set()
        return goplugin_pb2.Empty()

    def stream_stdio(self, request: Empty, call: Call) -> AsyncIterator[goplugin_pb2.StdioData]:
        """Serve StreamStdio: what is printed goes to standard error, so there is nothing to tell."""
        return _Silence(self._over)

    # -- spire.service.private.init.v1.Init ---------------------------------------------------

    async def init(
        self, request: plugin_init_pb2.InitRequest, call: Call
    ) -> plugin_init_pb2.InitResponse:
        """Serve Init: hear what the host offers, which tells which host it is, and say what we are."""
        offered = frozenset(request.host_service_names)
        sides = self._offer.sides
        side = sides[0] if len(sides) == 1 else hostservices.side_of(offered)
        self._log.debug("Host services", names=sorted(offered))
        self._slot.enter(side, hostservices.remote_services(offered, self._connect))
        served = sides if side is None else [side]
        names = [table.service_name(self._offer.kind, side) for side in served]
        return plugin_init_pb2.InitResponse(plugin_service_names=[*names, CONFIG])

    async def deinit(
        self, request: plugin_init_pb2.DeinitRequest, call: Call
    ) -> plugin_init_pb2.DeinitResponse:
        """Serve Deinit: the plugin ends, with more time than Shutdown leaves."""
        await self._slot.close()
        return plugin_init_pb2.DeinitResponse()

    async def _connect(self) -> Channel:
        """Return the connection to the host's services; what the plugin needs not is not made."""
        try:
            async with asyncio.timeout(_ANNOUNCED_S):
                address = await asyncio.shield(self._address)
        except TimeoutError:
            raise UnavailableError("the host has not told where its services are") from None
        if self._channel is None:
            self._channel = connect_unix(address)
        return self._channel

    async def _over(self) -> None:
        await self.over.wait()

    async def _is_healthy(self) -> bool:
        return not self.over.is_set()


class _Silence(AsyncIterator[M]):
    """A stream of answers that has none and ends when something else does."""

    def __init__(self, until: Callable[[], Awaitable[None]]) -> None:
        self._until = until

    @override
    async def __anext__(self) -> M:
        await self._until()
        raise StopAsyncIteration

"""Both ends of a facade with a real socket between them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from spire_hw.goplugin.facade import table
from spire_hw.goplugin.facade.link import MAX_MESSAGE_BYTES, Link
from spire_hw.plugin.info import PluginKind, Side
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw.rpc.server import RpcLimits, RpcServer
from spire_hw.rpc.service import bind
from spire_hw.transport.unixfront import UnixFront

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from google.protobuf.descriptor import FileDescriptor

    from spire_hw.rpc.service import Method

NAME = "mine"


@asynccontextmanager
async def serving(methods: Sequence[Method], directory: Path) -> AsyncIterator[Channel]:
    """Serve methods and yield a connection to them."""
    path = directory / "s.sock"
    limits = RpcLimits(max_request_bytes=MAX_MESSAGE_BYTES)
    server = RpcServer(methods, limits=limits, show_internal=True)
    server.add_front(UnixFront(path, 0o600))
    await server.start()
    try:
        async with connect_unix(path) as channel:
            yield channel
    finally:
        await server.close(0)


@asynccontextmanager
async def remote_of(
    plugin: object, kind: PluginKind, directory: Path, side: Side = Side.SERVER
) -> AsyncIterator[Any]:
    """Yield a contract whose calls go over a socket to an object of the same contract."""
    async with serving(table.methods(kind, plugin, side), directory) as channel:
        yield table.remote(Link(kind, NAME, lambda: channel), side)


@asynccontextmanager
async def remote_to(
    answers: object,
    descriptor: FileDescriptor,
    kind: PluginKind,
    directory: Path,
    side: Side = Side.SERVER,
) -> AsyncIterator[Any]:
    """Yield a contract whose calls go to a service that answers whatever it likes."""
    methods = bind(descriptor.services_by_name[kind.value], answers)
    async with serving(methods, directory) as channel:
        yield table.remote(Link(kind, NAME, lambda: channel), side)

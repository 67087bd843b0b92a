"""The Workload API socket: flags that find it, a connection that calls it."""

from __future__ import annotations

import asyncio
import functools
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from spire_hw.cli.flags import DURATION, F, flag
from spire_hw.cli.output import Printer, output_flags
from spire_hw.cli.socket import check_socket, find_socket
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw_agent.config import DEFAULT_SOCKET

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from google.protobuf.message import Message

T = TypeVar("T")
M = TypeVar("M", bound="Message")

TEMPLATE_VARIABLE: Final = "SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE"
_HEADER: Final = (("workload.spiffe.io", "true"),)
_PREFIX: Final = "/SpiffeWorkloadAPI/"
_PROGRAM: Final = "spire-hw-agent"


@dataclass(frozen=True, slots=True)
class Session:
    """An open connection to a Workload API.

    Attributes:
        timeout_s: for every call.
    """

    channel: Channel
    timeout_s: float

    async def call(self, method: str, request: Message, response_type: type[M]) -> M:
        """Call a unary method of the Workload API."""
        return await self.channel.unary(
            _PREFIX + method, request, response_type, timeout_s=self.timeout_s, metadata=_HEADER
        )

    async def first(self, method: str, request: Message, response_type: type[M]) -> M:
        """Return the first message of a stream."""
        async for message in self.stream(method, request, response_type, self.timeout_s):
            return message
        raise AssertionError("unreachable: a stream ends with a message or an error")

    def stream(
        self, method: str, request: Message, response_type: type[M], timeout_s: float | None = None
    ) -> AsyncIterator[M]:
        """Iterate over the messages of a stream."""
        return self.channel.server_stream(
            _PREFIX + method, request, response_type, timeout_s=timeout_s, metadata=_HEADER
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """What every command that talks to the agent gets."""

    socket_path: Path
    printer: Printer
    timeout: timedelta

    def run(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Connect, do the work, disconnect."""

        async def connected() -> T:
            check_socket(self.socket_path, _PROGRAM)
            async with connect_unix(self.socket_path) as channel:
                return await work(Session(channel, self.timeout.total_seconds()))

        return asyncio.run(connected())


def workload_flags(command: F) -> F:
    """Add the flags of every command that talks to the agent; it gets a `Workload` first."""

    @functools.wraps(command)
    def inner(
        *args: Any,
        socket_path: str,
        instance: str,
        timeout: timedelta,
        output: str,
        field: str,
        **kwargs: Any,
    ) -> Any:
        path = find_socket(
            socket_path, instance, os.environ, variable=TEMPLATE_VARIABLE, default=DEFAULT_SOCKET
        )
        printer = Printer(as_json=output == "json", field=field)
        return command(Workload(path, printer, timeout), *args, **kwargs)

    wrapped = output_flags(inner)
    wrapped = flag(
        "timeout", "Time to wait for an answer.", type=DURATION, default=timedelta(seconds=5)
    )(wrapped)
    wrapped = flag("instance", f"Agent instance; replaces %i in {TEMPLATE_VARIABLE}.", default="")(
        wrapped
    )
    where = f"Path of the Workload API socket [default: {DEFAULT_SOCKET}]."
    return flag("socketPath", where, default="")(wrapped)  # type: ignore[return-value]

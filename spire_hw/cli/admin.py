"""Commands that talk to a program's admin socket: a session that calls it, how to answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message_factory import GetMessageClass

from spire_hw.cli.socket import check_socket
from spire_hw.rpc.client import Channel, connect_unix

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from google.protobuf.descriptor import ServiceDescriptor
    from google.protobuf.message import Message

    from spire_hw.cli.output import Printer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Session:
    """An open connection to an admin socket.

    Attributes:
        timeout_s: for every call.
    """

    channel: Channel
    timeout_s: float

    async def call(self, service: ServiceDescriptor, method: str, request: Message) -> Any:
        """Call a unary method and return its response message.

        Raises:
            SpireHwError: what the program answered, or UNAVAILABLE.
        """
        described = service.methods_by_name[method]
        answer_type = GetMessageClass(described.output_type)
        path = f"/{service.full_name}/{method}"
        return await self.channel.unary(path, request, answer_type, timeout_s=self.timeout_s)


@dataclass(frozen=True, slots=True)
class Admin:
    """What every command that talks to an admin socket gets: where it is, how to answer.

    Attributes:
        program: whose socket it is, such as `spire-hw-server`.
    """

    socket_path: Path
    printer: Printer
    program: str
    timeout_s: float = 30.0

    def run(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Connect, do the work, disconnect."""

        async def connected() -> T:
            check_socket(self.socket_path, self.program)
            async with connect_unix(self.socket_path) as channel:
                return await work(Session(channel, self.timeout_s))

        return asyncio.run(connected())

    def call(self, service: ServiceDescriptor, method: str, request: Message) -> Any:
        """Do one call; see `Session.call`."""
        return self.run(lambda session: session.call(service, method, request))

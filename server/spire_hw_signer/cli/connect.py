"""The operators' socket of the signer: flags that find it, a session that calls it."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf.message_factory import GetMessageClass

from spire_hw.cli.flags import F, flag
from spire_hw.cli.output import Printer, output_flags
from spire_hw.cli.socket import check_socket
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw_signer.config import DEFAULT_ADMIN_SOCKET

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.protobuf.descriptor import ServiceDescriptor
    from google.protobuf.message import Message

T = TypeVar("T")
PROGRAM: Final = "spire-hw-signer"
_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Session:
    """An open connection to a signer's operators' socket."""

    channel: Channel

    async def call(self, service: ServiceDescriptor, method: str, request: Message) -> Any:
        """Call a unary method and return its response message.

        Raises:
            SpireHwError: what the signer answered, or UNAVAILABLE.
        """
        described = service.methods_by_name[method]
        answer_type = GetMessageClass(described.output_type)
        path = f"/{service.full_name}/{method}"
        return await self.channel.unary(path, request, answer_type, timeout_s=_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Admin:
    """What every command that talks to the signer gets: where it is, how to answer."""

    socket_path: Path
    printer: Printer

    def run(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Connect, do the work, disconnect."""

        async def connected() -> T:
            check_socket(self.socket_path, PROGRAM)
            async with connect_unix(self.socket_path) as channel:
                return await work(Session(channel))

        return asyncio.run(connected())

    def call(self, service: ServiceDescriptor, method: str, request: Message) -> Any:
        """Do one call; see `Session.call`."""
        return self.run(lambda session: session.call(service, method, request))


def admin_flags(command: F) -> F:
    """Add the flags of every command that talks to the signer; it gets an `Admin` first."""

    @functools.wraps(command)
    def inner(*args: Any, socket_path: str, output: str, field: str, **kwargs: Any) -> Any:
        printer = Printer(as_json=output == "json", field=field)
        path = Path(socket_path) if socket_path else DEFAULT_ADMIN_SOCKET
        return command(Admin(path, printer), *args, **kwargs)

    where = f"Path of the signer's admin socket [default: {DEFAULT_ADMIN_SOCKET}]."
    return flag("socketPath", where, default="")(output_flags(inner))  # type: ignore[return-value]

"""The admin socket: flags that find it, a session that calls it."""

from __future__ import annotations

import asyncio
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from google.protobuf.message_factory import GetMessageClass

from spire_hw._pb import types_pb2
from spire_hw.cli.flags import F, flag
from spire_hw.cli.output import Printer, output_flags
from spire_hw.cli.socket import check_socket, find_socket
from spire_hw.errors import InvalidInputError
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId
from spire_hw_server.config import DEFAULT_SOCKET

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from google.protobuf.descriptor import ServiceDescriptor
    from google.protobuf.message import Message

T = TypeVar("T")
TEMPLATE_VARIABLE: Final = "SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE"
_TIMEOUT_S: Final = 30.0
_PROGRAM: Final = "spire-hw-server"


@dataclass(frozen=True, slots=True)
class Session:
    """An open connection to a server's admin socket."""

    channel: Channel

    async def call(self, service: ServiceDescriptor, method: str, request: Message) -> Any:
        """Call a unary method and return its response message.

        Raises:
            SpireHwError: what the server answered, or UNAVAILABLE.
        """
        described = service.methods_by_name[method]
        answer_type = GetMessageClass(described.output_type)
        path = f"/{service.full_name}/{method}"
        return await self.channel.unary(path, request, answer_type, timeout_s=_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Admin:
    """What every command that talks to the server gets: where it is, how to answer."""

    socket_path: Path
    printer: Printer

    def run(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Connect, do the work, disconnect."""

        async def connected() -> T:
            check_socket(self.socket_path, _PROGRAM)
            async with connect_unix(self.socket_path) as channel:
                return await work(Session(channel))

        return asyncio.run(connected())

    def call(self, service: ServiceDescriptor, method: str, request: Message) -> Any:
        """Do one call; see `Session.call`."""
        return self.run(lambda session: session.call(service, method, request))


def admin_flags(command: F) -> F:
    """Add the flags of every command that talks to the server; it gets an `Admin` first."""

    @functools.wraps(command)
    def inner(
        *args: Any, socket_path: str, instance: str, output: str, field: str, **kwargs: Any
    ) -> Any:
        printer = Printer(as_json=output == "json", field=field)
        path = find_socket(
            socket_path, instance, os.environ, variable=TEMPLATE_VARIABLE, default=DEFAULT_SOCKET
        )
        return command(Admin(path, printer), *args, **kwargs)

    wrapped = output_flags(inner)
    wrapped = flag("instance", f"Server instance; replaces %i in {TEMPLATE_VARIABLE}.", default="")(
        wrapped
    )
    where = f"Path of the server's admin socket [default: {DEFAULT_SOCKET}]."
    return flag("socketPath", where, default="")(wrapped)  # type: ignore[return-value]


def id_message(text: str, what: str = "SPIFFE ID") -> types_pb2.SPIFFEID:
    """Return a SPIFFE ID as the API has it.

    Raises:
        InvalidInputError: it does not parse.
    """
    if not text:
        raise click.UsageError(f"a {what} is required")
    found = SpiffeId.parse(text)
    return types_pb2.SPIFFEID(trust_domain=found.trust_domain.name, path=found.path)


def id_text(message: types_pb2.SPIFFEID) -> str:
    """Return a SPIFFE ID of the API as text."""
    return f"spiffe://{message.trust_domain}{message.path}"


def selector_messages(texts: tuple[str, ...]) -> list[types_pb2.Selector]:
    """Return selectors as the API has them.

    Raises:
        InvalidInputError: one is not `type:value`.
    """
    found = []
    for text in texts:
        try:
            selector = Selector.parse(text)
        except InvalidInputError as e:
            raise InvalidInputError(f'selector "{text}": {e.message}') from e
        found.append(types_pb2.Selector(type=selector.type, value=selector.value))
    return found


MATCH_NAMES: Final = ("exact", "any", "superset", "subset")


def selector_match(texts: tuple[str, ...], behavior: str) -> types_pb2.SelectorMatch:
    """Return a filter by selectors."""
    return types_pb2.SelectorMatch(
        selectors=selector_messages(texts), match=f"MATCH_{behavior.upper()}"
    )

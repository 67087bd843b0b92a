"""The admin socket: flags that find it, a session that calls it."""

from __future__ import annotations

import functools
import os
from typing import Any, Final

import click

from spire_hw._pb import types_pb2
from spire_hw.cli.admin import Admin
from spire_hw.cli.flags import F, flag
from spire_hw.cli.output import Printer, output_flags
from spire_hw.cli.socket import find_socket
from spire_hw.errors import InvalidInputError
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId
from spire_hw_server.config import DEFAULT_SOCKET

TEMPLATE_VARIABLE: Final = "SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE"
_PROGRAM: Final = "spire-hw-server"


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
        return command(Admin(path, printer, _PROGRAM), *args, **kwargs)

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

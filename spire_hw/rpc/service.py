"""The seam between service code and the RPC engine.

Service code is a class with one async method per RPC, named in snake case after it, taking a
decoded message (or an async iterator of them) and a `Call`. `bind` pairs such an object with a
protobuf service descriptor; an engine (`spire_hw.rpc.server`) serves the result. Nothing in
service code knows which engine runs.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from spire_hw.errors import SpireHwError

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor

    from spire_hw.log import Logger
    from spire_hw.transport.peer import Peer


# What a handler answers: a message, or one that is encoded already (hot paths).
Response = Message | bytes
Reply = Callable[[Response], Awaitable[None]]


async def no_reply(_response: Response) -> None:
    """Refuse: the call has no stream of responses, or is over."""
    raise SpireHwError("this call takes no further response")


@dataclass(slots=True)
class Call:
    """What a handler may know about one call.

    Attributes:
        method: full path, `/spire.api.server.agent.v1.Agent/AttestAgent`.
        peer: who is at the other end, proved by the transport.
        metadata: request headers in order, names in lower case, binary ones left out.
        log: logger bound to request_id, method and caller.
        deadline_s: seconds left when the call arrived, None without a deadline.
        attributes: what interceptors found out, by key (caller class, agent, entries).
        reply: sends one of a stream of responses before the handler yields its next: for a
            handler that talks with its caller in the middle of its work.
    """

    method: str
    peer: Peer
    metadata: tuple[tuple[str, str], ...]
    log: Logger
    deadline_s: float | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    reply: Reply = field(default=no_reply, repr=False)

    def header(self, name: str) -> list[str]:
        """Return all values of one header."""
        return [v for k, v in self.metadata if k == name]


Handler = Callable[[Any, Call], Any]


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: its path, shapes and handler.

    A unary response handler returns an awaitable message, a streaming one an async iterator; a
    streaming request arrives as an async iterator.
    """

    path: str
    request_type: type[Message]
    response_type: type[Message]
    client_streaming: bool
    server_streaming: bool
    handler: Handler


# Runs around every call: await `next` to go on, raise SpireHwError to refuse.
UnaryNext = Callable[[Any, Call], Awaitable[Response]]
StreamNext = Callable[[Any, Call], AsyncIterator[Response]]


def bind(descriptor: ServiceDescriptor, implementation: object) -> list[Method]:
    """Pair a service description with the object that implements it.

    Raises:
        TypeError: the object lacks a method of the service.
    """
    methods = []
    for rpc in descriptor.methods:
        name = snake_case(rpc.name)
        handler = getattr(implementation, name, None)
        if handler is None:
            raise TypeError(
                f"{type(implementation).__name__} lacks {name} of {descriptor.full_name}"
            )
        methods.append(
            Method(
                path=f"/{descriptor.full_name}/{rpc.name}",
                request_type=GetMessageClass(rpc.input_type),
                response_type=GetMessageClass(rpc.output_type),
                client_streaming=rpc.client_streaming,
                server_streaming=rpc.server_streaming,
                handler=handler,
            )
        )
    return methods


def snake_case(name: str) -> str:
    """Return `MintX509SVID` as `mint_x509_svid`, `NewJWTSVID` as `new_jwt_svid`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"(?<=[A-Z0-9])(?=SVID|CA$)", "_", spaced).lower()

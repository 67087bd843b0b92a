"""What the headers of a call say (pure).

Source: RFC 9113 section 8.3.1; the gRPC over HTTP/2 protocol description.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.rpc.h2 import wire

if TYPE_CHECKING:
    from spire_hw.rpc.h2.hpack import Field

_PSEUDO: Final = frozenset({":method", ":scheme", ":path", ":authority"})
_NOT_METADATA: Final = frozenset({"content-type", "te", "host"})
_FORBIDDEN: Final = frozenset(
    {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"}
)


@dataclass(frozen=True, slots=True)
class Request:
    """What the headers of a call say."""

    path: str
    metadata: tuple[Field, ...]
    timeout_s: float | None


class HttpError(Exception):
    """Not a gRPC call; answered with a status of HTTP."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


def parse(fields: tuple[Field, ...]) -> Request:
    """Read the headers of a call.

    Raises:
        ValueError: against RFC 9113 section 8.3.1.
        HttpError: not gRPC.
        SpireHwError: what the call is answered.
    """
    plain = next((n for n, (name, _) in enumerate(fields) if name[0] != ":"), len(fields))
    pseudo, rest = dict(fields[:plain]), fields[plain:]
    said = dict(reversed(rest))
    path = pseudo.get(":path", "")
    if (
        len(pseudo) != plain
        or not path
        or not {":method", ":scheme"} <= pseudo.keys() <= _PSEUDO
        or any(name[0] == ":" or name in _FORBIDDEN for name, _ in rest)
    ):
        raise ValueError("not a request of HTTP/2")
    if pseudo[":method"] != "POST":
        raise HttpError("405")
    if not wire.is_content_type(said.get("content-type", "")):
        raise HttpError("415")
    if said.get("grpc-encoding", "identity") != "identity":
        raise SpireHwError("compressed messages are not taken", kind=ErrorKind.UNIMPLEMENTED)
    timeout = said.get("grpc-timeout")
    metadata = tuple(field for field in rest if _is_metadata(field[0]))
    return Request(path, metadata, None if timeout is None else wire.parse_timeout(timeout))


def _is_metadata(name: str) -> bool:
    return not (name in _NOT_METADATA or name.startswith("grpc-") or name.endswith("-bin"))

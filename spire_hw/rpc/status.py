"""Errors on the wire: `ErrorKind` to and from gRPC status, refusal details included.

The one place where the error tree meets gRPC; what is logged and what a caller may read is decided
by the server adapter.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from google.protobuf.message import DecodeError
from google.rpc import status_pb2  # type: ignore[import-untyped]

from spire_hw._pb import types_pb2
from spire_hw.errors import (
    AlreadyExistsError,
    DeniedError,
    DeniedReason,
    ErrorKind,
    InvalidInputError,
    LimitError,
    NotFoundError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)

DETAILS_KEY: Final = "grpc-status-details-bin"
_MAX_MESSAGE: Final = 2048
# Codes without a kind of their own: OUT_OF_RANGE, DATA_LOSS.
_NEAREST: Final = {
    11: ErrorKind.INVALID_ARGUMENT,
    15: ErrorKind.INTERNAL,
}
_CLASSES: Final[dict[ErrorKind, type[SpireHwError]]] = {
    ErrorKind.INVALID_ARGUMENT: InvalidInputError,
    ErrorKind.NOT_FOUND: NotFoundError,
    ErrorKind.ALREADY_EXISTS: AlreadyExistsError,
    ErrorKind.FAILED_PRECONDITION: NotReadyError,
    ErrorKind.RESOURCE_EXHAUSTED: LimitError,
    ErrorKind.UNAVAILABLE: UnavailableError,
}


class WireStatus(NamedTuple):
    """A status: code, message and trailing metadata."""

    code: int
    message: str
    trailing: tuple[tuple[str, bytes], ...]


def to_wire(error: SpireHwError) -> WireStatus:
    """Return the status of an error, with `PermissionDeniedDetails` when it carries a reason."""
    code = error.kind.value
    message = clip(error.message)
    if not isinstance(error, DeniedError) or error.reason is None:
        return WireStatus(code, message, ())
    status = status_pb2.Status(code=code, message=message)
    status.details.add().Pack(
        types_pb2.PermissionDeniedDetails(reason=error.reason.value)  # type: ignore[arg-type]
    )
    return WireStatus(code, message, ((DETAILS_KEY, status.SerializeToString()),))


def clip(message: str) -> str:
    """Return a message short enough for a header."""
    return message if len(message) <= _MAX_MESSAGE else message[: _MAX_MESSAGE - 3] + "..."


def from_code(code: int, message: str, details: bytes | None = None) -> SpireHwError:
    """Return the error for a status number, a message and `grpc-status-details-bin`."""
    try:
        kind = ErrorKind(code)
    except ValueError:
        kind = _NEAREST.get(code, ErrorKind.UNKNOWN)
    message = message or kind.name.lower().replace("_", " ")
    if kind is ErrorKind.PERMISSION_DENIED:
        return DeniedError(message, _reason(details))
    found = _CLASSES.get(kind)
    return SpireHwError(message, kind=kind) if found is None else found(message)


def _reason(details: bytes | None) -> DeniedReason | None:
    if details is None:
        return None
    wanted = types_pb2.PermissionDeniedDetails()
    try:
        for detail in status_pb2.Status.FromString(details).details:
            if detail.Is(wanted.DESCRIPTOR):
                detail.Unpack(wanted)
                return DeniedReason(wanted.reason)
    except (DecodeError, ValueError):
        return None  # a detail we cannot read is no detail
    return None


def item_status(error: SpireHwError | None) -> types_pb2.Status:
    """Return the status of one item of a batch, OK for None."""
    if error is None:
        return types_pb2.Status(code=0, message="OK")
    return types_pb2.Status(code=error.kind.value, message=clip(error.message))


def item_error(status: types_pb2.Status) -> SpireHwError | None:
    """Return the error of a batch item, None for OK; an absent status reads as OK."""
    return None if status.code == 0 else from_code(status.code, status.message)

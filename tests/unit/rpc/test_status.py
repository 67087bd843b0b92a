from __future__ import annotations

import pytest
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
from spire_hw.rpc.status import DETAILS_KEY, from_code, item_error, item_status, to_wire


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_a_kind_is_its_status_number(kind: ErrorKind) -> None:
    status = to_wire(SpireHwError("why", kind=kind))
    assert status.code == kind.value
    assert (status.message, status.trailing) == ("why", ())
    assert from_code(kind.value, "why").kind is kind


@pytest.mark.parametrize(
    "error",
    [
        InvalidInputError,
        NotFoundError,
        AlreadyExistsError,
        NotReadyError,
        LimitError,
        UnavailableError,
        DeniedError,
    ],
)
def test_a_class_comes_back_as_itself(error: type[SpireHwError]) -> None:
    status = to_wire(error("why"))
    back = from_code(status.code, status.message)
    assert type(back) is error
    assert back.message == "why"


@pytest.mark.parametrize("reason", list(DeniedReason))
def test_a_reason_travels_as_upstream_reads_it(reason: DeniedReason) -> None:
    status = to_wire(DeniedError("no", reason))
    ((key, raw),) = status.trailing
    assert key == DETAILS_KEY == "grpc-status-details-bin"
    wire = status_pb2.Status.FromString(raw)
    assert (wire.code, wire.message) == (7, "no")
    (detail,) = wire.details
    assert detail.type_url == "type.googleapis.com/spire.api.types.PermissionDeniedDetails"
    back = from_code(7, "no", raw)
    assert isinstance(back, DeniedError)
    assert back.reason is reason


@pytest.mark.parametrize(
    "details",
    [None, b"", b"\xff\xff", status_pb2.Status(code=7).SerializeToString()],
)
def test_details_that_say_nothing_are_none(details: bytes | None) -> None:
    back = from_code(7, "no", details)
    assert isinstance(back, DeniedError)
    assert back.reason is None


def test_an_unknown_reason_is_none() -> None:
    status = status_pb2.Status(code=7)
    status.details.add().Pack(types_pb2.PermissionDeniedDetails())
    back = from_code(7, "no", status.SerializeToString())
    assert isinstance(back, DeniedError)
    assert back.reason is None


@pytest.mark.parametrize("code", range(1, 17))
def test_every_code_has_an_error(code: int) -> None:
    assert from_code(code, "").message


def test_a_long_message_is_cut() -> None:
    assert len(to_wire(SpireHwError("x" * 10_000)).message) == 2048


def test_items_carry_their_status() -> None:
    assert item_status(None) == types_pb2.Status(code=0, message="OK")
    assert item_status(NotFoundError("gone")) == types_pb2.Status(code=5, message="gone")
    assert item_error(types_pb2.Status()) is None
    back = item_error(types_pb2.Status(code=5, message="gone"))
    assert isinstance(back, NotFoundError)

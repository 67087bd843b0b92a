"""Operators' calls: only root and the signer's own user are listened to."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from spire_hw._pb import hw_signer_admin_pb2 as pb
from spire_hw.errors import DeniedError, InvalidInputError
from spire_hw.log import get_logger
from spire_hw.rpc.service import Call
from spire_hw.transport.peer import UnixPeer
from spire_hw_signer.admin import SignerAdmin, admin_methods


@dataclass
class Caller:
    """A process at the other end of a socket."""

    uid: int
    gid: int = 0
    pid: int = 4711


def service() -> SignerAdmin:
    """Return one that would fail at anything it does: a stranger gets nowhere."""
    nothing = object()
    return SignerAdmin(
        "signer-1",
        nothing,  # type: ignore[arg-type]
        nothing,  # type: ignore[arg-type]
        nothing,  # type: ignore[arg-type]
        revocations=nothing,  # type: ignore[arg-type]
        actions=nothing,  # type: ignore[arg-type]
        attesting=nothing,  # type: ignore[arg-type]
        device_log=None,
    )


def call(peer: object) -> Call:
    return Call("/m", peer, (), get_logger("test"), 5.0)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_strangers_are_denied_before_anything_is_done() -> None:
    methods = admin_methods(service())
    assert methods
    stranger = UnixPeer(Caller(os.geteuid() + 12345))  # type: ignore[arg-type]
    for method in methods:
        for peer in (stranger, object(), None):
            with pytest.raises(DeniedError, match="only root and the signer's own user"):
                await method.handler(method.request_type(), call(peer))


@pytest.mark.asyncio
async def test_root_and_the_signers_user_get_further() -> None:
    for uid in {0, os.geteuid()}:
        peer = UnixPeer(Caller(uid))  # type: ignore[arg-type]
        with pytest.raises(InvalidInputError, match="an order or an action is required"):
            await service().carry_out(pb.CarryOutRequest(), call(peer))

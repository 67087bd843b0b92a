"""Ten thousand refused exchanges leave no more behind than the first ones did."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import pytest

from spire_hw.errors import LimitError, SpireHwError
from spire_hw_plugins.nodeattestor.tpm.wire import (
    Response,
    decode_challenge,
    encode_response,
)
from spire_hw_sim.firmware import Firmware
from spire_hw_sim.softtpm import SoftTpm, make_ak, make_ek
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_sim.tpmnode import TpmNode

pytestmark = pytest.mark.asyncio
Attempt = Callable[[], Awaitable[object]]
ROUNDS = 1250
MOST_BYTES = 10 << 20


def _bomb() -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(8)) + packer.flush()


def attempts(lab: Lab, node: TpmNode) -> list[Attempt]:
    """Return one attempt per stage at which an exchange can end."""
    payload, bomb = node.payload(), _bomb()
    honest: list[Response] = []
    loaded = lab.node(SoftTpm(ek=node.tpm.ek, ak=make_ak(attributes=0x00040472))).payload()

    async def answer(message: bytes, change: Callable[[Response], Response]) -> bytes:
        # Statements are for one exchange alone: only the secret has to be fresh.
        challenge = decode_challenge(message)
        honest[:] = honest or [node.respond(challenge)]
        secret = node.tpm.activate(challenge.credential, challenge.secret)
        return encode_response(change(replace(honest[0], secret=secret)))

    async def wrong_secret(message: bytes) -> bytes:
        return await answer(message, lambda r: replace(r, secret=bytes(32)))

    async def old_quote(message: bytes) -> bytes:
        return await answer(message, lambda r: replace(r, log=bomb))

    async def log_bomb(message: bytes) -> bytes:
        return encode_response(replace(node.respond(decode_challenge(message)), log=bomb))

    async def silent(_: bytes) -> bytes:
        raise LimitError("gone")

    return [
        lambda: lab.attest(node, payload=b'{"a":' * 10_000),
        lambda: lab.attest(node, payload=payload[:-1]),
        lambda: lab.attest(node, payload=payload.replace(b"ek_chain", b"ek_chains")),
        lambda: lab.attest(node, payload=loaded),
        lambda: lab.attest(node, answer=silent),
        lambda: lab.attest(node, answer=wrong_secret),
        lambda: lab.attest(node, answer=old_quote),
        lambda: lab.attest(node, answer=log_bomb),
    ]


@pytest.mark.slow
async def test_memory_is_flat(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, "boot_log = true")
    boot = Firmware().boot()
    node = lab.node(SoftTpm(ek=make_ek("L-2"), pcrs=boot.pcrs("sha256")))
    node.boot_log = boot.log()
    tries = attempts(lab, node)

    async def repeat(count: int) -> None:
        for _ in range(count):
            for attempt in tries:
                with pytest.raises(SpireHwError):
                    await attempt()
            lab.challenges.clear()
            lab.admitted.clear()

    await repeat(50)
    gc.collect()
    before = psutil.Process().memory_info().rss
    await repeat(ROUNDS)
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    assert grown < MOST_BYTES, f"{grown} bytes more after {ROUNDS * len(tries)} refusals"
    assert lab.server.open_exchanges == 0
    await lab.attest(node)

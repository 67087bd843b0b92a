"""Thousands of rotations in a row: on the token is what policy says, and nothing else."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
import pytest

from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw_sim.clock import SimClock
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.slow,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
ROTATIONS: Final = int(os.environ.get("SPIRE_HW_ROTATIONS", "400"))
SLOTS: Final = ("x509-CA-A", "JWT-Signer-A", "x509-CA-B", "JWT-Signer-B")
STEP: Final = timedelta(hours=3)
KEPT_H: Final = 26
SWEEPS: Final = 6
SWEEP_STEP: Final = timedelta(minutes=35)
OWNER: Final = Owner("example.org", "server-1")


@contextmanager
def fast_folder(otherwise: Path) -> Iterator[Path]:
    """Give a folder in memory where there is one: the token's disk is not what is tested."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own in it
    if not os.access(memory, os.W_OK):
        yield otherwise
        return
    folder = Path(tempfile.mkdtemp(prefix="rotations", dir=memory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def on_token(rig: TokenRig) -> tuple[dict[str, int], int]:
    """Return how many halves each label has, and the number of other objects."""
    shown = rig.meddle(
        "from collections import Counter\n"
        "seen = Counter(o[Attribute.LABEL] for o in find(CLASS=PRIVATE) + find(CLASS=PUBLIC))\n"
        "print(len(find()) - sum(seen.values()))\n"
        "[print(n, label) for label, n in seen.items()]"
    )
    others, *lines = shown.splitlines()
    halves = (line.split(" ", 1) for line in lines)
    return {label: int(count) for count, label in halves}, int(others)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kept_h", [0, KEPT_H])
@pytest.mark.asyncio
async def test_rotations_leave_what_policy_says(tmp_path: Path, kept_h: int) -> None:
    rotations = ROTATIONS if kept_h == 0 else ROTATIONS // 4
    options = SignOptions(HashAlgorithm.SHA256)
    with fast_folder(tmp_path) as folder:
        clock = SimClock()
        async with TokenRig(folder, clock) as rig:
            manager = await rig.start(retain_replaced=f"{kept_h}h")
            for number in range(rotations):
                key_id = SLOTS[number % len(SLOTS)]
                made = await manager.generate_key(key_id, KeyType.EC_P256)
                signed = await manager.sign_data(key_id, bytes(32), options)
                assert signed.fingerprint == made.fingerprint
                if kept_h:
                    await clock.advance(STEP)
            for _ in range(SWEEPS):
                # Housekeeping comes every half hour and needs a moment of real time for the token.
                await clock.advance(SWEEP_STEP)
                await asyncio.sleep(0.5)
            keyring = manager._keyring
            assert keyring is not None
            await keyring.disposal.wait_empty()
            files = len(psutil.Process(manager.worker_pids[0]).open_files())
            await manager.close()
            halves, others = on_token(rig)
            halves.pop(OWNER.test_label, None)
            assert halves == dict.fromkeys(
                (*current_labels(rotations), *retained_labels(rotations, kept_h)), 2
            )
            assert others == 1  # the manifest
            assert files < 50
            # A restart finds the same and has nothing to tidy up.
            again = await rig.start(retain_replaced=f"{kept_h}h")
            assert {key.key_id for key in await again.get_public_keys()} == set(SLOTS)
            assert again._keyring is not None
            assert again._keyring.disposal.waiting == 0


def current_labels(rotations: int) -> list[str]:
    """Return the labels of the newest generations."""
    return [
        OWNER.key_label(SLOTS[number % len(SLOTS)], number // len(SLOTS) + 1)
        for number in range(rotations - len(SLOTS), rotations)
    ]


def retained_labels(rotations: int, kept_h: int) -> list[str]:
    """Return the labels of replaced generations that are not older than they may get.

    Rotation n replaces what rotation n - 4 made, after n steps of time.
    """
    now = rotations * STEP + SWEEPS * SWEEP_STEP
    return [
        OWNER.key_label(SLOTS[number % len(SLOTS)], number // len(SLOTS))
        for number in range(len(SLOTS), rotations)
        if now - number * STEP < timedelta(hours=kept_h)
    ]

"""Counts what is loaded in a TPM."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw_sim.swtpm import Swtpm

_TRANSIENT, _LOADED_SESSIONS, _SAVED_SESSIONS = 0x80000000, 0x02000000, 0x03000000


def loaded(tpm: Swtpm) -> list[int]:
    """Return handles of all transient objects and sessions."""
    ranges = (_TRANSIENT, _LOADED_SESSIONS, _SAVED_SESSIONS)
    return [handle for first in ranges for handle in tpm.commands.handles(first)]


@contextmanager
def nothing_left_behind(tpm: Swtpm) -> Iterator[None]:
    """Check that a block leaves no object and no session in the TPM."""
    before = loaded(tpm)
    yield
    assert loaded(tpm) == before

"""Boot phases: what a running system adds to PCR 11 after its unified kernel image.

Source: systemd-pcrphase.service(8).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

# In the order they come; a system leaves out those it has no use for.
PHASES: Final = ("enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final")


# A machine shows the same two values at every heartbeat.
@lru_cache(maxsize=4096)
def passed(before: bytes, after: bytes, bank: str) -> tuple[str, ...] | None:
    """Return the phases that lead from one value of PCR 11 to another.

    Args:
        before: value earlier.
        after: value now.
        bank: hash of both, such as `sha256`.

    Returns:
        Phases in their order, empty when nothing changed; None when phases do not explain it.
    """
    new = getattr(hashlib, bank)
    values: dict[bytes, tuple[str, ...]] = {before: ()}
    for phase in PHASES:
        digest = new(phase.encode()).digest()
        for value, path in list(values.items()):
            values[new(value + digest).digest()] = (*path, phase)
    return values.get(after)

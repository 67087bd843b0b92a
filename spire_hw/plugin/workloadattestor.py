"""WorkloadAttestor: tells what a local process is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from spire_hw.transport.peer import CallerProcess


class WorkloadAttestor(Protocol):
    """What a WorkloadAttestor plugin implements."""

    async def attest(self, process: CallerProcess) -> list[str]:
        """Return selector values without the type; the host puts the plugin's name in front.

        Raises:
            SpireHwError: the process vanished or cannot be read.
        """
        ...

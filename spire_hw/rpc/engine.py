"""Which engine speaks gRPC: ours, or grpcio.

Ours is the one that runs. `SPIRE_HW_RPC_ENGINE=grpcio` in the environment puts grpcio in its place,
for when a fault is suspected in ours; everything behind the seam is the same.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError

if TYPE_CHECKING:
    from types import ModuleType

VARIABLE: Final = "SPIRE_HW_RPC_ENGINE"
H2: Final = "h2"
GRPCIO: Final = "grpcio"


def load(end: str) -> ModuleType:
    """Return the engine's module for one end, `server` or `client`; the other's is never loaded.

    Raises:
        InvalidInputError: the environment names an engine we do not have.
    """
    name = os.environ.get(VARIABLE) or H2
    if name not in {H2, GRPCIO}:
        raise InvalidInputError(f"{VARIABLE} is {name!r}; the engines are {H2} and {GRPCIO}")
    return importlib.import_module(f"spire_hw.rpc.{name}.{end}")

"""The operators' socket of the signer: flags that find it, a session that calls it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

from spire_hw.cli.admin import Admin
from spire_hw.cli.flags import F, flag
from spire_hw.cli.output import Printer, output_flags
from spire_hw_signer.config import DEFAULT_ADMIN_SOCKET

PROGRAM: Final = "spire-hw-signer"
_TIMEOUT_S: Final = 60.0


def admin_flags(command: F) -> F:
    """Add the flags of every command that talks to the signer; it gets an `Admin` first."""

    @functools.wraps(command)
    def inner(*args: Any, socket_path: str, output: str, field: str, **kwargs: Any) -> Any:
        printer = Printer(as_json=output == "json", field=field)
        path = Path(socket_path) if socket_path else DEFAULT_ADMIN_SOCKET
        return command(Admin(path, printer, PROGRAM, _TIMEOUT_S), *args, **kwargs)

    where = f"Path of the signer's admin socket [default: {DEFAULT_ADMIN_SOCKET}]."
    return flag("socketPath", where, default="")(output_flags(inner))  # type: ignore[return-value]

"""The kernel's id of the boot that is running."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def read_boot_id(file: Path = _FILE) -> str | None:
    """Return it, None where the kernel tells none.

    Source: random(4).
    """
    try:
        text = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if is_boot_id(text) else None


def is_boot_id(text: str) -> bool:
    """Tell whether a text has the form of one: a UUID in lower case."""
    return _UUID.fullmatch(text) is not None

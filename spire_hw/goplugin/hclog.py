"""Log lines as a go-plugin host reads them on a plugin's standard error.

A host parses a line only when three keys are there in exactly its form, and Go's dies of one that
holds another type than text: nothing but this module writes them.

Source: contract of go-plugin, section 10.
"""

from __future__ import annotations

import io
import json
import os
from datetime import UTC, datetime
from typing import Any, Final

from typing_extensions import override

# A host splits longer lines and loses their level.
MAX_LINE_CHARS: Final = 60_000

_LEVELS: Final = {
    "trace": "trace",
    "debug": "debug",
    "info": "info",
    "warning": "warn",
    "error": "error",
    "fatal": "error",
    "panic": "error",
}


def render(record: dict[str, Any]) -> str:
    """Return a line for one record of our JSON log.

    Args:
        record: `time`, `level`, `msg` and fields, as `spire_hw.logtext.render_json` has them.
    """
    fields = {_unreserved(k): v for k, v in record.items() if k not in {"time", "level", "msg"}}
    head = {
        "@level": _LEVELS.get(str(record.get("level")), "info"),
        "@message": str(record.get("msg", "")),
        "@timestamp": _timestamp(str(record.get("time", ""))),
        "@module": str(fields.pop("subsystem_name", "plugin")),
    }
    line = json.dumps(head | fields)
    if len(line) > MAX_LINE_CHARS:
        line = json.dumps(head | {"@message": head["@message"][:1024], "truncated": True})
    return line


def _unreserved(key: str) -> str:
    return f"fields.{key}" if key.startswith("@") else key


def _timestamp(text: str) -> str:
    """Return a time with exactly six digits of fraction; hosts take no other."""
    try:
        moment = datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        moment = datetime.fromtimestamp(0, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class HclogStream(io.TextIOBase):
    """Takes the lines of our JSON log and writes them to a descriptor in the host's form."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    @override
    def write(self, text: str, /) -> int:
        """Write whole lines; what is no JSON object goes out as a message."""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                record = {"msg": line}
            if not isinstance(record, dict):
                record = {"msg": line}
            data = render(record).encode() + b"\n"
            while data:
                data = data[os.write(self._descriptor, data) :]
        return len(text)

    @override
    def writable(self) -> bool:
        """Tell that it can be written to."""
        return True

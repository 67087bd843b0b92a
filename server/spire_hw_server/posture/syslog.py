"""State changes as syslog messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.syslog import CRITICAL, NOTICE, WARNING, Message, send

if TYPE_CHECKING:
    from spire_hw.syslog import SyslogSettings

_APP: Final = "spire-hw-server"
_KIND: Final = "node-state"
# By state; all else is a notice.
_SEVERITIES: Final = {
    "banned": CRITICAL,
    "quarantined": WARNING,
    "stale": WARNING,
    "drifted": WARNING,
}


class Syslog:
    """One receiver."""

    name = "syslog"

    def __init__(self, settings: SyslogSettings) -> None:
        self._settings = settings

    async def start(self) -> None:
        """Do nothing: the receiver may come later."""

    async def send(self, event: dict[str, object]) -> None:
        """Send one event.

        Raises:
            UnavailableError: it may be tried again.
        """
        await send(self._settings, message_of(event))


def message_of(event: dict[str, object]) -> Message:
    """Return the message of an event as `hooks` makes it."""
    severity = _SEVERITIES.get(str(event["state"]), NOTICE)
    words = " ".join(f"{key}={_value(value)}" for key, value in event.items() if key != "time")
    return Message(_APP, _KIND, severity, str(event["time"]), words)


def _value(value: object) -> str:
    text = ",".join(value) if isinstance(value, (list, tuple)) else str(value)
    if text and all(c.isprintable() and c not in ' "=\\' for c in text):
        return text
    safe = "".join(c if c.isprintable() else "?" for c in text)
    return '"' + safe.replace("\\", "\\\\").replace('"', '\\"') + '"'

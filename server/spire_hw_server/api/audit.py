"""The audit log: one line for each call, one for each item of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import SpireHwError
from spire_hw.transport.peer import UnixPeer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from spire_hw.rpc.service import Call, Response, StreamNext, UnaryNext

_NOTES: Final = "audit"
_ITEMS: Final = "audit_items"


class Audit:
    """Writes `API accessed` lines when the operator wants them; an interceptor, too."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled

    def note(self, call: Call, **fields: object) -> None:
        """Remember fields for the line of a call."""
        if self.enabled:
            call.attributes.setdefault(_NOTES, {}).update(fields)

    def item(self, call: Call, error: SpireHwError | None, **fields: object) -> None:
        """Write the line of one item of a batch; the call as a whole then has none when it is OK."""
        if self.enabled:
            call.attributes[_ITEMS] = True
            self._write(call, error, fields)

    async def unary(self, request: Any, call: Call, proceed: UnaryNext) -> Response:
        """Let a unary call run and write its line."""
        try:
            response = await proceed(request, call)
        except SpireHwError as e:
            self._write(call, e, {})
            raise
        if not call.attributes.get(_ITEMS):
            self._write(call, None, {})
        return response

    async def stream(
        self, request: Any, call: Call, proceed: StreamNext
    ) -> AsyncIterator[Response]:
        """Let a streaming call run and write its line at the end."""
        try:
            async for response in proceed(request, call):
                yield response
        except SpireHwError as e:
            self._write(call, e, {})
            raise
        self._write(call, None, {})

    def _write(self, call: Call, error: SpireHwError | None, fields: dict[str, Any]) -> None:
        if not self.enabled:
            return
        line: dict[str, Any] = {"type": "audit", "status": "success" if error is None else "error"}
        if error is not None:
            line["status_code"] = error.kind.name
            line["status_message"] = error.message
        if isinstance(call.peer, UnixPeer):
            line["caller_uid"] = call.peer.process.uid
            line["caller_gid"] = call.peer.process.gid
        call.log.info("API accessed", **line, **call.attributes.get(_NOTES, {}), **fields)

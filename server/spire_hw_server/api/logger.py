"""The log level, read and changed while the server runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw._pb import server_logger_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.errors import InvalidInputError
from spire_hw.log import Level, Output

if TYPE_CHECKING:
    from spire_hw.rpc.service import Call

_TO_PB: Final = {
    Level.PANIC: types_pb2.LogLevel.PANIC,
    Level.FATAL: types_pb2.LogLevel.FATAL,
    Level.ERROR: types_pb2.LogLevel.ERROR,
    Level.WARN: types_pb2.LogLevel.WARN,
    Level.INFO: types_pb2.LogLevel.INFO,
    Level.DEBUG: types_pb2.LogLevel.DEBUG,
    Level.TRACE: types_pb2.LogLevel.TRACE,
}
_FROM_PB: Final = {number: level for level, number in _TO_PB.items()}


class LoggerService:
    """`spire.api.server.logger.v1.Logger`."""

    def __init__(self, output: Output) -> None:
        self._output = output

    async def get_logger(self, request: pb.GetLoggerRequest, call: Call) -> types_pb2.Logger:
        """Return the level and the configured one."""
        del request, call
        return self._state()

    async def set_log_level(self, request: pb.SetLogLevelRequest, call: Call) -> types_pb2.Logger:
        """Change the level until the next start."""
        level = _FROM_PB.get(request.new_level)
        if level is None:
            raise InvalidInputError("invalid request: NewLevel must be a known level")
        self._output.level = level
        call.log.info("log level changed", new_log_level=level.label)
        return self._state()

    async def reset_log_level(
        self, request: pb.ResetLogLevelRequest, call: Call
    ) -> types_pb2.Logger:
        """Return to the configured level."""
        del request
        self._output.reset_level()
        call.log.info("log level reset", new_log_level=self._output.level.label)
        return self._state()

    def _state(self) -> types_pb2.Logger:
        return types_pb2.Logger(
            current_level=_TO_PB[self._output.level],
            launch_level=_TO_PB[self._output.settings.level],
        )

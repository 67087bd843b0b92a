"""`device_log { }` of signer.conf: which programs read the device's log, how often, how much."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from spire_hw.config.schema import GoDuration, Model, at_least
from spire_hw.errors import ConfigFault
from spire_hw_signer.devicelog import jsonlines, yubihsm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from spire_hw_signer.devicelog.entries import Dump

NUMBER: Final = "{number}"
_FORMATS: Final[dict[str, Callable[[bytes], Dump]]] = {
    "yubihsm": yubihsm.parse,
    "json": jsonlines.parse,
}
_MAX_INTERVAL: Final = timedelta(days=1)
_MAX_TIMEOUT: Final = timedelta(minutes=10)
# A flag of a password with its value, or without one where the next argument is the value.
_PASSWORD: Final = re.compile(
    r"--?(?:new-)?(?:password|passwd|passphrase|pin)(?:=(.*))?", re.DOTALL
)
_SHORT_PASSWORD: Final = re.compile(r"-p(.*)", re.DOTALL)
_ELSEWHERE: Final = re.compile(r"-|(?:file:)?/.+", re.DOTALL)

_Program = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=64)]


class DeviceLogKeys(Model):
    """`device_log { }`."""

    format: Literal["yubihsm", "json"]
    read: _Program
    consume: _Program | None = None
    secret_file: str = ""
    interval: Annotated[GoDuration, at_least(timedelta(seconds=1))] = timedelta(minutes=1)
    timeout: Annotated[GoDuration, at_least(timedelta(seconds=1))] = timedelta(seconds=30)
    max_output_bytes: Annotated[int, Field(ge=1024, le=16 << 20)] = 1 << 20
    capacity: Annotated[int, Field(ge=2, le=1_000_000)] | None = None

    def find_faults(self) -> Iterator[ConfigFault]:
        """Find what is wrong with the block as a whole."""
        for key, limit in (("interval", _MAX_INTERVAL), ("timeout", _MAX_TIMEOUT)):
            if getattr(self, key) > limit:
                text = f"device_log: {key} is at most {int(limit.total_seconds())}s"
                yield ConfigFault(self.line(key), text)
        if self.format == "json" and self.capacity is None:
            text = "device_log: set capacity, how many entries the device holds"
            yield ConfigFault(self.line("format"), text)
        if self.format == "yubihsm" and self.capacity not in {None, yubihsm.CAPACITY}:
            text = f"device_log: a YubiHSM holds {yubihsm.CAPACITY} entries; leave capacity out"
            yield ConfigFault(self.line("capacity"), text)
        yield from self._program_faults("read", self.read)
        if self.consume is not None:
            yield from self._program_faults("consume", self.consume)
            if sum(argument.count(NUMBER) for argument in self.consume[1:]) != 1:
                text = f"device_log: consume needs {NUMBER} once in its arguments, for the number"
                yield ConfigFault(self.line("consume"), f"{text} of the last entry that was read")

    def _program_faults(self, key: str, program: Sequence[str]) -> Iterator[ConfigFault]:
        if not program[0].startswith("/"):
            text = f"device_log: {key} begins with the absolute path of a program"
            yield ConfigFault(self.line(key), text)
        if any("\0" in argument for argument in program):
            yield ConfigFault(self.line(key), f"device_log: {key} holds a NUL")
        if _has_password(program, short=self.format == "yubihsm"):
            text = f"device_log: {key} has a password on its command line, which every process"
            text += " of this host can read: write it to a file and name that in secret_file"
            yield ConfigFault(self.line(key), text)

    def settings(self) -> DeviceLogSettings:
        """Return the settings of a block without faults."""
        return DeviceLogSettings(
            format=self.format,
            read=tuple(self.read),
            consume=() if self.consume is None else tuple(self.consume),
            secret_file=Path(self.secret_file) if self.secret_file else None,
            interval_s=self.interval.total_seconds(),
            timeout_s=self.timeout.total_seconds(),
            max_output_bytes=self.max_output_bytes,
            capacity=self.capacity or yubihsm.CAPACITY,
        )


@dataclass(frozen=True, slots=True)
class DeviceLogSettings:
    """How the device's log is read.

    Attributes:
        format: of what `read` prints, `yubihsm` or `json`.
        read: program and arguments.
        consume: program and arguments that tell the device what was read, () for none.
        secret_file: its content is given to both on standard input, None for nothing.
        interval_s: between two times it is read.
        timeout_s: how long a program may take.
        max_output_bytes: how much it may print.
        capacity: how many entries the device holds.
    """

    format: str
    read: tuple[str, ...]
    consume: tuple[str, ...] = ()
    secret_file: Path | None = None
    interval_s: float = 60.0
    timeout_s: float = 30.0
    max_output_bytes: int = 1 << 20
    capacity: int = yubihsm.CAPACITY

    @property
    def programs(self) -> tuple[tuple[str, ...], ...]:
        """Return the programs that are run."""
        return (self.read, self.consume) if self.consume else (self.read,)

    def parse(self, output: bytes) -> Dump:
        """Read what `read` printed.

        Raises:
            EncodingError: it is not in the format.
        """
        return _FORMATS[self.format](output)

    def consuming(self, number: int) -> tuple[str, ...]:
        """Return program and arguments that tell the device that it was read up to an entry."""
        return tuple(argument.replace(NUMBER, str(number)) for argument in self.consume)


def _has_password(program: Sequence[str], *, short: bool) -> bool:
    following = (*program[2:], "")
    for argument, after in zip(program[1:], following, strict=True):
        found = _PASSWORD.fullmatch(argument)
        value = None if found is None else after if found[1] is None else found[1]
        if short and value is None and (brief := _SHORT_PASSWORD.fullmatch(argument)):
            value = brief[1] or after
        if value is not None and _ELSEWHERE.fullmatch(value) is None:
            return True
    return False

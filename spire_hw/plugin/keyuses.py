"""When each key was last used: in memory, now and then in a file.

For an operator's eyes: a crash loses the last minutes, and nothing depends on them.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.files import NoFileError, parse_file, replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger

SAVE_S: Final = 600.0
_MAX_KEYS: Final = 256
_MAX_BYTES: Final = 64 * 1024


class KeyUses:
    """Times of last use by key fingerprint.

    Args:
        path: where they are kept.
        clock: time of a use, and between writes.
        log: where trouble is reported.
    """

    def __init__(self, path: Path, *, clock: Clock, log: Logger) -> None:
        self._path = path
        self._clock = clock
        self._log = log
        self._times: dict[str, float] = {}
        self._is_dirty = False

    def load(self) -> None:
        """Read what an earlier run left; what cannot be read is as good as nothing. Blocks."""
        try:
            self._times = parse_file(self._path, _MAX_BYTES, _parse)
        except NoFileError:
            return
        except SpireHwError as e:
            self._log.warning("times of last use of keys are lost", error=e.message)

    def used(self, fingerprint: str) -> None:
        """Note that a key signs now."""
        self._times[fingerprint] = self._clock.now().timestamp()
        self._is_dirty = True

    def last(self, fingerprint: str) -> datetime | None:
        """Return when a key signed last, None when that is not known."""
        at = self._times.get(fingerprint)
        return None if at is None else datetime.fromtimestamp(at, UTC)

    def save(self) -> None:
        """Write what changed since the last time; trouble is logged. Blocks on the disk."""
        if not self._is_dirty:
            return
        self._is_dirty = False
        young = sorted(self._times.items(), key=lambda item: item[1])[-_MAX_KEYS:]
        self._times = dict(young)
        content = json.dumps({f: int(t) for f, t in young}, indent=1).encode()
        try:
            replace_file(self._path, content, "times of last use of keys")
        except SpireHwError as e:
            self._log.warning("times of last use of keys are not kept", error=e.message)

    async def run(self) -> None:
        """Write every ten minutes; ends only when cancelled."""
        while True:
            await self._clock.sleep(SAVE_S)
            self.save()


def _parse(content: bytes) -> dict[str, float]:
    try:
        read = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise InvalidInputError("is not JSON") from e
    if not isinstance(read, dict) or len(read) > _MAX_KEYS:
        raise InvalidInputError("is no table of times")
    times = {}
    for fingerprint, at in read.items():
        if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < 2**40:
            raise InvalidInputError("is no table of times")
        times[fingerprint] = float(at)
    return times

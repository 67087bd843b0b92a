"""Acts that leave something behind, to see that a soak notices.

    python -m tests.soak.leaking PLACE

Prints, as JSON, what was noticed of each kind of leak.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import AttestationError, ErrorKind, Finding, InvalidInputError
from tests.soak import report
from tests.soak.worker import Repeater

if TYPE_CHECKING:
    from collections.abc import Callable

TIMES: Final = 6000
ERROR: Final = InvalidInputError("no")
KEPT: list[Any] = []


def _nothing() -> None:
    raise InvalidInputError("no")


def _cycle() -> None:
    ring: list[Any] = [bytes(1000)]
    ring.append(ring)
    raise InvalidInputError("no")


def _number() -> None:
    KEPT.append(1 << 31 | len(KEPT))
    raise InvalidInputError("no")


def _error() -> None:
    finding = Finding("nonce_mismatch", "no", ErrorKind.INVALID_ARGUMENT)
    KEPT.append(AttestationError([finding]))
    raise InvalidInputError("no")


def _table() -> None:
    KEPT.append({f"{len(KEPT)}": len(KEPT)})
    raise InvalidInputError("no")


def _native() -> None:
    ctypes.CDLL(None).malloc(40)
    raise InvalidInputError("no")


def _file() -> None:
    KEPT.append(Path("/dev/null").open("rb"))  # noqa: SIM115 - to be left open
    raise InvalidInputError("no")


SYNC: Final[dict[str, Callable[[], None]]] = {
    "nothing": _nothing,
    "cycle": _cycle,
    "number": _number,
    "error": _error,
    "table": _table,
    "native": _native,
    "file": _file,
}


async def _quiet() -> None:
    await asyncio.sleep(0)
    raise InvalidInputError("no")


async def _timer() -> None:
    asyncio.get_running_loop().call_later(30, KEPT.clear).cancel()
    raise InvalidInputError("no")


async def _task() -> None:
    KEPT.append(asyncio.ensure_future(asyncio.Event().wait()))  # noqa: TID251
    raise InvalidInputError("no")


async def _waiter() -> None:
    KEPT.append(asyncio.get_running_loop().create_future())
    raise InvalidInputError("no")


async def _thread() -> None:
    thread = threading.Thread(target=threading.Event().wait, daemon=True)
    thread.start()
    raise InvalidInputError("no")


ASYNC: Final = {
    "async nothing": _quiet,
    "cancelled timer": _timer,
    "task": _task,
    "future": _waiter,
    "thread": _thread,
}


async def _async(repeater: Repeater) -> None:
    for name, act in ASYNC.items():
        repeater.begin(name)
        await repeater.repeat_async(act, ERROR)
        for one in KEPT:
            one.cancel()
        KEPT.clear()


def _main(place: Path) -> None:
    names = [*SYNC, *ASYNC]
    times = {name: [TIMES] for name in names} | {"thread": [128], "file": [600]}
    result = place / "leaks.jsonl"
    repeater = Repeater({"cases": [], "times": times}, result)
    for name, act in SYNC.items():
        repeater.begin(name)
        repeater.repeat(act, ERROR)
        for one in KEPT:
            if hasattr(one, "close"):
                one.close()
        KEPT.clear()
    asyncio.run(_async(repeater))
    acts, _ = report.read(result)
    found = {act.test: act.growth.faults() for act in acts if act.growth is not None}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

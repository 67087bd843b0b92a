"""What was asked of a plugin and how it did."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import ErrorKind, SpireHwError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

_STEP_TIMEOUT_S: Final = 120.0


class Outcome(Enum):
    """How a step went."""

    PASSED = "passed"
    FAILED = "failed"
    # Right or wrong cannot be told, or does not matter to hosts; somebody should look.
    NOTED = "noted"
    SKIPPED = "skipped"


@dataclass(slots=True)
class Step:
    """One question and its answer.

    Attributes:
        name: what the plugin should do.
        outcome: whether it does.
        detail: why not, or what was seen; from the plugin, so not fit for a terminal as it is.
        seconds: how long it took.
    """

    name: str
    outcome: Outcome = Outcome.PASSED
    detail: str = ""
    seconds: float = 0.0


class FailedError(Exception):
    """The plugin does not do what it should; the text says what it does."""


class NotedError(Exception):
    """There is something to be said about a step."""


class SkippedError(Exception):
    """The step makes no sense for this plugin; the text says why."""


@dataclass(slots=True)
class Report:
    """All steps, in order.

    Attributes:
        show: is told of each step when it is done.
    """

    show: Callable[[Step], None]
    steps: list[Step] = field(default_factory=list)

    def count(self, outcome: Outcome) -> int:
        """Return how many steps went that way."""
        return sum(step.outcome is outcome for step in self.steps)

    @asynccontextmanager
    async def step(self, name: str) -> AsyncIterator[Step]:
        """Run the body as one step; what it raises becomes the step's outcome."""
        step = Step(name)
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(_STEP_TIMEOUT_S):
                yield step
        except FailedError as e:
            step.outcome, step.detail = Outcome.FAILED, str(e)
        except NotedError as e:
            step.outcome, step.detail = Outcome.NOTED, str(e)
        except SkippedError as e:
            step.outcome, step.detail = Outcome.SKIPPED, str(e)
        except TimeoutError:
            step.outcome, step.detail = Outcome.FAILED, f"no answer in {_STEP_TIMEOUT_S:g} s"
        except SpireHwError as e:
            step.outcome, step.detail = Outcome.FAILED, answered(e)
        step.seconds = loop.time() - start
        self.steps.append(step)
        self.show(step)


def answered(error: SpireHwError) -> str:
    """Return a plugin's error in words."""
    return f"answered {error.kind.name}: {error.message}"


async def refused(call: Awaitable[Any], what: str, *kinds: ErrorKind) -> SpireHwError:
    """Return the error a call ends with.

    Raises:
        FailedError: it ended well, or with another kind of error.
    """
    try:
        await call
    except SpireHwError as e:
        if kinds and e.kind not in kinds:
            wanted = " or ".join(kind.name for kind in kinds)
            raise FailedError(f"{what}: {answered(e)}; expected {wanted}") from e
        return e
    raise FailedError(f"{what}: was accepted")

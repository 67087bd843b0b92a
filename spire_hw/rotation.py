"""When is a certificate or key due: thresholds as pure arithmetic on times passed in.

Spec: upstream's rotation strategy (half of the life with jitter, or an availability target) and
its CA thresholds.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from random import Random

JITTER: Final = 0.1
_HALF: Final = 0.5
_PREPARE_AT_MOST: Final = timedelta(days=30)
_ACTIVATE_AT_MOST: Final = timedelta(days=7)
_TARGET_MARGIN: Final = timedelta(hours=12)
_TARGET_SPREAD: Final = timedelta(minutes=10)


def draw_jitter(random: Random) -> float:
    """Draw the jitter of one rotation: uniform between -0.1 and 0.1."""
    return random.uniform(-JITTER, JITTER)


def rotation_due_at(
    not_before: datetime,
    not_after: datetime,
    *,
    fraction: float = _HALF,
    jitter: float = 0.0,
    availability_target: timedelta | None = None,
) -> datetime:
    """Return the moment from which a certificate or token has to be replaced.

    Args:
        not_before: start of its validity.
        not_after: end of its validity.
        fraction: share of the life that is left when it is due, 0 to 1.
        jitter: -0.1 to 0.1, drawn once for each certificate so that a fleet spreads out.
        availability_target: how long an SVID has to outlive an outage of the server; it counts
            only where `is_target_reachable`, and jitter then spreads over 10 minutes.

    Returns:
        A moment within the validity.
    """
    lifetime = not_after - not_before
    if availability_target is not None and is_target_reachable(lifetime, availability_target):
        left = availability_target + _TARGET_SPREAD * ((jitter + JITTER) / (2 * JITTER))
    else:
        left = lifetime * fraction * (1 + jitter)
    return min(not_after, max(not_before, not_after - left))


def is_target_reachable(lifetime: timedelta, availability_target: timedelta) -> bool:
    """Tell whether a life is long enough for the target: more than 12 hours above it."""
    return lifetime - availability_target > _TARGET_MARGIN


def should_rotate(
    now: datetime,
    not_before: datetime,
    not_after: datetime,
    fraction: float = _HALF,
    *,
    jitter: float = 0.0,
    availability_target: timedelta | None = None,
) -> bool:
    """Tell whether a certificate or token is due; arguments as in `rotation_due_at`."""
    due_at = rotation_due_at(
        not_before,
        not_after,
        fraction=fraction,
        jitter=jitter,
        availability_target=availability_target,
    )
    return now >= due_at


def preparation_due_at(issued_at: datetime, not_after: datetime) -> datetime:
    """Return when the successor of a CA or JWT key is made: half of the life, 30 days at most."""
    return not_after - min((not_after - issued_at) / 2, _PREPARE_AT_MOST)


def activation_due_at(issued_at: datetime, not_after: datetime) -> datetime:
    """Return when the successor takes over: a sixth of the life is left, 7 days at most."""
    return not_after - min((not_after - issued_at) / 6, _ACTIVATE_AT_MOST)

"""How much, how often, how many at once: buckets, generation budgets, work under way (pure).

All times are seconds of one clock that never goes back; who asks hands them in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw_signer.policy import Client, Denial, GenerateRule, Rate, Reason, soonest

if TYPE_CHECKING:
    from collections.abc import Iterable

DAY_S: Final = 86_400.0
_MAX_BUCKETS: Final = 4096
_KEPT: Final = 16  # one part in so many of what may be under way is for what is urgent


@dataclass(slots=True)
class Bucket:
    """A token bucket, full at first."""

    rate: Rate
    tokens: float
    at: float

    def wait_s(self, now: float) -> float:
        """Return how long until there is a token, 0 when there is one."""
        self.tokens = min(
            self.rate.burst, self.tokens + max(0.0, now - self.at) * self.rate.per_second
        )
        self.at = max(self.at, now)
        return max(0.0, (1.0 - self.tokens) / self.rate.per_second)


class Buckets:
    """The buckets of clients and their keys; a rate that policy changes starts a new one."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def take(
        self, client: str, key_id: str, key_rate: Rate | None, client_rate: Rate | None, now: float
    ) -> Denial | None:
        """Take a token for one signature from both buckets, or from none."""
        wanted = []
        for name, rate, reason in (
            (key_id, key_rate, Reason.RATE),
            ("", client_rate, Reason.CLIENT_RATE),
        ):
            if rate is None:
                continue
            bucket = self._bucket((client, name), rate, now)
            wait_s = bucket.wait_s(now)
            if wait_s > 0:
                text = f"more than {rate.per_second:g} a second"
                return Denial(reason, text, wait_s)
            wanted.append(bucket)
        for bucket in wanted:
            bucket.tokens -= 1.0
        return None

    def _bucket(self, key: tuple[str, str], rate: Rate, now: float) -> Bucket:
        bucket = self._buckets.get(key)
        if bucket is None or bucket.rate != rate:
            if len(self._buckets) >= _MAX_BUCKETS:
                self._forget(now)
            bucket = self._buckets[key] = Bucket(rate, rate.burst, now)
        return bucket

    def _forget(self, now: float) -> None:
        """Drop what is full again: a new one would be the same."""
        for key, bucket in list(self._buckets.items()):
            bucket.wait_s(now)
            if bucket.tokens >= bucket.rate.burst:
                del self._buckets[key]


class InFlight:
    """How many signatures each client has under way."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def enter(self, client: Client, *, urgent: bool = False) -> Denial | None:
        """Count one more, unless that is too many; each that was let in leaves once."""
        count = self._counts.get(client.identity, 0)
        most = client.max_in_flight
        if not urgent:
            most -= most // _KEPT
        if count >= most:
            text = f"more than {most} signatures at once"
            return Denial(Reason.IN_FLIGHT, text, 0.1)
        self._counts[client.identity] = count + 1
        return None

    def leave(self, client: Client) -> None:
        """Count one less."""
        count = self._counts.get(client.identity, 0) - 1
        if count > 0:
            self._counts[client.identity] = count
        else:
            self._counts.pop(client.identity, None)


def check_budget(
    rule: GenerateRule, made: Iterable[tuple[str, float]], key_id: str, now: float
) -> Denial | None:
    """Check whether one more key may be made.

    Args:
        rule: what policy says.
        made: key id and time of every generation that was begun, in order.
        key_id: which key is asked for.
        now: the time.
    """
    times = list(made)
    same = [at for name, at in times if name == key_id]
    interval_s = rule.per_key_min_interval.total_seconds()
    too_soon = too_many = None
    if same and now - same[-1] < interval_s:
        ago_s = now - same[-1]
        text = (
            f"this key was made {ago_s:.0f} s ago, and is made once in {interval_s:.0f} s"
            " (per_key_min_interval)"
        )
        too_soon = Denial(Reason.GENERATE_INTERVAL, text, interval_s - ago_s)
    recent = sorted(at for _, at in times if now - at < DAY_S)
    if len(recent) >= rule.per_day:
        text = f"more than {rule.per_day} keys in a day"
        wait_s = DAY_S - (now - recent[-rule.per_day]) if rule.per_day else DAY_S
        too_many = Denial(Reason.GENERATE_BUDGET, text, wait_s)
    return soonest((too_soon, too_many))

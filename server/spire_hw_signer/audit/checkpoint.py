"""Checkpoints: the log key, which lives in the device, signs where the log ends, again and again.

A checkpoint stands in the log and goes to other places, so that whoever changes the log afterwards
would have to change those too, and the key cannot be had.

A checkpoint also tells whether the clock can be believed: one that has moved by more than five
minutes against the last checkpoint cannot, until it is right again or an operator says that it is.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from spire_hw.aio.alarm import Alarm
from spire_hw.aio.tasks import Tasks
from spire_hw.errors import NotReadyError, SpireHwError, UnavailableError, VerificationError
from spire_hw.evidence.checkpoint import statement_of, verify_checkpoint
from spire_hw.key import SignOptions, default_hash, fingerprint, spki_der
from spire_hw_signer.audit.record import Kind, micro, time_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.key import Signer
    from spire_hw.log import Logger
    from spire_hw_signer.audit.log import AuditLog
    from spire_hw_signer.audit.places import Place
    from spire_hw_signer.audit.record import Record
    from spire_hw_signer.audit.start import Found

EVERY_RECORDS: Final = 1000
EVERY_S: Final = 60.0
MAX_SKEW_S: Final = 300.0
_SIGN_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Baseline:
    """Both clocks at a moment when the wall clock was believed."""

    at: datetime
    mono: int
    boot: str

    @classmethod
    def of(cls, record: Record) -> Baseline:
        """Return the clocks of a record."""
        return cls(record.at(), record.mono, record.boot)

    def skew_s(self, now: datetime, mono: int, boot: str) -> float:
        """Return by how much the wall clock has moved since, seconds; negative for back.

        Over a reboot only a clock that went back can be told.
        """
        passed_s = (now - self.at).total_seconds()
        if boot and boot == self.boot:
            return passed_s - (mono - self.mono) / 1e6
        return min(0.0, passed_s)


class Checkpoints:
    """Makes them for one log.

    Args:
        audit: the log; open.
        found: how it was found when it was opened.
        signer: the log key.
        places: where checkpoints go besides.
        clock: when they are due, and what is watched.
        log: where trouble is told.
    """

    def __init__(
        self,
        audit: AuditLog,
        found: Found,
        signer: Signer,
        *,
        places: Sequence[Place] = (),
        clock: Clock,
        log: Logger,
    ) -> None:
        self.last = b""
        self.log_key = spki_der(signer.public_key)
        self._audit = audit
        self._found = found
        self._signer = signer
        self._fingerprint = fingerprint(self.log_key)
        self._places = places
        self._clock = clock
        self._log = log
        self._alarm = Alarm(clock)
        self._tasks = Tasks(self._failed)
        self._baseline: Baseline | None = None
        self._told = ""
        self._trouble = ""

    @property
    def places(self) -> Sequence[Place]:
        """Return where checkpoints go besides."""
        return self._places

    @property
    def trouble(self) -> str:
        """Return why there are no new checkpoints, "" while all is well."""
        return self._trouble

    @property
    def clock_fault(self) -> str:
        """Return why the wall clock is not believed, "" while it is.

        While it says something, whatever hangs on an expiry has to be refused.
        """
        if self._baseline is None:
            return ""
        mono = micro(self._clock.monotonic())
        skew_s = self._baseline.skew_s(self._clock.now(), mono, self._audit.boot)
        if abs(skew_s) <= MAX_SKEW_S:
            return ""
        way = "ahead" if skew_s > 0 else "back"
        return (
            f"the clock went {way} by {abs(skew_s):.0f} s since the checkpoint of"
            f" {time_text(self._baseline.at)}; set it right, or accept it with"
            " `spire-hw-signer clock accept`"
        )

    def accept_clock(self) -> None:
        """Believe the clock as it is now; the caller has an operator's word for it."""
        mono = micro(self._clock.monotonic())
        self._baseline = Baseline(self._clock.now(), mono, self._audit.boot)

    async def start(self) -> None:
        """Check what the log and the other places know, make the first checkpoint, go on making.

        Raises:
            NotReadyError: a checkpoint was not signed by the log key, or another place has seen
                more of this log, or another one.
            SpireHwError: the device does not sign, or the log cannot be written.
        """
        self._check_found()
        for place in self._places:
            await self._check_place(place)
        await self._make()
        self._audit.watch(EVERY_RECORDS, self._alarm.ring)
        self._tasks.start("checkpoints", self._run())
        for place in self._places:
            self._tasks.start(f"checkpoints to {place.name}", place.run())

    def _check_found(self) -> None:
        for record, line in self._found.checkpoints:
            try:
                verify_checkpoint(record.body, self._signer.public_key)
            except VerificationError as e:
                raise _refused(f"checkpoint {record.seq} {e.message}") from e
            if not record.body["clock"]:
                self._baseline = Baseline.of(record)
            self.last = line

    async def _check_place(self, place: Place) -> None:
        body = await place.last()
        first = self._found.first
        if body is None or (first is not None and _is_sealed(first, body["at"])):
            return
        known = f"the checkpoint for record {body['at']} in {place.name}"
        try:
            verify_checkpoint(body, self._signer.public_key)
        except VerificationError as e:
            raise _refused(f"{known} {e.message}") from e
        if body["log"] != self._audit.log_id:
            raise _refused(f"{known} is of another log, {body['log']}")
        if body["at"] > self._audit.head.seq:
            raise _refused(
                f"{known} has seen more than this log, which ends at {self._audit.head.seq}:"
                " it was cut off, or an older one was put back"
            )
        if not await self._holds(body):
            raise _refused(f"{known} has seen another record there: the log was rewritten")

    async def _holds(self, body: Mapping[str, Any]) -> bool:
        found = await self._audit.hash_at(body["at"])
        if found is not None:
            return found.hex() == str(body["head"])
        # The file it is in was taken away; a hole between files does not go unseen.
        first = self._found.first
        return first is not None and int(body["at"]) < first.seq

    async def _run(self) -> None:
        while True:
            await self._alarm.sleep(EVERY_S)
            try:
                async with asyncio.timeout(_SIGN_S):
                    await self._make()
            except (SpireHwError, TimeoutError) as e:
                reason = str(e) or "the device does not answer"
                if reason != self._trouble:
                    self._log.error("Checkpoint of the audit log was not made", error=reason)
                self._trouble = reason

    async def _make(self) -> None:
        head, fault = self._audit.head, self.clock_fault
        now, mono = self._clock.now(), micro(self._clock.monotonic())
        body: dict[str, Any] = {
            "at": head.seq,
            "clock": fault,
            "head": head.hash.hex(),
            "log": self._audit.log_id,
            "taken": time_text(now),
        }
        algorithm = default_hash(self._signer.public_key)
        digest = algorithm.digest(statement_of(body))
        signature = await self._signer.sign(digest, SignOptions(algorithm))
        if not self._audit.can_vouch(head.seq):
            raise UnavailableError("the device took too long to sign it: the log has gone on since")
        body |= {"key": self._fingerprint, "signature": signature.hex()}
        self.last = await self._audit.record(Kind.CHECKPOINT, body)
        self._trouble = ""
        if not fault:
            self._baseline = Baseline(now, mono, self._audit.boot)
        elif fault != self._told:
            self._log.error("Clock is not believed: what hangs on it is refused", error=fault)
        self._told = fault
        for place in self._places:
            place.push(self.last)

    async def close(self) -> None:
        """Make a last checkpoint, as far as device and disk allow, and stop."""
        await self._tasks.close()
        try:
            async with asyncio.timeout(_SIGN_S):
                await self._make()
                for place in self._places:
                    await place.flush()
        except (SpireHwError, TimeoutError) as e:
            self._log.error("Last checkpoint of the audit log was not made", error=str(e))

    def _failed(self, name: str, error: BaseException) -> None:
        self._trouble = f"{name} ended: {type(error).__name__}"
        self._log.error("Checkpoints of the audit log ended", task=name, exc_info=error)


def _is_sealed(first: Record, seq: int) -> bool:
    """Tell whether an operator has gone on after what was known of an older part."""
    return first.kind is Kind.SEAL and seq < first.seq


def _refused(reason: str) -> NotReadyError:
    return NotReadyError(
        f"audit log does not hold: {reason}; look into it with `spire-hw-signer log verify`, keep a"
        " copy, then `spire-hw-signer log seal` to go on"
    )

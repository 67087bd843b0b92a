"""Making keys: once for each request id, within the budget, never over a key in use.

A generation is noted before the device is asked. One of which nobody knows what became of it, for
the signer or the device went away, is taken up by the next request for the same key: the device is
looked at first, and asked again only when the key is still the old one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.key import KeyType
from spire_hw_signer.admission import device_error
from spire_hw_signer.audit.log import Outcome
from spire_hw_signer.policy import (
    FOREIGN_KEY,
    Denial,
    Reason,
    check_form,
    check_replace,
    check_type,
    soonest,
)
from spire_hw_signer.rates import check_budget

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.aio.tasks import Tasks
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_signer.admission import Caller, Gate
    from spire_hw_signer.audit.log import AuditLog
    from spire_hw_signer.keys import HeldKey, OwnerKeys
    from spire_hw_signer.notes import Making
    from spire_hw_signer.steady import SteadyTime

_GENERATED: Final = ("generate_key",)
_TYPES: Final = {key_type.value: key_type for key_type in KeyType}
# The device may have made the key all the same.
_UNKNOWN: Final = frozenset(
    {ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED, ErrorKind.CANCELLED, ErrorKind.UNKNOWN}
)


class Generating:
    """Makes keys."""

    def __init__(
        self,
        gate: Gate,
        audit: AuditLog,
        *,
        steady: SteadyTime,
        clock: Clock,
        tasks: Tasks,
        metrics: Metrics,
        log: Logger,
    ) -> None:
        self._gate = gate
        self._audit = audit
        self._steady = steady
        self._clock = clock
        self._tasks = tasks
        self._metrics = metrics
        self._log = log

    async def generate(
        self,
        admit: Callable[[], Caller],
        keys: OwnerKeys,
        request_id: bytes,
        key_id: str,
        key_type: int,
    ) -> HeldKey | Denial:
        """Make a key, or answer with the one that the same request made.

        What was begun is finished, whether or not the caller still waits.

        Args:
            admit: returns who is calling; asked again when it is its turn, which may be much later.
            keys: the caller's.
            request_id: of the request.
            key_id: which key.
            key_type: its number on the wire.

        Raises:
            SpireHwError: the audit log or the device cannot be used, or the caller is let in no more.
        """
        caller = admit()
        denial = check_form(request_id, key_id)
        wanted = _TYPES.get(key_type)
        if denial is None and wanted is None:
            denial = Denial(Reason.MALFORMED, "key type is required")
        if denial is None and caller.client.generate is None:
            denial = Denial(Reason.METHOD, "keys are not made for this client")
        if denial is not None or wanted is None:
            refused = denial or FOREIGN_KEY
            self._refuse(caller, request_id[:16], "", refused)
            return refused
        task = self._tasks.spawn(
            "generate key", self._in_turn(admit, keys, request_id, key_id, wanted)
        )
        return await asyncio.shield(task)

    def _refuse(self, caller: Caller, request_id: bytes, key_id: str, denial: Denial) -> None:
        intent = caller.intent("GenerateKey", request_id=request_id, key_id=key_id)
        self._gate.refuse(intent, denial)

    async def _in_turn(
        self,
        admit: Callable[[], Caller],
        keys: OwnerKeys,
        request_id: bytes,
        key_id: str,
        key_type: KeyType,
    ) -> HeldKey | Denial:
        async with keys.changing:
            caller = admit()
            if caller.client.owner != keys.owner:
                raise UnavailableError("the policy has changed meanwhile; ask again")
            made = await self._once(caller, keys, request_id, key_id, key_type)
        if isinstance(made, Denial):
            self._refuse(caller, request_id, key_id, made)
        return made

    async def _once(
        self, caller: Caller, keys: OwnerKeys, request_id: bytes, key_id: str, key_type: KeyType
    ) -> HeldKey | Denial:
        notes, known = keys.notes, keys.notes.find(request_id.hex())
        if known is not None and not known.is_of(key_id, key_type):
            return Denial(Reason.REPLAY, "the request id was used for something else")
        if known is not None and known.fingerprint:
            held = keys.find(key_id)
            if held is not None and held.info.fingerprint == known.fingerprint:
                return held
            return Denial(Reason.REPLAY, "the key that this request made was replaced since")
        making = notes.unfinished(key_id, key_type)
        if known is not None and known is not making:
            return Denial(Reason.REPLAY, "another key was asked for since")
        denial = self._check(caller, keys, key_id, key_type)
        if denial is not None:
            return denial
        held = keys.find(key_id)
        fresh = making is None
        if making is None:
            before = "" if held is None else held.info.fingerprint
            now = self._steady.now()
            making = notes.begin(request_id.hex(), key_id, key_type, before, now)
        else:
            making = notes.change(making, request_id=request_id.hex())
        return await self._make(caller, keys, making, key_type, fresh=fresh)

    def _check(
        self, caller: Caller, keys: OwnerKeys, key_id: str, key_type: KeyType
    ) -> Denial | None:
        """Check 3, 4, 5 and 7; what was begun before is not counted again."""
        client, now = caller.client, self._steady.now()
        rule = client.rule(key_id)
        if rule is None or client.generate is None:
            return FOREIGN_KEY
        budget = None
        if keys.notes.unfinished(key_id, key_type) is None:
            budget = check_budget(client.generate, keys.notes.made(), key_id, now)
        swap = check_replace(
            client, exists=keys.find(key_id) is not None, idle_s=keys.notes.idle_s(key_id, now)
        )
        return soonest((check_type(rule, key_type), budget, swap))

    async def _make(
        self,
        caller: Caller,
        keys: OwnerKeys,
        making: Making,
        key_type: KeyType,
        *,
        fresh: bool,
    ) -> HeldKey:
        notes = keys.notes
        intent = caller.intent(
            "GenerateKey",
            request_id=bytes.fromhex(making.request_id),
            key_id=making.key_id,
            generation=making.generation,
            fingerprint=making.before,
        )
        rule = caller.client.rule(making.key_id)
        named = "" if rule is None else rule.name
        try:
            (seq,) = await self._audit.intend([intent])
        except SpireHwError:
            if fresh:
                notes.drop(making)
            raise
        began = self._clock.monotonic()
        outcome: Outcome | None = Outcome(seq, "failed", "internal error")
        try:
            try:
                await notes.save()
            except SpireHwError:
                if fresh:
                    notes.drop(making)
                raise
            held = await self._ask(keys, making, key_type, fresh=fresh)
            taken_s = self._clock.monotonic() - began
            fingerprint = held.info.fingerprint
            outcome = Outcome(seq, "done", "", taken_s, making.generation, fingerprint)
        except SpireHwError as e:
            taken_s = self._clock.monotonic() - began
            outcome = Outcome(seq, "failed", e.message, taken_s)
            self._log.error("Key was not made", key_id=making.key_id, error=e.message, record=seq)
            raise device_error(e, seq) from e
        except asyncio.CancelledError:
            outcome = None  # the device may go on: the next start says that nobody knows
            raise
        finally:
            if outcome is not None:
                self._metrics.count(_GENERATED, labels={"key": named, "result": outcome.result})
                self._audit.conclude([outcome])
        return held

    async def _ask(
        self, keys: OwnerKeys, making: Making, key_type: KeyType, *, fresh: bool
    ) -> HeldKey:
        notes = keys.notes
        info = None
        if not fresh:
            await keys.refresh()
            found = keys.find(making.key_id)
            if found is not None and found.info.fingerprint != making.before:
                info = found.info
        if info is None:
            try:
                info = await keys.generate(making.key_id, key_type)
            except SpireHwError as e:
                if e.kind not in _UNKNOWN:
                    notes.drop(making)
                    await notes.save()
                raise
        notes.change(making, fingerprint=info.fingerprint)
        notes.unused(making.key_id)
        held = keys.take(info)
        try:
            await notes.save()
        except SpireHwError as e:
            # The key is there, and the audit log has to say so. What the disk has now is a generation
            # that is taken up again; the key does not sign before the disk has more.
            self._log.error("Key was made, its notes cannot be written", error=e.message)
        return held

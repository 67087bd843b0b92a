"""A place for one worker: opened, watched, refilled when the worker dies."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from spire_hw.aio.backoff import Backoff
from spire_hw.errors import EncodingError, ErrorKind, SpireHwError
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.pool.pace import Pace
from spire_hw.pkcs11.pool.pin import BY_HAND_S
from spire_hw.pkcs11.pool.process import Launch, WorkerProcess
from spire_hw.pkcs11.profile import Profile, ProfileChoice
from spire_hw.pkcs11.wire import Kind, decode_json, encode_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from spire_hw.log import Logger
    from spire_hw.pkcs11.pool.breaker import Breaker
    from spire_hw.pkcs11.pool.pin import PinGuard, Refusals

_PING_EVERY_S: Final = 15.0
_PING_LIMIT_S: Final = 10.0
_SETTLE_S: Final = 2.0
_STEADY_S: Final = 60.0
_BROKEN_AFTER: Final = 2
_LATCH_DEATHS: Final = 5
_LATCH_S: Final = 300.0
_AT_ONCE_S: Final = 0.2
_NO_HURRY: Final = frozenset({"hsm.worker_died", "hsm.worker_hung"})
_MAX_DEPTH: Final = 3


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What a worker found out when it opened the token.

    Attributes:
        label: token label.
        serial: token serial number.
        model: token model.
        can_write: False when the token is write-protected.
        is_pin_count_low: a wrong PIN was given to it since the last right one.
        mechanisms: CKM numbers the token lists, but for those that it does not do what we want with.
        longest: the longest key of some of them in bits.
        profile: what is particular to this kind of token.
    """

    label: str
    serial: str
    model: str
    can_write: bool
    mechanisms: frozenset[int]
    profile: Profile
    is_pin_count_low: bool = False
    longest: Mapping[int, int] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Return label and serial for messages."""
        return f"{self.label}/{self.serial}"


@dataclass(frozen=True, slots=True)
class Opening:
    """How a worker is started and logs in.

    Attributes:
        launch: how the process is started.
        token: the fields of an OPEN request.
        guard: gives the PIN.
        limit_s: seconds that opening may take, and logging in.
        ignored: query attributes of the token's URI that mean nothing here.
    """

    launch: Launch
    token: dict[str, Any]
    guard: PinGuard = field(repr=False)
    limit_s: float = 20.0
    ignored: tuple[str, ...] = ()

    async def start(
        self, name: str, asks: Callable[[], None] | None = None
    ) -> tuple[WorkerProcess, TokenFacts]:
        """Start a worker and log it in.

        Args:
            name: of the worker.
            asks: called when the device is about to ask somebody for the PIN.

        Raises:
            TokenError: it does not start, the token is away, or the PIN is or was refused.
        """
        await self.guard.ready()
        pin = await asyncio.to_thread(self.guard.take)
        worker = await WorkerProcess.start(self.launch, name)
        try:
            opened = worker.ask(
                Kind.OPEN, encode_json(self.token), limit_s=self.limit_s, what="open token"
            )
            token = str(decode_json(await opened).get("token"))
            # Whose PIN it is shows only now: another plugin may have sent it to this token before.
            async with self.guard.meeting(token, pin) as refusals:
                if pin is None and asks is not None:
                    asks()
                facts = await self._log_in(worker, token, pin, refusals)
        except BaseException:
            await worker.end()
            raise
        return worker, facts

    async def _log_in(
        self, worker: WorkerProcess, token: str, pin: str | None, refusals: Refusals
    ) -> TokenFacts:
        body = encode_json({"pin": pin})
        limit_s = BY_HAND_S if pin is None else self.limit_s
        answer = worker.ask(Kind.LOGIN, body, limit_s=limit_s, what="log in")
        try:
            facts = _facts(decode_json(await asyncio.shield(answer)), self.token["profile"])
        except asyncio.CancelledError:
            # What is given up now may still have been counted by the token: that is to be known.
            await asyncio.wait({answer}, timeout=_SETTLE_S)
            if not answer.cancel():
                _note(answer.exception(), token, pin, refusals)
            raise
        except TokenError as e:
            _note(e, token, pin, refusals)
            raise
        refusals.accept(token, pin)
        return facts


def _note(error: BaseException | None, token: str, pin: str | None, refusals: Refusals) -> None:
    # Only what C_Login answered is held against the PIN: flags are asked before each try.
    if isinstance(error, TokenError) and error.is_pin_refusal:
        refusals.refuse(token, pin, error.message)
    elif isinstance(error, TokenError) and error.may_be_pin_refusal:
        refusals.doubt(token, pin, error.message)


def _facts(fields: dict[str, Any], profile: dict[str, Any]) -> TokenFacts:
    return TokenFacts(
        label=str(fields.get("label")),
        serial=str(fields.get("serial")),
        model=str(fields.get("model")),
        can_write=fields.get("can_write") is True,
        is_pin_count_low=fields.get("pin_count_low") is True,
        mechanisms=frozenset(m for m in fields.get("mechanisms", ()) if isinstance(m, int)),
        profile=ProfileChoice(str(fields.get("profile")), profile["overrides"]).resolve(()),
        longest={m: bits for m, bits in fields.get("longest", ()) if isinstance(bits, int)},
    )


class Seat:
    """Keeps one worker running until cancelled.

    Attributes:
        worker: the worker, None while there is none.
        facts: what it found when it opened the token last.
        problem: why there is none; None while all is well or the first try is under way.
        pace: how fast the token signs here, whichever worker it is.
    """

    def __init__(
        self,
        name: str,
        opening: Opening,
        turn: asyncio.Lock,
        changed: Callable[[], None],
        log: Logger,
        *,
        breaker: Breaker | None = None,
    ) -> None:
        self.name = name
        self._opening = opening
        self._turn = turn
        self._changed = changed
        self._log = log
        self._breaker = breaker
        self.worker: WorkerProcess | None = None
        self.facts: TokenFacts | None = None
        self.problem: TokenError | None = None
        self._released = False
        self._recycled = False
        self._is_away = False
        self._deaths = 0
        self._died_at: deque[float] = deque(maxlen=_LATCH_DEATHS)
        # Set but while a pause between two tries may be cut short.
        self._woken = asyncio.Event()
        self._woken.set()
        self.pace = Pace()

    @property
    def is_ready(self) -> bool:
        """Tell whether a worker is there to be asked."""
        return self.worker is not None and self.worker.is_alive

    @property
    def has_room(self) -> bool:
        """Tell whether the worker should be given another batch now."""
        worker = self.worker
        if worker is None or not worker.is_alive:
            return False
        # A token that has become slow shows it by what it has in hand.
        return worker.depth < (_MAX_DEPTH if self.pace.is_quick(worker.waiting_s) else 1)

    @property
    def is_broken(self) -> bool:
        """Tell whether waiting for this seat is not worth it: restarting has not helped."""
        if self.is_ready or self.problem is None:
            return False
        if self._breaker is not None and self._breaker.must_wait(self.name):
            return True
        return self._is_away or self._is_latched or self._deaths >= _BROKEN_AFTER

    @property
    def _is_latched(self) -> bool:
        """Tell whether the module died so often that only an operator can help."""
        died = self._died_at
        return len(died) == _LATCH_DEATHS and died[-1] - died[0] <= _LATCH_S

    @property
    def is_trying(self) -> bool:
        """Tell whether the token, away so far, is being opened right now."""
        return self._is_away and self._woken.is_set()

    def wake(self) -> bool:
        """Have the next try to open the token made now; False when none may be made yet.

        Only a token that was away is tried out of turn: a module that crashes or hangs is not, nor
        a login that failed, since the token may count it. A PIN known to be refused is not sent.
        """
        problem = self.problem
        if not self._is_away or problem is None or self._woken.is_set():
            return False
        if problem.reason in _NO_HURRY:
            return False
        if problem.operation == "login" and problem.reason != "hsm.pin_latched":
            return False
        self._woken.set()
        return True

    def recycle(self) -> None:
        """Have a fresh worker take the place of this one; that is no death of it."""
        if self.worker is not None:
            self._recycled = True
            self.worker.kill()

    def failed(self) -> None:
        """Note that the token failed when it was used."""
        if self._breaker is not None:
            self._breaker.failed(self.name)

    def signed(self) -> None:
        """Note that the token has made signatures that hold."""
        if self._breaker is not None:
            self._breaker.signed()

    def release(self) -> WorkerProcess | None:
        """Hand the worker over to be closed in peace; no other is started."""
        self._released = True
        worker, self.worker = self.worker, None
        return worker

    async def run(self) -> None:
        """Start a worker, wait for its end, start the next; ends by cancellation."""
        away, deaths = Backoff(0.2, 30.0, factor=3.0), Backoff(0.2, 30.0, factor=3.0)
        loop = asyncio.get_running_loop()
        while not self._is_latched:
            if self._breaker is not None:
                await self._breaker.permit(self.name)
            try:
                async with self._turn:
                    worker, facts = await self._opening.start(self.name, self._tell_by_hand)
            except SpireHwError as e:
                self._set_problem(e)
                await self._pause(away.next_s())
                continue
            if self._released:
                await worker.end()
                return
            since = loop.time()
            away.reset()
            self._is_away = False
            self.worker, self.facts, self.problem = worker, facts, None
            self._changed()
            how = await self._until_gone(worker)
            if how is None:
                return
            if self._recycled:
                self._recycled = False
                continue
            self._log.warning("hsm.worker_died", worker=self.name, how=how)
            if loop.time() - since > _STEADY_S:
                deaths.reset()
                self._deaths = 0
            self._ended(worker, how)
            self._changed()
            await asyncio.sleep(deaths.next_s() if self._deaths else _AT_ONCE_S)

    def _tell_by_hand(self) -> None:
        text = f"the device asks for the PIN; {BY_HAND_S:g} s to enter it there"
        self._log.warning("hsm.login_by_hand", worker=self.name, message=text)

    def _ended(self, worker: WorkerProcess, how: str) -> None:
        """Note why the worker is gone."""
        if self._breaker is not None and self._breaker.is_open:
            self._breaker.failed(self.name)
        why = worker.why
        if why is not None and why.reason not in _NO_HURRY:
            # The token failed, not the process: the breaker says when it is tried again.
            self.problem = why
            self._deaths += self._breaker is None
            return
        self._deaths += 1
        if not worker.was_killed:
            self._died_at.append(asyncio.get_running_loop().time())
        self.problem = self._latch_error(how) if self._is_latched else _death_error(how)

    def _latch_error(self, how: str) -> TokenError:
        message = (
            f"pkcs11 module ended its process {_LATCH_DEATHS} times within "
            f"{_LATCH_S / 60:g} minutes (last: {how}) and is not started again; update or replace "
            "it, then restart or have the configuration read again"
        )
        self._log.error("hsm.worker_latched", worker=self.name, error=message)
        return TokenError(
            message,
            reason="hsm.worker_latched",
            operation="run",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    async def _pause(self, seconds: float) -> None:
        """Wait until the next try is due, or until somebody needs the token."""
        self._woken.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.set()

    def _set_problem(self, error: SpireHwError) -> None:
        problem = error if isinstance(error, TokenError) else TokenError.of(error, "open token")
        if self.problem is None or self.problem.message != problem.message:
            self._log.error(problem.reason, worker=self.name, error=problem.message)
        self.problem = problem
        self._is_away = True
        self._changed()

    async def _until_gone(self, worker: WorkerProcess) -> str | None:
        """Return how the worker ended, None when it was handed over."""
        try:
            how = await self._watch(worker)
        finally:
            self.worker = None
            if not self._released:
                await worker.end()
        return None if self._released else how

    async def _watch(self, worker: WorkerProcess) -> str:
        while True:
            await asyncio.wait({worker.gone}, timeout=_PING_EVERY_S)
            if worker.gone.done():
                return worker.gone.result()
            self._deaths = 0
            if worker.depth:
                continue
            try:
                answer = await worker.ask(
                    Kind.PING, encode_json({}), limit_s=_PING_LIMIT_S, what="answer a ping"
                )
                self._tell_reopened(decode_json(answer).get("reopened"))
            except TokenError as e:
                worker.kill(e)
            except EncodingError:
                worker.kill()
            else:
                # What came meanwhile found no room beside the ping.
                self._changed()

    def _tell_reopened(self, times: object) -> None:
        if isinstance(times, int) and times > 0:
            self._log.warning("hsm.session_reopened", worker=self.name, times=times)


def _death_error(how: str) -> TokenError:
    return TokenError(
        f"hsm worker died ({how})",
        reason="hsm.worker_died",
        operation="run",
        cure=Cure.RESTART,
        kind=ErrorKind.UNAVAILABLE,
    )

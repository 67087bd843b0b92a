"""The signer's service: check against policy, write it down, sign, write down what became of it.

A signature leaves once what it is for is on the disk. Where the disk has room for that already, the
device signs while it is written.

What was let through is carried out whether or not its caller still waits: an intent that is in the
audit log gets its outcome.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from spire_hw._pb import hw_signer_pb2
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError, VerificationError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, spki_der
from spire_hw.rpc.service import Method, bind
from spire_hw.rpc.status import clip
from spire_hw.telemetry.metrics import status_of
from spire_hw_signer.admission import Caller, Gate, device_error, error_of
from spire_hw_signer.audit.log import Outcome
from spire_hw_signer.policy import (
    FOREIGN_KEY,
    MAX_BATCH,
    Denial,
    Purpose,
    Rate,
    Reason,
    check_form,
    check_options,
    check_purpose,
    check_type,
)
from spire_hw_signer.purpose import check_certificate, check_request, explain
from spire_hw_signer.rates import Buckets, InFlight
from spire_hw_signer.replay import Replay, ReuseError
from spire_hw_signer.tokenpurpose import check_token

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from spire_hw.aio.tasks import Tasks
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import KeySignature
    from spire_hw.rpc.service import Call
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_signer.audit.log import AuditLog, Begun, Intent, LogHead
    from spire_hw_signer.generating import Generating
    from spire_hw_signer.keys import HeldKey, OwnerKeys
    from spire_hw_signer.policy import Client, KeyRule, Owner
    from spire_hw_signer.steady import SteadyTime

_CALL_RATE: Final = Rate(10, 100)
_SIGNED: Final = ("sign",)
_MAX_SALT: Final = 512
_MAX_REPLAYS: Final = 256
# After so many more turns of the loop a device has been asked for a batch, and works already.
_ASKED: Final = 2
_PURPOSES: Final = {purpose.value: purpose for purpose in Purpose}
_HASHES: Final = {algorithm.value: algorithm for algorithm in HashAlgorithm}


@dataclass(slots=True)
class Answer:
    """What became of one item; `done` while nobody knows yet.

    Attributes:
        result: the message for the client, None before it is known.
        done: set once it is.
    """

    result: hw_signer_pb2.SignResult | None = None
    done: asyncio.Event | None = field(default_factory=asyncio.Event)

    def settle(self, result: hw_signer_pb2.SignResult) -> None:
        """Make it known."""
        self.result = result
        if self.done is not None:
            self.done.set()
            self.done = None


@dataclass(frozen=True, slots=True)
class Item:
    """What one item asks for, its form checked."""

    request_id: bytes
    key_id: str
    purpose: Purpose
    content: bytes
    options: SignOptions
    digest: bytes

    @property
    def same(self) -> object:
        """Return what a retry has in common with it."""
        return self.key_id, self.options, self.purpose, self.digest


@dataclass(frozen=True, slots=True)
class Work:
    """An item that was let through."""

    caller: Caller
    item: Item
    options: SignOptions
    rule: KeyRule
    keys: OwnerKeys
    held: HeldKey
    answer: Answer

    def intent(self) -> Intent:
        """Return what is written down of it."""
        item = self.item
        return self.caller.intent(
            f"Sign.{item.purpose.value}",
            request_id=item.request_id,
            key_id=item.key_id,
            generation=self.held.generation,
            fingerprint=self.held.info.fingerprint,
            hash_alg=item.options.hash.name.lower(),
            digest_sha256=hashlib.sha256(item.digest).hexdigest(),
        )


@dataclass(frozen=True, slots=True)
class _Made:
    """What the device made of an item.

    Attributes:
        result: the signature, or why there is none.
        latency_s: how long it took.
    """

    result: KeySignature | SpireHwError
    latency_s: float


class SignerService:
    """`spire_hw.signer.v1.Signer`."""

    def __init__(
        self,
        gate: Gate,
        owners: Callable[[], Mapping[Owner, OwnerKeys]],
        audit: AuditLog,
        generating: Generating,
        *,
        witness: Callable[[], tuple[bytes, bytes]],
        steady: SteadyTime,
        clock_fault: Callable[[], str],
        clock: Clock,
        tasks: Tasks,
        metrics: Metrics,
        log: Logger,
    ) -> None:
        """Make it.

        Args:
            gate: lets callers in.
            owners: the keys of each owner as they are now.
            audit: the audit log.
            generating: makes keys.
            witness: the last checkpoint, and the DER public key of those who sign it.
            steady: time for when a key was used.
            clock_fault: why the wall clock is not believed, "" while it is.
            clock: time for ends of certificates, rates and replays.
            tasks: for what outlives a call.
            metrics: takes counts.
            log: where failures of devices are told in full.
        """
        self._gate = gate
        self._owners = owners
        self._audit = audit
        self._generating = generating
        self._witness = witness
        self._steady = steady
        self._clock_fault = clock_fault
        self._clock = clock
        self._tasks = tasks
        self._metrics = metrics
        self._log = log
        self._buckets = Buckets()
        self._calls = Buckets()
        self._in_flight = InFlight()
        self._replays: dict[str, Replay[Answer]] = {}

    async def get_public_keys(self, request: Any, call: Call) -> Any:
        """List the caller's keys, after asking the device."""
        del request
        caller = self._gate.caller(call)
        self._take_turn(caller, "GetPublicKeys")
        try:
            held = await self._keys(caller).refresh()
        except SpireHwError as e:
            self._log.error("Keys cannot be listed", client=caller.client.identity, error=e.message)
            raise SpireHwError("the signer could not do it: its log tells why", kind=e.kind) from e
        mine = [one for one in held if caller.client.rule(one.info.key_id) is not None]
        return hw_signer_pb2.GetPublicKeysResponse(
            public_keys=[key_message(one) for one in mine], log_head=head_message(self._audit.head)
        )

    async def generate_key(self, request: Any, call: Call) -> Any:
        """Make a key, or the next generation of one."""
        caller = self._gate.caller(call)
        # What waits for its turn outlives its call: without a bound it would fill the memory.
        self._take_turn(caller, "GenerateKey")
        made = await self._generating.generate(
            lambda: self._gate.caller(call),
            self._keys(caller),
            request.request_id,
            request.key_id,
            request.key_type,
        )
        response = hw_signer_pb2.GenerateKeyResponse(log_head=head_message(self._audit.head))
        if isinstance(made, Denial):
            response.refusal.CopyFrom(refusal_message(made))
        else:
            response.public_key.CopyFrom(key_message(made))
        return response

    async def sign(self, request: Any, call: Call) -> Any:
        """Sign up to 64 items; nothing leaves that is not in the audit log."""
        caller = self._gate.caller(call)
        items = request.items
        if not 1 <= len(items) <= MAX_BATCH:
            denial = Denial(Reason.MALFORMED, f"a call signs 1 to {MAX_BATCH} items")
            self._gate.refuse(caller.intent("Sign"), denial)
            raise error_of(denial)
        keys = self._keys(caller)
        work: list[Work] = []
        answers = [self._admit(caller, keys, item, work) for item in items]
        if work:
            self._start(keys, work, call.deadline_s)
        return hw_signer_pb2.SignResponse(
            results=[await _settled(answer) for answer in answers],
            log_head=head_message(self._audit.head),
        )

    async def get_log_head(self, request: Any, call: Call) -> Any:
        """Return the end of the audit log and its last signed checkpoint."""
        del request
        self._take_turn(self._gate.caller(call), "GetLogHead")
        checkpoint, key = self._witness()
        return hw_signer_pb2.GetLogHeadResponse(
            log_head=head_message(self._audit.head), checkpoint=checkpoint, log_key=key
        )

    def _take_turn(self, caller: Caller, method: str) -> None:
        """Bound what is asked of the signer besides signatures (5)."""
        identity, now = caller.client.identity, self._clock.monotonic()
        denial = self._calls.take(identity, method, _CALL_RATE, None, now)
        if denial is not None:
            self._gate.refuse(caller.intent(method), denial)
            raise error_of(denial)

    def _keys(self, caller: Caller) -> OwnerKeys:
        keys = self._owners().get(caller.client.owner)
        if keys is None:
            raise SpireHwError("the client's keys are closed", kind=ErrorKind.UNAVAILABLE)
        return keys

    # -- one item ------------------------------------------------------------------------------

    def _admit(self, caller: Caller, keys: OwnerKeys, message: Any, work: list[Work]) -> Answer:
        """Check an item; what is let through is added to the work."""
        item = _read(message)
        if isinstance(item, Denial):
            return self._refuse(caller, message, item)
        replay, now = self._replay(caller), self._clock.monotonic()
        try:
            known = replay.find(item.request_id, item.same, now)
        except ReuseError:
            text = "the request id was used for something else"
            return self._refuse(caller, message, Denial(Reason.REPLAY, text))
        if known is not None:
            return known
        found = self._check(caller, keys, item, now)
        if isinstance(found, Denial):
            return self._refuse(caller, message, found)
        rule, held, options = found
        answer = Answer()
        replay.remember(item.request_id, item.same, now, answer)
        work.append(Work(caller, item, options, rule, keys, held, answer))
        return answer

    def _check(
        self, caller: Caller, keys: OwnerKeys, item: Item, now: float
    ) -> tuple[KeyRule, HeldKey, SignOptions] | Denial:
        """Check 3 to 6; what is let through is counted as under way."""
        client, key_id, options = caller.client, item.key_id, item.options
        rule = client.rule(key_id)
        if rule is None:
            return FOREIGN_KEY
        held = keys.find(key_id)
        if held is None:
            return Denial(Reason.NO_KEY, f'key "{key_id}" not found')
        key_type = held.info.key_type
        denial = (
            check_type(rule, key_type)
            or check_options(client, rule, key_type, options, len(item.digest))
            or self._buckets.take(client.identity, key_id, rule.rate, client.client_rate, now)
            or check_purpose(client, key_id, item.purpose)
        )
        if denial is not None:
            return denial
        try:
            urgent = self._judge(client, keys, held, item)
        except Exception as e:  # noqa: BLE001 - what cannot be judged is refused as what it is
            self._log.error("Unexpected error while judging what is to be signed", exc_info=e)
            urgent = Denial(_FAULTS[item.purpose], "it cannot be read")
        if isinstance(urgent, Denial):
            return urgent
        # Not before it is known what is urgent: there is room kept for that.
        if (denial := self._in_flight.enter(client, urgent=urgent)) is not None:
            return denial
        return rule, held, replace(options, urgent=True) if urgent else options

    def _judge(self, client: Client, keys: OwnerKeys, held: HeldKey, item: Item) -> Denial | bool:
        """Read what is to be signed and hold it against the policy (6); tell whether it is urgent."""
        purpose, content, options = item.purpose, item.content, item.options
        domain, now = client.owner.trust_domain, self._clock.now()
        if purpose in {Purpose.X509, Purpose.JWT} and (fault := self._clock_fault()):
            return Denial(Reason.CLOCK, fault)
        key = held.signing
        try:
            if purpose is Purpose.X509 and client.x509 is not None:
                return check_certificate(
                    content, options, key=key, trust_domain=domain, rule=client.x509, now=now
                )
            if purpose is Purpose.CSR:
                check_request(content, key=key, trust_domain=domain)
            elif purpose is Purpose.JWT and client.jwt is not None:
                kid = check_token(
                    content, options, key=key, trust_domain=domain, rule=client.jwt, now=now
                )
                keys.kids.check(kid, held.info.fingerprint)
        except (InvalidInputError, VerificationError) as e:
            return Denial(_FAULTS[purpose], explain(e))
        return purpose is Purpose.CSR

    def _refuse(self, caller: Caller, item: Any, denial: Denial) -> Answer:
        # What is not a key id has no place in the log's words.
        key_id = "" if denial.reason is Reason.MALFORMED else item.key_id
        intent = caller.intent("Sign", request_id=item.request_id[:16], key_id=key_id)
        self._gate.refuse(intent, denial)
        answer = Answer()
        answer.settle(hw_signer_pb2.SignResult(refusal=refusal_message(denial)))
        return answer

    def _replay(self, caller: Caller) -> Replay[Answer]:
        identity = caller.client.identity
        replay = self._replays.get(identity)
        if replay is None:
            while len(self._replays) >= _MAX_REPLAYS:
                del self._replays[next(iter(self._replays))]
            replay = self._replays[identity] = Replay(0.0)
        replay.window_s = self._gate.policy.replay_window.total_seconds()
        return replay

    # -- carrying out --------------------------------------------------------------------------

    def _start(self, keys: OwnerKeys, work: Sequence[Work], deadline_s: float | None) -> None:
        """Have work of one owner carried out, and written down meanwhile where nothing is first."""
        begun: asyncio.Future[Begun] | None = None
        is_due = keys.notes.use({one.item.key_id for one in work}, self._steady.now())
        loop = asyncio.get_running_loop()
        if not is_due and self._audit.reserve(len(work)):
            begun = loop.create_future()
        self._tasks.start("sign", self._carry_out(keys, work, begun, deadline_s))
        if begun is not None:
            loop.call_soon(self._write_down, work, begun, _ASKED)

    def _write_down(self, work: Sequence[Work], begun: asyncio.Future[Begun], turns: int) -> None:
        """Begin to write down what the device is asked for; who carries it out hears of it."""
        if turns:
            asyncio.get_running_loop().call_soon(self._write_down, work, begun, turns - 1)
            return
        try:
            begun.set_result(self._audit.begin(_intents(work), reserved=True))
        except Exception as e:  # noqa: BLE001 - it is raised where the answers are
            begun.set_exception(e)
            begun.exception()  # nobody waits for it any more when the signer ends

    async def _carry_out(
        self,
        keys: OwnerKeys,
        work: Sequence[Work],
        begun: asyncio.Future[Begun] | None,
        deadline_s: float | None,
    ) -> None:
        """Write down, sign, write down what became of it; every answer is settled at the end."""
        try:
            if begun is None:
                await keys.notes.save_uses({one.item.key_id for one in work})
                seqs = await self._audit.intend(_intents(work))
                made = await self._signed(work, deadline_s)
            else:
                made = await self._signed(work, deadline_s)
                # It is not ours to cancel: what is to be written down is, whatever becomes of us.
                seqs = await self._audit.on_disk(await asyncio.shield(begun))
            outcomes = [
                self._settle(one, seq, each)
                for one, seq, each in zip(work, seqs, made, strict=True)
            ]
            try:
                await asyncio.sleep(0)  # whoever waits gets the answer first
            finally:
                self._audit.conclude(outcomes)
        except SpireHwError as e:
            self._log.error("No signature left", error=e.message, items=len(work))
            for one in work:
                self._fail(one, e)
        finally:
            for one in work:
                self._in_flight.leave(one.caller.client)
                if one.answer.result is None:
                    self._fail(one, SpireHwError("internal error"))
                elif not one.answer.result.signature:
                    self._replay(one.caller).forget(one.item.request_id)

    async def _signed(self, work: Sequence[Work], deadline_s: float | None) -> list[_Made]:
        jobs = [self._sign(one, deadline_s) for one in work]
        # One alone needs no task of its own: that is a turn of the loop less for its caller.
        return await asyncio.gather(*jobs) if len(jobs) > 1 else [await jobs[0]]

    async def _sign(self, one: Work, deadline_s: float | None) -> _Made:
        began = self._clock.monotonic()
        made: KeySignature | SpireHwError
        try:
            async with asyncio.timeout(deadline_s):
                made = await one.keys.sign(one.held, one.item.digest, one.options)
        except TimeoutError:
            text = "the device did not sign before the deadline"
            made = SpireHwError(text, kind=ErrorKind.DEADLINE_EXCEEDED)
        except SpireHwError as e:
            made = e
        except Exception as e:  # noqa: BLE001 - the intent needs its outcome, the others theirs
            self._log.error("Unexpected error while signing", exc_info=e)
            made = SpireHwError("internal error")
        return _Made(made, self._clock.monotonic() - began)

    def _settle(self, one: Work, seq: int, made: _Made) -> Outcome:
        """Answer an item; its intent has this number and is on the disk."""
        result = made.result
        if not isinstance(result, SpireHwError):
            self._metrics.count(_SIGNED, labels=self._labels(one, None))
            one.answer.settle(
                hw_signer_pb2.SignResult(signature=result.signature, fingerprint=result.fingerprint)
            )
            return Outcome(seq, "done", latency_s=made.latency_s)
        self._metrics.count(_SIGNED, labels=self._labels(one, result))
        self._log.error(
            "Signing failed",
            key_id=one.item.key_id,
            client=one.caller.client.identity,
            error=result.message,
            record=seq,
        )
        told = device_error(result, seq)
        one.answer.settle(hw_signer_pb2.SignResult(refusal=failure_message(told)))
        return Outcome(seq, "failed", result.message, made.latency_s)

    @staticmethod
    def _labels(one: Work, error: SpireHwError | None) -> dict[str, str]:
        return {"key": one.rule.name, "status": status_of(error)}

    def _fail(self, one: Work, error: SpireHwError) -> None:
        self._replay(one.caller).forget(one.item.request_id)
        if one.answer.result is None:
            one.answer.settle(hw_signer_pb2.SignResult(refusal=failure_message(error)))


_FAULTS: Final = {
    Purpose.X509: Reason.TBS,
    Purpose.CSR: Reason.CSR,
    Purpose.JWT: Reason.JWT,
    Purpose.RAW: Reason.RAW,
}


def _intents(work: Sequence[Work]) -> list[Intent]:
    return [one.intent() for one in work]


async def _settled(answer: Answer) -> hw_signer_pb2.SignResult:
    if answer.done is not None:
        await answer.done.wait()
    if answer.result is None:
        raise SpireHwError("an item was not answered")
    return answer.result


def _read(item: Any) -> Item | Denial:
    """Return what an item asks for (2)."""
    denial = check_form(item.request_id, item.key_id)
    if denial is not None:
        return denial
    algorithm = _HASHES.get(item.hash)
    if algorithm is None:
        return Denial(Reason.MALFORMED, "hash is 5 (SHA-256), 6 (SHA-384) or 7 (SHA-512)")
    pss = item.HasField("pss")
    salt = item.pss.salt_length if pss else -1
    if not -1 <= salt <= _MAX_SALT:
        return Denial(Reason.MALFORMED, f"salt length is -1 to {_MAX_SALT}")
    kind = item.WhichOneof("purpose")
    if kind is None:
        return Denial(Reason.MALFORMED, "nothing is to be signed")
    content: bytes = getattr(item, kind)
    purpose = _PURPOSES[kind]
    digest = content if purpose is Purpose.RAW else algorithm.digest(content)
    options = _options(algorithm, pss, salt)
    return Item(item.request_id, item.key_id, purpose, content, options, digest)


_options: Final = lru_cache(maxsize=64)(SignOptions)


def signer_methods(service: SignerService) -> list[Method]:
    """Return the methods that clients call."""
    return bind(hw_signer_pb2.DESCRIPTOR.services_by_name["Signer"], service)


def key_message(held: HeldKey) -> hw_signer_pb2.PublicKey:
    """Return a key as the protocol has it."""
    return hw_signer_pb2.PublicKey(
        id=held.info.key_id,
        type=_key_type(held.info.key_type),
        pkix_data=spki_der(held.info.public_key),
        fingerprint=held.info.fingerprint,
    )


def _key_type(key_type: KeyType) -> Any:
    return key_type.value


def head_message(head: LogHead) -> hw_signer_pb2.LogHead:
    """Return the end of the log as the protocol has it."""
    return hw_signer_pb2.LogHead(seq=head.seq, hash=head.hash)


def refusal_message(denial: Denial) -> hw_signer_pb2.Refusal:
    """Return a refusal as the protocol has it."""
    return hw_signer_pb2.Refusal(
        code=denial.reason.kind.value,
        reason=denial.reason.word,
        message=clip(denial.message),
        retry_after_ms=min(int(denial.retry_after_s * 1000) + 1, 2**31)
        if denial.retry_after_s
        else 0,
    )


def failure_message(error: SpireHwError) -> hw_signer_pb2.Refusal:
    """Return a failure as the protocol has it."""
    return hw_signer_pb2.Refusal(
        code=error.kind.value, reason="device", message=clip(error.message)
    )

"""What operators may have done to a running signer, and how it is done: by order, in the log first.

Where the configuration names operators who have to agree, most actions need an order that enough of
them have signed; without, whoever may use the admin socket may have anything done. Either way the
audit log says so before it happens, refusals too, and what came of it afterwards.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotFoundError, NotReadyError, SpireHwError
from spire_hw.plugin.keymanager import KeyRetention
from spire_hw_signer.admission import ALARM
from spire_hw_signer.audit.record import Kind, cut, time_text
from spire_hw_signer.live import ORDER
from spire_hw_signer.orders import (
    Action,
    Order,
    OrderError,
    SignedOrder,
    parse_generation,
    parse_order,
    verify_order,
)
from spire_hw_signer.policyfile import parse_identity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_signer.audit.chain import LogHead
    from spire_hw_signer.audit.checkpoint import Checkpoints
    from spire_hw_signer.audit.log import AuditLog
    from spire_hw_signer.keys import OwnerKeys
    from spire_hw_signer.live import Live
    from spire_hw_signer.orders import Operators
    from spire_hw_signer.revocations import Revocations

_NONCE_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Done:
    """What an action came to.

    Attributes:
        action: which.
        target: to what.
        message: what was done, in words.
        head: the end of the audit log, with it.
    """

    action: Action
    target: str
    message: str
    head: LogHead


class Actions:
    """Carries them out, one at a time.

    Args:
        audit: the audit log.
        checkpoints: of it; knows whether the clock is believed.
        live: policy and keys.
        revocations: who is shut out.
        operators: who has to agree.
        anchor: has the clock of rates and budgets take the wall clock for right.
        clock: the time that orders expire by.
        metrics: counts refused orders as alarms.
        log: where it is told as well.
    """

    def __init__(
        self,
        audit: AuditLog,
        checkpoints: Checkpoints,
        live: Live,
        revocations: Revocations,
        operators: Operators,
        *,
        anchor: Callable[[], None],
        clock: Clock,
        metrics: Metrics,
        log: Logger,
    ) -> None:
        self.operators = operators
        self._audit = audit
        self._checkpoints = checkpoints
        self._live = live
        self._revocations = revocations
        self._anchor = anchor
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._one = asyncio.Lock()

    async def order(self, data: bytes, by: str) -> Done:
        """Carry out an order file.

        Args:
            data: the file.
            by: who handed it in, in words.

        Raises:
            EncodingError: it is no order file.
            OrderError: it is refused.
            SpireHwError: it was carried out as far as that went.
        """
        signed = parse_order(data)
        async with self._one:
            try:
                names = await self._verify(signed)
            except OrderError as e:
                await self._refuse(signed.order, e, by)
                raise
            return await self._carry_out(signed.order, (*names, by))

    async def _verify(self, signed: SignedOrder) -> tuple[str, ...]:
        fault = self._checkpoints.clock_fault
        if fault and signed.order.action is not Action.CLOCK_ACCEPT:
            raise OrderError("clock", f"its expiry cannot be judged: {fault}")
        return verify_order(
            signed,
            self.operators,
            now=self._clock.now(),
            log=self._audit.log_id,
            hash_at=await self._audit.hash_at(signed.order.head.seq),
            is_used=self._audit.is_used(signed.order.nonce),
        )

    async def direct(self, action: Action, target: str, comment: str, by: str) -> Done:
        """Carry out an action without an order file.

        Args:
            action: what.
            target: to what.
            comment: why.
            by: who wants it, in words.

        Raises:
            OrderError: it needs an order.
            SpireHwError: it was carried out as far as that went.
        """
        order = Order(
            action=action,
            target=target,
            expires=self._clock.now(),
            log=self._audit.log_id,
            head=self._audit.head,
            nonce=secrets.token_hex(_NONCE_BYTES),
            comment=comment,
        )
        async with self._one:
            if self.operators.need_order(action):
                error = OrderError(
                    "no_order",
                    f"{action.value} needs an order signed by {self.operators.describe()}; make one"
                    " with `spire-hw-signer order create`",
                )
                await self._refuse(order, error, by)
                raise error
            return await self._carry_out(order, (by,))

    async def _refuse(self, order: Order, error: OrderError, by: str) -> None:
        self._metrics.count(ALARM, labels={"reason": error.code})
        self._log.error("Signer alarm: order refused", error=error.message, by=by)
        await self._note(order, (by,), error.code)

    async def _note(self, order: Order, names: tuple[str, ...], refusal: str) -> None:
        body = {
            "nonce": order.nonce,
            "action": order.action.value,
            "target": cut(order.target),
            "expires": time_text(order.expires),
            "operators": [cut(name) for name in names],
            "comment": cut(order.comment),
            "head": order.head.hash.hex(),
            "at": order.head.seq,
            "accepted": int(not refusal),
            "reason": refusal,
        }
        await self._audit.record(Kind.ORDER, body)

    async def _carry_out(self, order: Order, names: tuple[str, ...]) -> Done:
        do = self._doing(order)
        await self._note(order, names, "")
        fields = {"action": order.action.value, "target": order.target, "nonce": order.nonce}
        try:
            message = await do()
        except SpireHwError as e:
            self._audit.note("order_failed", {**fields, "error": e.message})
            self._log.error("Order failed", **fields, error=e.message)
            raise
        head = self._audit.note("order_done", {**fields, "message": message})
        self._log.warning("Order carried out", **fields, by=", ".join(names), message=message)
        return Done(order.action, order.target, message, head)

    def _doing(self, order: Order) -> Callable[[], Awaitable[str]]:
        target = order.target
        match order.action:
            case Action.KEY_RESTORE:
                return self._on_key(target, self._restore)
            case Action.KEY_DESTROY:
                return self._on_key(target, self._destroy)
            case Action.CLIENT_REVOKE:
                return self._on_client(target, revoked=True)
            case Action.CLIENT_UNREVOKE:
                return self._on_client(target, revoked=False)
            case Action.POLICY_RELOAD:
                return lambda: self._reload(target)
            case Action.CLOCK_ACCEPT:
                return self._accept_clock
            case Action.LOG_SEAL:
                raise NotReadyError(
                    "the audit log holds and is being written: there is nothing to seal"
                )

    def _on_key(
        self, target: str, do: Callable[[OwnerKeys, KeyRetention, str, int], Awaitable[str]]
    ) -> Callable[[], Awaitable[str]]:
        owner, key_id, generation = parse_generation(target)
        keys = self._owners().get(owner)
        if keys is None:
            known = ", ".join(self._owners()) or "nobody"
            raise NotFoundError(f"the policy names no keys of {owner}; it names those of {known}")
        manager = keys.manager
        if not isinstance(manager, KeyRetention):
            raise NotReadyError(f"the KeyManager of {owner} retains no keys")
        return lambda: do(keys, manager, key_id, generation)

    def _owners(self) -> Mapping[str, OwnerKeys]:
        return {str(owner): keys for owner, keys in self._live.owners.items()}

    async def _restore(
        self, keys: OwnerKeys, manager: KeyRetention, key_id: str, generation: int
    ) -> str:
        async with keys.changing:
            before = keys.find(key_id)
            info = await manager.restore_key(key_id, generation)
            keys.notes.unused(key_id)
            keys.take(info)
        was = "none" if before is None else before.info.fingerprint
        return f"{key_id} is {info.fingerprint} again, it was {was}"

    async def _destroy(
        self, keys: OwnerKeys, manager: KeyRetention, key_id: str, generation: int
    ) -> str:
        async with keys.changing:
            await manager.destroy_retained(key_id, generation)
        return f"generation {generation} of {key_id} is destroyed"

    def _on_client(self, target: str, *, revoked: bool) -> Callable[[], Awaitable[str]]:
        # Callers are compared with the one form of a name: another spelling would shut nobody out.
        identity = parse_identity(target)
        return lambda: self._revoke(identity, revoked=revoked)

    async def _revoke(self, identity: str, *, revoked: bool) -> str:
        if not revoked and identity in self._live.policy.revoked:
            raise NotReadyError(f"the policy file itself revokes {identity}")
        changed = await self._revocations.change(identity, revoked=revoked)
        what = "revoked" if revoked else "not revoked any more"
        message = f"{identity} is {what}" if changed else f"{identity} was {what} already"
        if identity in self._live.policy.clients:
            return message
        return f"{message}; the policy names no such client: look for a misspelling"

    async def _reload(self, target: str) -> str:
        before = self._live.policy.hash
        if not await self._live.reload(target, by=ORDER):
            raise NotReadyError(f"what was in force stays: {self._live.fault}")
        after = self._live.policy.hash
        return "the policy is the same" if after == before else f"policy {after} is in force"

    async def _accept_clock(self) -> str:
        self._checkpoints.accept_clock()
        self._anchor()
        now = self._clock.now().timestamp()
        for keys in list(self._live.owners.values()):
            async with keys.changing:
                await keys.notes.believe(now)
        return f"the clock is right: {time_text(self._clock.now())}"

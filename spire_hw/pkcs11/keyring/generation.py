"""Key generation that may outlive its caller.

A token can take longer over an RSA-4096 key than a call may last, and a caller that gave up asks
again. The work goes on without it: the same wish made again takes over what is under way or done,
so that no retry leaves one more key behind. Calls that are still waited for take turns.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import ErrorKind, InvalidInputError
from spire_hw.key import KeyType, PublicKey, key_type_of
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.evidence import Evidence, read_evidence
from spire_hw.pkcs11.inventory.inventory import read_material
from spire_hw.pkcs11.keys import EC_PARAMS, PublicMaterial, is_ec, modulus_bits, public_key_of
from spire_hw.pkcs11.wire import ID_TAKEN, Kind, pack_bytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from spire_hw.aio.tasks import Tasks
    from spire_hw.pkcs11.inventory.entry import Entry
    from spire_hw.pkcs11.keyring.disposal import Disposal
    from spire_hw.pkcs11.pool.pool import Pool
    from spire_hw.plugin.keymanager import KeyInfo

TASK: Final = "hsm-generate-"  # and the key id: what the tasks are called
_KEPT_S: Final = 300.0
_IDS: Final = 3
_OWNER_PARTS: Final = 3  # of a label


@dataclass(frozen=True, slots=True)
class Made:
    """A new pair as the token describes it."""

    cka_id: bytes
    public_key: PublicKey
    evidence: Evidence


class Making:
    """One pair to be generated.

    Args:
        pool: the workers.
        key_type: its type.
        fresh_id: draws a CKA_ID.
        label: its CKA_LABEL.

    Attributes:
        cka_id: the CKA_ID drawn last.
    """

    def __init__(
        self, pool: Pool, key_type: KeyType, fresh_id: Callable[[], bytes], label: str
    ) -> None:
        self.pool = pool
        self.key_type = key_type
        self.label = label
        self.cka_id = fresh_id()
        self._fresh_id = fresh_id

    async def generate(self, disposal: Disposal) -> Made:
        """Generate the pair.

        When the token was lost meanwhile or has no room, what waits for disposal is destroyed,
        then whatever the first try left, and it is tried once more. When the CKA_ID is taken, which
        only the token may know, another one is drawn.

        Raises:
            TokenError: the token refused, or made something else than was asked for; ABORTED when
                every id that was drawn is taken.
        """
        for _ in range(_IDS - 1):
            try:
                return await self._generate(disposal)
            except TokenError as e:
                if e.reason != ID_TAKEN:
                    raise
            self.cka_id = self._fresh_id()
        return await self._generate(disposal)

    async def _generate(self, disposal: Disposal) -> Made:
        try:
            return await self._ask()
        except TokenError as e:
            if not e.retryable and e.kind is not ErrorKind.RESOURCE_EXHAUSTED:
                raise
        await disposal.now()
        place = {"id": pack_bytes(self.cka_id), "label": self.label}
        await self.pool.ask(Kind.DESTROY, place, what="destroy key pair")
        try:
            return await self._ask()
        except TokenError as e:
            if e.kind is not ErrorKind.RESOURCE_EXHAUSTED:
                raise
            raise await self._full(e) from e

    async def _full(self, cause: TokenError) -> TokenError:
        listing = await self.pool.ask(Kind.LIST, {"prefix": ""}, what="list objects")
        labels = [str(o.get("label")) for name in ("halves", "data") for o in listing.get(name, ())]
        prefix = ":".join(self.label.split(":")[:_OWNER_PARTS]) + ":"
        why = cause.message.removeprefix(f"token {cause.device}: ").partition(";")[0]
        ours = sum(label.startswith(prefix) for label in labels)
        return TokenError(
            f"token full: {ours} objects of ours, {len(labels) - ours} others "
            f"({why}); make room on it",
            reason=cause.reason,
            operation=cause.operation,
            device=cause.device,
            code=cause.code,
            kind=cause.kind,
        )

    async def _ask(self) -> Made:
        if is_ec(self.key_type):
            wanted: dict[str, Any] = {"ec_params": pack_bytes(EC_PARAMS[self.key_type])}
        else:
            wanted = {"bits": modulus_bits(self.key_type)}
        fields = {"type": wanted, "id": pack_bytes(self.cka_id), "label": self.label}
        described = await self.pool.ask(
            Kind.GENERATE, fields, what="generate key pair", limit_s=self.pool.limits.generate_s
        )
        try:
            public_key = self._public_key(read_material(described.get("material")))
        except InvalidInputError as e:
            raise TokenError(
                f"generated key is unusable: {e.message}",
                reason="hsm.key_unreadable",
                operation="generate key pair",
                device=self.pool.facts.device,
            ) from e
        return Made(self.cka_id, public_key, read_evidence(described))

    def _public_key(self, material: PublicMaterial | None) -> PublicKey:
        if material is None:
            raise InvalidInputError("the token does not show its public half")
        public_key = public_key_of(material)
        if key_type_of(public_key) is not self.key_type:
            raise InvalidInputError(f"it is {key_type_of(public_key).config_name}")
        return public_key


@dataclass(slots=True, eq=False)
class _Running:
    key_id: str
    key_type: KeyType
    task: asyncio.Task[Entry]
    has_caller: bool = True
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def can_be_taken_over(self, key_type: KeyType) -> bool:
        if self.has_caller or self.key_type is not key_type:
            return False
        return not self.task.done() or _result(self.task) is not None


class Generation:
    """Generations under way, at most one for each key id."""

    def __init__(
        self,
        tasks: Tasks,
        make: Callable[[str, KeyType], Coroutine[Any, Any, Entry]],
        abandon: Callable[[Entry], None],
    ) -> None:
        self._tasks = tasks
        self._make = make
        self._abandon = abandon
        self._running: dict[str, _Running] = {}

    async def run(
        self, key_id: str, key_type: KeyType, commit: Callable[[Entry], Awaitable[KeyInfo]]
    ) -> KeyInfo:
        """Generate a key and commit it, or take over what an earlier caller left.

        Raises:
            SpireHwError: what `make` or `commit` raise.
        """
        running = await self._turn(key_id, key_type)
        try:
            entry = await asyncio.shield(running.task)
        except asyncio.CancelledError:
            if running.task.done():
                self._drop(running)
            else:
                running.has_caller = False
                running.task.add_done_callback(lambda _: self._keep_for_a_while(running))
            raise
        except BaseException:
            self._end(running)
            raise
        try:
            return await asyncio.shield(self._tasks.spawn("hsm-commit", _commit(commit, entry)))
        finally:
            self._end(running)

    async def _turn(self, key_id: str, key_type: KeyType) -> _Running:
        while (running := self._running.get(key_id)) is not None:
            if running.can_be_taken_over(key_type):
                running.has_caller = True
                return running
            if running.has_caller:
                await running.over.wait()
            else:
                await asyncio.wait({running.task})
                if not running.has_caller:
                    self._drop(running)
        task = self._tasks.spawn(TASK + key_id, self._make(key_id, key_type))
        running = self._running[key_id] = _Running(key_id, key_type, task)
        return running

    def _keep_for_a_while(self, running: _Running) -> None:
        if _result(running.task) is None:
            self._drop(running)
            return
        asyncio.get_running_loop().call_later(
            _KEPT_S, lambda: None if running.has_caller else self._drop(running)
        )

    def _drop(self, running: _Running) -> None:
        if running.over.is_set():
            return
        self._end(running)
        entry = _result(running.task)
        if entry is not None:
            self._abandon(entry)

    def _end(self, running: _Running) -> None:
        running.over.set()
        if self._running.get(running.key_id) is running:
            del self._running[running.key_id]


def _result(task: asyncio.Task[Entry]) -> Entry | None:
    if not task.done() or task.cancelled() or task.exception() is not None:
        return None
    return task.result()


async def _commit(commit: Callable[[Entry], Awaitable[KeyInfo]], entry: Entry) -> KeyInfo:
    return await commit(entry)

"""The keys of one host on several tokens.

Each token has its own keyring and its own note on this host, so that one that is away is known by what
was on it: its keys are reported and cannot sign, they are never taken for lost. What counts as one key,
and where a new one goes, is decided by `placement`; how a single token is used, by `keyring`.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import (
    ErrorKind,
    InvalidInputError,
    LimitError,
    NotFoundError,
    SpireHwError,
)
from spire_hw.pkcs11.cluster.placement import (
    Current,
    Mode,
    current_keys,
    missing_copies,
    order_for_generation,
    stranded,
    superseded,
)
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from spire_hw.clock import Clock
    from spire_hw.key import KeyType, SignOptions
    from spire_hw.log import Logger
    from spire_hw.pkcs11.cluster.member import Member, Open
    from spire_hw.pkcs11.inventory.entry import Entry
    from spire_hw.pkcs11.keyring.importing import Import
    from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature, RetainedKey

_PROBE_S: Final = 5.0
# What keeps a token from making keys, and says nothing of those it has.
_ABOUT_KEYS: Final = frozenset({ErrorKind.FAILED_PRECONDITION, ErrorKind.ABORTED})


class Cluster:
    """The KeyManager contract over several tokens.

    Args:
        members: the tokens, in the order of the configuration.
        mode: what they are to each other.
        lost_after_s: seconds a token may be away before its keys count as stranded.
        single_copies: with the same keys on each, whether a key may be made although it will be on
            one token alone until the operator copies it.
        floors: by key id, generations that were on tokens which are configured no more.
        imports: keys made elsewhere, on whichever token each is; none is generated in their place.
    """

    def __init__(
        self,
        members: Sequence[Member],
        mode: Mode,
        *,
        lost_after_s: float,
        single_copies: bool,
        floors: Mapping[str, int],
        imports: Iterable[Import] = (),
        clock: Clock,
        log: Logger,
    ) -> None:
        self._members = {member.name: member for member in members}
        self._mode = mode
        self._lost_after_s = lost_after_s
        self._single_copies = single_copies
        self._floors = floors
        self._imports = {wanted.key_id: wanted for wanted in imports}
        self._clock = clock
        self._log = log
        self._known: dict[str, str] = {}
        self._keys: dict[str, Current] = {}
        self._seen: list[object] = []
        self._turns: dict[str, asyncio.Lock] = {}
        self._begun: dict[str, str] = {}
        self._told: dict[str, tuple[str, ...]] = {}
        self._tasks = Tasks(self._on_task_failure)

    async def open(self) -> None:
        """Open the tokens that are there; one that was never open here has to be.

        Raises:
            TokenError: no token can be opened, one is not what it has to be, or two have different
                keys in one place.
        """
        for member in self._members.values():
            await member.load_note()
        self._table()
        new = {name for name, member in self._members.items() if not member.was_seen}
        try:
            openings = [member.open(self._known) for member in self._members.values()]
            results = await asyncio.gather(*openings, return_exceptions=True)
            _raise_other(results)
            self._check_opened(new)
            self._table()
            await self._reconcile()
        except BaseException:
            await self.close()
            raise
        for member in self._members.values():
            self._tasks.start(f"hsm-token-{member.name}", self._watch(member))

    def _check_opened(self, new: set[str]) -> None:
        problems = {n: m.problem for n, m in self._members.items() if m.problem is not None}
        for name, problem in problems.items():
            if name in new:
                raise _start_error(name, problem, "it was never open here, so it has to be now")
            if len(problems) == len(self._members):
                raise _start_error(name, problem, "no token of several can be opened")
        for name, problem in problems.items():
            self._log.error("hsm.token_away", hsm=name, error=problem.message)

    async def close(self) -> None:
        """End every worker."""
        await self._tasks.close()
        await asyncio.gather(*(member.close() for member in self._members.values()))

    @property
    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers that run."""
        opened = [m.opened for m in self._members.values() if m.opened is not None]
        return [pid for one in opened for pid in one.pool.worker_pids]

    async def generate(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a key on the token that suits best, or on the next one when that fails."""
        if key_id in self._imports:
            raise self._imports[key_id].taken()
        async with self._turns.setdefault(key_id, asyncio.Lock()):
            self._check_copies(key_id)
            failure: SpireHwError | None = None
            for name in self._order(key_id):
                member = self._members[name]
                self._begun[key_id] = name
                try:
                    info = await member.keyring().generate(key_id, key_type, self._above(key_id))
                except SpireHwError as e:
                    del self._begun[key_id]
                    if not member.is_to_blame(e):
                        raise
                    self._log.warning("hsm.generate_failed", hsm=name, error=e.message)
                    failure = failure or e
                    if e.kind not in _ABOUT_KEYS:
                        member.failed(e)
                    continue
                del self._begun[key_id]
                self._log.info("hsm.key_placed", hsm=name, key_id=key_id, mode=self._mode.value)
                self._tasks.start("hsm-reconcile", self._reconcile())
                return info
            raise failure or self._none_usable("generate key pair")

    def get(self, key_id: str) -> Entry:
        """Return the current key of an id, be its token there or not.

        Raises:
            InvalidInputError: `key id is required`.
            NotFoundError: there is none.
        """
        return self._current(key_id).entry

    async def all(self) -> list[Entry]:
        """Return every key after asking the tokens that are there; of the others, what is known.

        Raises:
            TokenError: no token can be asked.
        """
        await asyncio.gather(*(self._ask(member) for member in self._members.values()))
        if all(member.problem is not None for member in self._members.values()):
            raise self._none_usable("list keys")
        return [key.entry for key in self._table().values()]

    async def _ask(self, member: Member) -> None:
        try:
            await member.keyring().all()
        except SpireHwError as e:
            member.failed(e)

    async def sign(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Sign a digest on the first token that has the key and can."""
        key = self._current(key_id)
        holders = [self._members[name] for name in key.holders]
        # One that failed is asked after the others: it may be back, and nobody else has the key.
        holders.sort(key=lambda m: m.problem is not None)
        failure: SpireHwError | None = None
        crowded: LimitError | None = None
        for member in holders:
            if member.opened is None:
                continue
            try:
                made = await member.opened.keyring.sign(key_id, digest, options)
            except LimitError as e:
                # Nothing is wrong with it, but a copy may have room.
                crowded = e
                continue
            except SpireHwError as e:
                if not member.is_to_blame(e):
                    raise
                member.failed(e)
                failure = e
                continue
            if member.problem is not None:
                member.healed()
            return made
        raise crowded or self._stranded(key_id, key, failure)

    async def evidence(self, key_id: str) -> KeyEvidence:
        """Return what the first token that has a key says about it now."""
        key = self._current(key_id)
        failure: SpireHwError | None = None
        for name in key.holders:
            try:
                return await self._members[name].keyring().evidence(key_id)
            except SpireHwError as e:
                failure = e
        raise self._stranded(key_id, key, failure)

    def retained(self) -> list[RetainedKey]:
        """Return the replaced generations that are kept on tokens that are open, oldest first."""
        opened = [m.opened for m in self._members.values() if m.opened is not None]
        return sorted((k for one in opened for k in one.keyring.retained()), key=lambda k: k.until)

    async def restore(self, key_id: str, generation: int) -> KeyInfo:
        """Make a kept generation current again, on every open token that has it."""
        async with self._turns.setdefault(key_id, asyncio.Lock()):
            first, *copies = self._keepers(key_id, generation)
            above = self._above(key_id) + 1
            info = await first.keyring().restore(key_id, generation, above)
            for member in copies:
                try:
                    await member.keyring().restore(key_id, generation, above)
                except SpireHwError as e:
                    self._log.warning("hsm.restore_failed", hsm=member.name, error=e.message)
            await self._reconcile()
            return info

    async def destroy_retained(self, key_id: str, generation: int) -> None:
        """Destroy a kept generation before its time, on every open token that has it."""
        for member in self._keepers(key_id, generation):
            await member.keyring().destroy_retained(key_id, generation)

    def health(self) -> DeviceHealth:
        """Return how well keys can be used, as last seen."""
        standings = [member.standing() for member in self._members.values()]
        worse = [s.health for s in standings if s.health.health is not KeyHealth.GOOD]
        if len(worse) == len(standings) and not any(s.is_usable for s in standings):
            return worse[0]
        if worse:
            return DeviceHealth(KeyHealth.DEGRADED, worse[0].reason, worse[0].message)
        if self._mode is Mode.SAME_KEYS:
            for key_id, lacking in missing_copies(standings, self._table()).items():
                return DeviceHealth(
                    KeyHealth.DEGRADED, "hsm.single_copy", self._copy_words(key_id, lacking)
                )
        return DeviceHealth(KeyHealth.GOOD)

    def stranded_keys(self) -> dict[str, DeviceHealth]:
        """Return keys whose tokens are lost, while keys can be made on another one."""
        standings = [member.standing() for member in self._members.values()]
        found = {}
        for key_id, holders in stranded(standings, self._table()).items():
            lost = [self._members[name] for name in holders]
            if all(self._is_lost(member) for member in lost):
                away = lost[0].away()
                found[key_id] = DeviceHealth(KeyHealth.DOWN, away.reason, away.message)
        return found

    def _is_lost(self, member: Member) -> bool:
        # One that could not be opened at the start has been waited for already.
        return member.opened is None or member.away_s() >= self._lost_after_s

    def _table(self) -> dict[str, Current]:
        """Return the current keys; worked out anew when a token's keys have changed."""
        seen: list[object] = [member.keys for member in self._members.values()]
        if len(seen) != len(self._seen) or any(
            a is not b for a, b in zip(seen, self._seen, strict=True)
        ):
            standings = [member.standing() for member in self._members.values()]
            self._keys = current_keys(standings, self._known)
            self._known = {key_id: key.entry.fingerprint for key_id, key in self._keys.items()}
            self._seen = seen
        return self._keys

    def _current(self, key_id: str) -> Current:
        key = self._table().get(key_id)
        if key is None:
            if not key_id:
                raise InvalidInputError("key id is required")
            raise NotFoundError(f'key "{key_id}" not found')
        return key

    def _above(self, key_id: str) -> int:
        key = self._table().get(key_id)
        return max(self._floors.get(key_id, 0), 0 if key is None else key.rank)

    def _order(self, key_id: str) -> list[str]:
        standings = [member.standing() for member in self._members.values()]
        order = order_for_generation(key_id, standings, self._table(), self._mode)
        begun = self._begun.get(key_id)
        if begun in order:
            # An earlier caller gave up on a generation there, which this one takes over.
            order.remove(begun)
            order.insert(0, begun)
        return order

    def _check_copies(self, key_id: str) -> None:
        if self._mode is Mode.SPREAD or self._single_copies:
            return
        raise TokenError(
            f'key "{key_id}" would be on one token of {len(self._members)} only, which '
            "allow_single_copy = false forbids: make it with the devices' own means and import it",
            reason="hsm.single_copy",
            operation="generate key pair",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    def _keepers(self, key_id: str, generation: int) -> list[Member]:
        """Return the open tokens that keep a generation; all have the key that the first one has."""
        found = [
            (member, kept.info.fingerprint)
            for member in self._members.values()
            for kept in (() if member.opened is None else member.opened.keyring.retained())
            if kept.info.key_id == key_id and kept.generation == generation
        ]
        if not found:
            raise NotFoundError(f'generation {generation} of key "{key_id}" is not retained')
        return [member for member, fingerprint in found if fingerprint == found[0][1]]

    def _stranded(self, key_id: str, key: Current, failure: SpireHwError | None) -> SpireHwError:
        if failure is None:
            failure = self._members[key.holders[0]].away()
        names, late = ", ".join(key.holders), ErrorKind.DEADLINE_EXCEEDED
        return TokenError(
            f'key "{key_id}" is on token {names} only, which cannot be used now: {failure.message}',
            reason="hsm.key_stranded",
            operation="sign",
            device=names,
            kind=late if failure.kind is late else ErrorKind.UNAVAILABLE,
        )

    def _none_usable(self, what: str) -> TokenError:
        problems = [m.problem.message for m in self._members.values() if m.problem is not None]
        return TokenError(
            f"no token can be used: {'; '.join(problems)}",
            reason="hsm.no_token",
            operation=what,
            cure=Cure.RESTART,
            kind=ErrorKind.UNAVAILABLE,
        )

    async def _watch(self, member: Member) -> None:
        while True:
            await self._clock.sleep(_PROBE_S)
            await member.probe(self._known)
            await self._reconcile()

    async def _reconcile(self) -> None:
        """Have every open token end up with what counts: copies taken into use, older keys given up.

        What cannot be done for one key on one token is told, and done for the others.
        """
        try:
            if self._mode is Mode.SAME_KEYS:
                await self._adopt_copies()
            standings = [member.standing() for member in self._members.values()]
            older = superseded(standings, self._table())
        except SpireHwError as e:
            self._log.warning("hsm.tokens_differ", error=e.message)
            return
        standings_of = {standing.name: standing for standing in standings}
        for name, key_id in older:
            opened = self._usable(name)
            if opened is not None:
                fingerprint = standings_of[name].keys[key_id].entry.fingerprint
                with self._told_of(name, key_id):
                    await opened.keyring.drop(key_id, fingerprint)

    def _usable(self, name: str) -> Open | None:
        member = self._members[name]
        return member.opened if member.problem is None else None

    @contextmanager
    def _told_of(self, name: str, key_id: str) -> Iterator[None]:
        try:
            yield
        except SpireHwError as e:
            self._log.warning("hsm.tokens_differ", hsm=name, key_id=key_id, error=e.message)

    async def _adopt_copies(self) -> None:
        standings = [member.standing() for member in self._members.values()]
        lacking = missing_copies(standings, self._table())
        for key_id, names in lacking.items():
            fingerprint = self._table()[key_id].entry.fingerprint
            for name in names:
                opened = self._usable(name)
                if opened is not None:
                    with self._told_of(name, key_id):
                        await opened.keyring.adopt_copy(key_id, fingerprint)
        left = missing_copies(standings, self._table())
        left = {k: n for k, n in left.items() if self._told.get(k) != n}
        for key_id, names in left.items():
            self._log.warning("hsm.single_copy", copies=self._copy_words(key_id, names))
        self._told.update(left)

    def _copy_words(self, key_id: str, lacking: Sequence[str]) -> str:
        total = len(self._members)
        return (
            f'key "{key_id}" is on {total - len(lacking)} of {total} tokens, {", ".join(lacking)} '
            f"lacks it: copy it with the device's own tool"
        )

    def _on_task_failure(self, name: str, error: BaseException) -> None:
        message = error.message if isinstance(error, SpireHwError) else type(error).__name__
        self._log.error("hsm.task_failed", task=name, error=message)


def _raise_other(results: Sequence[BaseException | None]) -> None:
    """Raise what is no error of a token."""
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, SpireHwError):
            raise result


def _start_error(name: str, problem: SpireHwError, why: str) -> TokenError:
    reason = problem.reason if isinstance(problem, TokenError) else "hsm.token_away"
    return TokenError(
        f'token "{name}": {problem.message}; {why}',
        reason=reason,
        operation="open token",
        device=name,
        cure=Cure.OPERATOR,
        kind=problem.kind,
    )

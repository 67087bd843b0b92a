"""One of several tokens: opened when it is there, tried again when it was not, judged by what it does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.key import SignOptions, default_hash, key_type_of, parse_spki, spki_der
from spire_hw.pkcs11.cluster.placement import Held, Standing
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.entry import Entry
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth, KeyInfo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.labels import Owner
    from spire_hw.pkcs11.keyring.keyring import Keyring
    from spire_hw.pkcs11.keyring.state import State, StateFile
    from spire_hw.pkcs11.pool.pool import Pool

_CHECK: Final = b"spire-hw token health check\0"
# What says something about the request rather than about the token.
_CALLERS: Final = frozenset(
    {
        ErrorKind.INVALID_ARGUMENT,
        ErrorKind.NOT_FOUND,
        ErrorKind.RESOURCE_EXHAUSTED,
        ErrorKind.UNIMPLEMENTED,
    }
)


@dataclass(frozen=True, slots=True)
class Open:
    """An open token: its workers and its keys."""

    pool: Pool
    keyring: Keyring

    async def close(self) -> None:
        """End both."""
        await self.pool.close()
        await self.keyring.close()


class Member:
    """A token among others.

    Args:
        name: what the configuration calls it.
        owner: whose keys.
        file: this host's note of the keys on it.
        opener: opens it, given the key ids that any token has; what it raises is why that cannot be done now.
        reopen_s: seconds between two tries to open it while it fails; each costs the device a login.

    Attributes:
        name: as given.
        opened: the token, None as long as it could not be opened.
    """

    def __init__(
        self,
        name: str,
        owner: Owner,
        file: StateFile,
        opener: Callable[[Collection[str]], Awaitable[Open]],
        *,
        reopen_s: float,
        clock: Clock,
        log: Logger,
    ) -> None:
        self.name = name
        self.opened: Open | None = None
        self._owner = owner
        self._file = file
        self._opener = opener
        self._reopen_s = reopen_s
        self._next_try = clock.monotonic()
        self._clock = clock
        self._log = log
        self._note: State | None = None
        self._keys: dict[str, Held] = {}
        self._was_seen = False
        self._problem: SpireHwError | None = None
        self._since = clock.monotonic()

    @property
    def was_seen(self) -> bool:
        """Tell whether this host had the token open before."""
        return self._was_seen

    @property
    def problem(self) -> SpireHwError | None:
        """Return why the token cannot be used now."""
        return self._problem

    def away_s(self) -> float:
        """Return for how many seconds it could not be used."""
        return 0.0 if self._problem is None else self._clock.monotonic() - self._since

    async def load_note(self) -> None:
        """Read what this host knows of the token's keys.

        Raises:
            TokenError: FAILED_PRECONDITION, the note cannot be read.
        """
        note = await asyncio.to_thread(self._file.load)
        self._was_seen = bool(note.token_serial)
        self._use(note)

    async def open(self, key_ids: Collection[str]) -> None:
        """Open the token.

        Args:
            key_ids: what keys are called on any of the tokens; a label may hold a hash of it only.

        Raises:
            SpireHwError: it cannot be opened now.
        """
        self._next_try = self._clock.monotonic() + self._reopen_s
        try:
            opened = await self._opener(key_ids)
        except SpireHwError as e:
            self.failed(e)
            raise
        before, self.opened = self.opened, opened
        self._was_seen = True
        self.healed()
        if before is not None:
            await before.close()

    async def close(self) -> None:
        """End the workers; the token can be opened again."""
        opened, self.opened = self.opened, None
        if opened is not None:
            await opened.close()

    def keyring(self) -> Keyring:
        """Return the keys of the open token.

        Raises:
            TokenError: UNAVAILABLE, it is not open.
        """
        if self.opened is None:
            raise self.away()
        return self.opened.keyring

    def away(self) -> TokenError:
        """Return the error that says that the token cannot be used, and why."""
        why = "it is not open yet" if self._problem is None else self._problem.message
        return TokenError(
            f'token "{self.name}" cannot be used: {why}',
            reason="hsm.token_away",
            operation="use token",
            device=self.name,
            kind=ErrorKind.UNAVAILABLE,
        )

    @property
    def keys(self) -> dict[str, Held]:
        """Return the keys that are on it, or were when it was seen last."""
        if self.opened is not None and self._note is not self.opened.keyring.note:
            self._use(self.opened.keyring.note)
        return self._keys

    def _use(self, note: State) -> None:
        self._note, self._keys = note, held_keys(note, self._owner)

    def standing(self) -> Standing:
        """Return the token as it is now."""
        health = DeviceHealth(KeyHealth.GOOD)
        if self.opened is not None:
            health = self.opened.keyring.health()
            if health.health is KeyHealth.DOWN and self._problem is None:
                self.failed(_down(health))
        if self._problem is not None or self.opened is None:
            away = self.away()
            health = DeviceHealth(KeyHealth.DOWN, away.reason, away.message)
        return Standing(self.name, health, self.keys)

    def is_to_blame(self, error: SpireHwError) -> bool:
        """Tell whether an error says something about the token rather than about the request."""
        return error.kind not in _CALLERS

    def failed(self, error: SpireHwError) -> None:
        """Do not count on the token until it has signed something again."""
        if self._problem is None:
            self._since = self._clock.monotonic()
            self._log.error("hsm.token_lost", hsm=self.name, error=error.message)
        self._problem = error

    def healed(self) -> None:
        """Count on the token again."""
        if self._problem is not None:
            self._log.info("hsm.token_back", hsm=self.name)
        self._problem = None

    async def probe(self, key_ids: Collection[str]) -> None:
        """Find out whether the token can be used: have it sign, or open it as `open` does.

        One that failed is opened anew, now and then: a library may go on showing what it saw while a
        token was away.
        """
        try:
            if self.opened is None or self._problem is not None:
                if self._clock.monotonic() >= self._next_try:
                    await self.open(key_ids)
                return
            ring = self.opened.keyring
            entry = next(iter(ring.note.keys), None) or next(iter(ring.note.existing), None)
            if entry is None:
                await ring.all()
            else:
                await ring.sign(entry, *_harmless(ring.get(entry)))
        except SpireHwError as e:
            if self.is_to_blame(e):
                self.failed(e)
        else:
            self.healed()


def _down(health: DeviceHealth) -> TokenError:
    return TokenError(
        health.message,
        reason=health.reason,
        operation="use token",
        kind=ErrorKind.UNAVAILABLE,
    )


def _harmless(entry: Entry) -> tuple[bytes, SignOptions]:
    """Return a digest of something that can be nothing else."""
    options = SignOptions(default_hash(entry.public_key))
    return options.hash.digest(_CHECK + spki_der(entry.public_key)), options


def held_keys(state: State, owner: Owner) -> dict[str, Held]:
    """Return the keys that a note tells of."""
    held = {}
    for key_id, known in state.keys.items():
        public_key = parse_spki(known.spki)
        info = KeyInfo.of(key_id, key_type_of(public_key), public_key)
        label = owner.key_label(key_id, known.generation)
        choice = state.choices.get(key_id)
        rank = max(known.generation, choice.over if choice is not None else 0)
        held[key_id] = Held(Entry.of(info, known.cka_id, label, known.generation), rank)
    for key_id, existing in state.existing.items():
        public_key = parse_spki(existing.spki)
        info = KeyInfo.of(key_id, key_type_of(public_key), public_key)
        held[key_id] = Held(Entry.of(info, b"", existing.selector, 0), _EXISTING_RANK)
    return held


# A key made elsewhere is never replaced: it is younger than any generation.
_EXISTING_RANK: Final = 1 << 62

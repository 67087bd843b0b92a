"""Which keys are ours: those we asked for, on note with their public halves.

A signer is believed about its keys once, when it makes one. After that a key is what the note says,
or the signer is not used.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw.key import key_type_of, parse_spki, spki_der
from spire_hw.plugin.keymanager import KeyInfo
from spire_hw.telemetry.metrics import count_fault
from spire_hw_plugins.keymanager.remote import wire
from spire_hw_plugins.keymanager.remote.config import Accepted
from spire_hw_plugins.keymanager.remote.state import REQUEST_ID_BYTES, Pending, State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spire_hw.key import KeyType
    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_plugins.keymanager.remote.state import LogNote, StateFile


class Pins:
    """Our keys; changes are on the disk before they are believed."""

    def __init__(
        self,
        file: StateFile,
        found: State | None,
        accepted: Accepted,
        *,
        metrics: Metrics,
        log: Logger,
    ) -> None:
        """Begin with what the file holds; None when there is no such file yet."""
        self._file = file
        self._is_new = found is None
        self._state = found or State(file.trust_domain)
        self._accepted = accepted
        self._metrics = metrics
        self._log = log
        self._keys = {key_id: _info(key_id, spki) for key_id, spki in self._state.keys.items()}
        self._lock = asyncio.Lock()

    @property
    def logs(self) -> Mapping[str, LogNote]:
        """Return what was on note about signers' logs when the note was read."""
        return self._state.logs

    def get(self, key_id: str) -> KeyInfo | None:
        """Return a key, None when there is none of that id."""
        return self._keys.get(key_id)

    def is_pending(self, key_id: str) -> bool:
        """Tell whether a key was asked for under this id, and the answer did not arrive."""
        return key_id in self._state.pending

    async def held(self, listed: Sequence[KeyInfo], signer: str) -> list[KeyInfo]:
        """Hold what a signer lists against the note; return our keys in its order.

        Keys that we asked for without hearing the answer, and those the operator accepts, are put
        on the note; others that are not on it are left out.

        Raises:
            NotReadyError: a key is another one than on note, or there is no note to compare with.
            UnavailableError: keys on note are missing.
            SpireHwError: the note cannot be written.
        """
        async with self._lock:
            if self._is_new and listed and not self._accepted.listed_keys:
                names = ", ".join(info.key_id for info in listed)
                raise NotReadyError(
                    f"signer {signer} holds keys of which this server has no note ({names}); compare "
                    "their fingerprints with those at the signer, then start once with "
                    "accept_listed_keys = true"
                )
            ours = [info for info in listed if self._is_ours(info, signer)]
            lost = [key_id for key_id in self._keys if key_id not in {o.key_id for o in ours}]
            if lost and not self._accepted.key_loss:
                raise UnavailableError(
                    f"{len(self._keys)} keys are on note, signer {signer} shows {len(ours)} of them "
                    f"(missing: {', '.join(lost)}); to go on without, set accept_key_loss = true "
                    "for one start"
                )
            await self._keep(ours)
            self._accepted = Accepted()  # once is enough
            return ours

    async def begin(self, key_id: str, key_type: KeyType) -> tuple[Pending, bool]:
        """Put on the note that a key is asked for; return what to ask with, and whether it was before.

        The same request stands until it is settled, so that an answer that was lost is given again.
        """
        async with self._lock:
            known = self._state.pending.get(key_id)
            if known is not None and known.key_type is key_type:
                return known, True
            held = self._keys.get(key_id)
            made = Pending(_new_id(), key_type, "" if held is None else held.fingerprint)
            await self._store_pending(key_id, made)
            return made, False

    async def renew(self, key_id: str) -> None:
        """Have a key asked for with another request next time; what came of this one is not known."""
        async with self._lock:
            known = self._state.pending[key_id]
            await self._store_pending(key_id, replace(known, request_id=_new_id()))

    async def settle(self, key_id: str, made: KeyInfo | None) -> None:
        """Put on the note what was made, as the newest key; None when nothing was."""
        async with self._lock:
            pending = {k: p for k, p in self._state.pending.items() if k != key_id}
            keys = dict(self._state.keys)
            if made is not None:
                keys.pop(key_id, None)
                keys[key_id] = spki_der(made.public_key)
            await self._store(replace(self._state, keys=keys, pending=pending))
            if made is not None:
                self._keys.pop(key_id, None)
                self._keys[key_id] = made

    async def witnessed(self, logs: Mapping[str, LogNote]) -> None:
        """Put on the note what is known of signers' logs; there is one once keys were listed."""
        async with self._lock:
            if not self._is_new and {**self._state.logs, **logs} != self._state.logs:
                await self._store(replace(self._state, logs={**self._state.logs, **logs}))

    def _is_ours(self, info: KeyInfo, signer: str) -> bool:
        known = self._keys.get(info.key_id)
        if known is not None and known.fingerprint == info.fingerprint:
            return True
        waited = self._state.pending.get(info.key_id)
        if waited is not None and waited.is_answered_by(info):
            return True
        if known is None and not (self._is_new and self._accepted.listed_keys):
            self._log.warning(
                "signer lists a key that this server never asked for; it is ignored",
                signer=signer,
                key_id=wire.clean(info.key_id),
                fingerprint=info.fingerprint,
            )
            return False
        if known is not None and info.key_id not in self._accepted.changed_keys:
            count_fault(self._metrics, "signer.key_changed")
            self._log.error(
                "signer changed a key that this server did not ask to change",
                alarm="signer.key_changed",
                signer=signer,
                key_id=info.key_id,
                fingerprint=info.fingerprint,
                expected=known.fingerprint,
            )
            raise NotReadyError(
                f'signer {signer} changed key "{info.key_id}" without our request: it is '
                f"{info.fingerprint}, on note is {known.fingerprint}; when the change is meant, name "
                "the key in accept_changed_keys for one start"
            )
        return True

    async def _keep(self, ours: Sequence[KeyInfo]) -> None:
        """Put a listing on the note, unless it says the same already."""
        keys = {info.key_id: spki_der(info.public_key) for info in ours}
        if self._is_new or keys != self._state.keys:
            await self._store(replace(self._state, keys=keys))
        self._is_new = False
        self._keys = {info.key_id: info for info in ours}

    async def _store_pending(self, key_id: str, made: Pending) -> None:
        await self._store(replace(self._state, pending={**self._state.pending, key_id: made}))

    async def _store(self, state: State) -> None:
        await asyncio.to_thread(self._file.save, state)
        self._state = state


def _info(key_id: str, spki: bytes) -> KeyInfo:
    public_key = parse_spki(spki)
    return KeyInfo.of(key_id, key_type_of(public_key), public_key)


def _new_id() -> bytes:
    return secrets.token_bytes(REQUEST_ID_BYTES)

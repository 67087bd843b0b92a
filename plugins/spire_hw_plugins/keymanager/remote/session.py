"""What one configuration comes to: signers, our keys, the calls between them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import (
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import KeyType, Purpose, SignOptions, verify_digest
from spire_hw.plugin.keymanager import (
    DeviceHealth,
    KeyEvidence,
    KeyHealth,
    KeyInfo,
    KeySignature,
)
from spire_hw.telemetry.metrics import count_fault
from spire_hw_plugins.keymanager.remote import wire
from spire_hw_plugins.keymanager.remote.batch import MAX_BATCH_BYTES, Batcher
from spire_hw_plugins.keymanager.remote.door import Door
from spire_hw_plugins.keymanager.remote.link import Link
from spire_hw_plugins.keymanager.remote.pins import Pins
from spire_hw_plugins.keymanager.remote.signers import Signers
from spire_hw_plugins.keymanager.remote.state import REQUEST_ID_BYTES, LogNote, StateFile
from spire_hw_plugins.keymanager.remote.wire import Item, Refused

if TYPE_CHECKING:
    from spire_hw.plugin.info import HostInfo
    from spire_hw_plugins.keymanager.remote.config import Address, Settings

_Ask = Callable[[Link, float], Awaitable[tuple[KeyInfo | Refused, Link]]]
_EC_TYPES: Final = {KeyType.EC_P256, KeyType.EC_P384}
_NOTE_EVERY_S: Final = 10.0
_STATED: Final = "stated "
# After these nobody knows whether a key was made: the same request is asked again.
_UNSETTLED: Final = {
    ErrorKind.UNAVAILABLE,
    ErrorKind.DEADLINE_EXCEEDED,
    ErrorKind.UNAUTHENTICATED,
    ErrorKind.CANCELLED,
    ErrorKind.INTERNAL,
    ErrorKind.UNKNOWN,
}


class Session:
    """Signers of one configuration, and our keys at them; made by `open`."""

    def __init__(self, settings: Settings, pins: Pins, host: HostInfo) -> None:
        self._settings = settings
        self._pins = pins
        self._trust_domain = host.trust_domain.name
        self._clock = host.clock
        self._log = host.log
        self._metrics = host.metrics
        self._signers = Signers(
            [self._link(address) for address in settings.addresses],
            self._check,
            patience_s=settings.timeout_s,
            clock=host.clock,
            metrics=host.metrics,
            log=host.log,
        )
        self._batcher = Batcher(self._send, self._late, timeout_s=settings.timeout_s, log=host.log)
        self._generating = asyncio.Lock()
        self._tasks = Tasks(self._failed)

    @classmethod
    async def open(cls, settings: Settings, host: HostInfo) -> Self:
        """Reach a signer that holds our keys.

        Raises:
            NotReadyError: files, keys or audit log are not what they have to be.
            SpireHwError: UNAVAILABLE or UNAUTHENTICATED, no signer answered in time.
        """
        file = StateFile(host.data_dir, host.trust_domain.name)
        found = await asyncio.to_thread(file.load)
        pins = Pins(file, found, settings.accepted, metrics=host.metrics, log=host.log)
        session = cls(settings, pins, host)
        try:
            await session._signers.start(settings.start_timeout_s)
        except BaseException:
            await session.close()
            raise
        session._tasks.start("note of logs", session._keep_note())
        return session

    @property
    def tells_purposes(self) -> bool:
        """Tell whether signers get what is signed, not its digest."""
        return self._settings.purposes

    def key(self, key_id: str) -> KeyInfo:
        """Return one of our keys.

        Raises:
            InvalidInputError: no id.
            NotFoundError: there is none.
        """
        if not key_id:
            raise InvalidInputError("key id is required")
        found = self._pins.get(key_id)
        if found is None:
            raise NotFoundError(f'key "{key_id}" not found')
        return found

    async def keys(self) -> list[KeyInfo]:
        """Ask for our keys; errors as in `Pins.held` and `Signers.call`."""

        async def ask(link: Link, left_s: float) -> tuple[list[KeyInfo], str]:
            return await link.list_keys(left_s), link.name

        return await self._pins.held(*await self._signers.call(ask, self._settings.timeout_s))

    async def generate(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Have a key made.

        An answer that was lost is asked for again with the request's id, once the key is not found
        among those that are there: at the same signer, or at another that shares the token.
        """
        async with self._generating:
            pending, is_again = await self._pins.begin(key_id, key_type)
            tries = 1 if is_again else 0

            async def ask(link: Link, left_s: float) -> tuple[KeyInfo | Refused, Link]:
                nonlocal tries
                tries += 1
                if tries > 1:
                    for info in await link.list_keys(left_s):
                        if info.key_id == key_id and pending.is_answered_by(info):
                            return info, link
                return await link.generate(pending.request_id, key_id, key_type, left_s), link

            made, maker = await self._generated(ask)
            if isinstance(made, Refused):
                if made.error.kind in _UNSETTLED:
                    await self._pins.renew(key_id)
                elif not is_again:
                    await self._pins.settle(key_id, None)
                raise made.error
            await self._pins.settle(key_id, made)
            self._signers.changed_by(maker)
        return made

    async def _generated(self, ask: _Ask) -> tuple[KeyInfo | Refused, Link]:
        """Ask for a key, and elsewhere when one signer's device makes none.

        Of several signers that use one token's keys, one alone makes new ones.
        """
        asked: set[Link] = set()

        async def noted(link: Link, left_s: float) -> tuple[KeyInfo | Refused, Link]:
            asked.add(link)
            return await ask(link, left_s)

        timeout_s = self._settings.generate_timeout_s
        try:
            return await self._signers.call(noted, timeout_s, again=False)
        except NotReadyError:
            while link := await self._signers.another(asked, self._settings.timeout_s):
                try:
                    return await noted(link, timeout_s)
                except SpireHwError as e:
                    self._log.warning("no key was made there", signer=link.name, error=e.message)
            raise

    async def sign(
        self,
        info: KeyInfo,
        purpose: Purpose | None,
        content: bytes,
        digest: bytes,
        options: SignOptions,
    ) -> KeySignature:
        """Have content signed, and verify what comes back.

        Args:
            info: by which of our keys.
            purpose: what the content is, None when it is the digest itself.
            content: what is sent.
            digest: its digest.
            options: hash and padding.

        Raises:
            InvalidInputError: options that do not fit the key, or too much content.
            SpireHwError: INTERNAL when the signature is another key's, DEADLINE_EXCEEDED, what the
                signer's policy says, or UNAVAILABLE.
        """
        if options.pss and info.key_type in _EC_TYPES:
            raise InvalidInputError("PSS options do not fit an EC key")
        item = Item(secrets.token_bytes(REQUEST_ID_BYTES), info.key_id, purpose, content, options)
        if item.size > MAX_BATCH_BYTES:
            raise InvalidInputError(f"{len(content)} bytes are too much for a signer")
        made = await self._batcher.sign(item)
        if made.fingerprint != info.fingerprint:
            info = await self._successor(info, made)
        try:
            verify_digest(info.public_key, digest, made.signature, options)
        except SpireHwError as e:
            raise self._foreign(info, "its signature does not verify") from e
        return made

    async def evidence(self, key_id: str) -> KeyEvidence:
        """Return where a signer says that a key is, and what is on note about both.

        Raises:
            SpireHwError: as `key`, `Signers.call` and `Link.custody`.
        """
        info = self.key(key_id)

        async def ask(link: Link, left_s: float) -> tuple[KeyEvidence, Link]:
            return await link.custody(info, left_s), link

        told, link = await self._signers.call(ask, self._settings.timeout_s)
        head, tls = link.note.head, self._settings.tls
        own = {
            "fingerprint on note": info.fingerprint,
            "signer id": "" if tls is None else str(tls.signer_id or tls.signer_name),
            "signers": ", ".join(address.name for address in self._settings.addresses),
            "audit log head": "" if head is None else f"{head.seq} {head.hash.hex()}",
            "audit log key": link.log_key,
            "audit log fault": link.fault,
        }
        stated = {f"{_STATED}{name}": value for name, value in told.attributes.items()}
        return replace(
            told, location=f"signer {link.name}: {told.location}", attributes={**stated, **own}
        )

    async def attest(self, key_id: str, nonce: bytes) -> str:
        """Return evidence that a signer made about a key, once it is seen to be about it.

        Raises:
            SpireHwError: as `key`, `Signers.call` and `Link.attest`.
        """
        info = self.key(key_id)

        async def ask(link: Link, left_s: float) -> str:
            return await link.attest(info, nonce, self._trust_domain, left_s)

        return await self._signers.call(ask, self._settings.timeout_s)

    def health(self) -> DeviceHealth:
        """Return how well signers can be reached, as last seen."""
        links = self._signers.links
        trouble = next((link.trouble for link in links if link.trouble is not None), None)
        if self._signers.current is None:
            text = "" if trouble is None else trouble.message
            return DeviceHealth(KeyHealth.DOWN, "signer.away", text)
        for link in links:
            if link.fault:
                text = f"audit log of {link.name}: {link.fault}"
                return DeviceHealth(KeyHealth.DEGRADED, "signer.log_rewound", text)
        if trouble is not None:
            return DeviceHealth(KeyHealth.DEGRADED, "signer.one_away", trouble.message)
        return DeviceHealth(KeyHealth.GOOD)

    async def close(self, *, is_replaced: bool = False) -> None:
        """End all connections, and put on the note what was seen of the logs.

        Args:
            is_replaced: another session goes on with the note, and knows more than this one.
        """
        await self._tasks.close()
        await self._batcher.close()
        await self._signers.close()
        if not is_replaced:
            await self._note_logs()

    def _link(self, address: Address) -> Link:
        settings = self._settings
        is_accepted = address.name in settings.accepted.logs
        note = LogNote() if is_accepted else self._pins.logs.get(address.name, LogNote())
        return Link(
            Door(address, settings.tls, clock=self._clock, log=self._log),
            note,
            require_witness=settings.require_witness,
            clock=self._clock,
            metrics=self._metrics,
            log=self._log,
        )

    async def _check(self, link: Link, left_s: float) -> None:
        """Ask a signer whether it holds our keys, and its log what we have seen of it."""
        await link.look_at_log(left_s)
        await self._pins.held(await link.list_keys(left_s), link.name)

    async def _send(self, items: list[Item], left_s: float) -> list[KeySignature | Refused]:
        async def ask(link: Link, left_s: float) -> list[KeySignature | Refused]:
            results = await link.sign(items, left_s)
            if self._signers.has_spare(link) and (away := _all_away(results)):
                raise away
            return results

        return await self._signers.call(ask, left_s)

    def _late(self) -> SpireHwError:
        if self._signers.current is None:
            return self._signers.trouble
        return SpireHwError(
            f"signers did not come to it within {self._settings.timeout_s:g} s",
            kind=ErrorKind.DEADLINE_EXCEEDED,
        )

    async def _successor(self, info: KeyInfo, made: KeySignature) -> KeyInfo:
        """Return the key that has signed in place of another, which was to be replaced.

        Raises:
            UnavailableError: a new key was asked for, and its answer is not here.
            SpireHwError: INTERNAL, no such key was asked for.
        """
        async with self._generating:
            pass
        now = self._pins.get(info.key_id)
        if now is not None and now.fingerprint == made.fingerprint:
            return now
        if self._pins.is_pending(info.key_id):
            raise UnavailableError(
                f'key "{info.key_id}" is being replaced, and the answer was lost; it is settled when '
                "the key is asked for again"
            )
        raise self._foreign(info, f"{made.fingerprint[:64]} has signed, not {info.fingerprint}")

    def _foreign(self, info: KeyInfo, what: str) -> SpireHwError:
        text = wire.clean(what)
        count_fault(self._metrics, "signer.foreign_key")
        self._log.error(
            "signer returned foreign key",
            alarm="signer.foreign_key",
            key_id=info.key_id,
            reason=text,
        )
        return SpireHwError(
            f'signer returned foreign key for "{info.key_id}": {text}; nothing it signed is used',
            kind=ErrorKind.INTERNAL,
        )

    async def _keep_note(self) -> None:
        while True:
            await self._clock.sleep(_NOTE_EVERY_S)
            await self._note_logs()

    async def _note_logs(self) -> None:
        try:
            await self._pins.witnessed({link.name: link.note for link in self._signers.links})
        except SpireHwError as e:
            self._log.error("heads of signers' logs are not on note", error=e.message)

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("task failed", task=name, exc_info=error)


def _all_away(results: list[KeySignature | Refused]) -> SpireHwError | None:
    """Return why all of a batch was refused when the signer's device is away, else None."""
    away = None
    for result in results:
        if not isinstance(result, Refused) or result.error.kind is not ErrorKind.UNAVAILABLE:
            return None
        away = result.error
    return away

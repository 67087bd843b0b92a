"""Takes the steps by which one authority follows another: prepare, publish, activate.

Each step is durable before the next one: the key in the KeyManager, the authority in the bundle,
the record in the journal, and only then its use. Which step is due is decided by `ca.slots`, on
whose word one is taken out of turn by `ca.manager`. The callers see to it that there is one step
at a time.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, TypeVar

from spire_hw.errors import SpireHwError
from spire_hw.key import SignOptions, default_hash, verify_digest
from spire_hw.plugin.keymanager import KeyFallback
from spire_hw.telemetry.metrics import NO_METRICS, Timed
from spire_hw_server.ca.slots import Record, Slots, Step, activation_due

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import DeviceHealth, Keys, ManagedSigner
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.ca.keeper import JournalKeeper
    from spire_hw_server.ca.line import JwtLine, Line, X509Line
    from spire_hw_server.ca.slots import SlotName

R = TypeVar("R", bound=Record)
_CHECK: Final = b"spire-hw authority check\0"


class Succession:
    """The steps of both kinds of authority, which share one journal.

    Args:
        x509: the X.509 authorities; nothing is journalled before one of them is active.
        jwt: the JWT keys; None when there are none, their records stay as they are.
        keys: where new keys are made.
        bundles: where authorities are published.
        keeper: the journal.
        metrics: takes down what is prepared and activated.
    """

    def __init__(
        self,
        x509: X509Line,
        jwt: JwtLine | None,
        *,
        keys: Keys,
        bundles: Bundles,
        keeper: JournalKeeper,
        clock: Clock,
        log: Logger,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._x509 = x509
        self._jwt = jwt
        self._keys = keys
        self._bundles = bundles
        self._keeper = keeper
        self._clock = clock
        self._log = log
        self._metrics = metrics
        self._unsaved = False
        self._warned = ""
        # Keys by key id of which no authority could be made: the next try takes them.
        self._unused: dict[str, ManagedSigner] = {}

    async def advance(self, line: Line[R]) -> None:
        """Take the steps that are due now; save what could not be saved before.

        An authority whose device is lost, while the KeyManager has another one, is left at once.

        Raises:
            SpireHwError: a step failed; those before it stay taken.
        """
        step = await self._due(line)
        if step is Step.PREPARE and self._is_asked_for(line):
            step = Step.REST
        if step in {Step.PREPARE, Step.PREPARE_AND_ACTIVATE}:
            line.check_makes()
            await self.prepare(line)
        elif self._unsaved:
            await self._save()
        if step in {Step.ACTIVATE, Step.PREPARE_AND_ACTIVATE}:
            await self.activate(line)

    def _is_asked_for(self, line: Line[R]) -> bool:
        """Tell whether the next authority is being signed by hand, and may still come in time."""
        active = line.slots.active
        if active is None or self._clock.now() >= activation_due(active):
            return False
        if line.makes_none:
            if self._warned != active.authority_id:
                self._warned = active.authority_id
                self._log.warning(
                    "the next authority has to be signed by hand",
                    kind=line.name,
                    expiration=active.not_after.isoformat(),
                    command="spire-hw-server ca csr",
                )
            return True
        return bool(line.requested)

    async def take(self, line: Line[R], record: R, signer: ManagedSigner) -> None:
        """Publish an authority that was signed by hand, and let it wait for its turn.

        Raises:
            SpireHwError: the store failed.
        """
        await self._publish(line, record, signer, "authority imported")

    async def _publish(self, line: Line[R], record: R, signer: ManagedSigner, event: str) -> None:
        await self._bundles.append(line.publication(record))
        line.slots = line.slots.prepare(record)
        line.signers[record.authority_id] = signer
        line.requested = ""
        self._unsaved = True
        self._tell(event, line, record)
        await self._save()

    def _tell(self, event: str, line: Line[R], record: R) -> None:
        self._log.info(
            event,
            kind=line.name,
            slot=record.slot.value,
            authority_id=record.authority_id,
            expiration=record.not_after.isoformat(),
        )

    async def _due(self, line: Line[R]) -> Step:
        stranded = self._stranded()
        step = line.slots.due(self._clock.now())
        if not stranded:
            return step
        active, prepared = line.slots.active, line.slots.prepared
        if prepared is not None and line.key_id(prepared.slot) in stranded:
            prepared = None
        away = stranded.get(line.key_id(active.slot)) if active is not None else None
        if away is None and step is not Step.ACTIVATE:
            return step
        if away is not None:
            self._log.error("the authority's keys are away", kind=line.name, error=away.message)
        if prepared is None:
            return Step.PREPARE_AND_ACTIVATE
        await self._check_signs(line.signers[prepared.authority_id])
        return Step.ACTIVATE

    async def _check_signs(self, signer: ManagedSigner) -> None:
        """Make sure that there is something to move to: the other device may be gone as well."""
        options = SignOptions(default_hash(signer.public_key))
        digest = options.hash.digest(_CHECK + secrets.token_bytes(32))
        verify_digest(signer.public_key, digest, await signer.sign(digest, options), options)

    def _stranded(self) -> Mapping[str, DeviceHealth]:
        manager = self._keys.manager
        return manager.stranded_keys() if isinstance(manager, KeyFallback) else {}

    async def prepare(self, line: Line[R]) -> R:
        """Make and publish the next authority, replacing one that waits.

        Raises:
            SpireHwError: the KeyManager, the UpstreamAuthority or the store failed.
        """
        with Timed(self._metrics, line.prepare_metric):
            return await self._prepare(line)

    async def _prepare(self, line: Line[R]) -> R:
        slot = line.slots.free_slot
        signer = await self._key_for(line, slot)
        try:
            record = await line.make(signer, slot)
        except SpireHwError:
            self._unused[signer.info.key_id] = signer
            raise
        await self._publish(line, record, signer, "authority prepared")
        return record

    async def _key_for(self, line: Line[R], slot: SlotName) -> ManagedSigner:
        """Make a key, unless one waits that nothing was made of: devices allow so many in a day."""
        key_id = line.key_id(slot)
        unused = self._unused.pop(key_id, None)
        if unused is not None:
            try:
                found = await self._keys.get(key_id)
                if found.info.fingerprint == unused.info.fingerprint:
                    await self._check_signs(found)
                    return found
            except SpireHwError as e:
                self._log.warning("a key that waited is not used", key_id=key_id, error=e.message)
        return await self._keys.generate(key_id, line.key_type)

    async def activate(self, line: Line[R], authority_id: str | None = None) -> R:
        """Let the prepared authority sign.

        Args:
            line: its kind.
            authority_id: the one that is meant, None for whichever is prepared.

        Raises:
            NotReadyError: none is prepared.
            InvalidInputError: another one is prepared.
            SpireHwError: the journal could not be saved; the one before goes on signing.
        """
        before = line.slots
        line.slots = before.activate(authority_id)
        record = line.slots.active
        if record is None:
            raise SpireHwError("activation left no active authority")
        try:
            await self._save()
        except BaseException:
            line.slots = before
            raise
        line.adopt(record, line.signers[record.authority_id])
        line.signers = {r.authority_id: line.signers[r.authority_id] for r in line.slots.records()}
        self._metrics.count(line.activate_metric)
        self._tell("authority activated", line, record)
        return record

    async def forget_old(self, line: Line[R]) -> None:
        """Empty the slot beside the active authority's.

        Raises:
            SpireHwError: the journal could not be saved; it is at the next step.
        """
        line.slots = Slots(line.slots.active)
        self._unsaved = True
        await self._save()

    async def _save(self) -> None:
        active = self._x509.slots.active
        if active is None:
            return
        journal = self._keeper.journal.updated(
            self._x509.slots, None if self._jwt is None else self._jwt.slots
        )
        await self._keeper.save(journal, active.authority_id)
        self._unsaved = False

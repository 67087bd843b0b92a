"""What is known of nodes' machines, in memory, and its way to the store and back.

A node is read when it is first asked for and kept until somebody else changed it. Good heartbeats
change times and counters only: those are written together, every few seconds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError, SpireHwError
from spire_hw.posture.document import decode_evidence
from spire_hw.posture.memory import Memory, decode_memory, encode_memory
from spire_hw.posture.verdict import NodeState
from spire_hw_server.datastore.records import ImaPart, Posture, Sighting
from spire_hw_server.posture import imalist
from spire_hw_server.posture.deflated import inflate
from spire_hw_server.posture.states import Standing

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.posture.evidence import BootFacts, Evidence, ImaEntry
    from spire_hw.posture.verdict import Verdict
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.datastore.interface import Datastore

FLUSH_S: Final = 5.0
_MAX_NODES: Final = 100_000
_MAX_BOOTS: Final = 1024
_MAX_ABSENT: Final = 1024
# Parts of an IMA list that are put together as soon as there are so many.
_MAX_PARTS: Final = 32
_BATCH: Final = 500


@dataclass(slots=True)
class Known:
    """One node.

    Attributes:
        posture: as it is stored, without evidence.
        standing: where it stands.
        memory: None when no evidence of it was ever accepted.
        verdict: what the policy said to `memory.last`, None when that is not known any more.
        entries: of its IMA list, accepted and not yet stored; `first` is the number of the first.
        parts: of its IMA list in the store, None when that is not known.
        dirty: `memory` is newer than what is stored.
    """

    posture: Posture
    standing: Standing
    memory: Memory | None
    verdict: Verdict | None = None
    entries: list[ImaEntry] = field(default_factory=list)
    first: int = 0
    parts: int | None = None
    dirty: bool = False


class Ledger:
    """The nodes of one server; all use is on one event loop.

    Args:
        store: where they are kept.
        clock: time between writes.
        log: where trouble is reported.
    """

    def __init__(
        self, store: Datastore, *, clock: Clock, log: Logger, limit: int = _MAX_NODES
    ) -> None:
        self._store = store
        self._clock = clock
        self._log = log
        self._limit = limit
        self._known: OrderedDict[SpiffeId, Known] = OrderedDict()
        self._dirty: dict[SpiffeId, Known] = {}
        self._absent: OrderedDict[SpiffeId, None] = OrderedDict()
        self._boots: OrderedDict[tuple[str, str], BootFacts] = OrderedDict()

    async def get(self, agent_id: SpiffeId, *, fresh: bool = False) -> Known | None:
        """Return a node, None when nothing is known of its machine.

        Args:
            agent_id: which.
            fresh: what another server may have written meanwhile counts.

        Raises:
            UnavailableError: it is not in memory and the store is away.
        """
        known = self._known.get(agent_id)
        if known is not None and (not fresh or known.dirty):
            self._known.move_to_end(agent_id)
            return known
        if agent_id in self._absent and not fresh:
            return None
        posture = await self._store.get_posture(agent_id)
        if posture is None:
            self._known.pop(agent_id, None)
            self._dirty.pop(agent_id, None)
            self._absent[agent_id] = None
            if len(self._absent) > _MAX_ABSENT:
                self._absent.popitem(last=False)
            return None
        self._absent.pop(agent_id, None)
        waiting = self._dirty.get(agent_id)
        if waiting is not None and _age(waiting.posture) == _age(posture):
            known = waiting
        else:
            known = self._read(posture)
        self._keep(agent_id, known)
        return known

    def states(self) -> Counter[NodeState]:
        """Return how many of the nodes in memory stand where."""
        return Counter(known.standing.state for known in self._known.values())

    def forget(self, agent_id: SpiffeId) -> None:
        """Read a node anew when it is asked for next: somebody changed it."""
        self._known.pop(agent_id, None)
        self._absent.pop(agent_id, None)

    def sighted(self, agent_id: SpiffeId, known: Known, memory: Memory, seen: Evidence) -> None:
        """Note good evidence that changed nothing but times and counters."""
        at = seen.made_at
        known.memory = memory
        known.posture = replace(known.posture, last_good_at=at, last_seen_at=at)
        if seen.ima is not None and seen.ima.entries:
            if not known.entries or not seen.ima.start:
                known.first, known.entries = seen.ima.start, []
            known.entries.extend(seen.ima.entries)
        known.dirty = True
        self._dirty[agent_id] = known

    async def run(self) -> None:
        """Write what changed every few seconds; ends only when cancelled."""
        while True:
            await self._clock.sleep(FLUSH_S)
            try:
                await self.flush()
            except SpireHwError as e:
                self._log.warning("Heartbeats could not be stored; trying again", error=e.message)

    async def flush(self) -> None:
        """Write what changed.

        Raises:
            SpireHwError: the store is away; nothing is lost.
        """
        while self._dirty:
            batch = [self._dirty.popitem() for _ in range(min(_BATCH, len(self._dirty)))]
            sightings = []
            for agent_id, known in batch:
                known.dirty = False
                sightings.append(self._sighting(agent_id, known))
            try:
                await self._store.note_sightings([s for s in sightings if s is not None])
            except BaseException:
                for agent_id, known in batch:
                    known.dirty = True
                    self._dirty.setdefault(agent_id, known)
                raise
            for agent_id, known in batch:
                await self._stored(agent_id, known)

    def _sighting(self, agent_id: SpiffeId, known: Known) -> Sighting | None:
        at = known.posture.last_good_at
        if known.memory is None or at is None:
            return None
        part = None
        if known.entries:
            part = ImaPart(known.first, imalist.pack(known.entries))
        text = encode_memory(known.memory)
        posture = known.posture
        return Sighting(agent_id, posture.records, posture.since, at, text, part)

    async def _stored(self, agent_id: SpiffeId, known: Known) -> None:
        if not known.entries or known.dirty:
            return
        known.entries = []
        if known.parts is None:
            known.parts = len(await self._store.list_ima(agent_id))
        else:
            known.parts += 1
        if known.parts > _MAX_PARTS:
            known.first, known.entries = 0, await self.ima_entries(agent_id)
            known.parts = 0
            known.dirty = True
            self._dirty[agent_id] = known

    async def ima_entries(self, agent_id: SpiffeId) -> list[ImaEntry]:
        """Return the distinct entries of a node's IMA list, as far as they are stored.

        Raises:
            EncodingError: they cannot be read.
        """
        found: dict[ImaEntry, None] = {}
        for part in await self._store.list_ima(agent_id):
            found.update(dict.fromkeys(imalist.unpack(part.entries)))
        known = self._known.get(agent_id)
        if known is not None:
            found.update(dict.fromkeys(known.entries))
        return list(found)

    def _read(self, posture: Posture) -> Known:
        """Return a stored node; what cannot be read is as if it had never been seen."""
        standing = Standing(
            NodeState(posture.state), posture.reasons, posture.message, posture.since
        )
        memory = None
        if posture.evidence is not None:
            try:
                evidence = decode_evidence(inflate(posture.evidence))
                memory = decode_memory(posture.memory, self.shared(evidence))
            except EncodingError as e:
                self._log.error(
                    "What is known of a node cannot be read; it has to attest again",
                    agent_id=str(posture.agent_id),
                    error=e.message,
                )
        return Known(replace(posture, evidence=None), standing, memory)

    def shared(self, evidence: Evidence) -> Evidence:
        """Return evidence with the boot facts of another machine that booted the same."""
        if evidence.boot is None:
            return evidence
        key = (evidence.boot.bank, evidence.boot.log_sha256)
        known = self._boots.get(key)
        if known == evidence.boot:
            return replace(evidence, boot=known)
        self._boots[key] = evidence.boot
        if len(self._boots) > _MAX_BOOTS:
            self._boots.popitem(last=False)
        return evidence

    def _keep(self, agent_id: SpiffeId, known: Known) -> None:
        self._known[agent_id] = known
        self._known.move_to_end(agent_id)
        while len(self._known) > self._limit:
            oldest, _ = next(iter(self._known.items()))
            if oldest in self._dirty:
                self._known.move_to_end(oldest)
                break
            del self._known[oldest]


def _age(posture: Posture) -> tuple[int, datetime]:
    """Return what changes whenever a node is judged other than by routine."""
    return posture.records, posture.since.replace(microsecond=0)

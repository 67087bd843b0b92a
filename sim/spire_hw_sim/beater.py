"""A machine with an emulated TPM that attests to a server and answers heartbeats as a test says."""

from __future__ import annotations

import hashlib
import uuid
import zlib
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from spire_hw._pb import hw_posture_pb2
from spire_hw.errors import SpireHwError
from spire_hw.posture.heartbeat import HeartbeatAnswer, SignedQuote
from spire_hw.spiffeid import agent_id
from spire_hw.tpm.verify import qualifier
from spire_hw.tpm.wire import PcrSelection
from spire_hw_agent.upstream.posture import HEARTBEAT, Asked, HeartbeatStream, Standing
from spire_hw_sim.servers import ScriptedAgent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.posture.heartbeat import HeartbeatChallenge
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_sim.tpmnode import TpmNode


@dataclass(slots=True)
class Beater:
    """One machine and its agent.

    Attributes:
        node: what it has to show.
        agent: calls the server; has an SVID once it attested.
        boot_id: of its kernel.
        clock: its time, the machine's own without.
        between: called while a challenge of an attestation waits for its answer.
    """

    node: TpmNode
    port: int
    bundle: Bundle
    clock: Clock | None = None
    boot_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    between: Callable[[], Awaitable[None]] | None = None
    agent: ScriptedAgent = field(init=False)

    def __post_init__(self) -> None:
        """Make an agent whose key is in the TPM."""
        if self.node.key is None:
            raise SpireHwError("a machine whose key is outside its TPM does not beat")
        self.agent = ScriptedAgent(self.port, self.bundle, self.clock, key=self.node.key.private)

    @property
    def id(self) -> SpiffeId:
        """Return the ID of its agent."""
        return agent_id(self.bundle.trust_domain, "tpm", self.node.ek_hash)

    def tick(self, seconds: float) -> None:
        """Let its TPM's clock go on."""
        self.node.tpm.clock_ms += round(seconds * 1000)

    def reboot(self) -> None:
        """Start it anew: another kernel, one reset more."""
        self.node.tpm.reset_count += 1
        self.node.tpm.restart_count = 0
        self.boot_id = str(uuid.uuid4())

    def measure(self, pcr: int, data: bytes, bank: str = "sha256") -> None:
        """Extend a PCR."""
        value = self.node.tpm.pcrs[bank, pcr] + hashlib.new(bank, data).digest()
        self.node.tpm.pcrs[bank, pcr] = hashlib.new(bank, value).digest()

    async def attest(self) -> None:
        """Attest and use the new SVID from now on.

        Raises:
            SpireHwError: the server refused.
        """
        await self.agent.prove("tpm", self.node.payload(), self._answer)

    async def _answer(self, challenge: bytes) -> bytes:
        if self.between is not None:
            await self.between()
        return self.node.answer(challenge)

    @asynccontextmanager
    async def stream(self, *, can_answer: bool = True) -> AsyncIterator[BeaterStream]:
        """Hold a stream for heartbeats, after hello was said."""
        async with (
            await self.agent.channel() as channel,
            channel.bidi(HEARTBEAT, hw_posture_pb2.HeartbeatResponse) as call,
        ):
            stream = HeartbeatStream(call)
            await stream.hello(self.boot_id, can_answer=can_answer)
            yield BeaterStream(self, stream)

    def answer(self, challenge: HeartbeatChallenge) -> HeartbeatAnswer:
        """Return the honest answer to a challenge."""
        tpm, wanted = self.node.tpm, challenge.wanted
        spki = hashlib.sha256(self.node.spki or b"").digest()
        extra = qualifier("heartbeat", challenge.nonce, spki, b"", tpm.ak.name)
        quotes = []
        for bank, numbers in challenge.wanted.pcrs:
            selection = PcrSelection(bank, numbers)
            quotes.append(SignedQuote(*tpm.quote((selection,), extra), tpm.pcr_values(selection)))
        log = None
        if wanted.boot_log and self.node.boot_log is not None:
            log = zlib.compress(self.node.boot_log)
        answer = HeartbeatAnswer(tuple(quotes), log, boot_id=self.boot_id)
        if wanted.ima is None or self.node.ima is None:
            return answer
        is_new = wanted.reset_count not in {None, tpm.reset_count}
        part = self.node.part(0 if is_new else wanted.ima.count)
        first, parts = part.start, [part.data]
        while part.left:
            part = self.node.part(part.start + self.node.part_lines)
            parts.append(part.data)
        return replace(answer, ima=tuple(parts), ima_from=first)


@dataclass(frozen=True, slots=True)
class BeaterStream:
    """An open stream of one machine."""

    beater: Beater
    raw: HeartbeatStream

    async def state(self) -> Standing:
        """Return the next message, which is to be a state.

        Raises:
            SpireHwError: it is a challenge, or the stream has ended.
        """
        message = await self.raw.receive()
        if not isinstance(message, Standing):
            raise SpireHwError(f"expected a state, got {type(message).__name__}")
        return message

    async def challenge(self) -> HeartbeatChallenge:
        """Return the next message, which is to be a challenge.

        Raises:
            SpireHwError: it is a state, or the stream has ended.
        """
        message = await self.raw.receive()
        if not isinstance(message, Asked):
            raise SpireHwError(f"expected a challenge, got {type(message).__name__}")
        return message.challenge

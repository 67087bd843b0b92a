"""The agent's end of a heartbeat stream: what the server asks and says about this node's machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw._pb import hw_posture_pb2
from spire_hw.errors import SpireHwError
from spire_hw.posture.evidence import ImaState
from spire_hw.posture.heartbeat import HeartbeatChallenge
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.posture.verdict import NodeState

if TYPE_CHECKING:
    from spire_hw.posture.heartbeat import HeartbeatAnswer
    from spire_hw.rpc.client import Bidi

HEARTBEAT: Final = "/spire_hw.server.v1.Posture/Heartbeat"
_NONCE_BYTES: Final = 32
_MAX_BANKS: Final = 8
_MAX_PCR: Final = 23
_MAX_REASONS: Final = 64
_MAX_TEXT: Final = 1024
_CUT_OFF: Final = frozenset({NodeState.QUARANTINED, NodeState.BANNED})


@dataclass(frozen=True, slots=True)
class Asked:
    """A challenge, and how long its answer may take."""

    challenge: HeartbeatChallenge
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Standing:
    """What the server thinks of this node.

    Attributes:
        reasons: codes, the decisive one first.
        message: for the log.
        next_s: when the next challenge may be expected, None when none comes.
        reattest: the agent should attest again now.
    """

    state: NodeState
    reasons: tuple[str, ...] = ()
    message: str = ""
    next_s: float | None = None
    reattest: bool = False

    @property
    def is_cut_off(self) -> bool:
        """Tell whether workloads of this node may have no identity."""
        return self.state in _CUT_OFF

    @property
    def why(self) -> str:
        """Return the state with its reasons: `quarantined (pcr_mismatch)`."""
        return self.state.value + (f" ({', '.join(self.reasons)})" if self.reasons else "")


class HeartbeatStream:
    """One stream, as typed messages.

    Args:
        call: open, nothing sent yet.
    """

    def __init__(self, call: Bidi[hw_posture_pb2.HeartbeatResponse]) -> None:
        self._call = call

    async def hello(self, boot_id: str, *, can_answer: bool) -> None:
        """Say who is there; the first message.

        Raises:
            SpireHwError: the call has ended, as in the next three.
        """
        hello = hw_posture_pb2.HeartbeatRequest.Hello(boot_id=boot_id, can_answer=can_answer)
        await self._call.send(hw_posture_pb2.HeartbeatRequest(hello=hello))

    async def answer(self, answer: HeartbeatAnswer) -> None:
        """Answer a challenge."""
        await self._call.send(hw_posture_pb2.HeartbeatRequest(answer=_reply(answer)))

    async def cannot_answer(self, reason: str) -> None:
        """Say why a challenge is not answered."""
        text = "".join(c if c.isprintable() else " " for c in reason)[:_MAX_TEXT]
        request = hw_posture_pb2.HeartbeatRequest()
        request.cannot_answer.reason = text
        await self._call.send(request)

    async def receive(self) -> Asked | Standing | None:
        """Return the next message, None when the server has ended the call well.

        Raises:
            SpireHwError: also INTERNAL, the message breaks a rule.
        """
        message = await self._call.receive()
        if message is None:
            return None
        step = message.WhichOneof("step")
        if step == "state":
            return _standing(message.state)
        if step == "challenge":
            return _asked(message.challenge)
        raise SpireHwError("server sent a heartbeat message without content")


def _standing(message: hw_posture_pb2.HeartbeatResponse.State) -> Standing:
    try:
        state = NodeState(message.state)
    except ValueError:
        raise SpireHwError(
            f"server named a state this agent does not know: {message.state[:64]!a}"
        ) from None
    return Standing(
        state,
        tuple(reason[:_MAX_TEXT] for reason in message.reasons[:_MAX_REASONS]),
        message.message[:_MAX_TEXT],
        message.next_ms / 1000 or None,
        message.reattest,
    )


def _asked(message: hw_posture_pb2.HeartbeatResponse.Challenge) -> Asked:
    if len(message.nonce) != _NONCE_BYTES:
        raise SpireHwError(f"server sent a challenge whose nonce is not {_NONCE_BYTES} bytes")
    if not 0 < len(message.quotes) <= _MAX_BANKS:
        raise SpireHwError(f"server asked for quotes of {len(message.quotes)} banks")
    pcrs = tuple((one.bank, tuple(one.pcrs)) for one in message.quotes)
    for bank, numbers in pcrs:
        ascending = tuple(sorted(set(numbers)))
        if not numbers or numbers != ascending or numbers[-1] > _MAX_PCR:
            raise SpireHwError(f"server asked for PCRs that are no selection of bank {bank[:16]!a}")
    ima = None
    if message.HasField("ima_from"):
        # Only the server remembers what came before.
        ima = ImaState(message.ima_from, b"", b"")
    reset_count = message.reset_count if message.HasField("reset_count") else None
    wanted = EvidenceRequest(pcrs, message.boot_log, ima, reset_count)
    return Asked(HeartbeatChallenge(message.nonce, wanted), message.timeout_ms / 1000)


def _reply(answer: HeartbeatAnswer) -> hw_posture_pb2.HeartbeatReply:
    reply = hw_posture_pb2.HeartbeatReply(
        boot_log=answer.boot_log,
        ima=answer.ima,
        ima_from=answer.ima_from,
        boot_id=answer.boot_id or "",
    )
    for one in answer.quotes:
        quote = reply.quotes.add(attest=one.attest, signature=one.signature)
        for bank, values in one.pcrs.items():
            listed = quote.values.add(bank=bank)
            for number in sorted(values):
                listed.pcrs.add(pcr=number, value=values[number])
    return reply

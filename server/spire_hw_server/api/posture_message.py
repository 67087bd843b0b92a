"""Messages of heartbeats and postures, to values and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw._pb import hw_posture_pb2 as pb
from spire_hw.errors import InvalidInputError, LimitError
from spire_hw.posture.heartbeat import HeartbeatAnswer, SignedQuote
from spire_hw.rpc import convert
from spire_hw_server.posture.history import decode_findings
from spire_hw_server.posture.stream import CannotAnswer, StateMessage

if TYPE_CHECKING:
    from spire_hw.posture.heartbeat import HeartbeatChallenge
    from spire_hw_server.datastore.records import EvidenceRecord, Posture
    from spire_hw_server.posture.stream import Answer

MAX_LOG_BYTES: Final = 1 << 20
MAX_REASON: Final = 1024
_MAX_QUOTES: Final = 8
_MAX_PARTS: Final = 16
_MAX_PCRS: Final = 24
_MAX_STATEMENT_BYTES: Final = 4096
_MAX_VALUE_BYTES: Final = 64
_MAX_NAME: Final = 16
_MAX_BOOT_ID: Final = 64


def parse_boot_id(text: str) -> str | None:
    """Return a kernel's boot id, None when the agent does not know it."""
    if len(text) > _MAX_BOOT_ID or not text.isascii() or (text and not text.isprintable()):
        raise InvalidInputError("envelope: boot id is malformed")
    return text or None


def parse_answer(message: pb.HeartbeatRequest) -> Answer:
    """Return what an agent sent for a challenge.

    Raises:
        InvalidInputError: it is malformed.
        LimitError: a part is too large.
    """
    step = message.WhichOneof("step")
    if step == "cannot_answer":
        reason = message.cannot_answer.reason
        if len(reason) > MAX_REASON or (reason and not reason.isprintable()):
            raise InvalidInputError("envelope: reason is too long or cannot be shown")
        return CannotAnswer(reason)
    if step != "answer":
        raise InvalidInputError("envelope: expected the answer to a challenge")
    answer = message.answer
    sizes = {"boot log": len(answer.boot_log), "IMA list": sum(map(len, answer.ima))}
    for name, size in sizes.items():
        if size > MAX_LOG_BYTES:
            raise LimitError(f"envelope: {name} is {size} bytes, limit {MAX_LOG_BYTES}")
    if len(answer.ima) > _MAX_PARTS:
        raise LimitError(f"envelope: more than {_MAX_PARTS} parts of an IMA list")
    if len(answer.quotes) > _MAX_QUOTES:
        raise LimitError(f"envelope: more than {_MAX_QUOTES} quotes")
    return HeartbeatAnswer(
        quotes=tuple(_quote(quote) for quote in answer.quotes),
        boot_log=answer.boot_log if answer.HasField("boot_log") else None,
        ima=tuple(answer.ima) or None,
        ima_from=answer.ima_from if answer.HasField("ima_from") else None,
        boot_id=parse_boot_id(answer.boot_id),
    )


def _quote(quote: pb.HeartbeatReply.Quote) -> SignedQuote:
    if max(len(quote.attest), len(quote.signature)) > _MAX_STATEMENT_BYTES:
        raise LimitError(f"quote: a statement is larger than {_MAX_STATEMENT_BYTES} bytes")
    if len(quote.values) > _MAX_QUOTES:
        raise LimitError(f"quote: more than {_MAX_QUOTES} banks")
    pcrs: dict[str, dict[int, bytes]] = {}
    for bank in quote.values:
        if bank.bank in pcrs:
            raise InvalidInputError("quote: a bank is given twice")
        if not bank.bank.isascii() or len(bank.bank) > _MAX_NAME:
            raise InvalidInputError("quote: the name of a bank is malformed")
        pcrs[bank.bank] = _values(bank)
    return SignedQuote(quote.attest, quote.signature, pcrs)


def _values(bank: pb.HeartbeatReply.BankValues) -> dict[int, bytes]:
    values: dict[int, bytes] = {}
    last = -1
    for one in bank.pcrs:
        if not last < one.pcr < _MAX_PCRS:
            raise InvalidInputError("quote: PCRs are not in order, or there is no such PCR")
        if len(one.value) > _MAX_VALUE_BYTES:
            raise InvalidInputError(f"quote: PCR {one.pcr} has {len(one.value)} bytes")
        values[one.pcr] = one.value
        last = one.pcr
    return values


def encode_response(
    message: HeartbeatChallenge | StateMessage, *, timeout_s: float
) -> pb.HeartbeatResponse:
    """Return what an agent is sent.

    Args:
        message: a challenge or a state.
        timeout_s: how long an answer may take.
    """
    if isinstance(message, StateMessage):
        next_s = message.next_s
        return pb.HeartbeatResponse(
            state=pb.HeartbeatResponse.State(
                state=message.state.value,
                reasons=message.reasons,
                message=message.message,
                next_ms=0 if next_s is None else max(1, round(next_s * 1000)),
                reattest=message.reattest,
            )
        )
    wanted = message.wanted
    return pb.HeartbeatResponse(
        challenge=pb.HeartbeatResponse.Challenge(
            nonce=message.nonce,
            quotes=[
                pb.HeartbeatResponse.Selection(bank=bank, pcrs=pcrs) for bank, pcrs in wanted.pcrs
            ],
            boot_log=wanted.boot_log,
            ima_from=None if wanted.ima is None else wanted.ima.count,
            timeout_ms=round(timeout_s * 1000),
            reset_count=wanted.reset_count,
        )
    )


def encode_record(agent_id: str, record: EvidenceRecord) -> pb.EvidenceRecord:
    """Return the message of a line of a node's history."""
    findings = decode_findings(record.findings)
    return pb.EvidenceRecord(
        id=record.number,
        agent_id=agent_id,
        made_at=convert.time_to_pb(record.made_at),
        occasion=record.occasion,
        verdict=record.verdict,
        state=record.state,
        findings=[
            pb.EvidenceRecord.Finding(rule=rule, code=code, message=message, action=action)
            for rule, code, message, action in findings
        ],
        policy=record.policy,
        policy_version=record.policy_version,
        policy_sha256=record.policy_sha256,
        evidence_sha256=record.evidence_sha256,
        summary=record.summary,
        has_document=record.has_document,
    )


def encode_posture(agent_id: str, posture: Posture | None, state: str) -> pb.NodePosture:
    """Return the message of what is known of a node; who is connected is for the caller to add.

    Args:
        agent_id: the node.
        posture: None when nothing is known of its machine.
        state: as it is shown.
    """
    message = pb.NodePosture(agent_id=agent_id, state=state)
    if posture is None:
        return message
    message.reasons.extend(posture.reasons)
    message.message = posture.message
    message.since = convert.time_to_pb(posture.since)
    message.last_good_at = convert.time_to_pb(posture.last_good_at)
    message.last_seen_at = convert.time_to_pb(posture.last_seen_at)
    message.policy = posture.policy
    message.policy_version = posture.policy_version
    return message

"""Agent's answer to a challenge, with its logs: within the size of a message, in rounds if need be."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, LimitError, NotReadyError
from spire_hw_plugins.nodeattestor.tpm import machine, rounds, wire
from spire_hw_plugins.nodeattestor.tpm.source import first_entry, reset_count

if TYPE_CHECKING:
    from spire_hw.plugin.nodeattestor import AgentExchange
    from spire_hw_plugins.nodeattestor.tpm.machine import ImaList, Machine

MAX_ROUNDS: Final = 64
# What a message has around base64, and zlib around data that does not get smaller.
_FRAME_BYTES: Final = 512
_MIN_RESPONSE_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the list, ready to be sent."""

    data: bytes
    start: int
    left: int
    next: int


async def send_answer(
    exchange: AgentExchange,
    challenge: wire.ChallengeMessage,
    response: wire.Response,
    shown: Machine,
    boot_log: bytes | None,
) -> None:
    """Send what the TPM said and the logs that were asked for.

    Args:
        exchange: the stream.
        challenge: what is answered.
        response: secret, quotes and certification; the quotes were made before the list is read,
            so the list has at least what was quoted.
        shown: where the list is.
        boot_log: as announced, None without one.

    Raises:
        NotReadyError: a log that is asked for is not there or cannot be read.
        LimitError: a log is larger than the server takes, or it asks without end.
        InvalidInputError: it asks for a part that makes no sense.
    """
    limits = dict(challenge.limits)
    if "log" in challenge.want:
        if boot_log is None:
            raise NotReadyError("log: the server asks for a boot log and this machine shows none")
        _check_size("log", len(boot_log), limits.get("log_bytes"))
        response = replace(response, log=await asyncio.to_thread(machine.compress, boot_log))
    if "ima" not in challenge.want:
        await exchange.send(wire.encode_response(response))
        return
    listed = await asyncio.to_thread(shown.ima_list)
    _check_size("ima", len(listed.raw), limits.get("ima_bytes"))
    own_reset = reset_count(response.quotes[0].attest)
    start = first_entry(listed, challenge.ima_from, challenge.ima_reset, own_reset)
    size = min(limits.get("response_bytes", wire.MAX_RESPONSE_BYTES), wire.MAX_RESPONSE_BYTES)
    size = max(size, _MIN_RESPONSE_BYTES)
    room = _room(size - len(wire.encode_response(response)))
    part = await asyncio.to_thread(_cut, listed, start, room)
    response = replace(response, ima=part.data, ima_from=part.start, ima_left=part.left)
    await exchange.send(wire.encode_response(response))
    await _send_rest(exchange, listed, part.next, _room(size))


async def _send_rest(exchange: AgentExchange, listed: ImaList, due: int, room: int) -> None:
    """Send further parts until the server asks nothing more; it may want the whole list once."""
    for _ in range(MAX_ROUNDS):
        message = await exchange.next_challenge()
        if message is None:
            return
        start = rounds.decode_part_request(message)
        if start not in {due, 0}:
            raise InvalidInputError("challenge: the list does not go on there")
        part = await asyncio.to_thread(_cut, listed, start, room)
        await exchange.send(rounds.encode_part(rounds.ImaPart(part.data, start, part.left)))
        due = part.next
    raise LimitError("challenge: too many rounds")


def _cut(listed: ImaList, start: int, room: int) -> _Part:
    lines, left = listed.part(start, room)
    return _Part(machine.compress(lines), start, left, start + lines.count(b"\n"))


def _room(message_bytes: int) -> int:
    """Return how many bytes fit into a message even if they do not get smaller."""
    return max((message_bytes - _FRAME_BYTES) * 3 // 4 - _FRAME_BYTES, 0)


def _check_size(stage: str, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise LimitError(f"{stage}: larger than {limit} bytes, which is all the server takes")

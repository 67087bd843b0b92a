"""An IMA list on its way to the server: in parts, each within a message, together within bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spire_hw.errors import InvalidInputError, LimitError
from spire_hw.tpm import imalist
from spire_hw_plugins.nodeattestor.tpm.replay import unpack_ima
from spire_hw_plugins.nodeattestor.tpm.rounds import ImaPart, decode_part, encode_part_request
from spire_hw_plugins.nodeattestor.tpm.statements import refusal

if TYPE_CHECKING:
    from spire_hw_plugins.nodeattestor.tpm.replay import Logs
    from spire_hw_plugins.nodeattestor.tpm.talk import Talk
    from spire_hw_plugins.nodeattestor.tpm.wire import Response


async def fetch_list(logs: Logs, response: Response | None, talk: Talk) -> Logs:
    """Return a node's list, with what did not fit into its answer asked for.

    Args:
        logs: what is there already.
        response: the answer that has the first part; None to ask for the whole list anew.
        talk: takes further rounds.

    Raises:
        LimitError: too many bytes, entries or rounds.
        InvalidInputError: parts that do not fit together.
        AttestationError: `ima_missing`.
    """
    if response is None:
        part = await _ask(talk, 0)
    elif response.ima is None:
        raise refusal("ima_missing", "ima: list is missing")
    else:
        part = ImaPart(response.ima, response.ima_from or 0, response.ima_left or 0)
    start, count, size = part.start, 0, 0
    parts: list[bytes] = []
    while True:
        parts.append(_unpack(part, size))
        size += len(parts[-1])
        count += parts[-1].count(b"\n")
        if count + part.left > imalist.MAX_ENTRIES:
            raise LimitError(f"ima: more than {imalist.MAX_ENTRIES} entries")
        if not part.left:
            return replace(logs, ima=tuple(parts), ima_from=start)
        left, part = part.left, await _ask(talk, start + count)
        if part.left >= left:
            raise InvalidInputError("ima: parts of the list do not fit together")


async def _ask(talk: Talk, start: int) -> ImaPart:
    part = decode_part(await talk.ask(encode_part_request(start)))
    if part.start != start:
        raise InvalidInputError("ima: parts of the list do not fit together")
    return part


def _unpack(part: ImaPart, before: int) -> bytes:
    lines = unpack_ima(part.data, before)
    if lines and not lines.endswith(b"\n"):
        raise InvalidInputError("ima: part of the list does not end with a line")
    return lines

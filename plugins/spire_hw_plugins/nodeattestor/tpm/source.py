"""Agent's side of a heartbeat: one quote per bank, bound to the nonce and to the SVID's key.

The attestation key was made when the node attested, and its context stays saved, so that a
heartbeat costs the TPM little more than the quote.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spire_hw.bootid import read_boot_id
from spire_hw.errors import InvalidInputError
from spire_hw.posture.heartbeat import HeartbeatAnswer, SignedQuote
from spire_hw.tpm import attest, imalist, verify
from spire_hw.tpm.wire import BANKS, PCR_COUNT, PcrSelection, parse_attest
from spire_hw_plugins.nodeattestor.tpm import machine

if TYPE_CHECKING:
    from spire_hw.posture.heartbeat import HeartbeatChallenge
    from spire_hw.tpm.connection import Connection
    from spire_hw.tpm.device import TpmDevice
    from spire_hw_plugins.nodeattestor.tpm.machine import ImaList, Machine

_SPKI_HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Logs:
    boot_log: bytes | None
    ima: tuple[bytes, ...] | None
    ima_from: int | None


async def answer_heartbeat(
    device: TpmDevice, machine_: Machine, challenge: HeartbeatChallenge, svid_spki_sha256: bytes
) -> HeartbeatAnswer:
    """Answer; see `spire_hw.posture.heartbeat.HeartbeatSource`.

    Raises:
        InvalidInputError: a challenge that is malformed.
        SpireHwError: the TPM or a log cannot be read now.
    """
    asked = _check(challenge, svid_spki_sha256)
    quotes = await device.run(
        "answer a heartbeat",
        lambda connection: _quote(connection, challenge, asked, svid_spki_sha256),
    )
    # After the quote: the list may only be longer than what was quoted.
    logs = await asyncio.to_thread(_read, machine_, challenge, reset_count(quotes[0].attest))
    return HeartbeatAnswer(
        quotes=quotes,
        boot_log=logs.boot_log,
        ima=logs.ima,
        ima_from=logs.ima_from,
        boot_id=read_boot_id(),
    )


def _check(challenge: HeartbeatChallenge, svid_spki_sha256: bytes) -> tuple[PcrSelection, ...]:
    if len(challenge.nonce) != verify.NONCE_BYTES or len(svid_spki_sha256) != _SPKI_HASH_BYTES:
        raise InvalidInputError(f"challenge: nonce must be {verify.NONCE_BYTES} bytes")
    pcrs = challenge.wanted.pcrs
    banks = {bank for bank, _ in pcrs}
    if not pcrs or len(banks) != len(pcrs) or banks - BANKS.keys():
        raise InvalidInputError("challenge: PCR request is malformed")
    if any(
        not numbers
        or len(set(numbers)) != len(numbers)
        or not set(numbers) <= set(range(PCR_COUNT))
        for _, numbers in pcrs
    ):
        raise InvalidInputError("challenge: PCR request is malformed")
    return tuple(PcrSelection(bank, tuple(sorted(numbers))) for bank, numbers in pcrs)


def _quote(
    connection: Connection,
    challenge: HeartbeatChallenge,
    asked: tuple[PcrSelection, ...],
    svid_spki_sha256: bytes,
) -> tuple[SignedQuote, ...]:
    name = attest.attestation_key_name(connection)
    bound = verify.qualifier("heartbeat", challenge.nonce, svid_spki_sha256, b"", name)
    quotes = []
    for selection in asked:
        made = attest.quote(connection, selection, bound)
        values = {selection.bank: made.values}
        quotes.append(SignedQuote(made.signed.attest, made.signed.signature, values))
    return tuple(quotes)


def reset_count(attest_: bytes) -> int:
    """Return the number of resets a statement of our own attestation key tells."""
    return parse_attest(attest_).clock.reset_count


def first_entry(listed: ImaList, start: int, asked_reset: int | None, own_reset: int) -> int:
    """Return where to begin a list the server has seen the start of.

    Args:
        listed: the list.
        start: what the server has not seen yet.
        asked_reset: the boot it means, by the TPM's reset count; None when it does not say.
        own_reset: this boot.
    """
    if asked_reset is not None and asked_reset != own_reset:
        return 0
    # A list that is shorter than what the server has seen is another one: show all of it.
    return start if start <= len(listed) else 0


def _read(machine_: Machine, challenge: HeartbeatChallenge, own_reset: int) -> _Logs:
    wanted = challenge.wanted
    boot_log = machine.compress(machine_.boot_log()) if wanted.boot_log else None
    if wanted.ima is None:
        return _Logs(boot_log, None, None)
    listed = machine_.ima_list()
    start = first_entry(listed, wanted.ima.count, wanted.reset_count, own_reset)
    parts = tuple(machine.compress(part) for part in listed.parts(start, imalist.PART_BYTES))
    return _Logs(boot_log, parts, start)

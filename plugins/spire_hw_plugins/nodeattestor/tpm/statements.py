"""What a node's attestation key signed, held against what was asked: in attestations and heartbeats.

Faults are collected, so that an operator sees all of them; the first one is what the node is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeVar

from spire_hw.errors import AttestationError, ErrorKind, Finding
from spire_hw.posture.evidence import Counters
from spire_hw.tpm import public, verify, wire
from spire_hw.tpm.wire import PcrSelection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from spire_hw.posture.evidence import PcrValues
    from spire_hw.tpm.public import TpmPublic
    from spire_hw.tpm.verify import Quote, Statement
    from spire_hw.tpm.wire import ClockInfo

T = TypeVar("T")

_PRIMARIES = {
    "endorsement": wire.RH_ENDORSEMENT.to_bytes(4, "big"),
    "owner": wire.RH_OWNER.to_bytes(4, "big"),
}


@dataclass(frozen=True, slots=True)
class Signer:
    """An attestation key and its place.

    Attributes:
        ak: its public area.
        hierarchy: `endorsement` or `owner`.
        qualified_name: what every statement of it has to say.
    """

    ak: TpmPublic
    hierarchy: str
    qualified_name: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """A quote as it came: statement, and bank to PCR number to value."""

    statement: Statement
    values: Mapping[str, Mapping[int, bytes]]


@dataclass(frozen=True, slots=True)
class Quoted:
    """What all quotes of one exchange proved together.

    Attributes:
        pcrs: (bank, PCR number) to value.
        first: one of the quotes; the counters of all are the same.
        clock: of the last one.
    """

    pcrs: PcrValues
    first: Quote
    clock: ClockInfo


@lru_cache(maxsize=256)
def known_signer(ak_public: bytes, hierarchy: str, qualified_name: bytes) -> Signer:
    """Return an attestation key that was checked when its node attested.

    Args:
        ak_public: TPMT_PUBLIC.
        hierarchy: `endorsement` or `owner`.
        qualified_name: b"" for a primary key.

    Raises:
        InvalidInputError: what is stored about it does not parse.
    """
    ak = public.parse_public(ak_public, "ak: public area")
    place = qualified_name or public.qualified_name(_PRIMARIES[hierarchy], ak.name)
    return Signer(ak, hierarchy, place)


def refusal(code: str, text: str, kind: ErrorKind = ErrorKind.INVALID_ARGUMENT) -> AttestationError:
    """Return an error with one finding."""
    return AttestationError([Finding(code, text, kind)])


def collect(findings: list[Finding], step: Callable[[], T]) -> T | None:
    """Do one step; what it finds goes to the others, and then there is no result."""
    try:
        return step()
    except AttestationError as e:
        findings.extend(e.findings)
        return None


def check_quotes(
    signer: Signer,
    expected: bytes,
    asked: Sequence[PcrSelection],
    claims: Sequence[Claim],
    findings: list[Finding],
) -> Quoted | None:
    """Return what quotes prove, None when they do not hold.

    Args:
        signer: whose quotes they must be.
        expected: qualifying data they must have.
        asked: one quote each, in this order, one bank each.
        claims: what came.
        findings: takes every fault.
    """
    if len(claims) != len(asked):
        findings.append(Finding("evidence_missing", "quote: evidence asked for is missing"))
        return None
    quotes = []
    for selection, claim in zip(asked, claims, strict=True):
        quote = collect(findings, partial(_check_quote, signer, expected, selection, claim))
        if quote is not None:
            quotes.append(quote)
    if not quotes or len(quotes) != len(asked):
        return None
    boots = {(quote.clock.reset_count, quote.clock.restart_count) for quote in quotes}
    if len(boots) > 1:
        text = "counters: TPM was reset between two quotes of one exchange"
        findings.append(Finding("counters_mismatch", text))
        return None
    pcrs = {place: value for quote in quotes for place, value in quote.pcrs.items()}
    return Quoted(pcrs, quotes[0], quotes[-1].clock)


def _check_quote(signer: Signer, expected: bytes, selection: PcrSelection, claim: Claim) -> Quote:
    return verify.verify_quote(
        signer.ak,
        signer.qualified_name,
        expected=expected,
        selections=(selection,),
        statement=claim.statement,
        values=claim.values,
    )


def counters_of(clock: ClockInfo, firmware_version: int) -> Counters:
    """Return counters as a statement says them."""
    return Counters(
        clock_ms=clock.clock_ms,
        reset_count=clock.reset_count,
        restart_count=clock.restart_count,
        safe=clock.safe,
        firmware_version=firmware_version,
    )


def selections(pcrs: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[PcrSelection, ...]:
    """Return what a host asks for as the TPM names it."""
    return tuple(PcrSelection(bank, tuple(numbers)) for bank, numbers in pcrs)


def with_pcrs(
    asked: tuple[PcrSelection, ...], needed: Iterable[tuple[str, int]]
) -> tuple[PcrSelection, ...]:
    """Return selections that have further PCRs in them; a bank that is not there yet goes last."""
    banks = {selection.bank: set(selection.pcrs) for selection in asked}
    for bank, n in needed:
        banks.setdefault(bank, set()).add(n)
    return tuple(PcrSelection(bank, tuple(sorted(numbers))) for bank, numbers in banks.items())

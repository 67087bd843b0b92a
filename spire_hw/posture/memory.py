"""What is remembered of a node, for its next evidence to be compared with.

Only evidence that was accepted gets here: a node that shows something worse keeps failing until it
shows something better, and heals by that alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError
from spire_hw.posture.evidence import Counters, ImaState
from spire_hw.posture.heartbeat import KnownNode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.posture.evidence import BootFacts, Evidence, ImaFacts, PcrValues

# Boots that are remembered besides the present one: two machines with one TPM take turns.
EARLIER_BOOTS: Final = 4
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Boot:
    """A boot that is over, or seems to be.

    Attributes:
        reset_count: the TPM's, None when it was hidden.
        boot_id: the kernel's, None when it was not told.
        clock_ms: the TPM's clock when it was last seen, 0 when it was hidden.
    """

    reset_count: int | None
    boot_id: str | None
    clock_ms: int


_UNKNOWN_BOOT: Final = Boot(None, None, 0)


@dataclass(frozen=True, slots=True)
class Memory:
    """One node's.

    Attributes:
        last: the last evidence that was accepted, completed with what the same boot showed before;
            its IMA facts are without entries.
        earlier: boots before, the newest first.
        held_reset: a quarantine ends with a boot after this reset count; None when there is none.
        lenient: an operator vouched for the machine: the next evidence is compared with nothing.
        policy_sha256: digest of the policy all of it was judged by, "" for none.
    """

    last: Evidence
    earlier: tuple[Boot, ...] = ()
    held_reset: int | None = None
    lenient: bool = False
    policy_sha256: str = ""

    @property
    def ima(self) -> ImaState | None:
        """Return how far the IMA list of the present boot is known."""
        return None if self.last.ima is None else self.last.ima.state

    @property
    def reset_count(self) -> int | None:
        """Return the reset count of the present boot, None when it was hidden."""
        return None if self.last.counters is None else self.last.counters.reset_count

    def known_node(self, svid_spki_sha256: bytes) -> KnownNode:
        """Return what a heartbeat is checked with.

        Args:
            svid_spki_sha256: of the certificate that authenticates its stream.
        """
        last = self.last
        return KnownNode(
            ek=last.ek,
            ak_public=last.ak_public,
            ak_hierarchy=last.ak_hierarchy,
            svid_spki_sha256=svid_spki_sha256,
            key_in_tpm=last.key_in_tpm,
            ak_qualified_name=last.ak_qualified_name,
            ak_scramble=last.ak_scramble,
        )


def is_same_boot(memory: Memory, evidence: Evidence) -> bool:
    """Tell whether evidence is of the boot that is remembered.

    Where the TPM's counters are hidden, the boot id decides.
    """
    before, now = memory.last.counters, evidence.counters
    if before is not None and now is not None:
        return before.reset_count == now.reset_count
    return memory.last.boot_id is not None and memory.last.boot_id == evidence.boot_id


def has_rebooted(memory: Memory, evidence: Evidence) -> bool:
    """Tell whether the machine is known to have booted since."""
    before, now = memory.last, evidence
    if before.counters is not None and now.counters is not None:
        return before.counters.reset_count != now.counters.reset_count
    return None not in {before.boot_id, now.boot_id} and before.boot_id != now.boot_id


def complete(memory: Memory | None, evidence: Evidence) -> Evidence:
    """Put the boot log's facts in where the same boot showed them before.

    They are left out when a PCR that the log explained has another value now, or was not quoted.
    """
    if memory is None or evidence.boot is not None or not is_same_boot(memory, evidence):
        return evidence
    boot = memory.last.boot
    if boot is None or not _still_explained(boot, memory.last.pcrs, evidence.pcrs):
        return evidence
    return replace(evidence, boot=boot)


def _still_explained(boot: BootFacts, before: PcrValues, now: PcrValues) -> bool:
    places = [(boot.bank, number) for number in boot.explained]
    return all(place in now and now[place] == before.get(place) for place in places)


def advance(memory: Memory | None, evidence: Evidence, policy_sha256: str = "") -> Memory:
    """Return the memory after evidence was accepted.

    Args:
        memory: before, None for none.
        evidence: what was accepted.
        policy_sha256: digest of the policy that accepted it, "" for none.
    """
    evidence = complete(memory, evidence)
    ima = None if evidence.ima is None else _without_entries(evidence.ima)
    if memory is None or memory.lenient:
        return Memory(replace(evidence, ima=ima, findings=()), policy_sha256=policy_sha256)
    same = is_same_boot(memory, evidence)
    if same:
        pcrs = {**memory.last.pcrs, **evidence.pcrs}
        kept = replace(evidence, pcrs=pcrs, ima=ima or memory.last.ima, findings=())
    else:
        kept = replace(evidence, ima=ima, findings=())
    earlier = memory.earlier
    over = _boot(memory.last)
    if (not same or over.boot_id != evidence.boot_id) and over != _UNKNOWN_BOOT:
        earlier = (over, *earlier)[:EARLIER_BOOTS]
    return Memory(kept, earlier, policy_sha256=policy_sha256)


def _without_entries(ima: ImaFacts) -> ImaFacts:
    return replace(ima, entries=())


def _boot(evidence: Evidence) -> Boot:
    counters = evidence.counters
    if counters is None:
        return Boot(None, evidence.boot_id, 0)
    return Boot(counters.reset_count, evidence.boot_id, counters.clock_ms)


def has_same_facts(one: Evidence, other: Evidence) -> bool:
    """Tell whether a policy says the same to both: they differ in time, clock and boot id alone."""

    def plain(evidence: Evidence) -> Evidence:
        counters = evidence.counters
        if counters is not None:
            counters = replace(counters, clock_ms=0, reset_count=0, restart_count=0, safe=True)
        return replace(
            evidence, made_at=_LONG_AGO, occasion=one.occasion, boot_id=None, counters=counters
        )

    return plain(one) == plain(other)


_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)


def encode_memory(memory: Memory) -> str:
    """Return what changes from heartbeat to heartbeat as ASCII JSON.

    The rest of `last` is in the evidence document stored beside it.
    """
    last = memory.last
    return json.dumps(
        {
            "version": _VERSION,
            "made_at": last.made_at.timestamp(),
            "counters": None if last.counters is None else _counters_out(last.counters),
            "pcrs": {
                f"{bank}:{number}": value.hex() for (bank, number), value in last.pcrs.items()
            },
            "ima": None if memory.ima is None else _state_out(memory.ima),
            "boot_id": last.boot_id,
            "earlier": [[b.reset_count, b.boot_id, b.clock_ms] for b in memory.earlier],
            "held_reset": memory.held_reset,
            "lenient": memory.lenient,
            "policy_sha256": memory.policy_sha256,
        },
        separators=(",", ":"),
    )


def decode_memory(text: str, document: Evidence) -> Memory:
    """Return what `encode_memory` was given.

    Args:
        text: as it returned it.
        document: the evidence stored beside it.

    Raises:
        EncodingError: it is something else.
    """
    try:
        data = json.loads(text)
        if data["version"] != _VERSION:
            raise EncodingError("memory of a node", f"version {data['version']} is not known")
        ima = document.ima
        if ima is not None and data["ima"] is not None:
            ima = replace(ima, state=_state_in(data["ima"]), entries=())
        last = replace(
            document,
            made_at=datetime.fromtimestamp(data["made_at"], UTC),
            counters=None if data["counters"] is None else Counters(*data["counters"]),
            pcrs=_pcrs_in(data["pcrs"]),
            ima=ima,
            boot_id=data["boot_id"],
        )
        earlier = tuple(Boot(*boot) for boot in data["earlier"])
        held, lenient = data["held_reset"], data["lenient"]
        return Memory(last, earlier, held, lenient, data["policy_sha256"])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
        if isinstance(e, EncodingError):
            raise
        raise EncodingError("memory of a node", f"cannot be read ({type(e).__name__})") from e


def _counters_out(counters: Counters) -> list[Any]:
    return [
        counters.clock_ms,
        counters.reset_count,
        counters.restart_count,
        counters.safe,
        counters.firmware_version,
    ]


def _state_out(state: ImaState) -> list[Any]:
    return [state.count, state.pcr.hex(), state.sha256.hex()]


def _state_in(data: list[Any]) -> ImaState:
    count, pcr, digest = data
    return ImaState(count, bytes.fromhex(pcr), bytes.fromhex(digest))


def _pcrs_in(data: Mapping[str, str]) -> dict[tuple[str, int], bytes]:
    split = {place.partition(":"): value for place, value in data.items()}
    return {(bank, int(number)): bytes.fromhex(v) for (bank, _, number), v in split.items()}

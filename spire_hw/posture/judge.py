"""The seam between an attestor, which proves facts, and its host, which knows policies and nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from spire_hw.posture.evidence import EkFacts, Evidence, ImaState
    from spire_hw.posture.verdict import Verdict
    from spire_hw.spiffeid import SpiffeId


@dataclass(frozen=True, slots=True)
class EvidenceRequest:
    """What a node has to show.

    Attributes:
        pcrs: bank and PCR numbers, ascending, one quote per bank; empty for the attestor's own.
        boot_log: whether the boot log is wanted.
        ima: where the kernel's list goes on from (`count` 0 at the first time); None when it is
            not wanted.
        reset_count: of the boot `ima` or `known_ima` belongs to: under another count the list
            starts at 0. None without either.
        known_ima: an earlier state of that same boot which a list from its start must pass through.
        counters: whether the TPM's true counters are needed; `counters_hidden` without them.
        tolerate: what is refused unless it is among these: `sha1_log` (a boot log in the old
            format), `empty_secure_boot`, `early_authority` (see `tpm.boot.BootRules`),
            `padded_sha1` (an IMA list of a kernel before 5.8).
        bank: whose PCRs the log and the list are replayed to; "" for the attestor's choice.
    """

    pcrs: tuple[tuple[str, tuple[int, ...]], ...] = ()
    boot_log: bool = False
    ima: ImaState | None = None
    reset_count: int | None = None
    known_ima: ImaState | None = None
    counters: bool = False
    tolerate: frozenset[str] = frozenset()
    bank: str = ""


class Judge(Protocol):
    """The host's side."""

    async def request(self, agent_id: SpiffeId, ek: EkFacts) -> EvidenceRequest:
        """Return what to ask of a node whose claimed endorsement key was accepted.

        Raises:
            AttestationError: `no_policy`, none applies and the default is deny.
            DeniedError: the node is banned.
        """
        ...

    async def judge(self, agent_id: SpiffeId, evidence: Evidence) -> Verdict:
        """Return what policy and the memory of the node make of proved evidence.

        Called after the activation secret and the attestation key's signatures were verified, so
        a verdict that does not hold changes the node's state.

        Raises:
            AttestationError: with the findings of the checks that do not hold.
        """
        ...

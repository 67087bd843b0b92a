"""One heartbeat between the two halves of an attestor, whatever carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from spire_hw.posture.evidence import EkFacts, Evidence, Scramble
    from spire_hw.posture.judge import EvidenceRequest


@dataclass(frozen=True, slots=True)
class HeartbeatChallenge:
    """What the server asks.

    Attributes:
        nonce: 32 random bytes.
        wanted: PCRs, log, and where the IMA list goes on; `pcrs` is never empty here.
    """

    nonce: bytes
    wanted: EvidenceRequest


@dataclass(frozen=True, slots=True)
class SignedQuote:
    """TPMS_ATTEST, TPMT_SIGNATURE, and the values they cover: bank to PCR number to value."""

    attest: bytes
    signature: bytes
    pcrs: Mapping[str, Mapping[int, bytes]]


@dataclass(frozen=True, slots=True)
class HeartbeatAnswer:
    """What the node answers.

    Attributes:
        quotes: one per bank asked for, in that order.
        boot_log: zlib of the firmware's log, None when not asked for.
        ima: the kernel's ASCII list from entry `ima_from`, zlib of whole lines in each part; None
            when not asked for.
        ima_from: first entry of that part.
        boot_id: the kernel's boot id.
    """

    quotes: tuple[SignedQuote, ...]
    boot_log: bytes | None = None
    ima: tuple[bytes, ...] | None = None
    ima_from: int | None = None
    boot_id: str | None = None


@dataclass(frozen=True, slots=True)
class KnownNode:
    """What the server knows of a node that attested before.

    Attributes:
        ek: its endorsement key.
        ak_public: TPMT_PUBLIC of its attestation key.
        ak_hierarchy: where that key lives.
        svid_spki_sha256: of the certificate that authenticates the heartbeat's stream.
        key_in_tpm: that certificate's key was certified at attestation.
        ak_qualified_name: as in its evidence.
        ak_scramble: as in its evidence.
    """

    ek: EkFacts
    ak_public: bytes
    ak_hierarchy: str
    svid_spki_sha256: bytes
    key_in_tpm: bool
    ak_qualified_name: bytes = b""
    ak_scramble: Scramble | None = None


@runtime_checkable
class HeartbeatSource(Protocol):
    """Ability of an agent's node attestor."""

    async def heartbeat(
        self, challenge: HeartbeatChallenge, svid_spki_sha256: bytes
    ) -> HeartbeatAnswer:
        """Quote, bound to the nonce and to the SVID's key.

        Raises:
            InvalidInputError: a challenge that is malformed.
            SpireHwError: the TPM cannot answer now.
        """
        ...


@runtime_checkable
class HeartbeatVerifier(Protocol):
    """Ability of a server's node attestor."""

    async def check_heartbeat(
        self,
        node: KnownNode,
        challenge: HeartbeatChallenge,
        answer: HeartbeatAnswer,
        now: datetime,
    ) -> Evidence:
        """Return what a heartbeat proved.

        Raises:
            InvalidInputError: an answer that does not parse.
            LimitError: a log or list larger than allowed.
            AttestationError: a statement that does not hold.
        """
        ...

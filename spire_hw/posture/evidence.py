"""What one exchange with a node proved: facts only, each of them verified.

Whoever makes these values has checked signatures, replayed the logs against quoted PCRs, and left
out what nothing vouches for. They are what policies are evaluated over, what is stored, and what
`policy test` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.errors import Finding

# In front of the algorithm of an fs-verity digest.
VERITY: Final = "verity:"
_U32, _U64 = 2**32, 2**64

# (bank, PCR number) to value.
PcrValues = Mapping[tuple[str, int], bytes]


class Occasion(Enum):
    """What the evidence was given for."""

    ATTESTATION = "attestation"
    HEARTBEAT = "heartbeat"


class Tier(Enum):
    """How much the exchange proved."""

    ACTIVATION = "activation"  # which TPM it is
    QUOTE = "quote"  # and in what state its machine is


@dataclass(frozen=True, slots=True)
class EkFacts:
    """The endorsement key.

    Attributes:
        hash: lower-case hex SHA-256 of its SubjectPublicKeyInfo.
        methods: how it was allowed, of `ca` and `hash`.
        root: lower-case hex SHA-256 of the manufacturer's root certificate; None without a
            verified certificate, as are the next three.
        manufacturer: such as `id:4E544300`.
        model: manufacturer's name of the part.
        version: manufacturer's firmware version.
    """

    hash: str
    methods: tuple[str, ...]
    root: str | None = None
    manufacturer: str | None = None
    model: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Counters:
    """The TPM's own, true (not scrambled) values.

    Attributes:
        clock_ms: powered-on milliseconds since the last clear.
        reset_count: restarts of the machine.
        restart_count: resumes since the last restart.
        safe: the clock cannot have gone back.
        firmware_version: vendor's number.
    """

    clock_ms: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware_version: int


@dataclass(frozen=True, slots=True)
class Scramble:
    """What a TPM adds to the counters in all statements of one key, modulo their size.

    It does so for keys outside the endorsement hierarchy, and always the same for the same key.

    Attributes:
        reset_count: of 32 bits.
        restart_count: of 32 bits.
        firmware_version: of 64 bits.

    Spec: TPM 2.0 Library, Part 1 "Attestation", obfuscation of values in an attestation.
    """

    reset_count: int
    restart_count: int
    firmware_version: int

    @classmethod
    def between(cls, said: Counters, true: Counters) -> Scramble:
        """Return what lies between what a statement says and what was true at that moment."""
        return cls(
            (said.reset_count - true.reset_count) % _U32,
            (said.restart_count - true.restart_count) % _U32,
            (said.firmware_version - true.firmware_version) % _U64,
        )

    def undo(self, said: Counters) -> Counters:
        """Return the true values behind those of a statement; the clock is never scrambled."""
        return Counters(
            clock_ms=said.clock_ms,
            reset_count=(said.reset_count - self.reset_count) % _U32,
            restart_count=(said.restart_count - self.restart_count) % _U32,
            safe=said.safe,
            firmware_version=(said.firmware_version - self.firmware_version) % _U64,
        )


@dataclass(frozen=True, slots=True)
class BootImage:
    """An image firmware started: the PCR it was measured into, and its Authenticode digest."""

    pcr: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class BootFacts:
    """What a replayed boot log vouches for. Digests of variables are SHA-256 of their data.

    Attributes:
        log_sha256: lower-case hex SHA-256 of the log.
        bank: bank it was replayed in.
        explained: PCRs whose quoted value the log reproduces.
        secure_boot: on or off; None where PCR 7 was not quoted.
        debug_mode: firmware measured "UEFI Debug Mode".
        dma_protection: False when firmware measured that it is disabled.
        firmware_error: a PCR ends with the error separator.
        variables: name (`PK`, `KEK`, `db`, `dbx`, ...) to hex SHA-256 of the variable's data.
        db: hex SHA-256 of each entry (certificate or hash) of db.
        dbx: the same of dbx.
        sbat: first line of SbatLevel, such as `sbat,1,2023012900`.
        authorities: hex SHA-256 of each certificate that let an image start.
        images: images in PCR 2 and 4 in order, up to the hand-over.
        commands: commands and kernel command lines (PCR 8, 12); `digest:` and hex for one that
            does not match its digest, `hex:` and its bytes for one that is not text.
        files: digests of loaded files (PCR 9 of GRUB and the Linux stub).
        uki: hex value of PCR 11 after the stub's measurements, None without a stub.
        mok: PCR 14 is not empty, so shim's lists are in it; None where PCR 14 was not quoted.
        mok_digests: their digests, in order.
        crtm_version: firmware's version text, or `hex:` and its bytes, "" when not measured.
        workarounds: names of known faults of firmware that had to be made up for.
    """

    log_sha256: str
    bank: str
    explained: tuple[int, ...]
    secure_boot: bool | None = None
    debug_mode: bool = False
    dma_protection: bool = True
    firmware_error: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    db: tuple[str, ...] = ()
    dbx: frozenset[str] = frozenset()
    sbat: str = ""
    authorities: tuple[str, ...] = ()
    images: tuple[BootImage, ...] = ()
    commands: tuple[str, ...] = ()
    files: tuple[bytes, ...] = ()
    uki: str | None = None
    mok: bool | None = None
    mok_digests: tuple[bytes, ...] = ()
    crtm_version: str = ""
    workarounds: tuple[str, ...] = ()


class AppendedSignature(NamedTuple):
    """A signature at the end of a file, as kernel modules have it.

    Attributes:
        algorithm: of the digest, such as `sha256`.
        digest: of the content in front of the signature.
        signature: DER of the PKCS#7 message.
    """

    algorithm: str
    digest: bytes
    signature: bytes


class ImaEntry(NamedTuple):
    """One file (or buffer) the kernel measured; there are ten thousand of them in a list.

    Attributes:
        path: as the kernel wrote it; any bytes but NUL, blanks as `_`.
        algorithm: of the digest, such as `sha256`; `verity:sha256` for fs-verity's digest, which is
            not that of the content alone.
        digest: of the file's content.
        template: the kernel's name of it (`ima-ng`, `evm-sig`, …), or `custom` for a format of the
            machine's own.
        signature: the file's signature as the kernel listed it, b"" without one.
        appended: the signature inside the file, None without one.
    """

    path: bytes
    algorithm: str
    digest: bytes
    template: str
    signature: bytes = b""
    appended: AppendedSignature | None = None


@dataclass(frozen=True, slots=True)
class ImaState:
    """How far a node's list was replayed; the next part starts here.

    Attributes:
        count: entries so far, of this boot.
        pcr: value of PCR 10 after them.
        sha256: running digest over the entries, to tell a rewritten list.
    """

    count: int
    pcr: bytes
    sha256: bytes


@dataclass(frozen=True, slots=True)
class ImaFacts:
    """A part of the kernel's list that replays to the quoted PCR 10.

    Attributes:
        start: number of its first entry.
        state: where it ends.
        entries: without violations and the boot aggregate.
        violations: how many of them the kernel marked as not reliable, in this part.
        padded_sha1: the kernel extends SHA-1 into larger banks (before 5.8).
    """

    start: int
    state: ImaState
    entries: tuple[ImaEntry, ...] = ()
    violations: int = 0
    padded_sha1: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it.

    Attributes:
        made_at: server's time when it was checked.
        occasion: what it was given for.
        tier: how much it proves.
        ek: the endorsement key.
        ak_public: TPMT_PUBLIC of the attestation key.
        ak_hierarchy: `endorsement` or `owner`.
        ak_qualified_name: where in it that key is, as all its statements say; b"" for a primary.
        ak_scramble: what the TPM adds to counters in statements of that key; None for nothing, or
            when it was never proved.
        key_in_tpm: the SVID's key was certified.
        counters: None when the attestation key's place hides them.
        pcrs: what was quoted.
        boot: None when no boot log was asked for.
        ima: None when no IMA list was asked for.
        boot_id: the kernel's boot id, as claimed; only ever a hint.
        findings: what speaks against the node although its key signed it: `bank_unused`,
            `ima_rollback`. Such evidence never holds; it reaches the judge for the node's state.
    """

    made_at: datetime
    occasion: Occasion
    tier: Tier
    ek: EkFacts
    ak_public: bytes
    ak_hierarchy: str = "endorsement"
    ak_qualified_name: bytes = b""
    ak_scramble: Scramble | None = None
    key_in_tpm: bool = False
    counters: Counters | None = None
    pcrs: PcrValues = field(default_factory=dict)
    boot: BootFacts | None = None
    ima: ImaFacts | None = None
    boot_id: str | None = None
    findings: tuple[Finding, ...] = ()

"""What an operator demands of machines, as values.

Reading them from text is the business of `policyfile`, holding evidence against them that of
`evaluate`, choosing the one for a node that of `policyset`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from spire_hw.posture.evidence import ImaState
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.posture.patterns import Patterns

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from spire_hw.posture.evidence import EkFacts
    from spire_hw.posture.signature import FileKey
    from spire_hw.posture.verdict import Action

SecureBoot = Literal["on", "off", "any"]
Mok = Literal["absent", "present", "any"]
# (bank, PCR number) to the values it may have.
AllowedPcrs = Mapping[tuple[str, int], frozenset[bytes]]

# What a boot log is replayed against, and what the kernel's aggregate is taken over.
_LOG_PCRS: Final = range(8)
_AGGREGATE_PCRS: Final = range(10)
IMA_PCR: Final = 10
PCR_COUNT: Final = 24
# Banks and the size of their values.
BANK_BYTES: Final = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}
# The same for digests of files; fs-verity has two.
FILE_DIGEST_BYTES: Final = {**BANK_BYTES, "verity:sha256": 32, "verity:sha512": 64}


def ima_start(bank: str) -> ImaState:
    """Return where an IMA list starts."""
    return ImaState(0, bytes(BANK_BYTES[bank]), hashlib.sha256().digest())


def ek_selectors(ek: EkFacts) -> frozenset[str]:
    """Return what node groups can ask for, as selector values without the type."""
    found = {f"pub_hash:{ek.hash}"} | {f"ek:method:{method}" for method in ek.methods}
    if ek.root is not None:
        found.add(f"ek:ca:{ek.root}")
    named = {"manufacturer": ek.manufacturer, "model": ek.model, "version": ek.version}
    return frozenset(found | {f"{name}:{value}" for name, value in named.items() if value})


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes that have all these selectors and, where there is a list, one of its keys.

    Attributes:
        selectors: values of `ek_selectors`.
        ek_hashes: lower-case hex SHA-256 of endorsement keys; empty for any.
    """

    selectors: frozenset[str] = frozenset()
    ek_hashes: frozenset[str] = frozenset()

    @property
    def rank(self) -> tuple[bool, int]:
        """Return how closely it names its nodes; the greater goes first."""
        return bool(self.ek_hashes), len(self.selectors)

    def has(self, selectors: Collection[str]) -> bool:
        """Tell whether a node with these selectors belongs to it."""
        if not self.selectors.issubset(selectors):
            return False
        return not self.ek_hashes or any(
            value.removeprefix("pub_hash:") in self.ek_hashes
            for value in selectors
            if value.startswith("pub_hash:")
        )


@dataclass(frozen=True, slots=True)
class TpmRules:
    """What the TPM has to be; empty means any.

    Attributes:
        roots: lower-case hex SHA-256 of manufacturers' root certificates.
        manufacturers: such as `id:4E544300`.
        models: manufacturers' names of parts.
        firmware_floors: least firmware version by manufacturer, `*` for every other one.
        key_in_tpm: the SVID's key must be certified.
        counters: the TPM's true counters must be visible.
    """

    roots: frozenset[str] = frozenset()
    manufacturers: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    firmware_floors: Mapping[str, int] = field(default_factory=dict)
    key_in_tpm: bool = True
    counters: bool = False


@dataclass(frozen=True, slots=True)
class PcrSet:
    """Values that belong together, such as those of one release of a machine's firmware."""

    name: str
    values: AllowedPcrs


@dataclass(frozen=True, slots=True)
class BootRules:
    """What the boot log has to tell. None means that the rule was not written.

    Attributes:
        secure_boot: on unless said otherwise.
        debug_mode: firmware may have measured "UEFI Debug Mode".
        dma_protection: firmware must not have measured that it is off.
        variables: name of a Secure Boot variable to the SHA-256 its data may have, lower-case hex.
        db: every entry of db must be one of these, lower-case hex as in `BootFacts.db`.
        dbx_floor: entries dbx must have at least.
        sbat_floor: least level of SbatLevel, such as 2023012900.
        authorities: every certificate that let an image start must be one of these.
        images: every image in PCR 4 must be one of these (boot loaders, kernels, UKIs).
        revoked_images: none in PCR 2 or 4 may be one of these.
        option_roms: every image in PCR 2 must be one of these.
        commands: every command and command line must match.
        files: every file the boot loader or stub loaded must be one of these.
        uki: value of PCR 11 after the stub, lower-case hex.
        mok: whether keys of the machine's owner may or must be there.
        mok_digests: every list of them must be one of these.
        firmware_versions: what firmware may call itself.
        firmware_floor: least version it may call itself, compared number by number.
        workarounds: names of firmware faults that may be made up for; None for any.
        tolerate: of `EvidenceRequest.tolerate`, those about the boot log.
    """

    secure_boot: SecureBoot = "on"
    debug_mode: bool = False
    dma_protection: bool = True
    variables: Mapping[str, frozenset[str]] = field(default_factory=dict)
    db: frozenset[str] | None = None
    dbx_floor: frozenset[str] | None = None
    sbat_floor: int | None = None
    authorities: frozenset[str] | None = None
    images: frozenset[bytes] | None = None
    revoked_images: frozenset[bytes] | None = None
    option_roms: frozenset[bytes] | None = None
    commands: Patterns | None = None
    files: frozenset[bytes] | None = None
    uki: frozenset[str] | None = None
    mok: Mok = "any"
    mok_digests: frozenset[bytes] | None = None
    firmware_versions: frozenset[str] | None = None
    firmware_floor: str | None = None
    workarounds: frozenset[str] | None = None
    tolerate: frozenset[str] = frozenset()

    def covered(self) -> Iterator[int]:
        """Yield the PCRs these rules say something about."""
        rules = {
            0: self.firmware_versions is not None or self.firmware_floor is not None,
            2: self.option_roms is not None,
            4: self.images is not None,
            7: self._speaks_of_pcr7(),
            8: self.commands is not None,
            9: self.files is not None,
            11: self.uki is not None,
            12: self.commands is not None,
            14: self.mok != "any" or self.mok_digests is not None,
        }
        return (pcr for pcr, covered in rules.items() if covered)

    def _speaks_of_pcr7(self) -> bool:
        held = (self.db, self.dbx_floor, self.sbat_floor, self.authorities)
        return (
            self.secure_boot != "any"
            or bool(self.variables)
            or any(rule is not None for rule in held)
        )


@dataclass(frozen=True, slots=True)
class ImaRules:
    """What files may have been used.

    Attributes:
        files: path to the digests it may have.
        anywhere: digests that may be found at any path.
        exclude: paths that are not looked at.
        keyring: keys whose signatures on files count.
        algorithms: digests that count, such as `sha256`, of `FILE_DIGEST_BYTES`.
        violations: how many measurements may be marked as unreliable.
        padded_sha1: old kernels, which extend SHA-1 into every bank, are accepted.
    """

    files: Mapping[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    anywhere: frozenset[bytes] = frozenset()
    exclude: Patterns = field(default_factory=Patterns)
    keyring: tuple[FileKey, ...] = ()
    algorithms: frozenset[str] = frozenset({"sha256", "sha384", "sha512"})
    violations: int = 0
    padded_sha1: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy; what it does not allow is denied.

    Attributes:
        name: lower-case letters, digits, `.`, `_` and `-`.
        version: from 1.
        sha256: lower-case hex digest of its text with the files it refers to.
        description: for people.
        nodes: the nodes it is for, any group; empty for those no other policy is for.
        tpm: rules about the TPM.
        bank: whose PCRs the logs are held against.
        pcrs: allowed values PCR by PCR.
        pcr_sets: of which one must hold as a whole, when there are any.
        quote: PCRs that are quoted without a rule about them.
        boot: None when no boot log is asked for.
        ima: None when no IMA list is asked for.
        drift: actions that differ from `reasons.DEFAULT_ACTIONS`, by reason code.
        allow_pcr7_only: the operator knows that PCR 7 does not tell what was booted.
    """

    name: str
    version: int
    sha256: str
    description: str = ""
    nodes: tuple[NodeGroup, ...] = ()
    tpm: TpmRules = TpmRules()
    bank: str = "sha256"
    pcrs: AllowedPcrs = field(default_factory=dict)
    pcr_sets: tuple[PcrSet, ...] = ()
    quote: frozenset[tuple[str, int]] = frozenset()
    boot: BootRules | None = None
    ima: ImaRules | None = None
    drift: Mapping[str, Action] = field(default_factory=dict)
    allow_pcr7_only: bool = False

    @property
    def reference(self) -> str:
        """Return `name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def needs_quote(self) -> bool:
        """Tell whether knowing which TPM it is does not suffice."""
        return bool(self.valued_pcrs() or self.boot is not None or self.ima is not None)

    def is_for(self, selectors: Collection[str]) -> bool:
        """Tell whether a node with these selectors is in one of its groups, or it has none."""
        return not self.nodes or any(group.has(selectors) for group in self.nodes)

    def valued_pcrs(self) -> tuple[tuple[str, int], ...]:
        """Return the PCRs whose values it names, by bank and number."""
        sets = (where for one in self.pcr_sets for where in one.values)
        return tuple(sorted({*self.pcrs, *sets}))

    def covered_pcrs(self) -> frozenset[int]:
        """Return the PCRs it says something about, in whatever way."""
        covered = {number for _, number in self.valued_pcrs()}
        if self.boot is not None:
            covered.update(self.boot.covered())
        if self.ima is not None:
            covered.add(IMA_PCR)
        return frozenset(covered)

    def request(
        self, ima: ImaState | None = None, reset_count: int | None = None
    ) -> EvidenceRequest:
        """Return what a node has to show for it.

        Args:
            ima: how far its IMA list is known; None for nothing yet.
            reset_count: of the boot that list belongs to.
        """
        wanted = {*self.valued_pcrs(), *self.quote}
        if self.boot is not None:
            wanted.update((self.bank, n) for n in {*_LOG_PCRS, *self.boot.covered()})
        if self.ima is not None:
            wanted.update((self.bank, n) for n in (*_AGGREGATE_PCRS, IMA_PCR))
        banks = dict.fromkeys(sorted(bank for bank, _ in wanted))
        start = None if self.ima is None else ima or ima_start(self.bank)
        tolerate = self.boot.tolerate if self.boot is not None else frozenset[str]()
        if self.ima is not None and self.ima.padded_sha1:
            tolerate |= {"padded_sha1"}
        return EvidenceRequest(
            pcrs=tuple((bank, tuple(sorted(n for b, n in wanted if b == bank))) for bank in banks),
            boot_log=self.boot is not None,
            ima=start,
            reset_count=reset_count if start is not None and start.count else None,
            counters=self.tpm.counters or bool(self.tpm.firmware_floors),
            tolerate=tolerate,
            bank="" if self.boot is None and self.ima is None else self.bank,
        )

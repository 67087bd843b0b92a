"""A first draft of a policy from machines known to be good, for people to read and to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.config.hcl import quote
from spire_hw.errors import ConfigError, ErrorKind, InvalidInputError
from spire_hw.posture import digestlist
from spire_hw.posture.bootcheck import sbat_level
from spire_hw.posture.evaluate import evaluate
from spire_hw.posture.firmware import tpm_version_text
from spire_hw.posture.policy import FILE_DIGEST_BYTES, ek_selectors
from spire_hw.posture.policyfile import file_block, parse_policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from spire_hw.posture.evidence import BootFacts, Evidence, ImaFacts

# Firmware, option ROMs, boot loaders, Secure Boot, unified kernel images, the owner's keys.
_STATE_PCRS: Final = (0, 2, 4, 7, 11, 14)
# Where a boot log says the rest in words, values are pinned for these alone.
_FIRMWARE_PCRS: Final = (0, 2)
_IMAGE_PCR: Final = 4
_FILES_PCR: Final = 9
_COMMAND_PCRS: Final = frozenset({8, 12})
_MOK_PCR: Final = 14
# Longer lists become files of the policy.
_FEW: Final = 16


def learn(name: str, evidences: Sequence[Evidence]) -> str:
    """Return the text of a policy that accepts all of some evidence.

    Args:
        name: for the policy.
        evidences: of machines known to be good; boot logs all in one bank.

    Raises:
        InvalidInputError: no evidence, or some that no policy should be made from.
    """
    if not evidences:
        raise InvalidInputError("a policy is learnt from at least one evidence")
    boots = [evidence.boot for evidence in evidences if evidence.boot is not None]
    lists = [evidence.ima for evidence in evidences if evidence.ima is not None]
    for found, what in ((boots, "a boot log"), (lists, "an IMA list")):
        if found and len(found) < len(evidences):
            raise InvalidInputError(f"some of the evidence has {what} and some has not")
    banks = sorted({boot.bank for boot in boots})
    if len(banks) > 1:
        raise InvalidInputError(f"boot logs are of several banks: {', '.join(banks)}")
    text = _text(name, evidences, allow_pcr7_only=False)
    try:
        policy = parse_policy(text, f"draft of policy {name}")
    except ConfigError as e:
        if e.kind is not ErrorKind.FAILED_PRECONDITION:
            raise
        text = _text(name, evidences, allow_pcr7_only=True)
        policy = parse_policy(text, f"draft of policy {name}")
    for evidence in evidences:
        bad = [check.message for check in evaluate(policy, evidence).checks if not check.holds]
        if bad:
            raise InvalidInputError(f"no policy can be learnt from this: {'; '.join(bad)}")
    return text


def _text(name: str, evidences: Sequence[Evidence], *, allow_pcr7_only: bool) -> str:
    boots = [evidence.boot for evidence in evidences if evidence.boot is not None]
    lists = [evidence.ima for evidence in evidences if evidence.ima is not None]
    draft = _Draft()
    count = "one machine" if len(evidences) == 1 else f"{len(evidences)} machines"
    draft.add(f"# Draft from what {count} showed, known to be good. Read every line:")
    draft.add("# what is written here will be allowed, what is not will be denied.")
    draft.open(f"policy {quote(name)}")
    draft.add(f"description = {quote('learnt, to be reviewed')}")
    _write_switches(draft, evidences)
    if allow_pcr7_only:
        draft.add("# WARNING: PCR 7 tells who signed what was booted, not what was.")
        draft.add("allow_pcr7_only = true")
    _write_nodes(draft, evidences)
    _write_tpm(draft, evidences)
    _write_pcrs(draft, evidences, _FIRMWARE_PCRS if boots else _STATE_PCRS)
    if boots:
        _write_boot(draft, boots)
    else:
        draft.add(
            "",
            "# No boot log was shown. Where the attestor asks for one (boot_log = true), a draft",
        )
        draft.add(
            "# has rules about what was booted instead of values that change with every update."
        )
    if lists:
        _write_ima(draft, lists)
    else:
        draft.add(
            "", "# No list of measured files was shown; the attestor asks for it with ima = true."
        )
    draft.close()
    return draft.text()


class _Draft:
    """HCL text while it is written."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._files: dict[str, bytes] = {}
        self._indent = ""

    def text(self) -> str:
        """Return all of it, files last."""
        blocks = [file_block(name, self._files[name]) for name in sorted(self._files)]
        return "\n".join(["\n".join(self._lines) + "\n", *blocks])

    def add(self, *lines: str) -> None:
        """Write lines."""
        self._lines += [f"{self._indent}{line}" if line else "" for line in lines]

    def open(self, head: str) -> None:
        """Begin a block."""
        self.add(f"{head} {{")
        self._indent += "  "

    def close(self) -> None:
        """End a block."""
        self._indent = self._indent[2:]
        self.add("}")

    def texts(self, key: str, values: Iterable[str]) -> None:
        """Write a list of texts, one a line when there are several."""
        lines = [quote(value) for value in values]
        if len(lines) == 1:
            self.add(f"{key} = [{lines[0]}]")
        else:
            self.add(f"{key} = [", *(f"  {line}," for line in lines), "]")

    def digests(self, key: str, values: Iterable[str | bytes]) -> None:
        """Write a list of digests, as a file when there are many."""
        found = sorted({value if isinstance(value, str) else value.hex() for value in values})
        if len(found) <= _FEW:
            self.texts(key, found)
        else:
            self.file(key, "\n".join([*found, ""]).encode())

    def file(self, key: str, content: bytes) -> None:
        """Write a list that is a file."""
        name = f"{key}.sha256"
        self._files[name] = content
        self.add(f"{key} = [{quote('@' + name)}]")


def _write_switches(draft: _Draft, evidences: Sequence[Evidence]) -> None:
    boots = [evidence.boot for evidence in evidences if evidence.boot is not None]
    bank = boots[0].bank if boots else "sha256"
    draft.add(f"bank = {quote(bank)}")
    if bank == "sha1":
        draft.add("# WARNING: the boot log has SHA-1 alone, which can be forged.")
        draft.add("allow_sha1 = true")
    pinned = {number for _, number in _common_pcrs(evidences)} & set(_STATE_PCRS)
    if not boots and not pinned and all(evidence.ima is None for evidence in evidences):
        draft.add("# WARNING: the machine may be in any state, only its TPM is known.")
        draft.add("allow_any_state = true")


def _write_nodes(draft: _Draft, evidences: Sequence[Evidence]) -> None:
    shared = set.intersection(*(set(ek_selectors(evidence.ek)) for evidence in evidences))
    wider = sorted(value for value in shared if not value.startswith("pub_hash:"))
    draft.add(
        "", "# These machines and no others. To take in more, replace ek_hashes by selectors,"
    )
    draft.add("# such as those below; a policy without nodes is for all that no other is for.")
    draft.open("nodes")
    for value in wider:
        draft.add(f"# selectors = [{quote(value)}]")
    draft.digests("ek_hashes", (evidence.ek.hash for evidence in evidences))
    draft.close()


def _write_tpm(draft: _Draft, evidences: Sequence[Evidence]) -> None:
    eks = [evidence.ek for evidence in evidences]
    roots = {ek.root for ek in eks if ek.root}
    makers = {ek.manufacturer for ek in eks if ek.manufacturer}
    draft.add("")
    draft.open("tpm")
    if all(ek.root for ek in eks):
        draft.digests("roots", roots)
    if not all(evidence.key_in_tpm for evidence in evidences):
        draft.add("# WARNING: keys of agents were not proved to be in their TPMs.")
        draft.add("key_in_tpm = false")
    if all(ek.manufacturer for ek in eks):
        draft.texts("manufacturers", sorted(makers))
        if all(evidence.counters is not None for evidence in evidences):
            for maker in sorted(makers):
                _write_floor(draft, maker, evidences)
    draft.close()


def _write_floor(draft: _Draft, maker: str, evidences: Sequence[Evidence]) -> None:
    versions = [
        evidence.counters.firmware_version
        for evidence in evidences
        if evidence.counters is not None and evidence.ek.manufacturer == maker
    ]
    draft.open(f"firmware_floor {quote(maker)}")
    draft.add(f"version = {quote(tpm_version_text(min(versions)))}")
    draft.close()


def _common_pcrs(evidences: Sequence[Evidence]) -> list[tuple[str, int]]:
    """Return PCRs that all of the evidence has, of the banks that may be pinned."""
    common = set.intersection(*(set(evidence.pcrs) for evidence in evidences))
    return sorted(where for where in common if where[0] != "sha1")


def _write_pcrs(draft: _Draft, evidences: Sequence[Evidence], numbers: Iterable[int]) -> None:
    wanted = set(numbers)
    pinned = [where for where in _common_pcrs(evidences) if where[1] in wanted]
    if not pinned:
        return
    draft.add("", "# 0: firmware; 2: option ROMs; 4: boot loaders and kernels; 7: Secure Boot;")
    draft.add("# 11: unified kernel image; 14: the owner's keys (MOK).")
    draft.open("pcrs")
    for bank in sorted({bank for bank, _ in pinned}):
        draft.open(bank)
        for where in pinned:
            if where[0] == bank:
                draft.texts(quote(str(where[1])), sorted({e.pcrs[where].hex() for e in evidences}))
        draft.close()
    draft.close()


def _write_boot(draft: _Draft, boots: Sequence[BootFacts]) -> None:
    draft.add("")
    draft.open("boot")
    _write_secure_boot(draft, boots)
    if any(boot.debug_mode for boot in boots):
        draft.add("# WARNING: firmware was in debug mode.", "allow_debug_mode = true")
    if not all(boot.dma_protection for boot in boots):
        draft.add("# WARNING: DMA protection was off.", "allow_dma_protection_off = true")
    if all(boot.crtm_version for boot in boots):
        draft.texts("firmware_versions", sorted({boot.crtm_version for boot in boots}))
    _write_loaded(draft, boots)
    if workarounds := sorted({name for boot in boots for name in boot.workarounds}):
        draft.add("# Faults of firmware that had to be made up for.")
        draft.texts("workarounds", workarounds)
    draft.close()


def _write_loaded(draft: _Draft, boots: Sequence[BootFacts]) -> None:
    images = {i.digest for boot in boots for i in boot.images if i.pcr == _IMAGE_PCR}
    if all(any(i.pcr == _IMAGE_PCR for i in boot.images) for boot in boots):
        draft.add("# Boot loaders, kernels, unified kernel images: add those of the next update.")
        draft.digests("images", images)
    explained = set.intersection(*(set(boot.explained) for boot in boots))
    commands = {command for boot in boots for command in boot.commands}
    if explained >= _COMMAND_PCRS and commands:
        draft.add("# Of boot loaders and for kernels; * stands for anything.")
        draft.texts("commands", sorted(commands))
    files = {digest for boot in boots for digest in boot.files}
    if _FILES_PCR in explained and files:
        draft.add("# What boot loaders and stubs loaded: kernels, initial file systems, modules.")
        draft.digests("files", files)
    if all(boot.uki is not None for boot in boots):
        draft.digests("uki", (boot.uki for boot in boots if boot.uki is not None))
    moks = {boot.mok for boot in boots}
    if moks == {False}:
        draft.add('mok = "absent"')
    digests = {digest for boot in boots for digest in boot.mok_digests}
    if _MOK_PCR in explained and digests:
        draft.digests("mok_digests", digests)


def _write_secure_boot(draft: _Draft, boots: Sequence[BootFacts]) -> None:
    states = {boot.secure_boot for boot in boots}
    word = "on" if states == {True} else "off" if states == {False} else "any"
    if word != "on":
        draft.add("# WARNING: Secure Boot was not on.")
    draft.add(f"secure_boot = {quote(word)}")
    names = set.intersection(*(set(boot.variables) for boot in boots))
    if pinned := sorted(names & {"PK", "KEK"}):
        draft.open("variables")
        for name in pinned:
            draft.digests(name, {boot.variables[name] for boot in boots})
        draft.close()
    if all(boot.db for boot in boots):
        draft.digests("db", {entry for boot in boots for entry in boot.db})
    if floor := frozenset.intersection(*(boot.dbx for boot in boots)):
        draft.add("# Revocations: machines need these at least.")
        draft.digests("dbx_floor", floor)
    levels = [level for boot in boots if (level := sbat_level(boot.sbat)) is not None]
    if len(levels) == len(boots):
        draft.add(f"sbat_floor = {min(levels)}")
    if all(boot.authorities for boot in boots):
        draft.digests("authorities", {one for boot in boots for one in boot.authorities})


def _write_ima(draft: _Draft, lists: Sequence[ImaFacts]) -> None:
    entries = {entry for facts in lists for entry in facts.entries}
    if any(f.start or f.state.count > len(f.entries) + f.violations + 1 for f in lists):
        raise InvalidInputError("an IMA list is not here from its start, with all its entries")
    kinds = {entry.algorithm for entry in entries} or {"sha256"}
    if unknown := sorted(kinds - set(FILE_DIGEST_BYTES)):
        raise InvalidInputError(f"IMA lists hold digests no policy allows: {', '.join(unknown)}")
    draft.add("", '# Exclude what changes all the time, such as exclude = ["/var/log/", "/tmp/"].')
    draft.open("ima")
    if "sha1" in kinds:
        draft.add("# WARNING: files are listed by SHA-1, which can be forged.")
    draft.texts("algorithms", sorted(kinds))
    listed = sorted({(entry.path, entry.digest) for entry in entries})
    lines = [digestlist.encode_line(digest, path) for path, digest in listed]
    if lines:
        draft.file("allow", b"\n".join([*lines, b""]))
    else:
        draft.add("# No file was measured.", f"allow = [{quote('00' * 32)}]")
    if most := max(facts.violations for facts in lists):
        draft.add(f"violations = {most}")
    if any(facts.padded_sha1 for facts in lists):
        draft.add("# WARNING: the kernel extends SHA-1 into every bank.")
        draft.add("allow_padded_sha1 = true")
    draft.close()

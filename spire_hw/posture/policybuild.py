"""Keys of a policy file to a policy: digests read, files taken in, contradictions found."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from spire_hw.config.schema import nearest
from spire_hw.errors import ConfigFault, InvalidInputError, SpireHwError
from spire_hw.posture import digestlist, signature
from spire_hw.posture.digestlist import ListFaultsError
from spire_hw.posture.firmware import parse_tpm_version
from spire_hw.posture.patterns import Patterns
from spire_hw.posture.policy import (
    BANK_BYTES,
    FILE_DIGEST_BYTES,
    IMA_PCR,
    PCR_COUNT,
    BootRules,
    ImaRules,
    NodeGroup,
    PcrSet,
    Policy,
    TpmRules,
)
from spire_hw.posture.reasons import NEVER_ACCEPTED
from spire_hw.posture.verdict import Action

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from spire_hw.config.schema import Model
    from spire_hw.posture.digestlist import Listed
    from spire_hw.posture.policy import AllowedPcrs
    from spire_hw.posture.policykeys import BootKeys, ImaKeys, NodesKeys, PolicyKeys
    from spire_hw.posture.signature import FileKey

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_SHA256: Final = frozenset({32})
_GROUP_SELECTORS: Final = (
    "pub_hash:",
    "ek:ca:",
    "ek:method:",
    "manufacturer:",
    "model:",
    "version:",
)
# What nobody can vouch for, or what does not stay.
_USELESS_PCRS: Final = {
    IMA_PCR: "changes with every file: use ima { }",
    16: "can be reset by anyone",
    23: "can be reset by anyone",
}
# Secure Boot and the owner's keys: which authorities signed, not what was booted.
_AUTHORITY_PCRS: Final = frozenset({7, 14})
_PCR7_ONLY: Final = (
    "PCR 7 alone does not identify what was booted: add PCR 4 or 11, or images or uki to"
    " boot { }, or say allow_pcr7_only = true"
)
_BANKS: Final = tuple(BANK_BYTES)


class Builder:
    """Builds one policy.

    Args:
        name: label of the block.
        keys: what was written.
        read: gives the files it refers to.

    Attributes:
        faults: what was wrong.
        pcr7_only: whether it relies on PCR 7 alone without saying so.
    """

    def __init__(self, name: str, keys: PolicyKeys, read: Callable[[str], bytes]) -> None:
        self._name = name
        self._keys = keys
        self._read = read
        self.faults: list[ConfigFault] = []
        self.pcr7_only = False

    def build(self, version: int) -> Policy:
        """Return the policy; worth nothing when there are faults."""
        keys = self._keys
        if _NAME.fullmatch(self._name) is None:
            self._fault(keys, "", "a policy's name has 1 to 64 of a-z, 0-9, '.', '_' and '-'")
        return Policy(
            name=self._name,
            version=version,
            sha256="",
            description=keys.description,
            nodes=tuple(self._group(group) for group in keys.nodes),
            tpm=self._tpm(),
            bank=keys.bank,
            pcrs={} if keys.pcrs is None else self._pcrs(keys.pcrs),
            pcr_sets=tuple(PcrSet(name, self._pcrs(one)) for name, one in keys.pcr_set.items()),
            quote=frozenset(self._quote()),
            boot=None if keys.boot is None else self._boot(keys.boot),
            ima=None if keys.ima is None else self._ima(keys.ima),
            drift=dict(self._drift()),
            allow_pcr7_only=keys.allow_pcr7_only,
        )

    def _fault(self, model: Model, key: str, message: str) -> None:
        subject = f'"{key}": ' if key else ""
        self.faults.append(ConfigFault(model.line(_field(model, key)), subject + message))

    def check_whole(self, policy: Policy) -> None:
        """Find what is wrong with a policy whose parts are all there."""
        keys = self._keys
        banks = {policy.bank, *(b for b, _ in (*policy.valued_pcrs(), *policy.quote))}
        if "sha1" in banks and not keys.allow_sha1:
            self._fault(keys, "bank", "SHA-1 can be forged: use sha256, or say allow_sha1 = true")
        covered = policy.covered_pcrs()
        if 7 in covered and covered <= _AUTHORITY_PCRS and not keys.allow_pcr7_only:  # noqa: PLR2004
            self.pcr7_only = True
            self._fault(keys, "", _PCR7_ONLY)
        if not policy.needs_quote and not keys.allow_any_state:
            self._fault(
                keys,
                "",
                "asks nothing of the machine's state: add pcrs, pcr_set, boot or ima, or say"
                " allow_any_state = true",
            )

    def _group(self, keys: NodesKeys) -> NodeGroup:
        values = [text.removeprefix("tpm:") for text in keys.selectors]
        for value in values:
            prefix = next((p for p in _GROUP_SELECTORS if value.startswith(p)), "")
            if not prefix or value == prefix:
                hint = nearest(value.rpartition(":")[0] + ":", _GROUP_SELECTORS)
                known = ", ".join(_GROUP_SELECTORS)
                self._fault(keys, "selectors", f'"{value[:80]}" begins with none of {known}{hint}')
        hashes = self._hex(keys, "ek_hashes")
        if not values and not hashes:
            self._fault(keys, "", "nodes { } names no nodes: leave it out for all others")
        return NodeGroup(frozenset(values), hashes or frozenset())

    def _tpm(self) -> TpmRules:
        keys = self._keys.tpm
        floors = {}
        for maker, floor in keys.firmware_floor.items():
            try:
                floors[maker] = parse_tpm_version(floor.version)
            except InvalidInputError as e:
                self._fault(floor, "version", e.message)
        return TpmRules(
            roots=self._hex(keys, "roots") or frozenset(),
            manufacturers=frozenset(keys.manufacturers),
            models=frozenset(keys.models),
            firmware_floors=floors,
            key_in_tpm=keys.key_in_tpm,
            counters=keys.counters,
        )

    def _pcrs(self, keys: Model) -> AllowedPcrs:
        found: dict[tuple[str, int], frozenset[bytes]] = {}
        for bank in _BANKS:
            held = getattr(keys, bank)
            for number in range(PCR_COUNT) if held is not None else ():
                values = self._digests(held, str(number), {BANK_BYTES[bank]})
                if values is not None:
                    found[bank, number] = frozenset(value.digest for value in values)
                if values is not None and number in _USELESS_PCRS:
                    self._fault(held, str(number), _USELESS_PCRS[number])
        if not found:
            self._fault(keys, "", "names no PCR")
        return found

    def _quote(self) -> Iterator[tuple[str, int]]:
        keys = self._keys.quote
        for bank in _BANKS if keys is not None else ():
            yield from ((bank, number) for number in getattr(keys, bank))

    def _boot(self, keys: BootKeys) -> BootRules:
        digests = {BANK_BYTES[self._keys.bank]}
        tolerate = {
            "empty_secure_boot": keys.allow_empty_secure_boot,
            "early_authority": keys.allow_early_authority,
            "sha1_log": self._keys.allow_sha1,
        }
        return BootRules(
            secure_boot=keys.secure_boot,
            debug_mode=keys.allow_debug_mode,
            dma_protection=not keys.allow_dma_protection_off,
            variables=self._variables(keys),
            db=self._hex(keys, "db"),
            dbx_floor=self._hex(keys, "dbx_floor"),
            sbat_floor=keys.sbat_floor,
            authorities=self._hex(keys, "authorities"),
            images=self._bytes(keys, "images", digests),
            revoked_images=self._bytes(keys, "revoked_images", digests),
            option_roms=self._bytes(keys, "option_roms", digests),
            commands=None if keys.commands is None else Patterns.of(keys.commands),
            files=self._bytes(keys, "files", digests),
            uki=self._hex(keys, "uki", digests),
            mok=keys.mok,
            mok_digests=self._bytes(keys, "mok_digests", digests),
            firmware_versions=_optional_set(keys.firmware_versions),
            firmware_floor=keys.firmware_floor,
            workarounds=_optional_set(keys.workarounds),
            tolerate=frozenset(word for word, given in tolerate.items() if given),
        )

    def _variables(self, keys: BootKeys) -> Mapping[str, frozenset[str]]:
        held = keys.variables
        if held is None:
            return {}
        names = {"PK": "PK", "KEK": "KEK", "db": "db", "dbx": "dbx"}
        found = {name: self._hex(held, key) for name, key in names.items()}
        return {name: values for name, values in found.items() if values is not None}

    def _ima(self, keys: ImaKeys) -> ImaRules:
        sizes = {FILE_DIGEST_BYTES[name] for name in keys.algorithms}
        if not keys.algorithms:
            self._fault(keys, "algorithms", "names nothing")
        files: dict[bytes, set[bytes]] = {}
        anywhere: set[bytes] = set()
        for digest, path in self._digests(keys, "allow", sizes) or ():
            if keys.any_path or not path:
                anywhere.add(digest)
            else:
                # The kernel writes blanks as underscores.
                for name in {path, path.replace(b" ", b"_")}:
                    files.setdefault(name, set()).add(digest)
        keyring = self._keyring(keys)
        if keys.allow is None and keys.keyring is None:
            self._fault(keys, "", "allows no file: give allow or keyring")
        return ImaRules(
            files={path: tuple(sorted(digests)) for path, digests in files.items()},
            anywhere=frozenset(anywhere),
            exclude=self._patterns(keys),
            keyring=keyring,
            algorithms=frozenset(keys.algorithms),
            violations=keys.violations,
            padded_sha1=keys.allow_padded_sha1,
        )

    def _patterns(self, keys: ImaKeys) -> Patterns:
        if "" in keys.exclude:
            self._fault(keys, "exclude", "a pattern is empty")
        blanks = [text.replace(" ", "_") for text in keys.exclude]
        return Patterns.of([*keys.exclude, *blanks])

    def _keyring(self, keys: ImaKeys) -> tuple[FileKey, ...]:
        found: list[FileKey] = []
        for text in keys.keyring or ():
            if not text.startswith("@"):
                self._fault(keys, "keyring", f'"{text[:40]}": name a PEM file as "@NAME"')
                continue
            content = self._content(keys, "keyring", text[1:])
            if content is not None:
                try:
                    found += signature.load_keys(content)
                except InvalidInputError as e:
                    self._fault(keys, "keyring", f"{text[1:]} {e.message}")
        if keys.keyring == []:
            self._fault(keys, "keyring", "names nothing")
        return tuple(dict.fromkeys(found))

    def _drift(self) -> Iterator[tuple[str, Action]]:
        keys: Model | None = self._keys.drift
        if keys is None:
            return
        for code in sorted(keys.model_fields_set):
            action = Action(getattr(keys, code))
            if action is Action.ACCEPT and code in NEVER_ACCEPTED:
                self._fault(keys, code, "cannot be accepted: evidence is missing or was changed")
            yield code, action

    def _hex(self, keys: Model, key: str, sizes: Iterable[int] = _SHA256) -> frozenset[str] | None:
        found = self._digests(keys, key, sizes)
        return None if found is None else frozenset(one.digest.hex() for one in found)

    def _bytes(self, keys: Model, key: str, sizes: Iterable[int]) -> frozenset[bytes] | None:
        found = self._digests(keys, key, sizes)
        return None if found is None else frozenset(one.digest for one in found)

    def _digests(self, keys: Model, key: str, sizes: Iterable[int]) -> list[Listed] | None:
        """Return a list's digests, those of files it names included; None when it was not given."""
        texts: list[str] | None = getattr(keys, _field(keys, key))
        if texts is None:
            return None
        found: list[Listed] = []
        before = len(self.faults)
        for text in texts:
            if text.startswith("@"):
                content = self._content(keys, key, text[1:])
                found += self._listed(keys, key, text[1:], content, sizes)
            else:
                found += self._listed(keys, key, "", text.encode(), sizes)
        if not found and len(self.faults) == before:
            self._fault(keys, key, "names nothing")
        return found

    def _listed(
        self, keys: Model, key: str, name: str, content: bytes | None, sizes: Iterable[int]
    ) -> list[Listed]:
        if content is None:
            return []
        try:
            if name:
                return digestlist.parse(content, sizes, name)
            return [digestlist.parse_line(content, sizes)]
        except ListFaultsError as e:
            for number, fault in e.lines:
                place = f"{name}:{number}" if name else f'"{content.decode()[:40]}"'
                self._fault(keys, key, f"{place}: {fault}")
        except InvalidInputError as e:
            self._fault(keys, key, e.message)
        return []

    def _content(self, keys: Model, key: str, name: str) -> bytes | None:
        try:
            return self._read(name)
        except SpireHwError as e:
            self._fault(keys, key, e.message)
            return None


def _field(model: Model, key: str) -> str:
    """Return the attribute of a key."""
    fields: dict[str, Any] = type(model).model_fields
    return next((name for name, info in fields.items() if info.alias == key), key)


def _optional_set(values: list[str] | None) -> frozenset[str] | None:
    return None if values is None else frozenset(values)

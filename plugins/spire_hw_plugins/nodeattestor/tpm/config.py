"""What an operator says about TPM attestation on the server, and what it comes to.

`ServerConfig` is the plugin_data as written; `Settings` is what the server half works with: roots
read, hashes collected, PCR policy in lookup form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import AfterValidator, Field, create_model

from spire_hw.config.schema import GoDuration, Model, check
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.files import read_bounded
from spire_hw.tpm.castore import watch_roots
from spire_hw.tpm.crlfiles import watch_crls
from spire_hw.tpm.ekcert import ChainTime
from spire_hw.tpm.wire import BANKS, HASHES, PCR_COUNT, PcrSelection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.config.hcl import Body
    from spire_hw.tpm.crl import Revocations
    from spire_hw.tpm.ekcert import EkRoots
    from spire_hw.tpm.watched import Watched

_HEX: Final = re.compile(r"[0-9a-f]*")
_SHA256_CHARS: Final = 64
_POLICY_CHARS: Final = frozenset({64, 96, 128})
_MIN_TIMEOUT: Final = timedelta(seconds=1)
_MAX_TIMEOUT: Final = timedelta(minutes=2)
_MAX_HASH_FILE_BYTES: Final = 16 << 20
# Firmware and boot loader (0-7), unified kernel images and their arguments (11, 12), MOK (14).
_DEFAULT_PCRS: Final = (PcrSelection("sha256", (0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 14)),)

PcrPolicy = dict[tuple[str, int], frozenset[bytes]]


def _hash(text: str) -> str:
    lowered = text.lower()
    if len(lowered) != _SHA256_CHARS or not _HEX.fullmatch(lowered):
        raise InvalidInputError("expected a SHA-256 in hexadecimal")
    return lowered


def _digest(text: str) -> str:
    lowered = text.lower()
    if not _HEX.fullmatch(lowered) or len(lowered) % 2:
        raise InvalidInputError("expected a digest in hexadecimal")
    return lowered


_Hash = Annotated[str, AfterValidator(_hash)]
_Digest = Annotated[str, AfterValidator(_digest)]
_Pcr = Annotated[int, Field(ge=0, lt=PCR_COUNT)]


class PcrSelectionConfig(Model):
    """Which PCRs to quote, by bank."""

    sha256: list[_Pcr] = Field(default_factory=list)
    sha384: list[_Pcr] = Field(default_factory=list)
    sha512: list[_Pcr] = Field(default_factory=list)


# Allowed values of one bank: keys are the PCR numbers.
BankValues = create_model(
    "BankValues",
    __base__=Model,
    **{f"pcr{n}": (list[_Digest] | None, Field(None, alias=str(n))) for n in range(PCR_COUNT)},  # type: ignore[call-overload]
)


class PcrValuesConfig(Model):
    """Which values PCRs may have, by bank and number; a PCR without an entry may have any."""

    sha256: BankValues | None = None  # type: ignore[valid-type]
    sha384: BankValues | None = None  # type: ignore[valid-type]
    sha512: BankValues | None = None  # type: ignore[valid-type]


class ServerConfig(Model):
    """The plugin_data of NodeAttestor `tpm` on a server.

    Attributes:
        ek_policy: what makes an endorsement key acceptable: a certificate of a manufacturer, an
            entry in a hash list, either or both.
        endorsement_ca_path: PEM or DER file, or a directory of them, with roots and intermediates
            in folders of these names or together.
        ek_chain_time: how dates on the certificate path are judged.
        sha1_ca_fingerprints: SHA-256 of CA certificates that may be signed with SHA-1.
        crl_path: revocation lists: a file, or a directory of them.
        crl_required: every certificate below a root needs a revocation list that counts.
        ek_hashes: SHA-256 of accepted endorsement keys, besides those enrolled at the server.
        hash_path: a file with one such hash per line, or a directory of files named by hash.
        pcrs: what to quote.
        pcr_values: which values are accepted.
        require_tpm_key: the agent's own key must be in the same TPM.
        key_policies: that key must be usable under one of these TPM policies and in no other way;
            empty for any key.
        bind_csr: evidence must be bound to the certificate request, where this half sees it.
        allow_owner_ak: accept attestation keys of the owner hierarchy.
        boot_log: the firmware's log must come along and replay to the quoted PCRs.
        ima: the kernel's list of measured files likewise.
        accept_activation_only: let in agents of spire-tpm-plugin, which prove which TPM they have
            and nothing else.
        challenge_timeout: from challenge to answer.
    """

    ek_policy: Literal["ca", "hash", "ca_or_hash", "ca_and_hash"] = "ca_or_hash"
    endorsement_ca_path: str = ""
    ek_chain_time: Literal["strict", "issuer_at_leaf_issuance", "ignore"] = (
        "issuer_at_leaf_issuance"
    )
    sha1_ca_fingerprints: list[_Hash] = Field(default_factory=list)
    crl_path: str = ""
    crl_required: bool = False
    ek_hashes: list[_Hash] = Field(default_factory=list)
    hash_path: str = ""
    pcrs: PcrSelectionConfig | None = None
    pcr_values: PcrValuesConfig | None = None
    require_tpm_key: bool = True
    key_policies: list[_Digest] = Field(default_factory=list)
    bind_csr: bool = True
    allow_owner_ak: bool = False
    boot_log: bool = False
    ima: bool = False
    accept_activation_only: bool = False
    challenge_timeout: GoDuration = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server half works with.

    Attributes:
        use_ca: a verified certificate counts.
        use_hash: an entry in a hash list counts.
        need_both: both must hold.
        roots: manufacturers' certificates, None without any.
        chain_time: how dates on a path are judged.
        crls: revocation lists, None to ask none.
        hashes: accepted endorsement keys.
        hash_dir: directory of files named by hash, asked on every attestation.
        selections: what to quote, one quote per bank.
        policy: allowed values by bank and PCR.
        require_tpm_key: see `ServerConfig`.
        key_policies: authPolicy digests; empty for any key.
        bind_csr: see `ServerConfig`.
        allow_owner_ak: see `ServerConfig`.
        boot_log: see `ServerConfig`.
        ima: see `ServerConfig`.
        accept_activation_only: see `ServerConfig`.
        timeout: from challenge to answer.
    """

    use_ca: bool
    use_hash: bool
    need_both: bool
    roots: Watched[EkRoots] | None
    chain_time: ChainTime
    crls: Watched[Revocations] | None
    hashes: frozenset[str]
    hash_dir: Path | None
    selections: tuple[PcrSelection, ...]
    policy: PcrPolicy
    require_tpm_key: bool
    key_policies: frozenset[bytes]
    bind_csr: bool
    allow_owner_ak: bool
    boot_log: bool
    ima: bool
    accept_activation_only: bool
    timeout: timedelta


def find_faults(body: Body, *, has_ek_list: bool) -> list[ConfigFault]:
    """Return everything that is wrong with a configuration, without touching any file."""
    config, found = check(body, ServerConfig)
    return found if config is None else _meaning_faults(config, has_ek_list=has_ek_list)


def _meaning_faults(config: ServerConfig, *, has_ek_list: bool) -> list[ConfigFault]:
    found = []

    def fault(key: str, message: str) -> None:
        found.append(ConfigFault(config.line(key), f'"{key}": {message}'))

    if config.ek_policy in {"ca", "ca_and_hash"} and not config.endorsement_ca_path:
        fault("ek_policy", f'"{config.ek_policy}" needs endorsement_ca_path')
    if config.crl_required and not config.crl_path:
        fault("crl_required", "needs crl_path")
    has_hashes = has_ek_list or bool(config.ek_hashes or config.hash_path)
    if config.ek_policy in {"hash", "ca_and_hash"} and not has_hashes:
        fault("ek_policy", f'"{config.ek_policy}" needs ek_hashes or hash_path')
    if not config.endorsement_ca_path and not has_hashes:
        fault("ek_policy", "needs endorsement_ca_path, ek_hashes or hash_path")
    if not _MIN_TIMEOUT <= config.challenge_timeout <= _MAX_TIMEOUT:
        fault("challenge_timeout", "must be between 1s and 2m")
    if config.pcrs is not None and not _selections(config):
        fault("pcrs", "names no PCR")
    if not all(len(digest) in _POLICY_CHARS for digest in config.key_policies):
        fault("key_policies", "needs digests of SHA-256, SHA-384 or SHA-512")
    if config.accept_activation_only and (config.pcr_values or config.boot_log or config.ima):
        fault(
            "accept_activation_only",
            "would let every node past pcr_values, boot_log and ima by showing less",
        )
    return [*found, *_value_faults(config)]


def _value_faults(config: ServerConfig) -> list[ConfigFault]:
    found = []
    selected = {(s.bank, n) for s in _selections(config) for n in s.pcrs}
    for bank, n, values in _listed(config):
        digits = 2 * HASHES[BANKS[bank]][1]
        wrong = {
            "is not among those quoted (pcrs)": (bank, n) not in selected,
            "has no allowed value": not values,
            f"needs values of {digits} digits": any(len(value) != digits for value in values),
        }
        found += [
            ConfigFault(config.line("pcr_values"), f'"pcr_values": PCR {n} of bank {bank} {words}')
            for words, holds in wrong.items()
            if holds
        ]
    return found


def _selections(config: ServerConfig) -> tuple[PcrSelection, ...]:
    if config.pcrs is None:
        return _DEFAULT_PCRS
    banks = {
        "sha256": config.pcrs.sha256,
        "sha384": config.pcrs.sha384,
        "sha512": config.pcrs.sha512,
    }
    return tuple(PcrSelection(bank, tuple(sorted(set(n)))) for bank, n in banks.items() if n)


def _listed(config: ServerConfig) -> Iterable[tuple[str, int, list[str]]]:
    for bank in ("sha256", "sha384", "sha512"):
        held = getattr(config.pcr_values, bank, None)
        for n in range(PCR_COUNT):
            allowed = getattr(held, f"pcr{n}", None)
            if allowed is not None:
                yield bank, n, allowed


def build_settings(body: Body, *, has_ek_list: bool) -> Settings:
    """Check a configuration and read the files it names.

    Raises:
        ConfigError: it has faults.
        NotReadyError: a file cannot be read, or holds no root.
        InvalidInputError: a file holds something else than it should.
    """
    config, found = check(body, ServerConfig)
    if config is not None:
        found = _meaning_faults(config, has_ek_list=has_ek_list)
    if config is None or found:
        raise ConfigError(body.file or "configuration", found)
    hashes, hash_dir = _read_hashes(config.hash_path)
    roots = None
    if config.endorsement_ca_path:
        roots = watch_roots(Path(config.endorsement_ca_path), config.sha1_ca_fingerprints)
    return Settings(
        use_ca=config.ek_policy != "hash",
        use_hash=config.ek_policy != "ca",
        need_both=config.ek_policy == "ca_and_hash",
        roots=roots,
        chain_time=ChainTime(config.ek_chain_time),
        crls=_read_crls(config),
        hashes=frozenset(config.ek_hashes) | hashes,
        hash_dir=hash_dir,
        selections=_selections(config),
        policy={
            (bank, n): frozenset(bytes.fromhex(value) for value in values)
            for bank, n, values in _listed(config)
        },
        require_tpm_key=config.require_tpm_key,
        key_policies=frozenset(bytes.fromhex(digest) for digest in config.key_policies),
        bind_csr=config.bind_csr,
        allow_owner_ak=config.allow_owner_ak,
        boot_log=config.boot_log,
        ima=config.ima,
        accept_activation_only=config.accept_activation_only,
        timeout=config.challenge_timeout,
    )


def _read_crls(config: ServerConfig) -> Watched[Revocations] | None:
    if not config.crl_path:
        return None
    return watch_crls(Path(config.crl_path), required=config.crl_required)


def _read_hashes(name: str) -> tuple[frozenset[str], Path | None]:
    if not name:
        return frozenset(), None
    path = Path(name)
    if path.is_dir():
        return frozenset(), path
    content = read_bounded(path, _MAX_HASH_FILE_BYTES, "endorsement key hashes at")
    text = content.decode("ascii", "replace")
    found = set()
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.split("#", 1)[0].strip()
        if entry:
            try:
                found.add(_hash(entry))
            except InvalidInputError as e:
                raise InvalidInputError(f"{path}:{number}: {e.message}") from e
    return frozenset(found), None

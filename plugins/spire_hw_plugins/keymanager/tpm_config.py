"""What an operator says about keys in a TPM, and what it comes to.

`Config` is the plugin_data as written; `Settings` is what the key manager works with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from spire_hw.config.schema import GoDuration, Model, at_least, check
from spire_hw.errors import ConfigError, ConfigFault, NotReadyError, SpireHwError
from spire_hw.files import parse_file
from spire_hw.keyfile import load_public_key
from spire_hw.tpm.pcrpolicy import Approval, Binding, parse_approval, signer_public
from spire_hw.tpm.wire import PCR_COUNT, PcrSelection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.config.hcl import Body

PERSISTENT_COUNT: Final = 16
_KEYS_FOLDER: Final = "keys-tpm"
_APPROVAL_SUFFIX: Final = ".json"
_MAX_FILE_BYTES: Final = 64 * 1024
_MAX_APPROVALS: Final = 256
_MAX_REF_BYTES: Final = 32
_HANDLE: Final = re.compile(r"0x[0-9a-fA-F]{8}", re.ASCII)
# Persistent handles of the owner that no registry gives to anybody, see TCG's "Registry of
# Reserved TPM 2.0 Handles and Localities".
_FIRST_HANDLE, _LAST_HANDLE = 0x81000000, 0x817FFFFF
_RESERVED: Final = ((0x81000000, 0x810000FF), (0x81010000, 0x8101FFFF), (0x81020000, 0x8102FFFF))

_Pcr = Annotated[int, Field(ge=0, lt=PCR_COUNT)]


class PcrsConfig(Model):
    """PCR numbers by bank."""

    sha256: list[_Pcr] = Field(default_factory=list)
    sha384: list[_Pcr] = Field(default_factory=list)
    sha512: list[_Pcr] = Field(default_factory=list)


class Config(Model):
    """The plugin_data.

    Attributes:
        tpm_device_path: device node; the kernel's resource manager when unset.
        tcti: TCTI string instead of a device, such as `swtpm:host=localhost,port=2321`.
        keys_path: directory of the wrapped keys; `keys-tpm` in the data directory when unset.
        owner_auth_path: file with the password of the owner hierarchy, if one is set.
        session: `plain`, or `salted` for commands nobody on the bus can read or change.
        persistent_handles: first of 16 handles under which keys are kept in the TPM.
        policy_pcrs: PCRs that keys are bound to, by bank.
        policy_authority_path: PEM public key of whoever approves other PCR values.
        approvals_path: directory of that authority's approvals.
        policy_ref: text the approvals have to be for, such as a group of machines.
        retain_replaced: how long replaced keys are kept, unused; 0 removes them at once.
    """

    tpm_device_path: str = ""
    tcti: str = ""
    keys_path: str = ""
    owner_auth_path: str = ""
    session: Literal["plain", "salted"] = "plain"
    persistent_handles: str = ""
    policy_pcrs: PcrsConfig | None = None
    policy_authority_path: str = ""
    approvals_path: str = ""
    policy_ref: str = ""
    retain_replaced: Annotated[GoDuration, at_least(timedelta(0))] = timedelta(0)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the key manager works with.

    Attributes:
        tcti: TCTI or device path; empty for the kernel's resource manager.
        directory: where the wrapped keys are.
        salted: whether sessions are salted.
        first_handle: first persistent handle, None to keep keys outside the TPM alone.
        binding: what new keys are bound to.
        approvals: directory of approvals.
        keep_s: seconds that replaced keys are kept; 0 removes them at once.
    """

    tcti: str
    directory: Path
    salted: bool = False
    first_handle: int | None = None
    binding: Binding | None = None
    approvals: Path | None = None
    keep_s: float = 0.0


def find_faults(body: Body) -> list[ConfigFault]:
    """Return what is wrong with a configuration, without touching any file."""
    raw, found = check(body, Config)
    return found if raw is None else list(_conflicts(raw))


def read_config(body: Body) -> Config:
    """Return a configuration without faults.

    Raises:
        ConfigError: it has some.
    """
    raw, found = check(body, Config)
    if raw is not None:
        found = list(_conflicts(raw))
    if raw is None or found:
        raise ConfigError(body.file or "configuration", found)
    return raw


def build_settings(raw: Config, data_dir: Path) -> Settings:
    """Read the files a configuration names; blocks on the disk.

    Raises:
        NotReadyError: a file cannot be read.
        InvalidInputError: the authority's file holds no public key.
    """
    return Settings(
        tcti=raw.tcti or raw.tpm_device_path,
        directory=Path(raw.keys_path or data_dir / _KEYS_FOLDER),
        salted=raw.session == "salted",
        first_handle=int(raw.persistent_handles, 16) if raw.persistent_handles else None,
        binding=_binding(raw),
        approvals=Path(raw.approvals_path) if raw.approvals_path else None,
        keep_s=raw.retain_replaced.total_seconds(),
    )


def load_approvals(directory: Path | None) -> tuple[list[Approval], list[str]]:
    """Return the approvals in a directory, and what was wrong with files that are none.

    Raises:
        NotReadyError: the directory cannot be read.
    """
    if directory is None:
        return [], []
    found: list[Approval] = []
    complaints: list[str] = []
    try:
        paths = sorted(p for p in directory.iterdir() if p.suffix == _APPROVAL_SUFFIX)
    except OSError as e:
        raise NotReadyError(f"approvals_path {directory}: {e.strerror}") from e
    for path in paths[:_MAX_APPROVALS]:
        try:
            found.append(parse_file(path, _MAX_FILE_BYTES, parse_approval))
        except SpireHwError as e:
            complaints.append(e.message)
    if len(paths) > _MAX_APPROVALS:
        complaints.append(f"more than {_MAX_APPROVALS} approvals; the rest is not read")
    return found, complaints


def _binding(raw: Config) -> Binding | None:
    selections = tuple(_selections(raw))
    if not selections:
        return None
    authority = None
    if raw.policy_authority_path:
        path = Path(raw.policy_authority_path)
        authority = signer_public(load_public_key(path, "policy_authority_path"))
    return Binding(selections, authority, raw.policy_ref.encode())


def _selections(raw: Config) -> Iterator[PcrSelection]:
    pcrs = raw.policy_pcrs
    if pcrs is None:
        return
    for bank, numbers in (
        ("sha256", pcrs.sha256),
        ("sha384", pcrs.sha384),
        ("sha512", pcrs.sha512),
    ):
        if numbers:
            yield PcrSelection(bank, tuple(sorted(set(numbers))))


def _conflicts(raw: Config) -> Iterator[ConfigFault]:
    if raw.tcti and raw.tpm_device_path:
        yield ConfigFault(raw.line("tcti"), "set tpm_device_path or tcti, not both")
    if raw.persistent_handles and (text := _handle_fault(raw.persistent_handles)):
        yield ConfigFault(raw.line("persistent_handles"), f"persistent_handles: {text}")
    if raw.policy_pcrs is not None and not list(_selections(raw)):
        yield ConfigFault(raw.line("policy_pcrs"), "policy_pcrs names no PCR")
    if raw.policy_authority_path and raw.policy_pcrs is None:
        text = "policy_authority_path needs policy_pcrs: it approves their values"
        yield ConfigFault(raw.line("policy_authority_path"), text)
    if bool(raw.policy_authority_path) != bool(raw.approvals_path):
        key = "policy_authority_path" if raw.policy_authority_path else "approvals_path"
        text = "policy_authority_path and approvals_path need each other"
        yield ConfigFault(raw.line(key), text)
    if raw.policy_ref and not raw.policy_authority_path:
        yield ConfigFault(raw.line("policy_ref"), "policy_ref needs policy_authority_path")
    if len(raw.policy_ref.encode()) > _MAX_REF_BYTES:
        text = f"policy_ref is longer than {_MAX_REF_BYTES} bytes"
        yield ConfigFault(raw.line("policy_ref"), text)


def _handle_fault(text: str) -> str:
    if not _HANDLE.fullmatch(text):
        return "a handle of eight hex digits is expected, such as 0x81008100"
    first, last = int(text, 16), int(text, 16) + PERSISTENT_COUNT - 1
    if not _FIRST_HANDLE <= first <= last <= _LAST_HANDLE:
        return f"16 handles between 0x{_FIRST_HANDLE:08X} and 0x{_LAST_HANDLE:08X} are expected"
    if any(first <= end and begin <= last for begin, end in _RESERVED):
        return "the range is reserved for storage keys, endorsement keys or device identities"
    return ""

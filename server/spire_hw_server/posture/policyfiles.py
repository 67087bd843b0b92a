"""Policies on disk: a text, and the files it refers to beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.config import hcl
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.files import read_bounded
from spire_hw.posture import digestlist
from spire_hw.posture.policyfile import load_policy
from spire_hw.posture.policyset import PolicySet

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.posture.policy import Policy

SUFFIX: Final = ".hcl"


def read_policy(path: Path) -> tuple[Policy, str]:
    """Return the policy of a file, and its text with all files it refers to.

    Names of those are relative to the policy's folder.

    Raises:
        ConfigError: it is no policy, with every fault.
        NotReadyError: it cannot be read.
    """
    raw = read_bounded(path, 4 * hcl.MAX_CHARS)
    try:
        text = raw.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(str(path), [ConfigFault(0, "is not UTF-8 text")]) from e
    folder = path.parent
    return load_policy(
        text, str(path), read=lambda name: read_bounded(folder / name, digestlist.MAX_BYTES)
    )


def read_policies(folder: Path) -> list[tuple[Path, Policy, str]]:
    """Return what `read_policy` gives for every `*.hcl` of a folder, by name.

    Raises:
        NotReadyError: the folder or a file cannot be read.
        InvalidInputError: files that are no policies, with every fault of each.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX)
    except OSError as e:
        raise NotReadyError(f"cannot read policy_dir {folder}: {e.strerror}") from e
    found = []
    faults = []
    for path in paths:
        try:
            found.append((path, *read_policy(path)))
        except ConfigError as e:
            faults.append(e)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise InvalidInputError("\n".join(e.message for e in faults))
    return found


def find_policy_faults(folder: Path) -> list[str]:
    """Return what keeps the policies of a folder from being in force together."""
    try:
        PolicySet.of(policy for _, policy, _ in read_policies(folder))
    except SpireHwError as e:
        return e.message.splitlines()
    return []

"""Selectors of a node, from what was proved about it and from nothing else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from spire_hw.posture.evidence import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.posture.evidence import BootFacts, EkFacts, Evidence
    from spire_hw.posture.verdict import Verdict

# Firmware and boot loaders fill these lists: a machine gets a few dozen selectors, not thousands.
_MAX_AUTHORITIES: Final = 16
_MAX_VALUE_CHARS: Final = 256
_VENDOR = re.compile(r"id:([0-9A-Fa-f]{8})")
_SBAT = re.compile(r"sbat,[0-9]{1,4},([0-9]{1,16})")


def selectors(evidence: Evidence, verdict: Verdict | None = None) -> list[str]:
    """Return selector values without the type, each once.

    Args:
        evidence: what was proved.
        verdict: what the host's judge made of it; its selectors go last.
    """
    if evidence.tier is Tier.ACTIVATION:
        # All else would let entries for machines that were measured match one that was not.
        return [f"tier:{evidence.tier.value}"]
    found = [f"pub_hash:{evidence.ek.hash}", f"ak:hierarchy:{evidence.ak_hierarchy}"]
    found += _of_ek(evidence.ek)
    if evidence.key_in_tpm:
        found.append("key:tpm")
    found += [f"pcr:{bank}:{n}:{value.hex()}" for (bank, n), value in evidence.pcrs.items()]
    if evidence.boot is not None:
        found += _of_boot(evidence.boot)
    found += _of_firmware(evidence)
    found.append(f"tier:{evidence.tier.value}")
    if verdict is not None:
        found += verdict.selectors
    return [value for value in dict.fromkeys(found) if len(value) <= _MAX_VALUE_CHARS]


def _of_ek(ek: EkFacts) -> Iterator[str]:
    yield from (f"ek:method:{method}" for method in ek.methods)
    if ek.root is not None:
        yield f"ek:ca:{ek.root}"
    for name in ("manufacturer", "model", "version"):
        value = getattr(ek, name)
        if value is not None:
            yield f"{name}:{value}"


def _of_boot(boot: BootFacts) -> Iterator[str]:
    if boot.secure_boot is not None:
        yield f"secureboot:{'on' if boot.secure_boot else 'off'}"
    if "db" in boot.variables:
        yield f"secureboot:db:{boot.variables['db']}"
    yield from (f"secureboot:db:{digest}" for digest in boot.authorities[:_MAX_AUTHORITIES])
    if "dbx" in boot.variables:
        yield f"dbx:{boot.variables['dbx']}"
    if level := _SBAT.fullmatch(boot.sbat):
        yield f"sbat:{level[1]}"
    if boot.mok is not None:
        yield f"mok:{'present' if boot.mok else 'absent'}"
    if boot.uki is not None:
        yield f"uki:{boot.uki}"


def _of_firmware(evidence: Evidence) -> Iterator[str]:
    """Yield the TPM's firmware, when its vendor is certified and its version not scrambled."""
    vendor = _VENDOR.fullmatch(evidence.ek.manufacturer or "")
    if vendor and evidence.counters is not None:
        yield f"fw:{vendor[1].upper()}:{evidence.counters.firmware_version:016x}"

"""What real firmware, shim, GRUB and a Debian kernel measured replays, and says what they did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import AttestationError
from spire_hw.tpm import boot, eventlog, ima

if TYPE_CHECKING:
    from spire_hw.posture.evidence import PcrValues

BOOTS = Path(__file__).parents[2] / "vectors" / "boot"
BANK = "sha256"


def _read(name: str) -> tuple[bytes, PcrValues, bytes]:
    pcrs = {}
    for line in (BOOTS / f"{name}.pcrs").read_text().splitlines():
        number, value = line.split()
        pcrs[BANK, int(number)] = bytes.fromhex(value)
    return (BOOTS / f"{name}.log").read_bytes(), pcrs, (BOOTS / f"{name}.ima").read_bytes()


@pytest.mark.parametrize("name", ["secure-boot", "no-keys"])
def test_a_real_log_explains_every_pcr_the_firmware_and_the_loaders_use(name: str) -> None:
    raw, pcrs, _ = _read(name)
    facts = boot.facts(eventlog.parse(raw), pcrs, BANK)
    assert set(facts.explained) >= {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14}
    assert facts.workarounds == ()


def test_secure_boot_with_vendor_keys() -> None:
    raw, pcrs, _ = _read("secure-boot")
    facts = boot.facts(eventlog.parse(raw), pcrs, BANK)
    assert facts.secure_boot is True
    # Microsoft's key let shim start, Debian's let GRUB and the kernel.
    assert len(facts.authorities) == 2
    assert len(facts.db) == 2
    assert facts.sbat.startswith("sbat,1,")
    assert "/vmlinuz console=ttyS0 panic=-1 quiet" in facts.commands


def test_without_keys_secure_boot_is_off() -> None:
    raw, pcrs, _ = _read("no-keys")
    facts = boot.facts(eventlog.parse(raw), pcrs, BANK)
    assert facts.secure_boot is False
    assert facts.authorities == ()


def test_one_boots_log_is_not_anothers() -> None:
    raw, _, _ = _read("no-keys")
    _, pcrs, _ = _read("secure-boot")
    with pytest.raises(AttestationError, match="does not replay"):
        boot.facts(eventlog.parse(raw), pcrs, BANK)


@pytest.mark.parametrize(
    ("name", "measured"), [("secure-boot", [b"/mod/virtio_blk.ko"]), ("no-keys", [])]
)
def test_the_kernels_list_replays_and_its_boot_aggregate_follows_from_the_pcrs(
    name: str, measured: list[bytes]
) -> None:
    _, pcrs, listed = _read(name)
    facts = ima.replay([listed], None, pcrs, BANK)
    assert facts.violations == 0
    paths = {entry.path for entry in facts.entries}
    assert paths >= set(measured)

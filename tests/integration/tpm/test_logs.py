"""Firmware and kernel of the simulator on a real TPM: what replays is what the TPM holds."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import AttestationError
from spire_hw.tpm import boot, eventlog, ima
from spire_hw.tpm.attest import read_pcrs
from spire_hw.tpm.device import TpmDevice
from spire_hw.tpm.wire import PcrSelection
from spire_hw_sim.firmware import PHASES, PROFILES, Boot
from spire_hw_sim.imawriter import ImaList, Item
from spire_hw_sim.swtpm import Swtpm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.tpm.conftest import Factory

BANKS = ("sha256", "sha384")
ALL = tuple(range(24))
FROM_LOCALITY_0 = sorted(PROFILES.keys() - {"locality", "legacy"})


@pytest.fixture
def off(factory: Factory, tmp_path: Path) -> Iterator[Swtpm]:
    """Give a TPM nothing was measured into."""
    with Swtpm(tmp_path / "off", clone_of=factory.first) as tpm:
        yield tpm


def _boot(name: str) -> Boot:
    return replace(PROFILES[name], banks=BANKS).boot()


async def _held(tpm: Swtpm) -> dict[tuple[str, int], bytes]:
    pcrs: dict[tuple[str, int], bytes] = {}
    device = TpmDevice(tpm.tcti)
    try:
        for bank in BANKS:
            selection = PcrSelection(bank, ALL)
            values = await device.run("read", lambda c, s=selection: read_pcrs(c, s))
            pcrs |= {(bank, n): value for n, value in values.items()}
    finally:
        await device.close()
    return pcrs


@pytest.mark.asyncio
@pytest.mark.parametrize("name", FROM_LOCALITY_0)
async def test_a_log_replays_to_what_the_tpm_holds(name: str, off: Swtpm) -> None:
    start = _boot(name)
    start.run(off, BANKS)
    held = await _held(off)
    log = eventlog.parse(start.log())
    for bank in BANKS:
        facts = boot.facts(log, held, bank)
        assert set(facts.explained) == set(ALL)
        assert facts.secure_boot is (name != "secure_boot_off")
        assert start.values(bank) == {n: held[bank, n] for n in ALL}


@pytest.mark.asyncio
async def test_a_reset_gives_the_next_boot_a_fresh_start(off: Swtpm) -> None:
    first, second = _boot("clean"), _boot("evil_kernel")
    first.run(off, BANKS)
    off.reset()
    second.run(off, BANKS)
    held = await _held(off)
    assert boot.facts(eventlog.parse(second.log()), held, "sha256").images
    with pytest.raises(AttestationError, match="PCR 4 does not replay"):
        boot.facts(eventlog.parse(first.log()), held, "sha256")


@pytest.mark.asyncio
async def test_boot_phases_and_a_list_on_top(off: Swtpm) -> None:
    start = _boot("uki").with_phases(*PHASES)
    start.run(off, BANKS)
    listed = ImaList.start(start.values("sha256")).files(20, "ima-sig")
    listed = listed.measure(Item(b"/var/log/x", bytes(32), violation=True)).files(5, prefix="/opt/")
    listed.run(off, BANKS)
    held = await _held(off)
    facts = boot.facts(eventlog.parse(start.log()), held, "sha256")
    assert facts.uki is not None
    for bank in BANKS:
        for data in (listed.ascii(), listed.binary()):
            replayed = ima.replay(data, None, held, bank)
            assert (replayed.violations, len(replayed.entries)) == (1, 25)
    known = ima.replay(listed.ascii(), None, held, "sha256").state
    more = listed.files(3, prefix="/srv/")
    more.run(off, BANKS, first=known.count)
    held = await _held(off)
    later = ima.replay(more.binary(known.count), known, held, "sha256")
    assert [entry.path for entry in later.entries] == [b"/srv/%d" % n for n in range(3)]


@pytest.mark.asyncio
async def test_an_old_kernels_padding(off: Swtpm) -> None:
    start = _boot("clean")
    start.run(off, BANKS)
    listed = ImaList.start(start.values("sha256"), padded=True).files(4)
    listed.run(off, BANKS)
    facts = ima.replay(listed.ascii(), None, await _held(off), "sha256", allow_padded_sha1=True)
    assert facts.padded_sha1


# --- another implementation ---------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("tpm2_eventlog") is None, reason="tpm2-tools are not installed")
# Not all releases of that program know that PCR 0 may start elsewhere than at zero.
@pytest.mark.parametrize("name", sorted(PROFILES.keys() - {"locality"}))
def test_another_reader_computes_the_same_values(name: str, tmp_path: Path) -> None:
    raw = PROFILES[name].boot().log()
    (tmp_path / "log").write_bytes(raw)
    said = subprocess.run(  # noqa: S603
        ["tpm2_eventlog", str(tmp_path / "log")],  # noqa: S607
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    values: dict[tuple[str, int], bytes] = {}
    bank = ""
    for line in said[said.index("pcrs:") :].splitlines():
        if found := re.fullmatch(r"  (sha\d+):", line):
            bank = found[1]
        elif found := re.fullmatch(r"    (\d+) +: 0x([0-9a-f]+)", line):
            values[bank, int(found[1])] = bytes.fromhex(found[2])
    assert values
    log = eventlog.parse(raw, allow_legacy=True)
    assert {bank for bank, _ in values} == set(log.banks)
    for (bank, pcr), value in values.items():
        assert eventlog.replay(log, bank)[pcr] == value

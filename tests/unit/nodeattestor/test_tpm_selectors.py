from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from spire_hw.posture.evidence import BootFacts, Counters, EkFacts, Evidence, Occasion, Tier
from spire_hw.posture.verdict import Verdict
from spire_hw.selector import Selector
from spire_hw_plugins.nodeattestor.tpm.selectors import selectors

EK = EkFacts("ab" * 32, ("ca", "hash"), "cd" * 32, "id:4E544300", "NPCT75x", "id:00070002")
BOOT = BootFacts(
    log_sha256="0" * 64,
    bank="sha256",
    explained=tuple(range(8)),
    secure_boot=True,
    variables={"db": "1" * 64, "dbx": "2" * 64, "PK": "3" * 64},
    sbat="sbat,1,2023012900",
    authorities=("4" * 64, "4" * 64, "5" * 64),
    uki="6" * 64,
    mok=False,
)
FULL = Evidence(
    made_at=datetime(2026, 6, 1, tzinfo=UTC),
    occasion=Occasion.ATTESTATION,
    tier=Tier.QUOTE,
    ek=EK,
    ak_public=b"",
    key_in_tpm=True,
    counters=Counters(1, 2, 3, safe=True, firmware_version=0x0007000200000000),
    pcrs={("sha256", 7): b"\x07" * 32},
    boot=BOOT,
)


def test_each_fact_has_one_selector() -> None:
    assert selectors(FULL, Verdict("web", 7, "", (), ("boot:policy:web@7", "key:tpm"))) == [
        "pub_hash:" + "ab" * 32,
        "ak:hierarchy:endorsement",
        "ek:method:ca",
        "ek:method:hash",
        "ek:ca:" + "cd" * 32,
        "manufacturer:id:4E544300",
        "model:NPCT75x",
        "version:id:00070002",
        "key:tpm",
        "pcr:sha256:7:" + "07" * 32,
        "secureboot:on",
        "secureboot:db:" + "1" * 64,
        "secureboot:db:" + "4" * 64,
        "secureboot:db:" + "5" * 64,
        "dbx:" + "2" * 64,
        "sbat:2023012900",
        "mok:absent",
        "uki:" + "6" * 64,
        "fw:4E544300:0007000200000000",
        "tier:quote",
        "boot:policy:web@7",
    ]


def test_what_is_not_proved_has_none() -> None:
    bare = replace(
        FULL, ek=EkFacts("ab" * 32, ("hash",)), key_in_tpm=False, counters=None, pcrs={}, boot=None
    )
    assert selectors(bare) == [
        "pub_hash:" + "ab" * 32,
        "ak:hierarchy:endorsement",
        "ek:method:hash",
        "tier:quote",
    ]
    unknown = replace(FULL, boot=replace(BOOT, secure_boot=None, variables={}, mok=None, uki=None))
    assert not [s for s in selectors(unknown) if s.startswith(("dbx", "mok", "uki"))]
    assert "secureboot:off" in selectors(replace(FULL, boot=replace(BOOT, secure_boot=False)))


@pytest.mark.parametrize("vendor", ["id:4E5443", "4E544300", "id:4E544300\n", "id:4E54430G", None])
def test_firmware_needs_a_certified_vendor(vendor: str | None) -> None:
    found = selectors(replace(FULL, ek=replace(EK, manufacturer=vendor)))
    assert not any(value.startswith("fw:") for value in found)


@pytest.mark.parametrize("sbat", ["", "sbat,1,x", "sbat,1,2023012900\n", "sbat,1," + "9" * 40, "x"])
def test_a_level_is_a_number(sbat: str) -> None:
    assert not any(
        s.startswith("sbat:") for s in selectors(replace(FULL, boot=replace(BOOT, sbat=sbat)))
    )


def test_their_number_and_length_are_bounded() -> None:
    many = replace(BOOT, authorities=tuple(f"{n:064x}" for n in range(5000)), uki="6" * 300)
    found = selectors(
        replace(FULL, boot=many, ek=replace(EK, model="m" * 5000)),
        Verdict("web", 7, "", (), ("x" * 3000,)),
    )
    assert sum(value.startswith("secureboot:db:") for value in found) == 17
    assert len(found) < 50
    assert all(len(Selector("tpm", value).value) <= 256 for value in found)


def test_activation_alone_says_nothing_else() -> None:
    verdict = Verdict("web", 7, "", (), ("boot:policy:web@7",))
    assert selectors(replace(FULL, tier=Tier.ACTIVATION), verdict) == ["tier:activation"]

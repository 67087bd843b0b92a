"""Evidence of a good machine, and policies to hold it against."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from spire_hw.posture.evidence import (
    BootFacts,
    BootImage,
    Counters,
    EkFacts,
    Evidence,
    ImaEntry,
    ImaFacts,
    ImaState,
    Occasion,
    Tier,
)
from spire_hw.posture.policyfile import parse_policy

if TYPE_CHECKING:
    from spire_hw.posture.policy import Policy

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
MAKER = "id:4E544300"
EK_HASH = "e" * 64
ROOT = "a" * 64


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def extended(start: bytes, *words: str) -> bytes:
    value = start
    for word in words:
        value = hashlib.sha256(value + digest(word)).digest()
    return value


UKI = digest("uki")
PCRS = {("sha256", n): digest(f"pcr {n}") for n in range(10)} | {
    ("sha256", 10): digest("ima"),
    ("sha256", 11): extended(UKI, "enter-initrd", "leave-initrd", "sysinit", "ready"),
    ("sha256", 12): bytes(32),
    ("sha256", 14): digest("pcr 14"),
}
EK = EkFacts(EK_HASH, ("ca",), ROOT, MAKER, "NPCT75x", "id:00070002")
COUNTERS = Counters(90_000, 7, 0, True, (7 << 48) + (2 << 32) + (3 << 16) + 1)
BOOT = BootFacts(
    log_sha256="1" * 64,
    bank="sha256",
    explained=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14),
    secure_boot=True,
    variables={name: digest(name).hex() for name in ("PK", "KEK", "db", "dbx")},
    db=(digest("db 1").hex(), digest("db 2").hex()),
    dbx=frozenset(digest(f"dbx {n}").hex() for n in range(30)),
    sbat="sbat,1,2023012900",
    authorities=(digest("db 1").hex(),),
    images=(
        BootImage(2, digest("rom")),
        BootImage(4, digest("shim")),
        BootImage(4, digest("kernel")),
    ),
    commands=("linux /vmlinuz root=/dev/sda1", 'menuentry "a ${b}"'),
    files=(digest("vmlinuz"), digest("initrd")),
    uki=UKI.hex(),
    mok=True,
    mok_digests=(digest("MokList"),),
    crtm_version="N2CET63W (1.46 )",
    workarounds=("exit_boot_services",),
)


def measured(path: bytes, content: str = "", **changes: Any) -> ImaEntry:
    entry = ImaEntry(path, "sha256", digest(content or repr(path)), "ima-ng")
    return entry._replace(**changes)


FILES = tuple(
    measured(path) for path in (b"/usr/bin/ls", b"/usr/bin/od d", b"/etc/\xffx", b"kexec")
)
IMA = ImaFacts(0, ImaState(5, PCRS["sha256", 10], digest("state")), FILES)
GOOD = Evidence(
    made_at=NOW,
    occasion=Occasion.ATTESTATION,
    tier=Tier.QUOTE,
    ek=EK,
    ak_public=b"ak",
    key_in_tpm=True,
    counters=COUNTERS,
    pcrs=PCRS,
    boot=BOOT,
    ima=IMA,
    boot_id="5a6b",
)


def good(**changes: Any) -> Evidence:
    return replace(GOOD, **changes)


def booted(**changes: Any) -> Evidence:
    return replace(GOOD, boot=replace(BOOT, **changes))


def policy(inside: str, name: str = "web", files: dict[str, bytes] | None = None) -> Policy:
    """Return the policy `name` with these contents."""
    held = files or {}
    return parse_policy(f'policy "{name}" {{\n{inside}\n}}', read=lambda name: held[name])

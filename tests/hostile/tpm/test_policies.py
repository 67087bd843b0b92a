"""Sound evidence of machines that policy does not allow; each differs from a good one in one thing."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sqlite3
import struct
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import structlog
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from spire_hw.errors import AttestationError, ConfigError, ErrorKind
from spire_hw.posture.policyfile import load_policy
from spire_hw.posture.signature import load_keys
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import NodeFilter, StoredPolicy
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.posture.postures import Postures
from spire_hw_server.postureconfig import PostureSettings
from spire_hw_sim import firmware
from spire_hw_sim.again import refused
from spire_hw_sim.firmware import Boot, Firmware, Measurement
from spire_hw_sim.imawriter import ImaList, Item
from spire_hw_sim.softtpm import SoftTpm, make_ek
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_sim.tpmnode import TpmNode

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
DENIED = ErrorKind.PERMISSION_DENIED
GOOD = Firmware()
FILES = tuple(Item(b"/usr/bin/t%d" % n, hashlib.sha256(b"t%d" % n).digest()) for n in range(5))
KEY, STRANGER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
LIST = b"".join(b"%b  %b\n" % (item.digest.hex().encode(), item.path) for item in FILES)
RULES = f"""
boot {{ images = ["@images"] dbx_floor = ["{GOOD.dbx[0].hex()}"] sbat_floor = 2023012900 }}
ima {{ allow = ["@files"] exclude = ["/var/"] keyring = ["@keys"] violations = 6 }}
"""


def images(boot: Boot, bank: str = "sha256") -> list[bytes]:
    """Return digests of what was started, as an operator knows them."""
    kinds = {firmware.EV_APPLICATION}
    found = (m for m in boot.measurements if m.pcr == 4 and m.type in kinds)
    return [m.digest(bank) for m in found]


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def signed(key: ec.EllipticCurvePrivateKey, item: Item) -> Item:
    raw = key.sign(item.digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    head = struct.pack(">BBB4sH", 3, 2, 4, load_keys(pem(key))[0].key_id, len(raw))
    return replace(item, template="ima-sig", extra=head + raw)


@dataclass
class Site:
    """A server half under policies of its datastore, and machines of the trusted manufacturer."""

    lab: Lab
    postures: Postures
    store: Datastore
    file: Path
    version: int = 0

    async def rule(self, inside: str, name: str = "web") -> None:
        """Put the next version of the policy in force."""
        boots = [digest.hex() for digest in images(GOOD.boot())]
        files = {"files": LIST, "keys": pem(KEY), "images": "\n".join(boots).encode()}
        text = f'policy "{name}" {{\n{inside}\n}}\n'
        policy, packed = load_policy(text, read=lambda name: files[name], version=self.version + 1)
        row = StoredPolicy(name, self.version + 1, packed, policy.sha256)
        await self.store.add_policy(row, self.version)
        self.version += 1
        await self.postures.policies.refresh()

    async def forget(self) -> None:
        """Let the file be as small as before versions were made: SQLite keeps pages of what grows."""

        def empty() -> None:
            with closing(sqlite3.connect(self.file)) as connection:
                connection.executescript("DELETE FROM policies; DELETE FROM changes;")

        await asyncio.to_thread(empty)
        self.version = 0

    def machine(self, boot: Boot | None = None, *more: Item, padded: bool = False) -> TpmNode:
        """Return a machine after a start, whose kernel then measured files."""
        started = boot or GOOD.boot()
        tpm = SoftTpm(ek=make_ek("L-2"))
        tpm.pcrs.update(started.pcrs())
        ima = ImaList.start(started.values("sha256"), padded=padded).measure(*FILES, *more)
        tpm.pcrs["sha256", 10] = ima.pcr("sha256")
        node = self.lab.node(tpm)
        node.boot_log, node.ima = started.log(), ima.ascii()
        return node

    async def refusal(self, node: TpmNode) -> tuple[ErrorKind, str, list[str]]:
        """Return code, text and reasons a machine is refused with, while good ones are not."""
        error = await self.lab.refusal(node, afterwards=self.machine())
        assert isinstance(error, AttestationError)
        assert await self.store.count_nodes(NodeFilter()) == 0
        return error.kind, error.message, [finding.code for finding in error.findings]


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    lab = await Lab.make(tmp_path)
    log = structlog.get_logger()
    file = tmp_path / "d"
    store = await open_datastore(DatastoreConfig("sqlite3", str(file)), clock=lab.clock, log=log)

    async def no_node(_: object) -> None:
        return None

    postures = Postures(
        store,
        PostureSettings(given=True, heartbeat_interval=timedelta(seconds=60)),
        trust_domain=TD,
        node_of=no_node,
        poll_s=5,
        full_reload_s=60,
        clock=lab.clock,
        log=log,
    )
    await postures.start()
    judged = await Lab.make(tmp_path, judge=postures.judge, vendor=lab.vendor)
    made = Site(judged, postures, store, file)
    yield made
    await postures.close()
    await store.close()


async def test_a_good_machine_is_accepted_with_selectors_of_its_policy(site: Site) -> None:
    await site.rule(RULES)
    made = await site.lab.attest(site.machine(None, signed(KEY, Item(b"/opt/a", b"\1" * 32))))
    values = {selector for selector in made.selector_values if "policy" in selector}
    assert values == {"boot:policy:web@1", "ima:policy:web"}


async def test_logs_are_held_against_the_bank_of_the_policy(site: Site) -> None:
    wide = replace(GOOD, banks=("sha1", "sha256", "sha384")).boot()
    values = wide.values("sha256")
    pins = "\n".join(f'"{n}" = ["{values[n].hex()}"]' for n in range(8))
    kernel = images(wide, "sha384")
    await site.rule(
        f'bank = "sha384"\npcrs {{ sha256 {{ {pins} }} }}\n'
        f"boot {{ images = {json.dumps([digest.hex() for digest in kernel])} }}"
    )
    made = await site.lab.attest(site.machine(wide))
    assert made.evidence is not None
    assert made.evidence.boot is not None
    assert made.evidence.boot.bank == "sha384"


def separator(kind: bytes) -> Boot:
    def edit(m: Measurement) -> Measurement:
        return replace(m, data=kind) if (m.pcr, m.type) == (1, firmware.EV_SEPARATOR) else m

    return GOOD.boot().change(edit)


@pytest.mark.parametrize(
    ("boot", "message"),
    [
        (
            separator((1).to_bytes(4, "little")),
            "policy: firmware reported an error [firmware_error]",
        ),
        (Firmware(secure_boot=False).boot(), "policy: Secure Boot is off [secureboot]"),
        (Firmware(debug_mode=True).boot(), "policy: firmware is in debug mode [debug_mode]"),
        (Firmware(dma_protection=False).boot(), "policy: DMA protection is off [dma_protection]"),
        (
            Firmware(dbx=GOOD.dbx[1:]).boot(),
            "policy: revocation list is too old, 1 entry is missing [dbx_old]",
        ),
        (
            Firmware(sbat="sbat,1,2021030218").boot(),
            'policy: revocation list is too old, SbatLevel is "sbat,1,2021030218" [dbx_old]',
        ),
    ],
)
async def test_boot_states_that_policy_does_not_allow(site: Site, boot: Boot, message: str) -> None:
    await site.rule(RULES)
    kind, text, _ = await site.refusal(site.machine(boot))
    assert (kind, text) == (DENIED, message)


async def test_a_kernel_that_is_not_listed_and_a_loader_that_is_revoked(site: Site) -> None:
    await site.rule(RULES)
    kind, text, codes = await site.refusal(site.machine(Firmware(kernel=b"evil").boot()))
    assert (kind, codes) == (DENIED, ["boot_image"])
    assert text.startswith("policy: 1 of 3 not allowed (boot image): ")
    loader = images(GOOD.boot())[0].hex()
    await site.rule(f'boot {{ revoked_images = ["{loader}"] }}\nallow_pcr7_only = true')
    error = await site.lab.refused(site.machine())
    assert re.search(r"a revoked image was started: .* \[boot_image_rev", error.message)


async def test_pcr_7_alone_is_refused_when_the_policy_is_loaded(site: Site) -> None:
    for inside in ("boot { }", f'pcrs {{ sha256 {{ "7" = ["{"00" * 32}"] }} }}'):
        error = await refused(lambda inside=inside: site.rule(inside))  # type: ignore[misc]
        assert isinstance(error, ConfigError)
        assert "PCR 7 alone does not identify what was" in error.message
        assert error.kind is ErrorKind.FAILED_PRECONDITION
        await site.rule(f"{inside}\nallow_pcr7_only = true")


async def test_violations_above_the_permitted_number(site: Site) -> None:
    await site.rule(RULES)
    odd = [Item(b"/a%d" % n, bytes(32), violation=True) for n in range(7)]
    await site.lab.attest(site.machine(None, *odd[:6]))
    kind, text, codes = await site.refusal(site.machine(None, *odd))
    assert (kind, codes) == (DENIED, ["ima_violation"])
    assert text == "ima: 7 violations, 6 allowed [ima_violation]"


NEW = Item(b"/opt/new", hashlib.sha256(b"new").digest())
GENUINE = signed(KEY, NEW)


@pytest.mark.parametrize(
    "item",
    [
        NEW,
        replace(FILES[0], digest=NEW.digest),
        replace(FILES[0], path=FILES[1].path),
        replace(FILES[0], path=b"/opt/moved"),
        signed(STRANGER, NEW),
        replace(signed(STRANGER, NEW), extra=GENUINE.extra[:9] + signed(STRANGER, NEW).extra[9:]),
        replace(GENUINE, digest=hashlib.sha256(b"other").digest()),
        *(replace(NEW, template="ima-sig", extra=bytes(n)) for n in (0, 3, 5000 // 4)),
        replace(GENUINE, extra=GENUINE.extra[:3]),
        Item(b"/var/../usr/bin/evil", NEW.digest),
        Item(b"/var/..", NEW.digest),
        Item(b"/opt/\\n\\x41", NEW.digest),
        Item(b"/opt/\x1b[2J\x07", NEW.digest),
        Item("/opt/\u202ename".encode(), NEW.digest),
        Item(b"/" + b"x" * 3000, NEW.digest),
    ],
    ids=range(17),
)
async def test_files_that_are_neither_listed_nor_signed_by_a_key_of_the_policy(
    site: Site, item: Item
) -> None:
    await site.rule(RULES)
    await site.lab.attest(site.machine(None, GENUINE))
    kind, text, codes = await site.refusal(site.machine(None, item))
    assert (kind, codes) == (DENIED, ["ima_unknown_file"])
    assert text.startswith('ima: a file is not in policy web@1: "/')
    assert text.endswith(" [ima_unknown_file]")
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 500


async def test_one_file_among_many_signed_ones(site: Site) -> None:
    await site.rule(RULES)
    many = [signed(KEY, replace(NEW, path=b"/opt/%d" % n)) for n in range(200)]
    await site.lab.attest(site.machine(None, *many))
    many[100] = signed(STRANGER, replace(NEW, path=b"/opt/evil"))
    kind, text, codes = await site.refusal(site.machine(None, *many))
    assert (kind, codes) == (DENIED, ["ima_unknown_file"])
    assert '"/opt/evil"' in text


async def test_old_kernels_are_accepted_by_a_policy_that_says_so_alone(site: Site) -> None:
    await site.rule(RULES)
    kind, text, codes = await site.refusal(site.machine(padded=True))
    assert (kind, codes) == (DENIED, ["ima_padded_sha1"])
    assert text == "ima: kernel extends SHA-1 into the SHA-256 bank [ima_padded_sha1]"
    await site.rule(RULES.replace("violations", "allow_padded_sha1 = true violations"))
    await site.lab.attest(site.machine(padded=True))


async def test_no_policy_for_a_node_is_a_denial(site: Site) -> None:
    await site.rule(f'nodes {{ selectors = ["model:other"] }}\n{RULES}')
    error = await site.lab.refused(site.machine())
    assert error.kind is ErrorKind.FAILED_PRECONDITION
    assert error.message == "policy: no policy applies to this node (default is deny) [no_policy]"
    assert site.lab.challenges == []


async def test_of_two_versions_the_newer_is_applied(site: Site) -> None:
    good = GOOD.boot().values("sha256")[4].hex()
    old, new = (f'pcrs {{ sha256 {{ "4" = ["{value}"] }} }}' for value in (good, "00" * 32))
    node = site.machine()

    async def changed(message: bytes) -> bytes:
        await site.rule(new)
        return node.answer(message)

    async def act() -> object:
        site.lab.admitted.clear()
        site.lab.challenges.clear()
        await site.forget()
        await site.rule(old)
        return await site.lab.attest(node, answer=changed)

    error = await refused(act)
    assert error.kind is DENIED
    text = f"policy: PCR 4 is not among the allowed values, it is sha256:{good} [pcr_mismatch]"
    assert error.message == text


async def test_a_newer_version_that_asks_for_more_is_not_satisfied_by_less(site: Site) -> None:
    await site.rule(f'pcrs {{ sha256 {{ "4" = ["{GOOD.boot().values("sha256")[4].hex()}"] }} }}')
    node = site.machine()

    async def changed(message: bytes) -> bytes:
        await site.rule(RULES)
        return node.answer(message)

    with pytest.raises(AttestationError, match=r"\[log_missing\]") as caught:
        await site.lab.attest(node, answer=changed)
    assert [finding.code for finding in caught.value.findings] == ["log_missing", "ima_missing"]
    assert caught.value.kind is DENIED

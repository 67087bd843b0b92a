"""Boot logs and measurement lists: only our own errors come out, and what holds is what was made."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spire_hw.errors import SpireHwError
from spire_hw.tpm import boot, eventlog, ima, secureboot
from spire_hw.tpm.boot import BootRules
from spire_hw.tpm.inflate import inflate
from spire_hw_sim.firmware import PROFILES, Boot, Firmware, Measurement
from spire_hw_sim.imawriter import ImaList, Inode, Item

if TYPE_CHECKING:
    from spire_hw.posture.evidence import BootFacts, ImaEntry, ImaFacts
    from spire_hw.tpm.eventlog import Log

BANK = "sha256"
BOOTS = {name: PROFILES[name].boot() for name in ("clean", "uki", "old_shim", "legacy")}
LOGS = [start.log() for start in BOOTS.values()]
VALUES = BOOTS["clean"].values(BANK)
LOOSE = BootRules(empty_secure_boot=True, early_authority=True)

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _damage(draw: st.DrawFn, good: bytes) -> bytes:
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 4)):
            case 0 if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                data[at : at + draw(st.integers(1, 60))] = b""
            case 2:
                data[at:at] = draw(st.binary(max_size=60))
            case 3:
                data[at : at + 4] = draw(st.sampled_from([bytes(4), b"\xff" * 4, b"\0\0\0\x80"]))
            case _:
                del data[at:]
    return bytes(data)


@st.composite
def damaged_logs(draw: st.DrawFn) -> bytes:
    return _damage(draw, draw(st.sampled_from(LOGS)))


def _facts(log: Log) -> BootFacts | None:
    """Read a log as if its values had been quoted, so that nothing stops at the replay."""
    try:
        values = eventlog.replay(log, log.banks[-1])
        pcrs = {(log.banks[-1], n): value for n, value in values.items()}
        return boot.facts(log, pcrs, log.banks[-1], LOOSE)
    except SpireHwError:
        return None


@quick
@given(st.one_of(damaged_logs(), st.binary(max_size=400)))
def test_any_log_parses_or_is_refused(raw: bytes) -> None:
    try:
        log = eventlog.parse(raw, allow_legacy=True)
    except SpireHwError:
        return
    if log.banks:
        _facts(log)


@quick
@given(damaged_logs())
def test_a_log_that_was_touched_says_nothing_new(raw: bytes) -> None:
    """With the TPM's own values, damage is refused or changes only what nothing vouches for."""
    try:
        log = eventlog.parse(raw)
        facts = boot.facts(log, BOOTS["clean"].pcrs(BANK), BANK)
    except SpireHwError:
        return
    sound = boot.facts(eventlog.parse(LOGS[0]), BOOTS["clean"].pcrs(BANK), BANK)
    vouched = ("secure_boot", "debug_mode", "dma_protection", "firmware_error", "variables", "db")
    vouched += ("dbx", "sbat", "authorities")
    for name in vouched:
        assert getattr(facts, name) == getattr(sound, name)
    # A remark that lost its data becomes an image; an image stays one.
    assert set(sound.images) <= set(facts.images)
    unknown = {"digest:" + hashlib.sha256(c.encode()).hexdigest() for c in sound.commands}
    if 8 in facts.explained:
        assert set(facts.commands) <= set(sound.commands) | unknown
        assert len(facts.commands) == len(sound.commands)


measurements = st.builds(
    Measurement,
    st.integers(0, 23),
    st.sampled_from([1, 3, 4, 5, 6, 8, 13, 18, *range(0x80000001, 0x80000009), 0x800000E0]),
    st.binary(max_size=40),
    st.none() | st.binary(max_size=10),
)


@quick
@given(
    st.lists(measurements, max_size=12),
    st.sampled_from([("sha256",), ("sha1", "sha256"), ("sha384", "sha256", "sha512")]),
)
def test_what_is_written_replays(parts: list[Measurement], banks: tuple[str, ...]) -> None:
    start = Boot(tuple(parts), banks)
    try:
        log = eventlog.parse(start.log())
    except SpireHwError as e:
        assert "startup locality" in e.message  # noqa: PT017
        return
    for bank in banks:
        assert eventlog.replay(log, bank) == start.values(bank)
    _facts(log)


@quick
@given(st.lists(measurements, max_size=6), st.data())
def test_more_measurements_on_a_sound_boot(parts: list[Measurement], data: st.DataObject) -> None:
    """Whatever else is measured, by whomever, facts stay well formed and images are never lost."""
    start = BOOTS["clean"]
    at = data.draw(st.integers(0, len(start.measurements)))
    more = replace(start, measurements=(*start.measurements[:at], *parts, *start.measurements[at:]))
    try:
        facts = boot.facts(eventlog.parse(more.log()), more.pcrs(BANK), BANK)
    except SpireHwError:
        return
    images = [image.digest for image in facts.images if image.pcr == 4]
    for m in more.measurements:
        if m.pcr == 4 and m.content is not None and m.content != m.data and m.type != 3:
            assert m.digest(BANK) in images


@quick
@given(st.binary(max_size=300))
def test_any_signature_list(raw: bytes) -> None:
    for data in (raw, secureboot.CERT_X509 + raw, secureboot.CERT_SHA256 + raw):
        try:
            entries = list(secureboot.signature_list(data))
        except SpireHwError:
            continue
        assert len(entries) <= len(data)


@quick
@given(
    st.lists(st.binary(min_size=32, max_size=32), max_size=8),
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=4),
)
def test_signature_lists_read_back(hashes: list[bytes], certificates: list[bytes]) -> None:
    machine = Firmware(db=tuple(certificates), dbx=tuple(hashes))
    start = machine.boot()
    facts = boot.facts(eventlog.parse(start.log()), start.pcrs(BANK), BANK)
    assert facts.db == tuple(hashlib.sha256(c).hexdigest() for c in certificates)
    assert facts.dbx == {h.hex() for h in hashes}


@quick
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_compressed_data(raw: bytes, limit: int) -> None:
    for data in (raw, zlib.compress(raw), zlib.compress(raw)[:-1], zlib.compress(raw) + raw):
        try:
            content = inflate(data, limit, "log")
        except SpireHwError:
            continue
        assert len(content) <= limit
        assert zlib.decompress(data) == content


# --- measurement lists --------------------------------------------------------------------------

paths = st.one_of(
    st.text(st.characters(exclude_characters=" \n\0", exclude_categories=["Cs"]), min_size=1),
    st.sampled_from(["/usr/bin/a", "/..", "\x1b[m", "ü"]),
).map(lambda text: text.encode()[:200].decode("utf-8", "ignore").encode())
digests = st.binary(min_size=32, max_size=32)
inodes = st.none() | st.builds(
    Inode,
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(["security.ima", "security.selinux", "user.x"]), st.binary(max_size=9)
    ),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1),
)
further = st.lists(
    st.sampled_from(["sig", "evmsig", "xattrnames", "xattrlengths", "xattrvalues"])
    | st.sampled_from(["buf", "iuid", "igid", "imode"]),
    unique=True,
).map(lambda fields: "|".join(["n-ng", *fields]))
items = st.one_of(
    st.builds(
        Item, paths, digests, st.just("evm-sig") | further.map("d-ng|".__add__), inode=inodes
    ),
    st.builds(Item, paths, digests, further.map("d-ngv2|".__add__), inode=inodes),
    st.builds(Item, paths, digests, st.just("ima-ng")),
    st.builds(Item, paths, digests, st.just("ima-ng"), violation=st.just(True)),
    st.builds(
        Item,
        paths,
        digests,
        st.sampled_from(["ima-sig", "ima-sigv2", "ima-modsig", "ima-buf"]),
        extra=st.binary(max_size=90),
    ),
    st.builds(
        Item,
        paths,
        digests,
        st.sampled_from(["ima-ngv2", "ima-sigv2"]),
        st.just("verity:sha256"),
    ),
    st.builds(
        Item,
        paths,
        digests,
        st.just("ima-modsig"),
        extra=st.binary(max_size=20),
        content=digests,
        appended=st.binary(min_size=1, max_size=90),
    ),
    st.builds(
        Item,
        paths,
        st.binary(min_size=20, max_size=20),
        st.sampled_from(["ima", "ima-ng"]),
        st.just("sha1"),
    ),
).filter(lambda item: item.path not in {b"", ima.AGGREGATE})
lists = st.lists(items, max_size=8).map(lambda made: ImaList.start(VALUES).measure(*made))


def _pcrs(listed: ImaList, bank: str = BANK) -> dict[tuple[str, int], bytes]:
    return BOOTS["clean"].pcrs() | {(bank, 10): listed.pcr(bank)}


def _entries(made: ImaList) -> tuple[ImaEntry, ...]:
    return tuple(item.entry() for item in made.items[1:] if not item.violation)


@quick
@given(lists, st.sampled_from(["sha1", "sha256"]), st.integers(0, 9))
def test_lists_read_back_whole_and_in_parts(listed: ImaList, bank: str, at: int) -> None:
    whole: list[ImaFacts] = []
    for data in (listed.ascii(), listed.binary()):
        whole.append(ima.replay([data], None, _pcrs(listed, bank), bank))
        assert whole[-1].entries == _entries(listed)
        assert whole[-1].violations == sum(item.violation for item in listed.items)
    assert whole[0] == whole[1]
    first = replace(listed, items=listed.items[: at + 1])
    state = ima.replay([first.ascii()], None, _pcrs(first, bank), bank).state
    rest = ima.replay([listed.binary(state.count)], state, _pcrs(listed, bank), bank, known=state)
    assert (rest.state.count, rest.state.pcr) == (whole[0].state.count, whole[0].state.pcr)
    parts = [first.ascii(), listed.ascii()[len(first.ascii()) :]]
    assert ima.replay(parts, None, _pcrs(listed, bank), bank) == whole[0]


@st.composite
def damaged_lists(draw: st.DrawFn) -> tuple[ImaList, bytes]:
    listed = draw(lists)
    form = draw(st.sampled_from([listed.ascii(), listed.binary(), listed.ascii(bank="sha256")]))
    return listed, _damage(draw, form)


@quick
@given(damaged_lists())
def test_damage_is_refused_or_behind_the_quote(made: tuple[ImaList, bytes]) -> None:
    listed, data = made
    try:
        facts = ima.replay([data], None, _pcrs(listed), BANK, allow_padded_sha1=True)
    except SpireHwError:
        return
    assert facts.entries == _entries(listed)


@quick
@given(st.binary(max_size=300), st.sampled_from([b"", b"10 ", b"\n\0\0\0"]))
def test_any_list(raw: bytes, head: bytes) -> None:
    with pytest.raises(SpireHwError):
        ima.replay([head + raw], None, _pcrs(ImaList.start(VALUES)), BANK)

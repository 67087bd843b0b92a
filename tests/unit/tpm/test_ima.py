"""Lists of sound kernels: every template, both forms, whole and in parts."""

from __future__ import annotations

import hashlib

import pytest

from spire_hw.errors import AttestationError
from spire_hw.posture.evidence import ImaEntry, ImaFacts, ImaState
from spire_hw.tpm import ima
from spire_hw_sim.firmware import PROFILES
from spire_hw_sim.imawriter import ImaList, Inode, Item

BOOT = PROFILES["clean"].boot()
BANKS = ("sha1", "sha256")
DIGEST = hashlib.sha256(b"content").digest()
XATTRS = {"security.selinux": b"system_u:object_r:bin_t:s0\0", "security.ima": bytes(range(40))}
INODE = Inode(b"\x05\x02" + bytes(70), XATTRS, 1000, 2**32 - 1, 0o104755)
OWN = "d-ng|n-ng|imode|sig|xattrnames"
ITEMS = (
    Item(b"/usr/bin/a", DIGEST),
    Item(b"/usr/bin/b", DIGEST, "ima-sig", extra=b"\x03\x02" + bytes(70)),
    Item(b"/usr/bin/c_with_blanks", DIGEST, "ima-sig"),
    Item(b"/usr/bin/d", DIGEST[:20], "ima", "sha1"),
    Item(b"kexec-cmdline", DIGEST, "ima-buf", extra=b"root=/dev/sda1 ro"),
    Item(b".ima", hashlib.sha512(b"key").digest(), "ima-buf", "sha512", b"key"),
    Item("/usr/bin/ü".encode(), hashlib.md5(b"x").digest(), algorithm="md5"),  # noqa: S324
    Item(b"/v", bytes(32), violation=True),
    Item(b"/usr/bin/" + b"x" * 4000, DIGEST),
    Item(b"/usr/bin/e", DIGEST, "ima-ngv2"),
    Item(b"/usr/bin/f", DIGEST, "ima-ngv2", "verity:sha256"),
    Item(b"/usr/bin/g", DIGEST, "ima-sigv2", extra=b"\x03\x02" + bytes(70)),
    Item(b"/usr/bin/h", 2 * DIGEST, "ima-sigv2", "verity:sha512", extra=b"\x06\x03" + bytes(70)),
    Item(b"/usr/bin/i", DIGEST, "ima-sigv2"),
    Item(b"/v", bytes(32), "ima-ngv2", violation=True),
    Item(b"/lib/a.ko", DIGEST, "ima-modsig", content=DIGEST[::-1], appended=b"\x30\x82" * 99),
    Item(b"/lib/b.ko", DIGEST, "ima-modsig", extra=b"\x03\x02" + bytes(70)),
    Item(b"/v.ko", bytes(32), "ima-modsig", violation=True),
    Item(b"/usr/bin/j", DIGEST, "evm-sig", inode=INODE),
    Item(b"/usr/bin/k", DIGEST, "evm-sig", inode=Inode(mode=0)),
    Item(b"kexec-cmdline", DIGEST, "evm-sig"),
    Item(b"/usr/bin/l", DIGEST, OWN, inode=INODE, extra=b"\x03\x02" + bytes(70)),
    Item(b"/usr/bin/m", DIGEST, "d-ngv2|n-ng|iuid", "verity:sha256", inode=INODE),
    Item(b"/usr/bin/n", DIGEST, "d-ng|n-ng"),
)
LIST = ImaList.start(BOOT.values("sha256")).measure(*ITEMS)
ENTRIES = tuple(item.entry() for item in ITEMS if not item.violation)
COUNT = 1 + len(ITEMS)


def _replay(
    data: bytes, listed: ImaList, bank: str = "sha256", start: ImaState | None = None
) -> ImaFacts:
    return ima.replay([data], start, BOOT.pcrs() | {(bank, 10): listed.pcr(bank)}, bank)


@pytest.mark.parametrize("bank", BANKS)
def test_all_templates_in_both_forms(bank: str) -> None:
    forms = [LIST.ascii(), LIST.binary(), LIST.ascii(bank="sha256"), LIST.ascii(bank="sha512")]
    for data in forms:
        facts = _replay(data, LIST, bank)
        assert facts.entries == ENTRIES
        assert (facts.start, facts.violations, facts.padded_sha1) == (0, 3, False)
        assert (facts.state.count, facts.state.pcr) == (COUNT, LIST.pcr(bank))
    assert len({_replay(data, LIST, bank).state for data in forms}) == 1


def test_a_list_longer_than_what_was_quoted() -> None:
    longer = LIST.files(3, prefix="/later/")
    for data in (longer.ascii(), longer.binary()):
        facts = _replay(data, LIST)
        assert facts.entries == ENTRIES
        rest = longer.ascii(facts.state.count)
        more = _replay(rest, longer, start=facts.state)
        assert [e.path for e in more.entries] == [b"/later/%d" % n for n in range(3)]
        assert (more.start, more.state.count) == (COUNT, COUNT + 3)


@pytest.mark.parametrize("form", ["ascii", "binary"])
def test_part_by_part(form: str) -> None:
    listed = ImaList.start(BOOT.values("sha256")).measure(*ITEMS)
    state, seen = None, 0
    for number in range(1, 8):
        listed = listed.files(number, prefix=f"/{number}/")
        first = 0 if state is None else state.count
        data = listed.ascii(first) if form == "ascii" else listed.binary(first)
        facts = _replay(data, listed, start=state)
        assert (facts.start, facts.state.pcr) == (first, listed.pcr())
        state = facts.state
        seen += len(facts.entries) + facts.violations
    whole = _replay(listed.ascii(), listed)
    assert state is not None
    assert (state.count, state.pcr) == (whole.state.count, whole.state.pcr)
    assert seen + 1 == len(listed.items)


def test_a_state_without_entries_is_the_beginning() -> None:
    empty = ImaState(0, bytes(32), bytes(32))
    assert _replay(LIST.ascii(), LIST, start=empty) == _replay(LIST.ascii(), LIST)
    with pytest.raises(AttestationError, match="ima: list is missing"):
        _replay(b"", LIST, start=empty)


def test_nothing_new() -> None:
    state = _replay(LIST.ascii(), LIST).state
    facts = _replay(b"", LIST, start=state)
    assert (facts.start, facts.entries, facts.violations) == (COUNT, (), 0)
    assert (facts.state.count, facts.state.pcr) == (state.count, state.pcr)
    # Entries that came after the quote are left for the next time.
    later = LIST.files(3, prefix="/later/")
    assert _replay(later.ascii(COUNT), LIST, start=state).entries == ()


def test_the_running_digest_follows_the_entries() -> None:
    state = _replay(LIST.ascii(), LIST).state
    other = LIST.changed(3, bytes(32))
    assert _replay(other.ascii(), other).state.sha256 != state.sha256
    joined = b"".join(item.extension("sha256") for item in LIST.items)
    assert state.sha256 == hashlib.sha256(bytes(32) + joined).digest()


TEMPLATES = ["ima-ng", "ima-sig", "ima-ngv2", "ima-sigv2", "ima-modsig", "evm-sig", OWN]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_aggregate_has_the_lists_template(template: str) -> None:
    listed = ImaList.start(BOOT.values("sha256"), template=template).files(4, template)
    assert _replay(listed.ascii(), listed).state.count == 5
    alone = ImaList.start(BOOT.values("sha256"), template=template)
    assert _replay(alone.ascii(), alone).entries == ()


def test_the_oldest_template() -> None:
    first = ImaList.start(BOOT.values("sha1"), algorithm="sha1", loaders=False, template="ima")
    listed = first.measure(Item(b"/sbin/init", DIGEST[:20], "ima", "sha1"))
    for bank in BANKS:
        for data in (listed.ascii(), listed.binary()):
            (entry,) = _replay(data, listed, bank).entries
            assert entry == ImaEntry(b"/sbin/init", "sha1", DIGEST[:20], "ima")


def test_a_caller_must_have_quoted_pcr_10() -> None:
    with pytest.raises(ValueError, match="needs a quoted PCR 10"):
        ima.replay([LIST.ascii()], None, {}, "sha256")

"""Evidence documents: whatever can be written reads back; whatever else is read is refused or canonical."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spire_hw.errors import EncodingError, ErrorKind, Finding
from spire_hw.posture.document import (
    decode_entries,
    decode_evidence,
    encode_entries,
    encode_evidence,
)
from spire_hw.posture.evidence import (
    AppendedSignature,
    BootFacts,
    BootImage,
    Counters,
    EkFacts,
    Evidence,
    ImaEntry,
    ImaFacts,
    ImaState,
    Occasion,
    Scramble,
    Tier,
)
from spire_hw.posture.policy import BANK_BYTES

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
maybe = st.none() | texts
octets = st.binary(max_size=40)
u32 = st.integers(0, 2**31 - 1)
hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
eks = st.builds(EkFacts, hexes, st.lists(texts).map(tuple), st.none() | hexes, maybe, maybe, maybe)
counters = st.builds(
    Counters, st.integers(0, 2**64 - 1), u32, u32, st.booleans(), st.integers(0, 2**64 - 1)
)
boots = st.builds(
    BootFacts,
    log_sha256=hexes,
    bank=st.sampled_from(["sha1", "sha256"]),
    explained=st.lists(st.integers(0, 23)).map(tuple),
    secure_boot=st.none() | st.booleans(),
    debug_mode=st.booleans(),
    dma_protection=st.booleans(),
    firmware_error=st.booleans(),
    variables=st.dictionaries(texts, hexes, max_size=4),
    db=st.lists(hexes, max_size=4).map(tuple),
    dbx=st.frozensets(hexes, max_size=4),
    sbat=texts,
    authorities=st.lists(hexes, max_size=3).map(tuple),
    images=st.lists(st.builds(BootImage, st.integers(0, 23), octets), max_size=3).map(tuple),
    commands=st.lists(texts, max_size=3).map(tuple),
    files=st.lists(octets, max_size=3).map(tuple),
    uki=st.none() | hexes,
    mok=st.none() | st.booleans(),
    mok_digests=st.lists(octets, max_size=3).map(tuple),
    crtm_version=texts,
    workarounds=st.lists(texts, max_size=3).map(tuple),
)
entries = st.builds(
    ImaEntry,
    st.binary(max_size=30) | texts.map(str.encode),
    st.sampled_from(["sha1", "sha256", "sha3-256", "verity:sha512"]),
    octets,
    st.sampled_from(["ima", "ima-ng", "ima-sigv2", "ima-modsig", "ima-buf"]),
    octets,
    st.none() | st.builds(AppendedSignature, st.sampled_from(["sha1", "sha256"]), octets, octets),
)
imas = st.builds(
    ImaFacts,
    u32,
    st.builds(ImaState, u32, octets, octets),
    st.lists(entries, max_size=5).map(tuple),
    u32,
    st.booleans(),
)
reasons = st.builds(
    Finding,
    st.from_regex("[a-z][a-z_]{0,20}", fullmatch=True),
    texts.filter(str.isprintable),
    st.sampled_from(ErrorKind),
)
evidences = st.builds(
    Evidence,
    made_at=st.datetimes(timezones=st.just(UTC), min_value=datetime(1970, 1, 1)),  # noqa: DTZ001
    occasion=st.sampled_from(Occasion),
    tier=st.sampled_from(Tier),
    ek=eks,
    ak_public=octets,
    ak_hierarchy=st.sampled_from(["endorsement", "owner"]),
    ak_qualified_name=octets,
    ak_scramble=st.none() | st.builds(Scramble, u32, u32, st.integers(0, 2**64 - 1)),
    key_in_tpm=st.booleans(),
    counters=st.none() | counters,
    pcrs=st.dictionaries(
        st.tuples(st.sampled_from(sorted(BANK_BYTES)), st.integers(0, 23)), octets, max_size=6
    ).map(lambda pcrs: {w: v.ljust(64)[: BANK_BYTES[w[0]]] for w, v in pcrs.items()}),
    boot=st.none() | boots,
    ima=st.none() | imas,
    boot_id=maybe,
    findings=st.lists(reasons).map(tuple),
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(evidences)
def test_what_is_written_reads_back_equal(evidence: Evidence) -> None:
    data = encode_evidence(evidence)
    assert data.isascii()
    again = decode_evidence(data)
    assert again == evidence
    assert encode_evidence(again) == data


@given(st.binary(max_size=12) | st.text(max_size=12).map(str.encode))
@example(b"/a\\b")
@example(b"\\x5c")
@example(b"\xe4\\\xc3\xa4")
def test_paths_read_back_equal(path: bytes) -> None:
    entry = ImaEntry(path, "sha1", b"", "ima", b"")
    assert decode_entries(encode_entries([entry])) == (entry,)


@given(evidences, st.data())
def test_a_member_taken_out_put_in_or_replaced_is_refused_or_canonical(
    evidence: Evidence, data: st.DataObject
) -> None:
    document = json.loads(encode_evidence(evidence))
    place = document
    while True:
        name = data.draw(st.sampled_from(sorted(place)), label="member")
        if not isinstance(place[name], dict) or not place[name] or data.draw(st.booleans()):
            break
        place = place[name]
    if data.draw(st.booleans(), label="remove"):
        del place[name]
    else:
        place[name] = data.draw(documents, label="value")
    changed = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    try:
        read = decode_evidence(changed)
    except EncodingError:
        return
    assert encode_evidence(read) == changed


@settings(max_examples=300)
@given(st.binary(max_size=200) | documents.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(EncodingError):
        decode_evidence(data)

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw._pb import server_journal_pb2 as pb
from spire_hw.errors import EncodingError
from spire_hw_server.ca.journal import (
    MAX_RECORDS,
    Journal,
    JwtRecord,
    X509Record,
    encode_journal,
    parse_journal,
)
from spire_hw_server.ca.slots import SlotName, Slots, Status

START = datetime(2026, 1, 1, tzinfo=UTC)

times = st.datetimes(datetime(1970, 1, 2), datetime(9999, 1, 1)).map(  # noqa: DTZ001
    lambda t: t.replace(microsecond=0, tzinfo=UTC)
)
x509_records = st.builds(
    X509Record,
    slot=st.sampled_from(SlotName),
    authority_id=st.text(max_size=40),
    issued_at=times,
    not_after=times,
    status=st.sampled_from(Status),
    certificate=st.binary(max_size=50),
    upstream_chain=st.lists(st.binary(max_size=20), max_size=3).map(tuple),
    upstream_authority_id=st.text(max_size=40),
)
jwt_records = st.builds(
    JwtRecord,
    slot=st.sampled_from(SlotName),
    authority_id=st.text(min_size=1, max_size=40),
    issued_at=times,
    not_after=times,
    status=st.sampled_from(Status),
    public_key=st.binary(max_size=50),
)


@given(
    st.builds(
        Journal,
        x509=st.lists(x509_records, max_size=5).map(tuple),
        jwt=st.lists(jwt_records, max_size=5).map(tuple),
    )
)
def test_a_journal_survives_its_bytes(journal: Journal) -> None:
    assert parse_journal(encode_journal(journal)) == journal


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        parse_journal(data)
    except EncodingError:
        return


def test_field_numbers_are_upstreams() -> None:
    entry = pb.X509CAEntry.DESCRIPTOR.fields_by_name
    assert {n: f.number for n, f in entry.items()} == {
        "slot_id": 1,
        "issued_at": 2,
        "certificate": 3,
        "upstream_chain": 4,
        "status": 5,
        "authority_id": 6,
        "not_after": 7,
        "upstream_authority_id": 8,
        "offline": 1000,  # ours, passed over by upstream
    }
    key = pb.JWTKeyEntry.DESCRIPTOR.fields_by_name
    assert {n: f.number for n, f in key.items()} == {
        "slot_id": 1,
        "issued_at": 2,
        "not_after": 3,
        "kid": 4,
        "public_key": 5,
        "status": 6,
        "authority_id": 7,
    }
    whole = pb.Entries.DESCRIPTOR.fields_by_name
    assert {n: f.number for n, f in whole.items()} == {"x509CAs": 1, "jwtKeys": 2, "witKeys": 3}


def test_an_unknown_status_reads_as_old_and_an_unknown_slot_is_refused() -> None:
    old = pb.Entries(jwtKeys=[pb.JWTKeyEntry(slot_id="A", kid="k")])
    assert parse_journal(old.SerializeToString()).jwt[0].status is Status.OLD
    with pytest.raises(EncodingError, match="slot"):
        parse_journal(pb.Entries(jwtKeys=[pb.JWTKeyEntry(slot_id="C")]).SerializeToString())
    huge = pb.Entries(jwtKeys=[pb.JWTKeyEntry(slot_id="A", not_after=1 << 62)])
    with pytest.raises(EncodingError, match="range"):
        parse_journal(huge.SerializeToString())


def _record(number: int, status: Status) -> JwtRecord:
    issued_at = START + timedelta(hours=number)
    slot = SlotName.A if number % 2 else SlotName.B
    return JwtRecord(slot, f"k{number}", issued_at, issued_at + timedelta(days=1), status, b"k")


def test_what_left_the_slots_is_old_and_the_list_is_bounded() -> None:
    journal = Journal()
    for number in range(1, 30):
        jwt = Slots(_record(number, Status.ACTIVE), _record(number + 1, Status.PREPARED))
        journal = journal.updated(Slots(), jwt)
    assert len(journal.jwt) == MAX_RECORDS
    assert [r.status for r in journal.jwt[-2:]] == [Status.ACTIVE, Status.PREPARED]
    assert {r.status for r in journal.jwt[:-2]} == {Status.OLD}
    assert journal.latest_end() == journal.jwt[-1].not_after
    assert Journal().latest_end() is None


def test_records_of_a_kind_that_is_off_stay_as_they_are() -> None:
    journal = Journal(jwt=(_record(1, Status.ACTIVE),))
    assert journal.updated(Slots(), None).jwt == journal.jwt

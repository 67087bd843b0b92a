from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw._pb import server_agent_pb2, types_pb2
from spire_hw.errors import InvalidInputError
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId
from spire_hw_server.api.agent import encode_agent, parse_filter, parse_go_time
from spire_hw_server.datastore.records import Match, Node

NODE = Node(
    SpiffeId("spiffe://example.org/spire/agent/x/1"),
    "x",
    "17",
    datetime(2026, 1, 1, tzinfo=UTC),
    can_reattest=True,
    agent_version="1.0",
    selectors=(Selector("x", "y"),),
)


def test_all_fields_of_an_agent_are_told() -> None:
    message = encode_agent(NODE)
    assert message.id.path == "/spire/agent/x/1"
    assert message.attestation_type == "x"
    assert message.x509svid_serial_number == "17"
    assert message.x509svid_expires_at == 1767225600
    assert [(s.type, s.value) for s in message.selectors] == [("x", "y")]
    assert not message.banned
    assert message.can_reattest
    assert message.agent_version == "1.0"


@given(st.sets(st.sampled_from([f.name for f in types_pb2.AgentMask.DESCRIPTOR.fields])))
def test_a_mask_hides_all_but_the_id(bits: set[str]) -> None:
    cut = encode_agent(NODE, types_pb2.AgentMask(**dict.fromkeys(bits, True)))
    assert {f.name for f, _ in cut.ListFields()} == {"id"} | (bits - {"banned"})


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-02 03:04:05 +0000 +00", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02 03:04:05 +0130 +01", datetime(2026, 1, 2, 1, 34, 5, tzinfo=UTC)),
        ("2026-01-02 03:04:05 -0800 -08", datetime(2026, 1, 2, 11, 4, 5, tzinfo=UTC)),
        ("2026-13-02 03:04:05 +0000 +00", None),
        ("2026-01-02T03:04:05Z", None),
        ("2026-01-02 03:04:05 +0000 UTC", None),
        ("0001-01-01 00:00:00 +2359 +23", None),
        ("", None),
    ],
)
def test_times_in_gos_layout(text: str, moment: datetime | None) -> None:
    assert parse_go_time(text) == moment


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_none(text: str) -> None:
    parse_go_time(text)


def test_filters_are_read() -> None:
    message = server_agent_pb2.ListAgentsRequest.Filter(
        by_attestation_type="x",
        by_selector_match={"selectors": [{"type": "a", "value": "b"}], "match": "MATCH_ANY"},
        by_banned={"value": False},
        by_can_reattest={"value": True},
        by_expires_before="2026-01-02 03:04:05 +0000 +00",
    )
    where = parse_filter(message)
    assert where.attestation_type == "x"
    assert where.selectors == (Match.ANY, (Selector("a", "b"),))
    assert where.banned is False
    assert where.can_reattest is True
    assert where.expires_before is not None
    with pytest.raises(InvalidInputError):
        parse_filter(server_agent_pb2.ListAgentsRequest.Filter(by_selector_match={}))

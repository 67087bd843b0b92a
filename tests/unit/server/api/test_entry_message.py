from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw._pb import server_entry_pb2, types_pb2
from spire_hw.errors import InvalidInputError
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_server.api.entry_message import (
    MASKED,
    encode_entry,
    parse_entry,
    parse_filter,
    parse_update,
)
from spire_hw_server.datastore.records import Entry, Match

if TYPE_CHECKING:
    from collections.abc import Callable

TD = TrustDomain("example.org")


def message(**fields: Any) -> types_pb2.Entry:
    whole: dict[str, Any] = {
        "id": "e1",
        "spiffe_id": types_pb2.SPIFFEID(trust_domain="example.org", path="/web"),
        "parent_id": types_pb2.SPIFFEID(trust_domain="example.org", path="/spire/agent/x/1"),
        "selectors": [
            types_pb2.Selector(type="unix", value="uid:2"),
            types_pb2.Selector(type="unix", value="uid:1"),
            types_pb2.Selector(type="unix", value="uid:2"),
        ],
        "x509_svid_ttl": 60,
        "jwt_svid_ttl": 30,
        "federates_with": ["other.test"],
        "admin": True,
        "downstream": True,
        "expires_at": 1_900_000_000,
        "dns_names": ["web.test", "*.web.test"],
        "hint": "external",
        "additional_attributes": types_pb2.Entry.AdditionalAttributes(jwt_svid_include_jti=True),
    }
    return types_pb2.Entry(**(whole | fields))


def test_all_fields_arrive() -> None:
    entry = parse_entry(message(), TD)
    assert entry.entry_id == "e1"
    assert str(entry.spiffe_id) == "spiffe://example.org/web"
    assert str(entry.parent_id) == "spiffe://example.org/spire/agent/x/1"
    assert [str(s) for s in entry.selectors] == ["unix:uid:1", "unix:uid:2"]
    assert (entry.x509_svid_ttl_s, entry.jwt_svid_ttl_s) == (60, 30)
    assert entry.federates_with == (TrustDomain("other.test"),)
    assert entry.admin
    assert entry.downstream
    assert entry.expires_at == datetime.fromtimestamp(1_900_000_000, UTC)
    assert entry.dns_names == ("web.test", "*.web.test")
    assert entry.hint == "external"
    assert entry.jwt_svid_include_jti


def test_an_entry_comes_back_as_it_went() -> None:
    entry = parse_entry(message(), TD)
    assert parse_entry(encode_entry(entry), TD) == entry


BAD: list[tuple[str, Callable[[types_pb2.Entry], object]]] = [
    ("spiffe_id", lambda m: m.ClearField("spiffe_id")),
    ("parent_id", lambda m: m.ClearField("parent_id")),
    ("foreign id", lambda m: setattr(m.spiffe_id, "trust_domain", "other.test")),
    ("reserved id", lambda m: setattr(m.spiffe_id, "path", "/spire/agent/x")),
    ("id without path", lambda m: setattr(m.spiffe_id, "path", "")),
    ("relative path", lambda m: setattr(m.spiffe_id, "path", "web")),
    ("dots", lambda m: setattr(m.spiffe_id, "path", "/a/../b")),
    ("upper case", lambda m: setattr(m.spiffe_id, "trust_domain", "Example.org")),
    ("foreign parent", lambda m: setattr(m.parent_id, "trust_domain", "other.test")),
    ("parent without path", lambda m: setattr(m.parent_id, "path", "")),
    ("no selectors", lambda m: m.ClearField("selectors")),
    ("bad selector", lambda m: m.selectors.add(type="a:b", value="c")),
    ("empty value", lambda m: m.selectors.add(type="a", value="")),
    ("negative ttl", lambda m: setattr(m, "x509_svid_ttl", -1)),
    ("negative jwt ttl", lambda m: setattr(m, "jwt_svid_ttl", -1)),
    ("trust domain", lambda m: m.federates_with.append("Not Good")),
    ("dns name", lambda m: m.dns_names.append("under_score..")),
    ("wildcard", lambda m: m.dns_names.append("a.*.test")),
    ("hint", lambda m: setattr(m, "hint", "x" * 1025)),
    ("hint bytes", lambda m: setattr(m, "hint", "é" * 513)),
    ("expiry", lambda m: setattr(m, "expires_at", -1)),
    ("far expiry", lambda m: setattr(m, "expires_at", 1 << 60)),
    ("entry id", lambda m: setattr(m, "id", "a b")),
    ("long id", lambda m: setattr(m, "id", "a" * 256)),
]


@pytest.mark.parametrize("spoil", [b[1] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_field_is_refused(spoil: Callable[[types_pb2.Entry], object]) -> None:
    bad = message()
    spoil(bad)
    with pytest.raises(InvalidInputError):
        parse_entry(bad, TD)


def test_stored_svids_have_selectors_of_one_type_and_are_prefetched() -> None:
    parse_entry(message(store_svid=True), TD)
    mixed = message(store_svid=True)
    mixed.selectors.add(type="k8s", value="ns:x")
    with pytest.raises(InvalidInputError, match="one type"):
        parse_entry(mixed, TD)
    attributes = types_pb2.Entry.AdditionalAttributes(disable_x509_svid_prefetch=True)
    with pytest.raises(InvalidInputError, match="prefetch"):
        parse_entry(message(store_svid=True, additional_attributes=attributes), TD)


def stored() -> Entry:
    return parse_entry(message(), TD)


def test_an_update_without_mask_replaces_everything() -> None:
    new = message(hint="new", admin=False)
    new.ClearField("dns_names")
    entry, named = parse_update(new, None, TD, stored())
    assert entry.hint == "new"
    assert not entry.admin
    assert entry.dns_names == ()
    assert named == {name for names in MASKED.values() for name in names}


@pytest.mark.parametrize("bit", sorted(MASKED))
def test_a_mask_takes_only_what_it_names(bit: str) -> None:
    mask = types_pb2.EntryMask(**{bit: True})
    source = encode_entry(stored())
    nothing = types_pb2.Entry(id="e1")
    if bit in {"spiffe_id", "parent_id", "selectors"}:
        with pytest.raises(InvalidInputError):
            parse_update(nothing, mask, TD, stored())
    else:
        _, named = parse_update(nothing, mask, TD, stored())
        assert named == set(MASKED[bit])
    same, named = parse_update(source, mask, TD, stored())
    assert same == stored()
    assert named == set(MASKED[bit])


def test_what_a_mask_leaves_out_is_not_even_looked_at() -> None:
    bad = message(hint="x" * 5000, x509_svid_ttl=5)
    entry, _ = parse_update(bad, types_pb2.EntryMask(x509_svid_ttl=True), TD, stored())
    assert entry.x509_svid_ttl_s == 5
    assert entry.hint == "external"


@given(st.sets(st.sampled_from([f.name for f in types_pb2.EntryMask.DESCRIPTOR.fields])))
def test_output_masks_hide_and_never_hide_the_id(bits: set[str]) -> None:
    mask = types_pb2.EntryMask(**dict.fromkeys(bits, True))
    whole, cut = encode_entry(stored()), encode_entry(stored(), mask)
    assert cut.id == "e1"
    shown = {f.name for f, _ in cut.ListFields()} - {"id"}
    assert shown <= bits
    for name in shown:
        assert getattr(cut, name) == getattr(whole, name)


def test_filters_are_read() -> None:
    where = parse_filter(
        server_entry_pb2.ListEntriesRequest.Filter(
            by_spiffe_id=types_pb2.SPIFFEID(trust_domain="example.org", path="/web"),
            by_parent_id=types_pb2.SPIFFEID(trust_domain="example.org", path="/p"),
            by_selectors=types_pb2.SelectorMatch(
                selectors=[types_pb2.Selector(type="a", value="b")],
                match=types_pb2.SelectorMatch.MATCH_SUPERSET,
            ),
            by_federates_with=types_pb2.FederatesWithMatch(
                trust_domains=["o.test"], match=types_pb2.FederatesWithMatch.MATCH_ANY
            ),
            by_hint={"value": ""},
            by_downstream={"value": True},
        ),
        TD,
    )
    assert where.spiffe_id == SpiffeId("spiffe://example.org/web")
    assert where.parent_id == SpiffeId("spiffe://example.org/p")
    assert where.selectors is not None
    assert where.selectors[0] is Match.SUPERSET
    assert where.federates_with == (Match.ANY, (TrustDomain("o.test"),))
    assert where.hint == ""
    assert where.downstream is True


def test_downstream_false_is_no_filter() -> None:
    message = server_entry_pb2.ListEntriesRequest.Filter(by_downstream={"value": False})
    assert parse_filter(message, TD).downstream is None


@pytest.mark.parametrize(
    "bad",
    [
        {"by_spiffe_id": {"trust_domain": "other.test", "path": "/x"}},
        {"by_spiffe_id": {"trust_domain": "example.org", "path": "x"}},
        {"by_parent_id": {"trust_domain": "", "path": "/x"}},
        {"by_selectors": {}},
        {"by_selectors": {"selectors": [{"type": "", "value": "x"}]}},
        {"by_selectors": {"selectors": [{"type": "a", "value": "x"}], "match": 9}},
        {"by_federates_with": {}},
        {"by_federates_with": {"trust_domains": ["NO"]}},
    ],
)
def test_bad_filters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        parse_filter(server_entry_pb2.ListEntriesRequest.Filter(**bad), TD)

from __future__ import annotations

import copy
import pickle

import pytest

from spire_hw.errors import ErrorKind, SpiffeIdError
from spire_hw.spiffeid import (
    MAX_ID_BYTES,
    SpiffeId,
    TrustDomain,
    agent_id,
    check_agent_id,
    check_member,
    check_segment,
    check_workload_id,
    server_id,
)

DOMAIN = TrustDomain("example.org")


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("spiffe://example.org", "example.org", ""),
        ("spiffe://example.org/a/b", "example.org", "/a/b"),
        ("spiffe://a/...", "a", "/..."),
        ("spiffe://a/.x/x../..x", "a", "/.x/x../..x"),
        ("spiffe://10.0.0.1/A-Z_0.9", "10.0.0.1", "/A-Z_0.9"),
        ("spiffe://-._/x", "-._", "/x"),
        ("spiffe://" + "a" * 255, "a" * 255, ""),
    ],
)
def test_legal_ids_are_taken_as_they_are(text: str, name: str, path: str) -> None:
    parsed = SpiffeId.parse(text)
    assert (str(parsed), parsed.trust_domain.name, parsed.path) == (text, name, path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "spiffe:///path",
        "spiffe:/a/b",
        "SPIFFE://a/b",
        "https://a/b",
        " spiffe://a/b",
        "spiffe://a/b ",
        "spiffe://a/b\n",
        "spiffe://a\n",
        "spiffe://a\n/b",
        "spiffe://A/b",
        "spiffe://a/",
        "spiffe://a/b/",
        "spiffe://a//b",
        "spiffe://a/.",
        "spiffe://a/..",
        "spiffe://a/./b",
        "spiffe://a/../b",
        "spiffe://a/b/..",
        "spiffe://a:80/b",
        "spiffe://u@a/b",
        "spiffe://a/b?q",
        "spiffe://a/b#f",
        "spiffe://a/%62",
        "spiffe://a/b\0",
        "spiffe://a/é",
        "spiffe://\uff41/b",
        "spiffe://a/\uff11",
        "spiffe://a/\ud800",
        "spiffe://" + "a" * 256,
        "spiffe://a/" + "b" * (MAX_ID_BYTES - 10),
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(SpiffeIdError) as caught:
        SpiffeId.parse(text)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert caught.value.message.isascii()
    assert "\n" not in caught.value.message


def test_the_longest_id_has_2048_bytes() -> None:
    text = "spiffe://a/" + "b" * (MAX_ID_BYTES - 11)
    assert len(str(SpiffeId.parse(text))) == MAX_ID_BYTES


@pytest.mark.parametrize(
    "name", ["", "A", "spiffe://a", "a/b", "a b", "a\n", "é", "a" * 256, "a:1", "%61"]
)
def test_trust_domain_names_are_strict(name: str) -> None:
    with pytest.raises(SpiffeIdError):
        TrustDomain.parse(name)
    with pytest.raises(SpiffeIdError):
        TrustDomain(name)


def test_members_are_built_from_checked_segments() -> None:
    assert str(DOMAIN.member("ns", "x", "sa", "y")) == "spiffe://example.org/ns/x/sa/y"
    assert str(DOMAIN.id) == "spiffe://example.org"
    for segment in ["", ".", "..", "a/b", "a b", "é", "a\n"]:
        with pytest.raises(SpiffeIdError):
            DOMAIN.member("ok", segment)
        with pytest.raises(SpiffeIdError):
            check_segment(segment)
    with pytest.raises(SpiffeIdError):
        DOMAIN.member()


def test_ids_are_values() -> None:
    one, two = SpiffeId.parse("spiffe://a/b"), SpiffeId.parse("spiffe://a/b")
    assert one == two
    assert hash(one) == hash(two)
    assert one < SpiffeId.parse("spiffe://a/c")
    assert one != SpiffeId.parse("spiffe://a/B")
    assert copy.deepcopy(one) == one
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301 - our own bytes
    with pytest.raises(AttributeError):
        one.path = "/other"  # type: ignore[misc]


def test_server_and_agent_ids() -> None:
    assert str(server_id(DOMAIN)) == "spiffe://example.org/spire/server"
    agent = agent_id(DOMAIN, "tpm", "abc")
    assert str(agent) == "spiffe://example.org/spire/agent/tpm/abc"
    assert agent.is_agent()
    assert not server_id(DOMAIN).is_agent()
    with pytest.raises(SpiffeIdError):
        agent_id(DOMAIN, "tpm")


@pytest.mark.parametrize(
    ("path", "reserved"),
    [
        ("/spire", True),
        ("/spire/server", True),
        ("/spire/agent/x/y", True),
        ("/spirex", False),
        ("/Spire", False),
        ("/a/spire", False),
        ("/spire-exchange/a", False),
        ("", False),
    ],
)
def test_what_is_reserved(path: str, reserved: bool) -> None:
    spiffe_id = SpiffeId.parse("spiffe://example.org" + path)
    assert spiffe_id.is_reserved() is reserved
    if reserved or not path:
        with pytest.raises(SpiffeIdError):
            check_workload_id(spiffe_id, DOMAIN)
    else:
        check_workload_id(spiffe_id, DOMAIN)


def test_membership_is_exact() -> None:
    other = TrustDomain("example.com")
    check_member(DOMAIN.id, DOMAIN)
    with pytest.raises(SpiffeIdError):
        check_member(DOMAIN.id, DOMAIN, path_required=True)
    with pytest.raises(SpiffeIdError):
        check_member(other.member("a"), DOMAIN)
    with pytest.raises(SpiffeIdError):
        check_workload_id(other.member("a"), DOMAIN)


def test_agent_ids_lie_below_the_agent_namespace() -> None:
    check_agent_id(agent_id(DOMAIN, "tpm", "x"), DOMAIN)
    for path in ["/spire/agent", "/spire/agents/x", "/spire/server", "/a", ""]:
        with pytest.raises(SpiffeIdError):
            check_agent_id(SpiffeId.parse("spiffe://example.org" + path), DOMAIN)

"""What a policy decides, one check at a time."""

from __future__ import annotations

import ipaddress
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import ErrorKind
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.spiffeid import TrustDomain
from spire_hw_signer.policy import (
    ByKey,
    Client,
    Denial,
    KeyRule,
    Owner,
    Pattern,
    Policy,
    Purpose,
    Rate,
    Reason,
    Replace,
    X509Rule,
    check_form,
    check_options,
    check_purpose,
    check_replace,
    check_type,
    is_key_id,
    soonest,
)

SHA256 = SignOptions(HashAlgorithm.SHA256)
PSS = SignOptions(HashAlgorithm.SHA256, pss=True)
ID = bytes(16)
HOUR = timedelta(hours=1)


def client(identity: str = "spiffe://infra.example/s1", **more: object) -> Client:
    values: dict[str, object] = {
        "identity": identity,
        "owner": Owner(TrustDomain("example.org"), "s1"),
        "keys": (Pattern("x509-CA-A"), Pattern("JWT-*")),
        "types": ByKey(((Pattern("x509-*"), frozenset({KeyType.EC_P384})),)),
        "hashes": ByKey(((Pattern("*"), frozenset({HashAlgorithm.SHA256})),)),
        "sign_rate": ByKey(((Pattern("*"), Rate(10, 10)),)),
        "x509": X509Rule((Pattern("x509-*"),), HOUR, HOUR),
        **more,
    }
    return Client(**values)  # type: ignore[arg-type]


def policy(*clients: Client, revoked: frozenset[str] = frozenset()) -> Policy:
    return Policy({c.identity: c for c in clients}, revoked, HOUR, "00")


def reason(denial: Denial | None) -> Reason | None:
    return None if denial is None else denial.reason


def test_a_client_is_known_by_what_it_proved() -> None:
    one, other = client("sha256:" + "ab" * 32), client()
    known = policy(one, other)
    assert known.admit([one.identity, other.identity], None) == (one, None)
    assert known.admit([other.identity], None) == (other, None)
    found, denial = known.admit(["unix:0"], None)
    assert (found, reason(denial)) == (None, Reason.UNKNOWN_CLIENT)
    assert known.admit([], None)[0] is None


def test_a_revoked_identity_is_out_whatever_else_it_has() -> None:
    one = client()
    known = policy(one, revoked=frozenset({"sha256:" + "cd" * 32}))
    found, denial = known.admit(["sha256:" + "cd" * 32, one.identity], None)
    assert (found, reason(denial)) == (None, Reason.REVOKED)


@pytest.mark.parametrize(
    ("address", "fits"),
    [("10.1.2.3", True), ("10.2.2.3", False), ("fd00::1", True), ("fd01::1", False)],
)
def test_addresses_are_held_against_networks(address: str, fits: bool) -> None:
    networks = (ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00::/64"))
    one = client(addresses=networks)
    found, denial = policy(one).admit([one.identity], ipaddress.ip_network(address))
    assert (found is one) == fits
    assert reason(denial) == (None if fits else Reason.ADDRESS)


def test_on_a_unix_socket_there_is_no_address_to_hold_against_networks() -> None:
    one = client(addresses=(ipaddress.ip_network("10.1.0.0/16"),))
    assert policy(one).admit([one.identity], None)[0] is one


@given(st.text())
def test_key_ids_are_a_closed_alphabet(text: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+-")
    assert is_key_id(text) == (1 <= len(text) <= 255 and set(text) <= allowed)


def test_key_ids_have_a_length() -> None:
    assert is_key_id("a" * 255)
    assert not is_key_id("a" * 256)


@given(st.binary(max_size=40))
def test_request_ids_have_sixteen_bytes(request_id: bytes) -> None:
    denial = check_form(request_id, "x509-CA-A")
    assert reason(denial) == (None if len(request_id) == 16 else Reason.MALFORMED)


@given(st.text(alphabet="ab*.+", min_size=1, max_size=6), st.text(alphabet="ab.+", max_size=8))
def test_a_star_stands_for_any_characters_and_nothing_else_does(pattern: str, text: str) -> None:
    def fits(parts: str, rest: str) -> bool:
        if not parts:
            return not rest
        if parts[0] == "*":
            return any(fits(parts[1:], rest[n:]) for n in range(len(rest) + 1))
        return rest[:1] == parts[0] and fits(parts[1:], rest[1:])

    assert Pattern(pattern).fits(text) == fits(pattern, text)


def test_the_rule_of_a_key_id_outside_the_list_is_none() -> None:
    assert client().rule("x509-CA-B") is None
    assert client().rule("x509-CA-a") is None
    assert client().rule("x509-CA-A ") is None


def test_what_no_pattern_names_is_allowed_nothing() -> None:
    rule = client().rule("JWT-Signer-A")
    assert rule is not None
    assert reason(check_type(rule, KeyType.EC_P256)) is Reason.KEY_TYPE


def test_the_first_pattern_that_fits_counts() -> None:
    values = ByKey(((Pattern("x*"), 1), (Pattern("x1"), 2)))
    assert (values.find("x1"), values.find("y")) == (1, None)


def test_many_key_ids_of_one_pattern_are_not_all_kept() -> None:
    one = client(keys=(Pattern("*"),))
    assert all(one.rule(f"key-{n}") is not None for n in range(1000))
    assert len(one._rules) <= 256


RULE = KeyRule("*", frozenset({KeyType.RSA_2048}), frozenset({HashAlgorithm.SHA256}), None)


@pytest.mark.parametrize(
    ("options", "key_type", "size", "expected"),
    [
        (SHA256, KeyType.RSA_2048, 32, None),
        (SignOptions(HashAlgorithm.SHA384), KeyType.RSA_2048, 48, Reason.HASH),
        (PSS, KeyType.RSA_2048, 32, Reason.PADDING),
        (PSS, KeyType.EC_P256, 32, Reason.MALFORMED),
        (SHA256, KeyType.RSA_2048, 31, Reason.DIGEST),
        (SHA256, KeyType.RSA_2048, 0, Reason.DIGEST),
    ],
)
def test_options_are_held_against_the_rule(
    options: SignOptions, key_type: KeyType, size: int, expected: Reason | None
) -> None:
    assert reason(check_options(client(), RULE, key_type, options, size)) is expected


def test_pss_can_be_allowed() -> None:
    assert check_options(client(pss=True), RULE, KeyType.RSA_2048, PSS, 32) is None


@pytest.mark.parametrize(
    ("key_id", "purpose", "expected"),
    [
        ("x509-CA-A", Purpose.X509, None),
        ("x509-CA-A", Purpose.CSR, None),
        ("x509-CA-A", Purpose.JWT, Reason.PURPOSE),
        ("x509-CA-A", Purpose.RAW, Reason.RAW),
        ("JWT-A", Purpose.X509, Reason.PURPOSE),
        ("JWT-A", Purpose.JWT, Reason.PURPOSE),
    ],
)
def test_keys_have_purposes(key_id: str, purpose: Purpose, expected: Reason | None) -> None:
    assert reason(check_purpose(client(), key_id, purpose)) is expected


def test_requests_can_be_denied_where_certificates_are_signed() -> None:
    one = client(x509=X509Rule((Pattern("*"),), HOUR, HOUR, csr=False))
    assert check_purpose(one, "k", Purpose.X509) is None
    assert reason(check_purpose(one, "k", Purpose.CSR)) is Reason.PURPOSE


@pytest.mark.parametrize(
    ("exists", "idle_s", "expected"),
    [
        (False, None, None),
        (True, None, None),
        (True, 0.0, Reason.REPLACE_ACTIVE),
        (True, 599.0, Reason.REPLACE_ACTIVE),
        (True, 600.0, None),
    ],
)
def test_a_key_that_signed_a_short_while_ago_is_not_replaced(
    exists: bool, idle_s: float | None, expected: Reason | None
) -> None:
    assert reason(check_replace(client(), exists=exists, idle_s=idle_s)) is expected


def test_of_several_reasons_the_first_is_told_with_the_time_when_none_is_left() -> None:
    interval = Denial(Reason.GENERATE_INTERVAL, "made", 50.0)
    active = Denial(Reason.REPLACE_ACTIVE, "signed", 500.0)
    never = Denial(Reason.REPLACE_NEVER, "never")
    assert soonest((None, interval, active)) == Denial(Reason.GENERATE_INTERVAL, "made", 500.0)
    assert soonest((active, interval)) == active
    # Waiting for what never comes is nothing to tell somebody to do.
    assert soonest((interval, never)) == Denial(Reason.GENERATE_INTERVAL, "made")
    assert soonest((None, None)) is None


def test_who_may_not_replace_a_key_is_told_why_and_when_it_will_work() -> None:
    denial = check_replace(client(), exists=True, idle_s=150.0)
    assert denial is not None
    assert "signed 150 s ago" in denial.text
    assert "600 s" in denial.text
    assert denial.retry_after_s == 450.0


def test_replacement_can_be_forbidden() -> None:
    never = client(replace=Replace.NEVER)
    assert reason(check_replace(never, exists=True, idle_s=None)) is Reason.REPLACE_NEVER
    assert check_replace(never, exists=False, idle_s=None) is None


def test_every_reason_has_a_word_of_its_own_and_classes_three_four_six_seven_alarm() -> None:
    words = [reason.word for reason in Reason]
    assert len(set(words)) == len(words)
    quiet = {Reason.NO_KEY, Reason.DIGEST}
    for one in Reason:
        if one.step in {3, 4, 6, 7} and one not in quiet:
            assert one.alarms, one
        if one.step == 5:
            assert one.kind is ErrorKind.RESOURCE_EXHAUSTED
            assert not one.alarms

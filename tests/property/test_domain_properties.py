"""Round trips, and parsers that answer any input with a value or an error of ours."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from spire_hw.bundle.bundle import Bundle, JwtAuthority
from spire_hw.bundle.document import encode_document, parse_document, parse_jwks, parse_pem
from spire_hw.errors import SpireHwError
from spire_hw.jose.jwk import jwk_of, parse_jwk
from spire_hw.jose.jws import parse_compact
from spire_hw.jose.text import (
    decode_base64url,
    encode_base64url,
    encode_json,
    parse_json_object,
)
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key, spki_der
from spire_hw.rotation import draw_jitter, rotation_due_at
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.svid.jwtsvid import issue_jwt_svid, verify_jwt_svid
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.x509 import der
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.certificate import load_certificate, load_chain
from spire_hw.x509.csr import build_csr, parse_csr
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid
from spire_hw.x509.name import Subject, check_name, with_organizational_unit, with_serial_number

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
DOMAIN = TrustDomain("example.org")
SIGNER = SoftwareSigner(generate_private_key(KeyType.EC_P256))
AUTHORITY = X509Authority(
    asyncio.run(
        issue_ca_certificate(
            None,
            signer=SIGNER,
            trust_domain=DOMAIN,
            not_before=NOW,
            not_after=NOW + timedelta(days=365),
        )
    ),
    SIGNER,
)

names = st.from_regex(r"\A[a-z0-9._-]{1,40}\Z")
segments = st.from_regex(r"\A[A-Za-z0-9._-]{1,20}\Z").filter(lambda s: s not in {".", ".."})
paths = st.lists(segments, min_size=1, max_size=6)
labels = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?\Z")
dns_names = st.lists(
    st.lists(labels, min_size=1, max_size=4).map(".".join), max_size=4, unique=True
).map(tuple)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=15,
)


@given(names, paths)
def test_ids_built_from_legal_parts_come_back(name: str, path: list[str]) -> None:
    built = TrustDomain.parse(name).member(*path)
    assert SpiffeId.parse(str(built)) == built
    assert built.path == "/" + "/".join(path)
    assert built.trust_domain.name == name


@given(st.text() | st.text(alphabet="spife:/a.Z-_%?#@\n ").map("spiffe://a".__add__))
def test_id_parser_is_total_and_changes_nothing(text: str) -> None:
    try:
        assert str(SpiffeId.parse(text)) == text
    except SpireHwError:
        return
    assert text.isascii()
    assert all(part not in {"", ".", ".."} for part in text.split("/")[3:])


@given(st.text())
def test_selector_parser_is_total(text: str) -> None:
    try:
        selector = Selector.parse(text)
    except SpireHwError:
        return
    assert str(selector) == text
    assert Selector(selector.type, selector.value) == selector


@given(st.binary())
def test_base64url_comes_back(data: bytes) -> None:
    assert decode_base64url(encode_base64url(data), "x") == data


@given(st.text())
def test_base64url_decoder_accepts_only_what_it_would_write(text: str) -> None:
    try:
        data = decode_base64url(text, "x")
    except SpireHwError:
        return
    assert encode_base64url(data) == text


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values, max_size=5))
def test_json_objects_come_back(value: dict[str, Any]) -> None:
    assert parse_json_object(encode_json(value), "x") == value


@given(st.binary() | st.text().map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_readers_of_bytes_are_total(data: bytes) -> None:
    for read in (
        load_certificate,
        load_chain,
        parse_csr,
        check_name,
        der.public_key_bits,
        lambda d: parse_x509_svid([d]),
        lambda d: parse_json_object(d, "x"),
        lambda d: parse_document(DOMAIN, d),
        lambda d: parse_jwks(DOMAIN, d),
        lambda d: parse_pem(DOMAIN, d),
    ):
        try:
            read(data)
        except SpireHwError:
            continue


@given(json_values, json_values, json_values)
def test_readers_of_json_are_total(keys: Any, use: Any, kid: Any) -> None:
    jwk = {"kty": "EC", "crv": use, "use": use, "kid": kid, "x": keys, "y": keys, "x5c": keys}
    for document in (
        {"keys": keys, "spiffe_sequence": use, "spiffe_refresh_hint": kid},
        {"keys": [jwk, jwk | {"use": "x509-svid"}, jwk | {"use": "jwt-svid", "kty": kid}, keys]},
    ):
        try:
            parse_document(DOMAIN, json.dumps(document).encode())
        except SpireHwError:
            continue
    try:
        parse_jwk(jwk)
    except SpireHwError:
        return


@given(
    st.text() | st.lists(st.binary(), max_size=4).map(lambda p: ".".join(map(encode_base64url, p)))
)
def test_token_reader_is_total(token: str) -> None:
    with suppress(SpireHwError):
        parse_compact(token)
    try:
        verify_jwt_svid(token, audience="a", bundles={}, at=NOW)
    except SpireHwError:
        return
    raise AssertionError("a token was accepted without any bundle")


@given(json_values, json_values)
def test_token_with_any_header_and_claims_is_refused(header: Any, claims: Any) -> None:
    parts = [json.dumps(part).encode() for part in (header, claims)]
    token = ".".join(encode_base64url(part) for part in [*parts, b"signature"])
    try:
        verify_jwt_svid(token, audience="a", bundles={}, at=NOW)
    except SpireHwError:
        return
    raise AssertionError("a token was accepted without any bundle")


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), max_size=4),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**31 - 1),
)
def test_bundle_documents_come_back(kids: list[str], sequence: int, hint: int) -> None:
    keys = tuple(JwtAuthority(kid, spki_der(SIGNER.public_key)) for kid in dict.fromkeys(kids))
    bundle = Bundle(DOMAIN, (), keys, refresh_hint_s=hint, sequence=sequence)
    assert parse_document(DOMAIN, encode_document(bundle)) == bundle


@settings(max_examples=30)
@given(st.sampled_from([ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()]), st.integers(1, 2**200))
def test_keys_come_back_from_jwks(curve: ec.EllipticCurve, secret: int) -> None:
    key = ec.derive_private_key(secret, curve).public_key()
    assert spki_der(parse_jwk(jwk_of(key))) == spki_der(key)


@settings(max_examples=50)
@given(paths, dns_names)
def test_requests_come_back(path: list[str], dns: tuple[str, ...]) -> None:
    spiffe_id = DOMAIN.member(*path)
    csr = parse_csr(asyncio.run(build_csr(SIGNER, spiffe_id=spiffe_id, dns_names=dns)))
    assert (csr.uris, csr.dns_names) == ((str(spiffe_id),), dns)
    assert csr.spki == spki_der(SIGNER.public_key)


@settings(max_examples=50)
@given(
    paths,
    dns_names,
    st.integers(1, 2**159 - 1),
    st.integers(0, 3600 * 24 * 300),
    st.integers(1, 3600 * 24 * 300),
)
def test_issued_svids_say_what_was_asked(
    path: list[str], dns: tuple[str, ...], serial: int, offset: int, life: int
) -> None:
    spiffe_id = DOMAIN.member(*path)
    start = NOW + timedelta(seconds=offset)
    data = asyncio.run(
        issue_x509_svid(
            AUTHORITY,
            spki=spki_der(SIGNER.public_key),
            spiffe_id=spiffe_id,
            not_before=start,
            not_after=start + timedelta(seconds=life),
            dns_names=dns,
            serial=serial,
        )
    )
    svid = parse_x509_svid([data])
    sans = svid.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert svid.spiffe_id == spiffe_id
    assert tuple(sans.get_values_for_type(x509.DNSName)) == dns
    assert svid.serial_number == serial
    assert svid.not_before == start
    assert svid.not_after == min(start + timedelta(seconds=life), AUTHORITY.not_after)
    assert verify_x509_svid([data], Bundle(DOMAIN).merged(_own_bundle()), start) == spiffe_id


def _own_bundle() -> Bundle:
    document = encode_document(Bundle(DOMAIN))
    return parse_document(DOMAIN, document).merged(
        parse_pem(DOMAIN, load_certificate(AUTHORITY.certificate).public_bytes(Encoding.PEM))
    )


@settings(max_examples=50)
@given(
    paths,
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4),
)
def test_tokens_come_back(path: list[str], audience: list[str]) -> None:
    spiffe_id = DOMAIN.member(*path)
    token = asyncio.run(
        issue_jwt_svid(
            SIGNER,
            "k",
            spiffe_id=spiffe_id,
            audience=audience,
            issued_at=NOW,
            expires_at=NOW + timedelta(minutes=5),
        )
    )
    bundle = Bundle(DOMAIN, jwt_authorities=(JwtAuthority("k", spki_der(SIGNER.public_key)),))
    for wanted in audience:
        svid = verify_jwt_svid(token, audience=wanted, bundles={DOMAIN: bundle}, at=NOW)
        assert svid.spiffe_id == spiffe_id
        assert svid.audience == tuple(audience)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64))
def test_names_stay_well_formed(text: str) -> None:
    name = Subject(country=("US",), organization=(text,), common_name=text).encode()
    changed = with_serial_number(with_organizational_unit(name, text), "7")
    assert check_name(changed) == changed
    assert with_serial_number(changed, "8") == changed


@given(st.integers(0, 10**6), st.integers(1, 10**8), st.floats(0, 1), st.integers())
def test_rotation_is_due_within_the_validity(
    offset: int, life: int, fraction: float, seed: int
) -> None:
    start = NOW + timedelta(seconds=offset)
    end = start + timedelta(seconds=life)
    jitter = draw_jitter(Random(seed))  # noqa: S311 - not a secret
    assert start <= rotation_due_at(start, end, fraction=fraction, jitter=jitter) <= end

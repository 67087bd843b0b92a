"""What a client's keys may sign: certificates and requests."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from spire_hw.errors import InvalidInputError, SpireHwError, VerificationError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, SoftwareSigner, spki_der
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.csr import build_csr
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid
from spire_hw_signer.policy import Pattern, X509Rule
from spire_hw_signer.purpose import SigningKey, check_certificate, check_request

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
DOMAIN = TrustDomain("example.org")
CA_KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
SHA256 = SignOptions(HashAlgorithm.SHA256)
RULE = X509Rule((Pattern("*"),), max_ca_ttl=168 * HOUR, max_svid_ttl=24 * HOUR)
KEY = SigningKey.of(KeyType.EC_P256, spki_der(CA_KEY.public_key()))
NAME = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "CA")])
LEAF = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SPIRE")])
TLS = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def body_of(certificate: bytes) -> bytes:
    return x509.load_der_x509_certificate(certificate).tbs_certificate_bytes


def check(body: bytes, rule: X509Rule = RULE, options: SignOptions = SHA256) -> None:
    check_certificate(body, options, key=KEY, trust_domain=DOMAIN, rule=rule, now=NOW)


def refused(body: bytes, match: str, rule: X509Rule = RULE) -> None:
    with pytest.raises((VerificationError, InvalidInputError), match=match):
        check(body, rule)


def usage(*, digital: bool = True, cert: bool = False, crl: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital,
        key_cert_sign=cert,
        crl_sign=crl,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def certificate(
    *,
    uris: tuple[str, ...] = ("spiffe://example.org/web",),
    key: Any = OTHER,
    start: datetime = NOW - timedelta(seconds=10),
    end: datetime = NOW + HOUR,
    ca: bool | None = False,
    path_length: int | None = None,
    key_usage: x509.KeyUsage | None = None,
    uses: tuple[Any, ...] | None = TLS,
    issuer_key: Any = CA_KEY,
    authority_id: bool = True,
    names: tuple[x509.GeneralName, ...] = (),
    more: tuple[tuple[x509.ExtensionType, bool], ...] = (),
    subject: x509.Name = LEAF,
    issuer: x509.Name = NAME,
    algorithm: Any = None,
) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, path_length), critical=True)
    builder = builder.add_extension(
        key_usage or usage(digital=not ca, cert=bool(ca), crl=bool(ca)), critical=True
    )
    if uses is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(uses)), critical=False)
    if authority_id:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    san = [*(x509.UniformResourceIdentifier(u) for u in uris), *names]
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName(san), critical=False)
    for extension, critical in more:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(CA_KEY, algorithm or hashes.SHA256()).tbs_certificate_bytes


def self_signed(**more: Any) -> bytes:
    values: dict[str, Any] = {
        "uris": ("spiffe://example.org",),
        "key": CA_KEY,
        "ca": True,
        "uses": None,
        "subject": NAME,
        "end": NOW + 24 * HOUR,
    }
    return certificate(**{**values, **more})


async def authority() -> X509Authority:
    made = await issue_ca_certificate(
        None,
        trust_domain=DOMAIN,
        not_before=NOW - HOUR / 60,
        not_after=NOW + 24 * HOUR,
        signer=SoftwareSigner(CA_KEY),
    )
    assert check_certificate(
        body_of(made), SHA256, key=KEY, trust_domain=DOMAIN, rule=RULE, now=NOW
    )
    return X509Authority(made, SoftwareSigner(CA_KEY))


@pytest.mark.asyncio
async def test_all_that_an_honest_server_issues_is_signed() -> None:
    ca = await authority()
    for path in (("web",), ("spire", "server"), ("spire", "agent", "tpm", "aa")):
        leaf = await issue_x509_svid(
            ca,
            spki=spki_der(OTHER.public_key()),
            spiffe_id=DOMAIN.member(*path),
            not_before=NOW,
            not_after=NOW + HOUR,
            dns_names=("web.example.org",),
        )
        check(body_of(leaf))
    request = await build_csr(SoftwareSigner(CA_KEY), spiffe_id=DOMAIN.id)
    body = x509.load_der_x509_csr(request).tbs_certrequest_bytes
    check_request(body, key=KEY, trust_domain=DOMAIN)


@pytest.mark.asyncio
async def test_a_downstream_authority_has_to_be_allowed() -> None:
    made = await issue_ca_certificate(
        await authority(),
        trust_domain=DOMAIN,
        not_before=NOW,
        not_after=NOW + HOUR,
        spki=spki_der(OTHER.public_key()),
    )
    refused(body_of(made), "for other keys are not signed")
    check(body_of(made), replace(RULE, downstream=True))
    refused(body_of(made), "path length", replace(RULE, downstream=True, max_path_length=0))


def test_a_path_length_can_be_required() -> None:
    rule = replace(RULE, downstream=True, max_path_length=1)
    check(self_signed(key=OTHER, subject=LEAF, path_length=1), rule)
    refused(self_signed(key=OTHER, subject=LEAF, path_length=2), "path length", rule)


def _extension(oid: str, value: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "foreign trust domain": ({"uris": ("spiffe://evil.org/web",)}, "not a member"),
    "the trust domain itself": ({"uris": ("spiffe://example.org",)}, "not a member"),
    "no SPIFFE ID": ({"uris": ("https://example.org/web",)}, "SPIFFE ID"),
    "no name": ({"uris": ()}, "exactly one URI"),
    "two IDs": ({"uris": ("spiffe://example.org/a", "spiffe://example.org/b")}, "exactly one"),
    "fifty years": ({"end": NOW + 50 * 365 * 24 * HOUR}, "ends more than"),
    "a day too long": ({"end": NOW + 49 * HOUR}, "ends more than"),
    "an old start": ({"start": NOW - 2 * HOUR}, "starts too long ago"),
    "cert sign": ({"key_usage": usage(cert=True)}, "not that of an SVID"),
    "crl sign": ({"key_usage": usage(crl=True)}, "not that of an SVID"),
    "CA leaf": ({"ca": True}, "not of trust domain"),
    "wrong issuer key": ({"issuer_key": OTHER}, "not that of the signing key"),
    "no issuer key": ({"authority_id": False}, "identifier is missing"),
    "the CA's own key": ({"key": CA_KEY}, "not that of a CA"),
    "code signing": ({"uses": (ExtendedKeyUsageOID.CODE_SIGNING,)}, "not that of an SVID"),
    "any use": ({"uses": (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)}, "not that of an SVID"),
    "any use, for none is named": ({"uses": None}, "does not say what it is for"),
    "no use": (
        {"uses": None, "more": ((_extension("2.5.29.37", b"0\0"), False),)},
        "does not say what it is for",
    ),
    "mail address": ({"names": (x509.RFC822Name("a@b.c"),)}, "neither a URI nor a DNS"),
    "name constraints": (
        {"more": ((x509.NameConstraints([x509.DNSName("a.b")], None), True),)},
        "extension 2.5.29.30",
    ),
    "own extension": (
        {"more": ((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\0"), False),)},
        "extension 1.2.3",
    ),
    "another hash": ({"algorithm": hashes.SHA384()}, "signature algorithm"),
}


@pytest.mark.parametrize("name", BAD)
def test_leaves_that_are_not_signed(name: str) -> None:
    values, match = BAD[name]
    refused(certificate(**values), match)


def test_workloads_may_have_rsa_keys() -> None:
    check(certificate(key=rsa.generate_private_key(65537, 2048)))


def test_the_cas_own_key_is_known_however_it_is_written() -> None:
    from spire_hw.x509 import der  # noqa: PLC0415 - for this check alone

    numbers = CA_KEY.public_key()
    point = numbers.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    algorithm = der.sequence(der.oid("1.2.840.10045.2.1"), der.oid("1.2.840.10045.3.1.7"))
    hybrid = bytes([point[0] + 4]) + KEY.spki[-64:]
    content = der.Reader(certificate(key=CA_KEY), "body").content(der.SEQUENCE)
    for written in (point, hybrid):
        other = der.sequence(algorithm, der.bit_string(written))
        refused(der.sequence(content.replace(KEY.spki, other)), "one usual form")


def test_the_good_leaf_differs_in_nothing_else() -> None:
    check(certificate())
    check(certificate(ca=None))
    check(certificate(uses=TLS[:1]))


BAD_CA: dict[str, tuple[dict[str, Any], str]] = {
    "foreign trust domain": ({"uris": ("spiffe://evil.org",)}, "not of trust domain"),
    "with a path": ({"uris": ("spiffe://example.org/ca",)}, "not of trust domain"),
    "too long": ({"end": NOW + 170 * HOUR}, "ends more than"),
    "another issuer": ({"issuer": LEAF}, "another issuer"),
    "extended usage": ({"uses": TLS}, "extended key usage"),
    "DNS name": ({"names": (x509.DNSName("a.b"),)}, "DNS names"),
    "key agreement": ({"key_usage": usage(digital=True, cert=False)}, "more or less"),
}


@pytest.mark.parametrize("name", BAD_CA)
def test_authorities_that_are_not_signed(name: str) -> None:
    values, match = BAD_CA[name]
    refused(self_signed(**values), match)


def test_an_authority_may_leave_out_its_own_key_id() -> None:
    check(self_signed())
    check(self_signed(authority_id=False))


def test_extensions_can_be_let_through_but_not_critical_ones() -> None:
    own = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\0")
    rule = replace(RULE, extensions=frozenset({"1.2.3"}))
    check(certificate(more=((own, False),)), rule)
    refused(certificate(more=((own, True),)), "extension 1.2.3", rule)


def test_dns_names_can_be_forbidden() -> None:
    body = certificate(names=(x509.DNSName("a.b"),))
    check(body)
    refused(body, "DNS names", replace(RULE, dns_names=False))


@pytest.mark.parametrize("name", ["bank.example", "web", "*.bank.example", "BANK.example"])
def test_without_dns_names_a_common_name_is_none_either(name: str) -> None:
    """Programs on OpenSSL take it for the host's where no DNS name is there."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    body = certificate(subject=subject)
    check(body)
    refused(body, "DNS names are not allowed", replace(RULE, dns_names=False))


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("example.org", True),
        ("web.Example.org", True),
        ("*.example.org", True),
        ("a.b.example.net", True),
        ("example.com", False),
        ("badexample.org", False),
        ("example.org.bank.example", False),
        ("org", False),
        ("*.org", False),
    ],
)
def test_dns_names_can_be_held_below_some_of_ones_own(name: str, fits: bool) -> None:
    rule = replace(RULE, dns_suffixes=("example.org", "example.net"))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    bodies = (
        certificate(names=(x509.DNSName(name),)),
        certificate(names=(x509.DNSName("example.org"), x509.DNSName(name))),
        certificate(subject=subject),
    )
    check(certificate(), rule)
    for body in bodies:
        check(body)
        if fits:
            check(body, rule)
        else:
            refused(body, "dns_suffixes", rule)


def test_a_common_name_in_words_is_no_dns_name() -> None:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "billing, second floor")])
    check(certificate(subject=subject), replace(RULE, dns_names=False))
    check(certificate(subject=subject), replace(RULE, dns_suffixes=("example.org",)))


@pytest.mark.parametrize("name", ["bank.example\0.example.org", "a b", "", "a..b", "*", "a\nb"])
def test_dns_names_are_dns_names(name: str) -> None:
    refused(certificate(names=(x509.DNSName(name),)), "DNS name")


def test_the_key_identifier_of_newer_go_programs_is_known() -> None:
    identifier = next(i for i in KEY.key_ids if i not in _sha1_id())
    body = certificate(
        authority_id=False,
        more=((x509.AuthorityKeyIdentifier(identifier, None, None), False),),
    )
    check(body)


def _sha1_id() -> set[bytes]:
    return {x509.SubjectKeyIdentifier.from_public_key(CA_KEY.public_key()).digest}


def test_pss_is_not_for_certificates() -> None:
    with pytest.raises(VerificationError, match="PSS"):
        check(certificate(), options=SignOptions(HashAlgorithm.SHA256, pss=True))


@given(st.binary(max_size=200))
def test_bytes_are_no_certificate(data: bytes) -> None:
    with pytest.raises(SpireHwError):
        check(data)
    with pytest.raises(SpireHwError):
        check_request(data, key=KEY, trust_domain=DOMAIN)


GOOD = certificate()


@settings(max_examples=400)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_one_changed_byte_is_refused_or_still_within_the_rule(at: int, flip: int) -> None:
    changed = bytearray(GOOD)
    changed[at] ^= flip
    try:
        check(bytes(changed))
    except SpireHwError:
        return
    # What is let through is a certificate that says the same where it matters.
    whole = x509.load_der_x509_certificate(_wrap(bytes(changed)))
    assert whole.not_valid_after_utc <= NOW + RULE.max_svid_ttl + timedelta(minutes=1)
    names = whole.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    assert uri.startswith("spiffe://example.org/")
    constraints = [e for e in whole.extensions if isinstance(e.value, x509.BasicConstraints)]
    assert not any(c.value.ca for c in constraints)


def _wrap(body: bytes) -> bytes:
    from spire_hw.x509 import der  # noqa: PLC0415 - for this check alone

    ecdsa = der.sequence(der.oid("1.2.840.10045.4.3.2"))
    signature = der.sequence(der.integer(1), der.integer(1))
    return der.sequence(body, ecdsa, der.bit_string(signature))


@settings(max_examples=100)
@given(st.integers(1, len(GOOD) - 1))
def test_a_cut_certificate_is_refused(size: int) -> None:
    with pytest.raises(SpireHwError):
        check(GOOD[:size])
    with pytest.raises(SpireHwError):
        check(GOOD + GOOD[:size])


def test_what_is_too_long_is_not_read() -> None:
    with pytest.raises(VerificationError, match="longer"):
        check(bytes(20_000))


def request(
    key: Any = CA_KEY,
    uris: tuple[str, ...] = ("spiffe://example.org",),
    more: tuple[x509.ExtensionType, ...] = (),
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(NAME)
    if uris:
        names = [x509.UniformResourceIdentifier(u) for u in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in more:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).tbs_certrequest_bytes


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (request(OTHER), "another key"),
        (request(uris=("spiffe://evil.org",)), "name"),
        (request(uris=("spiffe://example.org/web",)), "name"),
        (request(uris=()), "name"),
        (request(uris=("spiffe://example.org", "spiffe://evil.org")), "name"),
        (request(more=(x509.NameConstraints([x509.DNSName("")], None),)), "extension 2.5.29.30"),
        (request(more=(x509.ExtendedKeyUsage(list(TLS)),)), "extension 2.5.29.37"),
    ],
)
def test_requests_that_are_not_signed(body: bytes, match: str) -> None:
    check_request(request(), key=KEY, trust_domain=DOMAIN)
    with pytest.raises(VerificationError, match=match):
        check_request(body, key=KEY, trust_domain=DOMAIN)

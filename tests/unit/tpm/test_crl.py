from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from spire_hw.errors import AttestationError, EncodingError, ErrorKind, InvalidInputError
from spire_hw.tpm.certificate import Certificate, parse_certificate
from spire_hw.tpm.crl import Revocations, parse_crl, split_crls
from spire_hw.tpm.ekcert import EkRoots, verify_ek_certificate
from spire_hw_sim import ekca
from spire_hw_sim.ekca import CrlSpec, EkCa, Spec, ca_spec, ek_spec, tlv
from spire_hw_sim.softtpm import make_ek, make_key
from spire_hw_sim.tpmnode import Vendor

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2026, 6, 1, tzinfo=UTC)
VENDOR = Vendor.make()
CA = VENDOR.intermediate
CA_CERTIFICATE = parse_certificate(CA.certificate)
ROOT = parse_certificate(VENDOR.root.certificate)
URL = "http://crl.example.org/1"


def leaf(bend: Callable[[Spec], None] | None = None, issuer: EkCa = CA) -> Certificate:
    spec = ek_spec(make_ek("L-2").private.public_key())
    if bend is not None:
        bend(spec)
    return parse_certificate(issuer.issue(spec))


def pem(raw: bytes, label: bytes = b"X509 CRL") -> bytes:
    body = base64.encodebytes(raw)
    return b"-----BEGIN " + label + b"-----\n" + body + b"-----END " + label + b"-----\n"


LEAF = leaf()
REASON = ekca.extension("2.5.29.21", b"\x0a\x01\x01")


def revoking(**changes: object) -> CrlSpec:
    spec = CrlSpec([LEAF.serial, 77])
    for name, value in changes.items():
        setattr(spec, name, value)
    return spec


def check(*specs: CrlSpec, subject: Certificate = LEAF, required: bool = False) -> None:
    crls = [parse_crl(CA.issue_crl(spec)) for spec in specs]
    Revocations(crls, required=required).check(subject, CA_CERTIFICATE, NOW)


def refusal(*specs: CrlSpec, subject: Certificate = LEAF, required: bool = False) -> str:
    with pytest.raises(AttestationError) as caught:
        check(*specs, subject=subject, required=required)
    [finding] = caught.value.findings
    expected = {
        "ek_revoked": ErrorKind.PERMISSION_DENIED,
        "ek_revocation_unknown": ErrorKind.UNAVAILABLE,
    }
    assert finding.kind is expected[finding.code]
    return finding.code


def test_cross_reading_with_a_general_library() -> None:
    spec = CrlSpec([1, 300, 2**100], entry_extensions=[REASON])
    spec.extensions = [ekca.extension("2.5.29.20", ekca.integer(9))]
    raw = CA.issue_crl(spec)
    ours, theirs = parse_crl(raw), x509.load_der_x509_crl(raw)
    assert ours.revoked == {one.serial_number for one in theirs} == {1, 300, 2**100}
    assert ours.this_update == theirs.last_update_utc
    assert ours.next_update == theirs.next_update_utc
    assert ours.tbs == theirs.tbs_certlist_bytes
    assert ours.issuer == theirs.issuer.public_bytes()
    assert ours.is_complete


def test_listed_certificate_is_revoked_and_no_other() -> None:
    assert refusal(revoking()) == "ek_revoked"
    assert refusal(revoking(entry_extensions=[REASON])) == "ek_revoked"
    check(CrlSpec([77]))
    check(CrlSpec())


def test_negative_serial_is_found() -> None:
    odd = leaf(lambda spec: setattr(spec, "serial", -5))
    assert refusal(CrlSpec([-5]), subject=odd) == "ek_revoked"


def test_revoked_certificate_stays_revoked_on_a_list_that_ran_out() -> None:
    assert refusal(revoking(next_update=ekca.utc("20260101"))) == "ek_revoked"


UNKNOWN = {
    "ran out": CrlSpec(next_update=ekca.utc("20260101")),
    "does not say when it runs out": CrlSpec(next_update=b""),
    "from the future": CrlSpec(this_update=ekca.utc("20270101")),
    "delta": CrlSpec(extensions=[ekca.extension(ekca.DELTA_CRL, ekca.integer(1), critical=True)]),
    "unknown critical extension": CrlSpec(
        extensions=[ekca.extension("1.2.3", b"\x05\x00", critical=True)]
    ),
    "some reasons only": CrlSpec(
        extensions=[ekca.extension(ekca.CRL_SCOPE, tlv(0x30, tlv(0x83, b"\x06\x40")))]
    ),
    "indirect": CrlSpec(extensions=[ekca.extension(ekca.CRL_SCOPE, tlv(0x30, b"\x84\x01\xff"))]),
    "relative point": CrlSpec(
        extensions=[ekca.extension(ekca.CRL_SCOPE, tlv(0x30, tlv(0xA0, tlv(0xA1))))]
    ),
    "entry of another issuer": CrlSpec(
        [3], entry_extensions=[ekca.extension("2.5.29.29", tlv(0x30), critical=True)]
    ),
    "unknown critical extension of an entry": CrlSpec(
        [3], entry_extensions=[ekca.extension("1.2.3", b"\x05\x00", critical=True)]
    ),
    "SHA-1": CrlSpec(hash="sha1"),
}


@pytest.mark.parametrize("row", UNKNOWN)
def test_list_that_does_not_count_leaves_the_state_unknown(row: str) -> None:
    assert refusal(UNKNOWN[row]) == "ek_revocation_unknown"
    check(UNKNOWN[row], CrlSpec())


def test_serial_on_an_indirect_list_is_another_issuers() -> None:
    spec = revoking(extensions=UNKNOWN["indirect"].extensions)
    assert refusal(spec) == "ek_revocation_unknown"
    check(spec, CrlSpec())


def test_list_of_another_key_does_not_count() -> None:
    other = EkCa(CA.subject, make_key("secp256r1"), b"")
    forged = parse_crl(other.issue_crl(CrlSpec([LEAF.serial])))
    good = parse_crl(CA.issue_crl(CrlSpec()))
    with pytest.raises(AttestationError, match="ek_revocation_unknown"):
        Revocations([forged]).check(LEAF, CA_CERTIFICATE, NOW)
    Revocations([forged, good]).check(LEAF, CA_CERTIFICATE, NOW)


def test_issuer_that_may_not_sign_lists_signs_none() -> None:
    key = make_key("secp256r1")
    spec = ca_spec("Vendor EK CA", key.public_key())
    spec.extensions = [ekca.basic_constraints(ca=True), ekca.key_usage(ekca.KEY_CERT_SIGN)]
    own = VENDOR.root.child("Vendor EK CA", key, spec)
    crl = parse_crl(own.issue_crl(CrlSpec()))
    with pytest.raises(AttestationError, match="ek_revocation_unknown"):
        Revocations([crl]).check(leaf(issuer=own), parse_certificate(own.certificate), NOW)


def test_without_a_list_only_those_who_require_one_refuse() -> None:
    check()
    assert refusal(required=True) == "ek_revocation_unknown"
    check(CrlSpec(), required=True)


def _scope(*parts: bytes) -> list[bytes]:
    return [ekca.extension(ekca.CRL_SCOPE, tlv(0x30, *parts), critical=True)]


def test_list_is_about_the_certificates_in_its_scope() -> None:
    users, cas = (
        CrlSpec(extensions=_scope(b"\x81\x01\xff")),
        CrlSpec([LEAF.serial], extensions=_scope(b"\x82\x01\xff")),
    )
    check(users, required=True)
    check(cas)
    assert refusal(cas, required=True) == "ek_revocation_unknown"
    point = tlv(0xA0, tlv(0xA0, tlv(0x86, URL.encode())))
    pointed = leaf(lambda spec: spec.extensions.append(ekca.crl_points("ldap://x", URL)))
    check(CrlSpec(extensions=_scope(point)), subject=pointed, required=True)
    assert refusal(CrlSpec(extensions=_scope(point)), required=True) == "ek_revocation_unknown"


def test_the_newest_lists_of_an_issuer_count() -> None:
    old = [CrlSpec(next_update=ekca.utc("20260101")) for _ in range(40)]
    check(*old, CrlSpec(this_update=ekca.utc("20260201")))


def _roots() -> EkRoots:
    return EkRoots.of([ROOT, CA_CERTIFICATE])


def verify(*crls: bytes, required: bool = True, chain: tuple[bytes, ...] = ()) -> None:
    revocations = Revocations([parse_crl(one) for one in crls], required=required)
    verify_ek_certificate(LEAF, chain, _roots(), NOW, revocations=revocations)


def test_every_certificate_of_a_path_is_asked_about() -> None:
    own, roots = CA.issue_crl(CrlSpec()), VENDOR.root.issue_crl(CrlSpec())
    verify(own, roots)
    with pytest.raises(AttestationError, match="ek_revocation_unknown"):
        verify(own)
    with pytest.raises(AttestationError, match="ek_revoked"):
        verify(own, VENDOR.root.issue_crl(CrlSpec([CA_CERTIFICATE.serial])))
    with pytest.raises(AttestationError, match="ek_revoked"):
        verify(CA.issue_crl(CrlSpec([LEAF.serial])), roots)


def test_lists_are_asked_about_whole_paths_alone() -> None:
    # A stranger's CA of the same name: its own leaf is on no list, but leads nowhere either.
    key = make_key("secp256r1")
    stranger = EkCa.root("Stranger", make_key("secp256r1")).child("Vendor EK CA", key)
    forged = leaf(issuer=stranger)
    revocations = Revocations([parse_crl(CA.issue_crl(CrlSpec([forged.serial])))], required=True)
    chain = (stranger.certificate,)
    with pytest.raises(AttestationError, match="ek_untrusted"):
        verify_ek_certificate(forged, chain, _roots(), NOW, revocations=revocations)


def test_revoked_goes_before_other_reasons() -> None:
    weaker = ca_spec("Vendor EK CA", CA.key.public_key())
    weaker.not_after = ekca.utc("20240101")
    weaker.not_before = ekca.utc("20230101")
    twin = VENDOR.root.child("Vendor EK CA", CA.key, weaker)
    crl = parse_crl(CA.issue_crl(CrlSpec([LEAF.serial])))
    roots = EkRoots.of([ROOT, parse_certificate(twin.certificate), CA_CERTIFICATE])
    with pytest.raises(AttestationError, match="ek_revoked"):
        verify_ek_certificate(LEAF, (), roots, NOW, revocations=Revocations([crl]))


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[:-1],
    "bytes after": lambda raw: raw + b"\0",
    "not a list": lambda _: tlv(0x30, tlv(0x30), tlv(0x30)),
    "a certificate": lambda _: CA.certificate,
    "empty tbs": lambda _: tlv(0x30, tlv(0x30), tlv(0x30), tlv(3, b"\0")),
    "ends before it begins": lambda _: CA.issue_crl(CrlSpec(next_update=ekca.utc("20200101"))),
    "entry without date": lambda raw: raw.replace(
        tlv(0x30, ekca.integer(77), ekca.utc("20250101")),
        tlv(0x30, ekca.integer(77), b"\x05\0" * 8 + b"\0"),
    ),
    "scope of unknown parts": lambda _: CA.issue_crl(CrlSpec(extensions=_scope(tlv(0x8A)))),
    "fields at the end": lambda _: tlv(
        0x30,
        tlv(0x30, tlv(0x30), tlv(0x30), ekca.utc("20200101"), tlv(0xA0, tlv(0x30)), tlv(0x05)),
        tlv(0x30),
        tlv(3, b"\0"),
    ),
    "other algorithm inside": lambda _: tlv(
        0x30,
        tlv(0x30, tlv(0x30), tlv(0x30), ekca.utc("20200101")),
        tlv(0x30, b"\x05\0"),
        tlv(3, b"\0"),
    ),
}


@pytest.mark.parametrize("row", MALFORMED)
def test_malformed_list_is_refused(row: str) -> None:
    with pytest.raises(EncodingError):
        parse_crl(MALFORMED[row](CA.issue_crl(CrlSpec([77]))))


def test_large_list_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="larger than"):
        parse_crl(bytes((1 << 20) + 1))


def test_lists_are_split() -> None:
    one, two = CA.issue_crl(CrlSpec()), CA.issue_crl(CrlSpec([1]))
    assert split_crls(one) == [one]
    assert split_crls(b"text\n" + pem(one) + pem(two)) == [one, two]
    for wrong in (pem(one, b"CERTIFICATE"), pem(one) + b"-----BEGIN X509 CRL-----\n"):
        with pytest.raises(InvalidInputError, match="unexpected or malformed"):
            split_crls(wrong)
    with pytest.raises(InvalidInputError, match="not base64"):
        split_crls(b"-----BEGIN X509 CRL-----\nA===\n-----END X509 CRL-----\n")

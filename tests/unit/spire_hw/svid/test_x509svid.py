from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.errors import ChainError, SvidError
from spire_hw.key import SoftwareSigner, spki_der
from spire_hw.spiffeid import TrustDomain
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.chain import UnknownAuthorityError
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
DOMAIN, FOREIGN = TrustDomain("example.org"), TrustDomain("example.com")
ID = DOMAIN.member("workload")
LEAF_KEY = ec.generate_private_key(ec.SECP256R1())


async def _authority(domain: TrustDomain = DOMAIN) -> X509Authority:
    signer = SoftwareSigner(ec.generate_private_key(ec.SECP256R1()))
    root = await issue_ca_certificate(
        None,
        signer=signer,
        trust_domain=domain,
        not_before=NOW - timedelta(hours=1),
        not_after=NOW + timedelta(days=1),
    )
    return X509Authority(root, signer)


async def _svid(authority: X509Authority) -> bytes:
    return await issue_x509_svid(
        authority,
        spki=spki_der(LEAF_KEY.public_key()),
        spiffe_id=authority.trust_domain.member("workload"),
        not_before=NOW - timedelta(seconds=10),
        not_after=NOW + timedelta(hours=1),
    )


def _bundle(authority: X509Authority) -> Bundle:
    return Bundle(authority.trust_domain, (X509Root(authority.certificate),))


@pytest.mark.asyncio
async def test_what_we_issue_is_an_svid() -> None:
    authority = await _authority()
    leaf = await _svid(authority)
    svid = parse_x509_svid([leaf])
    assert svid.spiffe_id == ID
    assert svid.chain == (leaf,)
    assert spki_der(svid.public_key) == spki_der(LEAF_KEY.public_key())
    assert svid.not_after - svid.not_before == timedelta(hours=1, seconds=10)
    assert svid.serial_number == svid.leaf.serial_number
    for given in ([leaf], list(svid.certificates), svid):
        assert verify_x509_svid(given, _bundle(authority), NOW) == ID
        assert verify_x509_svid(given, {DOMAIN: _bundle(authority)}, NOW) == ID


@pytest.mark.asyncio
async def test_a_downstream_svid_needs_its_intermediate() -> None:
    above = await _authority()
    signer = SoftwareSigner(ec.generate_private_key(ec.SECP256R1()))
    middle = await issue_ca_certificate(
        above,
        spki=spki_der(signer.public_key),
        trust_domain=DOMAIN,
        not_before=NOW,
        not_after=NOW + timedelta(hours=2),
    )
    below = X509Authority(middle, signer, (middle,))
    chain = below.svid_chain(await _svid(below))
    assert verify_x509_svid(chain, _bundle(above), NOW) == ID
    with pytest.raises(UnknownAuthorityError):
        verify_x509_svid(chain[:1], _bundle(above), NOW)


@pytest.mark.asyncio
async def test_only_the_ids_own_trust_domain_counts() -> None:
    ours, theirs = await _authority(), await _authority(FOREIGN)
    leaf = await _svid(ours)
    with pytest.raises(SvidError):
        verify_x509_svid([leaf], {FOREIGN: _bundle(theirs)}, NOW)
    with pytest.raises(SvidError):
        verify_x509_svid([leaf], _bundle(theirs), NOW)
    with pytest.raises(SvidError):
        verify_x509_svid([leaf], {DOMAIN: _bundle(theirs)}, NOW)
    swapped = Bundle(DOMAIN, (X509Root(theirs.certificate),))
    with pytest.raises(UnknownAuthorityError):
        verify_x509_svid([leaf], {DOMAIN: swapped, FOREIGN: _bundle(ours)}, NOW)
    with pytest.raises(UnknownAuthorityError):
        verify_x509_svid([leaf], Bundle(DOMAIN), NOW)


@pytest.mark.asyncio
async def test_time_counts() -> None:
    authority = await _authority()
    leaf = await _svid(authority)
    with pytest.raises(ChainError, match="expired"):
        verify_x509_svid([leaf], _bundle(authority), NOW + timedelta(hours=2))


def _usage(**bits: bool) -> x509.KeyUsage:
    names = [
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ]
    return x509.KeyUsage(**(dict.fromkeys(names, False) | {"digital_signature": True} | bits))


def _leaf(
    *uris: str,
    ca: bool | None = False,
    usage: x509.KeyUsage | None = None,
    key: Any = None,
    names: bool = True,
) -> bytes:
    key = key or LEAF_KEY
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(hours=1))
    )
    if names:
        values = [x509.DNSName("a.example"), *map(x509.UniformResourceIdentifier, uris)]
        builder = builder.add_extension(x509.SubjectAlternativeName(values), True)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), True)
    builder = builder.add_extension(usage or _usage(), True)
    return builder.sign(LEAF_KEY, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    "leaf",
    [
        b"",
        b"junk",
        _leaf(),
        _leaf(names=False),
        _leaf("spiffe://example.org/a", "spiffe://example.org/b"),
        _leaf("spiffe://example.org/a", "https://example.org"),
        _leaf("https://example.org/a"),
        _leaf("spiffe://example.org"),
        _leaf("spiffe://example.org/"),
        _leaf("spiffe://EXAMPLE.org/a"),
        _leaf("spiffe://example.org/a?b"),
        _leaf("spiffe://example.org/a", ca=True),
        _leaf("spiffe://example.org/a", usage=_usage(key_cert_sign=True)),
        _leaf("spiffe://example.org/a", usage=_usage(crl_sign=True)),
        _leaf("spiffe://example.org/a", usage=_usage(digital_signature=False, key_agreement=True)),
        _leaf("spiffe://example.org/a", key=ec.generate_private_key(ec.SECP224R1())),
    ],
)
def test_what_breaks_a_rule_is_no_svid(leaf: bytes) -> None:
    with pytest.raises(SvidError):
        parse_x509_svid([leaf])


def test_a_leaf_without_basic_constraints_is_no_ca() -> None:
    assert parse_x509_svid([_leaf("spiffe://example.org/a", ca=None)]).spiffe_id.path == "/a"


def test_chains_have_one_to_ten_certificates() -> None:
    leaf = _leaf("spiffe://example.org/a")
    parse_x509_svid([leaf] * 10)
    for chain in ([], [leaf] * 11, [leaf, b"junk"]):
        with pytest.raises(SvidError):
            parse_x509_svid(chain)


def test_ids_of_intermediates_lend_nothing() -> None:
    chain = [_leaf("spiffe://example.org/a"), _leaf("spiffe://example.org/spire/server")]
    assert parse_x509_svid(chain).spiffe_id.path == "/a"

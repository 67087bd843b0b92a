from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from spire_hw.errors import EncodingError, InvalidInputError, NotReadyError, SpireHwError
from spire_hw.key import (
    KeyType,
    PrivateKey,
    PublicKey,
    Signer,
    SignOptions,
    SoftwareSigner,
    generate_private_key,
    spki_der,
)
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509.authority import X509Authority, check_ca_certificate
from spire_hw.x509.certificate import encode_der, load_certificate, subject_key_id
from spire_hw.x509.csr import build_csr
from spire_hw.x509.extension import Extension
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid, random_serial
from spire_hw.x509.name import (
    EMPTY_NAME,
    Subject,
    svid_subject,
    with_organizational_unit,
    with_serial_number,
)

if TYPE_CHECKING:
    from pathlib import Path

DOMAIN = TrustDomain("example.org")
ID = DOMAIN.member("workload")

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


@cache
def _key(key_type: KeyType) -> PrivateKey:
    return generate_private_key(key_type)


LEAF_KEY = _key(KeyType.EC_P256).public_key()
MakeAuthority = Callable[[KeyType], Awaitable[X509Authority]]


async def _issue(
    authority: X509Authority,
    *,
    key: PublicKey = LEAF_KEY,
    spiffe_id: SpiffeId = ID,
    not_before: datetime = NOW,
    not_after: datetime = NOW + timedelta(hours=1),
    dns_names: tuple[str, ...] = (),
    subject_der: bytes | None = None,
    serial: int | None = None,
    extra_extensions: tuple[Extension, ...] = (),
) -> x509.Certificate:
    data = await issue_x509_svid(
        authority,
        spki=spki_der(key),
        spiffe_id=spiffe_id,
        not_before=not_before,
        not_after=not_after,
        dns_names=dns_names,
        subject_der=subject_der,
        serial=serial,
        extra_extensions=extra_extensions,
    )
    return load_certificate(data)


@pytest.mark.parametrize("key_type", list(KeyType))
@pytest.mark.asyncio
async def test_profile_of_a_leaf(make_authority: MakeAuthority, key_type: KeyType) -> None:
    authority = await make_authority(key_type)
    leaf = await _issue(authority)
    root = load_certificate(authority.certificate)
    leaf.verify_directly_issued_by(root)
    assert leaf.version is x509.Version.v3
    assert leaf.subject.rfc4514_string() == "O=SPIRE,C=US"
    assert leaf.issuer == root.subject
    assert leaf.not_valid_before_utc == NOW
    assert leaf.not_valid_after_utc == NOW + timedelta(hours=1)
    assert spki_der(leaf.public_key()) == spki_der(LEAF_KEY)  # type: ignore[arg-type]
    by_type = {type(e.value): e for e in leaf.extensions}
    assert len(leaf.extensions) == 6
    usage = by_type[x509.KeyUsage]
    assert usage.critical
    assert usage.value == x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=True,
        data_encipherment=False,
        key_agreement=True,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    extended = by_type[x509.ExtendedKeyUsage]
    assert not extended.critical
    assert list(extended.value) == [
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    ]
    constraints = by_type[x509.BasicConstraints]
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=False, path_length=None)
    ski = by_type[x509.SubjectKeyIdentifier]
    assert ski.value == x509.SubjectKeyIdentifier.from_public_key(LEAF_KEY)
    aki = by_type[x509.AuthorityKeyIdentifier].value
    assert isinstance(aki, x509.AuthorityKeyIdentifier)
    assert aki.key_identifier == subject_key_id(root)
    names = by_type[x509.SubjectAlternativeName]
    assert not names.critical
    assert list(names.value) == [x509.UniformResourceIdentifier(str(ID))]


@pytest.mark.parametrize("key_type", list(KeyType))
@pytest.mark.asyncio
async def test_keys_of_every_type_are_certified(
    make_authority: MakeAuthority, key_type: KeyType
) -> None:
    key = _key(key_type).public_key()
    leaf = await _issue(await make_authority(KeyType.EC_P256), key=key)
    assert subject_key_id(leaf) == x509.SubjectKeyIdentifier.from_public_key(key).digest


@pytest.mark.asyncio
async def test_dns_names_follow_the_uri_and_the_first_is_common_name(
    make_authority: MakeAuthority,
) -> None:
    leaf = await _issue(
        await make_authority(KeyType.EC_P256), dns_names=("db.example.org", "*.x.example")
    )
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [
        x509.UniformResourceIdentifier(str(ID)),
        x509.DNSName("db.example.org"),
        x509.DNSName("*.x.example"),
    ]
    assert leaf.subject.rfc4514_string() == "CN=db.example.org,O=SPIRE,C=US"


@pytest.mark.asyncio
async def test_a_dns_name_too_long_for_a_common_name_is_a_san_only(
    make_authority: MakeAuthority,
) -> None:
    name = ".".join(["a" * 40] * 3)
    leaf = await _issue(await make_authority(KeyType.EC_P256), dns_names=(name,))
    assert leaf.subject.rfc4514_string() == "O=SPIRE,C=US"


@pytest.mark.asyncio
async def test_an_empty_subject_makes_the_names_critical(make_authority: MakeAuthority) -> None:
    leaf = await _issue(await make_authority(KeyType.EC_P256), subject_der=EMPTY_NAME)
    assert leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical


@pytest.mark.asyncio
async def test_nothing_outlives_its_authority(make_authority: MakeAuthority) -> None:
    authority = await make_authority(KeyType.EC_P256)
    leaf = await _issue(authority, not_after=NOW + timedelta(days=90))
    assert leaf.not_valid_after_utc == authority.not_after
    with pytest.raises(NotReadyError):
        await _issue(authority, not_before=authority.not_after)


@pytest.mark.asyncio
async def test_times_are_whole_seconds_in_utc_and_may_be_after_2050() -> None:
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    start = datetime.fromisoformat("2049-12-31T23:30:00.999999-00:15")
    root = load_certificate(
        await issue_ca_certificate(
            None,
            signer=signer,
            trust_domain=DOMAIN,
            not_before=start,
            not_after=start + timedelta(hours=1),
        )
    )
    assert root.not_valid_before_utc == datetime(2049, 12, 31, 23, 45, tzinfo=UTC)
    assert root.not_valid_after_utc == datetime(2050, 1, 1, 0, 45, tzinfo=UTC)
    with pytest.raises(InvalidInputError):
        await issue_ca_certificate(
            None,
            signer=signer,
            trust_domain=DOMAIN,
            not_before=datetime(2026, 1, 1),  # noqa: DTZ001 - to be refused
            not_after=datetime(2026, 1, 2),  # noqa: DTZ001
        )


@pytest.mark.parametrize(
    "spiffe_id", [DOMAIN.id, TrustDomain("example.com").member("a"), TrustDomain("example.com").id]
)
@pytest.mark.asyncio
async def test_ids_the_authority_has_no_say_in_are_refused(
    make_authority: MakeAuthority, spiffe_id: SpiffeId
) -> None:
    with pytest.raises(InvalidInputError):
        await _issue(await make_authority(KeyType.EC_P256), spiffe_id=spiffe_id)


@pytest.mark.asyncio
async def test_malformed_parts_are_refused(make_authority: MakeAuthority) -> None:
    authority = await make_authority(KeyType.EC_P256)
    for serial in (0, -1, 1 << 159):
        with pytest.raises(InvalidInputError):
            await _issue(authority, serial=serial)
    for names in (("a b",), ("-a",), ("a", "a"), ("*",), ("a.*.b",), ("a" * 64,)):
        with pytest.raises(InvalidInputError):
            await _issue(authority, dns_names=names)
    for subject in (b"", b"\x30\x02\x31\x00", b"\x30\x00\x00", svid_subject() + b"\0"):
        with pytest.raises(EncodingError):
            await _issue(authority, subject_der=subject)


@pytest.mark.parametrize("size", [1, 90, 91, 92, 200, 230, 231, 232, 233, 234, 235, 236, 2000])
@pytest.mark.asyncio
async def test_ids_of_every_length_are_certified(make_authority: MakeAuthority, size: int) -> None:
    spiffe_id = DOMAIN.member("x" * size)
    leaf = await _issue(await make_authority(KeyType.EC_P256), spiffe_id=spiffe_id)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(str(spiffe_id))]


def test_serials_are_positive_and_fit() -> None:
    drawn = {random_serial() for _ in range(200)}
    assert len(drawn) == 200
    assert all(0 < serial < 1 << 128 for serial in drawn)
    assert max(drawn).bit_length() > 64


@pytest.mark.asyncio
async def test_extra_extensions_are_added_once(make_authority: MakeAuthority) -> None:
    authority = await make_authority(KeyType.EC_P256)
    extra = Extension("1.2.3.4", b"\x05\x00", critical=True)
    leaf = await _issue(authority, extra_extensions=(extra,))
    found = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.2.3.4"))
    assert found.critical
    assert found.value.public_bytes() == b"\x05\x00"
    own = Extension("2.5.29.19", b"\x30\x03\x01\x01\xff")
    for extensions in ((extra, extra), (own,)):
        with pytest.raises(InvalidInputError):
            await _issue(authority, extra_extensions=extensions)


@pytest.mark.parametrize("key_type", list(KeyType))
@pytest.mark.asyncio
async def test_profile_of_a_self_signed_ca(
    make_authority: MakeAuthority, key_type: KeyType
) -> None:
    authority = await make_authority(key_type)
    root = load_certificate(authority.certificate)
    root.verify_directly_issued_by(root)
    assert root.subject.rfc4514_string() == f"2.5.4.5={root.serial_number},O=SPIFFE,C=US"
    by_type = {type(e.value): e for e in root.extensions}
    assert by_type[x509.BasicConstraints].critical
    assert by_type[x509.BasicConstraints].value == x509.BasicConstraints(True, None)
    usage = by_type[x509.KeyUsage].value
    assert isinstance(usage, x509.KeyUsage)
    assert by_type[x509.KeyUsage].critical
    assert usage.key_cert_sign
    assert usage.crl_sign
    assert not usage.digital_signature
    names = by_type[x509.SubjectAlternativeName].value
    assert list(names) == [x509.UniformResourceIdentifier("spiffe://example.org")]
    assert x509.ExtendedKeyUsage not in by_type
    assert authority.trust_domain == DOMAIN
    assert authority.authority_id == subject_key_id(root).hex()


@pytest.mark.asyncio
async def test_a_downstream_authority_issues_under_its_issuer(
    make_authority: MakeAuthority,
) -> None:
    above = await make_authority(KeyType.EC_P384)
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    data = await issue_ca_certificate(
        above,
        spki=spki_der(signer.public_key),
        trust_domain=DOMAIN,
        subject_der=with_organizational_unit(above.subject_der, "DOWNSTREAM-1"),
        not_before=NOW,
        not_after=NOW + timedelta(days=9),
    )
    below = X509Authority(data, signer, chain=(data,))
    assert below.not_after == above.not_after
    certificate = load_certificate(data)
    certificate.verify_directly_issued_by(load_certificate(above.certificate))
    assert "OU=DOWNSTREAM-1,O=SPIFFE,C=US" in certificate.subject.rfc4514_string()
    leaf = await _issue(below)
    leaf.verify_directly_issued_by(certificate)
    assert below.svid_chain(encode_der(leaf)) == (encode_der(leaf), data)


@pytest.mark.asyncio
async def test_a_ca_needs_exactly_one_source_of_its_key(make_authority: MakeAuthority) -> None:
    authority = await make_authority(KeyType.EC_P256)
    spki = spki_der(LEAF_KEY)
    signer: Signer = authority.signer
    for above, own, key in (
        (None, None, None),
        (None, signer, spki),
        (None, None, spki),
        (authority, None, None),
        (authority, signer, spki),
    ):
        with pytest.raises(InvalidInputError):
            await issue_ca_certificate(
                above,
                signer=own,
                spki=key,
                trust_domain=DOMAIN,
                not_before=NOW,
                not_after=NOW + timedelta(1),
            )


class _Device:
    """A signer whose key is elsewhere; counts, and may answer wrongly."""

    def __init__(self, *, lies: bool = False) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._answers = ec.generate_private_key(ec.SECP256R1()) if lies else self._key
        self.calls = 0
        self.urgent: list[bool] = []
        self.verifies = False

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._key.public_key()

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        self.calls += 1
        self.urgent.append(options.urgent)
        return await SoftwareSigner(self._answers).sign(digest, options)


@pytest.mark.asyncio
async def test_a_wrong_signature_of_a_device_does_not_leave() -> None:
    with pytest.raises(SpireHwError, match="does not verify"):
        await issue_ca_certificate(
            None,
            signer=_Device(lies=True),
            trust_domain=DOMAIN,
            not_before=NOW,
            not_after=NOW + timedelta(1),
        )


@pytest.mark.asyncio
async def test_a_device_that_verifies_is_taken_at_its_word_unless_told_otherwise() -> None:
    device = _Device(lies=True)
    device.verifies = True
    span = {"not_before": NOW, "not_after": NOW + timedelta(1)}
    await issue_ca_certificate(None, signer=device, trust_domain=DOMAIN, **span)
    with pytest.raises(SpireHwError, match="does not verify"):
        await issue_ca_certificate(
            None, signer=device, trust_domain=DOMAIN, **span, check_signature=True
        )


@pytest.mark.asyncio
async def test_certificates_of_authorities_and_requests_are_urgent_leaves_are_not() -> None:
    device = _Device()
    root = await issue_ca_certificate(
        None, signer=device, trust_domain=DOMAIN, not_before=NOW, not_after=NOW + timedelta(1)
    )
    await build_csr(device)
    await _issue(X509Authority(root, device))
    assert device.urgent == [True, True, False]


@pytest.mark.asyncio
async def test_one_signature_per_certificate() -> None:
    device = _Device()
    root = await issue_ca_certificate(
        None, signer=device, trust_domain=DOMAIN, not_before=NOW, not_after=NOW + timedelta(1)
    )
    await _issue(X509Authority(root, device))
    assert device.calls == 2


@pytest.mark.asyncio
async def test_an_authority_fits_its_key(make_authority: MakeAuthority) -> None:
    authority = await make_authority(KeyType.EC_P256)
    with pytest.raises(InvalidInputError, match="signer's key"):
        X509Authority(authority.certificate, SoftwareSigner(generate_private_key(KeyType.EC_P256)))
    leaf = await _issue(authority)
    with pytest.raises(InvalidInputError, match=r"not about|lacks|CA set"):
        X509Authority(encode_der(leaf), authority.signer)


@pytest.mark.asyncio
async def test_what_may_be_an_authority(make_authority: MakeAuthority, mint: object) -> None:
    authority = await make_authority(KeyType.EC_P256)
    root = load_certificate(authority.certificate)
    assert check_ca_certificate(root) == DOMAIN
    with pytest.raises(InvalidInputError, match="not"):
        check_ca_certificate(root, TrustDomain("example.com"))
    with pytest.raises(InvalidInputError):
        check_ca_certificate(await _issue(authority))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
@pytest.mark.asyncio
async def test_openssl_accepts_what_we_issue(
    make_authority: MakeAuthority, key_type: KeyType, tmp_path: Path
) -> None:
    above = await make_authority(key_type)
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    middle = await issue_ca_certificate(
        above,
        spki=spki_der(signer.public_key),
        trust_domain=DOMAIN,
        subject_der=with_organizational_unit(above.subject_der, "DOWNSTREAM-1"),
        not_before=NOW,
        not_after=NOW + timedelta(hours=2),
    )
    leaf = await _issue(X509Authority(middle, signer, (middle,)), dns_names=("a.example",))
    for name, certificate in (
        ("root", load_certificate(above.certificate)),
        ("middle", load_certificate(middle)),
        ("leaf", leaf),
    ):
        (tmp_path / name).write_bytes(certificate.public_bytes(Encoding.PEM))
    moment = str(int((NOW + timedelta(minutes=5)).timestamp()))
    for purpose in ("sslclient", "sslserver"):
        process = await asyncio.create_subprocess_exec(
            *("openssl", "verify", "-x509_strict", "-attime", moment, "-purpose", purpose),
            *("-CAfile", tmp_path / "root", "-untrusted", tmp_path / "middle", tmp_path / "leaf"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, problem = await process.communicate()
        assert process.returncode == 0, problem


def test_names_are_changed_in_place() -> None:
    name = Subject(
        country=("DE",), organization=("Übung",), organizational_unit=("a", "b"), common_name="c"
    ).encode()
    changed = with_organizational_unit(name, "DOWNSTREAM-2")
    assert changed == Subject(("DE",), ("Übung",), ("DOWNSTREAM-2",), "c").encode()
    numbered = with_serial_number(name, "17")
    assert with_serial_number(numbered, "18") == numbered
    assert numbered == Subject(("DE",), ("Übung",), ("a", "b"), "c", "17").encode()
    assert with_organizational_unit(EMPTY_NAME, "x") == Subject((), (), ("x",)).encode()


@pytest.mark.parametrize(
    "subject",
    [
        Subject(country=("USA",)),
        Subject(country=("",)),
        Subject(organization=("a" * 65,)),
        Subject(common_name="\ud800"),
    ],
)
def test_subjects_out_of_bounds_are_refused(subject: Subject) -> None:
    with pytest.raises(InvalidInputError):
        subject.encode()

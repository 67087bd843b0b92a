"""Sound input bent byte by byte: an answer or an error of ours, never anything else."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.bundle.document import encode_document, encode_pem, parse_document, parse_pem
from spire_hw.errors import EncodingError, InvalidInputError, SpireHwError
from spire_hw.key import KeyType, SoftwareSigner, check_public_key, generate_private_key, spki_der
from spire_hw.spiffeid import TrustDomain
from spire_hw.svid.jwtsvid import issue_jwt_svid, verify_jwt_svid
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.x509 import csr as csr_module
from spire_hw.x509 import der
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.csr import build_csr, parse_csr
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid

# The library remarks on odd names and issuer serials of others; nothing of ours reads them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attribute's length:UserWarning"),
    pytest.mark.filterwarnings("ignore:Parsed a serial number:UserWarning"),
]

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
DOMAIN = TrustDomain("example.org")
ID = DOMAIN.member("workload")
SIGNER = SoftwareSigner(generate_private_key(KeyType.EC_P256))
ROOT = asyncio.run(
    issue_ca_certificate(
        None, signer=SIGNER, trust_domain=DOMAIN, not_before=NOW, not_after=NOW + timedelta(1)
    )
)
LEAF = asyncio.run(
    issue_x509_svid(
        X509Authority(ROOT, SIGNER),
        spki=spki_der(SIGNER.public_key),
        spiffe_id=ID,
        not_before=NOW,
        not_after=NOW + timedelta(hours=1),
        dns_names=("a.example",),
    )
)
BUNDLE = Bundle(
    DOMAIN,
    (X509Root(ROOT),),
    (JwtAuthority("k", spki_der(SIGNER.public_key)),),
    refresh_hint_s=300,
    sequence=3,
)


def _bent(data: bytes, count: int, seed: int = 7) -> list[bytes]:
    """Every truncation, every byte flipped, and random damage."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    cut = [data[:size] for size in range(len(data))]
    flipped = [
        data[:at] + bytes((data[at] ^ (1 << random.randrange(8)),)) + data[at + 1 :]
        for at in range(len(data))
    ]
    damaged = []
    for _ in range(count):
        damage = bytearray(data)
        for _ in range(random.randrange(1, 6)):
            at = random.randrange(len(damage))
            match random.randrange(3):
                case 0:
                    damage[at] = random.randrange(256)
                case 1:
                    del damage[at]
                case _:
                    damage.insert(at, random.randrange(256))
        damaged.append(bytes(damage))
    return cut + flipped + damaged


@pytest.mark.parametrize(
    "signer",
    [
        SIGNER,
        SoftwareSigner(ec.generate_private_key(ec.SECP384R1())),
        SoftwareSigner(rsa.generate_private_key(65537, 2048)),
    ],
)
def test_a_bent_request_never_holds_and_never_crashes(signer: SoftwareSigner) -> None:
    sound = asyncio.run(build_csr(signer, spiffe_id=ID, dns_names=("a.example",)))
    for data in _bent(sound, 1500):
        if data == sound:
            continue
        with pytest.raises(SpireHwError):
            parse_csr(data)
        try:
            parse_csr(data, check_signature=False)
        except SpireHwError:
            continue


def test_the_fast_walk_agrees_with_the_library() -> None:
    sound = asyncio.run(build_csr(SIGNER, spiffe_id=ID, dns_names=("a.example",)))
    walked = 0
    for data in _bent(sound, 3000):
        try:
            fast = csr_module._walk(csr_module._frame(data)[0])
        except EncodingError:
            continue
        if fast is None:
            continue
        walked += 1
        try:
            slow = csr_module._parse_unusual(data, check_signature=False)
        except SpireHwError:
            continue
        assert (fast[0].spki, fast[0].uris, fast[0].dns_names) == (
            (slow.spki, slow.uris, slow.dns_names)
        )
    assert walked > 50


def test_a_bent_svid_never_verifies_as_another() -> None:
    for data in _bent(LEAF, 1500):
        if data == LEAF:
            continue
        try:
            svid = parse_x509_svid([data])
        except SpireHwError:
            continue
        with pytest.raises(SpireHwError):
            verify_x509_svid(svid, BUNDLE, NOW)


def test_a_bent_root_in_the_bundle_trusts_nobody() -> None:
    for data in _bent(ROOT, 500)[::3]:
        if data == ROOT:
            continue
        bundle = Bundle(DOMAIN, (X509Root(data),))
        try:
            verify_x509_svid([LEAF], bundle, NOW)
        except SpireHwError:
            continue


def test_a_bent_token_never_verifies() -> None:
    token = asyncio.run(
        issue_jwt_svid(
            SIGNER,
            "k",
            spiffe_id=ID,
            audience=["a"],
            issued_at=NOW,
            expires_at=NOW + timedelta(minutes=5),
        )
    )
    bundles = {DOMAIN: BUNDLE}
    assert verify_jwt_svid(token, audience="a", bundles=bundles, at=NOW).spiffe_id == ID
    for data in _bent(token.encode(), 1500):
        bent = data.decode("latin-1")
        if bent != token:
            with pytest.raises(SpireHwError):
                verify_jwt_svid(bent, audience="a", bundles=bundles, at=NOW)


def test_a_bent_bundle_is_read_or_refused() -> None:
    for data in _bent(encode_document(BUNDLE), 1500):
        try:
            assert parse_document(DOMAIN, data).trust_domain == DOMAIN
        except SpireHwError:
            continue
    for data in _bent(encode_pem(BUNDLE), 500)[::3]:
        try:
            parse_pem(DOMAIN, data)
        except SpireHwError:
            continue


def test_the_same_request_in_another_encoding_is_refused() -> None:
    sound = asyncio.run(build_csr(SIGNER, spiffe_id=ID))
    body = sound[3:] if sound[1] == 0x81 else sound[4:]
    long_length = b"\x30\x83" + len(body).to_bytes(3) + body
    indefinite = b"\x30\x80" + body + b"\0\0"
    for data in (sound + b"\0", long_length, indefinite, der.sequence(sound)):
        with pytest.raises(SpireHwError):
            parse_csr(data)


def test_a_modulus_of_the_faulty_generator_is_refused() -> None:
    # Any product of powers of 65537 modulo the primorial has the shape that gives it away.
    primorial = 1
    for n in range(2, 702):
        if all(n % d for d in range(2, int(n**0.5) + 1)):
            primorial *= n
    modulus = pow(65537, 1234, primorial) + primorial * (1 << (2047 - primorial.bit_length()))
    while modulus.bit_length() < 2048 or not modulus & 1:
        modulus += primorial * (1 << (2040 - primorial.bit_length()))
    key = rsa.RSAPublicNumbers(65537, modulus).public_key()
    with pytest.raises(InvalidInputError, match="faulty"):
        check_public_key(key)
    check_public_key(rsa.generate_private_key(65537, 2048).public_key())

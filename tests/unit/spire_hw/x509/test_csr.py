from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from spire_hw.errors import EncodingError, InvalidInputError, SpireHwError, VerificationError
from spire_hw.key import KeyType, SignOptions, SoftwareSigner, generate_private_key, spki_der
from spire_hw.spiffeid import SpiffeId
from spire_hw.x509 import csr as csr_module
from spire_hw.x509.csr import MAX_CSR_BYTES, build_csr, parse_csr
from spire_hw.x509.name import EMPTY_NAME, SVID_SUBJECT

ID = SpiffeId.parse("spiffe://example.org/workload")


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
@pytest.mark.asyncio
async def test_requests_of_every_key_type_come_back(key_type: KeyType) -> None:
    private_key = RSA_KEY if key_type is KeyType.RSA_2048 else generate_private_key(key_type)
    signer = SoftwareSigner(private_key)
    data = await build_csr(signer, spiffe_id=ID, dns_names=("a.example", "*.b.example"))
    read = parse_csr(data)
    assert read.spki == spki_der(signer.public_key)
    assert spki_der(read.public_key) == read.spki
    assert read.uris == (str(ID),)
    assert read.dns_names == ("a.example", "*.b.example")
    assert read.subject == SVID_SUBJECT
    assert x509.load_der_x509_csr(data).is_signature_valid


@pytest.mark.asyncio
async def test_an_agent_asks_without_names() -> None:
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    data = await build_csr(signer)
    assert parse_csr(data).uris == ()
    library = x509.load_der_x509_csr(data)
    assert len(library.extensions) == 0
    assert library.subject.rfc4514_string() == "O=SPIRE,C=US"


@pytest.mark.asyncio
async def test_an_empty_subject_is_possible() -> None:
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    assert parse_csr(await build_csr(signer, subject=EMPTY_NAME)).subject == EMPTY_NAME


@pytest.mark.asyncio
async def test_a_malformed_subject_or_dns_name_is_not_built() -> None:
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    with pytest.raises(EncodingError):
        await build_csr(signer, subject=b"\x30\x02\x05\x00")
    for names in [("a b",), ("a", "a"), ("",), ("é",), ("a.",)]:
        with pytest.raises(InvalidInputError):
            await build_csr(signer, dns_names=names)


class _Liar:
    """A device that answers with a well-formed signature over something else."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._key.public_key()

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        return self._key.sign(digest, ec.ECDSA(options.hash.instance))


@pytest.mark.asyncio
async def test_what_a_device_signed_is_verified() -> None:
    with pytest.raises(SpireHwError, match="does not verify"):
        await build_csr(_Liar())


def _library_csr(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
    algorithm: hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | None = None,
    *extensions: x509.ExtensionType,
    pss: bool = False,
) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), 32) if pss else None
    return builder.sign(key, algorithm, rsa_padding=scheme).public_bytes(Encoding.DER)


EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize(
    "data",
    [
        _library_csr(EC_KEY, hashes.SHA384()),
        _library_csr(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()),
        _library_csr(ec.generate_private_key(ec.SECP521R1()), hashes.SHA512()),
        _library_csr(RSA_KEY, hashes.SHA512()),
        _library_csr(RSA_KEY, hashes.SHA256(), pss=True),
    ],
)
def test_unusual_but_sound_requests_are_read(data: bytes) -> None:
    assert spki_der(parse_csr(data).public_key) == parse_csr(data).spki


def test_names_of_other_kinds_are_left_aside() -> None:
    names = x509.SubjectAlternativeName(
        [
            x509.UniformResourceIdentifier("spiffe://a/b"),
            x509.RFC822Name("a@b.example"),
            x509.DNSName("b.example"),
        ]
    )
    usage = x509.BasicConstraints(ca=True, path_length=None)
    read = parse_csr(_library_csr(EC_KEY, hashes.SHA256(), usage, names))
    assert (read.uris, read.dns_names) == (("spiffe://a/b",), ("b.example",))


@pytest.mark.parametrize(
    "data",
    [
        _library_csr(ec.generate_private_key(ec.SECP256K1()), hashes.SHA256()),
        _library_csr(ec.generate_private_key(ec.SECP224R1()), hashes.SHA256()),
        _library_csr(rsa.generate_private_key(65537, 1024), hashes.SHA256()),  # noqa: S505
        _library_csr(rsa.generate_private_key(3, 2048), hashes.SHA256()),
        _library_csr(ed25519.Ed25519PrivateKey.generate()),
    ],
)
def test_weak_and_unknown_keys_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidInputError):
        parse_csr(data)
    with pytest.raises(InvalidInputError):
        parse_csr(data, check_signature=False)


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
@pytest.mark.asyncio
async def test_a_signature_that_does_not_hold_is_refused(key_type: KeyType) -> None:
    data = await build_csr(SoftwareSigner(generate_private_key(key_type)), spiffe_id=ID)
    swapped = data.replace(b"/workload", b"/Workload")
    with pytest.raises(VerificationError):
        parse_csr(swapped)
    assert parse_csr(swapped, check_signature=False).uris == ("spiffe://example.org/Workload",)


@pytest.mark.asyncio
async def test_ordinary_requests_do_not_need_the_library() -> None:
    for key_type in (KeyType.EC_P256, KeyType.EC_P384):
        signer = SoftwareSigner(generate_private_key(key_type))
        data = await build_csr(signer, spiffe_id=ID, dns_names=("a.example",))
        assert csr_module._walk(csr_module._frame(data)[0]) is not None
        library = csr_module._parse_unusual(data, check_signature=True)
        ours = parse_csr(data)
        assert (library.spki, library.uris, library.dns_names, library.subject) == (
            (ours.spki, ours.uris, ours.dns_names, ours.subject)
        )


def test_size_is_capped_before_anything_is_read() -> None:
    with pytest.raises(EncodingError, match="longer"):
        parse_csr(b"\x30\x84" + bytes(MAX_CSR_BYTES))


@pytest.mark.parametrize("data", [b"", b"\x30\x00", b"-----BEGIN", bytes(100), b"\x30\x80\x00\x00"])
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(EncodingError):
        parse_csr(data)

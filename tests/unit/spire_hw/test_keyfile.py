from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.key import spki_der
from spire_hw.keyfile import load_private_key, load_public_key

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
OLD = serialization.PrivateFormat.TraditionalOpenSSL
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
PLAIN = serialization.NoEncryption()
EC = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)
SECRET = EC.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"word"))
PUBLIC = EC.public_key().public_bytes(PEM, SPKI)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.pem"


@pytest.mark.parametrize("key", [EC, RSA], ids=["ec", "rsa"])
@pytest.mark.parametrize("form", [PKCS8, OLD], ids=["pkcs8", "old"])
def test_private_keys(
    file: Path,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    form: serialization.PrivateFormat,
) -> None:
    file.write_bytes(b"a comment\n" + key.private_bytes(PEM, form, PLAIN))
    assert spki_der(load_private_key(file).public_key()) == spki_der(key.public_key())


def test_parameters_may_stand_before_an_ec_key(file: Path) -> None:
    # What `openssl ecparam -name prime256v1 -genkey` writes.
    head = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    file.write_bytes(head + EC.private_bytes(PEM, OLD, PLAIN))
    assert load_private_key(file).private_numbers() == EC.private_numbers()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no private key in PEM"),
        (PUBLIC, "holds no private key in PEM"),
        (SECRET, "the private key is encrypted; decrypt it"),
        (
            ec.generate_private_key(ec.SECP256K1()).private_bytes(PEM, PKCS8, PLAIN),
            "curve secp256k1 is not accepted",
        ),
        (
            ed25519.Ed25519PrivateKey.generate().private_bytes(PEM, PKCS8, PLAIN),
            "is not an RSA or EC key",
        ),
        (b"x" * ((1 << 20) + 1), "is larger than 1 MiB"),
    ],
    ids=["empty", "public", "encrypted", "curve", "kind", "large"],
)
def test_private_keys_that_are_none(file: Path, content: bytes, words: str) -> None:
    file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=words) as caught:
        load_private_key(file)
    assert caught.value.message.startswith(str(file))


def test_public_keys(file: Path) -> None:
    file.write_bytes(PUBLIC)
    assert spki_der(load_public_key(file)) == spki_der(EC.public_key())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no public key in PEM"),
        (EC.private_bytes(PEM, PKCS8, PLAIN), "holds no public key in PEM"),
        (
            ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(PEM, SPKI),
            "is not an RSA or EC key",
        ),
    ],
    ids=["empty", "private", "kind"],
)
def test_public_keys_that_are_none(file: Path, content: bytes, words: str) -> None:
    file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=words) as caught:
        load_public_key(file)
    assert caught.value.message.startswith(str(file))


def test_files_that_cannot_be_read(file: Path) -> None:
    for load in (load_private_key, load_public_key):
        with pytest.raises(NotReadyError, match="cannot be read"):
            load(file)

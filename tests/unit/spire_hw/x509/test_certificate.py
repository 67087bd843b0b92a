from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from spire_hw.errors import EncodingError
from spire_hw.key import spki_der
from spire_hw.x509.certificate import (
    MAX_CERTIFICATE_BYTES,
    encode_der,
    encode_pem,
    key_identifier,
    load_certificate,
    load_chain,
    parse_pem,
    subject_key_id,
)

if TYPE_CHECKING:
    from tests.unit.spire_hw.x509.conftest import Mint


@pytest.fixture(scope="module")
def certificates(mint: Mint) -> list[bytes]:
    key = mint.key()
    return [encode_der(mint.certificate(name, key, "root", key)) for name in ("a", "b")]


def test_chains_are_concatenated(certificates: list[bytes]) -> None:
    assert [encode_der(c) for c in load_chain(b"".join(certificates))] == certificates
    assert load_chain(b"") == []
    with pytest.raises(EncodingError):
        load_chain(certificates[0] + b"\x00")
    with pytest.raises(EncodingError):
        load_chain(certificates[0][:-1])


def test_pem_round_trip_among_other_text(certificates: list[bytes]) -> None:
    text = b"# roots\n" + encode_pem(certificates)
    assert parse_pem(text) == certificates
    for wrong in (b"", b"text", text.replace(b"MII", b"AII"), text[: len(text) // 2]):
        with pytest.raises(EncodingError):
            parse_pem(wrong)


def test_trailing_bytes_and_size_are_checked(certificates: list[bytes]) -> None:
    with pytest.raises(EncodingError):
        load_certificate(certificates[0] + b"\0")
    with pytest.raises(EncodingError, match="longer"):
        load_certificate(bytes(MAX_CERTIFICATE_BYTES + 1))


def test_key_identifier_without_the_extension(mint: Mint) -> None:
    key = mint.key()
    certificate = mint.certificate("a", key, "a", key)
    expected = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest
    assert subject_key_id(certificate) == expected
    assert key_identifier(spki_der(key.public_key())) == expected


def test_key_identifier_of_the_extension_counts(mint: Mint) -> None:
    key = mint.key()
    extension = x509.SubjectKeyIdentifier(b"own")
    certificate = mint.certificate("a", key, "a", key, extra=((extension, False),))
    assert subject_key_id(certificate) == b"own"

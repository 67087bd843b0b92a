from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw.errors import EncodingError
from spire_hw.key import spki_der
from spire_hw.x509 import der


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "020100"),
        (127, "02017f"),
        (128, "02020080"),
        (255, "020200ff"),
        (256, "02020100"),
        ((1 << 128) - 1, "021100" + "ff" * 16),
    ],
)
def test_integers(value: int, encoded: str) -> None:
    assert der.integer(value).hex() == encoded


@pytest.mark.parametrize(
    ("dotted", "encoded"),
    [
        ("2.5.29.17", "0603551d11"),
        ("1.2.840.10045.4.3.2", "06082a8648ce3d040302"),
        ("2.999.1", "0603883701"),
        ("0.0", "060100"),
    ],
)
def test_oids(dotted: str, encoded: str) -> None:
    assert der.oid(dotted).hex() == encoded


@pytest.mark.parametrize("dotted", ["", "1", "3.1", "1.40", "1.-2", "a.b", "1..2", "1.2.", "1.²"])
def test_malformed_oids_are_refused(dotted: str) -> None:
    with pytest.raises(EncodingError):
        der.oid(dotted)


def test_numbers_of_an_oid_have_a_bound() -> None:
    widest = b"\x69" + b"\x83" + b"\xff" * 17 + b"\x7f"  # a UUID below 2.25, all ones
    assert der.dotted(widest) == f"2.25.{2**128 - 1}"
    for tail in (b"\x84" + b"\x80" * 17, b"\xff" * 2100):
        with pytest.raises(EncodingError, match="above 128 bits"):
            der.dotted(b"\x69" + tail + b"\x00")


@pytest.mark.parametrize("size", [0, 1, 127, 128, 255, 256, 2047, 2048, 65_535, 65_536])
def test_every_length_comes_back(size: int) -> None:
    content = bytes(size)
    for element in (der.encode(der.SEQUENCE, content), der.sequence(content)):
        reader = der.Reader(element, "x")
        assert reader.content(der.SEQUENCE) == content
        reader.finish()


@pytest.mark.parametrize(
    "data",
    [
        "",
        "30",
        "3001",
        "3080",  # indefinite
        "308000" + "00",
        "308100",  # not minimal
        "30817f" + "00" * 127,
        "3082007f" + "00" * 127,
        "30850000000001" + "00",
        "30ff",
        "3102" + "0000",
        "3084ffffffff",
    ],
)
def test_what_is_not_der_is_refused(data: str) -> None:
    with pytest.raises(EncodingError):
        der.Reader(bytes.fromhex(data), "x").content(der.SEQUENCE)


def test_an_element_stays_inside_its_level() -> None:
    inner = der.Reader(bytes.fromhex("3003" + "020201" + "05"), "x").enter(der.SEQUENCE)
    with pytest.raises(EncodingError):
        inner.content(der.INTEGER)


def test_trailing_bytes_are_noticed() -> None:
    reader = der.Reader(b"\x05\x00\x00", "x")
    reader.content(5)
    assert reader.more()
    with pytest.raises(EncodingError):
        reader.finish()


def test_concatenated_sequences_are_split() -> None:
    parts = [der.sequence(bytes(n)) for n in (0, 3, 300)]
    assert der.split(b"".join(parts), "x") == parts
    with pytest.raises(EncodingError):
        der.split(b"".join(parts) + b"\0", "x")


def test_key_bits_of_every_kind_of_key() -> None:
    for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()):
        key = ec.generate_private_key(curve).public_key()
        numbers, size = key.public_numbers(), (curve.key_size + 7) // 8
        point = b"\x04" + numbers.x.to_bytes(size) + numbers.y.to_bytes(size)
        assert der.public_key_bits(spki_der(key)) == point
    rsa_key = rsa.generate_private_key(65537, 2048).public_key()
    assert der.public_key_bits(spki_der(rsa_key))[:4].hex() == "3082010a"


@pytest.mark.parametrize("data", ["", "3000", "300430000300", "30053000030101", "3002300003"])
def test_what_is_not_a_key_has_no_key_bits(data: str) -> None:
    with pytest.raises(EncodingError):
        der.public_key_bits(bytes.fromhex(data))

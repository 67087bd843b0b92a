from __future__ import annotations

import pytest
from cryptography import x509

from spire_hw.tpm.names import common_name, format_name
from spire_hw_sim import ekca
from spire_hw_sim.ekca import tlv

NAME = ekca.name(("2.5.4.6", "DE"), ("2.5.4.10", "Maker AG"), ("2.5.4.3", "Root 1"))


def test_name_reads_like_a_name() -> None:
    assert format_name(NAME) == "C=DE,O=Maker AG,CN=Root 1"
    assert common_name(NAME) == "Root 1"
    assert x509.Name.from_rfc4514_string("CN=Root 1,O=Maker AG,C=DE").public_bytes()


@pytest.mark.parametrize(
    ("raw", "text", "common"),
    [
        (tlv(0x30), "", ""),
        (b"\x30\x05", "(malformed)", ""),
        (tlv(0x30, tlv(0x31, tlv(0x30, ekca.oid("2.5.4.3")))), "(malformed)", ""),
        (ekca.name(("1.2.3", "x")), "1.2.3=x", "x"),
        (ekca.common_name("a\n\x1b,CN=b"), "CN=a\\n\\x1b\\,CN\\=b", "a\\n\\x1b\\,CN\\=b"),
        (
            tlv(
                0x30, tlv(0x31, tlv(0x30, ekca.oid("2.5.4.3"), tlv(0x1E, "Ä".encode("utf-16-be"))))
            ),
            "CN=Ä",
            "Ä",
        ),
    ],
)
def test_odd_name_is_harmless(raw: bytes, text: str, common: str) -> None:
    assert format_name(raw) == text
    assert common_name(raw) == common

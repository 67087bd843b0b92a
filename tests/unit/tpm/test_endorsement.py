from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.tpm.endorsement import (
    cut_certificate,
    default_template,
    is_certificate_for,
    split_certificates,
)
from spire_hw.tpm.public import EK_TEMPLATES
from spire_hw_sim.manufacturer import _TEMPLATES, EkKind, Manufacturer

KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
CERTIFICATE = Manufacturer().issue(KEY)


@pytest.mark.parametrize(
    "stored",
    [
        CERTIFICATE,
        CERTIFICATE + b"\xff" * 40,
        CERTIFICATE + bytes(1),
        b"\x10\x01\x00" + len(CERTIFICATE).to_bytes(2, "big") + CERTIFICATE,
    ],
)
def test_a_certificate_is_cut_out_of_what_vendors_put_around_it(stored: bytes) -> None:
    assert cut_certificate(stored) == CERTIFICATE


@pytest.mark.parametrize(
    "stored", [b"", b"\xff" * 800, bytes(800), CERTIFICATE[:-1], b"\x30\x80", b"\x30\x00\x00\x00"]
)
def test_what_holds_no_certificate_gives_none(stored: bytes) -> None:
    assert cut_certificate(stored) is None


def test_a_chain_ends_at_padding() -> None:
    other = Manufacturer().issue(KEY)
    assert split_certificates(other + CERTIFICATE + b"\xff" * 9) == (other, CERTIFICATE)
    assert split_certificates(b"\xff" * 9) == ()
    assert split_certificates(other + b"\xff" * 9 + CERTIFICATE + bytes(3)) == (other, CERTIFICATE)


def test_a_certificate_names_its_key_and_no_other() -> None:
    assert is_certificate_for(CERTIFICATE, KEY)
    assert not is_certificate_for(CERTIFICATE, ec.generate_private_key(ec.SECP256R1()).public_key())


def test_templates_are_those_of_the_profile() -> None:
    made = {template.label: default_template(template) for template in EK_TEMPLATES}
    assert made["L-1"] == _TEMPLATES[EkKind.RSA_2048]
    assert made["L-2"] == _TEMPLATES[EkKind.ECC_P256]
    assert made["H-1"] == _TEMPLATES[EkKind.RSA_2048_HIGH]
    assert made["H-2"] == _TEMPLATES[EkKind.ECC_P256_HIGH]
    assert made["H-3"] == _TEMPLATES[EkKind.ECC_P384]
    assert made["H-6"] == _TEMPLATES[EkKind.RSA_3072]
    # Policy A: PolicySecret(endorsement), twice through the hash.
    step = hashlib.sha256(bytes(32) + bytes.fromhex("000001514000000b")).digest()
    assert hashlib.sha256(step).digest() in made["L-1"]


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda b: b"\x30\x82" + b))
def test_any_content_is_cut_or_refused(stored: bytes) -> None:
    found = cut_certificate(stored)
    assert found is None or found in stored
    assert sum(map(len, split_certificates(stored))) <= len(stored)

from __future__ import annotations

import hashlib
import secrets

import pytest

from spire_hw.errors import AttestationError, ErrorKind
from spire_hw.tpm import verify
from spire_hw.tpm.public import parse_public
from spire_hw.tpm.verify import NO_CSR, Statement, qualifier
from spire_hw.tpm.wire import PcrSelection
from spire_hw_sim.softtpm import SoftTpm, make_svid_key


def test_qualifier_is_the_documented_hash() -> None:
    nonce, csr, secret, name = (bytes((n,)) * 32 for n in (1, 2, 3, 4))
    joined = b"spire-hw tpm v2\0quote\0" + nonce + csr + hashlib.sha256(secret).digest() + name
    assert qualifier("quote", nonce, csr, secret, name) == hashlib.sha256(joined).digest()


def test_qualifier_differs_by_every_argument() -> None:
    nonce, csr, secret, name = (secrets.token_bytes(32) for _ in range(4))
    other = secrets.token_bytes(32)
    made = {
        qualifier("quote", nonce, csr, secret, name),
        qualifier("certify", nonce, csr, secret, name),
        qualifier("time", nonce, csr, secret, name),
        qualifier("quote", other, csr, secret, name),
        qualifier("quote", nonce, other, secret, name),
        qualifier("quote", nonce, NO_CSR, secret, name),
        qualifier("quote", nonce, csr, other, name),
        qualifier("quote", nonce, csr, secret, other),
    }
    assert len(made) == 8


@pytest.mark.parametrize(
    ("role", "nonce", "csr"),
    [("other", bytes(32), bytes(32)), ("quote", bytes(31), bytes(32)), ("quote", bytes(32), b"")],
)
def test_qualifier_refuses_arguments_of_another_shape(role: str, nonce: bytes, csr: bytes) -> None:
    with pytest.raises(ValueError, match="qualifier needs"):
        qualifier(role, nonce, csr, b"s", b"n")


def test_quote_over_several_banks_is_verified_in_order() -> None:
    tpm = SoftTpm()
    asked = (PcrSelection("sha256", (0, 7)), PcrSelection("sha384", (0, 1)))
    values = {**tpm.pcr_values(asked[0]), **tpm.pcr_values(asked[1])}
    expected = bytes(32)
    quote = verify.verify_quote(
        parse_public(tpm.ak.public),
        tpm.ak.qualified_name,
        expected=expected,
        selections=asked,
        statement=Statement(*tpm.quote(asked, expected)),
        values=values,
    )
    assert list(quote.pcrs) == [("sha256", 0), ("sha256", 7), ("sha384", 0), ("sha384", 1)]
    assert quote.clock.reset_count == tpm.reset_count
    assert quote.firmware_version == tpm.firmware_version
    with pytest.raises(AttestationError, match="another order"):
        verify.verify_quote(
            parse_public(tpm.ak.public),
            tpm.ak.qualified_name,
            expected=expected,
            selections=asked[::-1],
            statement=Statement(*tpm.quote(asked, expected)),
            values=values,
        )


def test_unused_bank_is_denied_although_sound() -> None:
    asked = (PcrSelection("sha256", (0, 1)),)
    tpm = SoftTpm(pcrs={("sha256", 0): bytes(32), ("sha256", 1): bytes(32)})
    with pytest.raises(AttestationError) as caught:
        verify.verify_quote(
            parse_public(tpm.ak.public),
            tpm.ak.qualified_name,
            expected=bytes(32),
            selections=asked,
            statement=Statement(*tpm.quote(asked, bytes(32))),
            values=tpm.pcr_values(asked[0]),
        )
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED


def test_certify_tells_where_the_key_lives() -> None:
    tpm, key = SoftTpm(), make_svid_key()
    proved = verify.verify_certify(
        parse_public(tpm.ak.public),
        tpm.ak.qualified_name,
        key=parse_public(key.public),
        expected=bytes(32),
        statement=Statement(*tpm.certify(key, bytes(32))),
    )
    assert proved.name == key.name
    assert proved.qualified_name == key.qualified_name


def test_creation_tells_the_hierarchy() -> None:
    tpm = SoftTpm()
    data = tpm.creation_data()
    proved = verify.verify_creation(
        parse_public(tpm.ak.public), data, Statement(*tpm.creation(data))
    )
    assert proved.hierarchy == "endorsement"
    assert proved.qualified_name == tpm.ak.qualified_name


def test_creation_without_any_structure_is_refused() -> None:
    tpm = SoftTpm()
    data = tpm.creation_data()
    attest, signature = tpm.creation(data)
    ak = parse_public(tpm.ak.public)
    for statement in (
        Statement(b"", signature),
        Statement(attest + b"\0", tpm.sign(attest + b"\0")),
    ):
        with pytest.raises(AttestationError, match="creation_malformed"):
            verify.verify_creation(ak, data, statement)

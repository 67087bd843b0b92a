from __future__ import annotations

import hashlib
import secrets
import struct

import pytest

from spire_hw.errors import AttestationError, ErrorKind
from spire_hw.tpm import verify, wire
from spire_hw.tpm.public import parse_public
from spire_hw.tpm.verify import NO_CSR, Statement, qualifier
from spire_hw.tpm.wire import PcrSelection
from spire_hw_sim.softtpm import OWNER, SoftTpm, make_ak, make_svid_key


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


@pytest.mark.parametrize("blank", [bytes(32), b"\xff" * 32])
def test_bank_without_a_measurement_is_told(blank: bytes) -> None:
    pcrs = {("sha256", 0): blank, ("sha256", 7): blank, ("sha256", 10): bytes(31) + b"x"}
    (found,) = verify.find_unused_banks(pcrs)
    assert (found.code, found.kind) == ("bank_unused", ErrorKind.PERMISSION_DENIED)
    assert verify.find_unused_banks({**pcrs, ("sha256", 0): b"x" * 32}) == []
    assert verify.find_unused_banks({("sha256", 10): blank}) == []


def _time(tpm: SoftTpm, extra: bytes, *, counters: tuple[int, int, int]) -> Statement:
    """Return a time statement of a key whose head is scrambled and whose body is not."""
    resets, restarts, firmware = counters
    body = struct.pack(">QQIIBQ", 7, tpm.clock_ms, resets, restarts, tpm.safe, firmware)
    attest = tpm.attest(wire.ST_TIME, body, extra)
    return Statement(attest, tpm.sign(attest))


def _quoted(tpm: SoftTpm) -> verify.Quote:
    asked = (PcrSelection("sha256", (0,)),)
    return verify.verify_quote(
        parse_public(tpm.ak.public),
        tpm.ak.qualified_name,
        expected=bytes(32),
        selections=asked,
        statement=Statement(*tpm.quote(asked, bytes(32))),
        values=tpm.pcr_values(asked[0]),
    )


def test_time_statement_has_the_counters_in_clear() -> None:
    tpm = SoftTpm(ak=make_ak(parent=OWNER), reset_count=0xB3560170, restart_count=0xBB2C9363)
    proved = verify.verify_time(
        parse_public(tpm.ak.public),
        tpm.ak.qualified_name,
        expected=bytes(32),
        statement=_time(tpm, bytes(32), counters=(2, 0, 0x2019)),
        quote=_quoted(tpm),
    )
    assert (proved.clock.reset_count, proved.clock.restart_count) == (2, 0)
    assert (proved.clock.clock_ms, proved.firmware_version) == (tpm.clock_ms, 0x2019)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("qualifier", "nonce_mismatch"),
        ("head and body swapped", "nonce_mismatch"),
        ("other boot", "nonce_mismatch"),
        ("quote in its place", "time_type"),
        ("body cut", "time_malformed"),
        ("signature", "time_signature"),
    ],
)
def test_time_statement_that_does_not_hold(fault: str, code: str) -> None:
    tpm = SoftTpm(ak=make_ak(parent=OWNER), reset_count=0xB3560170)
    quote, key = _quoted(tpm), tpm.ak
    statement = _time(tpm, bytes(32), counters=(2, 0, 0x2019))
    if fault == "qualifier":
        statement = _time(tpm, b"\1" * 32, counters=(2, 0, 0x2019))
    elif fault == "head and body swapped":
        tpm.reset_count = 2
        statement = _time(tpm, bytes(32), counters=(0xB3560170, 0, 0x2019))
    elif fault == "other boot":
        tpm.reset_count += 1
        statement = _time(tpm, bytes(32), counters=(3, 0, 0x2019))
    elif fault == "quote in its place":
        statement = Statement(*tpm.quote((PcrSelection("sha256", (0,)),), bytes(32)))
    elif fault == "body cut":
        attest = tpm.attest(wire.ST_TIME, bytes(32), bytes(32))
        statement = Statement(attest, tpm.sign(attest))
    else:
        statement = Statement(statement.attest, SoftTpm().sign(statement.attest))
    with pytest.raises(AttestationError) as caught:
        verify.verify_time(
            parse_public(key.public),
            key.qualified_name,
            expected=bytes(32),
            statement=statement,
            quote=quote,
        )
    assert code in [finding.code for finding in caught.value.findings]


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

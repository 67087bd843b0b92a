"""Appended signatures of strangers: whatever a file has at its end, only our own error comes out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from spire_hw.errors import EncodingError
from spire_hw.posture.appended import MAX_SIGNERS, SignedDigest, parse_appended
from spire_hw.x509 import der

quick = settings(max_examples=300, deadline=None)
SHA256 = der.sequence(der.oid("2.16.840.1.101.3.4.2.1"))
ECDSA = der.sequence(der.oid("1.2.840.10045.4.3.2"))
DATA = der.sequence(der.oid("1.2.840.113549.1.7.1"))


def message(*signatures: bytes) -> bytes:
    signers = [
        der.sequence(
            der.integer(3),
            der.encode(0x80, b"key"),
            SHA256,
            ECDSA,
            der.encode(der.OCTET_STRING, signature),
        )
        for signature in signatures
    ]
    data = der.sequence(
        der.integer(3),
        der.encode(der.SET, SHA256),
        DATA,
        der.encode(der.SET, b"".join(signers)),
    )
    return der.sequence(der.oid("1.2.840.113549.1.7.2"), der.encode(0xA0, data))


def told(raw: bytes) -> list[SignedDigest] | None:
    try:
        return parse_appended(raw)
    except EncodingError:
        return None


@quick
@given(st.lists(st.binary(max_size=80), max_size=MAX_SIGNERS + 2))
def test_every_signer_is_found_up_to_a_number(signatures: list[bytes]) -> None:
    found = told(message(*signatures))
    if len(signatures) > MAX_SIGNERS:
        assert found is None
    else:
        assert found == [SignedDigest("sha256", one) for one in signatures]


@quick
@given(st.binary(max_size=300))
def test_other_bytes_are_no_message(raw: bytes) -> None:
    assert told(raw) is None


GOOD = message(bytes(70))


@quick
@given(st.integers(0, len(GOOD)), st.integers(0, 8), st.binary(max_size=8))
def test_bent_messages(at: int, cut: int, put: bytes) -> None:
    found = told(GOOD[:at] + put + GOOD[at + cut :])
    assert found is None or len(found) <= 1

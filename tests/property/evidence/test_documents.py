"""Whatever somebody signs and calls evidence, reading it ends in one of our errors."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from spire_hw.errors import InvalidInputError, SpireHwError, VerificationError
from spire_hw.evidence.document import TYPE, Document, KeyReport, parse, sign
from spire_hw.evidence.verify import TPM_CREATION, Expected, verify
from spire_hw.evidence.yubihsm import KIND
from spire_hw.jose import jws
from spire_hw.key import SoftwareSigner, fingerprint, spki_der
from spire_hw.plugin.custody import Custody, DeviceStatement
from spire_hw.plugin.keymanager import KeyEvidence

KEY = SoftwareSigner(ec.generate_private_key(ec.SECP256R1()))
SPKI = spki_der(KEY.public_key)
NOW = datetime(2026, 11, 22, tzinfo=UTC)
PARTS = (
    "ak_public",
    "ak_creation_data",
    "ak_attest",
    "ak_signature",
    "key_public",
    "attest",
    "signature",
    "creation_data",
)
_TEXT = st.text(max_size=40)
_PLAIN = st.text(st.characters(exclude_categories=("C", "Z")), max_size=40)
_MOMENT = st.one_of(
    st.none(),
    st.datetimes(datetime(1970, 1, 2), datetime(5000, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=12,
)


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def signed(payload: bytes) -> str:
    return asyncio.run(jws.sign_compact(payload, KEY, fingerprint(SPKI), typ=TYPE))


def report(evidence: KeyEvidence, last_used: datetime | None = None) -> KeyReport:
    return KeyReport("a", SPKI, evidence, last_used)


@st.composite
def evidences(draw: st.DrawFn) -> KeyEvidence:
    return KeyEvidence(
        draw(_TEXT),
        draw(st.dictionaries(_TEXT, _TEXT, max_size=5)),
        draw(st.sampled_from(Custody)),
        draw(_TEXT),
        draw(_TEXT),
        draw(st.integers(0, 2**31)),
        draw(_MOMENT),
    )


@given(evidences(), evidences(), _MOMENT, st.binary(min_size=8, max_size=64), _PLAIN)
@settings(deadline=None)
def test_what_is_written_is_read(
    one: KeyEvidence, other: KeyEvidence, used: datetime | None, nonce: bytes, domain: str
) -> None:
    whole = Document(domain, report(one, used), report(other), nonce, NOW)
    read, key = parse(asyncio.run(sign(whole, KEY)))
    assert spki_der(key) == SPKI
    assert {_shown(k) for k in one.attributes} == read.key.evidence.attributes.keys()
    assert read.key.evidence.location == _shown(one.location)
    assert read.key.evidence.custody is one.custody
    assert (read.nonce, read.trust_domain, read.made_at) == (nonce, domain, NOW)
    if used is not None:
        assert read.key.last_used == used.replace(microsecond=0)


@given(st.dictionaries(st.sampled_from(["version", "key", "signer", "nonce", "made_at"]), _JSON))
@settings(deadline=None)
def test_any_object_that_is_signed_is_refused_in_our_words(fields: dict[str, Any]) -> None:
    payload = json.dumps({"version": 1, **fields}).encode()
    with pytest.raises((InvalidInputError, VerificationError)):
        parse(signed(payload))


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.decode("latin-1")))
def test_any_text_is_refused_in_our_words(text: str) -> None:
    with pytest.raises((InvalidInputError, VerificationError)):
        parse(text)


@given(
    st.sampled_from([TPM_CREATION, "tpm2-certify", KIND, "x"]),
    st.dictionaries(st.sampled_from(PARTS) | _TEXT, st.binary(max_size=120), max_size=10),
    st.sampled_from(Custody),
)
@settings(deadline=None)
def test_any_statement_is_refused_in_our_words(
    kind: str, parts: dict[str, bytes], custody: Custody
) -> None:
    evidence = report(KeyEvidence("x", {}, custody))
    statement = DeviceStatement(kind, parts)
    whole = Document("example.org", evidence, evidence, bytes(8), NOW, statement)
    with pytest.raises(SpireHwError):
        verify(asyncio.run(sign(whole, KEY)), Expected(), NOW)

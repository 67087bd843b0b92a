"""Messages of `tpm_devid`: what is written is read again, anything else is refused in our words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import SpireHwError
from spire_hw.tpm.devid import parse_files
from spire_hw_plugins.nodeattestor.tpm_devid import wire

blobs = st.binary(min_size=1, max_size=300)
chains = st.lists(blobs, min_size=1, max_size=wire.MAX_CERTIFICATES).map(tuple)
data = st.builds(
    wire.AttestationData,
    certificates=chains,
    devid_pub=blobs,
    ek_certificate=blobs,
    ek_pub=blobs,
    ak_pub=blobs,
    certified=blobs,
    signature=blobs,
    ek_chain=st.lists(blobs, max_size=wire.MAX_EK_CHAIN).map(tuple),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
GOOD = json.loads(
    wire.encode_attestation_data(
        wire.AttestationData((b"c",), b"p", b"e", b"k", b"a", b"s", b"g", (b"i",))
    )
)


@given(data)
def test_first_messages_come_back(message: wire.AttestationData) -> None:
    assert wire.decode_attestation_data(wire.encode_attestation_data(message)) == message


@given(st.builds(wire.Challenge, blobs, blobs, blobs))
def test_challenges_come_back(message: wire.Challenge) -> None:
    assert wire.decode_challenge(wire.encode_challenge(message)) == message


@given(st.builds(wire.Response, blobs, blobs))
def test_answers_come_back(message: wire.Response) -> None:
    assert wire.decode_response(wire.encode_response(message)) == message


@given(st.binary(max_size=400))
def test_bytes_of_any_kind_are_refused(message: bytes) -> None:
    for decode in (wire.decode_attestation_data, wire.decode_challenge, wire.decode_response):
        with pytest.raises(SpireHwError):
            decode(message)


@given(st.sampled_from(sorted(GOOD)), anything)
def test_any_member_may_be_anything(name: str, value: object) -> None:
    message = json.dumps({**GOOD, name: value}).encode()
    try:
        read = wire.decode_attestation_data(message)
    except SpireHwError:
        return
    assert wire.decode_attestation_data(wire.encode_attestation_data(read)) == read


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_key_files_of_any_bytes_are_refused(public: bytes, private: bytes) -> None:
    with pytest.raises(SpireHwError):
        parse_files(public, private)

from __future__ import annotations

import hashlib
import json
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import InvalidInputError
from spire_hw.key import KeyType, generate_private_key
from spire_hw.tpm.pcrpolicy import (
    Approval,
    Binding,
    approve,
    authorized_policy,
    encode_values,
    find_approval,
    parse_approval,
    parse_selections,
    parse_values,
    pcr_policy,
    signer_public,
)
from spire_hw.tpm.public import name_of
from spire_hw.tpm.wire import PcrSelection

VALUES = {"sha256": {0: bytes(32), 7: b"\x07" * 32}, "sha384": {4: b"\x04" * 48}}
POLICY = pcr_policy(VALUES)
KEYS = [generate_private_key(t) for t in (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048)]
KEY = KEYS[0]
BINDING = Binding((PcrSelection("sha256", (0,)),), signer_public(KEY.public_key()), b"web")


def test_policies_are_what_the_specification_says() -> None:
    selection = bytes.fromhex("00000002000b03810000000c03100000")
    values = hashlib.sha256(bytes(32) + b"\x07" * 32 + b"\x04" * 48).digest()
    wanted = hashlib.sha256(bytes(32) + bytes.fromhex("0000017f") + selection + values).digest()
    assert wanted == POLICY
    name = b"\x00\x0b" + bytes(32)
    first = hashlib.sha256(bytes(32) + bytes.fromhex("0000016a") + name).digest()
    assert authorized_policy(name, b"ref") == hashlib.sha256(first + b"ref").digest()


@pytest.mark.parametrize("key", KEYS)
def test_an_approval_survives_its_file_and_counts_for_its_key_policy_and_purpose(
    key: ec.EllipticCurvePrivateKey,
) -> None:
    binding = Binding(BINDING.selections, signer_public(key.public_key()), b"web")
    made = parse_approval(approve(key, POLICY, b"web", "kernel\n6.1").encode())
    assert made.comment == "kernel\n6.1"
    assert find_approval([made], POLICY, binding) is made
    assert find_approval([made], bytes(32), binding) is None
    assert find_approval([made], POLICY, Binding(binding.selections, binding.authority)) is None
    assert find_approval([made], POLICY, Binding(binding.selections)) is None
    other = next(k for k in KEYS if k is not key)
    lifted = approve(other, POLICY, b"web")
    assert find_approval([lifted], POLICY, binding) is None
    forged = Approval(POLICY, b"web", made.signer, lifted.signature)
    assert find_approval([forged, made], POLICY, binding) is made
    assert find_approval([forged], POLICY, binding) is None


def test_a_short_coordinate_keeps_its_zeros() -> None:
    """A Name is over the field's size; a key whose x is short is found in a few hundred tries."""
    for _ in range(10_000):
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
        if key.public_numbers().x >> 248 == 0:
            break
    else:
        pytest.fail("no such key")
    public = signer_public(key)
    assert len(public) == 86
    assert name_of(public)[2:] == hashlib.sha256(public).digest()


def test_a_binding_survives_its_document() -> None:
    for binding in (BINDING, Binding(parse_selections({"sha512": [3], "sha256": [7, 0]}))):
        assert Binding.parse(json.loads(json.dumps(binding.document()))) == binding


@pytest.mark.parametrize(
    "change",
    [
        {"pcrs": {}},
        {"pcrs": {"sha256": []}},
        {"pcrs": {"sha256": [24]}},
        {"pcrs": {"sha256": [1, 1]}},
        {"pcrs": {"sha256": [True]}},
        {"pcrs": {"md5": [1]}},
        {"pcrs": [1]},
        {"authority": "x"},
        {"authority": "AAAA"},
        {"authority": None},
        {"ref": "zz"},
        {"ref": "00" * 33},
        {"ref": None},
    ],
)
def test_a_document_that_is_no_binding_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        Binding.parse({**BINDING.document(), **change})


def test_an_authority_has_one_form() -> None:
    public = bytearray(signer_public(KEY.public_key()))
    struct.pack_into(">I", public, 4, 0x00040000)
    document = Binding(BINDING.selections, bytes(public)).document()
    with pytest.raises(InvalidInputError, match="one form"):
        Binding.parse(document)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"policy": "00"},
        {"policy": "zz" * 32},
        {"policy": 1},
        {"signature": "!"},
        {"signature": "AAAA"},
        {"comment": 5},
        {"ref": "00" * 33},
    ],
)
def test_a_file_that_is_no_approval_is_refused(change: dict[str, object]) -> None:
    good = json.loads(approve(KEY, POLICY).encode())
    with pytest.raises(InvalidInputError):
        parse_approval(json.dumps({**good, **change}).encode())


def test_values_survive_their_file() -> None:
    assert parse_values(encode_values(VALUES)) == VALUES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version":1,"pcrs":{}}',
        '{"version":1,"pcrs":{"sha256":{}}}',
        '{"version":1,"pcrs":{"sha256":{"0":"00"}}}',
        '{"version":1,"pcrs":{"sha256":{"00":"' + "00" * 32 + '"}}}',
        '{"version":1,"pcrs":{"sha256":{"24":"' + "00" * 32 + '"}}}',
        '{"version":1,"pcrs":{"md5":{"0":"' + "00" * 16 + '"}}}',
        '{"version":2,"pcrs":{"sha256":{"0":"' + "00" * 32 + '"}}}',
        "[" * 100_000,
    ],
)
def test_a_file_that_holds_no_values_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_values(text.encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for parse in (parse_values, parse_approval):
        with pytest.raises(InvalidInputError):
            parse(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=10,
    )
)
def test_any_json_in_any_place_is_read_or_refused(value: object) -> None:
    good = json.loads(approve(KEY, POLICY).encode())
    for name in good:
        try:
            parse_approval(json.dumps({**good, name: value}).encode())
        except InvalidInputError:
            continue

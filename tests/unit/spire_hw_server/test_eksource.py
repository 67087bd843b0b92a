from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import InvalidInputError
from spire_hw.key import PublicKey, fingerprint, spki_der
from spire_hw.tpm.certificate import encode_pem
from spire_hw_server.cli import eksource
from spire_hw_server.cli.eksource import Wanted, read_certificates, read_csv, read_node
from spire_hw_sim.softtpm import SoftTpm, make_ek
from spire_hw_sim.tpmnode import Vendor
from spire_hw_sim.weakkeys import roca_modulus

A, B = "ab" * 32, "cd" * 32
EK = make_ek("L-2")
KEY = EK.private.public_key()
VENDOR = Vendor.make()
LEAF = VENDOR.certify(SoftTpm(ek=EK))
OTHER = VENDOR.certify(SoftTpm(ek=make_ek("L-2")))


def test_columns_may_be_named_or_not() -> None:
    plain = f"{A}, rack 1 ,web\n\n# spare\n{B}\n"
    named = f"\ufeffowner,EK_HASH,comment\r\nweb,SHA256:{A.upper()},rack 1\r\n,{B}\r\n"
    assert read_csv(plain.encode(), owner="ops") == [
        Wanted("line 1", A, "rack 1", "web"),
        Wanted("line 4", B, "", "ops"),
    ]
    assert [(w.ek_hash, w.comment, w.owner) for w in read_csv(named.encode(), comment="spare")] == [
        (A, "rack 1", "web"),
        (B, "spare", ""),
    ]
    assert read_csv(b"") == []


def test_quoted_cells_may_hold_commas_and_lines() -> None:
    [one] = read_csv(f'{A},"rack 1, shelf ""2""\nnear the door",ops'.encode())
    assert one.comment == 'rack 1, shelf "2"\nnear the door'


def test_bad_lines_do_not_hold_up_the_others() -> None:
    text = f"{A}\nzz\n{A},again\n{B},c,o,more\n,only a comment\n"
    found = read_csv(text.encode())
    assert [w.fault for w in found[:1]] == [""]
    assert [w.place for w in found] == [f"line {n}" for n in range(1, 6)]
    assert "not an endorsement key hash" in found[1].fault
    assert found[2].fault == "same EK hash as line 1"
    assert found[3].fault == "more than 3 columns"
    assert "not an endorsement key hash" in found[4].fault


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (f'{A},"open'.encode(), "line 1: not CSV"),
        (b"ek_hash,colour\n", "columns are ek_hash, colour; known are ek_hash, comment, owner"),
        (b"ek_hash,ek_hash\n", "each once"),
        (A.encode() + b"," + b"x" * 200_000, "not CSV: field larger"),
    ],
)
def test_what_is_no_table_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        read_csv(raw)


def test_large_inputs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eksource, "MAX_CSV_BYTES", 3)
    monkeypatch.setattr(eksource, "MAX_NODE_BYTES", 3)
    for read in (read_csv, read_node):
        with pytest.raises(InvalidInputError, match="larger than 3 bytes"):
            read(b"aaaa")


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_table_is_read_or_refused(raw: bytes) -> None:
    try:
        found = read_csv(raw)
    except InvalidInputError:
        return
    assert all(one.fault or len(one.ek_hash) == 64 for one in found)


# --- what a node says -------------------------------------------------------------------------


def _pem(key: PublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def key_values(key: PublicKey = KEY, leaf: bytes | None = LEAF, **changes: Any) -> dict[str, Any]:
    found = {
        "ek_hash": fingerprint(spki_der(key)),
        "template": "L-2",
        "handle": "",
        "public_key": _pem(key),
        "certificate": None if leaf is None else {"der": leaf.hex()},
        "chain": [VENDOR.intermediate.certificate.hex()],
    }
    return found | changes


RSA = key_values(make_ek("L-1").private.public_key(), None, template="L-1")
INFO = {"ek_hash": key_values()["ek_hash"], "endorsement_keys": [RSA, key_values()]}


def _raw(value: object) -> bytes:
    return json.dumps(value).encode()


def test_the_key_a_node_attests_with_is_taken() -> None:
    assert read_node(_raw(INFO)) == INFO["ek_hash"]
    assert read_node(_raw(INFO), "L-1") == RSA["ek_hash"]
    assert read_node(_raw(key_values())) == INFO["ek_hash"]
    assert read_node(_raw(key_values(leaf=None))) == INFO["ek_hash"]
    odd = key_values(certificate={"fault": "not DER", "der": "00"})
    assert read_node(_raw(odd)) == INFO["ek_hash"]


def _weak() -> dict[str, Any]:
    return key_values(rsa.RSAPublicNumbers(65537, roca_modulus()).public_key(), None)


REFUSED = {
    "not JSON": (b"{", "not JSON"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "not UTF-8": (b'"\xff"', "not JSON"),
    "a list": (b"[]", "no JSON object"),
    "something else": (b"{}", "no endorsement_keys"),
    "keys are no list": (_raw({"endorsement_keys": {}}), "no endorsement_keys"),
    "too many keys": (_raw({"endorsement_keys": [{}] * 33}), "no endorsement_keys"),
    "no key": (_raw({"ek_hash": "", "endorsement_keys": []}), "no endorsement key its agent"),
    "other hash": (_raw(INFO | {"ek_hash": A}), "no endorsement key its agent could attest with"),
    "no public key": (_raw(key_values(public_key=None)), "no public_key or no ek_hash"),
    "hash is no text": (_raw(key_values(ek_hash=3)), "no public_key or no ek_hash"),
    "forged hash": (_raw(key_values(ek_hash=A)), "ek_hash is not that of public_key"),
    "key does not parse": (_raw(key_values(public_key="x")), "it does not parse"),
    "weak key": (_raw(_weak()), "CVE-2017-15361"),
    "small key": (
        _raw(key_values(rsa.generate_private_key(65537, 1024).public_key(), None)),  # noqa: S505
        "public_key is not acceptable",
    ),
    "another's certificate": (_raw(key_values(leaf=OTHER)), "certificate is of another key"),
    "certificate not in hex": (_raw(key_values(certificate={"der": "zz"})), "not in hexadecimal"),
    "certificate is none": (_raw(key_values(certificate={"der": "3000"})), "not a certificate"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_a_node_did_not_print_is_refused(row: str) -> None:
    raw, words = REFUSED[row]
    with pytest.raises(InvalidInputError, match=words):
        read_node(raw)


def test_a_template_the_node_does_not_have_is_named() -> None:
    with pytest.raises(InvalidInputError, match="no endorsement key H-3; it has: L-1, L-2"):
        read_node(_raw(INFO), "H-3")


def test_certificates_come_from_every_form() -> None:
    above = VENDOR.intermediate.certificate
    leaf, chain = read_certificates(_raw(INFO))
    assert (leaf.der, chain) == (LEAF, (above,))
    leaf, chain = read_certificates(encode_pem(LEAF) + encode_pem(above))
    assert (leaf.der, chain) == (LEAF, (above,))
    leaf, chain = read_certificates(LEAF + b"\xff" * 20)
    assert (leaf.der, chain) == (LEAF, ())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "ends early"),
        (_raw(key_values(leaf=None)), "no certificate that can be read"),
        (_raw(key_values(chain=["zz"])), "chain is not a list"),
        (_raw(key_values(chain=7)), "chain is not a list"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "unexpected PEM"),
    ],
)
def test_files_without_certificates_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        read_certificates(raw)


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(max_size=5) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["endorsement_keys", "ek_hash", "public_key", "certificate", "der"]
                ),
                inner,
            )
        ),
        max_leaves=8,
    )
)
def test_any_document_is_read_or_refused(value: object) -> None:
    for read in (read_node, read_certificates):
        with pytest.raises(InvalidInputError):
            read(_raw(value))

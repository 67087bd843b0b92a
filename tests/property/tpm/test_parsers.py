"""Whatever bytes a verifier is given, only our own errors come out; what is written reads back."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spire_hw.errors import SpireHwError
from spire_hw.tpm import der, verify, wire
from spire_hw.tpm.cabinet import MAX_CONTENT_BYTES, read_cabinet
from spire_hw.tpm.caimport import Blob, judge
from spire_hw.tpm.castore import split
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.tpm.credential import make_credential
from spire_hw.tpm.crl import Revocations, parse_crl, split_crls
from spire_hw.tpm.ekcert import EkRoots, verify_ek_certificate
from spire_hw.tpm.ekmodel import read_model
from spire_hw.tpm.public import check_ak, check_ek, check_svid_key, parse_public
from spire_hw.tpm.verify import Statement
from spire_hw.tpm.wire import PcrSelection
from spire_hw_plugins.nodeattestor.tpm import dialects, rounds
from spire_hw_plugins.nodeattestor.tpm.wire import (
    decode_attestation_data,
    decode_challenge,
    decode_response,
)
from spire_hw_sim import ekca
from spire_hw_sim.cabinets import CabinetSpec, make_cabinet
from spire_hw_sim.ekca import CrlSpec, tlv
from spire_hw_sim.softtpm import SoftTpm, make_ak, make_ek, make_svid_key
from spire_hw_sim.tpmnode import TpmNode, Vendor

TPM = SoftTpm(ek=make_ek("L-2"))
RSA_TPM = SoftTpm(ek=make_ek("L-1"), ak=make_ak("rsa2048"))
VENDOR = Vendor.make()
PCRS = (PcrSelection("sha256", (0, 7)),)
AREAS = [TPM.ak.public, TPM.ek.public, RSA_TPM.ak.public, RSA_TPM.ek.public, make_svid_key().public]
CERTIFICATES = [VENDOR.certify(TPM), VENDOR.certify(RSA_TPM), VENDOR.root.certificate]
ROOTS = EkRoots.of([parse_certificate(VENDOR.root.certificate)])
NODE = VENDOR.equip(TpmNode(TPM))
DECODERS = (
    decode_attestation_data,
    decode_challenge,
    decode_response,
    rounds.decode_part,
    rounds.decode_part_request,
    dialects.decode_challenge,
    dialects.decode_response,
)
QUOTE = TPM.quote(PCRS, bytes(32))
NOW = datetime(2026, 6, 1, tzinfo=UTC)

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Return a good input with some bytes replaced, cut out or put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 3)):
            case 0 if data:
                data[at] = draw(st.integers(0, 255))
            case 1:
                data[at : at + draw(st.integers(1, 40))] = b""
            case 2:
                data[at:at] = draw(st.binary(max_size=40))
            case _:
                del data[at:]
    return bytes(data)


def any_of(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=400), damaged(seeds))


@quick
@given(any_of(AREAS))
def test_public_areas(raw: bytes) -> None:
    with contextlib.suppress(SpireHwError):
        public = parse_public(raw)
        for check in (check_ak, check_ek, check_svid_key):
            with contextlib.suppress(SpireHwError):
                check(public)
        make_credential(public, public.name, bytes(32))


@quick
@given(any_of(CERTIFICATES))
def test_certificates(raw: bytes) -> None:
    with contextlib.suppress(SpireHwError):
        leaf = parse_certificate(raw)
        with contextlib.suppress(SpireHwError):
            read_model(leaf)
        verify_ek_certificate(leaf, (VENDOR.intermediate.certificate,), ROOTS, NOW)


@quick
@given(any_of(CERTIFICATES))
def test_intermediates(raw: bytes) -> None:
    leaf = parse_certificate(VENDOR.certify(TPM))
    with contextlib.suppress(SpireHwError):
        verify_ek_certificate(leaf, (raw,), ROOTS, NOW)


@quick
@given(any_of([QUOTE[0], b""]), any_of([QUOTE[1]]))
def test_statements(attest: bytes, signature: bytes) -> None:
    ak = parse_public(TPM.ak.public)
    with pytest.raises(SpireHwError):
        verify.verify_quote(
            ak,
            TPM.ak.qualified_name,
            expected=bytes(32),
            selections=PCRS,
            statement=Statement(attest + b"\0", signature),
            values=TPM.pcr_values(PCRS[0]),
        )
    with pytest.raises(SpireHwError):
        verify.verify_certify(
            ak,
            TPM.ak.qualified_name,
            key=ak,
            expected=bytes(32),
            statement=Statement(attest, signature),
        )


@quick
@given(any_of([TPM.creation_data()]))
def test_creation_data(raw: bytes) -> None:
    with contextlib.suppress(SpireHwError):
        wire.parse_creation_data(raw)
    with contextlib.suppress(SpireHwError):
        wire.parse_time_body(raw)


@quick
@given(any_of([NODE.payload(), rounds.encode_part(NODE.part(0)), rounds.encode_part_request(7)]))
def test_messages(raw: bytes) -> None:
    for decode in DECODERS:
        with contextlib.suppress(SpireHwError):
            decode(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("EK", "AK", "EC", "Secret", "spire_hw", "v", "quotes", "pcrs", "Public"),
                    *("ima", "ima_from", "ima_left", "want", "Credential"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@quick
@given(JSON)
def test_json_of_any_shape(value: object) -> None:
    raw = json.dumps(value).encode()
    for decode in DECODERS:
        with contextlib.suppress(SpireHwError):
            decode(raw)


@given(st.lists(st.integers(0, 23), unique=True), st.sampled_from(sorted(wire.BANKS)))
def test_selections_read_back(pcrs: list[int], bank: str) -> None:
    entry = PcrSelection(bank, tuple(sorted(pcrs)))
    body = wire.parse_quote_body(wire.encode_selections([entry]) + wire.sized(bytes(32)))
    assert body.selections == (entry,)


@given(st.binary(max_size=300), st.integers(1, 0xBF))
def test_der_lengths_read_back(content: bytes, tag: int) -> None:
    if tag & 0x1F != 0x1F:
        value = der.read(tlv(tag, content) + b"rest", "x")
        assert (value.tag, value.content) == (tag, content)


def test_random_bytes_never_pass_as_a_certificate() -> None:
    for raw in (b"", b"\x30", b"\x30\x00", b"\x30\x84\xff\xff\xff\xff", b"\xff" * 100):
        with pytest.raises(SpireHwError):
            parse_certificate(raw)


CA = parse_certificate(VENDOR.intermediate.certificate)
LEAF = parse_certificate(CERTIFICATES[0])
POINT = tlv(0xA0, tlv(0xA0, tlv(0x86, b"http://crl")))
CRLS = [
    VENDOR.intermediate.issue_crl(CrlSpec([1, -7, 2**70])),
    VENDOR.intermediate.issue_crl(
        CrlSpec(
            [5],
            entry_extensions=[ekca.extension("2.5.29.21", b"\x0a\x01\x01")],
            extensions=[ekca.extension(ekca.CRL_SCOPE, tlv(0x30, POINT), critical=True)],
        )
    ),
]


@quick
@given(any_of(CRLS))
def test_revocation_lists(raw: bytes) -> None:
    with contextlib.suppress(SpireHwError):
        for one in split_crls(raw):
            Revocations([parse_crl(one)], required=True).check(LEAF, CA, NOW)


@quick
@given(st.lists(st.integers(-(2**159), 2**159), max_size=30))
def test_serials_of_a_revocation_list_read_back(serials: list[int]) -> None:
    crl = parse_crl(VENDOR.intermediate.issue_crl(CrlSpec(serials)))
    assert crl.revoked == set(serials)
    assert crl.is_complete


CABINETS = [
    make_cabinet({"Maker/a.cer": CERTIFICATES[0], "b.txt": b"text" * 3000}),
    make_cabinet({"a": b"abc"}, CabinetSpec(compression=0)),
]


@quick
@given(any_of(CABINETS))
def test_cabinets(raw: bytes) -> None:
    with contextlib.suppress(SpireHwError):
        assert sum(len(entry.content) for entry in read_cabinet(raw)) <= MAX_CONTENT_BYTES


@quick
@given(
    st.dictionaries(st.text("abc/.", min_size=1, max_size=20), st.binary(max_size=500), max_size=5),
    st.sampled_from([0, 1]),
)
def test_cabinets_read_back(files: dict[str, bytes], compression: int) -> None:
    found = read_cabinet(make_cabinet(files, CabinetSpec(compression=compression)))
    assert dict(found) == files


@quick
@given(st.lists(any_of([*CERTIFICATES, CA.der]), max_size=4))
def test_collections_of_certificates(blobs: list[bytes]) -> None:
    found = judge([Blob(str(n), raw) for n, raw in enumerate(blobs)], NOW)
    assert len(found) == len(blobs)
    for one in found:
        assert one.is_taken or one.reason
        assert "/" not in one.file_name
        json.dumps(one.values())
    with contextlib.suppress(SpireHwError):
        for raw in blobs:
            split(raw)

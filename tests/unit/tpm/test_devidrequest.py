from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import AttestationError, SpireHwError
from spire_hw.key import SoftwareSigner
from spire_hw.tpm import public as areas
from spire_hw.tpm import wire
from spire_hw.tpm.devidrequest import DevIdRequest, check_request, parse_request, qualifier
from spire_hw.x509.csr import build_csr
from spire_hw_sim.softtpm import (
    OWNER,
    SVID_KEY_ATTRIBUTES,
    SoftKey,
    SoftTpm,
    make_ak,
    make_ek,
    make_svid_key,
)


async def request_of(tpm: SoftTpm, key: SoftKey) -> DevIdRequest:
    csr = await build_csr(SoftwareSigner(key.private))
    attest, signature = tpm.certify(key, qualifier(csr))
    return DevIdRequest(csr, key.public, tpm.ak.public, attest, signature)


def machine() -> SoftTpm:
    return SoftTpm(ek=make_ek("L-2"), ak=make_ak())


def code_of(request: DevIdRequest) -> str:
    with pytest.raises(AttestationError) as caught:
        check_request(request)
    return caught.value.findings[0].code


@pytest.mark.asyncio
async def test_an_honest_request_survives_its_file_and_holds() -> None:
    tpm = machine()
    for key in (make_svid_key(), make_svid_key("rsa2048")):
        request = parse_request((await request_of(tpm, key)).encode())
        checked = check_request(request)
        assert checked.csr.spki == key.spki
        assert checked.ak_spki == tpm.ak.spki


@pytest.mark.asyncio
async def test_a_proof_for_another_key_request_or_tpm_does_not_hold() -> None:
    tpm, key = machine(), make_svid_key()
    good = await request_of(tpm, key)
    other = await request_of(tpm, make_svid_key())
    again = await request_of(tpm, key)
    assert code_of(replace(good, csr=other.csr)) == "devid_key_mismatch"
    assert code_of(replace(good, csr=other.csr, public=other.public)) == "nonce_mismatch"
    assert code_of(replace(good, csr=again.csr)) == "nonce_mismatch"
    assert code_of(replace(good, public=other.public)) == "devid_key_mismatch"
    assert code_of(replace(good, ak=machine().ak.public)) == "certify_signature"
    assert code_of(replace(good, signature=other.signature)) == "certify_signature"
    assert code_of(replace(good, attest=good.attest + b"\0")).startswith("certify")


@pytest.mark.parametrize(
    "attributes",
    [
        SVID_KEY_ATTRIBUTES & ~areas.FIXED_TPM,
        SVID_KEY_ATTRIBUTES & ~areas.FIXED_PARENT,
        SVID_KEY_ATTRIBUTES & ~areas.SENSITIVE_DATA_ORIGIN,
        SVID_KEY_ATTRIBUTES | areas.RESTRICTED,
    ],
)
@pytest.mark.asyncio
async def test_keys_that_may_be_elsewhere_get_nothing(attributes: int) -> None:
    request = await request_of(machine(), make_svid_key(attributes=attributes))
    assert code_of(request) == "devid_attributes"


@pytest.mark.asyncio
async def test_attestation_keys_that_prove_nothing_get_nothing() -> None:
    key = make_svid_key()
    free = SoftTpm(ek=make_ek("L-2"), ak=make_ak(attributes=SVID_KEY_ATTRIBUTES))
    assert code_of(await request_of(free, key)) == "ak_attributes"
    for parent in (OWNER, wire.RH_NULL.to_bytes(4, "big")):
        elsewhere = SoftTpm(ek=make_ek("L-2"), ak=make_ak(parent=parent))
        assert code_of(await request_of(elsewhere, key)) == "certify_signer"


@pytest.mark.asyncio
async def test_a_request_that_was_altered_does_not_hold() -> None:
    good = await request_of(machine(), make_svid_key())
    for place in range(0, 8 * len(good.csr), 13):
        bad = bytearray(good.csr)
        bad[place // 8] ^= 1 << place % 8
        with pytest.raises(SpireHwError):
            check_request(replace(good, csr=bytes(bad)))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"version":1}', b"[" * 60_000, bytes(70_000), b'{"version":2}'],
)
@pytest.mark.asyncio
async def test_what_is_no_request_is_refused(content: bytes) -> None:
    with pytest.raises(SpireHwError):
        parse_request(content)


@pytest.mark.asyncio
async def test_members_of_other_kinds_are_refused() -> None:
    good = json.loads((await request_of(machine(), make_svid_key())).encode())
    for name in ("csr", "public", "ak", "attest", "signature"):
        for value in (None, 5, "", "!", []):
            with pytest.raises(SpireHwError):
                parse_request(json.dumps({**good, name: value}).encode())
        short = {**good, name: base64.b64encode(b"x").decode()}
        with pytest.raises(SpireHwError):
            check_request(parse_request(json.dumps(short).encode()))


@given(st.binary(max_size=300))
def test_any_bytes_in_any_place_are_refused(data: bytes) -> None:
    parts = dict.fromkeys(("csr", "public", "ak", "attest", "signature"), data)
    with pytest.raises(SpireHwError):
        check_request(DevIdRequest(**parts))

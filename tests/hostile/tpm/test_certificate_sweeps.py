"""Every cut and every flipped bit of certificates and revocation lists, and many of them."""

from __future__ import annotations

import gc
import secrets
import sys
from datetime import UTC, datetime
from typing import Final

import pytest

from spire_hw.errors import AttestationError, ErrorKind, InvalidInputError, SpireHwError
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.tpm.crl import Revocations, parse_crl
from spire_hw.tpm.ekcert import EkRoots, verify_ek_certificate
from spire_hw_sim.ekca import CrlSpec, EkCa, ek_spec
from spire_hw_sim.softtpm import SoftTpm, make_ek, make_key
from spire_hw_sim.tpmnode import Vendor

NOW = datetime(2026, 6, 1, tzinfo=UTC)
VENDOR = Vendor.make()
CA = VENDOR.intermediate
ROOTS = EkRoots.of([parse_certificate(VENDOR.root.certificate)])
CA_CERTIFICATE = parse_certificate(CA.certificate)
LEAF = VENDOR.certify(SoftTpm(ek=make_ek("L-2")))
CRL = CA.issue_crl(CrlSpec([5]))
REPETITIONS: Final = 10_000
# A parsed certificate is some hundred objects: one that is kept for each round would show at once.
SPARE_BLOCKS: Final = 5_000


def _flipped(raw: bytes, bit: int) -> bytes:
    out = bytearray(raw)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def _verify(leaf: bytes, above: bytes = CA.certificate) -> None:
    verify_ek_certificate(parse_certificate(leaf), (above,), ROOTS, NOW)


def _refused(leaf: bytes, above: bytes = CA.certificate) -> ErrorKind | None:
    try:
        _verify(leaf, above)
    except SpireHwError as e:
        return e.kind
    return None


KINDS = {ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED}


@pytest.mark.parametrize("which", ["leaf", "intermediate"])
def test_no_flipped_bit_is_accepted(which: str) -> None:
    raw = LEAF if which == "leaf" else CA.certificate
    _verify(LEAF)
    for bit in range(8 * len(raw)):
        bad = _flipped(raw, bit)
        assert (_refused(bad) if which == "leaf" else _refused(LEAF, bad)) in KINDS


def test_no_cut_is_accepted() -> None:
    for end in range(len(LEAF)):
        assert _refused(LEAF[:end]) is ErrorKind.INVALID_ARGUMENT
        assert _refused(LEAF, CA.certificate[: min(end, len(CA.certificate) - 1)]) in KINDS


def test_no_changed_revocation_list_counts() -> None:
    leaf = parse_certificate(LEAF)

    def check(raw: bytes) -> None:
        Revocations([parse_crl(raw)], required=True).check(leaf, CA_CERTIFICATE, NOW)

    check(CRL)
    bad = [_flipped(CRL, bit) for bit in range(8 * len(CRL))]
    for raw in [*bad, *(CRL[:end] for end in range(len(CRL)))]:
        with pytest.raises((AttestationError, InvalidInputError)) as caught:
            check(raw)
        if isinstance(caught.value, AttestationError):
            assert caught.value.findings[0].code == "ek_revocation_unknown"


def test_refusals_leave_nothing_behind() -> None:
    """What strangers send, never the same twice: parsed, looked for a path, refused, forgotten."""
    stranger = EkCa.root("Vendor Root", make_key("secp256r1"))
    spec = ek_spec(make_ek("L-2").private.public_key())
    made = []
    for _ in range(200):
        key = make_key("secp256r1")
        between = stranger.child("Vendor EK CA", key)
        made.append((between.certificate, between.issue(spec)))

    def rounds(count: int) -> int:
        for number in range(count):
            above, leaf = made[number % len(made)]
            # Another signature: no cache has seen it.
            bent = above[:-8] + secrets.token_bytes(8)
            assert _refused(leaf, bent if number % 2 else above) in KINDS
        gc.collect()
        return sys.getallocatedblocks()

    before = rounds(REPETITIONS // 10)
    assert rounds(REPETITIONS) - before < SPARE_BLOCKS

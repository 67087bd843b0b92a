"""Attestation certificates as YubiHSM 2 is documented to make them; no device was at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.errors import AttestationError
from spire_hw.evidence.document import challenge
from spire_hw.evidence.yubihsm import verify_attestation
from spire_hw.key import spki_der
from spire_hw_sim.yubihsm import EXPORTABLE, SIGN_ECDSA, YubiHsm, capabilities, der

if TYPE_CHECKING:
    from cryptography import x509

_IMPORTED = 0x02
_KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
_SPKI = spki_der(_KEY)


@pytest.fixture(scope="module")
def maker() -> YubiHsm:
    return YubiHsm()


def chain_of(maker: YubiHsm, changed: dict[int, bytes | None] | None = None) -> list[bytes]:
    return maker.attestation(_KEY, changed or {})


def codes(maker: YubiHsm, chain: list[bytes], *roots: x509.Certificate) -> set[str]:
    with pytest.raises(AttestationError) as caught:
        verify_attestation(chain, _SPKI, roots)
    return {one.code for one in caught.value.findings}


def test_a_device_says_that_it_generated_a_key(maker: YubiHsm) -> None:
    said, is_trusted = verify_attestation(chain_of(maker), _SPKI, [maker.root])
    assert (said.serial, said.firmware, said.object_id) == (7654321, "2.4.0", 0x1234)
    assert not said.is_exportable
    assert is_trusted


def test_without_a_root_nobody_vouches_for_the_device(maker: YubiHsm) -> None:
    assert not verify_attestation(chain_of(maker), _SPKI, [])[1]


def test_a_chain_may_hold_the_root_itself(maker: YubiHsm) -> None:
    chain = [*chain_of(maker), der(maker.root)]
    assert verify_attestation(chain, _SPKI, [maker.root])[1]


def test_a_key_that_can_leave_under_a_wrapping_key_is_told(maker: YubiHsm) -> None:
    flags = capabilities(SIGN_ECDSA | EXPORTABLE)
    said, _ = verify_attestation(chain_of(maker, {5: flags}), _SPKI, [])
    assert said.is_exportable


def test_an_imported_key_is_refused(maker: YubiHsm) -> None:
    chain = chain_of(maker, {3: bytes((0x03, 0x02, 0x00, _IMPORTED))})
    assert codes(maker, chain) == {"not_generated"}


def test_another_makers_device_is_refused(maker: YubiHsm) -> None:
    assert codes(maker, chain_of(maker), YubiHsm().root) == {"statement_chain"}


def test_a_certificate_signed_by_another_device_is_refused(maker: YubiHsm) -> None:
    chain = [chain_of(maker)[0], der(YubiHsm().device)]
    assert codes(maker, chain) == {"statement_chain"}


def test_a_certificate_of_another_key_is_refused(maker: YubiHsm) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    assert codes(maker, maker.attestation(other, {})) == {"statement_key"}


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(
    "value", [None, b"", b"\x03", bytes.fromhex("0500"), bytes.fromhex("030301ffff")]
)
def test_a_certificate_that_is_not_as_documented_is_refused(
    maker: YubiHsm, number: int, value: bytes | None
) -> None:
    assert codes(maker, chain_of(maker, {number: value})) == {"statement_malformed"}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_chains_of_odd_lengths_are_refused(maker: YubiHsm, count: int) -> None:
    chain = (chain_of(maker) * 3)[:count]
    assert codes(maker, chain) == {"statement_malformed"}


def test_what_is_no_certificate_is_refused(maker: YubiHsm) -> None:
    assert codes(maker, [b"x", b"y"]) == {"statement_malformed"}


def test_a_challenge_tells_its_parts_apart() -> None:
    one = challenge(b"a" * 8, "b", b"c")
    assert one != challenge(b"a" * 9, "", b"c")
    assert one != challenge(b"a" * 8, "bc", b"")
    assert len(one) == 32

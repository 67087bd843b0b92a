"""Every cut and every flipped bit of what a TPM signs ends in a refusal of ours."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import AttestationError, SpireHwError
from spire_hw.tpm import verify
from spire_hw.tpm.public import TpmPublic, check_ak, parse_public
from spire_hw.tpm.verify import Statement
from spire_hw.tpm.wire import ClockInfo, PcrSelection
from spire_hw_sim.again import refused_now
from spire_hw_sim.softtpm import SoftTpm, make_svid_key

if TYPE_CHECKING:
    from collections.abc import Callable

PCRS = PcrSelection("sha256", (0, 2, 4, 7))


@dataclass(frozen=True)
class _Good:
    tpm: SoftTpm
    ak: TpmPublic
    expected: bytes
    quote: Statement
    certify: Statement
    key: TpmPublic
    creation: Statement
    creation_data: bytes
    time: Statement

    def check_quote(self, statement: Statement) -> None:
        verify.verify_quote(
            self.ak,
            self.tpm.ak.qualified_name,
            expected=self.expected,
            selections=(PCRS,),
            statement=statement,
            values=self.tpm.pcr_values(PCRS),
        )

    def check_certify(self, statement: Statement) -> None:
        verify.verify_certify(
            self.ak,
            self.tpm.ak.qualified_name,
            key=self.key,
            expected=self.expected,
            statement=statement,
        )

    def check_time(self, statement: Statement) -> None:
        verify.verify_time(
            self.ak,
            self.tpm.ak.qualified_name,
            expected=self.expected,
            statement=statement,
            quote=verify.Quote(
                {},
                ClockInfo(
                    self.tpm.clock_ms, self.tpm.reset_count, self.tpm.restart_count, safe=True
                ),
                self.tpm.firmware_version,
            ),
        )

    def check_creation(self, statement: Statement) -> None:
        verify.verify_creation(self.ak, self.creation_data, statement)


@pytest.fixture(scope="module")
def good() -> _Good:
    tpm, key, expected = SoftTpm(), make_svid_key(), secrets.token_bytes(32)
    data = tpm.creation_data()
    made = _Good(
        tpm=tpm,
        ak=parse_public(tpm.ak.public),
        expected=expected,
        quote=Statement(*tpm.quote((PCRS,), expected)),
        certify=Statement(*tpm.certify(key, expected)),
        key=parse_public(key.public),
        creation=Statement(*tpm.creation(data)),
        creation_data=data,
        time=Statement(*tpm.time(expected)),
    )
    made.check_quote(made.quote)
    made.check_certify(made.certify)
    made.check_creation(made.creation)
    made.check_time(made.time)
    return made


STATEMENTS = ["quote", "certify", "creation", "time"]


def _refused(check: Callable[[Statement], object], statement: Statement) -> AttestationError:
    error = refused_now(lambda: check(statement))
    assert isinstance(error, AttestationError)
    return error


def _flips(data: bytes) -> list[bytes]:
    return [
        data[: n // 8] + bytes((data[n // 8] ^ 1 << n % 8,)) + data[n // 8 + 1 :]
        for n in range(8 * len(data))
    ]


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_cut_is_refused(good: _Good, name: str) -> None:
    statement: Statement = getattr(good, name)
    check = getattr(good, f"check_{name}")
    for n in range(len(statement.attest)):
        cut = statement.attest[:n]
        for signature in (statement.signature, good.tpm.sign(cut)):
            _refused(check, Statement(cut, signature))
    for n in range(len(statement.signature)):
        _refused(check, Statement(statement.attest, statement.signature[:n]))


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_flipped_bit_is_refused(good: _Good, name: str) -> None:
    statement: Statement = getattr(good, name)
    check = getattr(good, f"check_{name}")
    for bent in _flips(statement.attest):
        error = _refused(check, Statement(bent, statement.signature))
        assert error.findings[0].code in {f"{name}_signature", f"{name}_malformed"}
    for bent in _flips(statement.signature):
        _refused(check, Statement(statement.attest, bent))


def test_every_flipped_bit_of_the_ak_area_is_refused(good: _Good) -> None:
    for bent in _flips(good.tpm.ak.public):
        with pytest.raises(SpireHwError):
            _prove(good, bent)
    _prove(good, good.tpm.ak.public)


def test_every_cut_of_the_ak_area_is_refused(good: _Good) -> None:
    for n in range(len(good.tpm.ak.public)):
        refused_now(lambda n=n: _prove(good, good.tpm.ak.public[:n]))  # type: ignore[misc]


def _prove(good: _Good, area: bytes) -> None:
    ak = parse_public(area)
    check_ak(ak)
    verify.verify_creation(ak, good.creation_data, good.creation)


def test_every_flipped_bit_of_the_creation_data_is_refused(good: _Good) -> None:
    for bent in _flips(good.creation_data):
        with pytest.raises(AttestationError):
            verify.verify_creation(good.ak, bent, good.creation)

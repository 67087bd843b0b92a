"""Counters behind attestation keys of the owner hierarchy: what a real TPM scrambles and what not."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPMA_OBJECT
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_SIG_SCHEME

from spire_hw.errors import AttestationError
from spire_hw.posture.evidence import Scramble
from spire_hw.tpm import verify, wire
from spire_hw.tpm.attest import read_pcrs
from spire_hw.tpm.device import shared
from spire_hw.tpm.public import parse_public, qualified_name
from spire_hw.tpm.verify import Statement
from spire_hw.tpm.wire import PcrSelection
from spire_hw_plugins.nodeattestor.tpm.statements import counters_of

if TYPE_CHECKING:
    from spire_hw.tpm.device import Connection
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
PCRS = PcrSelection("sha256", (0, 7))
ATTRIBUTES = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.SIGN_ENCRYPT
)


@dataclass(frozen=True)
class Said:
    """What one key said in one go."""

    area: bytes
    quote: Statement
    time: Statement
    values: dict[int, bytes]


def _speak(connection: Connection, hierarchy: ESYS_TR, qualifier: bytes) -> Said:
    esys = connection.esys
    template = TPM2B_PUBLIC.parse("ecc256:ecdsa-sha256:null", objectAttributes=ATTRIBUTES)
    made = connection.call(esys.create_primary, TPM2B_SENSITIVE_CREATE(), template, hierarchy)
    scheme = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)
    values = read_pcrs(connection, PCRS)
    with connection.loaded(made[0]) as key:
        quoted = connection.call(esys.quote, key, "sha256:0,7", qualifier, scheme)
        timed = connection.call(esys.get_time, key, qualifier, scheme)
    quote, time = (
        Statement(bytes(attest), bytes(sig.marshal())) for attest, sig in (quoted, timed)
    )
    return Said(bytes(made[1].marshal())[2:], quote, time, values)


async def _said(tpm: Swtpm, hierarchy: ESYS_TR, qualifier: bytes) -> Said:
    device = shared(tpm.tcti)
    try:
        return await device.run(
            "speak", lambda connection: _speak(connection, hierarchy, qualifier)
        )
    finally:
        await device.close()


def _prove(said: Said, hierarchy: int, qualifier: bytes) -> tuple[verify.Quote, verify.TrueTime]:
    ak = parse_public(said.area)
    place = qualified_name(hierarchy.to_bytes(4, "big"), ak.name)
    quote = verify.verify_quote(
        ak,
        place,
        expected=qualifier,
        selections=(PCRS,),
        statement=said.quote,
        values={"sha256": said.values},
    )
    return quote, verify.verify_time(
        ak, place, expected=qualifier, statement=said.time, quote=quote
    )


async def test_a_time_statement_tells_what_the_quotes_head_hides(tpm: Swtpm) -> None:
    for _ in range(2):
        tpm.reset()
        tpm.extend_pcr(0, b"firmware")
    qualifier = secrets.token_bytes(32)
    plain, true = _prove(
        await _said(tpm, ESYS_TR.ENDORSEMENT, qualifier), wire.RH_ENDORSEMENT, qualifier
    )
    assert plain.clock.reset_count == true.clock.reset_count >= 2
    hidden, told = _prove(await _said(tpm, ESYS_TR.OWNER, qualifier), wire.RH_OWNER, qualifier)
    assert hidden.clock.reset_count != told.clock.reset_count
    assert hidden.firmware_version != told.firmware_version
    assert told.clock.reset_count == true.clock.reset_count
    assert told.clock.restart_count == true.clock.restart_count
    assert told.firmware_version == true.firmware_version


async def test_what_a_tpm_adds_for_a_key_stays_the_same(tpm: Swtpm) -> None:
    """So later quotes of that key tell the true counters without a time statement."""
    qualifier = secrets.token_bytes(32)
    proved: set[Scramble] = set()
    resets = []
    for power in (None, True, False, True):
        if power is not None:
            tpm.reset(clean=power)
        tpm.extend_pcr(0, b"firmware")
        quote, told = _prove(await _said(tpm, ESYS_TR.OWNER, qualifier), wire.RH_OWNER, qualifier)
        said, true = (counters_of(s.clock, s.firmware_version) for s in (quote, told))
        proved.add(Scramble.between(said, true))
        (scramble,) = proved
        assert scramble.undo(said) == replace(true, clock_ms=said.clock_ms)
        resets.append(true.reset_count)
    assert resets == [resets[0] + n for n in range(4)]


async def test_a_cleared_tpm_has_another_key_and_adds_something_else(tpm: Swtpm) -> None:
    qualifier = secrets.token_bytes(32)
    said = []
    for _ in range(2):
        tpm.extend_pcr(0, b"firmware")
        spoken = await _said(tpm, ESYS_TR.OWNER, qualifier)
        quote, told = _prove(spoken, wire.RH_OWNER, qualifier)
        heads = [counters_of(s.clock, s.firmware_version) for s in (quote, told)]
        said.append((spoken.area, Scramble.between(*heads)))
        tpm.commands.clear()
    assert said[0][0] != said[1][0]
    assert said[0][1] != said[1][1]


async def test_a_time_statement_of_another_boot_is_refused(tpm: Swtpm) -> None:
    qualifier = secrets.token_bytes(32)
    before = await _said(tpm, ESYS_TR.OWNER, qualifier)
    tpm.reset()
    tpm.extend_pcr(0, b"firmware")
    after = await _said(tpm, ESYS_TR.OWNER, qualifier)
    mixed = Said(after.area, after.quote, before.time, after.values)
    with pytest.raises(AttestationError, match="nonce_mismatch"):
        _prove(mixed, wire.RH_OWNER, qualifier)

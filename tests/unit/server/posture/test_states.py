from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from spire_hw.posture.reasons import DEFAULT_ACTIONS
from spire_hw.posture.verdict import Action, Check, NodeState
from spire_hw_server.posture import states
from spire_hw_server.posture.states import HEALS, Heal, Standing

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)
S = NodeState


def bad(code: str, action: Action | None = None) -> Check:
    return Check("r", False, f"words on {code}", code, action or DEFAULT_ACTIONS[code])


GOOD = Check("r", True, "fine")


def at(state: NodeState, *reasons: str) -> Standing:
    return Standing(state, reasons, "words", NOW)


def after(standing: Standing, *checks: Check, anew: bool = False) -> Standing:
    return states.after_evidence(standing, checks, LATER, anew=anew)


@pytest.mark.parametrize("state", [S.NEW, S.ATTESTED, S.STALE])
def test_good_evidence_attests(state: NodeState) -> None:
    found = after(at(state), GOOD)
    assert (found.state, found.reasons, found.message) == (S.ATTESTED, (), "")


def test_time_of_a_state_is_that_of_its_beginning() -> None:
    assert after(at(S.ATTESTED), GOOD).since == NOW
    assert after(at(S.STALE), GOOD).since == LATER
    held = after(at(S.QUARANTINED, "uki"), bad("uki"))
    assert held.since == NOW
    assert after(held, bad("mok")).since == LATER


def test_heaviest_reason_decides_and_goes_first() -> None:
    found = after(at(S.ATTESTED), bad("dbx_old"), bad("pcr_mismatch"), bad("tpm_replaced"))
    assert found.state is S.BANNED
    assert found.reasons == ("tpm_replaced", "pcr_mismatch", "dbx_old")
    assert found.message == "words on tpm_replaced"


def test_refused_evidence_leaves_the_state() -> None:
    for state in S:
        standing = at(state, "x")
        assert after(standing, bad("clock_rollback")) == standing


def test_accepted_deviation_stays_until_the_node_attests() -> None:
    drifted = after(at(S.ATTESTED), bad("uki", Action.ACCEPT))
    assert (drifted.state, drifted.reasons) == (S.DRIFTED, ("uki",))
    assert after(drifted, GOOD) == drifted
    assert after(drifted, GOOD, anew=True).state is S.ATTESTED
    assert after(drifted, bad("uki", Action.ACCEPT), anew=True).state is S.DRIFTED


@pytest.mark.parametrize("code", DEFAULT_ACTIONS)
def test_quarantine_heals_by_evidence_unless_an_operator_has_to_look(code: str) -> None:
    held = after(at(S.ATTESTED), bad(code, Action.QUARANTINE))
    assert held.state is S.QUARANTINED
    assert held.is_cut_off
    healed = after(held, GOOD)
    assert (healed == held) is (HEALS.get(code) is Heal.OPERATOR)


def test_quarantine_of_an_operator_stands_whatever_the_machine_shows() -> None:
    held = states.quarantined_by_operator(at(S.ATTESTED), "odd", LATER)
    assert held.reason == "operator"
    assert "odd" in held.message
    for checks in ([GOOD], [bad("pcr_mismatch")], [bad("dbx_old")]):
        assert after(held, *checks) == held
    assert after(held, bad("ima_rollback")).state is S.BANNED


def test_nothing_leads_out_of_a_ban() -> None:
    banned = at(S.BANNED, "tpm_replaced")
    for checks in ([GOOD], [bad("pcr_mismatch")], [bad("uki", Action.ACCEPT)]):
        assert after(banned, *checks, anew=True) == banned
    assert states.quarantined_by_operator(banned, "", LATER) == banned
    assert states.after_silence(banned, NOW, Action.QUARANTINE, LATER) == banned


@pytest.mark.parametrize("state", [S.ATTESTED, S.DRIFTED])
def test_silence_makes_stale_once(state: NodeState) -> None:
    stale = states.after_silence(at(state), NOW, Action.ACCEPT, LATER)
    assert (stale.state, stale.reason) == (S.STALE, "stale")
    assert "12:00:00" in stale.message
    assert not stale.is_cut_off
    assert states.after_silence(stale, NOW, Action.ACCEPT, LATER) == stale


@pytest.mark.parametrize("state", [S.ATTESTED, S.DRIFTED, S.STALE])
def test_silence_may_cut_off(state: NodeState) -> None:
    held = states.after_silence(at(state), NOW, Action.QUARANTINE, LATER)
    assert (held.state, held.reasons) == (S.QUARANTINED, ("stale",))
    assert after(held, GOOD).state is S.ATTESTED


@pytest.mark.parametrize("state", [S.NEW, S.QUARANTINED, S.EXPIRED])
def test_silence_says_nothing_of_other_states(state: NodeState) -> None:
    standing = at(state, "x")
    assert states.after_silence(standing, NOW, Action.QUARANTINE, LATER) == standing


def test_release_leads_to_attested() -> None:
    assert states.released(LATER) == Standing(S.ATTESTED, (), "", LATER)

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from spire_hw.errors import Finding, InvalidInputError
from spire_hw.posture.diff import compare, judge_both
from spire_hw.posture.evaluate import evaluate
from spire_hw.posture.evidence import Evidence, ImaFacts, Tier
from spire_hw.posture.learn import learn
from spire_hw.posture.policyfile import parse_policy
from tests.property.posture.test_document_properties import evidences
from tests.unit.spire_hw.posture.samples import (
    BOOT,
    EK,
    GOOD,
    IMA,
    PCRS,
    booted,
    digest,
    good,
    measured,
    policy,
)

PLAIN = good(boot=None, ima=None)


def learnt(*evidences: Evidence) -> str:
    text = learn("web", evidences)
    made = parse_policy(text)
    for evidence in evidences:
        assert evaluate(made, evidence).holds
    return text


@pytest.mark.parametrize(
    "evidence",
    [
        GOOD,
        PLAIN,
        good(boot=None),
        good(ima=None),
        booted(secure_boot=False, debug_mode=True, dma_protection=False, uki=None, mok=False),
        booted(secure_boot=None, variables={}, db=(), dbx=frozenset(), authorities=(), sbat=""),
        booted(explained=tuple(range(8)), commands=(), files=(), mok_digests=()),
        good(tier=Tier.ACTIVATION, pcrs={}, boot=None, ima=None, key_in_tpm=False),
        good(pcrs={("sha256", 7): PCRS["sha256", 7]}, boot=None, ima=None),
        good(ek=replace(EK, root=None, manufacturer=None, model=None, version=None)),
        good(counters=None),
        good(ima=replace(IMA, entries=(), violations=4, padded_sha1=True)),
        good(ima=replace(IMA, entries=(measured(b"/a", algorithm="sha1", digest=bytes(20)),) * 4)),
    ],
)
def test_a_draft_accepts_what_it_was_learnt_from(evidence: Evidence) -> None:
    learnt(evidence)


def test_a_draft_denies_other_machines_and_states() -> None:
    made = parse_policy(learnt(GOOD))
    for changed in (
        booted(secure_boot=False),
        booted(images=BOOT.images[:2]),
        booted(dbx=frozenset()),
        booted(commands=("linux /evil",)),
        booted(variables={**BOOT.variables, "PK": digest("x").hex()}),
        good(key_in_tpm=False),
        good(pcrs={**PCRS, ("sha256", 0): bytes(32)}),
        good(ima=replace(IMA, entries=(measured(b"/evil"),))),
    ):
        holds = evaluate(made, changed).holds
        assert holds is (changed == booted(images=BOOT.images[:2]))
    assert [g.ek_hashes for g in made.nodes] == [frozenset({EK.hash})]


def test_several_machines_make_one_policy() -> None:
    other = replace(
        booted(images=(*BOOT.images[:2], replace(BOOT.images[2], digest=digest("kernel 2")))),
        ek=replace(EK, hash="f" * 64, model="other"),
        pcrs={**PCRS, ("sha256", 0): digest("other firmware")},
    )
    text = learnt(GOOD, other)
    assert '# selectors = ["manufacturer:id:4E544300"]' in text
    assert "model:" not in text
    made = parse_policy(text)
    assert len(made.pcrs["sha256", 0]) == 2


def test_a_draft_says_what_was_odd() -> None:
    assert "WARNING" not in learnt(GOOD)
    odd = booted(secure_boot=False, debug_mode=True, dma_protection=False)
    assert learnt(odd).count("WARNING") == 3
    assert "allow_pcr7_only" in learnt(good(pcrs={("sha256", 7): bytes(32)}, boot=None, ima=None))


@pytest.mark.parametrize(
    ("evidences", "message"),
    [
        ((), "at least one"),
        ((GOOD, good(boot=None)), "some of the evidence has a boot log"),
        ((GOOD, good(ima=None)), "some of the evidence has an IMA list"),
        ((GOOD, booted(bank="sha384")), "several banks: sha256, sha384"),
        ((booted(firmware_error=True),), "firmware reported an error"),
        ((good(findings=(Finding("ima_rollback", "ima: list was rewritten"),)),), "rewritten"),
        ((good(ima=replace(IMA, entries=(measured(b"/a", algorithm="sm3"),) * 4)),), "sm3"),
    ],
)
def test_bad_examples_are_refused(evidences: tuple[Evidence, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        learn("web", evidences)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(evidences)
def test_any_evidence_is_learnt_from_or_refused(evidence: Evidence) -> None:
    try:
        text = learn("web", [evidence])
    except InvalidInputError:
        return
    assert evaluate(parse_policy(text), evidence).holds


def test_differences_are_told_by_rule() -> None:
    one, other = "11" * 32, "22" * 32
    before = policy(
        f'pcrs {{ sha256 {{ "0" = ["{one}"] "4" = ["{one}"] }} }}\n'
        f'ima {{ allow = ["{one}  /a"] exclude = ["/x"] }}\ndrift {{ dbx_old = "ban" }}'
    )
    after = policy(
        f'version = 2\nnodes {{ selectors = ["model:x"] ek_hashes = ["{one}"] }}\n'
        f'pcrs {{ sha256 {{ "4" = ["{one}", "{other}"] }} }}\n'
        f'ima {{ allow = ["{other}  /a"] exclude = ["/y"] violations = 1 }}\n'
        f'boot {{ images = ["{one}"] }}'
    )
    assert compare(before, before) == []
    assert compare(before, replace(before, version=9, sha256="0" * 64)) == []
    found = {d.rule: (d.removed, d.added) for d in compare(before, after)}
    assert found.pop("nodes") == ((), (f"model:x and pub_hash:{one}",))
    assert found.pop("pcrs.sha256:0") == ((one,), ())
    assert found.pop("pcrs.sha256:4") == ((), (other,))
    assert found.pop("ima.files") == ((f'"/a" {one}',), (f'"/a" {other}',))
    assert found.pop("ima.exclude") == (('"/x"',), ('"/y"',))
    assert found.pop("ima.violations") == (("0",), ("1",))
    assert found.pop("drift.dbx_old") == (("ban",), ())
    assert found.pop("boot.images") == ((), (one,))
    assert found.pop("boot.secure_boot") == ((), ("on",))
    assert all(rule.startswith("boot.") for rule in found)
    assert {d.rule for d in compare(after, before)} >= {"nodes", "boot.images"}


def test_whom_a_difference_concerns() -> None:
    pin = f'pcrs {{ sha256 {{ "4" = ["{PCRS["sha256", 4].hex()}"] }} }}'
    strict = policy(f"{pin}\nboot {{ }}")
    change = judge_both(policy(pin), strict, booted(secure_boot=False))
    assert (change.before.holds, change.after.holds, change.changes) == (True, False, True)
    assert not judge_both(policy(pin), strict, GOOD).changes


def test_list_of_a_later_part_alone_is_not_all_there_is() -> None:
    for part in (ImaFacts(500, IMA.state, (measured(b"/a"),)), replace(IMA, entries=())):
        with pytest.raises(InvalidInputError, match="from its start"):
            learn("web", [good(ima=part)])

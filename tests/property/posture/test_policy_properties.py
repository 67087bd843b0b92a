"""Policies are operators' text and are held against whatever a node shows: neither leads astray."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spire_hw.errors import ConfigError, InvalidInputError
from spire_hw.posture.diff import compare, pcr_differences
from spire_hw.posture.evaluate import evaluate
from spire_hw.posture.learn import learn
from spire_hw.posture.policy import ek_selectors
from spire_hw.posture.policyfile import load_policy, parse_policy
from spire_hw.posture.policyset import PolicySet
from tests.property.posture.test_document_properties import evidences
from tests.unit.spire_hw.posture.samples import BOOT, GOOD

if TYPE_CHECKING:
    from spire_hw.posture.evidence import Evidence
    from spire_hw.posture.policy import Policy

TEXT = learn("web", [GOOD])
STRICT = parse_policy(TEXT)
SLOW = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
_FRAGMENTS = st.sampled_from(
    [
        '"',
        "{",
        "}",
        "[",
        "]",
        "=",
        "\n",
        "@x",
        "<<A\n",
        "A\n",
        "0",
        "policy",
        "boot",
        "ima",
        "#",
        ",",
    ]
)


@SLOW
@given(st.data())
def test_bent_text_is_read_or_refused(data: st.DataObject) -> None:
    text = TEXT
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(at, min(len(text), at + 40)))
        text = text[:at] + data.draw(_FRAGMENTS | st.text(max_size=4)) + text[end:]
    with contextlib.suppress(ConfigError):
        policy, packed = load_policy(text)
        assert load_policy(packed) == (policy, packed)
        assert packed == text


@SLOW
@given(evidences)
def test_any_evidence_gets_a_verdict(evidence: Evidence) -> None:
    verdict = evaluate(STRICT, evidence)
    assert not verdict.holds
    assert all(check.message.isprintable() for check in verdict.checks)
    assert all(bool(check.code) is not check.holds for check in verdict.checks)
    for difference in pcr_differences(STRICT, evidence):
        assert difference.machine not in difference.allowed


CHANGES = {
    "secure_boot": (False, None),
    "debug_mode": (True,),
    "dma_protection": (False,),
    "firmware_error": (True,),
    "variables": ({}, {**BOOT.variables, "PK": "0" * 64}),
    "db": ((*BOOT.db, "0" * 64),),
    "sbat": ("", "sbat,1,2000000000"),
    "dbx": (frozenset(), BOOT.dbx - {min(BOOT.dbx)}),
    "authorities": ((*BOOT.authorities, "0" * 64),),
    "images": ((), (*BOOT.images, replace(BOOT.images[-1], digest=bytes(32)))),
    "commands": ((*BOOT.commands, "linux /evil"),),
    "files": ((*BOOT.files, bytes(32)),),
    "uki": (None, "0" * 64),
    "mok_digests": ((*BOOT.mok_digests, bytes(32)),),
    "crtm_version": ("", "other"),
    "workarounds": (("other",),),
    "bank": ("sha384",),
    "explained": (BOOT.explained[:-1],),
}


def test_whatever_a_draft_was_learnt_from_is_demanded() -> None:
    free = {"log_sha256", "mok"}  # the digests of its lists are demanded
    assert {f.name for f in fields(BOOT)} == set(CHANGES) | free
    for name, values in CHANGES.items():
        for value in values:
            bent = replace(GOOD, boot=replace(BOOT, **{name: value}))  # type: ignore[arg-type]
            assert not evaluate(STRICT, bent).holds, (name, value)


groups = st.lists(
    st.sampled_from(["manufacturer:a", "manufacturer:b", "model:m", "pub_hash:" + "1" * 64]),
    unique=True,
    max_size=3,
)


def policy_for(name: str, alternatives: list[list[str]]) -> Policy:
    blocks = "\n".join(
        f"nodes {{ selectors = {json.dumps(group)} }}" for group in alternatives if group
    )
    return parse_policy(f'policy "{name}" {{ allow_any_state = true\n{blocks} }}')


@given(st.lists(st.lists(groups, min_size=1, max_size=3), max_size=4), groups)
def test_order_of_policies_does_not_matter_and_a_node_gets_one_that_is_for_it(
    alternatives: list[list[list[str]]], selectors: list[str]
) -> None:
    policies = [policy_for(f"p{n}", groups) for n, groups in enumerate(alternatives)]
    try:
        chosen = PolicySet.of(policies)
    except InvalidInputError:
        return
    assert PolicySet.of(reversed(policies)) == chosen
    found = chosen.policy_for(selectors)
    matching = [p for p in policies if any(group.has(selectors) for group in p.nodes)]
    defaults = [p for p in policies if not p.nodes]
    assert found in (matching or defaults or [None])


@SLOW
@given(evidences, evidences)
def test_policies_without_a_difference_say_the_same(one: Evidence, other: Evidence) -> None:
    texts = []
    for evidence in (one, other):
        try:
            texts.append(learn("web", [evidence]))
        except InvalidInputError:
            return
    before, after = map(parse_policy, texts)
    if not compare(before, after):
        for evidence in (one, other):
            assert evaluate(before, evidence).holds is evaluate(after, evidence).holds
    assert ek_selectors(one.ek)

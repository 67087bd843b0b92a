from __future__ import annotations

from dataclasses import replace

import pytest

from spire_hw.errors import InvalidInputError
from spire_hw.posture.evidence import EkFacts
from spire_hw.posture.firmware import is_older, parse_tpm_version, tpm_version_text
from spire_hw.posture.policy import Policy, ek_selectors
from spire_hw.posture.policyset import PolicySet
from tests.unit.spire_hw.posture.samples import EK, EK_HASH, MAKER, policy

ANY = "allow_any_state = true"


def group(name: str, *groups: str) -> Policy:
    return policy("\n".join([ANY, *(f"nodes {{ {inside} }}" for inside in groups)]), name)


BY_MAKER = f'selectors = ["manufacturer:{MAKER}"]'
BY_MODEL = f'selectors = ["manufacturer:{MAKER}", "model:NPCT75x"]'
BY_KEY = f'ek_hashes = ["{EK_HASH}"]'


def test_selectors_of_an_endorsement_key() -> None:
    assert ek_selectors(EK) == {
        f"pub_hash:{EK_HASH}",
        "ek:method:ca",
        f"ek:ca:{'a' * 64}",
        f"manufacturer:{MAKER}",
        "model:NPCT75x",
        "version:id:00070002",
    }
    assert ek_selectors(EkFacts("f" * 64, ("hash",))) == {f"pub_hash:{'f' * 64}", "ek:method:hash"}


def test_the_policy_that_names_a_node_most_closely_is_for_it() -> None:
    policies = [
        group("a-default"),
        group("b-maker", BY_MAKER),
        group("c-model", BY_MODEL, 'selectors = ["model:other"]'),
        group("d-key", BY_KEY),
    ]
    for given in (policies, policies[::-1]):
        chosen = PolicySet.of(given)
        assert [p.name for p in chosen] == ["a-default", "b-maker", "c-model", "d-key"]
        for count, ek, name in (
            (4, EK, "d-key"),
            (3, EK, "c-model"),
            (2, EK, "b-maker"),
            (1, EK, "a-default"),
            (4, replace(EK, hash="f" * 64, model="x"), "b-maker"),
            (4, EkFacts("f" * 64, ("hash",)), "a-default"),
        ):
            found = PolicySet.of(policies[:count]).policy_for(ek_selectors(ek))
            assert found is not None
            assert found.name == name
    assert PolicySet.of(policies).get("d-key") is policies[3]
    assert PolicySet.of(policies).get("x") is None


def test_without_a_match_there_is_no_policy() -> None:
    chosen = PolicySet.of([group("a", 'selectors = ["model:other"]'), group("b", BY_MAKER)])
    assert chosen.policy_for(ek_selectors(EkFacts("f" * 64, ("hash",)))) is None
    assert chosen.policy_for(()) is None
    assert PolicySet().policy_for(ek_selectors(EK)) is None
    assert not PolicySet()
    assert chosen


def test_of_groups_that_rank_alike_the_first_by_name_goes_first() -> None:
    one, other = group("b", BY_MAKER), group("a", 'selectors = ["model:NPCT75x"]')
    found = PolicySet.of([one, other]).policy_for(ek_selectors(EK))
    assert found is other


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (group("a", BY_KEY), group("a", BY_MAKER), 'policy "a" is there twice'),
        (group("a"), group("b"), "are both for every node"),
        (group("a", BY_MAKER), group("b", "ek_hashes = []" and BY_MAKER), "for the same nodes"),
        (group("a", BY_KEY), group("b", f'ek_hashes = ["{"f" * 64}", "{EK_HASH}"]'), "same nodes"),
    ],
)
def test_policies_for_the_same_nodes_are_refused(one: Policy, other: Policy, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        PolicySet.of([one, other])


@pytest.mark.parametrize(
    ("version", "floor", "older"),
    [
        ("1.2", "1.2", False),
        ("1.10", "1.9", False),
        ("1.9", "1.10", True),
        ("1.2", "1.2.1", True),
        ("1.2.1", "1.2", False),
        ("N2CET63W (1.46 )", "N2CET63W (1.47 )", True),
        ("N2CET64W", "N2CET63W", False),
        ("N3CET64W", "N2CET99W", False),
        ("X99", "Y1", True),
        ("hex:00ff", "1.0", True),
        ("", "1", True),
        ("1.²", "1.1", True),
        ("9" * 5000, "1", False),
    ],
)
def test_firmware_is_compared_number_by_number(version: str, floor: str, older: bool) -> None:
    assert is_older(version, floor) is older


def test_versions_of_tpm_firmware() -> None:
    number = parse_tpm_version("7.85.4555.0")
    assert number == 0x0007005511CB0000
    assert tpm_version_text(number) == "7.85.4555.0"
    assert parse_tpm_version("7.85") == parse_tpm_version("0x0007005500000000")
    for wrong in ("", "7.", "-1", "1.2.3.4.5", "65536", "0x", "0x1" + "0" * 16, "\u0667", "7\n"):
        with pytest.raises(InvalidInputError):
            parse_tpm_version(wrong)

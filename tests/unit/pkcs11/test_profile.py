"""Profiles: what each kind of token is sent, and how one is chosen."""

from __future__ import annotations

import pytest

from spire_hw.errors import InvalidInputError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.pkcs11.keyring.fitness import check_pss, check_type
from spire_hw.pkcs11.keys import CKM_EC_KEY_PAIR_GEN, CKM_ECDSA, CKM_RSA_PKCS, CKM_RSA_PKCS_PSS
from spire_hw.pkcs11.pool.seat import TokenFacts
from spire_hw.pkcs11.profile import ESSENTIAL, PROFILES, Profile, ProfileChoice, detect

SIGN_ONLY = {"DECRYPT": False, "UNWRAP": False, "DERIVE": False}
MECHANISMS = frozenset({0x0, CKM_EC_KEY_PAIR_GEN, CKM_ECDSA, CKM_RSA_PKCS, CKM_RSA_PKCS_PSS})


def facts(profile: Profile, mechanisms: frozenset[int] = MECHANISMS) -> TokenFacts:
    return TokenFacts("t", "1", "m", can_write=True, mechanisms=mechanisms, profile=profile)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_every_profile_asks_for_keys_that_stay_in_the_token(profile: Profile) -> None:
    for chosen in (profile, profile.minimal):
        private = chosen.private_template
        assert private["PRIVATE"] is True
        assert private["SENSITIVE"] is True
        assert private["EXTRACTABLE"] is False
        assert not any(value for name, value in private.items() if name not in ESSENTIAL)
        assert not any(chosen.public_template.values())


@pytest.mark.parametrize(
    ("name", "private", "public"),
    [
        ("softhsm", {**SIGN_ONLY, "SIGN_RECOVER": False, "COPYABLE": False}, None),
        ("generic", {**SIGN_ONLY, "SIGN_RECOVER": False}, None),
        ("tpm2", {"UNWRAP": False, "DERIVE": False}, {"PRIVATE": False}),
        ("yubihsm2", {**SIGN_ONLY, "SIGN_RECOVER": False, "COPYABLE": False}, None),
        ("smartcard-hsm", SIGN_ONLY, None),
        ("luna", {**SIGN_ONLY, "SIGN_RECOVER": False}, None),
        ("nshield", {**SIGN_ONLY, "SIGN_RECOVER": False}, None),
        ("cloudhsm", SIGN_ONLY, {"ENCRYPT": False, "WRAP": False}),
        ("gcp-kmsp11", {}, {}),
        ("aws-kms", {}, {}),
    ],
)
def test_a_profile_leaves_out_what_its_token_refuses(
    name: str, private: dict[str, bool], public: dict[str, bool] | None
) -> None:
    profile = PROFILES[name]
    sent = {n: v for n, v in profile.private_template.items() if n not in ESSENTIAL}
    assert sent == private
    wanted = {"PRIVATE": False, "ENCRYPT": False, "WRAP": False} if public is None else public
    assert profile.public_template == wanted


def test_minimal_adds_nothing_that_the_profile_left_out() -> None:
    for profile in PROFILES.values():
        assert profile.minimal.public_template.items() <= profile.public_template.items()
        assert profile.minimal.private_template.items() <= profile.private_template.items()
        assert profile.minimal.minimal == profile.minimal
    assert PROFILES["gcp-kmsp11"].minimal == PROFILES["gcp-kmsp11"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["SoftHSM project", "SoftHSM v2"], "softhsm"),
        (["IBM", "SW   TPM", "tpm2-software.github.io"], "tpm2"),
        (["Infineon", "SLB9670", "/x", "libtpm2_pkcs11.so.1"], "tpm2"),
        (["Yubico", "YubiHSM"], "yubihsm2"),
        (["Yubico (www.yubico.com)", "YubiKey YK5"], "generic"),
        (["www.CardContact.de", "PKCS#15 emulated"], "smartcard-hsm"),
        (["SafeNet", "LunaSA 7.0"], "luna"),
        (["nCipher Corp. Ltd", ""], "nshield"),
        (["Marvell Semiconductors, Inc.", ""], "cloudhsm"),
        (["", "libkmsp11.so"], "gcp-kmsp11"),
        (["Acme", "Box 1"], "generic"),
        ([], "generic"),
    ],
)
def test_a_tokens_own_words_choose_its_profile(words: list[str], name: str) -> None:
    assert detect(words) == name
    assert ProfileChoice().resolve(words).name == name
    assert ProfileChoice("luna").resolve(words).name == "luna"


def test_single_fields_are_overridden_and_travel_to_workers() -> None:
    given = {"omit_private": ["SIGN_RECOVER"], "id_bytes": 4, "rsa_key_gen": "x9.31"}
    choice = ProfileChoice.from_dict(ProfileChoice("softhsm", given).to_dict())
    profile = choice.resolve(())
    assert profile.name == "softhsm"
    assert set(profile.private_template) - ESSENTIAL == {"DECRYPT", "UNWRAP", "DERIVE", "COPYABLE"}
    assert (profile.id_bytes, profile.rsa_mechanism) == (4, 0xA)
    assert profile.data_objects


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"omit_private": ["EXTRACTABLE"]}, "taken out of the token"),
        ({"omit_private": ["VALUE"]}, "not VALUE"),
        ({"omit_public": ["VALUE"]}, "not VALUE"),
        ({"pss_salts": "none"}, "any, hash"),
        ({"rsa_key_gen": "fips"}, "x9.31"),
        ({"name": "other"}, "no name"),
        ({"marks": ["x"]}, "no marks"),
    ],
)
def test_an_override_cannot_weaken_keys_or_name_nonsense(
    overrides: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        ProfileChoice("generic", overrides).resolve(())


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match="yubihsm2"):
        ProfileChoice("fancy").resolve(())


def test_key_types_beyond_the_token_are_refused() -> None:
    tpm2 = facts(PROFILES["tpm2"])
    check_type(KeyType.RSA_2048, tpm2)
    check_type(KeyType.EC_P384, tpm2)
    with pytest.raises(TokenError, match="RSA ends at 3072"):
        check_type(KeyType.RSA_4096, tpm2)
    fips = PROFILES["luna"].changed({"rsa_key_gen": "x9.31"})
    with pytest.raises(TokenError, match="0xa"):
        check_type(KeyType.RSA_2048, facts(fips))
    check_type(KeyType.RSA_2048, facts(fips, MECHANISMS | {0xA}))


def test_salts_the_token_cannot_use_are_refused_before_it_is_asked() -> None:
    options = SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=20)
    check_pss(options, facts(PROFILES["softhsm"]))
    with pytest.raises(InvalidInputError, match="the hash's only"):
        check_pss(options, facts(PROFILES["tpm2"]))
    check_pss(SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=32), facts(PROFILES["tpm2"]))
    check_pss(SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=-1), facts(PROFILES["tpm2"]))


def test_our_labels_fit_the_shortest_field_there_is() -> None:
    label = Owner("a" * 255, "s" * 64).key_label("bundle-acme-example.org+rsa", 36**6 - 1)
    assert len(label.encode()) <= 40  # YubiHSM 2

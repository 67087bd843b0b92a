"""What is particular to one maker's tokens, as data (pure).

Templates are the least portable part of PKCS#11, and limits come next. A profile says which
attributes a token must not be sent, how long its ids may be, and what it lacks. Nothing here is
needed to read a key: profiles matter when keys are made, and where a token cannot do what it lists.

The operator names a profile, or the token's own words choose one; any field may be overridden.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# What is said of the two halves of a new pair, unless a profile leaves it out.
PRIVATE_TEMPLATE: Final = {
    "PRIVATE": True,
    "SENSITIVE": True,
    "EXTRACTABLE": False,
    "DECRYPT": False,
    "UNWRAP": False,
    "DERIVE": False,
    "SIGN_RECOVER": False,  # SoftHSM allows it unless told otherwise
    "COPYABLE": False,
}
PUBLIC_TEMPLATE: Final = {"PRIVATE": False, "ENCRYPT": False, "WRAP": False}
# Without these a token may make a key that can be taken out of it.
ESSENTIAL: Final = frozenset({"PRIVATE", "SENSITIVE", "EXTRACTABLE"})
# What a key of ours must not be good for, besides signing.
USAGES: Final = frozenset({"DECRYPT", "UNWRAP", "DERIVE"})
_USAGE: Final = USAGES | {"SIGN_RECOVER", "COPYABLE"}
_PUBLIC_USAGE: Final = frozenset({"ENCRYPT", "WRAP"})
RSA_KEY_GEN: Final = {"pkcs": 0x0, "x9.31": 0xA}
# Who logs in, unless it is a profile's `crypto_user`.
USER: Final = "user"
PSS_SALTS: Final = frozenset({"any", "hash"})


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of token.

    Attributes:
        name: what the operator calls it.
        omit_private: attributes not sent for the private half.
        omit_public: attributes not sent for the public half.
        usage_allowed: what this kind of token permits every key, so that it must not be held
            against one; any of `USAGES`.
        id_bytes: length of a CKA_ID; short ones are drawn until one is free.
        data_objects: whether the token keeps data objects; without, the host's note is the only one.
        generates: whether pairs can be made over PKCS#11 with a label and an id of ours.
        read_write_only: whether the module has no read-only sessions.
        pss_salts: `any`, or `hash` for salts as long as the hash only.
        max_rsa_bits: the longest RSA key it makes.
        rsa_key_gen: mechanism of RSA pairs, a name of `RSA_KEY_GEN`.
        keepalive: whether a session that rests must be kept busy lest the device end it.
        tells_memory: whether what it says of its free memory, if anything, can be believed.
        max_workers: how many processes it serves at once.
        crypto_user: CKU number of a user of the maker's own who may use keys and make none, None
            where there is no such user.
        marks: what its own words or its module's file name contain, in small letters.
    """

    name: str
    omit_private: frozenset[str] = frozenset()
    omit_public: frozenset[str] = frozenset()
    usage_allowed: frozenset[str] = frozenset()
    id_bytes: int = 16
    data_objects: bool = True
    generates: bool = True
    read_write_only: bool = False
    pss_salts: str = "any"
    max_rsa_bits: int = 4096
    rsa_key_gen: str = "pkcs"
    keepalive: bool = False
    tells_memory: bool = True
    max_workers: int = 32
    crypto_user: int | None = None
    marks: tuple[str, ...] = field(default=(), repr=False)

    @property
    def private_template(self) -> dict[str, bool]:
        """Return what is said of a private half."""
        return {n: v for n, v in PRIVATE_TEMPLATE.items() if n not in self.omit_private}

    @property
    def public_template(self) -> dict[str, bool]:
        """Return what is said of a public half."""
        return {n: v for n, v in PUBLIC_TEMPLATE.items() if n not in self.omit_public}

    @property
    def minimal(self) -> Profile:
        """Return the same with nothing in its templates that could be left out."""
        return replace(
            self,
            omit_private=frozenset(PRIVATE_TEMPLATE) - ESSENTIAL,
            omit_public=frozenset(PUBLIC_TEMPLATE) - ESSENTIAL | self.omit_public,
        )

    @property
    def rsa_mechanism(self) -> int:
        """Return the CKM number that makes RSA pairs."""
        return RSA_KEY_GEN[self.rsa_key_gen]

    def changed(self, overrides: Mapping[str, Any]) -> Profile:
        """Return the profile with some fields as an operator wants them.

        Args:
            overrides: by field name; attribute lists as lists of names without `CKA_`.

        Raises:
            InvalidInputError: no such field, or a value it cannot take.
        """
        values: dict[str, Any] = {}
        for name, value in overrides.items():
            if name not in OVERRIDABLE:
                raise InvalidInputError(f"a profile has no {name}")
            values[name] = frozenset(value) if name in _NAMES_OF else value
        result = replace(self, **values)
        _check(result)
        return result


_NAMES_OF: Final = {
    "omit_private": frozenset(PRIVATE_TEMPLATE),
    "omit_public": frozenset(PUBLIC_TEMPLATE),
    "usage_allowed": USAGES,
}
OVERRIDABLE: Final = frozenset(f.name for f in fields(Profile)) - {
    "name",
    "crypto_user",
    "marks",
}


def _check(profile: Profile) -> None:
    for name, known in _NAMES_OF.items():
        odd = sorted(getattr(profile, name) - known)
        if odd:
            raise InvalidInputError(
                f"{name} knows {', '.join(sorted(known))}, not {', '.join(odd)}"
            )
    missing = sorted(profile.omit_private & ESSENTIAL)
    if missing:
        raise InvalidInputError(
            f"omit_private cannot leave out {', '.join(missing)}: keys could be taken out of the token"
        )
    if profile.rsa_key_gen not in RSA_KEY_GEN:
        raise InvalidInputError(f"rsa_key_gen is one of {', '.join(RSA_KEY_GEN)}")
    if profile.pss_salts not in PSS_SALTS:
        raise InvalidInputError(f"pss_salts is one of {', '.join(sorted(PSS_SALTS))}")


_GENERIC: Final = Profile("generic", omit_private=frozenset({"COPYABLE"}))
PROFILES: Final = {
    p.name: p
    for p in (
        _GENERIC,
        Profile("softhsm", marks=("softhsm",)),
        Profile(
            "tpm2",
            # Some FALSE usage flags are answered with CKR_GENERAL_ERROR, and every key may decrypt:
            # for an EC key that means key agreement.
            omit_private=frozenset({"DECRYPT", "SIGN_RECOVER", "COPYABLE"}),
            omit_public=_PUBLIC_USAGE,
            usage_allowed=frozenset({"DECRYPT"}),
            pss_salts="hash",
            max_rsa_bits=3072,
            marks=("tpm2-software", "tpm2_pkcs11", "tpm2.0 cryptoki"),
        ),
        Profile(
            "yubihsm2",
            # Ids and labels beyond the device's own fields cost one of its 256 objects each.
            id_bytes=2,
            data_objects=False,
            keepalive=True,
            max_workers=8,
            marks=("yubihsm",),
        ),
        Profile(
            "smartcard-hsm",
            omit_private=frozenset({"COPYABLE", "SIGN_RECOVER"}),
            data_objects=False,
            max_workers=1,
            marks=("cardcontact", "smartcard-hsm"),
        ),
        Profile(
            "luna",
            omit_private=frozenset({"COPYABLE"}),
            keepalive=True,
            crypto_user=0x80000001,  # CKU_LIMITED_USER of its headers
            marks=("safenet", "gemalto", "thales", "luna", "libcryptoki2"),
        ),
        Profile(
            "nshield",
            omit_private=frozenset({"COPYABLE"}),
            marks=("ncipher", "entrust", "nshield", "libcknfast"),
        ),
        Profile(
            "cloudhsm",
            omit_private=frozenset({"COPYABLE", "SIGN_RECOVER"}),
            # Every object has to be private there, public halves included.
            omit_public=frozenset({"PRIVATE"}),
            data_objects=False,
            read_write_only=True,
            keepalive=True,
            marks=("cloudhsm", "cavium", "marvell"),
        ),
        Profile(
            "gcp-kmsp11",
            omit_private=_USAGE,
            omit_public=frozenset(PUBLIC_TEMPLATE),
            data_objects=False,
            generates=False,
            pss_salts="hash",
            marks=("kmsp11",),
        ),
        Profile(
            "aws-kms",
            omit_private=_USAGE,
            omit_public=frozenset(PUBLIC_TEMPLATE),
            data_objects=False,
            generates=False,
            pss_salts="hash",
            marks=("aws_kms", "aws-kms"),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class ProfileChoice:
    """What the operator said about profiles.

    Attributes:
        name: a name of `PROFILES`, "" to go by the token.
        overrides: fields to be changed.
    """

    name: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self, words: Iterable[str]) -> Profile:
        """Return the profile of a token.

        Args:
            words: what token, slot, library and module file name say of themselves.

        Raises:
            InvalidInputError: there is no such profile or field.
        """
        name = self.name or detect(words)
        profile = PROFILES.get(name)
        if profile is None:
            raise InvalidInputError(
                f'profile "{name}" is not known; there are {", ".join(sorted(PROFILES))}'
            )
        return profile.changed(self.overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that travel to a worker."""
        return {"name": self.name, "overrides": dict(self.overrides)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ProfileChoice:
        """Rebuild what `to_dict` gave."""
        return cls(str(given["name"]), dict(given["overrides"]))


def detect(words: Iterable[str]) -> str:
    """Return the name of the profile that fits a token's words, `generic` when none does."""
    text = "\n".join(words).lower()
    for profile in PROFILES.values():
        if any(mark in text for mark in profile.marks):
            return profile.name
    return _GENERIC.name

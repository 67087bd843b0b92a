"""The profile of a token as an operator configures it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from spire_hw.config.schema import Model, nearest
from spire_hw.errors import InvalidInputError
from spire_hw.pkcs11.profile import PROFILES, ProfileChoice

if TYPE_CHECKING:
    from collections.abc import Callable


class ProfileOverrides(Model):
    """Fields of `spire_hw.pkcs11.profile.Profile`; what is not given stays as the profile has it."""

    omit_private: list[str] = Field(default_factory=list)
    omit_public: list[str] = Field(default_factory=list)
    usage_allowed: list[str] = Field(default_factory=list)
    id_bytes: Annotated[int, Field(ge=2, le=64)] = 16
    data_objects: bool = True
    generates: bool = True
    read_write_only: bool = False
    pss_salts: str = "any"
    max_rsa_bits: Annotated[int, Field(ge=2048, le=16384)] = 4096
    rsa_key_gen: str = "pkcs"
    keepalive: bool = False
    tells_memory: bool = True
    max_workers: Annotated[int, Field(ge=1, le=32)] = 32


def choice_of(
    name: str, overrides: ProfileOverrides, fault: Callable[[str, str], None]
) -> ProfileChoice:
    """Return what was configured.

    Args:
        name: the field `profile`; "" to go by the token.
        overrides: the block `profile_overrides`.
        fault: told the field and what is wrong with it.
    """
    given = {field: getattr(overrides, field) for field in overrides.model_fields_set}
    choice = ProfileChoice(name, given)
    if name and name not in PROFILES:
        known = ", ".join(sorted(PROFILES))
        fault("profile", f'profile "{name}" is not known{nearest(name, PROFILES)} ({known})')
        return choice
    try:
        choice.resolve(())
    except InvalidInputError as e:
        fault("profile_overrides", e.message)
    return choice

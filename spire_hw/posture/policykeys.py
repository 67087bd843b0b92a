"""The keys of a policy file, as they are written; what they come to is in `policyfile`.

Lists of digests take hexadecimal, and `"@NAME"` for all digests of a file that belongs to the
policy; see `digestlist`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, create_model

from spire_hw.config.schema import Model
from spire_hw.posture.policy import PCR_COUNT
from spire_hw.posture.reasons import DEFAULT_ACTIONS

_MAX_VERSION: Final = 2**31 - 1

_Pcr = Annotated[int, Field(ge=0, lt=PCR_COUNT)]
_Bank = Literal["sha1", "sha256", "sha384", "sha512"]
_FileDigest = Literal["sha1", "sha256", "sha384", "sha512", "verity:sha256", "verity:sha512"]
_Action = Literal["accept", "refuse", "quarantine", "ban"]


class FileKeys(Model):
    """`file "NAME" { }` beside the policy: a file that belongs to it, as text or as Base64."""

    content: str | None = None
    base64: str | None = None


class NodesKeys(Model):
    """`nodes { }`: which nodes; several blocks are alternatives."""

    selectors: list[str] = Field(default_factory=list)
    ek_hashes: list[str] | None = None


class FloorKeys(Model):
    """`firmware_floor "MANUFACTURER" { }`."""

    version: str


class TpmKeys(Model):
    """`tpm { }`."""

    roots: list[str] | None = None
    manufacturers: list[str] = Field(default_factory=list)
    models: list[str] = Field(default_factory=list)
    key_in_tpm: bool = True
    counters: bool = False
    firmware_floor: dict[str, FloorKeys] = Field(default_factory=dict)


# Allowed values of one bank: keys are the PCR numbers.
BankKeys = create_model(
    "BankKeys",
    __base__=Model,
    **{f"pcr{n}": (list[str] | None, Field(None, alias=str(n))) for n in range(PCR_COUNT)},  # type: ignore[call-overload]
)


class PcrsKeys(Model):
    """`pcrs { }` and `pcr_set "NAME" { }`: allowed values by bank."""

    sha1: BankKeys | None = None  # type: ignore[valid-type]
    sha256: BankKeys | None = None  # type: ignore[valid-type]
    sha384: BankKeys | None = None  # type: ignore[valid-type]
    sha512: BankKeys | None = None  # type: ignore[valid-type]


class QuoteKeys(Model):
    """`quote { }`: PCRs that are quoted besides those with rules, by bank."""

    sha1: list[_Pcr] = Field(default_factory=list)
    sha256: list[_Pcr] = Field(default_factory=list)
    sha384: list[_Pcr] = Field(default_factory=list)
    sha512: list[_Pcr] = Field(default_factory=list)


class VariablesKeys(Model):
    """`variables { }`: SHA-256 of the data of Secure Boot variables."""

    pk: list[str] | None = Field(None, alias="PK")
    kek: list[str] | None = Field(None, alias="KEK")
    db: list[str] | None = None
    dbx: list[str] | None = None


class BootKeys(Model):
    """`boot { }`: what the boot log has to tell."""

    secure_boot: Literal["on", "off", "any"] = "on"
    allow_debug_mode: bool = False
    allow_dma_protection_off: bool = False
    allow_empty_secure_boot: bool = False
    allow_early_authority: bool = False
    variables: VariablesKeys | None = None
    db: list[str] | None = None
    dbx_floor: list[str] | None = None
    sbat_floor: Annotated[int, Field(ge=0)] | None = None
    authorities: list[str] | None = None
    images: list[str] | None = None
    revoked_images: list[str] | None = None
    option_roms: list[str] | None = None
    commands: list[str] | None = None
    files: list[str] | None = None
    uki: list[str] | None = None
    mok: Literal["absent", "present", "any"] = "any"
    mok_digests: list[str] | None = None
    firmware_versions: list[str] | None = None
    firmware_floor: str | None = None
    workarounds: list[str] | None = None


class ImaKeys(Model):
    """`ima { }`: what files may have been used."""

    allow: list[str] | None = None
    any_path: bool = False
    exclude: list[str] = Field(default_factory=list)
    keyring: list[str] | None = None
    algorithms: list[_FileDigest] = ["sha256", "sha384", "sha512"]  # noqa: RUF012 - pydantic copies it
    violations: Annotated[int, Field(ge=0)] = 0
    allow_padded_sha1: bool = False


# What reasons do that are to do something else than by default.
DriftKeys = create_model(
    "DriftKeys",
    __base__=Model,
    **dict.fromkeys(DEFAULT_ACTIONS, (_Action | None, None)),  # type: ignore[call-overload]
)


class PolicyKeys(Model):
    """`policy "NAME" { }`."""

    version: Annotated[int, Field(ge=1, le=_MAX_VERSION)] | None = None
    description: str = ""
    nodes: list[NodesKeys] = Field(default_factory=list)
    tpm: TpmKeys = TpmKeys()
    bank: _Bank = "sha256"
    pcrs: PcrsKeys | None = None
    pcr_set: dict[str, PcrsKeys] = Field(default_factory=dict)
    quote: QuoteKeys | None = None
    boot: BootKeys | None = None
    ima: ImaKeys | None = None
    drift: DriftKeys | None = None  # type: ignore[valid-type]
    allow_pcr7_only: bool = False
    allow_any_state: bool = False
    allow_sha1: bool = False


class FileModel(Model):
    """The whole text."""

    policy: dict[str, PolicyKeys]
    file: dict[str, FileKeys] = Field(default_factory=dict)

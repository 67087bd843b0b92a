"""What an operator says about `tpm_devid` on the server, and what it comes to.

`ServerConfig` is the plugin_data as written; `Settings` is what the server half works with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from spire_hw.config.schema import Model, check
from spire_hw.errors import ConfigError, ConfigFault
from spire_hw.files import parse_file
from spire_hw.tpm.certificate import Certificate, parse_certificate
from spire_hw.tpm.ekcert import ChainTime, EkRoots
from spire_hw.x509.certificate import load_pem, parse_pem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography import x509

    from spire_hw.config.hcl import Body

_MAX_FILE_BYTES: Final = 16 << 20
_REQUIRED: Final = ("devid_ca_path", "endorsement_ca_path")


class ServerConfig(Model):
    """The plugin_data of NodeAttestor `tpm_devid` on a server.

    Attributes:
        devid_ca_path: PEM file of the authorities that issue DevID certificates.
        endorsement_ca_path: PEM file of the TPM makers' authorities.
        ek_chain_time: how dates on the endorsement certificate's path are judged.
    """

    devid_ca_path: str = ""
    endorsement_ca_path: str = ""
    ek_chain_time: Literal["strict", "issuer_at_leaf_issuance", "ignore"] = (
        "issuer_at_leaf_issuance"
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server half works with.

    Attributes:
        devid_roots: who may issue DevID certificates.
        ek_roots: who may issue endorsement certificates; each of them ends a path, as upstream
            takes the file.
        chain_time: how dates on that path are judged.
    """

    devid_roots: tuple[x509.Certificate, ...]
    ek_roots: EkRoots
    chain_time: ChainTime


def find_faults(body: Body) -> list[ConfigFault]:
    """Return what is wrong with a configuration, without touching any file."""
    raw, found = check(body, ServerConfig)
    return found if raw is None else list(_missing(raw))


def build_settings(body: Body) -> Settings:
    """Check a configuration and read the files it names.

    Raises:
        ConfigError: it has faults.
        NotReadyError: a file cannot be read.
        InvalidInputError: a file holds something else than certificates.
    """
    raw, found = check(body, ServerConfig)
    if raw is not None:
        found = list(_missing(raw))
    if raw is None or found:
        raise ConfigError(body.file or "configuration", found)
    devid, makers = Path(raw.devid_ca_path), Path(raw.endorsement_ca_path)
    roots = tuple(parse_file(devid, _MAX_FILE_BYTES, load_pem, "devid_ca_path"))
    anchors = parse_file(makers, _MAX_FILE_BYTES, _parse_makers, "endorsement_ca_path")
    return Settings(roots, EkRoots(anchors=anchors), ChainTime(raw.ek_chain_time))


def _missing(raw: ServerConfig) -> Iterator[ConfigFault]:
    for name in _REQUIRED:
        if not getattr(raw, name):
            yield ConfigFault(raw.line(name), f"{name} is required")


def _parse_makers(text: bytes) -> tuple[Certificate, ...]:
    # Not with the parser of the other file, which is stricter: makers' certificates are odd.
    return tuple(parse_certificate(der, "certificate") for der in parse_pem(text))

"""What an operator says about `tpm_devid` on the server, and what it comes to.

`ServerConfig` is the plugin_data as written; `Settings` is what the server half works with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from spire_hw.config.schema import Model, check
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError, NotReadyError
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.tpm.ekcert import ChainTime, EkRoots
from spire_hw.x509.certificate import load_certificate, parse_pem

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
    try:
        roots = tuple(map(load_certificate, _read(devid)))
    except InvalidInputError as e:
        raise InvalidInputError(f"devid_ca_path {devid}: {e.message}") from e
    try:
        # Not with the strict parser above: makers' certificates are odd.
        anchors = tuple(parse_certificate(der, "certificate") for der in _read(makers))
    except InvalidInputError as e:
        raise InvalidInputError(f"endorsement_ca_path {makers}: {e.message}") from e
    return Settings(roots, EkRoots(anchors=anchors), ChainTime(raw.ek_chain_time))


def _missing(raw: ServerConfig) -> Iterator[ConfigFault]:
    for name in _REQUIRED:
        if not getattr(raw, name):
            yield ConfigFault(raw.line(name), f"{name} is required")


def _read(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as e:
        raise NotReadyError(f"{path} cannot be read: {e.strerror}") from e
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidInputError(f"larger than {_MAX_FILE_BYTES >> 20} MiB")
    return parse_pem(content)

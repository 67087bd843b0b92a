"""What an operator says about `tpm_devid` on the server, and what it comes to.

`ServerConfig` is the plugin_data as written; `Settings` is what the server half works with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import AfterValidator, Field

from spire_hw.config.schema import Model, check
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.files import parse_file
from spire_hw.tpm import castore
from spire_hw.tpm.certificate import Certificate, parse_certificate
from spire_hw.tpm.crlfiles import watch_crls
from spire_hw.tpm.ekcert import ChainTime, EkRoots
from spire_hw.tpm.watched import Watched
from spire_hw.x509.certificate import load_certificate, load_pem, parse_pem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cryptography import x509

    from spire_hw.config.hcl import Body
    from spire_hw.tpm.crl import Revocations

_MAX_FILE_BYTES: Final = 16 << 20
_REQUIRED: Final = ("devid_ca_path", "endorsement_ca_path")
_SHA256_BYTES: Final = 32


def _hash(text: str) -> str:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != _SHA256_BYTES or digest.hex() != text.lower():
        raise InvalidInputError("expected a SHA-256 in hexadecimal")
    return text.lower()


class ServerConfig(Model):
    """The plugin_data of NodeAttestor `tpm_devid` on a server.

    Attributes:
        devid_ca_path: PEM file of the authorities that issue DevID certificates, or a directory
            with roots and intermediates.
        devid_crl_path: revocation lists of these authorities: a file, or a directory of them.
        devid_crl_required: every certificate below a root needs a revocation list that counts.
        endorsement_ca_path: PEM file of the TPM makers' authorities, or a directory with roots and
            intermediates.
        ek_chain_time: how dates on the endorsement certificate's path are judged.
        sha1_ca_fingerprints: SHA-256 of makers' certificates that may be signed with SHA-1.
        crl_path: makers' revocation lists: a file, or a directory of them.
        crl_required: as `devid_crl_required`, for endorsement certificates.
    """

    devid_ca_path: str = ""
    devid_crl_path: str = ""
    devid_crl_required: bool = False
    endorsement_ca_path: str = ""
    ek_chain_time: Literal["strict", "issuer_at_leaf_issuance", "ignore"] = (
        "issuer_at_leaf_issuance"
    )
    sha1_ca_fingerprints: list[Annotated[str, AfterValidator(_hash)]] = Field(default_factory=list)
    crl_path: str = ""
    crl_required: bool = False


@dataclass(frozen=True, slots=True)
class Issuers:
    """Who issues DevID certificates.

    Attributes:
        roots: a path ends at one.
        intermediates: helpers for building paths; trusted for nothing by themselves.
    """

    roots: tuple[x509.Certificate, ...]
    intermediates: tuple[x509.Certificate, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server half works with.

    Attributes:
        issuers: of DevID certificates.
        devid_crls: their revocation lists, None to ask none.
        ek_roots: who may issue endorsement certificates; of a file each ends a path, as upstream
            takes it.
        ek_crls: makers' revocation lists, None to ask none.
        chain_time: how dates on the endorsement certificate's path are judged.
    """

    issuers: Watched[Issuers]
    devid_crls: Watched[Revocations] | None
    ek_roots: Watched[EkRoots]
    ek_crls: Watched[Revocations] | None
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
        InvalidInputError: a file holds something else than it should.
    """
    raw, found = check(body, ServerConfig)
    if raw is not None:
        found = list(_missing(raw))
    if raw is None or found:
        raise ConfigError(body.file or "configuration", found)
    return Settings(
        issuers=_watch_issuers(Path(raw.devid_ca_path)),
        devid_crls=_watch_crls(raw.devid_crl_path, required=raw.devid_crl_required),
        ek_roots=_watch_makers(Path(raw.endorsement_ca_path), raw.sha1_ca_fingerprints),
        ek_crls=_watch_crls(raw.crl_path, required=raw.crl_required),
        chain_time=ChainTime(raw.ek_chain_time),
    )


def _missing(raw: ServerConfig) -> Iterator[ConfigFault]:
    for name in _REQUIRED:
        if not getattr(raw, name):
            yield ConfigFault(raw.line(name), f"{name} is required")
    for prefix in ("", "devid_"):
        if getattr(raw, f"{prefix}crl_required") and not getattr(raw, f"{prefix}crl_path"):
            name = f"{prefix}crl_required"
            yield ConfigFault(raw.line(name), f'"{name}": needs {prefix}crl_path')


def _watch_crls(path: str, *, required: bool) -> Watched[Revocations] | None:
    return watch_crls(Path(path), required=required) if path else None


def _watch_issuers(path: Path) -> Watched[Issuers]:
    def read() -> Issuers:
        if not path.is_dir():
            return Issuers(tuple(parse_file(path, _MAX_FILE_BYTES, load_pem, "devid_ca_path")))
        found = castore.load_roots(path)
        return Issuers(_loaded(path, found.anchors), _loaded(path, found.intermediates))

    return Watched(f"devid_ca_path {path}", lambda: castore.files_of(path), read)


def _loaded(path: Path, found: Iterable[Certificate]) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(load_certificate(one.der) for one in found)
    except InvalidInputError as e:
        raise InvalidInputError(f"devid_ca_path {path}: {e.message}") from e


def _watch_makers(path: Path, pinned: Iterable[str]) -> Watched[EkRoots]:
    fixed = frozenset(pinned)
    if path.is_dir():
        return castore.watch_roots(path, fixed)

    def read() -> EkRoots:
        found = parse_file(path, _MAX_FILE_BYTES, _parse_makers, "endorsement_ca_path")
        return EkRoots(anchors=found, pinned=fixed)

    return Watched(f"endorsement_ca_path {path}", lambda: [path], read)


def _parse_makers(text: bytes) -> tuple[Certificate, ...]:
    # Not with the parser of the other file, which is stricter: makers' certificates are odd.
    return tuple(parse_certificate(der, "certificate") for der in parse_pem(text))

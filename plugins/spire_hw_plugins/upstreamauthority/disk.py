"""UpstreamAuthority `disk`: a CA certificate and its key in files sign the server's CA.

The files are read again whenever a CA is to be signed; if they cannot be used then, what was read
last goes on. A key in a file can be copied by whoever reads it: `pkcs11` keeps it in a device.

Source: upstream's `disk`, with the same configuration.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.config.schema import Model, decode, faults
from spire_hw.errors import ConfigError, ConfigFault, NotReadyError, SpireHwError
from spire_hw.key import SoftwareSigner
from spire_hw.keyfile import load_private_key
from spire_hw_plugins.upstreamauthority.minting import Certificates, Minter, load_certificates

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from datetime import timedelta

    from spire_hw.config.hcl import Body
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.upstreamauthority import UpstreamX509Ca

NAME: Final = "disk"


class Config(Model):
    """The plugin_data.

    Attributes:
        cert_file_path: PEM file: the certificate whose key signs, then intermediates up to a root.
        key_file_path: PEM file with its private key.
        bundle_file_path: PEM file with the roots; may be left out for one self-signed certificate.
    """

    cert_file_path: str = ""
    key_file_path: str = ""
    bundle_file_path: str = ""


@dataclass(frozen=True, slots=True)
class _Files:
    certificates: Certificates
    signer: SoftwareSigner


class DiskAuthority:
    """The UpstreamAuthority contract over files."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._minter = Minter(host)
        self._config: Config | None = None
        self._files: _Files | None = None

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching any file."""
        found = faults(config, Config)
        return found or _missing(decode(config, Config))

    async def configure(self, config: Body) -> None:
        """Read the files and make sure that what is signed with them will be believed.

        Raises:
            ConfigError: the configuration has faults.
            NotReadyError: a file cannot be read, or leads to no root.
            InvalidInputError: a file holds something else than it should.
        """
        raw = decode(config, Config)
        if found := _missing(raw):
            raise ConfigError(config.file or NAME, found)
        files = await self._read(raw)
        self._config, self._files = raw, files

    async def close(self) -> None:
        """Forget the key."""
        self._config = self._files = None

    async def mint_x509_ca(
        self, csr: bytes, preferred_ttl: timedelta
    ) -> AsyncGenerator[UpstreamX509Ca, None]:
        """Sign a CA; the roots are those of the files as they are now."""
        config, files = self._config, self._files
        if config is None or files is None:
            raise NotReadyError("not configured")
        try:
            files = self._files = await self._read(config)
        except SpireHwError as e:
            self._host.log.warning(
                "The authority's files cannot be used, those read before are", error=e.message
            )
        yield await self._minter.mint(files.certificates, files.signer, csr, preferred_ttl)

    async def _read(self, config: Config) -> _Files:
        files = await asyncio.to_thread(_load, config)
        await self._minter.check(files.certificates, files.signer)
        return files


def _load(config: Config) -> _Files:
    certificates = load_certificates(config.cert_file_path, config.bundle_file_path)
    return _Files(certificates, SoftwareSigner(load_private_key(Path(config.key_file_path))))


def _missing(config: Config) -> list[ConfigFault]:
    return [
        ConfigFault(config.line(name), f"{name} is required")
        for name in ("cert_file_path", "key_file_path")
        if not getattr(config, name)
    ]


def build(host: HostInfo) -> DiskAuthority:
    """Make the plugin."""
    return DiskAuthority(host)

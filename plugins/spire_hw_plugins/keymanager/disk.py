"""KeyManager `disk`: unencrypted software keys in upstream's `keys.json`.

The file is `{"keys": {"<key id>": "<base64 of PKCS#8 DER>"}}`, indented with tabs, mode 0600, and is
replaced atomically: a crash leaves the old file or the new one. The server sets `keys_path`, the
agent sets `directory` and keeps `keys.json` in it, so a file can be moved between upstream and us.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pydantic import StringConstraints

from spire_hw.config.schema import Model, decode, faults
from spire_hw.errors import ConfigFault, InvalidInputError, NotReadyError
from spire_hw.files import NoFileError, read_bounded, replace_file
from spire_hw.plugin.info import HostInfo, Side
from spire_hw_plugins.keymanager.software import SoftwareKey, SoftwareKeys

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.config.hcl import Body

NAME: Final = "disk"
_FILE_NAME: Final = "keys.json"
_MAX_FILE_BYTES: Final = 1 << 20
_Text = Annotated[str, StringConstraints(min_length=1)]


class ServerConfig(Model):
    """The plugin_data on a server."""

    keys_path: _Text


class AgentConfig(Model):
    """The plugin_data on an agent."""

    directory: _Text


class DiskKeyManager(SoftwareKeys):
    """The KeyManager contract over one key file."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(self._store)
        self._side = host.side
        self._log = host.log
        self._path: Path | None = None

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching the disk."""
        return faults(config, ServerConfig if self._side is Side.SERVER else AgentConfig)

    async def configure(self, config: Body) -> None:
        """Read the key file; later calls may only move where it is written.

        Raises:
            ConfigError: the path is missing, or something unknown is set.
            NotReadyError: file or directory cannot be used.
        """
        if self._side is Side.SERVER:
            path = Path(decode(config, ServerConfig).keys_path)
        else:
            path = Path(decode(config, AgentConfig).directory) / _FILE_NAME
            await asyncio.to_thread(_check_directory, path.parent)
        if not self.is_loaded:
            self.load(await asyncio.to_thread(self._read, path))
        self._path = path
        self.place = f"file {path}, unencrypted"
        self._log.warning("keys are unencrypted software keys in a file", path=str(path))

    async def close(self) -> None:
        """Forget the keys; the file stays."""
        self.load({})

    def _read(self, path: Path) -> dict[str, SoftwareKey]:
        try:
            content = read_bounded(path, _MAX_FILE_BYTES, "key file")
        except NoFileError:
            return {}
        except InvalidInputError as e:
            raise NotReadyError(e.message) from e
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            self._log.warning(
                "key file is open to others than its owner", path=str(path), mode=f"{mode:04o}"
            )
        try:
            return parse_keys(content)
        except InvalidInputError as e:
            raise NotReadyError(f"key file {path}: {e.message}") from e

    def _store(self, keys: Mapping[str, SoftwareKey]) -> None:
        path = self._path
        if path is None:
            raise NotReadyError("not configured")
        replace_file(path, encode_keys(keys), "key file")


def encode_keys(keys: Mapping[str, SoftwareKey]) -> bytes:
    """Return the content of a key file."""
    entries = {
        key_id: base64.b64encode(
            key.private_key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        ).decode("ascii")
        for key_id, key in keys.items()
    }
    return json.dumps({"keys": entries}, indent="\t").encode("utf-8")


def parse_keys(content: bytes) -> dict[str, SoftwareKey]:
    """Read the content of a key file.

    Raises:
        InvalidInputError: not that format; the message names the key id, never its content.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidInputError("is not JSON") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if entries is None and isinstance(document, dict):
        entries = {}
    if not isinstance(entries, dict):
        raise InvalidInputError('has no object "keys"')
    return {key_id: _parse_key(key_id, text) for key_id, text in entries.items()}


def _parse_key(key_id: str, text: object) -> SoftwareKey:
    # The causes are cut off on purpose: a parser may quote what it could not read.
    if not key_id or not isinstance(text, str):
        raise InvalidInputError(f'key "{key_id}" is not base64 text')
    try:
        private_key = serialization.load_der_private_key(
            base64.b64decode(text, validate=True), password=None
        )
    except (binascii.Error, ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidInputError(f'key "{key_id}" is not a PKCS#8 private key') from None
    if not isinstance(private_key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise InvalidInputError(f'key "{key_id}" is neither an RSA nor an EC key')
    try:
        return SoftwareKey.of(key_id, private_key)
    except InvalidInputError as e:
        raise InvalidInputError(f'key "{key_id}": {e.message}') from None


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise NotReadyError(f"directory {directory} does not exist")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise NotReadyError(f"directory {directory} is not writable")


def build(host: HostInfo) -> DiskKeyManager:
    """Make the plugin."""
    return DiskKeyManager(host)

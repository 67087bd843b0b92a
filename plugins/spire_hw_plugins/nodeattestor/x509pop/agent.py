"""Agent half of the `x509pop` node attestor: shows a certificate and signs with its key.

The key is a file, one of the agent's KeyManager (`private_key_path = "keymanager:<id>"`), or one in
a PKCS#11 token (`pkcs11:...`); from the latter two it never comes out. A key of the KeyManager that
is not there yet is made, and a certificate request for it is written for the operator's CA.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from spire_hw.config.schema import Model, decode, faults
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.files import parse_file, replace_file
from spire_hw.key import KeyType, SoftwareSigner, spki_der
from spire_hw.keyfile import load_private_key
from spire_hw.pkcs11.existing import opened
from spire_hw.pkcs11.pool.place import SCHEME, Pins, place_of_uri
from spire_hw.plugin.keymanager import Keys
from spire_hw.x509.certificate import load_certificate, parse_pem, public_key_of
from spire_hw.x509.csr import build_csr
from spire_hw.x509.name import Subject
from spire_hw_plugins.nodeattestor.x509pop import wire

if TYPE_CHECKING:
    from spire_hw.config.hcl import Body
    from spire_hw.key import Signer
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.nodeattestor import AgentExchange, SvidKey

NAME: Final = wire.NAME
_MANAGED: Final = "keymanager:"
_MAX_FILE_BYTES: Final = 1 << 20
_MAX_COMMON_NAME: Final = 64
_MAX_KEY_ID: Final = 64
# What the agent calls the keys of its own SVID.
_RESERVED: Final = "agent-svid-"


class Config(Model):
    """The plugin_data.

    Attributes:
        private_key_path: PEM file, `keymanager:<id>` for a key of the agent's KeyManager, or a
            `pkcs11:` URI.
        certificate_path: PEM file, the node's certificate first, intermediates after it.
        intermediates_path: PEM file with further intermediates.
    """

    unsupported: ClassVar[Mapping[str, object]] = {"spiffe_endpoint_socket": ""}

    private_key_path: str = ""
    certificate_path: str = ""
    intermediates_path: str = ""


@dataclass(frozen=True, slots=True)
class _Proof:
    """What a node shows: DER certificates, its own first, and what signs for it."""

    certificates: list[bytes]
    signer: Signer


class X509PopAgent:
    """The agent's contract over a certificate the node was given."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._settings: Config | None = None
        self._pins = Pins()

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching any file."""
        return faults(config, Config) or _conflicts(decode(config, Config))

    async def configure(self, config: Body) -> None:
        """Take the configuration; files are read again at every attestation.

        Raises:
            ConfigError: something is missing or unknown.
            NotReadyError: a file cannot be read.
            InvalidInputError: a file holds something else than it should, or key and certificate
                do not belong together.
        """
        settings = decode(config, Config)
        if found := _conflicts(settings):
            raise ConfigError(config.file or "configuration", found)
        path = settings.private_key_path
        if path.startswith(SCHEME):
            await asyncio.to_thread(_load_chain, settings)
        elif not _key_id(settings):
            await asyncio.to_thread(_from_files, settings)
        self._settings = settings

    async def close(self) -> None:
        """Forget the configuration."""
        self._settings = None

    async def aid_attestation(self, exchange: AgentExchange, svid_key: SvidKey | None) -> None:
        """Send the certificates, then sign both sides' nonces."""
        settings = self._settings
        if settings is None:
            raise NotReadyError("not configured")
        if settings.private_key_path.startswith(SCHEME):
            chain = await asyncio.to_thread(_load_chain, settings)
            place = place_of_uri(settings.private_key_path)
            public_key = public_key_of(load_certificate(chain[0]))
            # Opened for an attestation and left again.
            guard = self._pins.guard(place)
            async with opened(place, guard, self._host.log, public_key) as signer:
                await _prove(exchange, _Proof(chain, signer))
        elif key_id := _key_id(settings):
            await _prove(exchange, await self._from_key_manager(settings, key_id, svid_key))
        else:
            await _prove(exchange, await asyncio.to_thread(_from_files, settings))

    async def _from_key_manager(
        self, settings: Config, key_id: str, svid_key: SvidKey | None
    ) -> _Proof:
        if svid_key is None:
            raise NotReadyError(f"this host does not lend its KeyManager: {_MANAGED} needs one")
        keys = Keys(svid_key.manager, "")
        try:
            signer: Signer = await keys.get(key_id)
        except SpireHwError as e:
            if e.kind is not NotFoundError.kind:
                raise
            signer = await keys.generate(key_id, KeyType.EC_P256)
            self._host.log.info("a key was made for the node's certificate", key_id=key_id)
        try:
            return await asyncio.to_thread(_from_certificates, settings, signer)
        except SpireHwError as e:
            request = await build_csr(signer, subject=_subject())
            path = self._host.data_dir / f"x509pop-{key_id}.csr"
            await asyncio.to_thread(_write_request, path, request)
            raise NotReadyError(
                f"{e.message}; have your CA sign {path}, a request for the KeyManager's key "
                f'"{key_id}", and put the certificate into certificate_path'
            ) from e


async def _prove(exchange: AgentExchange, proof: _Proof) -> None:
    await exchange.send(wire.encode_payload(proof.certificates))
    challenge = wire.decode_challenge(await exchange.receive())
    if challenge.scheme is not wire.Scheme.of(proof.signer.public_key):
        raise InvalidInputError(
            f"challenge asks for {challenge.scheme.value}, which this node's key cannot give"
        )
    nonce = secrets.token_bytes(wire.NONCE_BYTES)
    digest = wire.combined(challenge.nonce, nonce)
    signature = await proof.signer.sign(digest, challenge.scheme.options)
    response = wire.Response(challenge.scheme, nonce, signature)
    await exchange.send(wire.encode_response(response))


def _key_id(settings: Config) -> str:
    path = settings.private_key_path
    return path.removeprefix(_MANAGED) if path.startswith(_MANAGED) else ""


def _conflicts(settings: Config) -> list[ConfigFault]:
    found = [
        ConfigFault(settings.line(name), f"{name} is required")
        for name in ("private_key_path", "certificate_path")
        if not getattr(settings, name)
    ]
    if settings.private_key_path.startswith(SCHEME):
        try:
            place_of_uri(settings.private_key_path)
        except InvalidInputError as e:
            found.append(ConfigFault(settings.line("private_key_path"), e.message))
    if settings.private_key_path.startswith(_MANAGED):
        key_id = _key_id(settings)
        legal = key_id and all(c.isascii() and (c.isalnum() or c in "-_") for c in key_id)
        if not legal or len(key_id) > _MAX_KEY_ID:
            text = f"after {_MANAGED} comes a key id of letters, digits, - and _"
            found.append(ConfigFault(settings.line("private_key_path"), text))
        elif key_id.startswith(_RESERVED):
            text = f"{_RESERVED}... are the keys of the agent's own SVID; use another id"
            found.append(ConfigFault(settings.line("private_key_path"), text))
    return found


def _from_files(settings: Config) -> _Proof:
    return _from_certificates(
        settings, SoftwareSigner(load_private_key(Path(settings.private_key_path)))
    )


def _load_chain(settings: Config) -> list[bytes]:
    certificates = _load_certificates(settings.certificate_path)
    if settings.intermediates_path.strip():
        certificates += _load_certificates(settings.intermediates_path)
    return certificates


def _from_certificates(settings: Config, signer: Signer) -> _Proof:
    certificates = _load_chain(settings)
    if spki_der(public_key_of(load_certificate(certificates[0]))) != spki_der(signer.public_key):
        raise InvalidInputError(
            f"the first certificate in {settings.certificate_path} is for another key"
        )
    return _Proof(certificates, signer)


def _load_certificates(path: str) -> list[bytes]:
    return parse_file(Path(path), _MAX_FILE_BYTES, parse_pem)


def _subject() -> bytes:
    name = socket.gethostname()[:_MAX_COMMON_NAME]
    return Subject(common_name=name).encode()


def _write_request(path: Path, der: bytes) -> None:
    text = x509.load_der_x509_csr(der).public_bytes(serialization.Encoding.PEM)
    replace_file(path, text, mode=0o644)


def build(host: HostInfo) -> X509PopAgent:
    """Make the plugin."""
    return X509PopAgent(host)

"""UpstreamAuthority `pkcs11`: an existing root or intermediate in an HSM signs the server's CA.

    module_path  = "/usr/lib/softhsm/libsofthsm2.so"
    token_label  = "root"
    pin_file     = "/etc/spire-hw/root-pin"
    key_label    = "root-2026"              # and/or key_id, in hex
    # or all of it: uri = "pkcs11:token=root;object=root-2026?module-path=...&pin-source=file:..."
    cert_file_path   = "/etc/spire-hw/issuing.pem"   # its certificate, then intermediates
    bundle_file_path = "/etc/spire-hw/roots.pem"     # not for one self-signed certificate

The key is neither made nor changed here; its worker processes are this plugin's own. The files are
read again whenever a CA is to be signed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from spire_hw.config.duration import parse_duration
from spire_hw.config.schema import GoDuration, decode, faults
from spire_hw.errors import ConfigError, NotReadyError, SpireHwError
from spire_hw.key import spki_der
from spire_hw.pkcs11.evidence import evidence_texts
from spire_hw.pkcs11.existing import ExistingKey, open_existing
from spire_hw.pkcs11.pool.place import Faults, Pins, Place, Text, TokenConfig, place_of
from spire_hw.pkcs11.pool.pool import Limits
from spire_hw_plugins.upstreamauthority.minting import Certificates, Minter, load_certificates

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from datetime import timedelta

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.upstreamauthority import UpstreamX509Ca

NAME: Final = "pkcs11"
_MAX_ID_BYTES: Final = 255


class Config(TokenConfig):
    """The plugin_data; see the module's text.

    Attributes:
        key_label: CKA_LABEL of the key.
        key_id: CKA_ID of the key in hex.
        cert_file_path: PEM file: the key's certificate, then intermediates up to a root.
        bundle_file_path: PEM file with the roots; may be left out for one self-signed certificate.
        workers: signing worker processes.
        start_timeout: how long the token may be away at start.
        sign_timeout: how long a worker may be silent over a signature.
    """

    key_label: Text | None = None
    key_id: Text | None = None
    cert_file_path: str = ""
    bundle_file_path: str = ""
    workers: Annotated[int, Field(ge=1, le=32)] = 1
    start_timeout: GoDuration = parse_duration("30s")
    sign_timeout: GoDuration = parse_duration("10s")


@dataclass(frozen=True, slots=True)
class _Open:
    """A configuration at work.

    Attributes:
        config: what was configured.
        key: the key in the token.
        certificates: as read last.
    """

    config: Config
    key: ExistingKey
    certificates: Certificates


class Pkcs11Authority:
    """The UpstreamAuthority contract over a key in a token."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._minter = Minter(host)
        self._pins = Pins()
        self._open: _Open | None = None

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching token, PIN or files."""
        found = faults(config, Config)
        return found or _place(decode(config, Config))[1]

    async def configure(self, config: Body) -> None:
        """Open the token, find the key and make sure that what it signs will be believed.

        Raises:
            ConfigError: the configuration has faults.
            NotReadyError: a file cannot be read or leads to no root, or the key is not its.
            InvalidInputError: a file or the module is not what it has to be.
            NotFoundError: there is no such key.
            TokenError: token or PIN are not what they have to be.
        """
        raw = decode(config, Config)
        place, found = _place(raw)
        if place is None:
            raise ConfigError(config.file or NAME, found)
        certificates = await asyncio.to_thread(
            load_certificates, raw.cert_file_path, raw.bundle_file_path
        )
        key = await open_existing(
            place,
            self._pins.guard(place),
            self._host.log,
            public_key=certificates.public_key,
            limits=_limits(raw),
        )
        try:
            await self._minter.check(certificates, key)
        except BaseException:
            await key.close()
            raise
        self._tell(key)
        old, self._open = self._open, _Open(raw, key, certificates)
        if old is not None:
            await old.key.close()

    async def close(self) -> None:
        """Log out and end the workers."""
        held, self._open = self._open, None
        if held is not None:
            await held.key.close()

    async def mint_x509_ca(
        self, csr: bytes, preferred_ttl: timedelta
    ) -> AsyncGenerator[UpstreamX509Ca, None]:
        """Have the token sign a CA; the roots are those of the files as they are now."""
        held = self._open
        if held is None:
            raise NotReadyError("not configured")
        certificates = await self._reread(held)
        yield await self._minter.mint(certificates, held.key, csr, preferred_ttl)

    async def _reread(self, held: _Open) -> Certificates:
        config = held.config
        try:
            found = await asyncio.to_thread(
                load_certificates, config.cert_file_path, config.bundle_file_path
            )
            if found == held.certificates:
                return found
            if spki_der(found.public_key) != spki_der(held.key.public_key):
                raise NotReadyError(
                    f"{config.cert_file_path} is about another key now; a new key takes a restart"
                )
            await self._minter.check(found, held.key)
        except SpireHwError as e:
            self._host.log.warning(
                "The authority's files cannot be used, those read before are", error=e.message
            )
            return held.certificates
        if self._open is held:
            self._open = replace(held, certificates=found)
        return found

    def _tell(self, key: ExistingKey) -> None:
        """Say where the key is, and whether the token knows it as one that can be copied."""
        texts = evidence_texts(key.evidence)
        self._host.log.info("upstream authority is open", hsm=key.location)
        copied = [n for n in ("SENSITIVE", "NEVER_EXTRACTABLE", "LOCAL") if texts.get(n) != "true"]
        if copied or texts.get("EXTRACTABLE") == "true":
            self._host.log.warning(
                "hsm.key_may_have_copies", hsm=key.location, attributes=", ".join(copied)
            )


def _place(config: Config) -> tuple[Place | None, list[ConfigFault]]:
    """Return token and key, and what is wrong."""
    found = Faults(config)
    place = place_of(config, found, with_key=True)
    if not config.cert_file_path:
        found.add("cert_file_path", "cert_file_path is required")
    label, cka_id = config.key_label, _id_of(config, found)
    if place is not None:
        for name, given, in_uri in (
            ("key_label", label, place.object_label),
            ("key_id", cka_id, place.object_id),
        ):
            if given is not None and in_uri is not None:
                found.add(name, f"{name} and the uri's exclude each other")
        label, cka_id = label or place.object_label, cka_id or place.object_id
        if label is None and cka_id is None:
            found.add("key_label", "key_label, key_id or a uri that names the key is required")
        place = replace(place, object_label=label, object_id=cka_id)
    return (None if found.found else place), found.found


def _id_of(config: Config, found: Faults) -> bytes | None:
    if config.key_id is None:
        return None
    try:
        cka_id = bytes.fromhex(config.key_id)
    except ValueError:
        cka_id = b""
    if not 1 <= len(cka_id) <= _MAX_ID_BYTES:
        found.add("key_id", f"key_id must be 1 to {_MAX_ID_BYTES} bytes in hex")
        return None
    return cka_id


def _limits(config: Config) -> Limits:
    return Limits(
        workers=config.workers,
        start_s=config.start_timeout.total_seconds(),
        sign_s=config.sign_timeout.total_seconds(),
    )


def build(host: HostInfo) -> Pkcs11Authority:
    """Make the plugin."""
    return Pkcs11Authority(host)

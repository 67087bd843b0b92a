"""Agent half of `tpm_devid`: shows the node's certificate and that its key is in this TPM.

What the key signs for a server is a nonce of 32 bytes of that server's choice, hashed here: it can
be no certificate, request or handshake. The credential is opened by the TPM itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from spire_hw.config.schema import Model, decode, faults
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    InvalidInputError,
    NotReadyError,
    UnavailableError,
)
from spire_hw.files import parse_file
from spire_hw.key import HashAlgorithm, spki_der
from spire_hw.tpm import attest, devid
from spire_hw.tpm.attest import AkKind
from spire_hw.tpm.connection import Hierarchy
from spire_hw.tpm.device import TpmDevice, load_password, shared
from spire_hw.tpm.devid import DevIdKey
from spire_hw.tpm.endorsement import EkType, find_endorsement
from spire_hw.tpm.errors import WRONG_PASSWORD, TpmError
from spire_hw.tpm.wire import sized
from spire_hw.x509.certificate import load_certificate, parse_pem, public_key_of
from spire_hw_plugins.nodeattestor.tpm_devid import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from spire_hw.config.hcl import Body
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.nodeattestor import AgentExchange, SvidKey
    from spire_hw.tpm.connection import Connection
    from spire_hw.tpm.endorsement import Endorsement
    from spire_hw.tpm.keys import KeyBlob

NAME: Final = wire.NAME
T = TypeVar("T")
_MAX_FILE_BYTES: Final = 1 << 20
# An RSA endorsement key and an RSA attestation key take slow hardware a minute to make.
_IDENTIFY_TIMEOUT_S: Final = 180.0
_ANSWER_TIMEOUT_S: Final = 30.0
_REQUIRED: Final = ("devid_cert_path", "devid_priv_path", "devid_pub_path")
_PASSWORDS: Final = {
    "devid_password": "devid_auth_path",
    "owner_hierarchy_password": "owner_auth_path",
    "endorsement_hierarchy_password": "endorsement_auth_path",
}


class Config(Model):
    """The plugin_data.

    Attributes:
        devid_cert_path: PEM file, the node's certificate first, intermediates after it.
        devid_priv_path: the key's private buffer, wrapped by the TPM.
        devid_pub_path: its TPMT_PUBLIC.
        devid_password: password of the key.
        owner_hierarchy_password: password of the owner hierarchy.
        endorsement_hierarchy_password: password of the endorsement hierarchy.
        devid_auth_path: file with the key's password, instead.
        owner_auth_path: file with the owner hierarchy's password, instead.
        endorsement_auth_path: file with the endorsement hierarchy's password, instead.
        tpm_device_path: device node; the kernel's resource manager when unset.
        tcti: TCTI string instead of a device.
        ek_type: `rsa-2048`, which every server takes, or `ec-p256`, which ours take; the
            attestation key is of the same type.
    """

    devid_cert_path: str = ""
    devid_priv_path: str = ""
    devid_pub_path: str = ""
    devid_password: str = ""
    owner_hierarchy_password: str = ""
    endorsement_hierarchy_password: str = ""
    devid_auth_path: str = ""
    owner_auth_path: str = ""
    endorsement_auth_path: str = ""
    tpm_device_path: str = ""
    tcti: str = ""
    ek_type: Literal["rsa-2048", "ec-p256"] = "rsa-2048"


@dataclass(frozen=True, slots=True)
class _Node:
    """What a configured attestor works with.

    Attributes:
        device: the TPM.
        key: the DevID key.
        certificates: DER, its certificate first.
        ek_type: which endorsement key.
    """

    device: TpmDevice
    key: DevIdKey
    certificates: tuple[bytes, ...]
    ek_type: EkType

    @property
    def ak_kind(self) -> AkKind:
        """Return the attestation key that goes with the endorsement key."""
        return AkKind.RSA if self.ek_type is EkType.RSA_2048 else AkKind.ECC


class DevIdAgent:
    """The agent's contract over a DevID in a TPM."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._node: _Node | None = None
        self._refused: bytes | None = None

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching any file."""
        return faults(config, Config) or list(_conflicts(decode(config, Config)))

    async def configure(self, config: Body) -> None:
        """Read the files and choose the TPM, which is opened when the agent attests.

        Raises:
            ConfigError: the configuration has faults.
            NotReadyError: no TPM, or a file cannot be read.
            InvalidInputError: a file holds something else, or they do not belong together.
        """
        settings = decode(config, Config)
        if found := list(_conflicts(settings)):
            raise ConfigError(config.file or "configuration", found)
        passwords = await asyncio.to_thread(_load_passwords, settings)
        certificates, blob = await asyncio.to_thread(_load_files, settings)
        device = shared(settings.tcti or settings.tpm_device_path)
        for hierarchy, name in (
            (Hierarchy.OWNER, "owner_auth_path"),
            (Hierarchy.ENDORSEMENT, "endorsement_auth_path"),
        ):
            if passwords[name]:
                device.set_password(hierarchy, passwords[name])
        key = DevIdKey(blob, passwords["devid_auth_path"])
        before, self._node = self._node, _Node(device, key, certificates, EkType(settings.ek_type))
        if before is not None:
            await before.device.close()

    async def close(self) -> None:
        """Give the TPM back."""
        node, self._node = self._node, None
        if node is not None:
            await node.device.close()

    async def aid_attestation(self, exchange: AgentExchange, svid_key: SvidKey | None) -> None:
        """Send certificate and statement, then sign the nonce and open the credential."""
        del svid_key  # upstream's protocol has no place for it
        node = self._node
        if node is None:
            raise NotReadyError("not configured")
        self._check_password(node.key)
        try:
            ek, data = await node.device.run(
                "identify the TPM", lambda c: _identify(c, node), timeout_s=_IDENTIFY_TIMEOUT_S
            )
            await exchange.send(wire.encode_attestation_data(data))
            challenge = wire.decode_challenge(await exchange.receive())
            if len(challenge.nonce) != wire.NONCE_BYTES:
                raise InvalidInputError(f"challenge: nonce must be {wire.NONCE_BYTES} bytes")
            response = await node.device.run(
                "answer the attestation challenge",
                lambda c: _answer(c, node, ek, challenge),
                timeout_s=_ANSWER_TIMEOUT_S,
            )
        except TpmError as e:
            if node.key.password and e.is_any(WRONG_PASSWORD):
                self._refused = node.key.password
            raise
        await exchange.send(wire.encode_response(response))

    def _check_password(self, key: DevIdKey) -> None:
        if key.password and key.password == self._refused:
            raise UnavailableError(
                "the TPM refused the password of the DevID key, it is not sent again: correct it "
                "and restart"
            )


def _identify(connection: Connection, node: _Node) -> tuple[Endorsement, wire.AttestationData]:
    ek = find_endorsement(connection, node.ek_type)
    if ek.certificate is None:
        raise NotReadyError(
            f"this TPM has no {node.ek_type.value} endorsement certificate, which tpm_devid needs"
        )
    ak = attest.read_attestation_key(connection, node.ak_kind)
    certified = devid.certify_devid(connection, node.key, b"", node.ak_kind)
    return ek, wire.AttestationData(
        certificates=node.certificates,
        devid_pub=node.key.blob.parsed.raw,
        ek_certificate=ek.certificate,
        ek_pub=ek.parsed.raw,
        ak_pub=ak,
        certified=certified.attest,
        signature=certified.signature,
        ek_chain=ek.chain[: wire.MAX_EK_CHAIN],
    )


def _answer(
    connection: Connection, node: _Node, ek: Endorsement, challenge: wire.Challenge
) -> wire.Response:
    """Open the credential first: what cannot be opened is not from a server that knows us."""
    secret = attest.activate(
        connection, ek, sized(challenge.credential), sized(challenge.secret), node.ak_kind
    )
    digest = HashAlgorithm.SHA256.digest(challenge.nonce)
    return wire.Response(devid.sign_devid(connection, node.key, digest), secret)


def _conflicts(settings: Config) -> Iterator[ConfigFault]:
    for name in _REQUIRED:
        if not getattr(settings, name):
            yield ConfigFault(settings.line(name), f"{name} is required")
    for inline, path in _PASSWORDS.items():
        if getattr(settings, inline) and getattr(settings, path):
            yield ConfigFault(settings.line(path), f"set {inline} or {path}, not both")
    if settings.tcti and settings.tpm_device_path:
        yield ConfigFault(settings.line("tcti"), "set tpm_device_path or tcti, not both")


def _load_passwords(settings: Config) -> dict[str, bytes]:
    """Return the passwords by the name of the key that names their file."""
    return {
        path: getattr(settings, inline).encode() or load_password(getattr(settings, path))
        for inline, path in _PASSWORDS.items()
    }


def _load_files(settings: Config) -> tuple[tuple[bytes, ...], KeyBlob]:
    certificates = _read(settings.devid_cert_path, parse_pem)
    blob = devid.parse_files(
        _read(settings.devid_pub_path, bytes), _read(settings.devid_priv_path, bytes)
    )
    if not certificates or len(certificates) > wire.MAX_CERTIFICATES:
        raise InvalidInputError(
            f"{settings.devid_cert_path}: 1 to {wire.MAX_CERTIFICATES} certificates are expected"
        )
    if spki_der(public_key_of(load_certificate(certificates[0]))) != blob.parsed.spki:
        raise InvalidInputError(
            f"the first certificate in {settings.devid_cert_path} is for another key than "
            f"{settings.devid_pub_path}"
        )
    return tuple(certificates), blob


def _read(path: str, parse: Callable[[bytes], T]) -> T:
    return parse_file(Path(path), _MAX_FILE_BYTES, parse)


def build(host: HostInfo) -> DevIdAgent:
    """Make the plugin."""
    return DevIdAgent(host)

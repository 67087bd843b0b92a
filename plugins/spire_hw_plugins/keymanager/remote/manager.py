"""KeyManager `remote`: keys held by spire-hw-signer on another host, within a policy of its own.

Configuration (`plugin_data`):

    addresses = ["signer-1.example:8445", "signer-2.example:8445"]  # or socket = "/run/..."
    signer_ca = "/etc/spire-hw/signer-ca.pem"
    signer_id = "spiffe://infra.example/signer"
    cert      = "/etc/spire-hw/signer-client.pem"
    key       = "/etc/spire-hw/signer-client.key"

The signer is believed about a key when it makes it, and about nothing after that: keys are on note in
the data directory, every signature is verified, the head of the signer's audit log may not go back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.key import Purpose, check_digest
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth
from spire_hw_plugins.keymanager.remote.config import find_faults, read_settings
from spire_hw_plugins.keymanager.remote.session import Session

if TYPE_CHECKING:
    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.key import KeyType, SignOptions
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature

NAME: Final = "remote"


class RemoteKeyManager:
    """The KeyManager contract over signers.

    Also offers `PurposeKeys`, `KeyEvidenceSource`, `KeyAttestor` and `KeyHealthSource`.

    Attributes:
        verifies: signatures are verified before they are returned.
    """

    verifies = True

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._log = host.log
        self._session: Session | None = None

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching file or network."""
        return find_faults(config)

    async def configure(self, config: Body) -> None:
        """Reach a signer that holds our keys; a failure leaves an earlier configuration serving.

        Raises:
            ConfigError: the configuration has faults.
            NotReadyError: files, keys or audit log are not what they have to be.
            SpireHwError: UNAVAILABLE, no signer answered in time.
        """
        settings = read_settings(config)
        session = await Session.open(settings, self._host)
        for name in settings.accepted.names:
            self._log.warning(
                "a signer is believed what it would not be otherwise, at every start as long as this "
                "is set; take it out of the configuration again",
                setting=name,
            )
        old, self._session = self._session, session
        if old is not None:
            await old.close(is_replaced=True)

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Have a signer make a key; asked again after an answer was lost, it is the same one."""
        if not key_id:
            raise InvalidInputError("key id is required")
        if self._session is None:
            raise NotReadyError("failed to generate key: not configured")
        return await self._session.generate(key_id, key_type)

    async def get_public_key(self, key_id: str) -> KeyInfo:
        """Return one key."""
        return self._ready().key(key_id)

    async def get_public_keys(self) -> list[KeyInfo]:
        """Return all keys, oldest first, after asking a signer."""
        return await self._ready().keys()

    async def sign_data(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Have a signer sign a digest; the signature is verified before it is returned."""
        session = self._ready()
        info = session.key(key_id)
        check_digest(digest, options)
        return await session.sign(info, None, digest, digest, options)

    async def sign_x509(
        self, key_id: str, to_be_signed: bytes, options: SignOptions
    ) -> KeySignature:
        """Have a signer judge and sign a DER TBSCertificate."""
        return await self._sign_content(key_id, Purpose.X509, to_be_signed, options)

    async def sign_csr(
        self, key_id: str, to_be_signed: bytes, options: SignOptions
    ) -> KeySignature:
        """Have a signer judge and sign a DER CertificationRequestInfo."""
        return await self._sign_content(key_id, Purpose.CSR, to_be_signed, options)

    async def sign_jwt(
        self, key_id: str, signing_input: bytes, options: SignOptions
    ) -> KeySignature:
        """Have a signer judge and sign `header.payload` of a compact JWS."""
        return await self._sign_content(key_id, Purpose.JWT, signing_input, options)

    async def key_evidence(self, key_id: str) -> KeyEvidence:
        """Return where a signer says that a key is, and what this server has on note about it."""
        return await self._ready().evidence(key_id)

    async def attest_key(self, key_id: str, nonce: bytes) -> str:
        """Return evidence about a key that a signer made."""
        return await self._ready().attest(key_id, nonce)

    def key_health(self) -> DeviceHealth:
        """Return how well signers can be reached, as last seen."""
        if self._session is None:
            return DeviceHealth(KeyHealth.DOWN, "signer.not_configured", "not configured")
        return self._session.health()

    async def close(self) -> None:
        """End all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _sign_content(
        self, key_id: str, purpose: Purpose, content: bytes, options: SignOptions
    ) -> KeySignature:
        session = self._ready()
        digest = options.hash.digest(content)
        if not session.tells_purposes:
            return await session.sign(session.key(key_id), None, digest, digest, options)
        return await session.sign(session.key(key_id), purpose, content, digest, options)

    def _ready(self) -> Session:
        if self._session is None:
            raise NotReadyError("not configured")
        return self._session


def build(host: HostInfo) -> RemoteKeyManager:
    """Make the plugin."""
    return RemoteKeyManager(host)

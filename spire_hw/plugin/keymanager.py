"""KeyManager: makes and holds keys, signs digests; the private halves never leave it.

The contract is upstream's `spire.plugin.{server,agent}.keymanager.v1.KeyManager`; `KeyManager` is
what an implementation offers, `Keys` is the checked face the host uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from spire_hw.errors import ErrorKind, PluginError, SpireHwError
from spire_hw.key import KeyType, PublicKey, Purpose, SignOptions, fingerprint, spki_der
from spire_hw.plugin.custody import Custody, KeyAttestor, KeyStatementSource
from spire_hw.plugin.keycalls import UNCOUNTED, KeyCalls

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Mapping
    from datetime import datetime

    from spire_hw.plugin.custody import DeviceStatement
    from spire_hw.plugin.keyuses import KeyUses


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """The public face of one key instance.

    Attributes:
        key_id: the caller's name for the slot, such as `x509-CA-A`.
        key_type: its type.
        public_key: its public half.
        fingerprint: lower-case hex SHA-256 of the SubjectPublicKeyInfo.
    """

    key_id: str
    key_type: KeyType
    public_key: PublicKey
    fingerprint: str

    @classmethod
    def of(cls, key_id: str, key_type: KeyType, public_key: PublicKey) -> KeyInfo:
        """Build from a public key."""
        return cls(key_id, key_type, public_key, fingerprint(spki_der(public_key)))


@dataclass(frozen=True, slots=True)
class KeySignature:
    """A signature and the fingerprint of the key instance that made it."""

    signature: bytes
    fingerprint: str


class KeyManager(Protocol):
    """What a KeyManager plugin implements."""

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a new key under key_id; an existing one is replaced atomically for callers.

        Raises:
            InvalidInputError: `key id is required`, or a key type the device lacks.
            NotReadyError: before configure.
            DeviceError: the device failed; an existing key is unchanged.
        """
        ...

    async def get_public_key(self, key_id: str) -> KeyInfo:
        """Return one key.

        Raises:
            InvalidInputError: `key id is required`.
            NotFoundError: `key "<id>" not found`.
        """
        ...

    async def get_public_keys(self) -> list[KeyInfo]:
        """Return all keys of this host, oldest first; an away device raises, it is never empty.

        Of several devices each has an order of its own; keys on one that is away are returned as they
        were seen last, as long as another is there.
        """
        ...

    async def sign_data(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Sign a digest with the key that is current under key_id.

        Raises:
            InvalidInputError: `key id is required`, digest length, options that do not fit.
            NotFoundError: no such key.
            DeviceError: the device failed.
        """
        ...


@runtime_checkable
class TpmKeys(Protocol):
    """Optional: a KeyManager whose keys live in a TPM that an attestor can reach.

    The attestor loads the blob under the same storage primary in the same device worker and has it
    certified; nothing secret is in the blob outside that TPM.
    """

    def tpm_key_blob(self, key_id: str) -> tuple[bytes, bytes]:
        """Return (TPM2B_PUBLIC, TPM2B_PRIVATE) bytes of the key.

        Raises:
            NotFoundError: no such key.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeyEvidence:
    """Where a key lives, as the device reports it; every text is fit for an operator's eyes.

    Attributes:
        location: the place in a sentence.
        attributes: as they were read back, or as they are known.
        custody: who stands behind it.
        device: make and model.
        token: which of its kind: label and serial number, address.
        generation: how many keys of its id there were, this one included; 0 where nobody counts.
        created: when it was made, None when that is not known.
        stated: the custody that a signer states, with SIGNER_STATED.
    """

    location: str
    attributes: dict[str, str]
    custody: Custody = Custody.UNKNOWN
    device: str = ""
    token: str = ""
    generation: int = 0
    created: datetime | None = None
    stated: Custody = Custody.UNKNOWN

    @property
    def words(self) -> str:
        """Return the custody as people and metrics are told it: never a signer's word as ours."""
        word: str = self.custody.value
        return f"{word}: {self.stated.value}" if self.custody is Custody.SIGNER_STATED else word


@runtime_checkable
class KeyEvidenceSource(Protocol):
    """Optional: can tell where a key lives and how it is protected."""

    async def key_evidence(self, key_id: str) -> KeyEvidence:
        """Return evidence about one key.

        Raises:
            NotFoundError: no such key.
        """
        ...


@runtime_checkable
class PurposeKeys(Protocol):
    """Optional: a KeyManager that is told what it signs, so that it can judge it."""

    async def sign_x509(
        self, key_id: str, to_be_signed: bytes, options: SignOptions
    ) -> KeySignature:
        """Sign a DER TBSCertificate; errors as `sign_data`, and DeniedError by policy."""
        ...

    async def sign_csr(
        self, key_id: str, to_be_signed: bytes, options: SignOptions
    ) -> KeySignature:
        """Sign a DER CertificationRequestInfo; errors as `sign_x509`."""
        ...

    async def sign_jwt(
        self, key_id: str, signing_input: bytes, options: SignOptions
    ) -> KeySignature:
        """Sign `header.payload` of a compact JWS; errors as `sign_x509`."""
        ...


@dataclass(frozen=True, slots=True)
class RetainedKey:
    """A replaced generation that is kept for a while and signs nothing.

    Attributes:
        info: the key.
        generation: its generation.
        until: when it is destroyed, Unix seconds.
    """

    info: KeyInfo
    generation: int
    until: float


@runtime_checkable
class KeyRetention(Protocol):
    """Optional: keeps replaced keys for a while, so that an operator can take one back."""

    async def retained_keys(self) -> list[RetainedKey]:
        """Return what is kept, oldest first."""
        ...

    async def restore_key(self, key_id: str, generation: int) -> KeyInfo:
        """Make a retained generation the current one; the current one is retained in its place.

        Raises:
            NotFoundError: it is not retained.
            DeviceError: the device failed; nothing changed.
        """
        ...

    async def destroy_retained(self, key_id: str, generation: int) -> None:
        """Destroy a retained generation before its time.

        Raises:
            NotFoundError: it is not retained.
        """
        ...


class KeyHealth(Enum):
    """How well keys can be used."""

    GOOD = "good"
    DEGRADED = "degraded"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class DeviceHealth:
    """What a device-backed KeyManager says about itself.

    Attributes:
        health: DOWN only when signing is impossible.
        reason: stable code such as `hsm.read_only`, "" while all is well.
        message: for operators: cause and remedy.
    """

    health: KeyHealth
    reason: str = ""
    message: str = ""


@runtime_checkable
class KeyHealthSource(Protocol):
    """Optional: knows whether its device can be used now; asks nothing of the device."""

    def key_health(self) -> DeviceHealth:
        """Return the state of the device as last seen."""
        ...


@runtime_checkable
class KeyFallback(Protocol):
    """Optional: has keys on several devices, and can make new ones while one is lost."""

    def stranded_keys(self) -> Mapping[str, DeviceHealth]:
        """Return keys that cannot sign because their device is lost, while another one is there.

        Asks nothing of a device. Whoever signs with such a key does well to replace it now.
        """
        ...


class ManagedSigner:
    """A `Signer` over one key instance of a KeyManager.

    A key that was replaced under the same id since is reported (INTERNAL, `does not match`)
    instead of silently signing with its successor.
    """

    def __init__(
        self,
        manager: KeyManager,
        prefix: str,
        info: KeyInfo,
        calls: KeyCalls = UNCOUNTED,
        uses: KeyUses | None = None,
    ) -> None:
        self._manager = manager
        self._calls = calls
        self._uses = uses
        self._judge = manager if isinstance(manager, PurposeKeys) else None
        self._prefix = prefix
        self.info = info

    @property
    def public_key(self) -> PublicKey:
        """Return the public half."""
        return self.info.public_key

    @property
    def in_process(self) -> bool:
        """Tell whether the KeyManager says that its keys live in this process."""
        return bool(getattr(self._manager, "in_process", False))

    @property
    def verifies(self) -> bool:
        """Tell whether the KeyManager says that it verifies what its device signs."""
        return bool(getattr(self._manager, "verifies", False))

    def sign(self, digest: bytes, options: SignOptions) -> Coroutine[Any, Any, bytes]:
        """Sign a digest; see `spire_hw.key.Signer.sign`."""
        return self._made(self._manager.sign_data(self.info.key_id, digest, options))

    def sign_content(
        self, purpose: Purpose, content: bytes, digest: bytes, options: SignOptions
    ) -> Coroutine[Any, Any, bytes]:
        """Sign content; a KeyManager that judges what it signs gets the whole.

        Arguments and errors as in `spire_hw.key.sign_content`.
        """
        judge, key_id = self._judge, self.info.key_id
        if judge is None:
            return self.sign(digest, options)
        match purpose:
            case Purpose.X509:
                return self._made(judge.sign_x509(key_id, content, options))
            case Purpose.CSR:
                return self._made(judge.sign_csr(key_id, content, options))
            case Purpose.JWT:
                return self._made(judge.sign_jwt(key_id, content, options))

    async def _made(self, signing: Awaitable[KeySignature]) -> bytes:
        try:
            with self._calls.sign():
                made = await signing
        except PluginError:
            raise
        except SpireHwError as e:
            raise PluginError(self._prefix, e) from e
        if made.fingerprint != self.info.fingerprint:
            cause = SpireHwError(
                f'fingerprint of key "{self.info.key_id}" does not match: it was replaced',
                kind=ErrorKind.INTERNAL,
            )
            raise PluginError(self._prefix, cause)
        if not made.signature:
            raise PluginError(self._prefix, SpireHwError("signature is empty"))
        if self._uses is not None:
            self._uses.used(made.fingerprint)
        return made.signature


class Keys:
    """The host's face of a KeyManager: answers checked, errors prefixed `keymanager(<name>): `.

    Attributes:
        manager: the plugin.
        name: its name.
        uses: when keys were last used, None where nobody wants to know.
    """

    def __init__(
        self,
        manager: KeyManager,
        name: str,
        calls: KeyCalls = UNCOUNTED,
        uses: KeyUses | None = None,
    ) -> None:
        self.manager = manager
        self.name = name
        self.uses = uses
        self._calls = calls
        self._prefix = f"keymanager({name})"

    async def generate(self, key_id: str, key_type: KeyType) -> ManagedSigner:
        """Make a key and return its signer."""
        try:
            with self._calls.generate():
                info = await self.manager.generate_key(key_id, key_type)
        except SpireHwError as e:
            raise PluginError(self._prefix, e) from e
        return self._checked(info, key_id)

    async def get(self, key_id: str) -> ManagedSigner:
        """Return the signer of an existing key."""
        try:
            with self._calls.get():
                info = await self.manager.get_public_key(key_id)
        except SpireHwError as e:
            raise PluginError(self._prefix, e) from e
        return self._checked(info, key_id)

    async def list(self) -> list[ManagedSigner]:
        """Return signers for all keys."""
        try:
            with self._calls.list():
                infos = await self.manager.get_public_keys()
        except SpireHwError as e:
            raise PluginError(self._prefix, e) from e
        return [self._checked(info, info.key_id) for info in infos]

    async def evidence(self, key_id: str) -> KeyEvidence:
        """Return where a key lives, as far as the KeyManager says."""
        if not isinstance(self.manager, KeyEvidenceSource):
            return KeyEvidence(f"KeyManager {self.name}, which does not say", {})
        try:
            return await self.manager.key_evidence(key_id)
        except SpireHwError as e:
            raise PluginError(self._prefix, e) from e

    async def statement(self, key_id: str, challenge: bytes) -> DeviceStatement | None:
        """Return what the device signs about a key, None for one that signs nothing."""
        if not isinstance(self.manager, KeyStatementSource):
            return None
        try:
            return await self.manager.key_statement(key_id, challenge)
        except SpireHwError as e:
            raise PluginError(self._prefix, e) from e

    async def attested(self, key_id: str, nonce: bytes) -> str | None:
        """Return evidence made where the keys are, None when this process has to make it."""
        if not isinstance(self.manager, KeyAttestor):
            return None
        try:
            return await self.manager.attest_key(key_id, nonce)
        except SpireHwError as e:
            raise PluginError(self._prefix, e) from e

    def _checked(self, info: KeyInfo, key_id: str) -> ManagedSigner:
        if info.key_id != key_id:
            cause = SpireHwError(f'asked for key "{key_id}", got "{info.key_id}"')
            raise PluginError(self._prefix, cause)
        return ManagedSigner(self.manager, self._prefix, info, self._calls, self.uses)

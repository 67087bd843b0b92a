"""KeyManager over gRPC: one remote and one service for both hosts' packages.

Source: `spire.plugin.{agent,server}.keymanager.v1`; messages and numbers are the same in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from spire_hw._pb import plugin_agent_keymanager_pb2, plugin_server_keymanager_pb2
from spire_hw.errors import EncodingError, InvalidInputError, NotFoundError
from spire_hw.key import (
    HashAlgorithm,
    KeyType,
    SignOptions,
    check_digest,
    fingerprint,
    key_type_of,
    parse_spki,
    spki_der,
)
from spire_hw.plugin.info import Side
from spire_hw.plugin.keymanager import KeyInfo, KeySignature
from spire_hw.rpc.service import bind

if TYPE_CHECKING:
    from spire_hw.goplugin.facade.link import Link
    from spire_hw.plugin.keymanager import KeyManager
    from spire_hw.rpc.service import Call, Method

_PB: Final[dict[Side, Any]] = {
    Side.AGENT: plugin_agent_keymanager_pb2,
    Side.SERVER: plugin_server_keymanager_pb2,
}
_MAX_KEYS: Final = 1024
_MAX_FINGERPRINT_CHARS: Final = 256
# RSA-4096; ECDSA is shorter.
_MAX_SIGNATURE_BYTES: Final = 512
_MAX_SALT_BYTES: Final = 512
_HASH_LENGTH: Final = -1


def remote(link: Link, side: Side) -> RemoteKeyManager:
    """Return the contract over an external plugin."""
    return RemoteKeyManager(link, side)


def methods(plugin: KeyManager, side: Side) -> list[Method]:
    """Return the service over an object of the contract."""
    descriptor = _PB[side].DESCRIPTOR.services_by_name["KeyManager"]
    return bind(descriptor, KeyManagerService(plugin, _PB[side]))


class RemoteKeyManager:
    """An external KeyManager; see `spire_hw.plugin.keymanager.KeyManager`."""

    def __init__(self, link: Link, side: Side) -> None:
        self._link = link
        self._pb = _PB[side]
        self._service = f"/spire.plugin.{side.value}.keymanager.v1.KeyManager/"
        # What was last seen under each id, so that a key that was not replaced is noticed.
        self._seen: dict[str, str] = {}

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a key."""
        request = self._pb.GenerateKeyRequest(key_id=key_id, key_type=key_type.value)
        answer = await self._call("GenerateKey", request, self._pb.GenerateKeyResponse)
        if not answer.HasField("public_key"):
            self._link.refuse("no key in it")
        before = self._seen.pop(key_id, None)
        made = self._info(answer.public_key, key_id)
        if made.key_type is not key_type:
            self._link.refuse(f"asked for a key of type {key_type.name}, got {made.key_type.name}")
        if before is not None and before == self._seen[key_id]:
            self._link.refuse(f'key "{key_id}" was to be replaced and is still the old one')
        return made

    async def get_public_key(self, key_id: str) -> KeyInfo:
        """Return one key."""
        request = self._pb.GetPublicKeyRequest(key_id=key_id)
        answer = await self._call("GetPublicKey", request, self._pb.GetPublicKeyResponse)
        if not answer.HasField("public_key"):
            raise self._link.named(NotFoundError(f'key "{key_id}" not found'))
        return self._info(answer.public_key, key_id)

    async def get_public_keys(self) -> list[KeyInfo]:
        """Return all keys, in the plugin's order."""
        request = self._pb.GetPublicKeysRequest()
        answer = await self._call("GetPublicKeys", request, self._pb.GetPublicKeysResponse)
        listed = self._link.bounded("keys", answer.public_keys, _MAX_KEYS)
        infos = [self._info(key, key.id) for key in listed]
        if len({info.key_id for info in infos}) != len(infos):
            self._link.refuse("a key id occurs twice")
        return infos

    async def sign_data(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Sign a digest; whether the signature holds is for the caller to check."""
        request = self._pb.SignDataRequest(key_id=key_id, data=digest)
        if options.pss:
            salt = options.salt_length if options.salt_length > 0 else _HASH_LENGTH
            request.pss_options.salt_length = salt
            request.pss_options.hash_algorithm = options.hash.value
        else:
            request.hash_algorithm = options.hash.value
        answer = await self._call("SignData", request, self._pb.SignDataResponse)
        if not 1 <= len(answer.signature) <= _MAX_SIGNATURE_BYTES:
            self._link.refuse(f"a signature of {len(answer.signature)} bytes")
        self._check_fingerprint(answer.key_fingerprint)
        return KeySignature(answer.signature, answer.key_fingerprint)

    async def _call(self, method: str, request: Any, response_type: Any) -> Any:
        return await self._link.unary(self._service + method, request, response_type)

    def _info(self, message: Any, key_id: str) -> KeyInfo:
        if not message.id or message.id != key_id:
            self._link.refuse(f'asked for key "{key_id}", got "{message.id}"')
        with self._link.checking(f'key "{key_id}"'):
            public_key = parse_spki(message.pkix_data)
            key_type = key_type_of(public_key)
            if message.type != key_type.value:
                raise EncodingError("type", f"says {message.type}, the key is {key_type.name}")
        self._check_fingerprint(message.fingerprint)
        if len(self._seen) >= _MAX_KEYS:
            self._seen.clear()
        self._seen[key_id] = fingerprint(spki_der(public_key))
        return KeyInfo(key_id, key_type, public_key, message.fingerprint)

    def _check_fingerprint(self, text: str) -> None:
        if not 1 <= len(text) <= _MAX_FINGERPRINT_CHARS or not text.isprintable():
            self._link.refuse("a key fingerprint that is empty, too long or not printable")


class KeyManagerService:
    """The gRPC service over a KeyManager."""

    def __init__(self, plugin: KeyManager, pb: Any) -> None:
        self._plugin = plugin
        self._pb = pb

    async def generate_key(self, request: Any, call: Call) -> Any:
        """Serve GenerateKey."""
        made = await self._plugin.generate_key(_key_id(request), _key_type(request.key_type))
        return self._pb.GenerateKeyResponse(public_key=self._message(made))

    async def get_public_key(self, request: Any, call: Call) -> Any:
        """Serve GetPublicKey."""
        found = await self._plugin.get_public_key(_key_id(request))
        return self._pb.GetPublicKeyResponse(public_key=self._message(found))

    async def get_public_keys(self, request: Any, call: Call) -> Any:
        """Serve GetPublicKeys, in the plugin's order."""
        messages = [self._message(info) for info in await self._plugin.get_public_keys()]
        return self._pb.GetPublicKeysResponse(public_keys=messages)

    async def sign_data(self, request: Any, call: Call) -> Any:
        """Serve SignData."""
        options = _sign_options(request)
        check_digest(request.data, options)
        made = await self._plugin.sign_data(_key_id(request), request.data, options)
        return self._pb.SignDataResponse(signature=made.signature, key_fingerprint=made.fingerprint)

    def _message(self, info: KeyInfo) -> Any:
        return self._pb.PublicKey(
            id=info.key_id,
            type=info.key_type.value,
            pkix_data=spki_der(info.public_key),
            fingerprint=info.fingerprint,
        )


def _key_id(request: Any) -> str:
    if not request.key_id:
        raise InvalidInputError("key id is required")
    return str(request.key_id)


def _key_type(number: int) -> KeyType:
    try:
        return KeyType(number)
    except ValueError:
        known = ", ".join(member.name for member in KeyType)
        raise InvalidInputError(f"key type {number} is not one of {known}") from None


def _sign_options(request: Any) -> SignOptions:
    match request.WhichOneof("signer_opts"):
        case "hash_algorithm":
            return SignOptions(_hash(request.hash_algorithm))
        case "pss_options":
            salt = request.pss_options.salt_length
            if not _HASH_LENGTH <= salt <= _MAX_SALT_BYTES:
                raise InvalidInputError(f"PSS salt length {salt} is out of range")
            return SignOptions(_hash(request.pss_options.hash_algorithm), True, salt)
        case _:
            raise InvalidInputError("signer options are required")


def _hash(number: int) -> HashAlgorithm:
    try:
        return HashAlgorithm(number)
    except ValueError:
        known = ", ".join(member.name for member in HashAlgorithm)
        raise InvalidInputError(f"hash algorithm {number} is not one of {known}") from None

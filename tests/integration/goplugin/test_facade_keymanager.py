"""KeyManager over the wire: what comes through, and which answers are not believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw._pb import plugin_agent_keymanager_pb2 as agent_pb
from spire_hw._pb import plugin_server_keymanager_pb2 as pb
from spire_hw.errors import (
    DeniedError,
    DeniedReason,
    DeviceError,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    PluginError,
    SpireHwError,
)
from spire_hw.goplugin.facade import keymanager
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, spki_der, verify_digest
from spire_hw.plugin.info import PluginKind, Side
from spire_hw.plugin.keymanager import Keys
from spire_hw_plugins.keymanager.software import SoftwareKeys
from tests.integration.goplugin.wire import remote_of, remote_to, serving

if TYPE_CHECKING:
    from pathlib import Path

KM = PluginKind.KEY_MANAGER
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = HashAlgorithm.SHA256.digest(b"text")
GENERATE = "/spire.plugin.server.keymanager.v1.KeyManager/GenerateKey"
SIGN = "/spire.plugin.server.keymanager.v1.KeyManager/SignData"


def software() -> SoftwareKeys:
    keys = SoftwareKeys()
    keys.load({})
    return keys


def pkix(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    data: bytes = key.public_bytes(serialization.Encoding.DER, form)
    return data


P256 = pkix(ec.generate_private_key(ec.SECP256R1()).public_key())
P384 = pkix(ec.generate_private_key(ec.SECP384R1()).public_key())
P521 = pkix(ec.generate_private_key(ec.SECP521R1()).public_key())
RSA_1024 = pkix(rsa.generate_private_key(65537, 1024).public_key())  # noqa: S505 - refused


def key(**changes: Any) -> pb.PublicKey:
    values = {"id": "a", "type": 1, "pkix_data": P256, "fingerprint": "f"} | changes
    return pb.PublicKey(**values)


class Lying:
    """A KeyManager service that answers what it was told to."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def generate_key(self, request: Any, call: Any) -> Any:
        return self._answer

    get_public_key = get_public_keys = sign_data = generate_key


@pytest.mark.asyncio
@pytest.mark.parametrize("side", Side)
async def test_keys_are_made_listed_and_sign_over_the_wire(side: Side, tmp_path: Path) -> None:
    async with remote_of(software(), KM, tmp_path, side) as remote:
        for key_type in (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048):
            made = await remote.generate_key(key_type.name, key_type)
            assert await remote.get_public_key(key_type.name) == made
            for algorithm in HashAlgorithm:
                digest = algorithm.digest(b"text")
                for pss in {False, key_type is KeyType.RSA_2048}:
                    options = SignOptions(algorithm, pss)
                    signed = await remote.sign_data(key_type.name, digest, options)
                    assert signed.fingerprint == made.fingerprint
                    verify_digest(made.public_key, digest, signed.signature, options)
        assert [info.key_id for info in await remote.get_public_keys()] == [
            "EC_P256",
            "EC_P384",
            "RSA_2048",
        ]


@pytest.mark.asyncio
async def test_a_replaced_key_is_noticed_by_whoever_held_the_old_one(tmp_path: Path) -> None:
    async with remote_of(software(), KM, tmp_path) as remote:
        keys = Keys(remote, "mine")
        old = await keys.generate("a", KeyType.EC_P256)
        assert spki_der((await keys.generate("a", KeyType.EC_P256)).public_key) != spki_der(
            old.public_key
        )
        with pytest.raises(PluginError, match=r"^keymanager\(mine\): .*it was replaced"):
            await old.sign(DIGEST, SHA256)


@pytest.mark.asyncio
async def test_errors_keep_their_kind_and_get_the_plugins_name_once(tmp_path: Path) -> None:
    async with remote_of(software(), KM, tmp_path) as remote:
        with pytest.raises(NotFoundError, match=r'^keymanager\(mine\): key "a" not found$'):
            await remote.sign_data("a", DIGEST, SHA256)
        with pytest.raises(InvalidInputError, match="key id is required"):
            await remote.generate_key("", KeyType.EC_P256)
        with pytest.raises(PluginError, match=r'^keymanager\(mine\): key "a" not found$') as caught:
            await Keys(remote, "mine").get("a")
        assert caught.value.kind is ErrorKind.NOT_FOUND


class Failing:
    def __init__(self, error: Exception) -> None:
        self._error = error

    async def get_public_keys(self) -> Any:
        raise self._error


@pytest.mark.asyncio
async def test_device_errors_arrive_with_their_words(tmp_path: Path) -> None:
    error = DeviceError("token is away", device="hsm", operation="list")
    async with remote_of(Failing(error), KM, tmp_path) as remote:
        with pytest.raises(SpireHwError, match=r"keymanager\(mine\): token is away") as caught:
            await remote.get_public_keys()
    assert caught.value.kind is ErrorKind.INTERNAL


@pytest.mark.asyncio
async def test_a_plugin_cannot_make_agents_believe_they_are_banned(tmp_path: Path) -> None:
    error = DeniedError("go away", DeniedReason.AGENT_BANNED)
    async with remote_of(Failing(error), KM, tmp_path) as remote:
        with pytest.raises(DeniedError, match="go away") as caught:
            await remote.get_public_keys()
    assert caught.value.reason is None


@pytest.mark.asyncio
async def test_words_of_a_plugin_cannot_steer_a_terminal_or_forge_a_line(tmp_path: Path) -> None:
    error = InvalidInputError("\x1b[2Jgone\nlevel=info " + "x" * 5000)
    async with remote_of(Failing(error), KM, tmp_path) as remote:
        with pytest.raises(InvalidInputError) as caught:
            await remote.get_public_keys()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1100


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (pb.GenerateKeyResponse(), "no key"),
        (pb.GenerateKeyResponse(public_key=key(id="b")), 'asked for key "a", got "b"'),
        (pb.GenerateKeyResponse(public_key=key(id="")), 'got ""'),
        (pb.GenerateKeyResponse(public_key=key(pkix_data=b"")), "does not parse"),
        (pb.GenerateKeyResponse(public_key=key(pkix_data=b"\x30\x03junk")), "does not parse"),
        (pb.GenerateKeyResponse(public_key=key(pkix_data=P256 + b"\0")), "does not parse"),
        (pb.GenerateKeyResponse(public_key=key(pkix_data=P521)), "not a supported key type"),
        (pb.GenerateKeyResponse(public_key=key(pkix_data=RSA_1024)), "1024 bits"),
        (pb.GenerateKeyResponse(public_key=key(pkix_data=P384)), "the key is EC_P384"),
        (pb.GenerateKeyResponse(public_key=key(pkix_data=P384, type=2)), "got EC_P384"),
        (pb.GenerateKeyResponse(public_key=key(type=0)), "type"),
        (pb.GenerateKeyResponse(public_key=key(type=77)), "type"),
        (pb.GenerateKeyResponse(public_key=key(fingerprint="")), "fingerprint"),
        (pb.GenerateKeyResponse(public_key=key(fingerprint="x" * 257)), "fingerprint"),
        (pb.GenerateKeyResponse(public_key=key(fingerprint="a\nb")), "fingerprint"),
    ],
)
async def test_a_key_that_cannot_be_is_not_believed(
    answer: Any, words: str, tmp_path: Path
) -> None:
    async with remote_to(Lying(answer), pb.DESCRIPTOR, KM, tmp_path) as remote:
        with pytest.raises(SpireHwError, match=words) as caught:
            await remote.generate_key("a", KeyType.EC_P256)
    assert caught.value.kind is ErrorKind.INTERNAL
    assert caught.value.message.startswith(
        "keymanager(mine): the plugin's answer is not acceptable"
    )


@pytest.mark.asyncio
async def test_a_key_that_was_not_replaced_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    answer = pb.GenerateKeyResponse(public_key=key())
    async with remote_to(Lying(answer), pb.DESCRIPTOR, KM, tmp_path) as remote:
        await remote.generate_key("a", KeyType.EC_P256)
        with pytest.raises(SpireHwError, match="still the old one"):
            await remote.generate_key("a", KeyType.EC_P256)


@pytest.mark.asyncio
async def test_no_key_is_not_found(tmp_path: Path) -> None:
    answer = pb.GetPublicKeyResponse()
    async with remote_to(Lying(answer), pb.DESCRIPTOR, KM, tmp_path) as remote:
        with pytest.raises(NotFoundError):
            await remote.get_public_key("a")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("keys", "words"),
    [([key(), key()], "twice"), ([key(id=str(n)) for n in range(1025)], "1025 keys")],
)
async def test_lists_that_are_over_long_or_ambiguous_are_refused(
    keys: list[Any], words: str, tmp_path: Path
) -> None:
    answer = pb.GetPublicKeysResponse(public_keys=keys)
    async with remote_to(Lying(answer), pb.DESCRIPTOR, KM, tmp_path) as remote:
        with pytest.raises(SpireHwError, match=words):
            await remote.get_public_keys()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "answer",
    [
        pb.SignDataResponse(key_fingerprint="f"),
        pb.SignDataResponse(signature=b"s" * 513, key_fingerprint="f"),
        pb.SignDataResponse(signature=b"s"),
    ],
)
async def test_a_signature_that_cannot_be_is_refused(answer: Any, tmp_path: Path) -> None:
    async with remote_to(Lying(answer), pb.DESCRIPTOR, KM, tmp_path) as remote:
        with pytest.raises(SpireHwError, match="not acceptable"):
            await remote.sign_data("a", DIGEST, SHA256)


@pytest.mark.asyncio
async def test_an_answer_of_another_package_does_not_get_through(tmp_path: Path) -> None:
    lying = Lying(agent_pb.GetPublicKeysResponse())
    async with remote_to(lying, agent_pb.DESCRIPTOR, KM, tmp_path, Side.AGENT) as remote:
        assert await remote.get_public_keys() == []
    async with remote_to(lying, agent_pb.DESCRIPTOR, KM, tmp_path, Side.SERVER) as remote:
        with pytest.raises(SpireHwError) as caught:
            await remote.get_public_keys()
    assert caught.value.kind is ErrorKind.UNIMPLEMENTED


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.SignDataRequest(key_id="a", data=DIGEST), "signer options are required"),
        (pb.SignDataRequest(key_id="a", data=DIGEST, hash_algorithm=0), "hash algorithm 0"),
        (pb.SignDataRequest(key_id="a", data=DIGEST, hash_algorithm=11), "hash algorithm 11"),
        (pb.SignDataRequest(key_id="a", data=b"short", hash_algorithm=5), "digest is 5 bytes"),
        (pb.SignDataRequest(data=DIGEST, hash_algorithm=5), "key id is required"),
        (
            pb.SignDataRequest(
                key_id="a",
                data=DIGEST,
                pss_options=pb.SignDataRequest.PSSOptions(salt_length=-2, hash_algorithm=5),
            ),
            "salt length -2",
        ),
    ],
)
async def test_a_host_that_asks_nonsense_is_told_so(
    request_: Any, words: str, tmp_path: Path
) -> None:
    async with serving(keymanager.methods(software(), Side.SERVER), tmp_path) as channel:
        with pytest.raises(InvalidInputError, match=words):
            await channel.unary(SIGN, request_, pb.SignDataResponse)
        asked = pb.GenerateKeyRequest(key_id="a", key_type=9)  # type: ignore[arg-type]
        with pytest.raises(InvalidInputError, match="key type 9"):
            await channel.unary(GENERATE, asked, pb.GenerateKeyResponse)

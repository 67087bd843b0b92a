"""What hosts expect of a KeyManager.

Source: the behaviour of SPIRE 1.15's hosts towards `KeyManager` plugins.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from spire_hw._pb import plugin_agent_keymanager_pb2, plugin_server_keymanager_pb2
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.goplugin.conformance.report import (
    FailedError,
    NotedError,
    Outcome,
    SkippedError,
    answered,
    refused,
)
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, spki_der, verify_digest
from spire_hw.plugin.info import Side

if TYPE_CHECKING:
    from spire_hw.goplugin.conformance.bench import Bench
    from spire_hw.goplugin.conformance.report import Report
    from spire_hw.plugin.keymanager import KeyInfo, KeyManager

_PREFIX: Final = "spire-hw-check-"
_ID: Final = _PREFIX + "replaced"
_NOBODY: Final = _PREFIX + "nobody"
_SHA256: Final = SignOptions(HashAlgorithm.SHA256)
_DIGEST: Final = HashAlgorithm.SHA256.digest(b"check")
_AT_ONCE: Final = 64
_BAD: Final = ErrorKind.INVALID_ARGUMENT


async def examine(bench: Bench, report: Report) -> None:
    """Ask everything; leaves keys called `spire-hw-check-...` behind, there is no way to remove them."""
    keys: KeyManager = bench.contract
    made = False
    for key_type in KeyType:
        async with report.step(f"makes {key_type.config_name} keys and signs with them") as step:
            await _type(keys, key_type)
        made = made or step.outcome is Outcome.PASSED
    if not made:
        return
    async with report.step("returns and lists its keys"):
        await _lists(keys)
    async with report.step("replaces a key by another one"):
        await _replaces(keys)
    async with report.step("knows no key it has not made"):
        await refused(keys.get_public_key(_NOBODY), "GetPublicKey", ErrorKind.NOT_FOUND)
        await refused(keys.sign_data(_NOBODY, _DIGEST, _SHA256), "SignData", ErrorKind.NOT_FOUND)
    async with report.step("refuses an empty key id"):
        await refused(keys.generate_key("", KeyType.EC_P256), "GenerateKey", _BAD)
        await refused(keys.get_public_key(""), "GetPublicKey", _BAD, ErrorKind.NOT_FOUND)
        await refused(keys.sign_data("", _DIGEST, _SHA256), "SignData", _BAD)
    await _requests(bench, report)
    async with report.step("makes many signatures at once"):
        await _many(keys)


async def check_restarted(bench: Bench, made: dict[str, str]) -> None:
    """Look for keys in another run of the plugin.

    Args:
        bench: that run, configured.
        made: what `fingerprints` said in the run before.

    Raises:
        NotedError: they are gone, as they are where nothing is kept by design.
        FailedError: some of them are.
    """
    found = await fingerprints(bench)
    if not set(made) & set(found):
        raise NotedError(
            "they are gone: a server makes new CA keys then, and an agent has to attest again"
        )
    if found != made:
        raise FailedError("some of them are gone, or are other keys")


async def fingerprints(bench: Bench) -> dict[str, str]:
    """Return the keys that were made here, by id."""
    listed = await bench.contract.get_public_keys()
    return {i.key_id: i.fingerprint for i in listed if i.key_id.startswith(_PREFIX)}


async def _type(keys: KeyManager, key_type: KeyType) -> None:
    key_id = _PREFIX + key_type.config_name
    try:
        info = await keys.generate_key(key_id, key_type)
    except SpireHwError as e:
        if e.kind in {_BAD, ErrorKind.UNIMPLEMENTED}:
            raise SkippedError(f"not supported: {e.message}") from e
        raise
    is_rsa = key_type in {KeyType.RSA_2048, KeyType.RSA_4096}
    for algorithm in HashAlgorithm:
        for options in [SignOptions(algorithm)] + [SignOptions(algorithm, pss=True)] * is_rsa:
            await _signs(keys, info, options)


async def _signs(keys: KeyManager, info: KeyInfo, options: SignOptions) -> None:
    what = f"{options.hash.name}{' with PSS' if options.pss else ''}"
    digest = options.hash.digest(b"check")
    try:
        signed = await keys.sign_data(info.key_id, digest, options)
    except SpireHwError as e:
        raise FailedError(f"{what}: {answered(e)}") from e
    if signed.fingerprint != info.fingerprint:
        raise FailedError(f"{what}: signed with another key: its fingerprint does not match")
    try:
        verify_digest(info.public_key, digest, signed.signature, options)
    except SpireHwError as e:
        hint = "" if options.pss else "; is `data` hashed a second time, or an EC signature raw?"
        raise FailedError(f"{what}: {e.message}{hint}") from e


async def _lists(keys: KeyManager) -> None:
    listed = {info.key_id: info for info in await keys.get_public_keys()}
    ours = [key_id for key_id in listed if key_id.startswith(_PREFIX)]
    if not ours:
        raise FailedError("the keys it made are not listed")
    for key_id in ours:
        if await keys.get_public_key(key_id) != listed[key_id]:
            raise FailedError(f'"{key_id}" is another key when it is asked for alone')


async def _replaces(keys: KeyManager) -> None:
    old = await keys.generate_key(_ID, KeyType.EC_P256)
    new = await keys.generate_key(_ID, KeyType.EC_P256)
    if old.fingerprint == new.fingerprint:
        raise FailedError("the new key has the fingerprint of the old one")
    if spki_der(old.public_key) == spki_der(new.public_key):
        raise FailedError("the new key is the old one")
    signed = await keys.sign_data(_ID, _DIGEST, _SHA256)
    if signed.fingerprint != new.fingerprint:
        raise FailedError("it still signs with the old key")
    if [i.fingerprint for i in await keys.get_public_keys() if i.key_id == _ID] != [
        new.fingerprint
    ]:
        raise FailedError("the list does not hold the new key, and it alone")


async def _requests(bench: Bench, report: Report) -> None:
    """Send what a host of ours never would."""
    server = bench.subject.side is Side.SERVER
    pb: Any = plugin_server_keymanager_pb2 if server else plugin_agent_keymanager_pb2
    async with report.step("refuses a key type that is not named"):
        request = pb.GenerateKeyRequest(key_id=_PREFIX + "untyped")
        call = bench.call("GenerateKey", request, pb.GenerateKeyResponse)
        await refused(call, "type 0", _BAD)
    async with report.step("refuses to sign without a hash"):
        for what, options in (
            ("no signer options", {}),
            ("hash 0", {"hash_algorithm": 0}),
            ("PSS with hash 0", {"pss_options": {"salt_length": -1}}),
        ):
            request = pb.SignDataRequest(key_id=_ID, data=_DIGEST, **options)
            await refused(bench.call("SignData", request, pb.SignDataResponse), what, _BAD)
    async with report.step("refuses a digest of the wrong length"):
        request = pb.SignDataRequest(key_id=_ID, data=b"x" * 31, hash_algorithm=5)
        try:
            await refused(bench.call("SignData", request, pb.SignDataResponse), "31 bytes", _BAD)
        except FailedError as e:
            raise NotedError(f"{e} (upstream's EC keys accept any length as well)") from e


async def _many(keys: KeyManager) -> None:
    info = await keys.get_public_key(_ID)

    async def sign(number: int) -> None:
        digest = HashAlgorithm.SHA256.digest(b"%d" % number)
        signed = await keys.sign_data(_ID, digest, _SHA256)
        verify_digest(info.public_key, digest, signed.signature, _SHA256)

    await asyncio.gather(*(sign(number) for number in range(_AT_ONCE)))

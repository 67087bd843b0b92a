"""Who is shut out, and whose signatures orders need: files that were written, and others."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.files import NotWrittenError
from spire_hw_signer.operators import OperatorSettings, load_operators, load_private_key
from spire_hw_signer.policy import Policy
from spire_hw_signer.revocations import Revocations

if TYPE_CHECKING:
    from pathlib import Path

CLIENT = "spiffe://infra.example/spire-server-1"


def policy(*revoked: str) -> Policy:
    return Policy({}, frozenset(revoked), timedelta(minutes=2), "0" * 64)


@pytest.mark.asyncio
async def test_who_is_shut_out_survives(tmp_path: Path) -> None:
    path = tmp_path / "revoked.json"
    made = Revocations(path)
    await made.load()
    before = policy("sha256:aa")
    assert made.apply(before) is before
    assert await made.change(CLIENT, revoked=True)
    assert not await made.change(CLIENT, revoked=True)
    again = Revocations(path)
    await again.load()
    applied = again.apply(before)
    assert applied.revoked == {"sha256:aa", CLIENT}
    assert again.apply(before) is applied
    assert again.apply(policy()).revoked == {CLIENT}
    assert await again.change(CLIENT, revoked=False)
    assert again.apply(before) is before
    assert path.read_bytes() == b'{"revoked":[]}\n'


@pytest.mark.asyncio
@pytest.mark.parametrize("content", [b"", b"{}", b'{"revoked":{}}', b'{"revoked":[1]}', b"[]"])
async def test_a_file_that_was_not_written_here_shuts_the_signer(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "revoked.json").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"revoked clients .*revoked.json: content"):
        await Revocations(tmp_path / "revoked.json").load()


@pytest.mark.asyncio
async def test_what_cannot_be_written_is_not_in_force(tmp_path: Path) -> None:
    made = Revocations(tmp_path / "no" / "revoked.json")
    with pytest.raises(NotWrittenError):
        await made.change(CLIENT, revoked=True)
    assert made.identities == frozenset()


def public(folder: Path, name: str, key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> Path:
    file = folder / name
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    file.write_bytes(pem)
    return file


def test_operators_keys(tmp_path: Path) -> None:
    alice, bob = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    files = {"alice": public(tmp_path, "a", alice), "bob": public(tmp_path, "b", bob)}
    made = load_operators(OperatorSettings(files, 2))
    assert made.describe() == "2 of alice, bob"
    assert made.keys["bob"] == bob.public_key()
    assert load_operators(OperatorSettings()).required == 0
    same = {**files, "carol": public(tmp_path, "c", alice)}
    with pytest.raises(InvalidInputError, match="same key"):
        load_operators(OperatorSettings(same, 2))
    other = public(tmp_path, "d", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(InvalidInputError, match=r"key of operator dan .* not Ed25519"):
        load_operators(OperatorSettings({"dan": other}, 1))
    (tmp_path / "e").write_bytes(b"nothing")
    with pytest.raises(InvalidInputError, match="no PEM public key"):
        load_operators(OperatorSettings({"eve": tmp_path / "e"}, 1))
    with pytest.raises(NotReadyError, match="key of operator fay"):
        load_operators(OperatorSettings({"fay": tmp_path / "f"}, 1))


def test_private_keys_are_ed25519_without_a_passphrase(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()

    def written(made: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, secret: bytes = b"") -> Path:
        how = (
            serialization.BestAvailableEncryption(secret)
            if secret
            else serialization.NoEncryption()
        )
        pem = made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
        (tmp_path / "key").write_bytes(pem)
        return tmp_path / "key"

    assert load_private_key(written(key)).public_key() == key.public_key()
    for wrong in (written(key, b"secret"),):
        with pytest.raises(InvalidInputError, match="without a passphrase"):
            load_private_key(wrong)
    with pytest.raises(InvalidInputError, match="not Ed25519"):
        load_private_key(written(ec.generate_private_key(ec.SECP256R1())))

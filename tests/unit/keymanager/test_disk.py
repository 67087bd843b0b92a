from __future__ import annotations

import base64
import json
import stat
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.errors import ConfigError, NotReadyError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, fingerprint, spki_der
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager import disk

if TYPE_CHECKING:
    from pathlib import Path


def host(data_dir: Path, side: Side = Side.SERVER) -> HostInfo:
    return HostInfo(
        side=side,
        trust_domain=TrustDomain.parse("example.org"),
        data_dir=data_dir,
        log=get_logger("test"),
        clock=SystemClock(),
    )


async def configured(path: Path) -> Any:
    manager = disk.build(host(path.parent))
    await manager.configure(Body.from_dict({"keys_path": str(path)}))
    return manager


@pytest.mark.asyncio
async def test_the_file_is_upstreams(tmp_path: Path) -> None:
    manager = await configured(tmp_path / "keys.json")
    made = await manager.generate_key("x509-CA-A", KeyType.EC_P384)
    content = (tmp_path / "keys.json").read_text()
    document = json.loads(content)
    assert list(document) == ["keys"]
    key = load_der_private_key(base64.b64decode(document["keys"]["x509-CA-A"]), None)
    assert fingerprint(spki_der(key.public_key())) == made.fingerprint  # type: ignore[arg-type]
    assert content.startswith('{\n\t"keys": {\n\t\t"x509-CA-A": "')
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600


@pytest.mark.asyncio
async def test_a_file_written_by_upstream_is_read(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    text = json.dumps({"keys": {"JWT-Signer-A": base64.b64encode(der).decode()}}, indent="\t")
    (tmp_path / "keys.json").write_text(text)
    manager = await configured(tmp_path / "keys.json")
    (found,) = await manager.get_public_keys()
    assert (found.key_id, found.key_type) == ("JWT-Signer-A", KeyType.EC_P256)
    assert found.fingerprint == fingerprint(spki_der(key.public_key()))


@pytest.mark.asyncio
async def test_the_old_key_stays_when_it_cannot_be_stored(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    manager = await configured(folder / "keys.json")
    old = await manager.generate_key("a", KeyType.EC_P256)
    before = (folder / "keys.json").read_bytes()
    folder.rename(tmp_path / "elsewhere")
    for key_id in ("a", "b"):
        with pytest.raises(SpireHwError, match="cannot be written"):
            await manager.generate_key(key_id, KeyType.EC_P256)
    assert [k.fingerprint for k in await manager.get_public_keys()] == [old.fingerprint]
    made = await manager.sign_data("a", bytes(32), SignOptions(HashAlgorithm.SHA256))
    assert made.fingerprint == old.fingerprint
    assert (tmp_path / "elsewhere" / "keys.json").read_bytes() == before
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["keys.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"keys": []}',
        '{"keys": {"a": 1}}',
        '{"keys": {"a": "!"}}',
        '{"keys": {"a": "AAAA"}}',
        '{"keys": {"": ""}}',
        "[" * 100000,
    ],
)
@pytest.mark.asyncio
async def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(NotReadyError, match="key file"):
        await configured(path)
    assert path.read_text() == content


@pytest.mark.asyncio
async def test_no_key_content_is_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": {"a": base64.b64encode(b"SECRETSECRET").decode()}}))
    with pytest.raises(NotReadyError) as caught:
        await configured(path)
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "SECRET" not in str(chain)
        assert base64.b64encode(b"SECRETSECRET").decode() not in str(chain)
        chain = chain.__cause__


@pytest.mark.asyncio
async def test_missing_settings_are_refused(tmp_path: Path) -> None:
    for side in Side:
        manager = disk.build(host(tmp_path, side))
        assert manager.validate(Body.empty())
        with pytest.raises(ConfigError):
            await manager.configure(Body.empty())


@pytest.mark.asyncio
async def test_the_agents_directory_must_be_there(tmp_path: Path) -> None:
    manager = disk.build(host(tmp_path, Side.AGENT))
    with pytest.raises(NotReadyError, match="does not exist"):
        await manager.configure(Body.from_dict({"directory": str(tmp_path / "missing")}))

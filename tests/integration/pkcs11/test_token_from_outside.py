"""What other PKCS#11 programs see of our keys."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import parse
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, parse_spki, spki_der
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.keymanager import KeyEvidenceSource
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager import pkcs11
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import PIN, TokenRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
needs_tool = pytest.mark.skipif(
    shutil.which("pkcs11-tool") is None, reason="pkcs11-tool (opensc) is not installed"
)


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[TokenRig]:
    async with TokenRig(tmp_path) as made:
        yield made


def tool(rig: TokenRig, *arguments: str) -> bytes:
    command = ["pkcs11-tool", "--module", rig.hsm.module, "--token-label", "spire", *arguments]
    done = subprocess.run(  # noqa: S603
        command, env={**os.environ, **rig.hsm.environment}, check=True, capture_output=True
    )
    return done.stdout


@needs_tool
@pytest.mark.asyncio
async def test_keys_are_sensitive_local_and_never_extractable(rig: TokenRig) -> None:
    manager = await rig.start()
    for key_type in (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048):
        await manager.generate_key(key_type.config_name, key_type)
    shown = tool(rig, "--login", "--pin", PIN, "--list-objects", "--type", "privkey").decode()
    access = [line.split(":", 1)[1] for line in shown.splitlines() if "Access:" in line]
    assert len(access) == 3
    for line in access:
        flags = {flag.strip() for flag in line.split(",")}
        assert {"sensitive", "always sensitive", "never extractable", "local"} <= flags
    usage = [line.split(":", 1)[1].strip() for line in shown.splitlines() if "Usage:" in line]
    assert usage == ["sign"] * 3


@needs_tool
@pytest.mark.asyncio
async def test_another_program_signs_with_the_same_key(rig: TokenRig, tmp_path: Path) -> None:
    manager = await rig.start()
    info = await manager.generate_key("a", KeyType.EC_P256)
    cka_id = (await manager.key_evidence("a")).attributes["CKA_ID"]
    (tmp_path / "digest").write_bytes(b"\x11" * 32)
    tool(rig, "--login", "--pin", PIN, "--sign", "--mechanism", "ECDSA", "--id", cka_id,
         "--input-file", str(tmp_path / "digest"), "--output-file", str(tmp_path / "signature"))  # fmt: skip
    raw = (tmp_path / "signature").read_bytes()
    der = utils.encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    assert isinstance(info.public_key, ec.EllipticCurvePublicKey)
    info.public_key.verify(der, b"\x11" * 32, ec.ECDSA(utils.Prehashed(SHA256())))
    public = tool(rig, "--read-object", "--type", "pubkey", "--id", cka_id)
    assert spki_der(parse_spki(public)) == spki_der(info.public_key)


@pytest.mark.asyncio
async def test_evidence_says_where_the_key_is(rig: TokenRig) -> None:
    manager = await rig.start()
    assert isinstance(manager, KeyEvidenceSource)
    await manager.generate_key("x509-CA-A", KeyType.EC_P384)
    evidence = await manager.key_evidence("x509-CA-A")
    assert f'token "spire" serial {rig.serial}' in evidence.location
    assert evidence.attributes["NEVER_EXTRACTABLE"] == "true"
    assert evidence.attributes["LOCAL"] == "true"
    assert evidence.attributes["EXTRACTABLE"] == "false"
    assert evidence.attributes["KEY_GEN_MECHANISM"] == "CKM_EC_KEY_PAIR_GEN"


@pytest.mark.asyncio
async def test_a_stanza_with_a_uri_opens_the_token(
    rig: TokenRig, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = rig.build()
    stanza = f"""
        module_path = "{rig.hsm.module}"
        uri = "pkcs11:token=spire;serial={rig.serial}?pin-source=file:{rig.pin_file}&x-made-by=us"
        workers = 2
        sign_timeout = "5s"
        key_types = ["ec-p256"]
        environment {{ SOFTHSM2_CONF = "{rig.hsm.conf}" }}
    """
    assert manager.validate(parse(stanza)) == []
    await manager.configure(parse(stanza))
    made = await manager.generate_key("a", KeyType.EC_P256)
    signed = await manager.sign_data("a", bytes(32), SignOptions(HashAlgorithm.SHA256))
    assert signed.fingerprint == made.fingerprint
    identifier = (rig.folder / "data" / "pkcs11-key-identifier").read_text()
    assert len(identifier) == 36
    assert "hsm.uri_ignored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stanza", "words"),
    [
        ("", "module_path is required"),
        ('module_path = "x.so"', "absolute"),
        ('module_path = "/x.so"\npin_file = "/p"', "token_label"),
        ('module_path = "/x.so"\ntoken_label = "a"', "exactly one of pin_file"),
        ('module_path = "/x.so"\ntoken_label = "a"\npin_file = "/p"\npin_env = "P"', "exactly one"),
        ('uri = "pkcs11:object=a"', "must name a token"),
        ('uri = "pkcs11:token=a?pin-value=1"', "pin-value"),
        ('uri = "pkcs11:token=a;type=private"', "type cannot be used here"),
        ('token_label = "b"\nuri = "pkcs11:token=a"', "exclude each other"),
        ('key_types = ["dsa"]', "dsa"),
        ('key_identifier_value = "a b"', "key_identifier_value"),
        ('key_identifier_value = "a"\nkey_identifier_file = "/f"', "exclude each other"),
        ("workers = 0", "workers"),
        ("environment { A = 1 }", "environment"),
        ('pin = "1234"', '"pin"'),
        ('profile = "lunar"', 'did you mean "luna"'),
        ('profile_overrides { omit_private = ["SENSITIVE"] }', "taken out of the token"),
        ('profile_overrides { omit_public = ["VERIFY"] }', "not VERIFY"),
        ('profile_overrides { rsa_key_gen = "own" }', "pkcs, x9.31"),
        ("profile_overrides { id_bytes = 1 }", "id_bytes"),
    ],
)
def test_fault_8_settings_are_checked_before_anything_is_touched(
    tmp_path: Path, stanza: str, words: str
) -> None:
    host = HostInfo(
        side=Side.SERVER,
        trust_domain=TrustDomain.parse("example.org"),
        data_dir=tmp_path,
        log=get_logger("test"),
        clock=SystemClock(),
    )
    found = pkcs11.build(host).validate(parse(stanza))
    assert any(words in fault.message for fault in found), found
    assert not any("1234" in fault.message for fault in found)

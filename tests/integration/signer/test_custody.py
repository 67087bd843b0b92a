"""Where a signer's keys are: a TPM, a token that a server used before, one that two signers share."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from spire_hw._pb import hw_signer_pb2
from spire_hw.cli.run import run
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.errors import ConfigError, SpireHwError
from spire_hw.key import KeyType, parse_spki
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager import pkcs11
from spire_hw_signer.cli.commands import PROGRAM, root
from spire_hw_sim.signer import PIN, TOKEN, SignerRig, client_policy
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import Swtpm

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = bytes(range(32))
LIST = hw_signer_pb2.GetPublicKeysRequest()


def verify(pkix: bytes, signature: bytes) -> None:
    public = parse_spki(pkix)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature, DIGEST, ec.ECDSA(utils.Prehashed(hashes.SHA256())))


@pytest.mark.tpm
@pytest.mark.asyncio
async def test_keys_in_a_tpm(tmp_path: Path) -> None:
    with Swtpm(tmp_path / "swtpm") as swtpm:
        text = client_policy(raw="true")
        rig = SignerRig(tmp_path / "s", keys="tpm", data=f'tcti = "{swtpm.tcti}"', policy=text)
        async with rig:
            made = await rig.generate("x509-CA-A")
            signed = await rig.sign("x509-CA-A", digest=DIGEST)
            verify(made.public_key.pkix_data, signed.signature)
            await rig.restart()
            listed = await rig.call("GetPublicKeys", LIST)
            assert list(listed.public_keys) == [made.public_key]
            head = await rig.call("GetLogHead", hw_signer_pb2.GetLogHeadRequest())
            assert parse_spki(head.log_key)


async def server_key(hsm: SoftHsm, folder: Path, server: str, key_id: str) -> str:
    """Have a server make a key in a token by itself; return the key's fingerprint."""
    pin = folder / "server-pin"
    pin.write_text(PIN)
    pin.chmod(0o600)
    data_dir = folder / "server-data"
    data_dir.mkdir(mode=0o700)
    manager = pkcs11.build(
        HostInfo(
            side=Side.SERVER,
            trust_domain=TrustDomain("example.org"),
            data_dir=data_dir,
            log=get_logger("test"),
            clock=SystemClock(),
        )
    )
    await manager.configure(
        Body.from_dict(
            {
                "module_path": hsm.module,
                "token_label": TOKEN,
                "pin_file": str(pin),
                "key_identifier_value": server,
                "environment": hsm.environment,
            }
        )
    )
    try:
        return (await manager.generate_key(key_id, KeyType.EC_P256)).fingerprint
    finally:
        await manager.close()


@pytest.mark.hsm
@pytest.mark.asyncio
async def test_a_server_that_moves_behind_a_signer_keeps_its_keys(tmp_path: Path) -> None:
    hsm = SoftHsm(tmp_path / "hsm")
    hsm.init_token(TOKEN, pin=PIN)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    fingerprint = await server_key(hsm, tmp_path / "one", "s1", "x509-CA-A")
    other = await server_key(hsm, tmp_path / "other", "s2", "x509-CA-A")
    text = client_policy(server="s1", raw="true")
    async with SignerRig(tmp_path / "s", hsm=hsm, policy=text) as rig:
        listed = await rig.call("GetPublicKeys", LIST)
        assert [k.fingerprint for k in listed.public_keys] == [fingerprint]
        assert other != fingerprint
        signed = await rig.sign("x509-CA-A", digest=DIGEST)
        assert signed.fingerprint == fingerprint


@pytest.mark.hsm
@pytest.mark.asyncio
async def test_a_replaced_key_is_kept_for_as_long_as_policy_says(tmp_path: Path) -> None:
    text = client_policy(raw="true", retain_replaced='"1h"')
    async with SignerRig(tmp_path, policy=text) as rig:
        first = (await rig.generate("x509-CA-A")).public_key.fingerprint
        second = (await rig.generate("x509-CA-A")).public_key.fingerprint
        (keys,) = rig.signer.live.owners.values()
        retained = await keys.manager.retained_keys()  # type: ignore[attr-defined]
        assert [r.info.fingerprint for r in retained] == [first]
        listed = await rig.call("GetPublicKeys", LIST)
        assert [k.fingerprint for k in listed.public_keys] == [second]


async def shell(rig: SignerRig, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Run an operator's command on the signer's host; return what it prints."""
    capsys.readouterr()
    args = ["key", *words, "-socketPath", str(rig.admin_socket), "-output", "json"]
    code = await asyncio.to_thread(run, root, PROGRAM, args)
    out, err = capsys.readouterr()
    assert code == 0, (words, out, err)
    return json.loads(out[out.index("{") :].splitlines()[-1])


@pytest.mark.tpm
@pytest.mark.asyncio
async def test_a_key_that_was_replaced_in_a_tpm_is_taken_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, text = "example.org/s1/x509-CA-A", client_policy(raw="true", active_window='"1s"')
    with Swtpm(tmp_path / "swtpm") as swtpm:
        rig = SignerRig(tmp_path / "s", keys="tpm", data=f'tcti = "{swtpm.tcti}"', policy=text)
        async with rig:
            first = (await rig.generate("x509-CA-A")).public_key
            second = (await rig.generate("x509-CA-A")).public_key
            for _ in range(2):
                listed = (await shell(rig, capsys, "list"))["keys"]
                kept = {k["public_key"]["fingerprint"]: k for k in listed if k.get("retained")}
                assert list(kept) == [first.fingerprint]
                assert int(kept[first.fingerprint]["generation"]) == 1
                left_s = (
                    int(kept[first.fingerprint]["retained_until"]) - SystemClock().now().timestamp()
                )
                assert 25 * 3600 < left_s <= 26 * 3600
                await rig.restart()
            await shell(rig, capsys, "restore", f"{key}@1", "-comment", "swapped")
            answer = await rig.call("GetPublicKeys", LIST)
            assert [k.fingerprint for k in answer.public_keys] == [first.fingerprint]
            verify(first.pkix_data, (await rig.sign("x509-CA-A", digest=DIGEST)).signature)
            await shell(rig, capsys, "destroy", f"{key}@2", "-comment", "known to others")
            (left,) = (await shell(rig, capsys, "list"))["keys"]
            assert left["public_key"]["fingerprint"] == first.fingerprint != second.fingerprint
            assert int(left["generation"]) == 1


@pytest.mark.asyncio
async def test_policy_that_has_keys_kept_which_are_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = client_policy(raw="true", retain_replaced='"26h"')
    rig = SignerRig(tmp_path, keys="disk", policy=said)
    words = 'retain_replaced: KeyManager "disk" keeps no replaced keys'
    with pytest.raises(ConfigError, match=words):
        await rig.start()
    validate = ["validate", "-config", str(rig.config_file)]
    assert await asyncio.to_thread(run, root, PROGRAM, validate) != 0
    out, err = capsys.readouterr()
    assert words in out + err
    rig.write_policy(said.replace('"26h"', '"0s"'))
    assert await asyncio.to_thread(run, root, PROGRAM, validate) == 0
    async with rig:
        # What is in force stays when a reload would have it otherwise.
        rig.write_policy(said)
        assert not await rig.signer.live.reload(by="signal")
        assert words in rig.signer.live.fault
        await rig.generate("x509-CA-A")


@pytest.mark.hsm
@pytest.mark.asyncio
async def test_the_log_key_is_out_of_reach(tmp_path: Path) -> None:
    text = client_policy(raw="true", keys='["*"]', generate='{ per_key_min_interval = "0s" }')
    async with SignerRig(tmp_path, policy=text) as rig:
        head = await rig.call("GetLogHead", hw_signer_pb2.GetLogHeadRequest())
        assert not (await rig.call("GetPublicKeys", LIST)).public_keys
        result = await rig.sign("audit-log", digest=DIGEST)
        assert result.refusal.reason == "no_key"
        made = await rig.generate("audit-log", request_id=secrets.token_bytes(16))
        assert made.public_key.pkix_data != head.log_key
        again = await rig.call("GetLogHead", hw_signer_pb2.GetLogHeadRequest())
        assert again.log_key == head.log_key


_CEREMONY = """
import hashlib, sys, pkcs11
from pkcs11 import Attribute, KeyType, MechanismFlag
from pkcs11.util.ec import encode_named_curve_parameters, encode_ec_public_key
module, token, pin = sys.argv[1:]
with pkcs11.lib(module).get_token(token_label=token).open(rw=True, user_pin=pin) as session:
    curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    public, _ = session.create_domain_parameters(KeyType.EC, curve, local=True).generate_keypair(
        store=True, label="root of 2026", id=b"r26",
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY)
    print(hashlib.sha256(encode_ec_public_key(public)).hexdigest())
"""


def ceremony(hsm: SoftHsm) -> str:
    """Make a key in a token without any of our code; return its fingerprint."""
    made = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-c", _CEREMONY, hsm.module, TOKEN, PIN],
        env={**os.environ, **hsm.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return made.stdout.strip()


@pytest.mark.hsm
@pytest.mark.asyncio
async def test_a_key_of_a_ceremony_is_used_and_never_made_anew(tmp_path: Path) -> None:
    hsm = SoftHsm(tmp_path / "hsm")
    hsm.init_token(TOKEN, pin=PIN)
    fingerprint = ceremony(hsm)
    text = client_policy(raw="true").removesuffix("}\n")
    text += '  import "x509-CA-A" { label = "root of 2026" }\n}\n'
    async with SignerRig(tmp_path / "s", hsm=hsm, policy=text) as rig:
        signed = await rig.sign("x509-CA-A", digest=DIGEST)
        assert signed.fingerprint == fingerprint
        assert (await rig.generate("x509-CA-A")).refusal.reason == "replace_active"
        (keys,) = rig.signer.live.owners.values()
        keys.notes.unused("x509-CA-A")
        with pytest.raises(SpireHwError, match="audit log tells why"):
            await rig.generate("x509-CA-A")
        again = await rig.sign("x509-CA-A", digest=DIGEST)
        assert again.fingerprint == fingerprint

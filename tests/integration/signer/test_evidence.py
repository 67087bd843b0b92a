"""`spire-hw-signer key attest`: where clients' keys are, under the signature of the log key."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from spire_hw._pb import hw_keys_pb2 as keys_pb
from spire_hw._pb import hw_signer_admin_pb2 as pb
from spire_hw._pb import hw_signer_pb2 as signer_pb
from spire_hw.cli.run import ExitCode, run
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.key import fingerprint
from spire_hw.rpc.client import connect_unix
from spire_hw_signer.cli.commands import PROGRAM, root
from spire_hw_sim.liarsigner import write_client
from spire_hw_sim.signer import SignerRig, client_policy
from spire_hw_sim.world import TRUST_DOMAIN, World

if TYPE_CHECKING:
    from pathlib import Path

    from google.protobuf.message import Message

pytestmark = [pytest.mark.asyncio, pytest.mark.hsm]

NONCE = "00112233445566778899"
TARGET = "example.org/s1/x509-CA-A"


async def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = await asyncio.to_thread(run, root, PROGRAM, args)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


async def ask(rig: SignerRig, method: str, request: Message, kind: type[Message]) -> Message:
    async with connect_unix(rig.admin_socket) as channel:
        path = f"/spire_hw.signer.v1.SignerAdmin/{method}"
        return await channel.unary(path, request, kind, timeout_s=30)


async def test_a_clients_key_is_attested_by_the_log_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "evidence")
    async with SignerRig(tmp_path / "s") as rig:
        where = ("-socketPath", str(rig.admin_socket))
        made = await rig.generate("x509-CA-A")
        status = await ask(rig, "GetStatus", pb.GetStatusRequest(), pb.Status)
        code, _, err = await command(
            capsys, "key", "attest", TARGET, "-nonce", NONCE, "-out", file, *where
        )
        assert (code, "Evidence written" in err) == (0, True)
    directory = status.log_directory  # type: ignore[attr-defined]
    log = (await command(capsys, "log", "show", directory, "-output", "json"))[1]
    checks = ("key", "attest", "-verify", file, "-nonce", NONCE)
    code, out, err = await command(capsys, *checks, "-output", "json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["key"]["fingerprint"] == made.public_key.fingerprint
    assert found["key"]["custody"] == "hsm reported"
    assert found["key"]["attributes"]["NEVER_EXTRACTABLE"] == "true"
    assert found["trust_domain"] == "example.org"
    assert found["signer"]["id"] == "audit-log"
    assert found["signer"]["spki"] == status.log_key.hex()  # type: ignore[attr-defined]
    code, _, err = await command(capsys, *checks, "-signer", "0" * 64)
    assert (code, "[signer_unknown]" in err) == (1, True)
    assert "key_attested" in log


@pytest.mark.parametrize(
    ("target", "nonce", "status"),
    [
        ("example.org/s1/x509-CA-B", NONCE, ExitCode.NOT_FOUND),
        ("example.org/s2/x509-CA-A", NONCE, ExitCode.NOT_FOUND),
        ("signer.invalid/signer-1/audit-log", NONCE, ExitCode.NOT_FOUND),
        ("x" * 100_000, NONCE, ExitCode.NOT_FOUND),
        (TARGET, "00", ExitCode.USAGE),
    ],
)
async def test_what_there_is_no_evidence_of(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
    nonce: str,
    status: ExitCode,
) -> None:
    async with SignerRig(tmp_path / "s") as rig:
        await rig.generate("x509-CA-A")
        where = ("-socketPath", str(rig.admin_socket))
        code, _, err = await command(capsys, "key", "attest", target, "-nonce", nonce, *where)
    assert code == status
    assert "Traceback" not in err
    assert len(err) < 1000


async def test_operators_see_where_clients_keys_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with SignerRig(tmp_path / "s") as rig:
        await rig.generate("x509-CA-A")
        where = ("-socketPath", str(rig.admin_socket))
        code, out, _ = await command(capsys, "key", "list", *where)
        assert code == 0
        assert "Custody            : hsm reported\n" in out
        assert "Device             : SoftHSM v2\n" in out
        shown = json.loads((await command(capsys, "key", "list", "-output", "json", *where))[1])
    (key,) = shown["keys"]
    assert key["custody"]["attributes"]["NEVER_EXTRACTABLE"] == "true"
    assert key["custody"]["token"].startswith("signer")
    assert key["trouble"] == ""


async def test_a_client_is_told_of_its_own_keys_and_not_too_often(tmp_path: Path) -> None:
    other = client_policy("sha256:" + "0" * 64, trust_domain="other.org", server="s2")
    async with SignerRig(tmp_path / "s", policy=client_policy() + other) as rig:
        made = await rig.generate("x509-CA-A")

        async def custody(key_id: str) -> signer_pb.GetKeyCustodyResponse:
            channel = await rig.channel()
            return await channel.unary(
                "/spire_hw.signer.v1.Custody/GetKeyCustody",
                signer_pb.GetKeyCustodyRequest(key_id=key_id),
                signer_pb.GetKeyCustodyResponse,
                timeout_s=30,
            )

        told = await custody("x509-CA-A")
        assert told.fingerprint == made.public_key.fingerprint
        assert told.custody.custody == "hsm reported"
        assert told.log_head.seq > 0
        for key_id, kind in (
            ("x509-CA-B", ErrorKind.NOT_FOUND),
            ("audit-log", ErrorKind.PERMISSION_DENIED),
            ("x" * 300, ErrorKind.INVALID_ARGUMENT),
            ("a\nb", ErrorKind.INVALID_ARGUMENT),
        ):
            with pytest.raises(SpireHwError) as caught:
                await custody(key_id)
            assert caught.value.kind is kind
        channel = await rig.channel()
        for nonce in (b"", bytes(7), bytes(65)):
            request = signer_pb.AttestOwnKeyRequest(key_id="x509-CA-A", nonce=nonce)
            with pytest.raises(InvalidInputError, match="nonce"):
                await channel.unary(
                    "/spire_hw.signer.v1.Custody/AttestOwnKey",
                    request,
                    signer_pb.AttestOwnKeyResponse,
                    timeout_s=30,
                )
        request = signer_pb.AttestOwnKeyRequest(key_id="x509-CA-A", nonce=bytes(8))
        kinds: list[ErrorKind] = []
        while ErrorKind.RESOURCE_EXHAUSTED not in kinds and len(kinds) < 500:
            try:
                await channel.unary(
                    "/spire_hw.signer.v1.Custody/AttestOwnKey",
                    request,
                    signer_pb.AttestOwnKeyResponse,
                    timeout_s=30,
                )
            except SpireHwError as e:
                kinds.append(e.kind)
        assert set(kinds) == {ErrorKind.RESOURCE_EXHAUSTED}


async def test_a_server_tells_what_its_signer_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = client_policy(trust_domain=TRUST_DOMAIN, raw="false")
    async with SignerRig(tmp_path / "s", policy=policy) as rig:
        files = write_client(rig.authority, tmp_path / "client")
        plugin = f"""KeyManager "remote" {{ plugin_data {{
          addresses = ["127.0.0.1:{rig.port}"]
          signer_ca = "{files.ca}"
          signer_id = "spiffe://infra.example/signer"
          cert = "{files.cert}"
          key = "{files.key}"
        }} }}"""
        status = await ask(rig, "GetStatus", pb.GetStatusRequest(), pb.Status)
        async with World(server_plugins=plugin) as world:
            path = "/spire_hw.server.v1.Keys/"
            listed = await world.call(
                path + "ListKeys", keys_pb.ListKeysRequest(), keys_pb.ListKeysResponse
            )
            assert {key.id for key in listed.keys} == {"x509-CA-A", "JWT-Signer-A"}
            for key in listed.keys:
                assert key.custody == "signer stated: hsm reported"
                assert key.location.startswith(f"signer 127.0.0.1:{rig.port}: PKCS#11 token")
                assert (key.device, key.token.split("/")[0]) == ("SoftHSM v2", "signer")
                assert key.attributes["stated NEVER_EXTRACTABLE"] == "true"
                assert key.trouble == ""
            request = keys_pb.AttestKeyRequest(id="x509-CA-A", nonce=bytes(16))
            made = await world.call(path + "AttestKey", request, keys_pb.AttestKeyResponse)
            request.attestation.append(b"certificate")
            with pytest.raises(InvalidInputError, match="spire-hw-signer key attest"):
                await world.call(path + "AttestKey", request, keys_pb.AttestKeyResponse)
        logged = [p.read_text() for p in (tmp_path / "s" / "data").rglob("audit-*.log")]
        assert any('"key_attested"' in text and "spire-server-1" in text for text in logged)
        assert not any('"refusal"' in text for text in logged)
    log_key = fingerprint(status.log_key)  # type: ignore[attr-defined]
    file = tmp_path / "evidence"
    file.write_text(made.evidence)
    checks = ("key", "attest", "-verify", str(file), "-nonce", "00" * 16, "-signer", log_key)
    code, out, err = await command(capsys, *checks, "-output", "json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["key"]["custody"], found["signer"]["id"]) == ("hsm reported", "audit-log")

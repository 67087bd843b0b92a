"""What operators type: status, keys, orders of two, the log verified, shown and sealed."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw import log
from spire_hw._pb import hw_signer_pb2 as pb
from spire_hw.cli.run import run
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.log import LogSettings
from spire_hw_signer.audit.record import file_name
from spire_hw_signer.cli.commands import PROGRAM, root
from spire_hw_sim.auditrig import read_all
from spire_hw_sim.signer import SignerRig, client_policy
from spire_hw_sim.yubishell import YubiHsmLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.asyncio
CLIENT = "spiffe://infra.example/spire-server-1"
FAILED, USAGE, DENIED, PARTLY = 1, 2, 4, 6


class Shell:
    """Runs commands as an operator does, in a directory of their own; the signer runs beside."""

    def __init__(self, folder: Path, rig: SignerRig, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.rig = rig
        self._capsys = capsys

    async def run(self, *args: str, code: int = 0) -> str:
        """Run a command; return what it printed."""
        self._capsys.readouterr()
        came_to = await asyncio.to_thread(run, root, PROGRAM, args)
        out, err = self._capsys.readouterr()
        assert came_to == code, (args, out, err)
        return err if code in {USAGE, DENIED} else out

    async def json(self, *args: str, code: int = 0) -> Any:
        """Run a command that prints JSON."""
        return json.loads(await self.run(*args, "-output", "json", code=code))


@pytest.fixture
def make_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Shell]]:
    folder = tmp_path / "w"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # A signer that runs beside the commands writes its lines elsewhere.
    log.configure(LogSettings(file=tmp_path / "log"))

    def made(more: str = "") -> Shell:
        policy = client_policy(raw="true")
        rig = SignerRig(folder / "s", keys="disk", policy=policy, more=more)
        monkeypatch.setenv("SPIRE_HW_SOCKET_PATH", str(rig.admin_socket))
        return Shell(folder, rig, capsys)

    yield made
    log.configure(LogSettings())


async def test_status_tells_what_is_wrong_with_the_log_of_the_device(
    tmp_path: Path, make_shell: Callable[..., Shell]
) -> None:
    device = YubiHsmLog(tmp_path / "device")
    reads = json.dumps(list(device.command("get-logs")))
    at = make_shell(
        f"""
  device_log {{
    format      = "yubihsm"
    read        = {reads}
    secret_file = "{device.secret_file}"
    interval    = "1s"
  }}"""
    )

    async def told(line: str) -> None:
        async with asyncio.timeout(20):
            while line not in await at.run("status"):  # noqa: ASYNC110 - it happens elsewhere
                await asyncio.sleep(0.2)

    async with at.rig:
        assert "device_log_trouble" in await at.json("status")
        await told("Device log trouble : none\n")
        device.secret_file.write_text("another")
        await told(f"Device log trouble : {device.command('get-logs')[0]}")


async def test_status_keys_and_clients(tmp_path: Path, make_shell: Callable[..., Shell]) -> None:
    more = f'audit {{\n checkpoint_file = "{tmp_path}/copy"\n }}'
    at = make_shell(more)
    async with at.rig:
        await at.rig.generate("x509-CA-A")
        text = await at.run("status")
        assert f"Witness 1          : {tmp_path}/copy\n" in text
        assert "Orders signed by   : nobody: not asked for" in text
        listed = await at.json("key", "list")
        assert [k["public_key"]["id"] for k in listed["keys"]] == ["x509-CA-A"]
        assert "example.org/s1/x509-CA-A@1" in await at.run("key", "list")
        await at.run("client", "revoke", CLIENT, "-comment", "taken over")
        assert f"Revoked            : {CLIENT}" in await at.run("status")
        assert "was revoked already" in await at.run("client", "revoke", CLIENT)
        assert "names no such client" not in await at.run("client", "revoke", CLIENT)
        assert "names no such client" in await at.run("client", "revoke", f"{CLIENT}x")
        file = str(at.rig.policy_file)
        assert await at.run("policy", "hash", file) == (await at.json("status"))["policy"] + "\n"
        await at.run("client", "unrevoke", CLIENT)
        assert "the policy is the same" in await at.run("policy", "reload")
        assert "the clock is right" in await at.run("clock", "accept")
        error = await at.run("key", "restore", "nonsense", code=USAGE)
        assert "is no generation of a key" in error
        await at.run("key", "destroy", "other.test/s9/k@1", code=5)
        await at.run("key", "destroy", "example.org/s1/x509-CA-A@1", code=FAILED)
    audit = at.rig.folder / "data" / "audit"
    shown = await at.run("log", "show", str(audit), "-kind", "order")
    assert "action=client.revoke" in shown
    assert 'comment="taken over"' in shown
    last = await at.json("log", "show", str(audit), "-last", "1")
    assert last["records"][0]["kind"] == "checkpoint"


async def test_a_client_is_shut_out_however_its_name_is_written(
    make_shell: Callable[..., Shell],
) -> None:
    at = make_shell()
    async with at.rig:
        digest = hashlib.sha256(at.rig.identity.chain_der[0]).hexdigest()
        as_openssl_has_it = f"sha256:{digest.upper()}"
        await at.rig.call("GetPublicKeys", pb.GetPublicKeysRequest())
        await at.run("client", "revoke", as_openssl_has_it)
        with pytest.raises(SpireHwError) as caught:
            await at.rig.call("GetPublicKeys", pb.GetPublicKeysRequest())
        assert caught.value.kind is ErrorKind.UNAUTHENTICATED
        assert f"Revoked            : sha256:{digest}\n" in await at.run("status")
        await at.run("client", "unrevoke", as_openssl_has_it)
        await at.rig.call("GetPublicKeys", pb.GetPublicKeysRequest())
        for name in ("spire-server-1", "sha256:3f0c", f"{CLIENT}/"):
            await at.run("client", "revoke", name, code=USAGE)
        assert "Revoked" not in await at.run("status")


async def test_two_of_three_agree(tmp_path: Path, make_shell: Callable[..., Shell]) -> None:
    folder = tmp_path / "w"
    keys = "\n".join(f'{n} = "{folder}/{n}.key.pub"' for n in ("alice", "bob", "carol"))
    more = f"operators {{\n required = 2\n keys {{\n{keys}\n}}\n}}"
    at = make_shell(more)
    for name in ("alice", "bob", "carol"):
        await at.run("order", "keygen", "-out", f"{name}.key")
        assert (folder / f"{name}.key").stat().st_mode & 0o777 == 0o600
    await at.run("order", "keygen", "-out", "alice.key", code=FAILED)
    async with at.rig:
        assert "2 of alice, bob, carol" in await at.run("status")
        await at.run("policy", "reload", code=DENIED)
        make = ("order", "create", "-action", "policy.reload", "-out", "o.json")
        await at.run(*make, "-comment", "ticket 4711")
        submit = ("order", "submit", "-order", "o.json")
        assert "[too_few]" in await at.run(*submit, code=DENIED)
        sign = ("order", "sign", "-order", "o.json")
        await at.run(*sign, "-name", "alice", "-key", "alice.key", code=USAGE)  # nobody to ask
        await at.run(*sign, "-name", "alice", "-key", "alice.key", "-yes")
        await at.run(*sign, "-name", "alice", "-key", "alice.key", "-yes", code=USAGE)
        assert "[too_few]" in await at.run(*submit, code=DENIED)
        await at.run(*sign, "-name", "bob", "-key", "bob.key", "-yes")
        shown = await at.run("order", "show", "-order", "o.json")
        assert "Signed by   : alice, bob" in shown
        assert "Done     : the policy is the same" in await at.run(*submit)
        assert "[replayed]" in await at.run(*submit, code=DENIED)
        await at.run(*make[:-1], "p.json", "-expires", "169h", code=USAGE)
        await at.run("client", "revoke", CLIENT)
    orders = await at.json("log", "show", str(at.rig.folder / "data/audit"), "-kind", "order")
    told = [(r["action"], r["accepted"], r["reason"]) for r in orders["records"]]
    assert told == [
        ("policy.reload", 0, "no_order"),
        ("policy.reload", 0, "too_few"),
        ("policy.reload", 0, "too_few"),
        ("policy.reload", 1, ""),
        ("policy.reload", 0, "replayed"),
        ("client.revoke", 1, ""),
    ]
    assert orders["records"][3]["operators"][:2] == ["alice", "bob"]


async def test_a_log_is_verified_and_sealed_by_two(
    tmp_path: Path, make_shell: Callable[..., Shell]
) -> None:
    folder = tmp_path / "w"
    keys = "\n".join(f'{n} = "{folder}/{n}.key.pub"' for n in ("alice", "bob"))
    more = (
        f"operators {{\n keys {{\n{keys}\n}}\n}}\n"
        f'audit {{\n checkpoint_file = "{tmp_path}/copy"\n }}'
    )
    at = make_shell(more)
    for name in ("alice", "bob"):
        await at.run("order", "keygen", "-out", f"{name}.key")
    async with at.rig:
        await at.rig.generate("x509-CA-A")
        for _ in range(5):
            assert (await at.rig.sign("x509-CA-A", digest=bytes(32))).signature
        (folder / "log.pem").write_text(await at.run("log", "key"))
        status = await at.json("status")
        head = status["log_head"]
    audit = at.rig.folder / "data" / "audit"
    heads = f"# witnessed\n{head['seq']} {bytes_hex(head['hash'])} server-1\n"
    (folder / "heads.txt").write_text(heads)
    verify = ("log", "verify", str(audit), "-logKey", "log.pem", "-witness", "heads.txt")
    copy = ("-checkpoints", f"{tmp_path}/copy")
    report = await at.json(*verify, *copy)
    assert (report["verdict"], report["findings"], report["witnessed"]) == ("holds", [], 3)
    # A record is taken out: nothing starts, all is told.
    lines = read_all(audit)
    (audit / file_name(1)).write_bytes(b"".join(lines[:8] + lines[9:]))
    config = ("-config", str(at.rig.config_file))
    assert "does NOT hold" in await at.run(*verify, *copy, code=FAILED)
    dry = await at.json("log", "seal", *config, "-dryRun")
    assert (dry["broken"], dry["good"]["seq"]) == (True, 8)
    await at.run("log", "seal", *config, "-comment", "x", code=DENIED)
    make = ("order", "create", "-action", "log.seal", "-target", dry["target"], "-out", "o.json")
    good = f"{dry['good']['seq']}:{dry['good']['hash']}"
    await at.run(*make, "-log", dry["log"], "-head", good)
    for name in ("alice", "bob"):
        sign = ("order", "sign", "-order", "o.json", "-name", name, "-key", f"{name}.key", "-yes")
        await at.run(*sign)
    seal = ("log", "seal", *config, "-comment", "looked into", "-order", "o.json")
    assert f"record {dry['seal']}" in await at.run(*seal)
    assert "it holds" not in await at.run(*seal, code=FAILED)
    await at.rig.restart()
    assert (await at.rig.sign("x509-CA-A", digest=bytes(32))).signature
    await at.rig.hang_up()
    await at.rig.stop()
    report = await at.json(*verify, *copy, code=PARTLY)
    assert report["verdict"] == "sealed"
    assert {"sealed", "gap"} <= {f["code"] for f in report["findings"]}


def bytes_hex(text: str) -> str:
    """Return what JSON has of bytes as hexadecimal."""
    import base64  # noqa: PLC0415 - here alone

    return base64.b64decode(text).hex()


async def test_wrong_usage_is_told(tmp_path: Path, make_shell: Callable[..., Shell]) -> None:
    at = make_shell()
    (tmp_path / "w" / "bad").write_text("1 zz\n")
    (tmp_path / "empty").mkdir()
    for args, code in (
        (("log", "verify", str(tmp_path / "nowhere")), FAILED),
        (("log", "verify", str(tmp_path / "empty")), FAILED),
        (("log", "verify", str(tmp_path / "empty"), "-witness", "bad"), USAGE),
        (("log", "verify", str(tmp_path / "empty"), "-logKey", "bad"), USAGE),
        (("log", "show", str(tmp_path / "empty"), "-last", "-1"), USAGE),
        (("log", "seal", "-config", str(at.rig.config_file), "-comment", "x"), FAILED),
        (("order", "create", "-out", "o.json"), USAGE),
        (("order", "create", "-action", "key.destroy", "-target", "x", "-out", "o.json"), USAGE),
        (("order", "create", "-action", "policy.reload", "-target", "x", "-out", "o.json"), USAGE),
        (("order", "create", "-action", "client.unrevoke", "-out", "o.json"), USAGE),
        (("order", "create", "-action", "clock.accept", "-log", "0", "-out", "o.json"), USAGE),
        (("order", "sign", "-order", "bad", "-name", "a", "-key", "k", "-yes"), USAGE),
        (("order", "show"), USAGE),
        (("order", "submit", "-order", "bad"), USAGE),
        (("status",), 3),
    ):
        await at.run(*args, code=code)

"""Replaced keys of a server's own token or TPM: listed, taken back, destroyed; and where not."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.cli.run import ExitCode, run
from spire_hw.config import hcl
from spire_hw.errors import NotReadyError
from spire_hw_server.app import Server
from spire_hw_server.cli.commands import PROGRAM, root
from spire_hw_server.config import build_settings
from spire_hw_sim.servers import server_config
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import Swtpm, is_available

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.asyncio
HSM = (
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
)
TPM = (pytest.mark.tpm, pytest.mark.skipif(not is_available(), reason="swtpm is not installed"))


class Rig:
    """A server with a KeyManager that keeps what was replaced."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], plugin: str = "") -> None:
        text = server_config(folder, key_manager="memory")
        self.config = folder / "server.conf"
        memory = 'KeyManager "memory" { plugin_data {  } }'
        assert memory in text
        self.config.write_text(text.replace(memory, plugin or memory))
        self.data = folder / "data"
        self.socket = folder / "api.sock"
        self._capsys = capsys

    def server(self) -> Server:
        return Server(build_settings(hcl.parse(self.config.read_text(), "server.conf")))

    async def command(self, *words: str) -> tuple[int, Any, str]:
        self._capsys.readouterr()
        args = [*words, "-output", "json"]
        code = await asyncio.to_thread(run, root, PROGRAM, args)
        shown = self._capsys.readouterr()
        out = shown.out[shown.out.index("{") :] if "{" in shown.out else ""
        return code, json.loads(out.splitlines()[-1] if out else "null"), shown.err

    async def key(self, *words: str) -> tuple[int, Any, str]:
        return await self.command("key", *words, "-socketPath", str(self.socket))

    async def restore(self, *words: str) -> tuple[int, Any, str]:
        return await self.command("hsm", "restore", *words, "-config", str(self.config))

    async def shown(self) -> tuple[dict[str, str], list[str]]:
        code, found, err = await self.key("list")
        assert (code, err) == (0, "")
        current = {f"{k['id']}@{k['generation']}": k["fingerprint"] for k in found["keys"]}
        return current, [f"{k['id']}@{k['generation']}" for k in found["retained"]]


def on_a_token(folder: Path) -> str:
    token = SoftHsm(folder / "hsm")
    token.init_token("ca")
    pin = folder / "pin"
    pin.write_text("1234")
    pin.chmod(0o600)
    return f"""KeyManager "pkcs11" {{ plugin_data {{
      module_path = "{token.module}"
      token_label = "ca"
      pin_file = "{pin}"
      key_identifier_value = "server-1"
      retain_replaced = "26h"
      environment {{ SOFTHSM2_CONF = "{token.conf}" }}
    }} }}"""


def in_a_tpm(tpm: Swtpm, folder: Path) -> str:
    return f"""KeyManager "tpm" {{ plugin_data {{
      tcti = "{tpm.tcti}"
      keys_path = "{folder}/keys"
      retain_replaced = "26h"
    }} }}"""


@pytest.fixture(params=[pytest.param("pkcs11", marks=HSM), pytest.param("tpm", marks=TPM)])
def rig(
    request: pytest.FixtureRequest, short_dir: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Rig]:
    if request.param == "pkcs11":
        yield Rig(short_dir, capsys, on_a_token(short_dir))
        return
    with Swtpm(short_dir / "tpm") as tpm:
        yield Rig(short_dir, capsys, in_a_tpm(tpm, short_dir))


async def test_replaced_keys_are_listed_taken_back_and_destroyed(rig: Rig) -> None:
    server = rig.server()
    await server.start()
    await server.manager.prepare_x509()
    second = await server.manager.prepare_x509()
    before, kept = await rig.shown()
    assert kept == ["x509-CA-B@1"]
    # An authority waits with the key that is there: it stays.
    code, _, err = await rig.key("restore", "x509-CA-B@1", "-comment", "why")
    assert code == ExitCode.FAILED
    assert f"X.509 authority {second.authority_id} (prepared)" in err
    assert (await rig.shown())[0] == before

    await server.manager.activate_x509(second.authority_id)
    third = await server.manager.prepare_x509()
    await server.manager.activate_x509(third.authority_id)
    code, key, _ = await rig.key("restore", "x509-CA-B@1", "-comment", "why it is")
    assert (code, key["id"], key["generation"]) == (0, "x509-CA-B", 1)
    current, kept = await rig.shown()
    assert "x509-CA-B@1" in current
    assert set(kept) == {"x509-CA-B@2", "x509-CA-A@1"}
    assert (await rig.key("destroy", "x509-CA-B@2"))[0] == 0
    assert (await rig.shown())[1] == ["x509-CA-A@1"]
    assert (await rig.key("destroy", "x509-CA-B@2"))[0] == ExitCode.NOT_FOUND
    assert (await rig.key("restore", "x509-CA-B@7"))[0] == ExitCode.NOT_FOUND
    assert (await rig.key("restore", "x509-CA-B"))[0] == ExitCode.USAGE
    # The token is the running server's: beside it nothing is done.
    code, _, err = await rig.restore("x509-CA-A@1")
    assert code == ExitCode.UNREACHABLE
    assert "another server runs" in err
    await server.manager.prepare_x509()
    await server.close()


async def test_what_is_done_by_hand_is_in_the_log(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    server = rig.server()
    await server.start()
    await server.manager.prepare_x509()
    await server.manager.prepare_x509()
    capsys.readouterr()
    args = ["key", "destroy", "x509-CA-B@1", "-comment", "leaked", "-socketPath", str(rig.socket)]
    assert await asyncio.to_thread(run, root, PROGRAM, args) == 0
    log = capsys.readouterr()
    (line,) = [one for one in (log.out + log.err).splitlines() if "destroyed by hand" in one]
    assert "comment=leaked" in line
    assert "key_id=x509-CA-B" in line
    assert 'by="uid ' in line
    await server.close()


async def test_a_key_manager_that_keeps_none_says_so(
    short_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = Rig(short_dir, capsys)
    server = rig.server()
    await server.start()
    assert (await rig.shown())[1] == []
    code, _, err = await rig.key("restore", "x509-CA-A@1")
    assert (code, "keeps no replaced keys" in err) == (ExitCode.FAILED, True)
    await server.close()
    code, _, err = await rig.restore()
    assert (code, "keeps no replaced keys" in err) == (ExitCode.USAGE, True)


async def test_a_server_goes_back_to_the_journal_of_a_backup(rig: Rig, short_dir: Path) -> None:
    server = rig.server()
    await server.start()
    first = server.manager.x509_slots.active
    assert first is not None
    await server.close()
    shutil.copytree(rig.data, short_dir / "backup")
    server = rig.server()
    await server.start()
    for _ in range(2):
        await server.manager.activate_x509((await server.manager.prepare_x509()).authority_id)
    await server.close()
    shutil.rmtree(rig.data)
    shutil.copytree(short_dir / "backup", rig.data)
    server = rig.server()
    with pytest.raises(NotReadyError, match="does not have that key"):
        await server.start()
    await server.close()
    code, found, _ = await rig.restore()
    assert (code, found["restored"]) == (0, None)
    assert ("x509-CA-A", 1) in {(k["id"], k["generation"]) for k in found["retained"]}
    code, found, _ = await rig.restore("x509-CA-A@1")
    assert (code, found["restored"]["id"]) == (0, "x509-CA-A")
    server = rig.server()
    await server.start()
    active = server.manager.x509_slots.active
    assert active is not None
    assert active.authority_id == first.authority_id
    await server.close()

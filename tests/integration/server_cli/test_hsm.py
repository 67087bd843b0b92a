"""`hsm list` and `hsm reap`: what servers have on one token, and clearing away what is left behind."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.cli.run import run
from spire_hw.clock import SystemClock
from spire_hw.key import KeyType
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw_server.cli.commands import PROGRAM, root
from spire_hw_sim.clock import SimClock
from spire_hw_sim.servers import server_config
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import TokenRig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
OWN, DEAD, YOUNG = (Owner("example.org", f"server-{n}") for n in (1, 2, 3))


async def fill(
    rig: TokenRig,
    *,
    own_age: timedelta = timedelta(),
    young_age: timedelta = timedelta(days=2),
) -> None:
    """Have three servers make keys: this one, one that is gone, one that was here two days ago."""
    now = SystemClock().now()
    ages = ((OWN, own_age), (DEAD, timedelta(days=30)), (YOUNG, young_age))
    async with rig:
        for owner, age in ages:
            rig.clock = SimClock(now - age)
            manager = await rig.start(owner.server, key_identifier_value=owner.server)
            for key_id in ("x509-CA-A", "JWT-Signer-A"):
                await manager.generate_key(key_id, KeyType.EC_P256)
            await manager.close()
    rig.meddle("make('payroll', b'9'); make('', b'8')")


@pytest.fixture
def rig(tmp_path: Path) -> TokenRig:
    return TokenRig(tmp_path)


@pytest.fixture
def cli(rig: TokenRig, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    plugin = f"""KeyManager "pkcs11" {{ plugin_data {{
      module_path = "{rig.hsm.module}"
      token_label = "spire"
      pin_file = "{rig.pin_file}"
      key_identifier_value = "server-1"
      environment {{ SOFTHSM2_CONF = "{rig.hsm.conf}" }}
    }} }}"""
    text = server_config(rig.folder, key_manager="memory")
    text = text.replace('KeyManager "memory" { plugin_data {  } }', plugin)
    assert "pkcs11" in text
    config = rig.folder / "server.conf"
    config.write_text(text)

    def call(*words: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = run(root, PROGRAM, ["hsm", *words, "-config", str(config), "-output", "json"])
        shown = capsys.readouterr()
        return code, json.loads(shown.out) if shown.out.startswith("{") else None, shown.err

    return call


def labels(rig: TokenRig) -> set[str]:
    return set(rig.meddle("[print(o[Attribute.LABEL]) for o in find()]").splitlines())


def test_who_has_keys_on_a_token(
    rig: TokenRig, cli: Callable[..., tuple[int, Any, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(fill(rig))
    before = labels(rig)
    code, shown, _ = cli("list")
    assert code == 0
    assert shown["token"] == f"spire/{rig.serial}"
    names = [(one["server"], one["is_own"], len(one["keys"])) for one in shown["servers"]]
    assert names[0] == ("server-1", True, 2)
    assert sorted(names[1:]) == [("server-2", False, 2), ("server-3", False, 2)]
    assert (shown["nameless_objects"], shown["other_objects"]) == (2, 2)
    assert run(root, PROGRAM, ["hsm", "list", "-config", str(rig.folder / "server.conf")]) == 0
    text = capsys.readouterr().out
    assert "server-1 of example.org (this server)" in text
    assert "30 d 0 h ago" in text
    assert labels(rig) == before


def test_what_is_left_behind_is_reaped_only_when_it_is_meant(
    rig: TokenRig, cli: Callable[..., tuple[int, Any, str]]
) -> None:
    asyncio.run(fill(rig))
    before = labels(rig)
    code, shown, _ = cli("reap", "-olderThan", "14d")
    assert code == 0
    assert shown["dry_run"] is True
    assert [one["server"] for one in shown["reaped"]] == ["server-2"]
    why = {one["server"]: one["reason"] for one in shown["kept"]}
    assert why == {"server-1": "keys of this server", "server-3": "seen too recently"}
    assert labels(rig) == before
    now = SystemClock().now()
    code, shown, _ = cli("reap", "--older-than", "14d", "-yes", "-now", f"{now:%Y-%m-%dT%H:%M}")
    assert (code, shown["dry_run"], shown["failed"]) == (0, False, [])
    assert labels(rig) == {label for label in before if not label.startswith(DEAD.prefix)}
    code, shown, _ = cli("reap", "-olderThan", "336h", "-yes", "-now", now.isoformat())
    assert (code, shown["reaped"]) == (0, [])


@pytest.mark.parametrize("off", [timedelta(days=30), timedelta(hours=-2)])
def test_fault_72_a_wrong_clock_reaps_nothing(
    rig: TokenRig, cli: Callable[..., tuple[int, Any, str]], off: timedelta
) -> None:
    # The newest mark is as far from this machine's clock as a jump would have it.
    asyncio.run(fill(rig, own_age=off))
    if off > timedelta():
        rig.meddle(f"[o.destroy() for o in find(LABEL={YOUNG.manifest_label!r})]")
    before = labels(rig)
    for words in ([], ["-yes"]):
        code, _, error = cli("reap", "-olderThan", "14d", *words)
        assert code == 1
        assert "nothing is destroyed; correct the clock" in error
    assert labels(rig) == before


def test_fault_72_a_clock_that_was_wrong_from_the_start_reaps_nothing(
    rig: TokenRig, cli: Callable[..., tuple[int, Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All marks but its own are old: so they are where this machine is a month ahead of the others.
    asyncio.run(fill(rig))
    before = labels(rig)
    assert cli("reap", "-olderThan", "14d")[0] == 0
    code, _, error = cli("reap", "-olderThan", "14d", "-yes")
    assert (code, "nobody vouches for this machine's clock" in error) == (1, True)
    now = SystemClock().now()
    for off in (timedelta(days=-30), timedelta(hours=2), timedelta(days=400)):
        code, _, error = cli("reap", "-olderThan", "14d", "-yes", "-now", (now + off).isoformat())
        assert (code, "nothing is destroyed; correct the clock" in error) == (1, True)
    assert cli("reap", "-olderThan", "14d", "-yes", "-now", "soon")[0] == 2
    # Nor does what is exported for all commands say what another clock shows.
    monkeypatch.setenv("SPIRE_HW_NOW", now.isoformat())
    assert cli("reap", "-olderThan", "14d", "-yes")[0] == 1
    assert labels(rig) == before


def test_another_servers_mark_vouches_for_the_clock(
    rig: TokenRig, cli: Callable[..., tuple[int, Any, str]]
) -> None:
    asyncio.run(fill(rig, young_age=timedelta(minutes=30)))
    code, shown, _ = cli("reap", "-olderThan", "14d", "-yes")
    assert (code, [one["server"] for one in shown["reaped"]]) == (0, ["server-2"])


def test_ages_and_tokens_that_make_no_sense(
    rig: TokenRig, cli: Callable[..., tuple[int, Any, str]]
) -> None:
    for age in ("0", "1h", "-3d", "soon"):
        assert cli("reap", "-olderThan", age)[0] == 2
    code, _, error = cli("list", "-token", "other")
    assert code == 2
    assert "no token" in error
    rig.hsm.remove()
    text = (rig.folder / "server.conf").read_text()
    text = text.replace('token_label = "spire"', 'token_label = "spire" start_timeout = "1s"')
    assert "start_timeout" in text
    (rig.folder / "server.conf").write_text(text)
    assert cli("list")[0] == 3


def test_a_key_manager_without_a_token(tmp_path: Path) -> None:
    config = tmp_path / "server.conf"
    config.write_text(server_config(tmp_path, key_manager="memory"))
    assert run(root, PROGRAM, ["hsm", "list", "-config", str(config)]) == 2

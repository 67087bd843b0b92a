"""Full and read-only disks, files of other people: told clearly, nothing half-written, recovery."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw._pb import server_localauthority_pb2, types_pb2
from spire_hw.errors import SpireHwError
from spire_hw_sim.programs import ProgramError
from spire_hw_sim.servers import LOCAL_AUTHORITY, Operator

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from spire_hw_sim.site import Node, Site

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]


@contextlib.contextmanager
def no_space(directory: Path) -> Iterator[None]:
    """Fill a file system to the last byte."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as f, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while f.write(bytes(size)) == size:
                    pass
    try:
        yield
    finally:
        filler.unlink()


async def fill_up(site: Site) -> str:
    """Register until the database cannot take more; return what the server says then."""
    operator = Operator(site.socket)
    try:
        for number in range(500):
            try:
                (made,) = await operator.create(
                    types_pb2.Entry(
                        spiffe_id={"trust_domain": "site.example", "path": f"/full{number}"},
                        parent_id={"trust_domain": "site.example", "path": "/p"},
                        selectors=[{"type": "unix", "value": "uid:1"}],
                    )
                )
            except SpireHwError as e:
                return e.message
            if made.status.code:
                return str(made.status.message)
    finally:
        await operator.close()
    return "it took them all"


def create(site: Site, path: str) -> subprocess.CompletedProcess[str]:
    """Register something."""
    return site.try_command(
        *("entry", "create", "-parentID", "spiffe://site.example/p"),
        *("-spiffeID", f"spiffe://site.example{path}", "-selector", "unix:uid:1"),
    )


async def prepare(site: Site) -> str:
    """Have the server make another authority; return what went wrong."""
    operator = Operator(site.socket)
    try:
        await operator.channel.unary(
            LOCAL_AUTHORITY + "PrepareX509Authority",
            server_localauthority_pb2.PrepareX509AuthorityRequest(),
            server_localauthority_pb2.PrepareX509AuthorityResponse,
            timeout_s=20,
        )
    except SpireHwError as e:
        return e.message
    finally:
        await operator.close()
    return ""


async def test_full_disks_of_the_server_and_its_token(new_site: Site) -> None:
    site = new_site
    away = site.directory / "tokens.src"
    site.hsm.token_dir.rename(away)
    with (
        site.small_disk(site.data, "6m") as data,
        site.small_disk(site.hsm.token_dir, "256k") as tokens,
    ):
        shutil.copytree(away, tokens, dirs_exist_ok=True)
        site.start_server()
        site.wait_ready()
        assert create(site, "/before").returncode == 0
        ids, keys = await site.authorities(), site.private_keys()

        with no_space(data):
            failed = await fill_up(site)
            assert "full" in failed or "space" in failed, failed
            told = create(site, "/told")
            assert told.returncode != 0
            assert "Traceback" not in told.stderr + site.server.log()
            assert site.command("entry", "count")
        assert create(site, "/after").returncode == 0

        with no_space(tokens):
            said = await prepare(site)
            assert said, "the full token took a key"
            assert "full" in said or "memory" in said.lower() or "space" in said, said
            assert (
                site.try_command("x509", "mint", "-spiffeID", "spiffe://site.example/m").returncode
                == 0
            )
        assert site.private_keys() == keys
        assert await site.authorities() == ids
        assert await prepare(site) == ""

        assert site.server.stop() == 0
        with no_space(data):
            site.start_server()
            with contextlib.suppress(ProgramError):
                site.wait_ready(10)
            assert "Traceback" not in site.server.log()
            site.server.kill()
        site.start_server()
        site.wait_ready()
        assert set(ids[0]) <= set((await site.authorities())[0])
        assert site.server.stop() == 0

        site.remount(data, "ro")
        site.start_server()
        assert site.server.program.wait_for_exit(20) != 0
        assert "Read-only file system" in site.server.log()
        assert str(data) in site.server.log()
        assert "Traceback" not in site.server.log()
        site.remount(data, "rw")
        site.start_server()
        site.wait_ready()
        assert site.server.stop() == 0


async def test_a_full_disk_keeps_an_agent_from_attesting_until_there_is_space(site: Site) -> None:
    node = site.node("full")
    with site.small_disk(node.data, "64k") as data:
        with no_space(data):
            node.start()
            node.agent.wait_for("No space left on device")
            assert node.agent.is_running or node.agent.program.exit_status, node.agent.log()
            assert "Traceback" not in node.agent.log()
            assert str(node.data) in node.agent.log()
        if not node.agent.is_running:
            node.start()
        node.wait_in_use(60)
        assert [p.name for p in data.iterdir() if p.name.endswith((".new", ".tmp"))] == []
        assert node.agent.stop() == 0
        site.remount(data, "ro")
        node.start()
        ended = node.agent.program.wait_for_exit(20)
        assert ended in {1, 3}
        assert "Read-only file system" in node.agent.log()
        assert str(node.data) in node.agent.log()
        assert "Traceback" not in node.agent.log()


async def test_a_full_log_disk_stops_nobody(node: Node) -> None:
    assert node.agent.stop() == 0
    node.start(flags=["-logFile", "/dev/full"])
    assert await node.fetch_soon()
    assert node.agent.stop() == 0
    assert node.agent.log() == ""


async def test_what_somebody_else_put_into_tmp_is_not_used(site: Site, node: Node) -> None:
    planted = Path(tempfile.mkdtemp(prefix="planted"))
    try:
        os.chown(planted, 4242, 4242)
        server = site.spare_server(
            "planted", lambda t: t.replace(str(site.directory / "planted" / "d"), str(planted))
        )
        assert server.program.wait_for_exit(20) == 3
        assert f"{planted} belongs to user 4242" in server.log()
        assert "use another path" in server.log()
        assert node.agent.stop() == 0
        node.start(change=lambda t: t.replace(str(node.data), str(planted)))
        assert node.agent.program.wait_for_exit(20) != 0
        assert f"{planted} belongs to user 4242" in node.agent.log()
    finally:
        shutil.rmtree(planted)

"""Clocks that jump, state that was lost, damaged or restored, and what an agent says to it."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from spire_hw_sim.site import WORKLOAD

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_sim.site import Node, Site

pytestmark = pytest.mark.asyncio


def backup(site: Site, target: Path) -> None:
    """Copy the database as an operator would."""
    with (
        closing(sqlite3.connect(site.data / "db.sqlite3")) as ours,
        closing(sqlite3.connect(target)) as copy,
    ):
        ours.backup(copy)


def replace_database(site: Site, source: Path | None) -> None:
    """Put another database in place of the server's."""
    for path in site.data.glob("db.sqlite3*"):
        path.unlink()
    if source is not None:
        shutil.copy(source, site.data / "db.sqlite3")


def refused(node: Node, status: int, *words: str) -> None:
    """Check that the agent ended with words an operator can act on."""
    assert node.agent.program.wait_for_exit(30) == status, node.agent.log()
    log = node.agent.log()
    assert "Traceback" not in log
    (said,) = re.findall(r"^Error: (.*)$", log, re.MULTILINE)
    for word in words:
        assert word in said, said


async def test_a_server_off_for_longer_than_the_agents_life(clock_site: Site) -> None:
    site = clock_site
    site.start_server()
    site.wait_ready()
    node = site.node("n")
    node.start()
    node.wait_in_use()
    site.register(node)
    await node.fetch_soon()
    ids, identity = await site.authorities(), node.id
    site.server.stop()
    site.shift_clock(2 * 3600)
    after = len(node.agent.log())
    node.agent.wait_for("level=error.*(renew|synchronise)", after=after)
    site.start_server()
    site.wait_ready()
    assert identity in node.wait_in_use(90, after=after)
    assert WORKLOAD in {str(svid.spiffe_id) for svid in await node.fetch_soon(60)}
    assert await site.authorities() == ids
    assert "Traceback" not in node.agent.log()

    site.shift_clock(-3600)
    node.agent.stop()
    node.start()
    node.agent.wait_for("not valid before .*the clock here says")
    site.shift_clock(2 * 3600)
    assert WORKLOAD in {str(svid.spiffe_id) for svid in await node.fetch_soon(60)}
    assert await site.authorities() == ids
    assert "Traceback" not in node.agent.log() + site.server.log()


async def test_a_database_restored_from_before_the_node_attested(site: Site, node: Node) -> None:
    ids, keys = await site.authorities(), site.private_keys()
    new = site.directory / "now.db"
    old = site.directory / "old.db"
    backup(site, new)
    backup(site, old)
    with closing(sqlite3.connect(old)) as db, db:
        db.execute("PRAGMA foreign_keys = ON")  # what hangs on a node goes with it
        (table,) = [
            name
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")
            if name in {"nodes", "attested_nodes", "attested_node_entries"}
        ]
        db.execute(f"DELETE FROM {table}")  # noqa: S608 - one of three names
    site.server.stop()
    replace_database(site, old)
    site.start_server()
    site.wait_ready()
    after = len(node.agent.log())
    node.wait_in_use(60, after=max(0, after - 2000))
    assert WORKLOAD in {str(svid.spiffe_id) for svid in await node.fetch_soon(60)}
    assert (await site.authorities(), site.private_keys()) == (ids, keys)


async def test_a_corrupt_database_is_told_and_left_alone(site: Site) -> None:
    ids, keys = await site.authorities(), site.private_keys()
    saved = site.directory / "saved.db"
    backup(site, saved)
    site.server.stop()
    junk = b"this was a database" * 500
    for path in site.data.glob("db.sqlite3*"):
        path.unlink()
    (site.data / "db.sqlite3").write_bytes(junk)
    try:
        site.start_server()
        assert site.server.program.wait_for_exit(20) == 1
        log = site.server.log()
        assert "Traceback" not in log, log
        (said,) = re.findall(r"^Error: (.*)$", log, re.MULTILINE)
        assert "db.sqlite3" in said, said
        assert "restore it from a backup" in said
        assert (site.data / "db.sqlite3").read_bytes() == junk
    finally:
        replace_database(site, saved)
    site.start_server()
    site.wait_ready()
    assert (await site.authorities(), site.private_keys()) == (ids, keys)


async def test_a_rebuilt_server_is_a_stranger_and_the_agent_says_what_to_do(
    new_site: Site,
) -> None:
    site = new_site
    site.start_server()
    site.wait_ready()
    node = site.node("n")
    node.start()
    node.wait_in_use()
    site.register(node)
    await node.fetch_soon()
    site.server.stop()
    shutil.rmtree(site.data)
    shutil.rmtree(site.hsm.token_dir)
    site.hsm.token_dir.mkdir()
    site.hsm.init_token("spire-ca", site.pin)
    after = len(node.agent.log())
    site.start_server()
    site.wait_ready()
    said = node.agent.wait_for("not in this agent's trust bundle", after=after)
    assert "rebootstrap" in said or "trust_bundle_path" in node.agent.log()[after:]
    assert await node.fetch()
    node.bundle.write_text(site.command("bundle", "show"))
    site.enrol(node.tpm)
    assert node.agent.stop() == 0
    node.start(keys='rebootstrap_mode = "auto" rebootstrap_delay = "1s"')
    node.wait_in_use(60, after=len(""))
    node.agent.wait_for("known by other authorities", 60)
    assert "Traceback" not in node.agent.log()


async def test_what_is_wrong_with_an_agents_files_is_told(site: Site, node: Node) -> None:
    second = node.agent
    node.start(change=lambda t: t.replace("p/api.sock", "p/b.sock"))
    refused(node, 1, str(node.data), "in use by another agent", "stop it")
    node.agent = second
    assert second.stop() == 0

    data = node.data / "agent-data.json"
    good = data.read_bytes()
    for junk in (b"", b'{"svid": 7}', good[: len(good) // 2]):
        data.write_bytes(junk)
        node.start()
        refused(node, 1, str(data), "is damaged", "remove the file")
        assert data.read_bytes() == junk
    data.unlink()
    bundle = node.bundle.read_bytes()
    node.start(change=lambda t: t.replace('"site.example"', '"other.example"'))
    node.agent.wait_for("should be spiffe://other.example/spire/server: check server_address")
    assert node.agent.stop(10) == 0
    assert "Traceback" not in node.agent.log()
    node.bundle.unlink()
    node.start()
    node.agent.wait_for(f"{node.bundle} does not exist")
    node.agent.program.kill()
    node.bundle.write_bytes(b"junk")
    node.start()
    node.agent.wait_for(f"{node.bundle}.*")
    node.agent.program.kill()
    node.bundle.write_bytes(bundle)
    node.start()
    node.wait_in_use()
    assert json.loads(data.read_text())["svid"]


async def test_an_agent_without_a_server_says_so_and_stops_when_told(
    site: Site, node: Node
) -> None:
    assert node.agent.stop() == 0
    (node.data / "agent-data.json").unlink(missing_ok=True)
    node.start(change=lambda t: re.sub(r"server_port       = \d+", "server_port = 1", t))
    said = node.agent.wait_for("Failed to attest|cannot reach")
    assert "127.0.0.1:1" in said
    assert "Traceback" not in node.agent.log()
    assert node.agent.stop(10) == 0
    node.socket.parent.mkdir(exist_ok=True)
    node.start(change=lambda t: t.replace(str(node.socket), "/" + "x" * 120))
    assert node.agent.program.wait_for_exit(20) == 1
    assert "107 bytes" in node.agent.log()
    node.socket.touch()
    node.start()
    assert node.agent.program.wait_for_exit(20) == 3
    assert "is not a socket; remove it" in node.agent.log()
    node.socket.unlink()
    node.start()
    node.wait_in_use()

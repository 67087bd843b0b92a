"""The server as a process: started, stopped, killed, refused."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import stat
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw import log as logs
from spire_hw._pb import server_entry_pb2
from spire_hw.config import hcl
from spire_hw.config.host import HealthSettings
from spire_hw.datadir import lock_data_dir
from spire_hw.errors import NotReadyError, PluginError, UnavailableError
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId
from spire_hw_server import app
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_server.datastore.config import parse_datastore
from spire_hw_server.datastore.records import Entry
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.offline import check_settings
from spire_hw_sim.clock import SimClock
from spire_hw_sim.servers import (
    ENTRY,
    Operator,
    ScriptedAgent,
    entry_message,
    server_config,
    server_settings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from multiprocessing.connection import Connection
    from pathlib import Path

NO_LIMITS = "ratelimit { attestation = false signing = false }"


def _serve(directory: Path, ready: Connection) -> None:
    """Run a server as its own process until a signal ends it."""
    settings = server_settings(directory, more=NO_LIMITS + " bind_port = 0")
    logs.configure(logs.LogSettings(file=directory / "log", level=logs.Level.INFO))
    servers: list[Server] = []

    class Seen(Server):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            servers.append(self)

    app.Server = Seen  # type: ignore[misc]
    asyncio.run(app.run(settings, on_ready=lambda: ready.send(servers[0].port)))


@asynccontextmanager
async def process(directory: Path) -> AsyncIterator[tuple[Any, int]]:
    """Start a server process; yield it and its port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    running = context.Process(target=_serve, args=(directory, theirs))
    running.start()
    theirs.close()
    try:
        answered = await asyncio.to_thread(ours.poll, 60)
        assert answered, (directory / "log").read_text()
        yield running, ours.recv()
    finally:
        if running.is_alive():
            running.kill()
        await asyncio.to_thread(running.join)
        running.close()
        ours.close()


async def _end(running: Any, number: signal.Signals) -> int:
    os.kill(running.pid, number)
    await asyncio.to_thread(running.join, 30)
    code: int = running.exitcode
    return code


@pytest.mark.asyncio
async def test_killed_and_started_again_it_serves_the_same_agents(short_dir: Path) -> None:
    agent: ScriptedAgent | None = None
    for round_ in range(3):
        async with process(short_dir) as (running, port):
            operator = Operator(short_dir / "api.sock")
            bundle = await operator.bundle()
            if agent is None:
                agent = ScriptedAgent(port, bundle)
                await agent.attest(await operator.token())
                assert agent.spiffe_id is not None
                await operator.create(entry_message("/w", agent.spiffe_id))
            agent.port = port
            assert bundle == agent.bundle
            answer = await agent.call(
                ENTRY + "GetAuthorizedEntries",
                server_entry_pb2.GetAuthorizedEntriesRequest(),
                server_entry_pb2.GetAuthorizedEntriesResponse,
            )
            assert len(answer.entries) == 1
            await operator.close()
            number = signal.SIGKILL if round_ < 2 else signal.SIGTERM
            assert await _end(running, number) == (-signal.SIGKILL if round_ < 2 else 0)
    assert not (short_dir / "api.sock").exists()


@pytest.mark.asyncio
async def test_files_are_its_owners_alone(short_dir: Path) -> None:
    server = Server(server_settings(short_dir))
    await server.start()
    try:
        modes = {
            p.name: stat.S_IMODE(p.lstat().st_mode)
            for p in [short_dir / "data", *(short_dir / "data").iterdir()]
        }
        assert modes["data"] == 0o700
        assert {n: m for n, m in modes.items() if m & 0o077 and n != "data"} == {}
        assert stat.S_IMODE((short_dir / "api.sock").lstat().st_mode) == 0o770
    finally:
        await server.close()


@pytest.mark.asyncio
async def test_a_second_server_on_the_same_data_is_refused(short_dir: Path) -> None:
    settings = server_settings(short_dir)
    server = Server(settings)
    await server.start()
    try:
        with pytest.raises(UnavailableError, match="another server runs"):
            await Server(settings).start()
    finally:
        await server.close()
    again = Server(settings)
    await again.start()
    await again.close()


@pytest.mark.asyncio
async def test_a_failed_start_leaves_nothing_behind(short_dir: Path) -> None:
    first = Server(server_settings(short_dir, key_manager="memory"))
    await first.start()
    taken = f"bind_port = {first.port}"
    other = short_dir / "o"
    other.mkdir()
    try:
        second = Server(server_settings(other, more=taken))
        with pytest.raises(UnavailableError, match=str(first.port)):
            await second.start()
        assert not (other / "api.sock").exists()
        assert [p.name for p in (other / "data").iterdir()] == ["server.lock"]
        lock_data_dir(other / "data", "server")()
    finally:
        await first.close()


@pytest.mark.asyncio
async def test_addresses_in_use_are_found_before_keys_are_made(short_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        probes = HealthSettings("127.0.0.1", port, "/live", "/ready")
        settings = replace(server_settings(short_dir), health=probes)
        with pytest.raises(UnavailableError, match=f"{port}.*another bind_port of health"):
            await Server(settings).start()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(short_dir / "api.sock"))
        listening.listen()
        with pytest.raises(UnavailableError, match="another process listens"):
            await Server(server_settings(short_dir)).start()
    elsewhere = server_settings(short_dir, more='bind_address = "192.0.2.1" bind_port = 8081')
    with pytest.raises(UnavailableError, match="no such address"):
        await Server(elsewhere).start()
    assert [p.name for p in (short_dir / "data").iterdir()] == ["server.lock"]


def test_the_lock_file_is_not_followed_elsewhere(short_dir: Path) -> None:
    (short_dir / "server.lock").symlink_to(short_dir / "elsewhere")
    with pytest.raises(UnavailableError, match="cannot open"):
        lock_data_dir(short_dir, "server")


@pytest.mark.asyncio
async def test_a_data_dir_that_is_a_file_is_refused(short_dir: Path) -> None:
    (short_dir / "data").write_text("")
    with pytest.raises(UnavailableError, match="data_dir"):
        await Server(server_settings(short_dir)).start()


@pytest.mark.asyncio
async def test_another_trust_domains_database_is_refused(short_dir: Path) -> None:
    settings = server_settings(short_dir)
    (short_dir / "data").mkdir(mode=0o700)
    config = parse_datastore(settings.store.data)
    store = await open_datastore(config, clock=SimClock(), log=logs.get_logger("test"))
    await store.create_entry(
        Entry(
            "",
            SpiffeId("spiffe://other.test/w"),
            SpiffeId("spiffe://other.test/p"),
            (Selector("a", "b"),),
        )
    )
    await store.close()
    with pytest.raises(NotReadyError, match=r"other\.test"):
        await Server(settings).start()


@pytest.mark.asyncio
async def test_a_lost_key_file_stops_the_start_and_may_be_given_up(short_dir: Path) -> None:
    server = Server(server_settings(short_dir))
    await server.start()
    x509, jwt = server.manager.x509_slots.active, server.manager.jwt_slots.active
    assert x509 is not None
    assert jwt is not None
    await server.close()
    (short_dir / "data" / "keys.json").unlink()
    with pytest.raises(NotReadyError, match="accept_lost_authorities"):
        await Server(server_settings(short_dir)).start()
    ids = f'"{x509.authority_id}", "{jwt.authority_id}"'
    more = f"experimental {{ accept_lost_authorities = [{ids}] }}"
    again = Server(server_settings(short_dir, more=more))
    await again.start()
    assert again.manager.x509_slots.active != x509
    await again.close()


@pytest.mark.asyncio
async def test_asking_a_server_that_was_not_started(short_dir: Path) -> None:
    server = Server(server_settings(short_dir))
    for ask in (lambda: server.manager, lambda: server.identity):
        with pytest.raises(NotReadyError):
            ask()
    with pytest.raises(NotReadyError):
        await server.failed()
    assert (server.port, server.health_port) == (0, 0)
    await server.close()


@pytest.mark.asyncio
async def test_a_part_that_breaks_down_is_told(short_dir: Path) -> None:
    server = Server(server_settings(short_dir, key_manager="memory"))
    await server.start()
    try:
        server._broke_down("a part", RuntimeError("why"))
        server._broke_down("another", RuntimeError("late"))
        with pytest.raises(Exception, match="a part broke down: why"):
            await server.failed()
    finally:
        await server.close()


@pytest.mark.asyncio
async def test_settings_are_checked_without_touching_anything(short_dir: Path) -> None:
    assert await check_settings(server_settings(short_dir)) == []
    text = server_config(short_dir).replace("sqlite3", "oracle").replace("keys_path", "key_path")
    faults = await check_settings(build_settings(hcl.parse(text, "server.conf")))
    assert len(faults) >= 2
    assert os.listdir(short_dir) == []  # noqa: PTH208 - no blocking question in a coroutine


@pytest.mark.asyncio
async def test_a_key_manager_that_cannot_start_is_named(short_dir: Path) -> None:
    (short_dir / "data").mkdir(mode=0o700)
    (short_dir / "data" / "keys.json").write_text("junk")
    with pytest.raises((PluginError, Exception), match=r"keymanager\(disk\)"):
        await Server(server_settings(short_dir)).start()


@pytest.mark.asyncio
async def test_a_signal_during_the_start_ends_it_quietly(short_dir: Path) -> None:
    settings = server_settings(short_dir, key_manager="memory")
    loop = asyncio.get_running_loop()
    before = os.umask(0o027)
    loop.call_soon(os.kill, os.getpid(), signal.SIGTERM)
    try:
        await app.run(settings, on_ready=lambda: pytest.fail("it was ready"))
    finally:
        os.umask(before)


@pytest.mark.asyncio
async def test_run_ends_at_a_signal_and_cleans_up(short_dir: Path) -> None:
    settings = server_settings(short_dir, key_manager="memory")
    ready: list[bool] = []

    def stop() -> None:
        ready.append((short_dir / "api.sock").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    before = os.umask(0o022)
    try:
        await app.run(settings, on_ready=stop)
    finally:
        os.umask(before)
    assert ready == [True]
    assert not (short_dir / "api.sock").exists()


@pytest.mark.asyncio
async def test_run_raises_when_it_cannot_start(short_dir: Path) -> None:
    (short_dir / "data").write_text("")
    before = os.umask(0o027)
    try:
        with pytest.raises(UnavailableError):
            await app.run(server_settings(short_dir))
    finally:
        os.umask(before)

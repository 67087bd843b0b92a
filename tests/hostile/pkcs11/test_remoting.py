"""A token behind `p11-kit server`, as over a tunnel: faults 82 to 87 of the fault list."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw_sim.p11kit import P11KitServer
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager
    from spire_hw_sim.tokenrig import TokenRig

CLIENT = P11KitServer.find_client()
pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
    pytest.mark.skipif(CLIENT is None, reason="p11-kit and its client module are not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(32)


@pytest.fixture
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="p11-"))
    yield folder / "sock"
    shutil.rmtree(folder)


@pytest.fixture
def remote(rig: TokenRig, place: Path) -> Iterator[P11KitServer]:
    server = P11KitServer(rig.hsm, place)
    yield server
    server.stop()


def behind(server: P11KitServer, **changes: object) -> dict[str, object]:
    return {"module_path": CLIENT, "environment": server.environment, **changes}


async def signs(manager: Pkcs11KeyManager, key_id: str = "a") -> None:
    """Have a key sign, for as long as the token is said to be away."""
    info = await manager.get_public_key(key_id)
    async with asyncio.timeout(60):
        while True:
            try:
                signed = await manager.sign_data(key_id, DIGEST, SHA256)
            except SpireHwError as e:
                if e.kind not in {ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED}:
                    raise
                await asyncio.sleep(0.05)
                continue
            break
    assert signed.fingerprint == info.fingerprint
    verify_digest(info.public_key, DIGEST, signed.signature, SHA256)


@pytest.mark.asyncio
async def test_a_remote_token_serves_all_key_types(rig: TokenRig, remote: P11KitServer) -> None:
    remote.start()
    manager = await rig.start(**behind(remote, workers=2))
    for key_type in (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048):
        await manager.generate_key(key_type.config_name, key_type)
        await signs(manager, key_type.config_name)
    assert manager._pool is not None
    assert manager._pool.facts.profile.name == "softhsm"
    # One process at the far end for each worker here: no login is shared.
    assert len(remote.connections()) == len(manager.worker_pids)


@pytest.mark.asyncio
async def test_fault_82_no_server_behind_the_socket_at_start(
    rig: TokenRig, remote: P11KitServer
) -> None:
    manager = rig.build()
    with pytest.raises(SpireHwError, match="p11-kit: no slots at unix:path=") as caught:
        await manager.configure(rig.config(**behind(remote, start_timeout="6s")))
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert str(remote.socket) in caught.value.message
    assert "not present" not in caught.value.message
    async with asyncio.TaskGroup() as group:
        waiting = rig.config(**behind(remote, start_timeout="30s"))
        configuring = group.create_task(manager.configure(waiting))
        await asyncio.wait({configuring}, timeout=0.5)
        assert not configuring.done()
        remote.start()
    assert await manager.get_public_keys() == []


@pytest.mark.asyncio
async def test_fault_83_the_process_of_a_connection_is_killed(
    rig: TokenRig, remote: P11KitServer
) -> None:
    remote.start()
    manager = await rig.start(**behind(remote))
    before = await manager.generate_key("a", KeyType.EC_P256)
    for _ in range(3):
        remote.cut()
        await signs(manager)
    assert [k.fingerprint for k in await manager.get_public_keys()] == [before.fingerprint]


@pytest.mark.asyncio
async def test_fault_84_the_server_restarts_while_nothing_is_asked(
    rig: TokenRig, remote: P11KitServer
) -> None:
    remote.start()
    manager = await rig.start(**behind(remote))
    before = await manager.generate_key("a", KeyType.EC_P256)
    remote.stop()
    remote.start()
    await signs(manager)
    after = await manager.generate_key("a", KeyType.EC_P256)
    assert after.fingerprint != before.fingerprint
    await signs(manager)


@asynccontextmanager
async def tunnel(entrance: Path, exit_: Path) -> AsyncIterator[set[asyncio.StreamWriter]]:
    """Forward one socket to another as sshd does: when the far end refuses, so does this one."""
    open_ends: set[asyncio.StreamWriter] = set()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # the other side has gone, which is the point of the test
        finally:
            sink.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ends.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(exit_)
        except OSError:
            writer.close()
            return
        open_ends.add(far_writer)
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    server = await asyncio.start_unix_server(forward, entrance)
    try:
        yield open_ends
    finally:
        server.close()
        for end in open_ends:
            end.close()


@pytest.mark.asyncio
async def test_fault_85_a_tunnel_that_is_cut_and_a_far_end_that_refuses(
    rig: TokenRig, remote: P11KitServer
) -> None:
    entrance = remote.socket.with_name("tunnel")
    environment = {"P11_KIT_SERVER_ADDRESS": f"unix:path={entrance}"}
    settings = behind(remote, environment=environment)
    async with tunnel(entrance, remote.socket):
        manager = rig.build()
        with pytest.raises(SpireHwError, match="tunnel") as caught:
            await manager.configure(rig.config(**{**settings, "start_timeout": "6s"}))
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        remote.start()
        await manager.configure(rig.config(**settings))
        before = await manager.generate_key("a", KeyType.EC_P256)
        await signs(manager)
    with pytest.raises(SpireHwError) as caught:
        await manager.sign_data("a", DIGEST, SHA256)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    with pytest.raises(SpireHwError) as caught:
        await manager.get_public_keys()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    entrance.unlink(missing_ok=True)
    async with tunnel(entrance, remote.socket):
        await signs(manager)
        assert [k.fingerprint for k in await manager.get_public_keys()] == [before.fingerprint]
        await manager.close()


@pytest.mark.asyncio
async def test_fault_86_a_peer_that_hangs(rig: TokenRig, remote: P11KitServer) -> None:
    remote.start()
    manager = await rig.start(**behind(remote, sign_timeout="1s"))
    await manager.generate_key("a", KeyType.EC_P256)
    remote.freeze()
    with pytest.raises(SpireHwError, match="did not") as caught:
        await manager.sign_data("a", DIGEST, SHA256)
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
    remote.thaw()
    await signs(manager)


@pytest.mark.asyncio
async def test_fault_87_a_token_that_is_exported_write_protected(
    rig: TokenRig, remote: P11KitServer
) -> None:
    remote.start()
    manager = await rig.start(**behind(remote))
    before = await manager.generate_key("a", KeyType.EC_P256)
    await manager.close()
    remote.stop()
    guarded = P11KitServer(rig.hsm, remote.socket, write_protected=True)
    guarded.start()
    try:
        manager = await rig.start(**behind(guarded))
        await signs(manager)
        with pytest.raises(SpireHwError, match="read-only") as caught:
            await manager.generate_key("a", KeyType.EC_P256)
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert (await manager.get_public_key("a")).fingerprint == before.fingerprint
        await signs(manager)
        await manager.close()
    finally:
        guarded.stop()
    manager = await rig.start()
    assert [k.fingerprint for k in await manager.get_public_keys()] == [before.fingerprint]

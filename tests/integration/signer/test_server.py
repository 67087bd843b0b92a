"""A server whose keys are at a signer on a SoftHSM token: SVIDs, restarts, deaths, two signers."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.svid.jwtsvid import verify_jwt_svid
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.x509.certificate import encode_pem, load_chain
from spire_hw_sim.liarsigner import write_client
from spire_hw_sim.remoterig import SignerProcess
from spire_hw_sim.signer import SignerRig, client_policy
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.workload import Workload, eventually, until
from spire_hw_sim.world import TRUST_DOMAIN, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spire_hw.spiffeid import SpiffeId
    from spire_hw_agent.app import Agent
    from spire_hw_sim.liarsigner import ClientFiles

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.slow,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
# What is to be signed is shown to the signer, or it does not sign.
POLICY = client_policy(trust_domain=TRUST_DOMAIN, raw="false")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a directory whose path leaves room for socket names."""
    path = Path(tempfile.mkdtemp(prefix="sgn"))
    yield path
    shutil.rmtree(path)


def plugins(files: ClientFiles, *addresses: str) -> str:
    listed = ", ".join(f'"{address}"' for address in addresses)
    return f"""KeyManager "remote" {{ plugin_data {{
      addresses = [{listed}]
      signer_ca = "{files.ca}"
      signer_id = "spiffe://infra.example/signer"
      cert = "{files.cert}"
      key = "{files.key}"
      require_witness = true
      start_timeout = "2m"
    }} }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}"""


@asynccontextmanager
async def running(
    world: World,
) -> AsyncIterator[tuple[Agent, Workload, SpiffeId]]:
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(await world.agent())
        workload = await stack.enter_async_context(Workload(world.socket()))
        assert agent.identity.current is not None
        yield agent, workload, agent.identity.current.spiffe_id


async def verified(world: World, workload: Workload, folder: Path) -> str:
    """Fetch an X.509- and a JWT-SVID; return the ID that everybody can verify."""
    bundle = await world.bundle()
    answer = await eventually(workload.x509_svid)
    made = parse_x509_svid(load_chain(answer.svids[0].x509_svid))
    verify_x509_svid(made, {bundle.trust_domain: bundle}, world.server.clock.now())
    (folder / "ca.pem").write_bytes(encode_pem(r.der for r in bundle.x509_authorities))
    (folder / "svid.pem").write_bytes(encode_pem(made.chain))
    checked = await asyncio.create_subprocess_exec(
        *("openssl", "verify", "-x509_strict", "-CAfile", str(folder / "ca.pem")),
        str(folder / "svid.pem"),
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await checked.wait() == 0
    token = (await eventually(lambda: workload.jwt_svid(["db"]))).svids[0].svid
    proved = verify_jwt_svid(
        token,
        audience="db",
        bundles={bundle.trust_domain: bundle},
        at=world.server.clock.now(),
    )
    assert proved.spiffe_id == made.spiffe_id
    return made.spiffe_id.path


async def signed(workload: Workload, audience: str) -> None:
    """Get a token, as soon as there is a signer; how long one starts is the machine's business."""
    async with asyncio.timeout(90):
        answer = await eventually(lambda: workload.jwt_svid([audience]))
    assert answer.svids


def records(*rigs: SignerRig) -> list[dict[str, Any]]:
    """Return what stands in signers' audit logs."""
    return [
        json.loads(line)
        for rig in rigs
        for file in sorted((rig.folder / "data").rglob("audit-*.log"))
        for line in file.read_text().splitlines()
    ]


def methods(*rigs: SignerRig) -> set[str]:
    return {record["method"] for record in records(*rigs) if record["kind"] == "intent"}


async def test_svids_by_a_signer_that_sees_all_it_signs(folder: Path) -> None:
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(SignerRig(folder / "s", policy=POLICY))
        files = write_client(rig.authority, folder / "client")
        world = World(server_plugins=plugins(files, f"127.0.0.1:{rig.port}"))
        await stack.enter_async_context(world)
        async with running(world) as (_, workload, agent_id):
            await world.create_entry("/web", parent=agent_id)
            assert await verified(world, workload, folder) == "/web"
    assert methods(rig) == {"GenerateKey", "Sign.x509", "Sign.jwt"}
    assert [r for r in records(rig) if r["kind"] == "refusal"] == []


async def test_either_side_may_end_and_come_back(folder: Path) -> None:
    rig = SignerRig(folder / "s", policy=POLICY)
    signer = SignerProcess(rig)
    files = write_client(rig.authority, folder / "client")
    async with AsyncExitStack() as stack:
        signer.start()
        stack.callback(signer.stop)
        world = World(server_plugins=plugins(files, signer.address))
        await stack.enter_async_context(world)
        authority = world.server.manager.x509_slots.active
        async with running(world) as (_, workload, agent_id):
            await world.create_entry("/web", parent=agent_id)
            assert await verified(world, workload, folder) == "/web"
            # The signer dies under load, and comes back.
            async with asyncio.TaskGroup() as group:
                for number in range(30):
                    group.create_task(signed(workload, f"audience-{number}"))
                await asyncio.sleep(0)
                signer.kill()
                signer.start()
        # The server goes, and finds its keys again: the same authority signs.
        port = await world.stop_server()
        await world.start_server(port)
        again = world.server.manager.x509_slots.active
        assert authority is not None
        assert again is not None
        assert again.authority_id == authority.authority_id
        # It does not start without its signer, and no new authority is made.
        port = await world.stop_server()
        signer.stop()
        quick = plugins(files, signer.address).replace("2m", "500ms")
        fresh = World(server_plugins=quick)
        stack.push_async_callback(fresh.close)
        with pytest.raises(SpireHwError) as caught:
            await fresh.start_server()
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        signer.start()
        await world.start_server(port)
        last = world.server.manager.x509_slots.active
        assert last is not None
        assert last.authority_id == authority.authority_id
    log = records(rig)
    made = [r for r in log if r["kind"] == "intent" and r["method"] == "GenerateKey"]
    assert len(made) == len({r["key"] for r in made})
    # What was asked for again after the crash is done once in the log, under the same id.
    intents = {r["seq"]: r["request"] for r in log if r["kind"] == "intent"}
    done = [intents[r["intent"]] for r in log if r["kind"] == "outcome" and r["result"] == "done"]
    assert len(done) == len(set(done))


async def test_a_signer_finds_what_another_made_on_their_token(folder: Path) -> None:
    one = SignerRig(folder / "1", policy=POLICY)
    two = SignerRig(
        folder / "2", policy=POLICY, hsm=one.hsm, authority=one.authority, name="signer-2"
    )
    signers = SignerProcess(one), SignerProcess(two)
    files = write_client(one.authority, folder / "client")
    async with AsyncExitStack() as stack:
        for signer in signers:
            stack.callback(signer.stop)
            signer.start()
            async with asyncio.timeout(90):
                await eventually(signer.answers)
        world = World(server_plugins=plugins(files, *(s.address for s in signers)))
        await stack.enter_async_context(world)
        async with running(world) as (_, workload, agent_id):
            await world.create_entry("/web", parent=agent_id)
            assert await verified(world, workload, folder) == "/web"
            assert "GenerateKey" in methods(one)  # it was started first
            signers[1].kill()
            await signed(workload, "elsewhere")
            assert await verified(world, workload, folder) == "/web"
    assert "Sign.jwt" in methods(one)


async def test_one_of_two_signers_of_a_token_dies_under_load(folder: Path) -> None:
    one = SignerRig(folder / "1", policy=POLICY)
    two = SignerRig(
        folder / "2", policy=POLICY, hsm=one.hsm, authority=one.authority, name="signer-2"
    )
    signers = SignerProcess(one), SignerProcess(two)
    files = write_client(one.authority, folder / "client")
    async with AsyncExitStack() as stack:
        for signer in signers:
            stack.callback(signer.stop)
        signers[0].start()
        world = World(server_plugins=plugins(files, *(s.address for s in signers)))
        await stack.enter_async_context(world)
        async with running(world) as (_, workload, agent_id):
            await world.create_entry("/web", parent=agent_id)
            assert await verified(world, workload, folder) == "/web"
            signers[1].start()  # it finds the keys that the first has made
            async with asyncio.timeout(90):
                await eventually(signers[1].answers)
            asked = 0

            async def load(name: str) -> None:
                nonlocal asked
                for number in range(20):
                    await signed(workload, f"{name}-{number}")
                    asked += 1

            async with asyncio.TaskGroup() as group:
                for name in "abcd":
                    group.create_task(load(name))
                await until(lambda: asked >= 20)
                signers[0].kill()
            assert asked == 80
            assert await verified(world, workload, folder) == "/web"
    assert "Sign.jwt" in methods(two)

"""The CA keys in a PKCS#11 token: same CA after restarts, no new one when the token is away."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil
import pytest
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw.config import hcl
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.svid.x509svid import verify_x509_svid
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_sim.servers import Operator, joined_agent, server_config
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_server.config import ServerSettings

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.slow,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]


def settings(directory: Path, token: SoftHsm) -> ServerSettings:
    pin = directory / "pin"
    pin.write_text("1234")
    pin.chmod(0o600)
    plugin = f"""KeyManager "pkcs11" {{ plugin_data {{
      module_path = "{token.module}"
      token_label = "ca"
      pin_file = "{pin}"
      key_identifier_value = "server-1"
      start_timeout = "1s"
      environment {{ SOFTHSM2_CONF = "{token.conf}" }}
    }} }}"""
    text = server_config(directory, key_manager="memory")
    text = text.replace('KeyManager "memory" { plugin_data {  } }', plugin)
    assert "pkcs11" in text
    return build_settings(hcl.parse(text, "server.conf"))


async def test_a_ca_in_a_token(short_dir: Path) -> None:
    token = SoftHsm(short_dir / "hsm")
    token.init_token("ca")
    server = Server(settings(short_dir, token))
    await server.start()
    first = server.manager.x509_slots.active
    operator = Operator(server.settings.socket_path)
    agent = await joined_agent(server, operator)
    now = server.clock.now()
    assert verify_x509_svid(agent.chain, await operator.bundle(), now) == agent.spiffe_id
    prepared = await server.manager.prepare_x509()
    await server.manager.activate_x509(prepared.authority_id)
    await operator.close()
    await server.close()

    token.remove()
    with pytest.raises(SpireHwError) as caught:
        await Server(settings(short_dir, token)).start()
    assert caught.value.kind in {ErrorKind.UNAVAILABLE, ErrorKind.FAILED_PRECONDITION}

    token.put_back()
    again = Server(settings(short_dir, token))
    await again.start()
    active = again.manager.x509_slots.active
    assert active is not None
    assert active.authority_id == prepared.authority_id
    assert again.manager.x509_slots.old is not None
    assert first is not None
    assert again.manager.x509_slots.old.authority_id == first.authority_id
    assert active.not_after - again.clock.now() > timedelta(hours=23)
    await again.close()


async def test_health_follows_the_token(short_dir: Path) -> None:
    token = SoftHsm(short_dir / "hsm")
    token.init_token("ca")
    before = set(psutil.Process().children())
    server = Server(settings(short_dir, token))
    await server.start()
    operator = Operator(server.settings.socket_path)
    assert await serving(operator)
    token.remove()
    for worker in set(psutil.Process().children()) - before:
        worker.kill()
    await until(operator, serves=False)
    token.put_back()
    await until(operator, serves=True)
    await operator.close()
    await server.close()


async def serving(operator: Operator) -> bool:
    answer = await operator.channel.unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest(),
        health_pb2.HealthCheckResponse,
        timeout_s=30,
    )
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def until(operator: Operator, *, serves: bool) -> None:
    async with asyncio.timeout(60):
        while await serving(operator) is not serves:  # noqa: ASYNC110 - probes are asked, not told
            await asyncio.sleep(0.05)

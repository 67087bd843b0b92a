"""Metrics of a running server and a running agent, read over HTTP and over TLS."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client.parser import text_string_to_metric_families

from spire_hw._pb import server_svid_pb2
from spire_hw.errors import SpireHwError, UnavailableError
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key
from spire_hw.spiffeid import SpiffeId
from spire_hw.x509.certificate import encode_pem
from spire_hw.x509.csr import build_csr
from spire_hw_sim.pki import HOUR, Authority, now
from spire_hw_sim.workload import Workload, eventually
from spire_hw_sim.world import TRUST_DOMAIN, World

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spire_hw.key import PrivateKey

pytestmark = pytest.mark.asyncio

_PLAIN = "telemetry { Prometheus { port = 0 } }"
_HEAD = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


async def ask(
    port: int, request: bytes = _HEAD, *, context: ssl.SSLContext | None = None
) -> tuple[bytes, bytes]:
    """Return head and body of the answer; both empty when there is none."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="x" if context else None
    )
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(30):
            answer = await reader.read()
    except ConnectionError:
        answer = b""
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


async def scrape(port: int, *, context: ssl.SSLContext | None = None) -> dict[str, float]:
    """Return samples by name and labels, without the host's."""
    head, body = await ask(port, context=context)
    if not head:
        raise UnavailableError("the listener does not answer")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "host"}
            words = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            found[f"{sample.name.removesuffix('_total')}{{{words}}}"] = sample.value
    return found


async def test_server_and_agent_tell_what_they_did_under_upstreams_names() -> None:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(World(server_rest=_PLAIN))
        agent = await stack.enter_async_context(await world.agent(rest=_PLAIN))
        workload = await stack.enter_async_context(Workload(world.socket()))
        assert agent.identity.current is not None
        await world.create_entry("/web", parent=agent.identity.current.spiffe_id)
        await eventually(workload.x509_svid)
        async with workload.x509_svids() as updates:
            await anext(updates)
            open_stream = await scrape(agent.telemetry.port)
        server = await scrape(world.server.telemetry.port)
        closed = await eventually(
            lambda: scrape(agent.telemetry.port),
            lambda found: found["spire_agent_workload_api_connections{}"] == 0,
        )
    ok = "{status=OK}"
    assert server[f"spire_server_rpc_agent_v1_agent_attest_agent{ok}"] == 1
    assert server[f"spire_server_rpc_agent_v1_agent_attest_agent_elapsed_time_count{ok}"] == 1
    assert server[f"spire_server_rpc_svid_v1_svid_batch_new_x509svid{ok}"] >= 1
    assert server[f"spire_server_server_key_manager_generate_key{ok}"] == 2
    assert server[f"spire_server_server_key_manager_sign_data{ok}"] >= 3
    assert server[f"spire_server_ca_manager_x509_ca_prepare{ok}"] == 1
    assert server["spire_server_ca_manager_x509_ca_activate{}"] == 1
    assert server[f"spire_server_ca_manager_jwt_key_prepare{ok}"] == 1
    assert server["spire_server_manager_jwt_key_activate{}"] == 1
    assert server["spire_server_server_ca_sign_x509_svid{}"] >= 3
    assert server[f"spire_server_svid_rotate{ok}"] == 1
    ttl = server["spire_server_manager_x509_ca_rotate_ttl{trust_domain_id=sim_example}"]
    assert 86_000 < ttl <= 86_400
    assert server[f"spire_server_entry_cache_reload{ok}"] == 1
    assert server["spire_server_entry_entries_by_entryid_cache_count{}"] == 1
    assert any(k.startswith("spire_server_started{trust_domain_id=sim_example") for k in server)
    assert server["spire_server_node_attestation{attestor=join_token,status=OK}"] == 1
    assert server["spire_server_authority_custody{custody=software,kind=x509}"] == 1
    assert server["spire_server_authority_custody{custody=software,kind=jwt}"] == 1
    assert server["process_resident_memory_bytes{}"] > 0
    assert open_stream["spire_agent_workload_api_connections{}"] == 1
    assert closed["spire_agent_workload_api_connection{}"] >= 2
    assert closed["spire_agent_node_attestor_new_svid{attestor=join_token,status=OK}"] == 1
    assert closed[f"spire_agent_manager_sync_fetch_entries_updates{ok}"] >= 1
    assert closed[f"spire_agent_manager_sync_fetch_svids_updates{ok}"] >= 1
    assert closed[f"spire_agent_agent_key_manager_generate_key{ok}"] == 1
    assert closed["spire_agent_workload_api_workload_attestor{attestor=unix,status=OK}"] >= 2
    assert closed["spire_agent_lru_cache_svid_map_size{}"] == 1


async def test_metrics_are_read_over_loopback_alone_unless_told_otherwise() -> None:
    async with World(server_rest=_PLAIN) as world:
        listening = world.server.telemetry.port
        table = (await asyncio.to_thread(_tcp_listeners))[listening]
    assert table <= {"0100007F", "00000000000000000000000001000000"}


def _tcp_listeners() -> dict[int, set[str]]:
    """Return local addresses of listening sockets by port, as the kernel writes them."""
    found: dict[int, set[str]] = {}
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(name) as lines:  # noqa: PTH123
            next(lines)
            for line in lines:
                fields = line.split()
                if fields[3] == "0A":
                    address, _, port = fields[1].partition(":")
                    found.setdefault(int(port, 16), set()).add(address)
    return found


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GARBAGE" * 1000,
    ],
)
async def test_whoever_does_not_ask_for_metrics_gets_nothing(request_bytes: bytes) -> None:
    async with World(server_rest=_PLAIN) as world:
        port = world.server.telemetry.port
        assert await ask(port, request_bytes) == (b"", b"")
        assert await scrape(port)


async def test_a_request_without_end_is_cut_off() -> None:
    async with World(server_rest=_PLAIN) as world:
        head, body = await ask(world.server.telemetry.port, b"GET /" + b"a" * 9000)
        assert head.startswith(b"HTTP/1.1 431 ")
        assert body == b""


async def test_those_who_hold_connections_leave_room_for_others() -> None:
    async with World(server_rest=_PLAIN) as world:
        port = world.server.telemetry.port
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(16)]
        assert await ask(port) == (b"", b"")  # as many as one caller may have
        for _, writer in held:
            writer.close()
        assert await eventually(lambda: scrape(port))


def _client(chain: Sequence[bytes], key: PrivateKey, file: Path) -> ssl.SSLContext:
    """Return a context that shows an identity; the server is looked at by hand."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file.write_bytes(encode_pem(chain) + pem)
    context.load_cert_chain(file)
    return context


def _stranger() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _tls(text: str) -> str:
    return f"telemetry {{ Prometheus {{ port = 0 tls {{ {text} }} }} }}"


async def _mint(world: World, path: str, file: Path) -> ssl.SSLContext:
    key = generate_private_key(KeyType.EC_P256)
    spiffe_id = SpiffeId(f"spiffe://{TRUST_DOMAIN}{path}")
    csr = await build_csr(SoftwareSigner(key), spiffe_id=spiffe_id)
    answer = await world.call(
        "/spire.api.server.svid.v1.SVID/MintX509SVID",
        server_svid_pb2.MintX509SVIDRequest(csr=csr),
        server_svid_pb2.MintX509SVIDResponse,
    )
    return _client(answer.svid.cert_chain, key, file)


async def refused(port: int, context: ssl.SSLContext) -> bool:
    """Tell whether a client is turned away, in the handshake or right after it."""
    try:
        return await ask(port, context=context) == (b"", b"")
    except (ssl.SSLError, ConnectionError):
        return True


async def test_tls_with_files_and_clients_of_another_authority(tmp_path: Path) -> None:
    ours, theirs, foreign = (Authority(name) for name in ("a.example", "b.example", "c.example"))
    key = ec.generate_private_key(ec.SECP256R1())
    _client([ours.leaf(key.public_key(), "spiffe://a.example/x")], key, tmp_path / "s.pem")
    (tmp_path / "ca.pem").write_bytes(encode_pem([theirs.der]))
    settings = (
        f'cert_file = "{tmp_path}/s.pem" key_file = "{tmp_path}/s.pem"'
        f' client_ca_file = "{tmp_path}/ca.pem"'
    )
    async with World(server_rest=_tls(settings)) as world:
        port = world.server.telemetry.port
        mine = ec.generate_private_key(ec.SECP256R1())
        good = [theirs.leaf(mine.public_key(), "spiffe://b.example/prometheus")]
        assert await scrape(port, context=_client(good, mine, tmp_path / "good.pem"))
        old = theirs.leaf(
            mine.public_key(), "spiffe://b.example/p", start=now() - 3 * HOUR, end=now() - HOUR
        )
        wrong = foreign.leaf(mine.public_key(), "spiffe://b.example/prometheus")
        for bad in (old, wrong):
            assert await refused(port, _client([bad], mine, tmp_path / "bad.pem"))
        assert await refused(port, _stranger())
        assert await ask(port) == (b"", b"")  # no plain HTTP beside TLS


async def test_tls_with_the_servers_own_svid_and_clients_known_by_id(tmp_path: Path) -> None:
    settings = (
        f'use_spire_svid = true authorized_spiffe_ids = ["spiffe://{TRUST_DOMAIN}/prometheus"]'
    )
    async with World(server_rest=_tls(settings)) as world:
        port = world.server.telemetry.port
        allowed = await _mint(world, "/prometheus", tmp_path / "allowed.pem")
        assert await scrape(port, context=allowed)
        other = await _mint(world, "/other", tmp_path / "other.pem")
        assert await refused(port, other)
        assert await refused(port, _stranger())
        foreign = Authority(TRUST_DOMAIN)
        key = ec.generate_private_key(ec.SECP256R1())
        forged = [foreign.leaf(key.public_key(), f"spiffe://{TRUST_DOMAIN}/prometheus")]
        assert await refused(port, _client(forged, key, tmp_path / "forged.pem"))


async def test_tls_with_the_agents_own_svid() -> None:
    rest = _tls("use_spire_svid = true")
    async with World() as world, await world.agent(rest=rest) as agent:
        assert await scrape(agent.telemetry.port, context=_stranger())


async def test_files_that_are_not_there_are_named_at_start(tmp_path: Path) -> None:
    settings = f'cert_file = "{tmp_path}/no.pem" key_file = "{tmp_path}/no.pem"'
    with pytest.raises(SpireHwError, match=r"cert_file .*no\.pem cannot be read"):
        async with World(server_rest=_tls(settings)):
            pass


async def test_a_port_that_is_taken_is_named_at_start() -> None:
    async with World(server_rest=_PLAIN) as world:
        port = world.server.telemetry.port
        rest = f"telemetry {{ Prometheus {{ port = {port} }} }}"
        with pytest.raises(SpireHwError, match=rf"cannot listen on localhost:{port}"):
            async with World(server_rest=rest):
                pass

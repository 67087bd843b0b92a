"""A whole signer over real TLS and a real token: what it does, across restarts and reloads."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from spire_hw._pb import hw_signer_pb2
from spire_hw.aio.tasks import Tasks
from spire_hw.clock import SystemClock
from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.key import KeyType, SignOptions, default_hash, parse_spki
from spire_hw.rpc.client import connect_unix
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.issue import issue_ca_certificate
from spire_hw_sim.signer import (
    CLIENT_ID,
    SERVICE,
    TIMEOUT_S,
    SignerRig,
    client_policy,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.key import PublicKey
    from spire_hw.rpc.client import Channel

pytestmark = pytest.mark.hsm
DOMAIN = TrustDomain("example.org")
DIGEST = bytes(range(32))
LIST = hw_signer_pb2.GetPublicKeysRequest()


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[SignerRig]:
    async with SignerRig(tmp_path, policy=client_policy(raw="true")) as rig:
        yield rig


class RemoteSigner:
    """A `Signer` over the wire: what the issuing code signs goes to the signer as it is."""

    def __init__(self, rig: SignerRig, key: Any, purpose: str = "x509") -> None:
        self._rig = rig
        self._key = key
        self._purpose = purpose
        self.body = b""

    @property
    def public_key(self) -> PublicKey:
        return parse_spki(self._key.pkix_data)

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        raise AssertionError("a digest was asked for")

    async def sign_content(
        self, purpose: Any, content: bytes, digest: bytes, options: SignOptions
    ) -> bytes:
        self.body = content
        result = await self._rig.sign(
            self._key.id, hash_number=options.hash.value, **{self._purpose: content}
        )
        assert not result.refusal.code, result.refusal
        return bytes(result.signature)


def verify(key: Any, digest: bytes, signature: bytes) -> None:
    public = parse_spki(key.pkix_data)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(signature, digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))


@pytest.mark.asyncio
async def test_keys_are_made_listed_and_sign(rig: SignerRig) -> None:
    assert not (await rig.call("GetPublicKeys", LIST)).public_keys
    made = await rig.generate("x509-CA-A")
    listed = await rig.call("GetPublicKeys", LIST)
    assert list(listed.public_keys) == [made.public_key]
    signed = await rig.sign("x509-CA-A", digest=DIGEST)
    verify(made.public_key, DIGEST, signed.signature)
    assert signed.fingerprint == made.public_key.fingerprint


@pytest.mark.asyncio
@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
async def test_a_certificate_is_signed_for_what_it_says(rig: SignerRig, key_type: KeyType) -> None:
    key = (await rig.generate("x509-CA-A", key_type)).public_key
    signer = RemoteSigner(rig, key)
    now = SystemClock().now()
    der = await issue_ca_certificate(
        None, trust_domain=DOMAIN, not_before=now, not_after=now + timedelta(days=1), signer=signer
    )
    made = x509.load_der_x509_certificate(der)
    made.verify_directly_issued_by(made)
    assert default_hash(signer.public_key).instance.name == made.signature_hash_algorithm.name  # type: ignore[union-attr]


@pytest.mark.asyncio
async def test_the_head_of_the_log_grows_with_every_answer(rig: SignerRig) -> None:
    made = await rig.generate("x509-CA-A")
    request = hw_signer_pb2.SignRequest(
        items=[
            hw_signer_pb2.SignItem(
                request_id=secrets.token_bytes(16), key_id="x509-CA-A", hash=5, digest=DIGEST
            )
        ]
    )
    signed = await rig.call("Sign", request)
    assert signed.log_head.seq > made.log_head.seq
    head = await rig.call("GetLogHead", hw_signer_pb2.GetLogHeadRequest())
    assert head.log_head.seq >= signed.log_head.seq
    assert parse_spki(head.log_key)


@pytest.mark.asyncio
async def test_a_batch_is_answered_item_by_item(rig: SignerRig) -> None:
    key = (await rig.generate("x509-CA-A")).public_key
    items = [
        hw_signer_pb2.SignItem(
            request_id=secrets.token_bytes(16), key_id=key_id, hash=number, digest=DIGEST
        )
        for key_id, number in [("x509-CA-A", 5), ("foreign", 5), ("x509-CA-A", 4)] * 21
    ]
    response = await rig.call("Sign", hw_signer_pb2.SignRequest(items=items))
    codes = [r.refusal.code for r in response.results]
    assert codes == [0, ErrorKind.PERMISSION_DENIED.value, ErrorKind.INVALID_ARGUMENT.value] * 21
    for result in response.results[::3]:
        verify(key, DIGEST, result.signature)
    with pytest.raises(SpireHwError, match="1 to 64") as caught:
        await rig.call("Sign", hw_signer_pb2.SignRequest(items=items[:1] * 65))
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    with pytest.raises(SpireHwError, match="1 to 64"):
        await rig.call("Sign", hw_signer_pb2.SignRequest())


@pytest.mark.asyncio
async def test_a_retry_gets_the_same_signature_and_one_record(rig: SignerRig) -> None:
    await rig.generate("x509-CA-A")
    request_id = secrets.token_bytes(16)
    first = await rig.sign("x509-CA-A", request_id=request_id, digest=DIGEST)
    seq = rig.signer.audit.head.seq
    again = await asyncio.gather(
        *(rig.sign("x509-CA-A", request_id=request_id, digest=DIGEST) for _ in range(5))
    )
    assert {bytes(a.signature) for a in again} == {bytes(first.signature)}
    await rig.sign("x509-CA-A", digest=DIGEST)
    assert rig.signer.audit.head.seq <= seq + 2


@pytest.mark.asyncio
async def test_the_same_generation_is_asked_for_twice(rig: SignerRig) -> None:
    request_id = secrets.token_bytes(16)
    both = await asyncio.gather(
        *(rig.generate("x509-CA-A", request_id=request_id) for _ in range(3))
    )
    assert len({m.public_key.fingerprint for m in both}) == 1
    await rig.restart()
    again = await rig.generate("x509-CA-A", request_id=request_id)
    assert again.public_key == both[0].public_key
    other = await rig.generate("x509-CA-B", request_id=request_id)
    assert other.refusal.code == ErrorKind.ALREADY_EXISTS.value
    newer = await rig.generate("x509-CA-A")
    assert newer.public_key.fingerprint != again.public_key.fingerprint
    late = await rig.generate("x509-CA-A", request_id=request_id)
    assert late.refusal.code == ErrorKind.ALREADY_EXISTS.value
    assert "replaced since" in late.refusal.message


@pytest.mark.asyncio
async def test_keys_budgets_and_last_uses_survive_a_restart(tmp_path: Path) -> None:
    text = client_policy(
        raw="true", generate='{ per_key_min_interval = "0s" per_day = 2 }', active_window='"1h"'
    )
    async with SignerRig(tmp_path, policy=text) as rig:
        made = await rig.generate("x509-CA-A")
        await rig.sign("x509-CA-A", digest=DIGEST)
        await rig.restart()
        assert (await rig.generate("x509-CA-A")).refusal.reason == "replace_active"
        await rig.generate("x509-CA-B")
        assert (await rig.generate("x509-CA-B")).refusal.reason == "generate_budget"
        await rig.restart()
        assert (await rig.generate("JWT-Signer-A")).refusal.reason == "generate_budget"
        signed = await rig.sign("x509-CA-A", digest=DIGEST)
        verify(made.public_key, DIGEST, signed.signature)


@pytest.mark.asyncio
async def test_several_clients_have_keys_of_their_own(tmp_path: Path) -> None:
    other_id = "spiffe://infra.example/spire-server-2"
    text = client_policy(raw="true") + client_policy(other_id, server="s2", raw="true")
    async with SignerRig(tmp_path, policy=text) as rig:
        other = await rig.channel(rig.authority.identity(other_id))
        mine = await rig.generate("x509-CA-A")
        theirs = await rig.generate("x509-CA-A", channel=other)
        assert mine.public_key.fingerprint != theirs.public_key.fingerprint
        for channel, key in ((None, mine), (other, theirs)):
            listed = await rig.call("GetPublicKeys", LIST, channel=channel)
            assert list(listed.public_keys) == [key.public_key]


@pytest.mark.asyncio
async def test_a_client_is_known_by_its_certificate_alone(tmp_path: Path) -> None:
    rig = SignerRig(tmp_path, keys="disk", policy=client_policy())
    der = rig.identity.chain_der[0]
    fingerprint = x509.load_der_x509_certificate(der).fingerprint(hashes.SHA256()).hex()
    rig.write_policy(client_policy(f"sha256:{fingerprint}", raw="true"))
    async with rig:
        await rig.generate("x509-CA-A")
        renewed = await rig.channel(rig.authority.identity(CLIENT_ID))
        with pytest.raises(SpireHwError, match="not let in") as caught:
            await rig.call("GetPublicKeys", LIST, channel=renewed)
        assert caught.value.kind is ErrorKind.UNAUTHENTICATED


@pytest.mark.asyncio
async def test_a_client_on_this_host_is_known_by_its_user(tmp_path: Path) -> None:
    text = client_policy(f"unix:{os.getuid()}", raw="true")
    async with SignerRig(tmp_path, keys="disk", policy=text) as rig:
        local = rig.local_channel()
        made = await rig.generate("x509-CA-A", channel=local)
        signed = await rig.sign("x509-CA-A", digest=DIGEST, channel=local)
        verify(made.public_key, DIGEST, signed.signature)
        rig.write_policy(client_policy(f"unix:{os.getuid() + 1}", raw="true"))
        assert await rig.signer.reload()
        with pytest.raises(SpireHwError, match="not let in"):
            await rig.sign("x509-CA-A", digest=DIGEST, channel=local)


@pytest.mark.asyncio
async def test_a_client_that_is_dropped_is_out_at_once(rig: SignerRig) -> None:
    await rig.generate("x509-CA-A")
    rig.write_policy(client_policy("spiffe://infra.example/other", server="s9", raw="true"))
    assert await rig.signer.reload()
    with pytest.raises(SpireHwError, match="not let in"):
        await rig.sign("x509-CA-A", digest=DIGEST)
    rig.write_policy(client_policy(raw="true"))
    assert await rig.signer.reload()
    signed = await rig.sign("x509-CA-A", digest=DIGEST)
    assert signed.signature


@pytest.mark.asyncio
async def test_a_reload_takes_new_rules_and_tls_files(rig: SignerRig) -> None:
    await rig.generate("x509-CA-A")
    before = rig.signer.live.policy.hash
    rig.write_policy(client_policy(raw="false", retain_replaced='"1h"'))
    rig._write_tls()
    shown: list[bytes] = []
    assert await rig.signer.reload()
    assert rig.signer.live.policy.hash != before
    result = await rig.sign("x509-CA-A", digest=DIGEST)
    assert result.refusal.reason == "raw_denied"
    channel = await rig.channel()
    await rig.call("GetPublicKeys", LIST, channel=channel)
    assert channel.dialer is not None
    shown.append(channel.dialer.server_chain[0])
    rig._write_tls()
    assert await rig.signer.reload()
    again = await rig.channel()
    await rig.call("GetPublicKeys", LIST, channel=again)
    assert again.dialer is not None
    assert again.dialer.server_chain[0] != shown[0]


@pytest.mark.asyncio
async def test_health_is_told_to_operators_and_clients(rig: SignerRig) -> None:
    from grpc_health.v1 import health_pb2  # noqa: PLC0415 # type: ignore[import-untyped]

    path = "/grpc.health.v1.Health/Check"
    async with connect_unix(rig.admin_socket) as admin:
        for channel in (admin, await rig.channel()):
            answer = await channel.unary(
                path,
                health_pb2.HealthCheckRequest(),
                health_pb2.HealthCheckResponse,
                timeout_s=TIMEOUT_S,
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.asyncio
async def test_what_operators_call_is_not_there_for_clients(rig: SignerRig) -> None:
    from spire_hw._pb import hw_signer_admin_pb2  # noqa: PLC0415 - only here

    (service,) = hw_signer_admin_pb2.DESCRIPTOR.services_by_name.values()
    channel = await rig.channel()
    for method in service.methods:
        with pytest.raises(SpireHwError) as caught:
            await channel.unary(
                f"/{service.full_name}/{method.name}",
                hw_signer_pb2.GetLogHeadRequest(),
                hw_signer_pb2.GetLogHeadResponse,
                timeout_s=TIMEOUT_S,
            )
        assert caught.value.kind is ErrorKind.UNIMPLEMENTED


@pytest.mark.asyncio
async def test_there_is_one_signer_on_a_data_directory(rig: SignerRig) -> None:
    with pytest.raises(UnavailableError, match="another signer runs"):
        await rig._signer().start()


class Process:
    """A signer in a process of its own."""

    def __init__(self, rig: SignerRig) -> None:
        self._rig = rig
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *self._rig.command,
            env=dict(self._rig.environment),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        await self.line("signer is ready")

    async def line(self, words: str) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            while line := (await self.process.stdout.readline()).decode():
                if words in line:
                    return line
        raise AssertionError(f"the signer ended without: {words}")

    async def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGTERM:
            await self.line("signer stops")
        await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


async def local(rig: SignerRig) -> Channel:
    return connect_unix(rig.socket)


@pytest.mark.asyncio
async def test_a_signer_that_is_killed_goes_on_with_all_it_promised(tmp_path: Path) -> None:
    rig = SignerRig(tmp_path, policy=client_policy(f"unix:{os.getuid()}", raw="true"))
    process = Process(rig)
    await process.start()
    request_id = secrets.token_bytes(16)
    async with await local(rig) as channel:
        made = await rig.generate("x509-CA-A", request_id=request_id, channel=channel)
        heads: list[int] = []
        tasks = Tasks(lambda name, error: None)
        killing = tasks.spawn("kill", _kill_soon(process))
        with pytest.raises(SpireHwError):
            await _sign_for_ever(channel, heads)
        await killing
    await process.start()
    async with await local(rig) as channel:
        again = await rig.generate("x509-CA-A", request_id=request_id, channel=channel)
        assert again.public_key == made.public_key
        assert again.log_head.seq > max(heads)
        refused = await rig.generate("x509-CA-A", channel=channel)
        assert refused.refusal.reason == "replace_active"
    assert await process.end(signal.SIGTERM) == 0


async def _sign_for_ever(channel: Channel, heads: list[int]) -> None:
    while True:
        items = [
            hw_signer_pb2.SignItem(
                request_id=secrets.token_bytes(16), key_id="x509-CA-A", hash=5, digest=DIGEST
            )
            for _ in range(16)
        ]
        response = await channel.unary(
            SERVICE + "Sign",
            hw_signer_pb2.SignRequest(items=items),
            hw_signer_pb2.SignResponse,
            timeout_s=TIMEOUT_S,
        )
        heads.append(response.log_head.seq)


async def _kill_soon(process: Process) -> None:
    await asyncio.sleep(0.5)
    await process.end(signal.SIGKILL)


@pytest.mark.asyncio
async def test_a_generation_that_a_kill_cut_off_is_one_key(tmp_path: Path) -> None:
    text = client_policy(
        f"unix:{os.getuid()}", raw="true", generate='{ per_key_min_interval = "1h" per_day = 1 }'
    )
    rig = SignerRig(tmp_path, policy=text)
    process = Process(rig)
    await process.start()
    request_id = secrets.token_bytes(16)
    async with await local(rig) as channel:
        tasks = Tasks(lambda name, error: None)
        asking = tasks.spawn(
            "generate",
            rig.generate("x509-CA-A", KeyType.RSA_2048, request_id=request_id, channel=channel),
        )
        notes = rig.folder / "data" / "owners" / "example.org@s1" / "key-notes.json"
        async with asyncio.timeout(20):
            while not notes.exists() and not asking.done():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.001)
        await process.end(signal.SIGKILL)
        await asyncio.gather(asking, return_exceptions=True)
    await process.start()
    async with await local(rig) as channel:
        made = await rig.generate(
            "x509-CA-A", KeyType.RSA_2048, request_id=request_id, channel=channel
        )
        assert not made.refusal.code
        listed = await rig.call("GetPublicKeys", LIST, channel=channel)
        assert list(listed.public_keys) == [made.public_key]
    assert await process.end(signal.SIGTERM) == 0


@pytest.mark.asyncio
async def test_a_process_reloads_on_sighup(tmp_path: Path) -> None:
    rig = SignerRig(tmp_path, keys="disk", policy=client_policy(f"unix:{os.getuid()}", raw="true"))
    process = Process(rig)
    await process.start()
    assert process.process is not None
    rig.write_policy("client {")
    process.process.send_signal(signal.SIGHUP)
    assert "what was in force stays" in await process.line("Signer alarm")
    rig.write_policy(
        client_policy(
            f"unix:{os.getuid()}", raw="false", x509='{ max_ca_ttl = "1h" max_svid_ttl = "1h" }'
        )
    )
    process.process.send_signal(signal.SIGHUP)
    await process.line("Policy is in force")
    async with await local(rig) as channel:
        await rig.generate("x509-CA-A", channel=channel)
        result = await rig.sign("x509-CA-A", digest=DIGEST, channel=channel)
        assert result.refusal.reason == "raw_denied"
    assert await process.end(signal.SIGTERM) == 0


async def get(port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    async with asyncio.timeout(TIMEOUT_S):
        answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split()[1]), answer


@pytest.mark.asyncio
async def test_probes_and_metrics_are_answered_over_http(tmp_path: Path) -> None:
    rig = SignerRig(tmp_path, keys="disk", policy=client_policy(raw="true"))
    more = """
health_checks {
  listener_enabled = true
  bind_address = "127.0.0.1"
  bind_port = 0
}
telemetry { Prometheus { port = 0 } }
"""
    rig.config_file.write_text(rig.config_file.read_text() + more)
    rig.signer = rig._signer()
    async with rig:
        for path in ("/live", "/ready"):
            assert (await get(rig.signer.health_port, path))[0] == 200
        await rig.generate("x509-CA-A")
        await rig.sign("x509-CA-A", digest=DIGEST)
        await rig.sign("other", digest=DIGEST)
        await rig.sign("x509-CA-A", digest=DIGEST[1:])
        status, text = await get(rig.signer.telemetry.port, "/metrics")
        assert status == 200
        for line in (
            'spire_signer_sign{key="x509_CA_A",status="OK"} 1',
            'spire_signer_refused{key="",reason="key_id"} 1',
            'spire_signer_refused{key="x509_CA_A",reason="digest_length"} 1',
            'spire_signer_alarm{reason="key_id"} 1',
            'spire_signer_alarm{reason="digest_length"} 1',
            'spire_signer_generate_key{key="x509_CA_A",result="done"} 1',
        ):
            assert without_host(line) in without_host(text), text
        rig.write_policy("client {")
        assert not await rig.signer.reload()
        assert (await get(rig.signer.health_port, "/live"))[0] == 200
        status, text = await get(rig.signer.health_port, "/ready")
        assert status == 500
        assert "signer.files" in text


@pytest.mark.asyncio
async def test_gauges_of_a_token_tell_its_owners_apart(tmp_path: Path) -> None:
    rig = SignerRig(tmp_path)
    more = "telemetry { Prometheus { port = 0 } }\n"
    rig.config_file.write_text(rig.config_file.read_text() + more)
    rig.signer = rig._signer()
    async with rig:
        _, text = await get(rig.signer.telemetry.port, "/metrics")
    found = re.findall(r"spire_signer_hsm_keys_awaiting_disposal\{(.*)\} 0", text)
    assert len(found) == 2, text
    assert len({re.sub(r'owner="[^"]*"', "", labels) for labels in found}) == 1
    owners = {"".join(re.findall(r'owner="([^"]*)"', labels)) for labels in found}
    assert owners == {"example_org_s1", "spire_hw_signer_signer_1"}


def without_host(text: str) -> str:
    """Return metrics without the label that differs from machine to machine."""
    return re.sub(r'host="[^"]*",?', "", text).replace(",}", "}")


@pytest.mark.asyncio
async def test_start_and_stop_stand_in_the_log(tmp_path: Path) -> None:
    rig = SignerRig(tmp_path, keys="disk")
    async with rig:
        await rig.restart()
    lines = []
    for path in sorted((tmp_path / "data" / "audit").glob("audit-*.log")):
        lines += [json.loads(line) for line in path.read_bytes().splitlines()]
    events = [line["event"] for line in lines if line["kind"] == "note"]
    assert events.count("start") == events.count("stop") == 2
    assert events.index("policy_loaded") < events.index("start") < events.index("stop")

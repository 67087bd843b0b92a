"""What hosts offer to plugins, over the wire and through the broker of a real plugin process."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw._pb import hostservice_agentstore_pb2 as agent_pb
from spire_hw._pb import hostservice_identityprovider_pb2 as identity_pb
from spire_hw._pb import hostservice_metrics_pb2 as metrics_pb
from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.clock import SystemClock
from spire_hw.errors import InvalidInputError, NotFoundError, SpireHwError
from spire_hw.goplugin.external import ExternalPlugin
from spire_hw.goplugin.facade import hostservices
from spire_hw.goplugin.place import Place
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key, spki_der
from spire_hw.log import get_logger
from spire_hw.plugin.hostservices import HostServices, ServerIdentity
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.plugin.section import PluginConfig
from spire_hw.rpc.service import bind
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509.issue import issue_ca_certificate
from tests.integration.goplugin.wire import serving

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from spire_hw.rpc.client import Channel

TD = TrustDomain.parse("example.org")
AGENT = SpiffeId.parse("spiffe://example.org/spire/agent/x/1")
NOW = datetime(2026, 11, 22, 8, 0, 0, 123456, tzinfo=UTC)
KEY = generate_private_key(KeyType.EC_P256)


class Recorder:
    """All host services; notes what is said to it."""

    def __init__(self, identity: ServerIdentity | None = None) -> None:
        self.said: list[tuple[Any, ...]] = []
        self._identity = identity

    async def set_gauge(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        self.said.append(("gauge", list(key), value, labels))

    async def emit_key(self, key: Sequence[str], value: float) -> None:
        self.said.append(("key", list(key), value))

    async def incr_counter(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        self.said.append(("counter", list(key), value, labels))

    async def add_sample(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        self.said.append(("sample", list(key), value, labels))

    async def measure_since(
        self, key: Sequence[str], start: datetime, labels: Mapping[str, str] | None = None
    ) -> None:
        self.said.append(("since", list(key), start, labels))

    async def check_known(self, agent_id: SpiffeId) -> None:
        self.said.append(("agent", agent_id))
        if agent_id != AGENT:
            raise NotFoundError("no such agent")

    async def fetch_x509_identity(self) -> ServerIdentity:
        assert self._identity is not None
        return self._identity


async def identity() -> ServerIdentity:
    root = await issue_ca_certificate(
        None,
        trust_domain=TD,
        not_before=NOW,
        not_after=NOW + timedelta(days=1),
        signer=SoftwareSigner(KEY),
    )
    keys = (JwtAuthority("kid", spki_der(KEY.public_key())),)
    return ServerIdentity((root,), b"pkcs8", Bundle(TD, (X509Root(root),), keys, 60, 3))


def offered(recorder: Recorder) -> HostServices:
    return HostServices(recorder, recorder, recorder)


def over(channel: Channel, services: HostServices) -> HostServices:
    async def connect() -> Channel:
        return channel

    return hostservices.remote_services(hostservices.names(services), connect)


@pytest.mark.asyncio
async def test_measurements_arrive(tmp_path: Path) -> None:
    recorder = Recorder()
    async with serving(hostservices.methods(offered(recorder)), tmp_path) as channel:
        metrics = over(channel, offered(recorder)).metrics
        assert metrics is not None
        await metrics.set_gauge(["a", "b"], 0.5, {"l": "v"})
        await metrics.emit_key(["k"], 1)
        await metrics.incr_counter(["c"], 2)
        await metrics.add_sample(["s"], 3, {})
        await metrics.measure_since(["t"], NOW)
    assert recorder.said == [
        ("gauge", ["a", "b"], 0.5, {"l": "v"}),
        ("key", ["k"], 1.0),
        ("counter", ["c"], 2.0, {}),
        ("sample", ["s"], 3.0, {}),
        ("since", ["t"], NOW, {}),
    ]


@pytest.mark.asyncio
async def test_agents_and_identity_are_told(tmp_path: Path) -> None:
    given = await identity()
    recorder = Recorder(given)
    async with serving(hostservices.methods(offered(recorder)), tmp_path) as channel:
        services = over(channel, offered(recorder))
        assert services.agent_store is not None
        await services.agent_store.check_known(AGENT)
        with pytest.raises(NotFoundError):
            await services.agent_store.check_known(SpiffeId.parse("spiffe://example.org/x"))
        assert services.identity_provider is not None
        assert await services.identity_provider.fetch_x509_identity() == given
    assert "pkcs8" not in repr(given)


def test_what_is_not_offered_is_not_there() -> None:
    recorder = Recorder()
    assert hostservices.names(HostServices(metrics=recorder)) == [hostservices.METRICS]
    assert hostservices.side_of([hostservices.METRICS]) is Side.AGENT
    assert hostservices.side_of(hostservices.names(offered(recorder))) is Side.SERVER
    assert hostservices.side_of(["something.else"]) is None
    assert hostservices.methods(HostServices()) == []

    async def connect() -> Channel:
        raise AssertionError

    assert hostservices.remote_services([], connect) == HostServices()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("SetGauge", metrics_pb.SetGaugeRequest(val=1)),
        ("SetGauge", metrics_pb.SetGaugeRequest(key=["x"] * 33)),
        ("EmitKey", metrics_pb.EmitKeyRequest(key=["x" * 257])),
        ("IncrCounter", metrics_pb.IncrCounterRequest(key=["a\nb"])),
        ("AddSample", metrics_pb.AddSampleRequest(key=["a"], labels=[{"name": "l"}] * 33)),
        ("AddSample", metrics_pb.AddSampleRequest(key=["a"], labels=[{"value": "\x1b"}])),
        ("MeasureSince", metrics_pb.MeasureSinceRequest(key=["a"], time=-1)),
    ],
)
async def test_a_plugin_cannot_flood_metrics_with_odd_words(
    method: str, request_: Any, tmp_path: Path
) -> None:
    recorder = Recorder()
    async with serving(hostservices.methods(offered(recorder)), tmp_path) as channel:
        path = f"/{hostservices.METRICS}/{method}"
        with pytest.raises(InvalidInputError):
            await channel.unary(path, request_, metrics_pb.Label)
    assert recorder.said == []


@pytest.mark.asyncio
async def test_a_host_that_answers_for_another_agent_is_not_believed(tmp_path: Path) -> None:
    class Lying:
        async def get_agent_info(self, request: Any, call: Any) -> Any:
            return agent_pb.GetAgentInfoResponse(info={"agent_id": "spiffe://example.org/other"})

        async def fetch_x509_identity(self, request: Any, call: Any) -> Any:
            return identity_pb.FetchX509IdentityResponse()

    services = [
        *bind(agent_pb.DESCRIPTOR.services_by_name["AgentStore"], Lying()),
        *bind(identity_pb.DESCRIPTOR.services_by_name["IdentityProvider"], Lying()),
    ]
    async with serving(services, tmp_path) as channel:
        found = over(channel, offered(Recorder()))
        assert found.agent_store is not None
        with pytest.raises(SpireHwError, match="another agent"):
            await found.agent_store.check_known(AGENT)
        assert found.identity_provider is not None
        with pytest.raises(SpireHwError, match="no key"):
            await found.identity_provider.fetch_x509_identity()


PLUGIN = """\
import sys
from spire_hw.goplugin.guest import serve
from spire_hw.plugin.info import PluginKind
from spire_hw.spiffeid import SpiffeId


class Publisher:
    def __init__(self, host):
        self._host = host

    def validate(self, config):
        return []

    async def configure(self, config):
        pass

    async def publish_bundle(self, bundle):
        services = self._host.services
        await services.metrics.incr_counter(["published"], 1, {"td": str(bundle.trust_domain)})
        await services.agent_store.check_known(SpiffeId.parse("spiffe://example.org/nobody"))

    async def close(self):
        pass


sys.exit(serve(PluginKind.BUNDLE_PUBLISHER, Publisher))
"""


@pytest.mark.asyncio
async def test_a_plugin_process_reaches_its_host(tmp_path: Path) -> None:
    program = tmp_path / "plugin"
    program.write_text(f"#!{sys.executable}\n{PLUGIN}")
    program.chmod(0o755)
    recorder, place = Recorder(), Place.open()
    host = HostInfo(Side.SERVER, TD, tmp_path, get_logger("test"), SystemClock())
    config = PluginConfig(PluginKind.BUNDLE_PUBLISHER, "mine", cmd=str(program))
    plugin = ExternalPlugin(config, host, offered(recorder), place, environ=os.environ)
    try:
        await plugin.open()
        await plugin.configure("")
        with pytest.raises(NotFoundError, match=r"^bundlepublisher\(mine\): no such agent$"):
            await plugin.contract.publish_bundle(Bundle(TD))
    finally:
        await plugin.close()
        place.close()
    assert recorder.said[0] == ("counter", ["published"], 1.0, {"td": "example.org"})

"""What hosts offer to plugins, over gRPC: `remote_services` for the guest, `methods` for the host.

Source: `spire.hostservice.common.metrics.v1`, `spire.hostservice.server.{agentstore,
identityprovider}.v1`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.empty_pb2 import Empty

from spire_hw._pb import hostservice_agentstore_pb2 as agent_pb
from spire_hw._pb import hostservice_identityprovider_pb2 as identity_pb
from spire_hw._pb import hostservice_metrics_pb2 as metrics_pb
from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.goplugin.facade.values import bundle_from_pb, bundle_to_pb, chain_from_ders
from spire_hw.plugin.hostservices import (
    AgentStore,
    HostServices,
    IdentityProvider,
    Metrics,
    ServerIdentity,
)
from spire_hw.plugin.info import Side
from spire_hw.rpc.service import bind
from spire_hw.spiffeid import SpiffeId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from google.protobuf.message import Message

    from spire_hw.rpc.client import Channel
    from spire_hw.rpc.service import Call, Method

METRICS: Final = "spire.hostservice.common.metrics.v1.Metrics"
AGENT_STORE: Final = "spire.hostservice.server.agentstore.v1.AgentStore"
IDENTITY_PROVIDER: Final = "spire.hostservice.server.identityprovider.v1.IdentityProvider"

_TIMEOUT_S: Final = 30.0
_MAX_KEY_PARTS: Final = 32
_MAX_LABELS: Final = 32
_MAX_WORD: Final = 256
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NS_PER_US: Final = 1000
_MAX_NS: Final = 2**63 - 1


def names(services: HostServices) -> list[str]:
    """Return the full names of the services that are there, as Init tells them."""
    offered = {
        METRICS: services.metrics,
        IDENTITY_PROVIDER: services.identity_provider,
        AGENT_STORE: services.agent_store,
    }
    return [name for name, service in offered.items() if service is not None]


def side_of(host_services: Collection[str]) -> Side | None:
    """Return which host offers these services, None when it offers none that would tell."""
    offered = set(host_services)
    if offered & {AGENT_STORE, IDENTITY_PROVIDER}:
        return Side.SERVER
    return Side.AGENT if METRICS in offered else None


def methods(services: HostServices) -> list[Method]:
    """Return what a host serves to one plugin."""
    made: list[Method] = []
    if services.metrics is not None:
        descriptor = metrics_pb.DESCRIPTOR.services_by_name["Metrics"]
        made += bind(descriptor, MetricsService(services.metrics))
    if services.identity_provider is not None:
        descriptor = identity_pb.DESCRIPTOR.services_by_name["IdentityProvider"]
        made += bind(descriptor, IdentityProviderService(services.identity_provider))
    if services.agent_store is not None:
        descriptor = agent_pb.DESCRIPTOR.services_by_name["AgentStore"]
        made += bind(descriptor, AgentStoreService(services.agent_store))
    return made


def remote_services(
    host_services: Collection[str], connect: Callable[[], Awaitable[Channel]]
) -> HostServices:
    """Return the host's services as a guest sees them.

    Args:
        host_services: full names, from Init.
        connect: returns the connection to the host; asked at every call.
    """
    return HostServices(
        metrics=RemoteMetrics(connect) if METRICS in host_services else None,
        agent_store=RemoteAgentStore(connect) if AGENT_STORE in host_services else None,
        identity_provider=(
            RemoteIdentityProvider(connect) if IDENTITY_PROVIDER in host_services else None
        ),
    )


class RemoteMetrics:
    """The host's metrics; see `spire_hw.plugin.hostservices.Metrics`."""

    def __init__(self, connect: Callable[[], Awaitable[Channel]]) -> None:
        self._connect = connect

    async def set_gauge(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Set a value that goes up and down."""
        request = metrics_pb.SetGaugeRequest(key=key, val=value, labels=_labels(labels))
        await self._send("SetGauge", request)

    async def emit_key(self, key: Sequence[str], value: float) -> None:
        """Tell one value."""
        await self._send("EmitKey", metrics_pb.EmitKeyRequest(key=key, val=value))

    async def incr_counter(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Count something."""
        request = metrics_pb.IncrCounterRequest(key=key, val=value, labels=_labels(labels))
        await self._send("IncrCounter", request)

    async def add_sample(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Add to a distribution."""
        request = metrics_pb.AddSampleRequest(key=key, val=value, labels=_labels(labels))
        await self._send("AddSample", request)

    async def measure_since(
        self, key: Sequence[str], start: datetime, labels: Mapping[str, str] | None = None
    ) -> None:
        """Add the time from start to now to a distribution."""
        nanoseconds = (start - _EPOCH) // timedelta(microseconds=1) * _NS_PER_US
        request = metrics_pb.MeasureSinceRequest(key=key, time=nanoseconds, labels=_labels(labels))
        await self._send("MeasureSince", request)

    async def _send(self, method: str, request: Message) -> None:
        channel = await self._connect()
        await channel.unary(f"/{METRICS}/{method}", request, Empty, _TIMEOUT_S)


class RemoteAgentStore:
    """The host's agents; see `spire_hw.plugin.hostservices.AgentStore`."""

    def __init__(self, connect: Callable[[], Awaitable[Channel]]) -> None:
        self._connect = connect

    async def check_known(self, agent_id: SpiffeId) -> None:
        """Return when an agent of that ID has attested."""
        channel = await self._connect()
        request = agent_pb.GetAgentInfoRequest(agent_id=str(agent_id))
        answer = await channel.unary(
            f"/{AGENT_STORE}/GetAgentInfo", request, agent_pb.GetAgentInfoResponse, _TIMEOUT_S
        )
        if answer.info.agent_id != str(agent_id):
            raise SpireHwError(f"the host answered for another agent than {agent_id}")


class RemoteIdentityProvider:
    """The host's identity; see `spire_hw.plugin.hostservices.IdentityProvider`."""

    def __init__(self, connect: Callable[[], Awaitable[Channel]]) -> None:
        self._connect = connect

    async def fetch_x509_identity(self) -> ServerIdentity:
        """Return what the server is at the moment."""
        channel = await self._connect()
        answer = await channel.unary(
            f"/{IDENTITY_PROVIDER}/FetchX509Identity",
            identity_pb.FetchX509IdentityRequest(),
            identity_pb.FetchX509IdentityResponse,
            _TIMEOUT_S,
        )
        if not answer.identity.private_key:
            raise SpireHwError("the host sent no key with its identity")
        return ServerIdentity(
            chain_from_ders(answer.identity.cert_chain),
            answer.identity.private_key,
            bundle_from_pb(answer.bundle),
        )


class MetricsService:
    """The gRPC service over a host's metrics; plugins are bounded in what they can name."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def set_gauge(self, request: metrics_pb.SetGaugeRequest, call: Call) -> Empty:
        """Serve SetGauge."""
        await self._metrics.set_gauge(_key(request), request.val, _read_labels(request))
        return Empty()

    async def emit_key(self, request: metrics_pb.EmitKeyRequest, call: Call) -> Empty:
        """Serve EmitKey."""
        await self._metrics.emit_key(_key(request), request.val)
        return Empty()

    async def incr_counter(self, request: metrics_pb.IncrCounterRequest, call: Call) -> Empty:
        """Serve IncrCounter."""
        await self._metrics.incr_counter(_key(request), request.val, _read_labels(request))
        return Empty()

    async def add_sample(self, request: metrics_pb.AddSampleRequest, call: Call) -> Empty:
        """Serve AddSample."""
        await self._metrics.add_sample(_key(request), request.val, _read_labels(request))
        return Empty()

    async def measure_since(self, request: metrics_pb.MeasureSinceRequest, call: Call) -> Empty:
        """Serve MeasureSince."""
        if not 0 <= request.time <= _MAX_NS:
            raise InvalidInputError("time is out of range")
        start = _EPOCH + timedelta(microseconds=request.time // _NS_PER_US)
        await self._metrics.measure_since(_key(request), start, _read_labels(request))
        return Empty()


class AgentStoreService:
    """The gRPC service over a host's agents."""

    def __init__(self, store: AgentStore) -> None:
        self._store = store

    async def get_agent_info(
        self, request: agent_pb.GetAgentInfoRequest, call: Call
    ) -> agent_pb.GetAgentInfoResponse:
        """Serve GetAgentInfo."""
        await self._store.check_known(SpiffeId.parse(request.agent_id))
        info = agent_pb.AgentInfo(agent_id=request.agent_id)
        return agent_pb.GetAgentInfoResponse(info=info)


class IdentityProviderService:
    """The gRPC service over a host's identity."""

    def __init__(self, provider: IdentityProvider) -> None:
        self._provider = provider

    async def fetch_x509_identity(
        self, request: identity_pb.FetchX509IdentityRequest, call: Call
    ) -> identity_pb.FetchX509IdentityResponse:
        """Serve FetchX509Identity."""
        found = await self._provider.fetch_x509_identity()
        return identity_pb.FetchX509IdentityResponse(
            identity=identity_pb.X509Identity(
                cert_chain=found.chain, private_key=found.private_key
            ),
            bundle=bundle_to_pb(found.bundle),
        )


def _labels(labels: Mapping[str, str] | None) -> list[metrics_pb.Label]:
    return [metrics_pb.Label(name=name, value=value) for name, value in (labels or {}).items()]


def _key(request: Any) -> list[str]:
    if not 1 <= len(request.key) <= _MAX_KEY_PARTS:
        raise InvalidInputError(f"a metric's key has 1 to {_MAX_KEY_PARTS} parts")
    return [_word(part) for part in request.key]


def _read_labels(request: Any) -> dict[str, str]:
    if len(request.labels) > _MAX_LABELS:
        raise InvalidInputError(f"a metric has at most {_MAX_LABELS} labels")
    return {_word(label.name): _word(label.value) for label in request.labels}


def _word(text: str) -> str:
    if len(text) > _MAX_WORD or not text.isprintable():
        raise InvalidInputError(f"words of metrics are printable and at most {_MAX_WORD} long")
    return text

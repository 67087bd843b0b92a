"""The plugin inside a guest: made when the host first configures it, reached by the host's calls.

What a plugin is told about its host comes with its configuration, so until then there is no plugin
and every call is answered FAILED_PRECONDITION.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from spire_hw._pb import plugin_config_pb2 as pb
from spire_hw.config import hcl
from spire_hw.config.hcl import Body
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError, NotReadyError
from spire_hw.goplugin.facade import table
from spire_hw.plugin.hostservices import HostServices
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.info import Builder, Plugin, PluginKind
    from spire_hw.rpc.service import Call, Method

CONFIG: Final = "spire.service.common.config.v1.Config"
_SOURCE: Final = "plugin_data"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a guest can be.

    Attributes:
        kind: plugin kind.
        sides: which hosts it fits.
        builder: makes the plugin.
        data_dir: told to the plugin.
        holds_data_dir: likewise.
    """

    kind: PluginKind
    sides: Sequence[Side]
    builder: Builder
    data_dir: Path
    holds_data_dir: bool = False


class Slot:
    """Holds the plugin; also serves `spire.service.common.config.v1.Config`."""

    def __init__(self, offer: Offer, log: Logger, clock: Clock) -> None:
        self._offer = offer
        self._log = log
        self._clock = clock
        self._changing = asyncio.Lock()
        self._side: Side | None = None
        self._services = HostServices()
        self._trust_domain: TrustDomain | None = None
        self._plugin: Plugin | None = None
        self._tried: tuple[TrustDomain, Plugin] | None = None
        self._handlers: dict[str, Method] = {}
        self._closed = False

    def methods(self) -> list[Method]:
        """Return the services of all sides; calls reach the plugin once there is one."""
        found = []
        for side in self._offer.sides:
            for method in table.methods(self._offer.kind, None, side):
                handler = self._streamed if method.server_streaming else self._answered
                found.append(replace(method, handler=handler))
        return found

    def enter(self, side: Side | None, services: HostServices) -> None:
        """Take what Init told: which host this is, if that can be told, and what it offers."""
        self._side = side
        self._services = services

    # -- Config ---------------------------------------------------------------------------

    async def configure(self, request: pb.ConfigureRequest, call: Call) -> pb.ConfigureResponse:
        """Serve Configure: make the plugin at the first call, change it at later ones.

        Raises:
            InvalidInputError: the configuration has faults; an earlier one stays in force.
        """
        trust_domain, body = _read(request)
        async with self._changing:
            if self._closed:
                raise NotReadyError("the plugin has ended")
            if self._plugin is None:
                await self._build(trust_domain, body)
            elif trust_domain != self._trust_domain:
                raise _other_trust_domain()
            else:
                await self._plugin.configure(body)
        return pb.ConfigureResponse()

    async def validate(self, request: pb.ValidateRequest, call: Call) -> pb.ValidateResponse:
        """Serve Validate: a bad configuration is a good answer."""
        try:
            trust_domain, body = _read(request)
            faults = await self._faults(trust_domain, body)
        except ConfigError as e:
            faults = e.faults
        except InvalidInputError as e:
            faults = [ConfigFault(0, e.message)]
        return pb.ValidateResponse(valid=not faults, notes=[_in_words(fault) for fault in faults])

    async def close(self) -> None:
        """End the plugin; calls are refused from now on."""
        async with self._changing:
            self._closed = True
            plugin = self._tried[1] if self._tried is not None else self._plugin
            self._plugin, self._tried, self._handlers = None, None, {}
            if plugin is not None:
                await plugin.close()

    async def _build(self, trust_domain: TrustDomain, body: Body) -> None:
        """Make the plugin and configure it.

        One that could not be configured is kept for the next try, with what it learnt: which PIN
        a token refused, say.
        """
        if self._tried is None:
            self._tried = trust_domain, self._make(trust_domain)
        if self._tried[0] != trust_domain:
            raise _other_trust_domain()
        plugin = self._tried[1]
        await plugin.configure(body)
        self._plugin, self._trust_domain, self._tried = plugin, trust_domain, None
        made = table.methods(self._offer.kind, plugin, self._entered)
        self._handlers = {method.path: method for method in made}

    async def _faults(self, trust_domain: TrustDomain, body: Body) -> list[ConfigFault]:
        if self._plugin is not None:
            return self._plugin.validate(body)
        plugin = self._make(trust_domain)
        try:
            return plugin.validate(body)
        finally:
            await plugin.close()

    def _make(self, trust_domain: TrustDomain) -> Plugin:
        return self._offer.builder(
            HostInfo(
                side=self._entered,
                trust_domain=trust_domain,
                data_dir=self._offer.data_dir,
                log=self._log,
                clock=self._clock,
                services=self._services,
                holds_data_dir=self._offer.holds_data_dir,
            )
        )

    @property
    def _entered(self) -> Side:
        if self._side is None:
            raise NotReadyError(
                "this host does not show whether it is a server or an agent, and the plugin fits "
                'both; add "-side", "server" or "agent" to plugin_args'
            )
        return self._side

    # -- the plugin's own service ---------------------------------------------------------

    async def _answered(self, request: Any, call: Call) -> Any:
        return await self._method(call).handler(request, call)

    async def _streamed(self, request: Any, call: Call) -> AsyncIterator[Any]:
        async with aclosing(self._method(call).handler(request, call)) as answers:
            async for answer in answers:
                yield answer

    def _method(self, call: Call) -> Method:
        found = self._handlers.get(call.method)
        if found is None:
            raise NotReadyError("not configured")
        return found


def _read(request: pb.ConfigureRequest | pb.ValidateRequest) -> tuple[TrustDomain, Body]:
    if not request.HasField("core_configuration"):
        raise InvalidInputError("core configuration is missing")
    trust_domain = TrustDomain.parse(request.core_configuration.trust_domain)
    text = request.hcl_configuration
    if not text.strip():
        return trust_domain, Body.empty()
    # A host prints a heredoc that comes last without the newline that ends it.
    return trust_domain, hcl.parse(text if text.endswith("\n") else text + "\n", _SOURCE)


def _other_trust_domain() -> InvalidInputError:
    return InvalidInputError("the trust domain cannot change while the plugin runs")


def _in_words(fault: ConfigFault) -> str:
    return f"line {fault.line}: {fault.message}" if fault.line else fault.message

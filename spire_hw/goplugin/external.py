"""An external plugin as the catalog sees it: found and checked, started, configured, closed.

`contract` is the object of our own contract for its kind; it may be asked for from the beginning
and answers FAILED_PRECONDITION until the plugin is up.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final, cast

from spire_hw.errors import NotReadyError
from spire_hw.goplugin.facade import hostservices
from spire_hw.goplugin.facade.link import Link
from spire_hw.goplugin.facade.table import remote
from spire_hw.goplugin.launch import Launch, Limits
from spire_hw.goplugin.program import open_program
from spire_hw.goplugin.supervise import Supervisor
from spire_hw.logtext import is_secret_key

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from spire_hw.goplugin.place import Place
    from spire_hw.plugin.hostservices import HostServices
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.section import PluginConfig
    from spire_hw.rpc.client import Channel

# Said to us alone: by our operator through flags, by systemd, by a host above us.
_OURS: Final = ("SPIRE_HW_", "LISTEN_", "WATCHDOG_", "PLUGIN_")
_OURS_TOO: Final = frozenset({"NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "INVOCATION_ID"})


class ExternalPlugin:
    """One external plugin of a host.

    Attributes:
        contract: what it offers, as an object of its kind's contract.
    """

    def __init__(
        self,
        config: PluginConfig,
        host: HostInfo,
        services: HostServices,
        place: Place,
        *,
        environ: Mapping[str, str],
        limits: Limits | None = None,
    ) -> None:
        """Describe it; nothing is started.

        Args:
            config: its block.
            host: whose plugin it is.
            services: what it is offered.
            place: where its sockets go.
            environ: the host's environment, of which it gets a part.
            limits: how patient the host is.
        """
        self._config = config
        self._host = host
        self._services = services
        self._place = place
        self._environ = environ
        self._limits = limits or Limits()
        self._supervisor: Supervisor | None = None
        self._log = host.log.bind(
            subsystem_name=f"{config.name}.{os.path.basename(config.cmd)}",  # noqa: PTH119
            external=True,
        )
        self._link = Link(config.kind, config.name, lambda: cast("Channel", self._supervised))
        self.contract: Any = remote(self._link, host.side)

    @property
    def prefix(self) -> str:
        """Return how messages name it, such as `keymanager(tpm)`."""
        return self._config.prefix

    async def open(self) -> None:
        """Start it.

        Raises:
            SpireHwError: it did not come up.
        """
        config = self._config
        with self._link.naming():
            program = await asyncio.to_thread(open_program, config.cmd, config.checksum)
            if program.remark:
                self._log.warning("External plugin is not protected", remark=program.remark)
            self._supervisor = Supervisor(
                Launch(
                    kind=config.kind,
                    side=self._host.side,
                    trust_domain=self._host.trust_domain.name,
                    program=program,
                    arguments=config.args,
                    environment=self._environment(),
                    place=self._place,
                    service_names=hostservices.names(self._services),
                    service_methods=hostservices.methods(self._services),
                    log=self._log,
                    clock=self._host.clock,
                    limits=self._limits,
                )
            )
            await self._supervisor.open()

    async def configure(self, text: str) -> None:
        """Configure it, now and after every restart.

        Raises:
            InvalidInputError: it does not accept the configuration.
            SpireHwError: it failed.
        """
        with self._link.naming():
            await self._supervised.configure(text)

    async def validate(self, text: str) -> list[str]:
        """Return what it finds wrong with a configuration.

        Raises:
            SpireHwError: it failed.
        """
        with self._link.naming():
            return await self._supervised.validate(text)

    async def check(self) -> None:
        """Make sure that it is up.

        Raises:
            SpireHwError: it is not.
        """
        with self._link.naming():
            await self._supervised.check()

    async def close(self) -> None:
        """End it."""
        if self._supervisor is not None:
            await self._supervisor.close()

    @property
    def _supervised(self) -> Supervisor:
        if self._supervisor is None:
            raise NotReadyError("not configured")
        return self._supervisor

    def _environment(self) -> dict[str, str]:
        kept = visible(self._environ, self._config.env)
        withheld = sorted(
            name for name in self._environ.keys() - kept.keys() if is_secret_key(name)
        )
        if withheld:
            self._log.info(
                "Variables that look secret are withheld from the plugin; plugin_env names those "
                "it is to have",
                withheld=withheld,
            )
        return kept


def visible(environ: Mapping[str, str], named: Collection[str]) -> dict[str, str]:
    """Return what of our environment a plugin may see.

    Args:
        environ: ours.
        named: variables that the operator wants it to have whatever they are called.
    """
    return {
        name: value
        for name, value in environ.items()
        if name in named or not (name.startswith(_OURS) or name in _OURS_TOO or is_secret_key(name))
    }

"""KeyManager `memory`: keys in this process, gone when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.config.schema import Model, decode, faults
from spire_hw_plugins.keymanager.software import SoftwareKeys

if TYPE_CHECKING:
    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.plugin.info import HostInfo

NAME: Final = "memory"


class Config(Model):
    """The plugin_data of `memory`: nothing can be set."""


class MemoryKeyManager(SoftwareKeys):
    """The KeyManager contract over keys that are never stored."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__()
        self._log = host.log

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration."""
        return faults(config, Config)

    async def configure(self, config: Body) -> None:
        """Make ready; a second call keeps the keys.

        Raises:
            ConfigError: something is set.
        """
        decode(config, Config)
        if not self.is_loaded:
            self.load({})
        self._log.warning("keys are software keys in process memory, lost at every restart")

    async def close(self) -> None:
        """Forget the keys."""
        self.load({})


def build(host: HostInfo) -> MemoryKeyManager:
    """Make the plugin."""
    return MemoryKeyManager(host)

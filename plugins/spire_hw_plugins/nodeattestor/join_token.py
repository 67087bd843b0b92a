"""NodeAttestor `join_token`, agent half: shows a token an operator generated on the server.

The tokens themselves live in the server's datastore; the agent hands its token over through the
host (`HostInfo.join_token`), never through plugin data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.config.schema import Model, faults
from spire_hw.errors import ConfigFault, InvalidInputError

if TYPE_CHECKING:
    from spire_hw.config.hcl import Body
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.nodeattestor import AgentExchange, SvidKey

NAME = "join_token"


class Config(Model):
    """No keys."""


class JoinTokenAttestor:
    """Sends the token as the payload; there is no challenge."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration."""
        return faults(config, Config)

    async def configure(self, config: Body) -> None:
        """Nothing to make ready."""

    async def aid_attestation(self, exchange: AgentExchange, svid_key: SvidKey | None) -> None:
        """Send the token.

        Raises:
            InvalidInputError: the agent has no token; trying again does not help.
        """
        token = self._host.join_token
        if not token:
            raise InvalidInputError(
                "join token was not provided: start the agent once with -joinToken or "
                "-joinTokenFile (`spire-hw-server token generate` makes one)"
            )
        await exchange.send(token.encode())

    async def close(self) -> None:
        """Nothing to release."""


def build(host: HostInfo) -> JoinTokenAttestor:
    """Make the plugin."""
    return JoinTokenAttestor(host)

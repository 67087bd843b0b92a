"""A look at everything on a token of KeyManager `pkcs11`, beside the server that uses it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from spire_hw.errors import InvalidInputError
from spire_hw.pkcs11.inventory.reaping import SharedToken
from spire_hw.pkcs11.pool.place import opening_of
from spire_hw.pkcs11.pool.pool import Pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from spire_hw.pkcs11.inventory.labels import Owner
    from spire_hw.pkcs11.pool.place import Pins
    from spire_hw.pkcs11.pool.pool import Limits
    from spire_hw.plugin.info import HostInfo
    from spire_hw_plugins.keymanager.pkcs11_config import Settings, TokenSettings


def token_of(settings: Settings, name: str) -> TokenSettings:
    """Return one of the configured tokens.

    Raises:
        InvalidInputError: there is none of that name, or there are several and none was named.
    """
    names = ", ".join(f'"{token.name}"' for token in settings.tokens)
    if not name and len(settings.tokens) > 1:
        raise InvalidInputError(f"several tokens are configured, name one of {names}")
    for token in settings.tokens:
        if name in {"", token.name}:
            return token
    raise InvalidInputError(f'no token "{name}" is configured; there is {names}')


@asynccontextmanager
async def opened(
    token: TokenSettings,
    owner: Owner,
    pins: Pins,
    host: HostInfo,
    *,
    command: Sequence[str],
    limits: Limits,
) -> AsyncIterator[SharedToken]:
    """Open a token for a while; see `spire_hw.pkcs11.inventory.reaping.SharedTokenSource`."""
    pool = Pool(await opening_of(token.place, pins.guard(token.place), command), limits, host.log)
    await pool.start()
    try:
        yield SharedToken(pool, owner, host.clock, host.log)
    finally:
        await pool.close()

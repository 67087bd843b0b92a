"""What commands do with a server's configuration and keys without a server that runs."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from spire_hw.catalog import External, check_plugins, plugin_data
from spire_hw.clock import Clock, SystemClock
from spire_hw.datadir import lock_data_dir
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.pkcs11.inventory.reaping import SharedToken, SharedTokenSource
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.keymanager import KeyRetention
from spire_hw.plugin.section import SERVER_RULES, PluginConfig
from spire_hw_server.datastore.config import parse_datastore
from spire_hw_server.hostservices import ServerServices
from spire_hw_server.pluginhost import configured, host_at_rest, names, table
from spire_hw_server.posture.policyfiles import find_policy_faults

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from spire_hw_server.config import ServerSettings


async def check_settings(
    settings: ServerSettings, *, clock: Clock | None = None
) -> list[ConfigFault]:
    """Return the faults of plugins, store settings and policy files.

    Policy files are read. Nothing else is touched but external plugins, which are started, asked
    and stopped.
    """
    faults: list[ConfigFault] = []
    try:
        parse_datastore(settings.store.data, settings.file)
    except ConfigError as e:
        faults += e.faults
    if settings.posture.policy_dir is not None:
        found = await asyncio.to_thread(find_policy_faults, settings.posture.policy_dir)
        faults += [ConfigFault(0, f'"policy_dir": {message}') for message in found]
    host = host_at_rest(settings, clock or SystemClock())
    services = ServerServices(clock=host.clock, log=host.log)
    faults += await check_plugins(
        configured(settings),
        table,
        host,
        SERVER_RULES,
        names=names,
        external=External(services.offered),
    )
    return sorted(faults, key=lambda f: f.line)


@asynccontextmanager
async def shared_token(settings: ServerSettings, name: str) -> AsyncIterator[SharedToken]:
    """Open the token on which the server's keys are, beside the server; nothing of it is claimed.

    Args:
        settings: the server's.
        name: which of several tokens; the only one when empty.

    Raises:
        InvalidInputError: its KeyManager keeps keys elsewhere.
        SpireHwError: the token cannot be opened.
    """
    manager, plugin = _key_manager(settings)
    if not isinstance(plugin, SharedTokenSource):
        raise InvalidInputError(
            f'KeyManager "{manager.name}" keeps no keys on a token that others may use: only '
            '"pkcs11" does'
        )
    data = await asyncio.to_thread(plugin_data, manager)
    async with plugin.shared_token(data, name) as token:
        yield token


@asynccontextmanager
async def keys_at_rest(settings: ServerSettings) -> AsyncIterator[KeyRetention]:
    """Open the KeyManager of a server that does not run, for its replaced keys.

    Raises:
        UnavailableError: the server runs.
        InvalidInputError: its KeyManager keeps no replaced keys.
        SpireHwError: the keys cannot be opened.
    """
    let_go = lock_data_dir(settings.data_dir, "server")
    try:
        manager, plugin = _key_manager(settings)
        keeper: object = plugin
        if not isinstance(keeper, KeyRetention):
            raise InvalidInputError(f"KeyManager {manager.name} keeps no replaced keys")
        try:
            await plugin.configure(await asyncio.to_thread(plugin_data, manager))
            yield keeper
        finally:
            await plugin.close()
    finally:
        let_go()


def _key_manager(settings: ServerSettings) -> tuple[PluginConfig, Any]:
    """Return the KeyManager's block with the plugin, None when that is a program of its own."""
    (manager,) = [p for p in settings.plugins if p.kind is PluginKind.KEY_MANAGER]
    host = host_at_rest(settings, SystemClock())
    return manager, None if manager.cmd else table(manager.kind, manager.name)(host)

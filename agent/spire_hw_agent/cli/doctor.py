"""`doctor` of the agent: configuration, data, TPM, server, bundle, SVID, sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.cli.checks import (
    check_certificates,
    check_clock_against,
    check_config,
    check_data_dir,
    check_reachable,
    check_socket_serves,
    check_tpm_device,
)
from spire_hw.cli.doctor import doctor_command
from spire_hw.cli.findings import Finding, Level, ok, problem, warning
from spire_hw.cli.hsmchecks import check_hsm
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Item
from spire_hw.errors import SpireHwError
from spire_hw.plugin.info import PluginKind
from spire_hw.x509.certificate import load_certificate
from spire_hw_agent.cli.run import find_faults
from spire_hw_agent.config import AgentSettings, load_settings
from spire_hw_agent.storage import peek
from spire_hw_agent.trust import read_bundle_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.plugin.section import PluginConfig

_PROGRAM: Final = "spire-hw-agent"
_CONFIG: Final = Path("/etc/spire-hw/agent.conf")
_TPM_TIMEOUT_S: Final = 30.0
_RENEW: Final = "the agent renews it while it runs and its server can be reached; see its log"
_FETCH: Final = (
    "run `spire-hw-server bundle show` on the server and put what it prints there, over a way that "
    "can be trusted"
)


def _examine(settings: AgentSettings, *, login: bool) -> Iterator[Finding]:
    valid = f"{settings.file} is valid"
    yield from check_config(settings.file, find_faults(settings), settings.notices, valid)
    yield from check_data_dir(settings.data_dir)
    for plugin in settings.plugins:
        if plugin.enabled and not plugin.cmd:
            yield from _check_plugin(plugin, login=login)
    running = list(_check_running(settings))
    yield from running
    yield from _check_trust(settings)
    is_well = all(f.level is Level.OK for f in running)
    yield from _check_stored(settings, is_running=is_well)
    yield from check_reachable("server", settings.server_address, settings.server_port)


def _check_plugin(plugin: PluginConfig, *, login: bool) -> Iterator[Finding]:
    if plugin.name == "pkcs11":
        yield from check_hsm(plugin.prefix, plugin.data, login=login)
    elif plugin.name == "tpm":
        found = check_tpm_device(plugin.prefix, plugin.data)
        yield from found
        # The key manager and the attestor use one TPM: asking it once is enough.
        if plugin.kind is PluginKind.KEY_MANAGER and all(f.level is Level.OK for f in found):
            yield _ask_tpm(plugin)
    elif plugin.kind is PluginKind.KEY_MANAGER and plugin.name in {"disk", "memory"}:
        text = f"{plugin.prefix}: the agent's key is not in a device"
        yield warning("keys.software", text, "use KeyManager tpm where there is a TPM")


def _ask_tpm(plugin: PluginConfig) -> Finding:
    from spire_hw.tpm.device import TpmDevice  # noqa: PLC0415 - loads libtss2
    from spire_hw.tpm.info import read_info  # noqa: PLC0415 - likewise

    given = {i.key: i.value for i in plugin.data.items if isinstance(i, Item)}
    tcti = str(given.get("tcti") or given.get("tpm_device_path") or "")

    async def ask() -> str:
        device = TpmDevice(tcti)
        try:
            info = await device.run("read what the TPM is", read_info, timeout_s=_TPM_TIMEOUT_S)
        finally:
            await device.close()
        return str(info.identity.manufacturer)

    try:
        maker = asyncio.run(ask())
    except SpireHwError as e:
        remedy = "see `spire-hw-agent tpm info`, and the kernel's log about the TPM"
        return problem("tpm.silent", f"{plugin.prefix}: {e.message}", remedy)
    return ok("tpm.answers", f"{plugin.prefix}: the TPM answers (maker {maker})")


def _check_running(settings: AgentSettings) -> Iterator[Finding]:
    if settings.socket_path is None:
        yield warning("socket.off", "the Workload API is switched off", "set socket_path")
        return
    yield from check_socket_serves(settings.socket_path, _PROGRAM)


def _check_trust(settings: AgentSettings) -> Iterator[Finding]:
    path = settings.trust_bundle_path
    if path is None:
        if settings.insecure_bootstrap:
            text = "insecure_bootstrap: whoever is in between can take this node over"
            yield warning("bundle.insecure", text, "set trust_bundle_path")
        return
    try:
        bundle = read_bundle_file(settings, path)
    except SpireHwError as e:
        yield problem("bundle.unreadable", e.message, _FETCH)
        return
    authorities = [root.certificate for root in bundle.x509_authorities]
    yield from check_certificates(f"trust bundle {path}", authorities, _FETCH)


def _check_stored(settings: AgentSettings, *, is_running: bool) -> Iterator[Finding]:
    if not settings.data_dir.is_dir():
        return
    try:
        yield from check_clock_against(sorted(settings.data_dir.iterdir()), SystemClock().now())
        data = peek(settings.data_dir)
    except PermissionError:
        return  # told by the check of the directory
    except SpireHwError as e:
        yield problem("data.damaged", e.message, "remove the file: the agent enrols again")
        return
    if not data.svid:
        text = "this node was not let in yet"
        remedy = (
            "take the hash that `spire-hw-agent tpm ek-hash` prints to the server, start the agent"
        )
        yield warning("svid.missing", text, remedy)
        return
    leaf = load_certificate(data.svid[0])
    for finding in check_certificates("the agent's SVID", [leaf], _RENEW):
        # An agent that was off for long attests again by itself.
        if finding.level is Level.PROBLEM and not is_running and data.reattestable:
            text = f"{finding.message}; the node attests again at the next start"
            yield warning(finding.check, text, "start the agent")
        else:
            yield finding


doctor = doctor_command("agent", _CONFIG, load_settings, _examine)

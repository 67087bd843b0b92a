"""`doctor` of the server: configuration, data, database, keys, authorities, sockets, bundle."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from spire_hw._pb import server_bundle_pb2 as pb
from spire_hw.cli.admin import Admin
from spire_hw.cli.checks import (
    check_certificates,
    check_clock_against,
    check_config,
    check_data_dir,
    check_pem_file,
    check_port,
    check_reachable,
    check_secret_file,
    check_socket_serves,
    check_tpm_device,
    is_answering,
)
from spire_hw.cli.doctor import doctor_command
from spire_hw.cli.findings import Finding, Level, ok, problem, warning
from spire_hw.cli.hsmchecks import check_hsm
from spire_hw.cli.output import Printer
from spire_hw.cli.socket import check_socket
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Item
from spire_hw.errors import ConfigError, SpireHwError
from spire_hw.plugin.info import PluginKind
from spire_hw.x509.certificate import load_certificate
from spire_hw_server.cli.run import find_faults
from spire_hw_server.config import ServerSettings, load_settings
from spire_hw_server.datastore.config import parse_datastore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.plugin.section import PluginConfig

_PROGRAM: Final = "spire-hw-server"
_CONFIG: Final = Path("/etc/spire-hw/server.conf")
_BUNDLE: Final = pb.DESCRIPTOR.services_by_name["Bundle"]
_SIGNER_PORT: Final = 8445
_LOCKED_S: Final = 5.0
_QUICK: Final = 256 << 20  # a larger database is not read through
_CERTIFICATE_KEYS: Final = ("cert_file_path", "bundle_file_path", "ca_bundle_path")
_ACCEPTING: Final = (
    "accept_listed_keys",
    "accept_changed_keys",
    "accept_key_loss",
    "accept_log",
)
_SECRET_KEYS: Final = ("key_file_path", "keys_path")


def _examine(settings: ServerSettings, *, login: bool) -> Iterator[Finding]:
    valid = f"{settings.file} is valid"
    yield from check_config(settings.file, find_faults(settings), settings.notices, valid)
    yield from check_data_dir(settings.data_dir)
    if settings.data_dir.is_dir():
        yield from check_clock_against(_files(settings.data_dir), SystemClock().now())
    yield from _check_database(settings)
    for plugin in settings.plugins:
        if plugin.enabled and not plugin.cmd:
            yield from _check_plugin(plugin, settings, login=login)
    yield from _check_running(settings)


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except PermissionError:
        return []  # told by the check of the directory


def _user(settings: ServerSettings) -> int | None:
    """Return whose rights the server has, as its data directory shows."""
    try:
        return settings.data_dir.stat().st_uid
    except OSError:
        return None


def _check_database(settings: ServerSettings) -> Iterator[Finding]:
    try:
        store = parse_datastore(settings.store.data, settings.file)
    except ConfigError:
        return  # told by the check of the configuration
    if store.database_type != "sqlite3":
        text = f"the {store.database_type} database is looked at by the server alone"
        yield warning("database.unchecked", text, "see that the server is well")
        return
    path = Path(store.connection_string.removeprefix("file:").partition("?")[0])
    if not path.exists():
        text = f"there is no database at {path}"
        yield warning("database.missing", text, "the first start makes it")
        return
    try:
        with closing(_open(path)) as database:
            if path.stat().st_size <= _QUICK:
                (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
                if said != "ok":
                    yield problem("database.damaged", f"{path}: {said}", "restore a backup")
                    return
            rows = database.execute("SELECT version_num FROM alembic_version").fetchall()
    except (sqlite3.Error, OSError) as e:
        remedy = "see whether it is readable and a database of this server; else restore a backup"
        yield problem("database.unusable", f"{path}: {e}", remedy)
        return
    version = ", ".join(str(row[0]) for row in rows) or "none"
    yield ok("database", f"{path} is sound (schema {version})")


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_LOCKED_S)


def _check_plugin(
    plugin: PluginConfig, settings: ServerSettings, *, login: bool
) -> Iterator[Finding]:
    if plugin.name == "pkcs11":
        is_ca = plugin.kind is PluginKind.KEY_MANAGER
        types = {settings.ca_key_type, settings.jwt_key_type} if is_ca else set()
        yield from check_hsm(
            plugin.prefix,
            plugin.data,
            key_types=sorted(types, key=lambda t: t.value),
            user=_user(settings),
            login=login,
        )
    elif plugin.kind is PluginKind.KEY_MANAGER and plugin.name == "tpm":
        yield from check_tpm_device(plugin.prefix, plugin.data)
    elif plugin.kind is PluginKind.KEY_MANAGER and plugin.name == "remote":
        yield from _check_signers(plugin)
    elif plugin.kind is PluginKind.KEY_MANAGER and plugin.name in {"disk", "memory"}:
        text = f"{plugin.prefix}: the CA's keys are not in a device"
        yield warning("keys.software", text, "use KeyManager pkcs11 or tpm for a CA that counts")
    for item in plugin.data.items:
        if not isinstance(item, Item) or not isinstance(item.value, str):
            continue
        path = Path(item.value)
        if item.key in _CERTIFICATE_KEYS:
            yield from check_pem_file(f"{plugin.prefix}: {item.key}", path)
        elif item.key in _SECRET_KEYS and path.exists():
            yield from check_secret_file(path, f"{plugin.prefix}: key file")


def _check_signers(plugin: PluginConfig) -> Iterator[Finding]:
    """Return what is found on the way to the signers of a KeyManager `remote`."""
    given = {i.key: i.value for i in plugin.data.items if isinstance(i, Item)}
    for name in ("signer_ca", "cert"):
        path = given.get(name)
        if isinstance(path, str):
            yield from check_pem_file(f"{plugin.prefix}: {name}", Path(path))
    key, local = given.get("key"), given.get("socket")
    if isinstance(key, str):
        yield from check_secret_file(Path(key), f"{plugin.prefix}: key")
    if isinstance(local, str):
        try:
            check_socket(Path(local), "spire-hw-signer")
        except SpireHwError as e:
            yield problem("signer.unreachable", e.message, "start it, or correct socket")
    for name in _ACCEPTING:
        if given.get(name):
            text = f"{plugin.prefix}: {name} is set, and a signer believed what it would not be"
            yield warning("signer.accepted", text, "take it out: it is for one start")
    addresses = given.get("addresses")
    found = [
        finding
        for address in (addresses if isinstance(addresses, list | tuple) else ())
        for finding in _check_signer(str(address))
    ]
    one_answers = any(f.level is Level.OK for f in found)
    for finding in found:
        if finding.level is Level.PROBLEM and one_answers:
            yield warning(finding.check, finding.message, finding.remedy)
        else:
            yield finding


def _check_signer(address: str) -> list[Finding]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit():
        host, port = address, str(_SIGNER_PORT)
    return check_reachable("signer", host.strip("[]"), int(port))


def _check_running(settings: ServerSettings) -> Iterator[Finding]:
    found = check_socket_serves(settings.socket_path, _PROGRAM)
    yield from found
    is_running = is_answering(found)
    if settings.bind_port:
        yield from check_port(settings.bind_address, settings.bind_port, is_running=is_running)
    if is_running:
        yield from _check_bundle(settings)


def _check_bundle(settings: ServerSettings) -> Iterator[Finding]:
    try:
        answer = Admin(settings.socket_path, Printer(), _PROGRAM).call(
            _BUNDLE, "GetBundle", pb.GetBundleRequest()
        )
        authorities = [load_certificate(a.asn1) for a in answer.x509_authorities]
    except SpireHwError as e:
        yield problem("bundle.unreadable", f"trust bundle: {e.message}", "look into the log")
        return
    remedy = "see `spire-hw-server localauthority x509 show` and the log for why none was prepared"
    yield from check_certificates("the trust bundle", authorities, remedy)
    if not answer.jwt_authorities and not settings.disable_jwt_svids:
        yield warning("bundle.no_jwt_key", "the bundle holds no JWT key", "look into the log")


doctor = doctor_command("server", _CONFIG, load_settings, _examine)

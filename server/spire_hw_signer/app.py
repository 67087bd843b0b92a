"""The composition root: builds the signer from its settings, runs it, closes it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw import __version__
from spire_hw import log as logs
from spire_hw.aio.program import Program, run_program
from spire_hw.aio.tasks import Tasks
from spire_hw.catalog import Catalog, check_plugins
from spire_hw.clock import Clock, SystemClock
from spire_hw.datadir import lock_data_dir, prepare_data_dir
from spire_hw.errors import ConfigError, ConfigFault, NotReadyError, SpireHwError, UnavailableError
from spire_hw.key import KeyType
from spire_hw.key import fingerprint as fingerprint_of
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.plugin.keymanager import KeyHealth
from spire_hw.rpc.probes import Health, HealthListener, answer_probes
from spire_hw.telemetry.host import Telemetry
from spire_hw.telemetry.logged import count_log_lines
from spire_hw.telemetry.metrics import Labelled
from spire_hw_plugins import builtin
from spire_hw_signer.actions import Actions
from spire_hw_signer.admin import SignerAdmin, admin_methods
from spire_hw_signer.admission import Gate
from spire_hw_signer.attesting import Attesting
from spire_hw_signer.audit.checkpoint import Checkpoints
from spire_hw_signer.audit.log import AuditLog
from spire_hw_signer.audit.places import FilePlace, SyslogPlace
from spire_hw_signer.config import SIGNER_RULES, find_custody_faults, owner_config
from spire_hw_signer.devicelog.drain import DeviceLog
from spire_hw_signer.devicelog.program import find_faults as find_device_log_faults
from spire_hw_signer.doors import Doors
from spire_hw_signer.generating import Generating
from spire_hw_signer.keys import LOG_KEY_ID, HeldSigner, OwnerKeys, open_owner, own_owner
from spire_hw_signer.live import Live
from spire_hw_signer.operators import load_operators
from spire_hw_signer.policy import Custody
from spire_hw_signer.policyfile import load_policy
from spire_hw_signer.revocations import FILE_NAME as REVOKED_FILE
from spire_hw_signer.revocations import Revocations
from spire_hw_signer.service import SignerService, signer_methods
from spire_hw_signer.steady import SteadyTime
from spire_hw_signer.telling import CustodyService, custody_methods
from spire_hw_signer.tlsfiles import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw.plugin.info import Builder
    from spire_hw.plugin.keymanager import KeyManager
    from spire_hw.rpc.probes import Check
    from spire_hw_signer.audit.places import Place
    from spire_hw_signer.audit.start import Found
    from spire_hw_signer.config import SignerSettings
    from spire_hw_signer.policy import Owner

GRACE_S: Final = 10.0
_UMASK: Final = 0o077


async def run(
    settings: SignerSettings,
    *,
    clock: Clock | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Run a signer until SIGTERM or SIGINT; SIGHUP reads policy and TLS files again.

    Args:
        settings: from signer.conf.
        clock: its time.
        on_ready: called once the signer answers.

    Raises:
        SpireHwError: it could not start, or a part of it broke down.
    """
    os.umask(_UMASK)
    await run_program(lambda: Signer(settings, clock=clock), signal.SIGHUP, Signer.reload, on_ready)


async def check_settings(
    settings: SignerSettings, *, clock: Clock | None = None
) -> list[ConfigFault]:
    """Return the faults of KeyManager, policy and TLS files; no device is touched."""
    faults: list[ConfigFault] = []
    owner = own_owner(settings.name)
    directory = settings.data_dir
    config = owner_config(settings.keys, owner, directory, Custody())
    host = _host(owner, directory, clock or SystemClock())
    faults += await check_plugins([config], _table, host, SIGNER_RULES, names=_names)
    place = settings.policy_file
    try:
        policy = await asyncio.to_thread(load_policy, place)
    except ConfigError as e:
        faults += [ConfigFault(0, f"{place}:{f.line}: {f.message}") for f in e.faults]
    except SpireHwError as e:
        faults.append(ConfigFault(0, e.message))
    else:
        faults += [
            ConfigFault(0, f"{place}: client {client.identity}: {message}")
            for client in policy.clients.values()
            for message in find_custody_faults(settings.keys, client.custody)
        ]
    if settings.device_log is not None:
        faults += await asyncio.to_thread(_device_log_faults, settings)
    if settings.tls is not None:
        try:
            await asyncio.to_thread(TlsFiles(settings.tls).load)
        except SpireHwError as e:
            faults.append(ConfigFault(0, f"tls: {e.message}"))
    return sorted(faults, key=lambda f: f.line)


class Signer(Program):
    """One signer: build it from settings, `start`, `close`."""

    def __init__(self, settings: SignerSettings, *, clock: Clock | None = None) -> None:
        super().__init__("signer")
        self.settings = settings
        self.clock = clock or SystemClock()
        self.telemetry = Telemetry(
            settings.telemetry,
            service="spire_signer",
            trust_domain=None,
            version=__version__,
            clock=self.clock,
            log=logs.get_logger("telemetry"),
        )
        self._doors: Doors | None = None
        self._live: Live | None = None
        self._audit: AuditLog | None = None
        self._checkpoints: Checkpoints | None = None
        self._steady: SteadyTime | None = None
        self._health_listener: HealthListener | None = None

    @property
    def port(self) -> int:
        """Return the TCP port, 0 without one."""
        return 0 if self._doors is None else self._doors.port

    @property
    def health_port(self) -> int:
        """Return the port of the health probes, 0 without them."""
        return 0 if self._health_listener is None else self._health_listener.port

    @property
    def live(self) -> Live:
        """Return policy and keys of a started signer."""
        if self._live is None:
            raise NotReadyError("the signer was not started")
        return self._live

    @property
    def audit(self) -> AuditLog:
        """Return the audit log of a started signer."""
        if self._audit is None:
            raise NotReadyError("the signer was not started")
        return self._audit

    async def reload(self) -> bool:
        """Read policy and TLS files again; tell whether all of them are in force now."""
        return self._live is not None and await self._live.reload(by="SIGHUP")

    @override
    async def _start(self) -> None:
        settings = self.settings
        for notice in settings.notices:
            self.log.warning(notice)
        prepare_data_dir(settings.data_dir, self.log, strict=True)
        self._stack.callback(lock_data_dir(settings.data_dir, self.name))
        tls = await self._load_tls()
        operators = await asyncio.to_thread(load_operators, settings.operators)
        audit, found = await self._open_audit()
        log_keys = await self._open_log_keys()
        checkpoints = await self._start_checkpoints(audit, found, log_keys)
        self._stack.callback(audit.note, "stop", {"name": settings.name})
        revocations = Revocations(settings.data_dir / REVOKED_FILE)
        await revocations.load()
        live = Live(
            policy_file=settings.policy_file,
            data_dir=settings.data_dir,
            opener=self._open_keys,
            tls=tls,
            audit=audit,
            metrics=self.telemetry.metrics,
            log=self.log,
            has_operators=operators.required > 0,
        )
        self._stack.push_async_callback(live.close)
        await live.open()
        self._live = live
        device_log = await self._start_device_log(audit)
        self._steady = steady = SteadyTime(self.clock)
        steady.anchor(max((k.notes.newest for k in live.owners.values()), default=0.0))
        fingerprint = fingerprint_of(checkpoints.log_key)
        audit.note("start", {"version": __version__, "name": settings.name, "log_key": fingerprint})
        health = self._health(audit, live, tls, log_keys, device_log)
        gate, service = self._service(
            audit, checkpoints, live, revocations=revocations, steady=steady, tls=tls
        )
        actions = Actions(
            audit,
            checkpoints,
            live,
            revocations,
            operators,
            anchor=steady.anchor,
            clock=self.clock,
            metrics=self.telemetry.metrics,
            log=logs.get_logger("admin"),
        )
        attesting = Attesting(live, log_keys, audit, clock=self.clock)
        told = CustodyService(
            gate,
            lambda: live.owners,
            attesting,
            audit,
            clock=self.clock,
            log=logs.get_logger("signer"),
        )
        admin = SignerAdmin(
            settings.name,
            audit,
            checkpoints,
            live,
            revocations=revocations,
            actions=actions,
            attesting=attesting,
            device_log=device_log,
        )
        self._doors = Doors(
            settings,
            [*signer_methods(service), *custody_methods(told)],
            gate,
            tls,
            admin=admin_methods(admin),
            is_healthy=health.is_healthy,
            metrics=self.telemetry.metrics,
            clock=self.clock,
            log=logs.get_logger("api"),
        )
        await self._doors.start()
        self._stack.push_async_callback(self._doors.close, GRACE_S)
        await health.check_costly()
        await self._listen(health)
        loops = Tasks(on_failure=self._broke_down)
        self._stack.push_async_callback(loops.close)
        loops.start("health", health.run())
        self.log.info(
            "signer is ready",
            address=f"{settings.bind_address}:{self.port}" if tls is not None else "",
            socket="" if settings.socket_path is None else str(settings.socket_path),
            policy=live.policy.hash,
        )

    async def _load_tls(self) -> TlsFiles | None:
        if self.settings.tls is None:
            return None
        tls = TlsFiles(self.settings.tls)
        await asyncio.to_thread(tls.load)
        return tls

    async def _open_audit(self) -> tuple[AuditLog, Found]:
        audit = AuditLog(self.settings.audit, clock=self.clock, log=logs.get_logger("audit"))
        self._stack.push_async_callback(audit.close)
        found = await audit.open()
        self._audit = audit
        return audit, found

    async def _start_checkpoints(
        self, audit: AuditLog, found: Found, log_keys: OwnerKeys
    ) -> Checkpoints:
        log, witness = logs.get_logger("audit"), self.settings.witness
        places: list[Place] = []
        if witness.file is not None:
            places.append(FilePlace(witness.file, clock=self.clock, log=log))
        if witness.syslog is not None:
            places.append(SyslogPlace(witness.syslog, clock=self.clock, log=log))
        signer = HeldSigner(log_keys, LOG_KEY_ID)
        checkpoints = Checkpoints(audit, found, signer, places=places, clock=self.clock, log=log)
        await checkpoints.start()
        self._checkpoints = checkpoints
        self._stack.push_async_callback(checkpoints.close)
        return checkpoints

    async def _start_device_log(self, audit: AuditLog) -> DeviceLog | None:
        """Begin to read the device's log, where that was asked for."""
        if self.settings.device_log is None:
            return None
        made = DeviceLog(
            self.settings.device_log,
            audit,
            metrics=self.telemetry.metrics,
            clock=self.clock,
            log=logs.get_logger("device_log"),
        )
        await made.start()
        self._stack.push_async_callback(made.close)
        return made

    async def _open_log_keys(self) -> OwnerKeys:
        """Open the signer's own keys; the one that signs checkpoints is made when there is none."""
        owner = own_owner(self.settings.name)
        keys = await open_owner(owner, self.settings.data_dir, Custody(), self._open_keys)
        self._stack.push_async_callback(keys.close)
        if keys.find(LOG_KEY_ID) is None:
            held = keys.take(await keys.generate(LOG_KEY_ID, KeyType.EC_P256))
            self.audit.note("log_key_made", {"fingerprint": held.info.fingerprint})
            self.log.info("log key was made", fingerprint=held.info.fingerprint)
        return keys

    async def _open_keys(self, owner: Owner, directory: Path, custody: Custody) -> _OpenedKeys:
        config = owner_config(self.settings.keys, owner, directory, custody)
        # Owners share tokens: without it the last one's gauges would stand for all.
        metrics = Labelled(self.telemetry.metrics, {"owner": str(owner)})
        host = dataclasses.replace(_host(owner, directory, self.clock), metrics=metrics)
        catalog = await Catalog.load([config], _table, host, SIGNER_RULES, names=_names)
        return _OpenedKeys(catalog, self.settings, owner, directory)

    def _service(
        self,
        audit: AuditLog,
        checkpoints: Checkpoints,
        live: Live,
        *,
        revocations: Revocations,
        steady: SteadyTime,
        tls: TlsFiles | None,
    ) -> tuple[Gate, SignerService]:
        metrics, log = self.telemetry.metrics, logs.get_logger("signer")
        tasks = Tasks(on_failure=self._call_failed)
        self._stack.push_async_callback(tasks.close)
        gate = Gate(
            lambda: revocations.apply(live.policy),
            audit,
            tls=tls,
            metrics=metrics,
            clock=self.clock,
            log=log,
        )
        generating = Generating(
            gate, audit, steady=steady, clock=self.clock, tasks=tasks, metrics=metrics, log=log
        )

        service = SignerService(
            gate,
            lambda: live.owners,
            audit,
            generating,
            witness=lambda: (checkpoints.last, checkpoints.log_key),
            steady=steady,
            clock_fault=self._clock_fault,
            clock=self.clock,
            tasks=tasks,
            metrics=metrics,
            log=log,
        )
        return gate, service

    def _health(
        self,
        audit: AuditLog,
        live: Live,
        tls: TlsFiles | None,
        log_keys: OwnerKeys,
        device_log: DeviceLog | None,
    ) -> Health:
        async def audit_log() -> None:
            if audit.trouble:
                raise UnavailableError(f"audit log unavailable: {audit.trouble}")

        async def devices() -> None:
            for keys in (*live.owners.values(), log_keys):
                state = keys.health()
                if state.health is KeyHealth.DOWN:
                    raise UnavailableError(f"keys of {keys.owner}: {state.message}")

        async def files() -> None:
            _refuse(live.fault or ("" if tls is None else tls.fault(self.clock.now())))

        async def clock() -> None:
            _refuse(self._clock_fault())

        waiting: dict[str, Check] = {
            "signer.keys": devices,
            "signer.clock": clock,
            "signer.files": files,
        }
        if device_log is not None:
            waiting["signer.device_log"] = device_log.check
        return Health(
            quick={"signer.audit": audit_log},
            waiting=waiting,
            clock=self.clock,
            log=logs.get_logger("health"),
        )

    async def _listen(self, health: Health) -> None:
        if self.telemetry.is_read:
            await self.telemetry.start()
            self._stack.push_async_callback(self.telemetry.close)
            self._stack.callback(count_log_lines(self.telemetry.metrics))
        self._health_listener = await answer_probes(health, self.settings.health, self._stack)

    def _clock_fault(self) -> str:
        """Return why the wall clock is not believed, "" while it is."""
        if self._steady is not None and not self._steady.is_sane():
            return (
                f"the clock moved by {self._steady.skew_s():.0f} s while the signer ran; set it"
                " right, or accept it with `spire-hw-signer clock accept`"
            )
        return "" if self._checkpoints is None else self._checkpoints.clock_fault

    def _call_failed(self, name: str, error: BaseException) -> None:
        if not isinstance(error, SpireHwError):
            self.log.error("Unexpected error", task=name, exc_info=error)


def _refuse(fault: str) -> None:
    if fault:
        raise NotReadyError(fault)


def _device_log_faults(settings: SignerSettings) -> list[ConfigFault]:
    given = settings.device_log
    return [] if given is None else list(find_device_log_faults(given, settings.data_dir))


class _OpenedKeys:
    """The KeyManager of one owner with what it stands in."""

    def __init__(
        self, catalog: Catalog, settings: SignerSettings, owner: Owner, directory: Path
    ) -> None:
        self._catalog = catalog
        self._settings = settings
        self._owner = owner
        self._directory = directory

    @property
    def manager(self) -> KeyManager:
        manager: KeyManager = self._catalog.one(PluginKind.KEY_MANAGER).plugin
        return manager

    async def use(self, custody: Custody) -> None:
        config = owner_config(self._settings.keys, self._owner, self._directory, custody)
        await self._catalog.one(PluginKind.KEY_MANAGER).plugin.configure(config.data)

    async def close(self) -> None:
        await self._catalog.close()


def _table(kind: PluginKind, name: str) -> Builder:
    return builtin.lookup(kind, name, Side.SERVER)


def _names(kind: PluginKind) -> list[str]:
    return builtin.names(kind, Side.SERVER)


def _host(owner: Owner, directory: Path, clock: Clock) -> HostInfo:
    return HostInfo(
        side=Side.SERVER,
        trust_domain=owner.trust_domain,
        data_dir=directory,
        log=logs.get_logger("keys").bind(owner=str(owner)),
        clock=clock,
    )

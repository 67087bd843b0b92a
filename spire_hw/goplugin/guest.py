"""Be a plugin of another host: what the author of an external plugin calls.

`serve` turns the process it is called in into a plugin: it finds out from its environment what the
host wants, listens on a private socket that the host's user alone may use, tells the host where,
and serves until the host asks it to end or is gone. docs/plugins/writing.md shows whole plugins.

Source: contract of go-plugin, section 12.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TextIO, cast

from typing_extensions import override

from spire_hw import log
from spire_hw.clock import SystemClock
from spire_hw.datadir import lock_data_dir
from spire_hw.errors import DeniedError, InvalidInputError, SpireHwError, UnavailableError
from spire_hw.goplugin.facade.link import MAX_MESSAGE_BYTES
from spire_hw.goplugin.facade.table import SIDES, service_name
from spire_hw.goplugin.greeting import Greeting
from spire_hw.goplugin.handshake import (
    MAX_SOCKET_PATH_BYTES,
    Address,
    Invitation,
    encode_line,
    read_environment,
)
from spire_hw.goplugin.hclog import HclogStream
from spire_hw.goplugin.place import Place
from spire_hw.goplugin.slot import Offer, Slot
from spire_hw.hardening import harden
from spire_hw.rpc.interceptors import Guard
from spire_hw.rpc.server import RpcLimits, RpcServer
from spire_hw.transport.peer import UnixPeer
from spire_hw.transport.process import Process
from spire_hw.transport.unixfront import UnixFront

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spire_hw.plugin.info import Builder, PluginKind, Side
    from spire_hw.rpc.service import Call

DATA_DIR: Final = Path("/var/lib/spire-hw/plugin")

_SOCKET: Final = "plugin.sock"
# Calls in progress at once on the host's connection, two of which never end.
_MAX_CALLS: Final = 4096
_STOP_S: Final = 1.0
_STDIN, _STDOUT, _STDERR = 0, 1, 2


def serve(
    kind: PluginKind,
    builder: Builder,
    *,
    sides: Sequence[Side] = (),
    data_dir: Path = DATA_DIR,
) -> int:
    """Serve a plugin to the host that started this process, until it ends; return an exit status.

    To be called once, from the main thread, before anything was printed.

    Args:
        kind: what the plugin is.
        builder: makes it; called when the host first configures the plugin.
        sides: hosts it fits, all that know the kind by default. With two, what the host offers
            tells which one it is.
        data_dir: what the plugin is told as `HostInfo.data_dir`; made when missing, if it may.

    Returns:
        0 after a good end; 1 when no host started this process or it could not serve, with the
        reason on standard error.
    """
    line = _keep_stdout()
    try:
        invitation = read_environment(os.environ, [kind])
        offer = Offer(kind, tuple(sides) or SIDES[kind], builder, data_dir)
        for side in offer.sides:
            service_name(kind, side)
    except SpireHwError as e:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {e.message}\n")
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the host acts
    log.configure(
        log.LogSettings(log.Level.DEBUG, log.Format.JSON),
        stream=cast("TextIO", HclogStream(_STDERR)),
    )
    try:
        harden()
        asyncio.run(_serve(offer, invitation, line))
    except SpireHwError as e:
        log.get_logger("plugin").error("Plugin cannot serve", error=e.message)
        return 1
    except Exception:  # noqa: BLE001 - the edge: a traceback of Python's own would lose its level
        log.get_logger("plugin").exception("Plugin failed unexpectedly")
        return 1
    return 0


async def _serve(offer: Offer, invitation: Invitation, line: int) -> None:
    logger = log.get_logger(offer.kind.value.lower())
    _make_data_dir(offer.data_dir, logger)
    with (
        _Host() as host,
        closing(Place.open(invitation.socket_dir)) as place,
        _held(offer, logger) as is_held,
    ):
        offer = replace(offer, holds_data_dir=is_held)
        slot = Slot(offer, logger, SystemClock())
        greeting = Greeting(offer, slot, logger)
        path = place.path / _SOCKET
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise InvalidInputError(
                f"socket path {path} is over {MAX_SOCKET_PATH_BYTES} bytes; set TMPDIR to a "
                "shorter one in the host's environment"
            )
        limits = RpcLimits(max_request_bytes=MAX_MESSAGE_BYTES, max_streams=_MAX_CALLS)
        server = RpcServer(
            greeting.methods(), [_HostOnly(host.uid)], logger, limits=limits, show_internal=True
        )
        server.add_front(UnixFront(path, 0o600, log=logger))
        await server.start()
        try:
            address = Address("unix", str(path))
            os.write(line, encode_line(address, multiplex_asked=invitation.multiplex_asked))
            await host.served(greeting.over)
        finally:
            await _stop(server, greeting, slot)


async def _stop(server: RpcServer, greeting: Greeting, slot: Slot) -> None:
    """End everything in less time than a host waits before it kills."""
    try:
        async with asyncio.timeout(_STOP_S):
            await slot.close()
    except TimeoutError:
        log.get_logger("plugin").warning("Plugin did not close in time")
    await server.close(grace_s=0.2)
    await greeting.close()


def _keep_stdout() -> int:
    """Return a descriptor of the host's pipe; whatever else is printed goes to standard error."""
    line = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, _STDIN)  # it is the host's own
    os.close(null)
    return line


def _make_data_dir(path: Path, logger: log.Logger) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        # Most plugins keep nothing there; one that does will say that it cannot.
        logger.debug("Data directory cannot be made", path=str(path), error=e.strerror)


@contextmanager
def _held(offer: Offer, logger: log.Logger) -> Iterator[bool]:
    """Hold the data directory; yield whether that worked.

    Plugins of several hosts may share it, as long as what they keep there is not the same.
    """
    try:
        release = lock_data_dir(offer.data_dir, f"plugin-{offer.kind.value.lower()}")
    except UnavailableError as e:
        logger.debug("Data directory is not held", error=e.message)
        yield False
        return
    try:
        yield True
    finally:
        release()


class _Host:
    """The process that started this one.

    Attributes:
        uid: its user.
    """

    def __init__(self) -> None:
        self._pid = os.getppid()
        try:
            self._process: Process | None = Process.of(self._pid)
            self.uid = self._process.uid
        except UnavailableError:  # it may be outside this pid namespace, or hidden
            self._process = None
            self.uid = os.geteuid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self._process.close()

    async def served(self, over: asyncio.Event) -> None:
        """Return when the host asked us to end, ended itself, or somebody sent SIGTERM."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, over.set)
        pidfd = None if self._process is None else self._process.fileno()
        if pidfd is not None:
            loop.add_reader(pidfd, over.set)
        try:
            if os.getppid() == self._pid:  # else it ended before we looked
                await over.wait()
        finally:
            if pidfd is not None:
                loop.remove_reader(pidfd)


class _HostOnly(Guard):
    """Lets in nobody but the host's user."""

    def __init__(self, uid: int) -> None:
        self._uid = uid

    @override
    async def check(self, request: Any, call: Call) -> None:
        """Refuse other users.

        Raises:
            DeniedError: the caller is not the host's user.
        """
        if not isinstance(call.peer, UnixPeer) or call.peer.process.uid != self._uid:
            raise DeniedError("only the host that started this plugin may call it")

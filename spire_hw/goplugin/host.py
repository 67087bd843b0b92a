"""One run of an external plugin: started, greeted, configured, asked whether it lives, stopped.

A failure at any step leaves nothing behind: no process, no socket, no directory. Keeping a plugin
up from run to run is `spire_hw.goplugin.supervise`'s business.

Source: contract of go-plugin, sections 5 to 8.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw._pb import goplugin_pb2, plugin_config_pb2, plugin_init_pb2
from spire_hw.aio.tasks import Tasks
from spire_hw.errors import (
    ErrorKind,
    InvalidInputError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.goplugin.broker import Broker
from spire_hw.goplugin.handshake import build_environment, parse_line
from spire_hw.goplugin.listener import pin_socket
from spire_hw.goplugin.place import remove
from spire_hw.goplugin.process import PluginProcess, Start
from spire_hw.goplugin.stderr import LineCutter, LineLog, Throttle
from spire_hw.rpc.client import Channel, connect_unix

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from spire_hw.goplugin.launch import Launch

CONFIG_SERVICE: Final = "spire.service.common.config.v1.Config"
INIT_SERVICE: Final = "spire.service.private.init.v1.Init"
_STDIO: Final = "/plugin.GRPCStdio/StreamStdio"
_SHUTDOWN: Final = "/plugin.GRPCController/Shutdown"
_HEALTH: Final = "/grpc.health.v1.Health/Check"
_HEALTH_NAME: Final = "plugin"
_MAX_SERVICES: Final = 64
_SHOWN_NAMES: Final = 8
_SHOWN_CHARS: Final = 80
_MAX_NOTES: Final = 32
_MAX_NOTE: Final = 500
# Sockets of a process are closed a moment before its end is told.
_END_NOTICED_S: Final = 0.2

T = TypeVar("T")


def raise_explained(explained: SpireHwError, error: SpireHwError) -> NoReturn:
    """Raise an explanation of an error, or the error when it needs none: it is not its own cause."""
    if explained is error:
        raise error
    raise explained from error


class Run:
    """A plugin that is up.

    Attributes:
        channel: calls to it.
        services: full names of what it serves.
        down: done when this run is over; its result says why.
    """

    def __init__(
        self, launch: Launch, process: PluginProcess, lines: LineLog, directory: Path
    ) -> None:
        self._launch = launch
        self._lines = lines
        self._limits = launch.limits
        self._process = process
        self._directory = directory
        self._broker: Broker | None = None
        self._channel: Channel | None = None
        self._tasks = Tasks(self._task_failed)
        self._end_tasks = Tasks(self._task_failed)
        self._ending: asyncio.Task[None] | None = None
        self.services: frozenset[str] = frozenset()
        self.down: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        process.gone.add_done_callback(lambda gone: self.give_up(f"it ended, {gone.result()}"))

    @classmethod
    async def start(cls, launch: Launch) -> Run:
        """Start a plugin and greet it.

        Raises:
            SpireHwError: it did not come up; the message says at which step and why.
        """
        directory = launch.place.make()
        lines = LineLog(launch.log, launch.clock)
        environment = build_environment(
            launch.kind,
            {**launch.environment, "TMPDIR": str(directory)},
            socket_dir=str(directory),
        )
        start = Start(launch.program, launch.arguments, environment)
        try:
            process = await PluginProcess.start(start, lines)
        except BaseException:
            remove(directory)
            raise
        run = cls(launch, process, lines, directory)
        try:
            await run._greet()
        except BaseException:
            await run.kill()
            raise
        return run

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    @property
    def channel(self) -> Channel:
        """Return what calls go through."""
        if self._channel is None:
            raise UnavailableError("it is not connected")
        return self._channel

    def give_up(self, why: str) -> None:
        """Count the run as over."""
        if not self.down.done():
            self.down.set_result(why)

    async def configure(self, text: str) -> None:
        """Hand it its configuration.

        Args:
            text: HCL or JSON, "" for none.

        Raises:
            InvalidInputError: it does not accept the configuration, or takes none.
            SpireHwError: it failed.
        """
        if CONFIG_SERVICE not in self.services:
            if text.strip():
                raise InvalidInputError("it takes no configuration; remove plugin_data")
            return
        request = plugin_config_pb2.ConfigureRequest(
            core_configuration=self._core, hcl_configuration=text
        )
        await self._answered(
            "Configure",
            self.channel.unary(
                f"/{CONFIG_SERVICE}/Configure",
                request,
                plugin_config_pb2.ConfigureResponse,
                self._limits.configure_s,
            ),
        )

    async def validate(self, text: str) -> list[str]:
        """Return what it finds wrong with a configuration.

        Raises:
            SpireHwError: it failed.
        """
        if CONFIG_SERVICE not in self.services:
            return ["it takes no configuration; remove plugin_data"] if text.strip() else []
        request = plugin_config_pb2.ValidateRequest(
            core_configuration=self._core, hcl_configuration=text
        )
        try:
            found = await self._answered(
                "Validate",
                self.channel.unary(
                    f"/{CONFIG_SERVICE}/Validate",
                    request,
                    plugin_config_pb2.ValidateResponse,
                    self._limits.configure_s,
                ),
            )
        except SpireHwError as e:
            if e.kind is ErrorKind.UNIMPLEMENTED:
                return []
            if e.kind is ErrorKind.INVALID_ARGUMENT:
                return [e.message]
            raise
        notes = [note[:_MAX_NOTE] for note in found.notes[:_MAX_NOTES]]
        return notes or ([] if found.valid else ["it says that its configuration is not valid"])

    async def probe(self) -> None:
        """Ask whether it is there.

        Raises:
            SpireHwError: no answer.
        """
        request = health_pb2.HealthCheckRequest(service=_HEALTH_NAME)
        try:
            await self.channel.unary(
                _HEALTH, request, health_pb2.HealthCheckResponse, self._limits.probe_s
            )
        except SpireHwError as e:
            # Any other answer is an answer.
            if e.kind in {ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED}:
                raise

    async def stop(self) -> None:
        """Let it end in good order, then make sure that it has."""
        if not self.down.done():
            self.give_up("it was stopped")
            await self._say_goodbye()
        await self._close(self._limits.exit_s)

    async def kill(self) -> None:
        """End it at once."""
        self.give_up("it was killed")
        self._process.kill()
        await self._close(0.0)

    # -- coming up ------------------------------------------------------------------------

    async def _greet(self) -> None:
        limits = self._limits
        address = parse_line(await self._process.first_line(limits.start_s))
        if address.network != "unix":
            raise InvalidInputError(
                f"it listens on {address.network} {address.address}, where every user of this "
                "machine could take its place; only unix sockets are accepted"
            )
        path = await asyncio.to_thread(
            pin_socket, Path(address.address), self._directory, self._process.owns
        )
        self._channel = connect_unix(path, max_response_bytes=limits.max_message_bytes)
        self._tasks.start("plugin output", self._drain_stdio())
        await self._offer_services()
        answer = await self._answered("Init", self._init())
        broker = self._broker
        if broker is not None:
            broker.check()
        self._take_services(answer.plugin_service_names)

    async def _offer_services(self) -> None:
        launch = self._launch
        path = self._directory / "host.sock"
        broker = Broker(launch.service_methods, path, owns=self._process.owns, log=launch.log)
        await broker.start()
        self._broker = broker
        await self._answered("the broker stream", broker.announce(self.channel))

    async def _init(self) -> plugin_init_pb2.InitResponse:
        return await self.channel.unary(
            f"/{INIT_SERVICE}/Init",
            plugin_init_pb2.InitRequest(host_service_names=self._launch.service_names),
            plugin_init_pb2.InitResponse,
            self._limits.init_s,
        )

    def _take_services(self, names: Sequence[str]) -> None:
        wanted = self._launch.service
        if len(names) > _MAX_SERVICES:
            raise InvalidInputError(f"it names over {_MAX_SERVICES} services")
        self.services = frozenset(names)
        if wanted not in self.services:
            shown = ", ".join(_shown(name) for name in names[:_SHOWN_NAMES]) or "nothing"
            raise InvalidInputError(
                f"it serves {shown}, but is configured as {self._launch.kind.value}, which needs "
                f"{wanted}"
            )
        unknown = sorted(self.services - {wanted, CONFIG_SERVICE})
        if unknown:
            self._launch.log.warning(
                "Plugin serves what this host has no use for",
                services=[_shown(name) for name in unknown[:_SHOWN_NAMES]],
            )

    async def _answered(self, step: str, call: Coroutine[Any, Any, T]) -> T:
        """Wait for an answer; the end of the process, when that comes first, is the error."""
        asking = self._tasks.spawn(f"plugin {step}", call)
        waiting: set[asyncio.Future[Any]] = {asking, self._process.gone}
        if self._broker is not None:
            waiting.add(self._broker.ended)
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and self._broker is not None and not self._process.gone.done():
                self._broker.check()
            if not asking.done():
                raise self._ended_during(step)
            return await asking
        except SpireHwError as e:
            raise_explained(await self._explained(step, e), e)
        finally:
            asking.cancel()

    async def _explained(self, step: str, error: SpireHwError) -> SpireHwError:
        """Return what is to be told about an error: that the process ended, or what it answered."""
        if error.kind is ErrorKind.UNAVAILABLE and not self._process.gone.done():
            await asyncio.wait({self._process.gone}, timeout=_END_NOTICED_S)
        if self._process.gone.done():
            return self._ended_during(step)
        if error.kind is ErrorKind.DEADLINE_EXCEEDED:
            text = f"it did not answer {step} in time" + self._process.said()
            return SpireHwError(text, kind=ErrorKind.DEADLINE_EXCEEDED)
        if error.kind is ErrorKind.INVALID_ARGUMENT:
            return error  # what it says about what it was given needs no more words
        return SpireHwError(f"{step}: {error.message}", kind=error.kind)

    def _ended_during(self, step: str) -> UnavailableError:
        how = self._process.gone.result()
        return UnavailableError(f"it ended ({how}) during {step}" + self._process.said())

    # -- going down -----------------------------------------------------------------------

    async def _say_goodbye(self) -> None:
        with contextlib.suppress(SpireHwError):  # it may have no such method, or no answer
            await self.channel.unary(
                f"/{INIT_SERVICE}/Deinit",
                plugin_init_pb2.DeinitRequest(),
                plugin_init_pb2.DeinitResponse,
                self._limits.deinit_s,
            )
        if self._broker is not None:
            await self._broker.hang_up()
        with contextlib.suppress(SpireHwError):  # it ends while it answers
            await self.channel.unary(
                _SHUTDOWN, goplugin_pb2.Empty(), goplugin_pb2.Empty, self._limits.shutdown_s
            )

    async def _close(self, grace_s: float) -> None:
        """Clear everything away, once, and to the end even when whoever waits for it does not."""
        if self._ending is None:
            self._ending = self._end_tasks.spawn("plugin end", self._end(grace_s))
        await asyncio.shield(self._ending)

    async def _end(self, grace_s: float) -> None:
        if self._broker is not None:
            await self._broker.hang_up()
        await self._tasks.close()
        if self._channel is not None:
            await self._channel.close()
        await self._process.end(grace_s)
        if self._broker is not None:
            await self._broker.close()
        await asyncio.to_thread(remove, self._directory)

    async def _drain_stdio(self) -> None:
        """Take what the plugin prints, as far as it comes this way: it blocks when nobody does."""
        throttle = Throttle(asyncio.get_running_loop().time)
        cutters: dict[int, LineCutter] = {}
        with contextlib.suppress(SpireHwError):  # many plugins do not serve it
            async for piece in self.channel.server_stream(
                _STDIO, empty_pb2.Empty(), goplugin_pb2.StdioData
            ):
                channel = piece.channel == goplugin_pb2.StdioData.STDERR
                cutter = cutters.setdefault(channel, LineCutter(self._lines.write))
                pause_s = throttle.pause_s(len(piece.data), cutter.feed(piece.data))
                if pause_s:
                    await asyncio.sleep(pause_s)
        for cutter in cutters.values():
            cutter.flush()

    def _task_failed(self, name: str, error: BaseException) -> None:
        if not isinstance(error, SpireHwError):  # those are told by whoever waits for the task
            self._launch.log.error("Plugin task failed", task=name, exc_info=error)

    @property
    def _core(self) -> plugin_config_pb2.CoreConfiguration:
        return plugin_config_pb2.CoreConfiguration(trust_domain=self._launch.trust_domain)


def _shown(name: str) -> str:
    return ascii(name[:_SHOWN_CHARS])[1:-1]

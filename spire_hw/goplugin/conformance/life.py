"""What plugins of all kinds do: take configurations, stay up, end when asked."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Final

from spire_hw._pb import goplugin_pb2, plugin_config_pb2, plugin_init_pb2
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.goplugin.conformance.bench import CALL_TIMEOUT_S, TRUST_DOMAIN
from spire_hw.goplugin.conformance.report import (
    FailedError,
    NotedError,
    Outcome,
    SkippedError,
    answered,
    refused,
)
from spire_hw.goplugin.host import CONFIG_SERVICE

if TYPE_CHECKING:
    from spire_hw.goplugin.conformance.bench import Bench
    from spire_hw.goplugin.conformance.report import Report

_NONSENSE: Final = "= this { is = no configuration"
_EXIT_S: Final = 2.0
# Within this a process that does not ignore a signal has ended.
_NOTICED_S: Final = 0.5
_AT_ONCE: Final = 64
_LARGE_BYTES: Final = 5 << 20


async def before_configure(bench: Bench, report: Report) -> bool:
    """Examine a plugin that was just started, and configure it; tell whether that worked."""
    async with report.step("refuses what is no configuration"):
        _check_configurable(bench)
        await refused(bench.run.configure(_NONSENSE), "nonsense", ErrorKind.INVALID_ARGUMENT)
    async with report.step("tells about a configuration without taking it"):
        _check_configurable(bench)
        await _validates(bench)
    async with report.step("takes its configuration") as configured:
        await bench.run.configure(bench.subject.data)
    return configured.outcome is Outcome.PASSED


def _check_configurable(bench: Bench) -> None:
    if CONFIG_SERVICE not in bench.run.services:
        raise SkippedError("it takes no configuration")


async def _validates(bench: Bench) -> None:
    core = plugin_config_pb2.CoreConfiguration(trust_domain=TRUST_DOMAIN.name)
    for text, valid in ((bench.subject.data, True), (_NONSENSE, False)):
        request = plugin_config_pb2.ValidateRequest(core_configuration=core, hcl_configuration=text)
        try:
            answer = await bench.run.channel.unary(
                f"/{CONFIG_SERVICE}/Validate",
                request,
                plugin_config_pb2.ValidateResponse,
                CALL_TIMEOUT_S,
            )
        except SpireHwError as e:
            if e.kind is ErrorKind.UNIMPLEMENTED:
                raise SkippedError("it does not serve Validate, which is allowed") from e
            raise
        what = "the configuration given" if valid else "nonsense"
        if answer.valid is not valid:
            word = "not valid" if valid else "valid"
            raise FailedError(f"it says that {what} is {word}: {'; '.join(answer.notes)}")
        if not valid and not answer.notes:
            raise NotedError("it says that a bad configuration is bad, but not why")


async def after_configure(bench: Bench, report: Report) -> None:
    """Examine a configured plugin."""
    async with report.step("keeps its configuration when a later one is refused"):
        _check_configurable(bench)
        await refused(bench.run.configure(_NONSENSE), "nonsense", ErrorKind.INVALID_ARGUMENT)
        await bench.run.configure(bench.subject.data)
    async with report.step("takes messages over 4 MiB"):
        await _takes_large_messages(bench)
    async with report.step("answers many calls at once"):
        await asyncio.gather(*(bench.run.probe() for _ in range(_AT_ONCE)))
    async with report.step("leaves Ctrl-C to its host"):
        os.kill(bench.run.pid, signal.SIGINT)
        await asyncio.wait({bench.run.down}, timeout=_NOTICED_S)
        if bench.run.down.done():
            raise FailedError(bench.run.down.result())
        await bench.run.probe()


async def _takes_large_messages(bench: Bench) -> None:
    """Configure with a text that has much empty space at its end."""
    _check_configurable(bench)
    try:
        await bench.run.configure(bench.subject.data + "\n" * _LARGE_BYTES)
    except SpireHwError as e:
        if e.kind is not ErrorKind.INVALID_ARGUMENT:  # that one had read it
            # Upstream's own kit for plugins stops there, and no host has sent as much yet.
            raise NotedError(f"{answered(e)}; hosts may send up to 2 GiB") from e
    await bench.run.configure(bench.subject.data)


async def ends(bench: Bench, report: Report) -> None:
    """Examine how a plugin ends; it has ended afterwards."""
    channel = bench.run.channel
    async with report.step("is told of its end"):
        request = plugin_init_pb2.DeinitRequest()
        try:
            await channel.unary(
                "/spire.service.private.init.v1.Init/Deinit",
                request,
                plugin_init_pb2.DeinitResponse,
                10.0,
            )
        except SpireHwError as e:
            if e.kind is ErrorKind.UNIMPLEMENTED:
                raise SkippedError("it does not serve Deinit, which is allowed") from e
            raise
    async with report.step("ends when it is asked to") as step:
        empty = goplugin_pb2.Empty()
        asking = channel.unary(
            "/plugin.GRPCController/Shutdown", empty, goplugin_pb2.Empty, CALL_TIMEOUT_S
        )
        try:
            async with asyncio.timeout(_EXIT_S):
                try:
                    await asking
                except SpireHwError as e:
                    if e.kind is ErrorKind.UNIMPLEMENTED:
                        raise FailedError("it does not serve Shutdown; hosts kill it") from e
                await asyncio.shield(bench.run.down)
        except TimeoutError:
            raise FailedError(f"it is still there after {_EXIT_S:g} s; hosts kill it") from None
        step.detail = bench.run.down.result()

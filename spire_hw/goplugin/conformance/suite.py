"""Starts a plugin as a host does and asks it everything there is to ask about its kind."""

from __future__ import annotations

from contextlib import closing, suppress
from typing import TYPE_CHECKING, Final

from spire_hw.errors import SpireHwError
from spire_hw.goplugin.conformance import attestors, authorities, keymanager, life
from spire_hw.goplugin.conformance.bench import Bench, Subject, launch
from spire_hw.goplugin.conformance.report import Outcome, Report, Step
from spire_hw.goplugin.facade.table import service_name
from spire_hw.goplugin.host import Run
from spire_hw.goplugin.place import Place
from spire_hw.plugin.info import PluginKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spire_hw.clock import Clock
    from spire_hw.goplugin.launch import Launch
    from spire_hw.log import Logger

_SUITES: Final[dict[PluginKind, Callable[[Bench, Report], Awaitable[None]]]] = {
    PluginKind.KEY_MANAGER: keymanager.examine,
    PluginKind.NODE_ATTESTOR: attestors.examine_node,
    PluginKind.WORKLOAD_ATTESTOR: attestors.examine_workload,
    PluginKind.UPSTREAM_AUTHORITY: authorities.examine_upstream,
    PluginKind.CREDENTIAL_COMPOSER: authorities.examine_composer,
    PluginKind.NOTIFIER: authorities.examine_outlet,
    PluginKind.BUNDLE_PUBLISHER: authorities.examine_outlet,
    PluginKind.SVID_STORE: authorities.examine_outlet,
}


async def examine(
    subject: Subject, clock: Clock, log: Logger, show: Callable[[Step], None]
) -> Report:
    """Examine a plugin.

    Args:
        subject: which.
        clock: time.
        log: where the plugin's own lines go.
        show: is told of each step when it is done.

    Raises:
        SpireHwError: there is no such program, or no such plugins on that side.
    """
    service_name(subject.kind, subject.side)
    report = Report(show)
    with closing(Place.open()) as place:
        launching = launch(subject, place, clock, log)
        made: dict[str, str] = {}
        async with report.step("starts, says where it listens and what it serves") as step:
            run = await Run.start(launching)
            step.detail = ", ".join(sorted(run.services))
        if step.outcome is Outcome.PASSED:
            try:
                made = await _examine(Bench.of(subject, run, clock), report)
            finally:
                await run.stop()
        if made:
            await _examine_again(subject, launching, report, made)
        launching.program.close()
    return report


async def _examine(bench: Bench, report: Report) -> dict[str, str]:
    """Examine one run; return the keys it holds at the end, if it is a KeyManager's."""
    made: dict[str, str] = {}
    if await life.before_configure(bench, report):
        await _SUITES[bench.subject.kind](bench, report)
        await life.after_configure(bench, report)
        if bench.subject.kind is PluginKind.KEY_MANAGER:
            with suppress(SpireHwError):  # a step has told it already
                made = await keymanager.fingerprints(bench)
    await life.ends(bench, report)
    return made


async def _examine_again(
    subject: Subject, launching: Launch, report: Report, made: dict[str, str]
) -> None:
    async with report.step("has its keys after a restart"):
        run = await Run.start(launching)
        try:
            await run.configure(subject.data)
            await keymanager.check_restarted(Bench.of(subject, run, launching.clock), made)
        finally:
            await run.stop()

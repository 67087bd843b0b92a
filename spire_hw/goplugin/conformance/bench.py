"""A plugin on the bench: one run of it, its contract, and hosts' services that say little."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf.message import Message

from spire_hw.errors import NotFoundError, NotReadyError
from spire_hw.goplugin.facade import hostservices, table
from spire_hw.goplugin.facade.link import Link
from spire_hw.goplugin.launch import Launch
from spire_hw.goplugin.program import open_program
from spire_hw.plugin.hostservices import HostServices
from spire_hw.plugin.info import PluginKind, Side
from spire_hw.spiffeid import SpiffeId, TrustDomain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.goplugin.host import Run
    from spire_hw.goplugin.place import Place
    from spire_hw.log import Logger
    from spire_hw.plugin.hostservices import ServerIdentity

M = TypeVar("M", bound=Message)

TRUST_DOMAIN: Final = TrustDomain.parse("check.test")
CALL_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be examined.

    Attributes:
        kind: plugin kind.
        side: the host it is for.
        cmd: its program.
        args: for the program.
        data: its configuration, HCL or JSON; "" for none.
        effects: ask also what has effects outside, such as publishing a bundle.
    """

    kind: PluginKind
    side: Side
    cmd: str
    args: Sequence[str] = ()
    data: str = ""
    effects: bool = False


@dataclass(frozen=True, slots=True)
class Bench:
    """A plugin that runs.

    Attributes:
        subject: which.
        run: its process.
        contract: what it offers, as our contract.
        clock: time.
    """

    subject: Subject
    run: Run
    contract: Any
    clock: Clock

    @classmethod
    def of(cls, subject: Subject, run: Run, clock: Clock) -> Bench:
        """Put a running plugin on the bench."""
        link = Link(subject.kind, os.path.basename(subject.cmd), lambda: run.channel)  # noqa: PTH119
        return cls(subject, run, table.remote(link, subject.side), clock)

    async def call(self, method: str, request: Message, response_type: type[M]) -> M:
        """Call a method of the kind's service with a message of one's own."""
        service = table.service_name(self.subject.kind, self.subject.side)
        path = f"/{service}/{method}"
        return await self.run.channel.unary(path, request, response_type, CALL_TIMEOUT_S)


def launch(subject: Subject, place: Place, clock: Clock, log: Logger) -> Launch:
    """Return how a plugin is started for an examination.

    Raises:
        SpireHwError: there is no such program, or it cannot be executed.
    """
    services = HostServices(_Quiet())
    if subject.side is Side.SERVER:
        services = HostServices(_Quiet(), _Quiet(), _Quiet())
    return Launch(
        kind=subject.kind,
        side=subject.side,
        trust_domain=TRUST_DOMAIN.name,
        program=open_program(subject.cmd, ""),
        arguments=subject.args,
        environment=os.environ,
        place=place,
        service_names=hostservices.names(services),
        service_methods=hostservices.methods(services),
        log=log,
        clock=clock,
    )


class _Quiet:
    """All host services of a server that is starting and knows nobody."""

    async def set_gauge(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Take a value."""

    async def emit_key(self, key: Sequence[str], value: float) -> None:
        """Take a value."""

    async def incr_counter(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Take a value."""

    async def add_sample(
        self, key: Sequence[str], value: float, labels: Mapping[str, str] | None = None
    ) -> None:
        """Take a value."""

    async def measure_since(
        self, key: Sequence[str], start: datetime, labels: Mapping[str, str] | None = None
    ) -> None:
        """Take a time."""

    async def check_known(self, agent_id: SpiffeId) -> None:
        """Know nobody."""
        raise NotFoundError(f"agent {agent_id} has not attested")

    async def fetch_x509_identity(self) -> ServerIdentity:
        """Have no identity yet."""
        raise NotReadyError("the server is starting")

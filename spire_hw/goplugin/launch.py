"""What is the same for each run of an external plugin: its program, environment, offers, limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spire_hw.goplugin.facade.link import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spire_hw.clock import Clock
    from spire_hw.goplugin.place import Place
    from spire_hw.goplugin.program import Program
    from spire_hw.log import Logger
    from spire_hw.plugin.info import PluginKind, Side
    from spire_hw.rpc.service import Method


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a plugin may take, in seconds, and how much it may say at once.

    Attributes:
        start_s: until it says where it listens.
        init_s: for Init.
        configure_s: for Configure and Validate.
        call_s: for a call whose caller sets no limit.
        probe_s: for the answer to "are you there?".
        probe_every_s: between such questions.
        deinit_s: for Deinit.
        shutdown_s: for Shutdown.
        exit_s: from there until it has ended; then it is killed.
        max_message_bytes: of one answer.
    """

    start_s: float = 60.0
    init_s: float = 30.0
    configure_s: float = 60.0
    call_s: float = 30.0
    probe_s: float = 10.0
    probe_every_s: float = 30.0
    deinit_s: float = 10.0
    shutdown_s: float = 2.0
    exit_s: float = 2.0
    max_message_bytes: int = MAX_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that is the same for each run of a plugin.

    Attributes:
        kind: what it is configured as.
        side: which host starts it.
        trust_domain: name of the host's trust domain.
        program: checked.
        arguments: for it.
        environment: what it may see of ours.
        place: where its sockets and temporary files go.
        service_names: full names of the services it is offered.
        service_methods: the same, bound.
        log: bound to the plugin's type and name.
        clock: the host's time.
    """

    kind: PluginKind
    side: Side
    trust_domain: str
    program: Program
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)
    place: Place
    service_names: Sequence[str]
    service_methods: Sequence[Method]
    log: Logger
    clock: Clock
    limits: Limits = field(default_factory=Limits)

    @property
    def service(self) -> str:
        """Return the full name of the service it must have."""
        kind = self.kind.value
        return f"spire.plugin.{self.side.value}.{kind.lower()}.v1.{kind}"

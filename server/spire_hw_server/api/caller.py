"""Who is calling, from what the socket or the TLS handshake proved: pure rules.

`classify` walks the classes in upstream's order and stops at the first that may make the call.
What it has to look up (entries of an ID, the stored node) is handed in as functions over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spire_hw.errors import DeniedError, DeniedReason
from spire_hw_server.api.policy import CallerClass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.datastore.records import Entry, Node


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the rules need of a presented leaf.

    Attributes:
        serial_number: decimal, as stored with the node.
    """

    spiffe_id: SpiffeId
    serial_number: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Caller:
    """A call's maker in the capacity in which it may make this call.

    Attributes:
        authorized_as: the class that was found.
        authorized_via: how, in upstream's words for the logs: transport, config, entries,
            datastore, or "" for anybody.
        spiffe_id: verified ID, None without a certificate and on the unix socket.
        entries: the caller's own entries with the right that let it in (admin, downstream).
        node: the stored node of an agent.
        promote: the agent showed its renewed certificate for the first time.
    """

    authorized_as: CallerClass
    authorized_via: str = ""
    spiffe_id: SpiffeId | None = None
    entries: tuple[Entry, ...] = ()
    node: Node | None = None
    promote: bool = False


@dataclass(frozen=True, slots=True)
class AgentCheck:
    """The verdict on an agent's certificate; `reason` is None when it holds."""

    reason: DeniedReason | None
    message: str = ""
    promote: bool = False


def check_agent(certificate: Certificate, node: Node | None, now: datetime) -> AgentCheck:
    """Decide whether a presented certificate is the active one of an attested agent."""
    if now >= certificate.not_after:
        return AgentCheck(DeniedReason.AGENT_EXPIRED, "agent SVID has expired")
    if node is None:
        return AgentCheck(DeniedReason.AGENT_NOT_ATTESTED, "no such attested agent")
    if node.banned:
        return AgentCheck(DeniedReason.AGENT_BANNED, "agent is banned")
    if certificate.serial_number == node.serial_number:
        return AgentCheck(None)
    if certificate.serial_number == node.new_serial_number:
        return AgentCheck(None, promote=True)
    return AgentCheck(
        DeniedReason.AGENT_NOT_ACTIVE,
        f"agent SVID with serial number {certificate.serial_number} is not the active one",
    )


@dataclass(frozen=True, slots=True)
class Lookups:
    """Where the rules look things up; all answer from memory.

    Attributes:
        admin_ids: IDs the configuration makes admins.
        entries: entries with a given SPIFFE ID.
        node: the stored node of an agent ID.
    """

    admin_ids: frozenset[SpiffeId]
    entries: Callable[[SpiffeId], Iterable[Entry]]
    node: Callable[[SpiffeId], Node | None]


def classify(
    method: str,
    allowed: frozenset[CallerClass],
    *,
    local: bool,
    certificate: Certificate | None,
    lookups: Lookups,
    now: datetime,
) -> Caller:
    """Return the caller in the first class that may call the method.

    Args:
        method: full path, for the message.
        allowed: the classes of the method's row.
        local: the call came over the unix socket.
        certificate: the verified leaf; None when none was shown.
        lookups: where entries and nodes are found.
        now: the time of the call.

    Raises:
        DeniedError: no class fits; names the method and, when the call would have been an
            agent's, carries why the agent was refused.
    """
    spiffe_id = None if certificate is None else certificate.spiffe_id
    if CallerClass.ANY in allowed:
        return Caller(CallerClass.ANY, "", spiffe_id)
    if local:
        if CallerClass.LOCAL in allowed:
            return Caller(CallerClass.LOCAL, "transport")
        raise denied(method)
    if certificate is None or now >= certificate.not_after:
        raise _without_certificate(method, allowed, certificate)
    found = _by_right(allowed, certificate.spiffe_id, lookups, now)
    if found is not None:
        return found
    if CallerClass.AGENT not in allowed:
        raise denied(method)
    node = lookups.node(certificate.spiffe_id)
    verdict = check_agent(certificate, node, now)
    if verdict.reason is not None:
        raise denied(method, verdict.reason)
    return Caller(
        CallerClass.AGENT,
        "datastore",
        certificate.spiffe_id,
        node=node,
        promote=verdict.promote,
    )


def denied(method: str, reason: DeniedReason | None = None) -> DeniedError:
    """Return the refusal of a call; its words are the same whatever the reason."""
    return DeniedError(f"authorization denied for method {method}", reason)


def _without_certificate(
    method: str, allowed: frozenset[CallerClass], certificate: Certificate | None
) -> DeniedError:
    if certificate is not None and CallerClass.AGENT in allowed:
        return denied(method, DeniedReason.AGENT_EXPIRED)
    return denied(method)


def _by_right(
    allowed: frozenset[CallerClass], spiffe_id: SpiffeId, lookups: Lookups, now: datetime
) -> Caller | None:
    if CallerClass.ADMIN in allowed and spiffe_id in lookups.admin_ids:
        return Caller(CallerClass.ADMIN, "config", spiffe_id)
    if not allowed & {CallerClass.ADMIN, CallerClass.DOWNSTREAM}:
        return None
    # Expired entries are deleted every few minutes; their rights end with them, not then.
    entries = tuple(
        e for e in lookups.entries(spiffe_id) if e.expires_at is None or now < e.expires_at
    )
    if CallerClass.ADMIN in allowed:
        rights = tuple(e for e in entries if e.admin)
        if rights:
            return Caller(CallerClass.ADMIN, "entries", spiffe_id, rights)
    if CallerClass.DOWNSTREAM in allowed:
        rights = tuple(e for e in entries if e.downstream)
        if rights:
            return Caller(CallerClass.DOWNSTREAM, "entries", spiffe_id, rights)
    return None

"""The check before every handler: who calls, and may they.

An interceptor around `api.caller` and `api.policy`: it reads the peer, fetches what the rules look
up, and leaves the `Caller` with the call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from spire_hw.errors import DeniedError, ErrorKind, NotFoundError, SpireHwError
from spire_hw.logsample import Sampler
from spire_hw.rpc.interceptors import Guard
from spire_hw.transport.peer import TcpPeer, UnixPeer
from spire_hw_server.api.caller import Caller, Certificate, Lookups, classify, denied
from spire_hw_server.api.policy import OPEN_IN_QUARANTINE, CallerClass, allowed_classes

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography import x509

    from spire_hw.clock import Clock
    from spire_hw.rpc.service import Call
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_server.api.nodes import NodeCache
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Entry, Node

_CALLER: Final = "caller"


class Authorizer(Guard):
    """Lets a call through in the first class that may make it."""

    def __init__(
        self,
        *,
        admin_ids: frozenset[SpiffeId],
        entries_of: Callable[[SpiffeId], tuple[Entry, ...]],
        nodes: NodeCache,
        store: Datastore,
        clock: Clock,
    ) -> None:
        self._admin_ids = admin_ids
        self._entries_of = entries_of
        self._nodes = nodes
        self._store = store
        self._clock = clock
        self._refusals = Sampler(clock)

    @override
    async def check(self, request: Any, call: Call) -> None:
        """Check a call before its handler runs; see `authorize`."""
        del request
        await self.authorize(call)

    async def authorize(self, call: Call) -> None:
        """Find the caller and leave it in the call's attributes.

        Raises:
            DeniedError: no class fits; an agent's refusal says why on the wire.
            SpireHwError: UNAUTHENTICATED when the certificate cannot be read, INTERNAL when the
                store is away.
        """
        allowed = allowed_classes(call.method)
        certificate = _certificate(call)
        node: Node | None = None
        if CallerClass.AGENT in allowed and certificate is not None:
            node = await self._node(certificate)
        try:
            caller = classify(
                call.method,
                allowed,
                local=isinstance(call.peer, UnixPeer),
                certificate=certificate,
                lookups=Lookups(self._admin_ids, self._entries_of, lambda _: node),
                now=self._clock.now(),
            )
        except DeniedError as e:
            self._tell(call, e, certificate)
            raise
        if caller.node is not None and caller.node.quarantine:
            self._refuse_quarantined(call, caller.node)
        if caller.promote:
            caller = replace(caller, node=await self._promote(call, caller), promote=False)
        call.attributes[_CALLER] = caller
        if caller.authorized_via:
            call.log = call.log.bind(
                authorized_as=caller.authorized_as.value, authorized_via=caller.authorized_via
            )

    def _refuse_quarantined(self, call: Call, node: Node) -> None:
        """Refuse what a node in quarantine may not do.

        Without a detail that would make the agent throw its identity away: it needs it to heal.
        """
        if call.method in OPEN_IN_QUARANTINE:
            return
        left_out = self._refusals.admit((node.agent_id, call.method))
        if left_out is not None:
            call.log.warning(
                "call denied",
                reason="quarantined",
                quarantine=node.quarantine,
                spiffe_id=node.agent_id.text,
                left_out=left_out,
            )
        raise DeniedError(f"agent is in quarantine: {node.quarantine}")

    def _tell(self, call: Call, error: DeniedError, certificate: Certificate | None) -> None:
        """Log a refusal, but not every one of a caller in a loop."""
        who: object = certificate.spiffe_id if certificate is not None else None
        if who is None:
            peer = call.peer
            who = peer.source if isinstance(peer, TcpPeer) else peer.process.uid
        left_out = self._refusals.admit((who, call.method))
        if left_out is not None:
            reason = error.reason.name if error.reason is not None else "not allowed"
            call.log.warning("call denied", reason=reason, left_out=left_out)

    async def _node(self, certificate: Certificate) -> Node | None:
        try:
            node = await self._nodes.get(certificate.spiffe_id)
            known = node is not None and certificate.serial_number in {
                node.serial_number,
                node.new_serial_number,
            }
            if node is not None and not known:
                node = await self._nodes.reload(certificate.spiffe_id)
        except SpireHwError as e:
            raise SpireHwError(
                f"could not look up the agent: {e.message}", kind=ErrorKind.INTERNAL
            ) from e
        return node

    async def _promote(self, call: Call, caller: Caller) -> Node:
        """Make the renewed certificate, now used for the first time, the current one."""
        node = caller.node
        if node is None or node.new_expires_at is None:
            raise SpireHwError("renewed agent SVID has no expiry in the store")
        try:
            promoted = await self._store.set_node_serials(
                node.agent_id,
                serial_number=node.new_serial_number,
                expires_at=node.new_expires_at,
                new_serial_number="",
                new_expires_at=None,
                expected_serial_number=node.serial_number,
            )
        except (DeniedError, NotFoundError) as e:
            # Promoted by a call beside this one, or changed meanwhile: the store decides.
            again = await self._nodes.reload(node.agent_id)
            if again is None or again.serial_number != node.new_serial_number:
                raise denied(call.method, getattr(e, "reason", None)) from e
            return again
        except SpireHwError as e:
            raise SpireHwError(
                f"could not store the agent's new serial number: {e.message}",
                kind=ErrorKind.INTERNAL,
            ) from e
        self._nodes.forget(node.agent_id)
        return promoted


def caller_of(call: Call) -> Caller:
    """Return who the authorizer found behind a call."""
    caller = call.attributes.get(_CALLER)
    if not isinstance(caller, Caller):
        raise SpireHwError(f"{call.method} was not authorized")
    return caller


def caller_agent(call: Call) -> SpiffeId:
    """Return the ID of the calling agent."""
    return caller_node(call).agent_id


def caller_node(call: Call) -> Node:
    """Return the stored node of the calling agent."""
    node = caller_of(call).node
    if node is None:
        raise SpireHwError(f"{call.method} was not called by an agent")
    return node


def _certificate(call: Call) -> Certificate | None:
    peer = call.peer
    if not isinstance(peer, TcpPeer) or not peer.chain:
        return None
    if peer.spiffe_id is None:
        raise SpireHwError("client certificate has no SPIFFE ID", kind=ErrorKind.UNAUTHENTICATED)
    return _leaf(peer.chain[0], peer.spiffe_id)


def _leaf(leaf: x509.Certificate, spiffe_id: SpiffeId) -> Certificate:
    return Certificate(spiffe_id, str(leaf.serial_number), leaf.not_valid_after_utc)

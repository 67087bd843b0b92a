"""Keeps the agent's own SVID alive: enrols, renews at half of its life, attests again when told to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from spire_hw.aio.alarm import Alarm
from spire_hw.aio.backoff import Backoff
from spire_hw.errors import (
    DeniedError,
    DeniedReason,
    ErrorKind,
    SpireHwError,
    VerificationError,
)
from spire_hw.posture.verdict import NodeState
from spire_hw.transport.tls import TlsIdentity

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_agent.enroll import AgentSvid, Enroller
    from spire_hw_agent.storage import Storage
    from spire_hw_agent.trust import Trust
    from spire_hw_agent.upstream.client import Upstream
    from spire_hw_agent.upstream.posture import Standing

_CHECK_INTERVAL_S: Final = 5.0
_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 60.0
# A server that is away is tried more often than one that answered: to find it back costs it nothing.
_MAX_ABSENCE_S: Final = 10.0

# What the server says about this node: trying again cannot help before somebody changes something.
_FINAL: Final = frozenset(
    {ErrorKind.PERMISSION_DENIED, ErrorKind.INVALID_ARGUMENT, ErrorKind.UNAUTHENTICATED}
)


def is_final(error: SpireHwError) -> bool:
    """Tell whether a failed attestation is a verdict on this node.

    An answer of the server that does not hold is none: the next one may.
    """
    return error.kind in _FINAL and not isinstance(error, VerificationError)


def _most_s(error: SpireHwError) -> float:
    return _MAX_ABSENCE_S if error.kind is ErrorKind.UNAVAILABLE else _MAX_BACKOFF_S


class AgentIdentity:
    """The agent's SVID over its life.

    Args:
        on_end: told the reason when the agent must stop: banned, or not able to come back.
        on_lost: told when the identity is gone and what was issued under it must go too.
        on_new: told after every new SVID.
        on_new_trust: told when the server is known by other authorities than before.
    """

    def __init__(
        self,
        enroller: Enroller,
        upstream: Upstream,
        trust: Trust,
        storage: Storage,
        *,
        clock: Clock,
        log: Logger,
        on_end: Callable[[SpireHwError], None],
        on_lost: Callable[[], None],
        on_new: Callable[[], None],
        on_new_trust: Callable[[], None],
    ) -> None:
        self._enroller = enroller
        self._upstream = upstream
        self._trust = trust
        self._storage = storage
        self._clock = clock
        self._log = log
        self._on_end = on_end
        self._on_lost = on_lost
        self._on_new = on_new
        self._on_new_trust = on_new_trust
        self._current: AgentSvid | None = None
        self._standing: Standing | None = None
        self._tainted_too = ""
        self._alarm = Alarm(clock)
        self._lock = asyncio.Lock()

    @property
    def current(self) -> AgentSvid | None:
        """Return the SVID in use, None while there is none."""
        return self._current

    def is_alive(self) -> bool:
        """Tell whether the agent holds an SVID that has not expired."""
        return self._current is not None and self._clock.now() < self._current.not_after

    async def start(self) -> None:
        """Take up the stored SVID or enrol, trying again while the server is away.

        Raises:
            SpireHwError: the server refused this node for good.
        """
        stored = await self._enroller.load()
        if stored is not None:
            await self._use(stored)
            return
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        while True:
            try:
                await self._use(await self._enroller.attest(None))
            except SpireHwError as e:
                if is_final(e):
                    raise
                wait = backoff.next_s(_most_s(e))
                self._log.warning(
                    "Failed to attest, trying again", error=e.message, retry_in_s=round(wait, 1)
                )
            else:
                return
            await self._clock.sleep(wait)

    async def _use(self, svid: AgentSvid) -> None:
        await self._upstream.use_identity(
            TlsIdentity(
                chain_der=svid.chain, signer=svid.signer, version=self._upstream.version + 1
            )
        )
        self._current = svid
        self._log.info(
            "Agent SVID in use",
            spiffe_id=str(svid.spiffe_id),
            expires_at=svid.not_after.isoformat(),
            key_id=svid.signer.info.key_id,
            reattestable=svid.reattestable,
        )
        self._on_new()

    async def run(self) -> None:
        """Renew when due, for ever; ends when the node was refused."""
        backoff = Backoff(_CHECK_INTERVAL_S, _MAX_BACKOFF_S)
        while True:
            wait = _CHECK_INTERVAL_S
            is_asked = self._is_asked
            try:
                await self.renew_if_due()
                if is_asked:  # maybe once more: what it gave need not be what the server wants
                    wait = backoff.next_s()
                else:
                    backoff.reset()
            except SpireHwError as e:
                if self._is_end(e):
                    return
                self._log.error("Failed to renew the agent SVID", error=e.message)
                wait = backoff.next_s(_most_s(e))
            await self._alarm.sleep(wait)

    async def renew_if_due(self) -> None:
        """Renew or attest again when half of the SVID's life is over, or there is none.

        Raises:
            SpireHwError: it was due and failed.
        """
        async with self._lock:
            svid = self._current
            if svid is None or self._trust.is_rebootstrap_due():
                await self._attest_again()
            elif not (
                self._is_due(svid)
                or (self._is_asked and svid.reattestable)
                or await self._lost_key(svid)
            ):
                return
            elif svid.reattestable:
                await self._attest_again()
            else:
                await self._use(await self._enroller.renew(svid))
            self._note_taint()

    @property
    def _is_quarantined(self) -> bool:
        return self._standing is not None and self._standing.state is NodeState.QUARANTINED

    @property
    def _is_asked(self) -> bool:
        """Tell whether to attest again because of what the server said; it may heal the node."""
        standing = self._standing
        return standing is not None and (standing.reattest or self._is_quarantined)

    async def _lost_key(self, svid: AgentSvid) -> bool:
        """Tell whether to attest again because the key is gone."""
        if not svid.reattestable or await self._enroller.holds_key(svid):
            return False
        self._log.warning("The key of the agent SVID is gone, the agent attests again")
        return True

    def _is_due(self, svid: AgentSvid) -> bool:
        is_tainted = (
            svid.authority_id in self._trust.tainted() and svid.authority_id != self._tainted_too
        )
        return is_tainted or self._clock.now() >= svid.renew_at

    def _note_taint(self) -> None:
        """A server that goes on signing with a tainted authority is not asked over and over."""
        svid = self._current
        if svid is not None and svid.authority_id in self._trust.tainted():
            self._tainted_too = svid.authority_id
            self._log.warning("The server still signs with a tainted authority")

    async def _attest_again(self) -> None:
        before = self._trust.bundle
        await self._use(await self._enroller.attest(self._current))
        if self._standing is not None:
            self._standing = replace(self._standing, reattest=False)
        after = self._trust.bundle
        if before is not None and after is not None:
            known = {root.der for root in before.x509_authorities}
            if known.isdisjoint(root.der for root in after.x509_authorities):
                self._log.warning("The server is known by other authorities from now on")
                self._on_new_trust()

    def _is_end(self, error: SpireHwError) -> bool:
        """End the agent when nothing it can do by itself brings its identity back."""
        svid = self._current
        if isinstance(error, DeniedError) and error.reason is DeniedReason.AGENT_BANNED:
            self._lose(self._banned())
            return True
        if is_final(error) and (svid is None or svid.reattestable) and not self._is_watched(svid):
            self._lose(
                DeniedError(
                    f"this node lost its identity and the server does not let it attest again "
                    f"({error.message}); see to that or enrol the node again, e.g. with a new join "
                    "token, and start the agent"
                )
            )
            return True
        if isinstance(error, DeniedError) and error.reason is not None:
            self._forget(error.reason)
            return False
        if svid is not None and not svid.reattestable and not self.is_alive():
            self._on_end(
                SpireHwError(
                    f"agent SVID expired at {svid.not_after.isoformat()} and could not be renewed "
                    f"({error.message}); enrol the node again, e.g. with a new join token",
                    kind=error.kind,
                )
            )
            return True
        return False

    def _is_watched(self, svid: AgentSvid | None) -> bool:
        """Tell whether a refused attestation is left to the server's word on the node's state.

        A machine that policy does not allow now may be allowed later, by itself or by another
        policy; what ends the agent then is a ban.
        """
        return self._is_quarantined or (self._standing is not None and svid is not None)

    def follow(self, standing: Standing | None) -> None:
        """React to what the server says of this node; None when it knows no states."""
        self._standing = standing
        if standing is not None and standing.state is NodeState.BANNED:
            self._lose(self._banned())

    async def denied(self, error: DeniedError, version: int) -> None:
        """React to the server's verdict on this agent, whichever call brought it.

        Args:
            error: the verdict.
            version: `Upstream.version` when the call was made: verdicts on earlier SVIDs are late.
        """
        if error.reason is None or version != self._upstream.version:
            return
        if error.reason is DeniedReason.AGENT_BANNED:
            self._lose(self._banned())
            return
        async with self._lock:
            if version != self._upstream.version:
                return
            self._forget(error.reason)
            await self._upstream.use_identity(None)

    def _banned(self) -> DeniedError:
        who = "this node" if self._current is None else str(self._current.spiffe_id)
        return DeniedError(
            f"the server banned {who}; to let it attest again an operator runs "
            "`spire-hw-server agent evict` there",
            DeniedReason.AGENT_BANNED,
        )

    def _forget(self, reason: DeniedReason) -> None:
        """Drop the SVID and have the other loop attest again."""
        self._log.warning("The server wants this agent to attest again", reason=reason.name)
        self._drop()
        self._alarm.ring()

    def _drop(self) -> None:
        self._current = None
        try:
            self._storage.drop_svid()
        except SpireHwError as e:
            self._log.error("The agent SVID cannot be removed", error=e.message)

    def _lose(self, error: SpireHwError) -> None:
        self._log.error("The server refused this node for good", error=error.message)
        self._drop()
        self._on_lost()
        self._on_end(error)

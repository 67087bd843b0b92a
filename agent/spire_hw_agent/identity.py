"""Keeps the agent's own SVID alive: enrols, renews at half of its life, attests again when told to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from spire_hw.aio.backoff import Backoff
from spire_hw.errors import DeniedError, DeniedReason, ErrorKind, SpireHwError
from spire_hw.transport.tls import TlsIdentity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_agent.enroll import AgentSvid, Enroller
    from spire_hw_agent.storage import Storage
    from spire_hw_agent.upstream import Upstream

_CHECK_INTERVAL_S = 5.0
_MAX_BACKOFF_S = 60.0

# Trying again cannot help before somebody changes something.
_FINAL = frozenset(
    {ErrorKind.PERMISSION_DENIED, ErrorKind.INVALID_ARGUMENT, ErrorKind.UNAUTHENTICATED}
)


class AgentIdentity:
    """The agent's SVID over its life.

    Args:
        on_end: told the reason when the agent must stop: banned, or not able to come back.
        on_lost: told when the identity is gone and what was issued under it must go too.
    """

    def __init__(
        self,
        enroller: Enroller,
        upstream: Upstream,
        storage: Storage,
        *,
        clock: Clock,
        log: Logger,
        on_end: Callable[[SpireHwError], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._enroller = enroller
        self._upstream = upstream
        self._storage = storage
        self._clock = clock
        self._log = log
        self._on_end = on_end
        self._on_lost = on_lost
        self._current: AgentSvid | None = None
        self._version = 0
        self._lock = asyncio.Lock()

    @property
    def current(self) -> AgentSvid | None:
        """Return the SVID in use, None before enrolment."""
        return self._current

    def is_alive(self) -> bool:
        """Tell whether the agent holds an SVID that has not expired."""
        return self._current is not None and self._clock.now() < self._current.not_after

    async def start(self) -> AgentSvid:
        """Take up the stored SVID or enrol, trying again while the server is away.

        Raises:
            SpireHwError: the server refused this node for good.
        """
        stored = await self._enroller.load()
        if stored is not None:
            await self._use(stored)
            return stored
        await self._upstream.use_identity(None)
        svid = await self._retry("attest", lambda: self._enroller.attest(None))
        await self._use(svid)
        return svid

    async def _retry(self, what: str, attempt: Callable[[], Awaitable[AgentSvid]]) -> AgentSvid:
        backoff = Backoff(1.0, _MAX_BACKOFF_S)
        while True:
            try:
                return await attempt()
            except SpireHwError as e:
                if e.kind in _FINAL:
                    raise
                wait = backoff.next_s()
                self._log.warning(
                    f"Failed to {what}, trying again", error=e.message, retry_in_s=round(wait, 1)
                )
            await self._clock.sleep(wait)

    async def _use(self, svid: AgentSvid) -> None:
        self._version += 1
        await self._upstream.use_identity(
            TlsIdentity(chain_der=svid.chain, signer=svid.signer, version=self._version)
        )
        self._current = svid
        self._log.info(
            "Agent SVID in use",
            spiffe_id=str(svid.spiffe_id),
            expires_at=svid.not_after.isoformat(),
            key_id=svid.signer.info.key_id,
            reattestable=svid.reattestable,
        )

    async def run(self) -> None:
        """Renew when due, for ever."""
        backoff = Backoff(_CHECK_INTERVAL_S, _MAX_BACKOFF_S)
        while True:
            wait = _CHECK_INTERVAL_S
            try:
                await self.renew_if_due()
                backoff.reset()
            except DeniedError as e:
                await self.denied(e)
                wait = backoff.next_s()
            except SpireHwError as e:
                self._log.error("Failed to renew the agent SVID", error=e.message)
                self._end_if_lost(e)
                wait = backoff.next_s()
            await self._clock.sleep(wait)

    async def renew_if_due(self) -> None:
        """Renew or attest again when half of the SVID's life is over.

        Raises:
            SpireHwError: it was due and failed.
        """
        async with self._lock:
            svid = self._current
            if svid is None:
                await self._attest_again()
            elif self._clock.now() >= svid.renew_at:
                if svid.reattestable:
                    await self._attest_again()
                else:
                    await self._use(await self._enroller.renew(svid))

    def _end_if_lost(self, error: SpireHwError) -> None:
        """An expired SVID that cannot be had by attesting again is the end."""
        svid = self._current
        if svid is not None and not svid.reattestable and not self.is_alive():
            self._on_end(
                SpireHwError(
                    f"agent SVID expired at {svid.not_after.isoformat()} and could not be renewed "
                    f"({error.message}); enrol the node again, e.g. with a new join token",
                    kind=error.kind,
                )
            )

    async def _attest_again(self) -> None:
        # Attestation needs no client certificate; a dead one would only be in its way.
        await self._upstream.use_identity(None)
        try:
            svid = await self._enroller.attest(self._current)
        except DeniedError as e:
            # The server decided about this node, not about a call: that is final.
            self._lose(e)
            raise SpireHwError(e.message, kind=e.kind) from e
        except SpireHwError:
            if self._current is not None and self.is_alive():
                await self._use(self._current)
            raise
        await self._use(svid)

    async def denied(self, error: DeniedError) -> None:
        """React to the server's verdict on this agent, whichever call brought it."""
        if error.reason is None:
            self._log.error("The server refused a call", error=error.message)
            return
        if error.reason is DeniedReason.AGENT_BANNED:
            self._lose(error)
            return
        async with self._lock:
            svid = self._current
            self._log.warning("The server wants this agent to attest again", reason=error.reason)
            await asyncio.to_thread(self._storage.drop_svid)
            self._current = None
            try:
                await self._upstream.use_identity(None)
                await self._use(await self._enroller.attest(svid))
            except SpireHwError as e:
                self._log.error("Failed to attest again", error=e.message)
                if e.kind in _FINAL or e.kind is ErrorKind.FAILED_PRECONDITION:
                    self._lose(e)

    def _lose(self, error: SpireHwError) -> None:
        self._storage.drop_svid()
        self._current = None
        self._on_lost()
        self._on_end(error)

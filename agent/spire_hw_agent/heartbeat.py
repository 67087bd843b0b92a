"""Keeps a stream to the server open on which it asks, now and then, for the state of this machine.

One stream for each SVID: it is bound to the key of the connection it runs on. Nothing else of the
agent waits for it, and a server that does not know heartbeats is left alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any, Final

from spire_hw.aio.backoff import Backoff
from spire_hw.aio.tasks import Tasks
from spire_hw.bootid import read_boot_id
from spire_hw.errors import DeniedError, ErrorKind, NotReadyError, SpireHwError, UnavailableError
from spire_hw.key import spki_der
from spire_hw.svid.x509svid import parse_x509_svid
from spire_hw_agent.upstream.posture import Standing

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatSource
    from spire_hw.transport.tls import TlsIdentity
    from spire_hw_agent.upstream.client import Upstream
    from spire_hw_agent.upstream.posture import Asked, HeartbeatStream

_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 60.0
_MAX_ABSENCE_S: Final = 10.0
# A server without heartbeats is asked again this late, or with the next SVID.
_UNKNOWN_S: Final = 3600.0
_GRACE_S: Final = 5.0
_ANSWER_S: Final = 30.0
_MAX_ANSWER_S: Final = 300.0


class Heartbeat:
    """The agent's end of heartbeats; `run` for ever.

    Args:
        source: answers challenges; None when the node attestor has no such ability, then states
            alone are listened to.
        on_standing: told what the server thinks of this node, each time it says so; None when the
            server does not know heartbeats.
        on_denied: told about a refusal, and about which version of the identity.
    """

    def __init__(
        self,
        upstream: Upstream,
        source: HeartbeatSource | None,
        *,
        clock: Clock,
        log: Logger,
        on_standing: Callable[[Standing | None], None],
        on_denied: Callable[[DeniedError, int], Coroutine[Any, Any, None]],
    ) -> None:
        self._upstream = upstream
        self._source = source
        self._clock = clock
        self._log = log
        self._on_standing = on_standing
        self._on_denied = on_denied
        self._tasks = Tasks(self._failed)
        self._was_heard = False
        self._is_lost = False
        self._is_unknown = False

    async def run(self) -> None:
        """Keep a stream open under whatever identity the agent has."""
        try:
            while True:
                await self._under_one_identity()
        finally:
            await self._tasks.close()

    async def _under_one_identity(self) -> None:
        seen, identity = self._upstream.identity.version, self._upstream.identity.value
        async with asyncio.TaskGroup() as group:
            tasks: set[asyncio.Task[Any]] = set()
            tasks.add(group.create_task(self._upstream.identity.wait(seen)))
            if identity is not None:
                tasks.add(group.create_task(self._keep(identity)))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()

    async def _keep(self, identity: TlsIdentity) -> None:
        """Open a stream again and again; ends only when cancelled."""
        spki = spki_der(parse_x509_svid(identity.chain_der).public_key)
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        while True:
            version = self._upstream.version
            self._was_heard = False
            most_s = _MAX_BACKOFF_S
            try:
                async with self._upstream.heartbeat() as stream:
                    await self._converse(stream, hashlib.sha256(spki).digest())
            except SpireHwError as e:
                self._lost(e)
                if e.kind is ErrorKind.UNIMPLEMENTED:
                    self._on_standing(None)
                    await self._clock.sleep(_UNKNOWN_S)
                elif isinstance(e, DeniedError):
                    # It may end this very stream's identity, and has to get through with that.
                    await asyncio.shield(self._tasks.spawn("denied", self._on_denied(e, version)))
                elif e.kind is ErrorKind.UNAVAILABLE:
                    most_s = _MAX_ABSENCE_S
                    if self._was_heard:
                        backoff.reset()
            await self._clock.sleep(backoff.next_s(most_s))

    def _lost(self, error: SpireHwError) -> None:
        """Log the first of a row of failures; streams end with their connections all the time."""
        if error.kind is ErrorKind.UNIMPLEMENTED:
            if not self._is_unknown:
                self._log.info("The server does not ask for heartbeats")
            self._is_unknown = True
        elif self._is_lost or (self._was_heard and error.kind is ErrorKind.UNAVAILABLE):
            self._log.debug("Heartbeat stream ended", error=error.message)
        else:
            self._log.warning("Heartbeat stream failed", error=error.message)
            self._is_lost = True

    async def _converse(self, stream: HeartbeatStream, spki_sha256: bytes) -> None:
        """Listen to one stream until it ends.

        Raises:
            SpireHwError: it ended.
        """
        boot_id = await asyncio.to_thread(read_boot_id) or ""
        await stream.hello(boot_id, can_answer=self._source is not None)
        tasks = Tasks(self._failed)
        answering: asyncio.Task[None] | None = None
        patience_s: float | None = None
        try:
            while True:
                async with asyncio.timeout(patience_s):
                    message = await stream.receive()
                if message is None:
                    raise UnavailableError("the server ended the heartbeat stream")
                self._was_heard, self._is_lost, self._is_unknown = True, False, False
                if isinstance(message, Standing):
                    patience_s = None if message.next_s is None else 2 * message.next_s + _GRACE_S
                    self._on_standing(message)
                    continue
                patience_s = None
                if answering is not None:
                    # It may have been answered this very moment; servers ask for more then.
                    await asyncio.wait({answering}, timeout=_GRACE_S)
                    if not answering.done():
                        raise SpireHwError("server sent a challenge before the last was answered")
                answering = tasks.spawn("answer", self._answer(stream, message, spki_sha256))
        except TimeoutError:
            raise UnavailableError("no heartbeat came when one was due") from None
        finally:
            await tasks.close()

    async def _answer(self, stream: HeartbeatStream, asked: Asked, spki_sha256: bytes) -> None:
        """Answer one challenge, or say why not."""
        self._log.debug("The server asks for a heartbeat")
        try:
            answer = await self._quote(asked, spki_sha256)
        except SpireHwError as e:
            self._log.warning("Failed to answer a heartbeat", error=e.message)
            await stream.cannot_answer(e.message)
        else:
            await stream.answer(answer)

    async def _quote(self, asked: Asked, spki_sha256: bytes) -> HeartbeatAnswer:
        if self._source is None:
            raise NotReadyError("the node attestor cannot answer heartbeats")
        try:
            # Early enough to say so.
            async with asyncio.timeout(0.9 * min(asked.timeout_s or _ANSWER_S, _MAX_ANSWER_S)):
                return await self._source.heartbeat(asked.challenge, spki_sha256)
        except TimeoutError:
            raise UnavailableError("the machine did not answer in time") from None

    def _failed(self, name: str, error: BaseException) -> None:
        known = isinstance(error, SpireHwError)
        self._log.error(
            "A heartbeat task failed",
            task=name,
            error=str(error),
            exc_info=None if known else error,
        )

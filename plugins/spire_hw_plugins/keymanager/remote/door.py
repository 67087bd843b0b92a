"""The way to one signer: its channel, made anew when certificate, key or CA files change."""

from __future__ import annotations

import asyncio
import ssl
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from google.protobuf.message import Message

from spire_hw.aio.tasks import Tasks
from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError, VerificationError
from spire_hw.rpc.client import Channel, connect, connect_unix
from spire_hw.rpc.status import from_code
from spire_hw.transport.dialer import Dialer
from spire_hw_plugins.keymanager.remote import wire
from spire_hw_plugins.keymanager.remote.papers import Papers, check_named, read_papers, stamp_of

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_plugins.keymanager.remote.config import Address, TlsFiles

M = TypeVar("M", bound=Message)

_LOOK_S: Final = 1.0  # between two looks at the files
_RETIRE_S: Final = 30.0  # for calls on a channel whose certificate was replaced
_CONNECT_S: Final = 5.0


class Door:
    """Calls to one signer; close it when done."""

    def __init__(
        self, address: Address, tls: TlsFiles | None, *, clock: Clock, log: Logger
    ) -> None:
        self.name = address.name
        self._address = address
        self._tls = tls
        self._clock = clock
        self._log = log
        self._channel: Channel | None = None
        self._papers: Papers | None = None
        self._stamp: object = None
        self._looked_at = float("-inf")
        self._lock = asyncio.Lock()
        self._tasks = Tasks(self._failed)
        self._retired: list[Channel] = []

    async def call(
        self, path: str, request: Message, response_type: type[M], timeout_s: float
    ) -> M:
        """Call a method.

        Raises:
            SpireHwError: UNAUTHENTICATED when one of the two certificates will not do, UNAVAILABLE
                when the signer is away, DEADLINE_EXCEEDED, or what the signer says.
        """
        channel = self._channel
        if channel is None or self._is_time_to_look():
            channel = await self._current()
        try:
            return await channel.unary(path, request, response_type, timeout_s)
        except SpireHwError as e:
            raise self._explained(channel, e) from e

    async def close(self) -> None:
        """End all connections."""
        await self._tasks.close()
        channels, self._retired = self._retired, []
        if self._channel is not None:
            channels.append(self._channel)
            self._channel = None
        for channel in channels:
            await channel.close()

    @property
    def expires_at(self) -> datetime | None:
        """Return when our certificate ends; None on a socket and before the first call."""
        return None if self._papers is None else self._papers.expires_at

    def _is_time_to_look(self) -> bool:
        return self._tls is not None and self._clock.monotonic() - self._looked_at >= _LOOK_S

    async def _current(self) -> Channel:
        """Return the channel for what the files hold now."""
        async with self._lock:
            if self._channel is not None and not self._is_time_to_look():
                return self._channel  # another call was quicker
            self._looked_at = self._clock.monotonic()
            if self._tls is not None:
                self._channel = await self._channel_with(self._tls)
            elif self._channel is None:
                limit = wire.MAX_RESPONSE_BYTES
                self._channel = connect_unix(self._address.socket, max_response_bytes=limit)
            return self._channel

    async def _channel_with(self, tls: TlsFiles) -> Channel:
        stamp = await asyncio.to_thread(stamp_of, tls)
        if self._channel is not None and stamp == self._stamp:
            return self._channel
        try:
            papers = await asyncio.to_thread(read_papers, tls)
        except SpireHwError as e:
            if self._channel is None:
                raise
            self._stamp = stamp  # said once, and tried again after the next change
            self._log.warning(
                "files for the signer are not usable, the old ones are", error=e.message
            )
            return self._channel
        dialer = Dialer(
            self._address.host,
            self._address.port,
            server_id=tls.signer_id,
            bundle=papers.bundle_for(tls.signer_id),
            on_chain=partial(self._check_name, papers) if tls.signer_name else None,
            identity=papers.identity,
            least=ssl.TLSVersion.TLSv1_3,
            connect_s=_CONNECT_S,
            handshake_s=_CONNECT_S,
            clock=self._clock,
            log=self._log,
        )
        made = await connect(dialer, max_response_bytes=wire.MAX_RESPONSE_BYTES)
        if self._channel is not None:
            self._retire(self._channel)
            self._log.info("certificate for the signer was replaced", until=str(papers.expires_at))
        self._stamp, self._papers = stamp, papers
        return made

    def _check_name(self, papers: Papers, chain: tuple[bytes, ...]) -> None:
        """Refuse a server that is not the named one; the dialer asks before a byte is sent."""
        if self._tls is not None:
            check_named(chain, papers.roots, self._tls.signer_name, self._clock.now())

    def _explained(self, channel: Channel, error: SpireHwError) -> SpireHwError:
        """Return what is to be said about a call that failed."""
        if error.kind not in {ErrorKind.UNAVAILABLE, ErrorKind.UNAUTHENTICATED}:
            return _named(self.name, error)
        if self._papers is not None and self._papers.expires_at <= self._clock.now():
            return SpireHwError(
                f"signer {self.name}: our client certificate expired at {self._papers.expires_at}; "
                f"put a new one into {self._tls.cert if self._tls else ''}",
                kind=ErrorKind.UNAUTHENTICATED,
            )
        cause = None if channel.dialer is None else channel.dialer.last_error
        if isinstance(cause, VerificationError):
            return SpireHwError(
                f"signer {self.name}: {cause.message}; check signer_ca and signer_id or signer_name",
                kind=ErrorKind.UNAUTHENTICATED,
            )
        return _named(self.name, error if cause is None else UnavailableError(cause.message))

    def _retire(self, channel: Channel) -> None:
        self._retired.append(channel)
        self._tasks.start("retire channel", self._end(channel))

    async def _end(self, channel: Channel) -> None:
        await self._clock.sleep(_RETIRE_S)
        self._retired.remove(channel)
        await channel.close()

    def _failed(self, name: str, error: BaseException) -> None:
        self._log.error("task failed", task=name, exc_info=error)


def _named(name: str, error: SpireHwError) -> SpireHwError:
    return from_code(error.kind.value, f"signer {name}: {wire.clean(error.message)}")

"""This server's own X509-SVID, shown on the TCP port; its key never leaves memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.aio.watch import Watch
from spire_hw.errors import NotReadyError, SpireHwError
from spire_hw.key import KeyType, PrivateKey, generate_private_key, spki_der
from spire_hw.telemetry.metrics import NO_METRICS, Timed
from spire_hw.transport.tls import TlsIdentity

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.ca.authority import Issuer

CHECK_INTERVAL_S: Final = 5.0
_ROTATE: Final = ("svid", "rotate")


@dataclass(frozen=True, slots=True)
class ServerSvid:
    """The SVID with its key.

    Attributes:
        chain: DER, leaf first.
        authority_id: who signed it.
        tls: the same for the TCP front; its version grows with each renewal.
    """

    chain: tuple[bytes, ...]
    private_key: PrivateKey
    issued_at: datetime
    not_after: datetime
    authority_id: str
    tls: TlsIdentity

    def due(self, now: datetime) -> bool:
        """Tell whether half of its life is over."""
        return now >= self.issued_at + (self.not_after - self.issued_at) / 2


class ServerIdentity:
    """Keeps the server's SVID fresh."""

    def __init__(
        self,
        issuer: Issuer,
        key_type: KeyType,
        *,
        is_tainted: Callable[[str], bool],
        clock: Clock,
        log: Logger,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """Make it; `renew` gets the first SVID.

        Args:
            issuer: who signs.
            key_type: of the TLS key.
            is_tainted: tells whether an authority is tainted, by its id.
            clock: the server's time.
            log: where renewals are noted.
            metrics: takes them down.
        """
        self._issuer = issuer
        self._is_tainted = is_tainted
        self._key_type = key_type
        self._clock = clock
        self._log = log
        self._metrics = metrics
        self._svid: Watch[ServerSvid | None] = Watch(None)

    @property
    def svid(self) -> ServerSvid:
        """Return the current SVID.

        Raises:
            NotReadyError: before the first `renew`.
        """
        if self._svid.value is None:
            raise NotReadyError("the server has no SVID yet")
        return self._svid.value

    @property
    def watch(self) -> Watch[ServerSvid | None]:
        """Return the SVID to be watched."""
        return self._svid

    def tls_identity(self) -> TlsIdentity:
        """Return what the TCP front shows now."""
        return self.svid.tls

    async def renew(self) -> None:
        """Get a new SVID for a new key.

        Raises:
            SpireHwError: it could not be signed.
        """
        with Timed(self._metrics, _ROTATE):
            await self._renew()

    async def _renew(self) -> None:
        key = await asyncio.to_thread(generate_private_key, self._key_type)
        issued_at = self._clock.now()
        authority_id = self._issuer.x509.authority_id
        issued = await self._issuer.server_svid(spki_der(key.public_key()))
        tls = TlsIdentity(issued.chain, private_key=key, version=self._svid.version + 1)
        self._svid.set(
            ServerSvid(issued.chain, key, issued_at, issued.not_after, authority_id, tls)
        )
        self._log.info(
            "server SVID signed",
            serial_number=str(issued.serial),
            expiration=issued.not_after.isoformat(),
        )

    async def tick(self) -> None:
        """Renew when due; a failure is logged and tried again at the next tick."""
        svid = self.svid
        if not svid.due(self._clock.now()) and not self._is_tainted(svid.authority_id):
            return
        try:
            await self.renew()
        except SpireHwError as e:
            self._log.error("could not rotate the server SVID", error=e.message)

    async def run(self) -> None:
        """Look every five seconds; ends only when cancelled."""
        while True:
            await self._clock.sleep(CHECK_INTERVAL_S)
            await self.tick()

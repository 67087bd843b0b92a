"""X.509 authorities that are signed by hand, under a root that is kept offline.

The server makes the key and a request for it, somebody signs it elsewhere, the server takes what came
back. Until then the key waits in the slot of the next authority.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spire_hw.errors import NotReadyError, UnavailableError
from spire_hw.x509.csr import build_csr
from spire_hw_server.ca.minted import check_imported
from spire_hw_server.ca.slots import activation_due

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import Keys, ManagedSigner
    from spire_hw.spiffeid import TrustDomain
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.ca.authority import Issuer
    from spire_hw_server.ca.journal import X509Record
    from spire_hw_server.ca.line import X509Line
    from spire_hw_server.ca.mark import AuthorityMark
    from spire_hw_server.ca.succession import Succession


@dataclass(frozen=True, slots=True)
class CaRequest:
    """A request for a CA certificate, to be signed by hand.

    Attributes:
        csr: DER.
        key_id: its key in the KeyManager.
        due_at: when the server makes the next authority itself, None when it does not.
    """

    csr: bytes
    key_id: str
    due_at: datetime | None


class ByHand:
    """Asks for certificates and takes them; the callers see to it that there is one step at a time."""

    def __init__(
        self,
        line: X509Line,
        succession: Succession,
        *,
        keys: Keys,
        issuer: Issuer,
        bundles: Bundles,
        mark: AuthorityMark,
        trust_domain: TrustDomain,
        has_upstream: bool,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._line = line
        self._succession = succession
        self._keys = keys
        self._issuer = issuer
        self._bundles = bundles
        self._mark = mark
        self._trust_domain = trust_domain
        self._has_upstream = has_upstream
        self._clock = clock
        self._log = log

    async def restore(self, listed: Mapping[str, ManagedSigner]) -> None:
        """Remember the request that was made before a restart, if its key still waits.

        Args:
            listed: the KeyManager's keys, by key id.

        Raises:
            SpireHwError: its file cannot be read.
        """
        line, asked = self._line, await asyncio.to_thread(self._mark.load_request)
        signer, beside = listed.get(line.key_id(line.slots.free_slot)), line.slots.next
        is_there = signer is not None and signer.info.fingerprint == asked
        is_used = beside is not None and line.holds(beside, listed)
        line.requested = asked if is_there and not is_used else ""

    async def request(self, *, replace: bool) -> CaRequest:
        """Make the key of the next authority and a request for it.

        Args:
            replace: give up an authority that is prepared.

        Raises:
            NotReadyError: an UpstreamAuthority signs the CA, or an authority waits already.
            SpireHwError: the KeyManager, the store or a file failed.
        """
        line, active = self._line, self._check()
        waiting = line.slots.prepared
        if waiting is not None and not replace:
            raise NotReadyError(
                f"authority {waiting.authority_id} is prepared and waits for its turn: activate it "
                "first, or give it up with -replace"
            )
        await self._succession.forget_old(line)
        key_id = line.key_id(line.slots.free_slot)
        signer = await self._keys.generate(key_id, line.key_type)
        subject = (await self._issuer.ca_subject()).subject
        csr = await build_csr(signer, spiffe_id=self._trust_domain.id, subject=subject)
        await asyncio.to_thread(self._mark.store_request, signer.info.fingerprint)
        line.requested = signer.info.fingerprint
        self._log.info("CA certificate asked for by hand", key_id=key_id)
        return CaRequest(csr, key_id, None if active.offline else activation_due(active))

    async def take(
        self, chain: tuple[bytes, ...], root: bytes, *, activate: bool = False
    ) -> X509Record:
        """Take a CA certificate that was signed for the key of the request.

        Args:
            chain: DER: the certificate, then intermediates; the root among them is passed over.
            root: DER of the root.
            activate: let it sign at once.

        Raises:
            NotReadyError: no request was made, or an UpstreamAuthority signs the CA.
            InvalidInputError: it is for another key, or does not lead to the root.
            SpireHwError: the KeyManager, the store or a file failed.
        """
        line = self._line
        self._check()
        key_id = line.key_id(line.slots.free_slot)
        if not line.requested:
            raise NotReadyError("no request was made: make one (spire-hw-server ca csr)")
        signer = await self._keys.get(key_id)
        if signer.info.fingerprint != line.requested:
            raise NotReadyError(
                f'the key "{key_id}" of the request was replaced meanwhile: make another request'
            )
        minted = await check_imported(
            chain,
            root,
            signer,
            bundle=self._bundles.own,
            trust_domain=self._trust_domain,
            now=self._clock.now(),
        )
        record = line.take(minted, line.slots.free_slot)
        await self._succession.take(line, record, signer)
        await asyncio.to_thread(self._mark.store_request, "")
        return await self._succession.activate(line, record.authority_id) if activate else record

    def _check(self) -> X509Record:
        if self._has_upstream:
            raise NotReadyError("an UpstreamAuthority signs this server's CA, nobody by hand")
        active = self._line.slots.active
        if active is None:
            raise UnavailableError("no X.509 authority is active yet")
        return active

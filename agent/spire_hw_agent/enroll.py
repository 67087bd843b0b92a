"""How a node gets its SVID: load the stored one, attest, renew; what the server says is checked.

Each function makes one try; when to try again is `spire_hw_agent.identity`'s business.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from spire_hw.errors import SpireHwError, VerificationError
from spire_hw.key import KeyType, spki_der
from spire_hw.plugin.nodeattestor import SvidKey
from spire_hw.spiffeid import SpiffeId, TrustDomain, check_agent_id
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.telemetry.metrics import NO_METRICS, Timed
from spire_hw.x509.certificate import issuing_authority_id
from spire_hw.x509.csr import build_csr

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import Keys, ManagedSigner
    from spire_hw.plugin.nodeattestor import AgentExchange, AgentNodeAttestor
    from spire_hw.svid.x509svid import X509Svid
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_agent.storage import Storage
    from spire_hw_agent.trust import Trust
    from spire_hw_agent.upstream.client import IssuedAgentSvid, Upstream

_KEY_IDS: Final = ("agent-svid-A", "agent-svid-B")
_SKEW: Final = timedelta(seconds=1)
_ROTATE: Final = ("agent_svid", "rotate")
_NEW_SVID: Final = ("node", "attestor", "new_svid")


@dataclass(frozen=True, slots=True)
class AgentSvid:
    """The agent's own X509-SVID together with its key.

    Attributes:
        chain: DER, leaf first.
        renew_at: when its successor is asked for.
        authority_id: of the root it chains to.
    """

    spiffe_id: SpiffeId
    chain: tuple[bytes, ...]
    renew_at: datetime
    not_after: datetime
    signer: ManagedSigner
    reattestable: bool
    authority_id: str


class Enroller:
    """Makes agent SVIDs out of a key manager, a node attestor and the server."""

    def __init__(
        self,
        *,
        trust_domain: TrustDomain,
        keys: Keys,
        attestor_name: str,
        attestor: AgentNodeAttestor,
        upstream: Upstream,
        trust: Trust,
        storage: Storage,
        clock: Clock,
        log: Logger,
        renew_at: Callable[[datetime, datetime], datetime],
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._metrics = metrics
        self._renew_at = renew_at
        self._trust_domain = trust_domain
        self._keys = keys
        self._attestor_name = attestor_name
        self._attestor = attestor
        self._upstream = upstream
        self._trust = trust
        self._storage = storage
        self._clock = clock
        self._log = log

    async def load(self) -> AgentSvid | None:
        """Return the stored SVID when it is alive and its key is at hand."""
        data = self._storage.load()
        if not data.svid or self._trust.bundle is None:
            return None
        try:
            svid = parse_x509_svid(data.svid)
            check_agent_id(svid.spiffe_id, self._trust_domain)
        except SpireHwError as e:
            self._log.warning("Stored agent SVID is unusable, it is dropped", error=e.message)
            return None
        if svid.not_after <= self._clock.now() + _SKEW:
            self._log.warning("Stored agent SVID has expired", expired_at=str(svid.not_after))
            return None
        wanted = spki_der(svid.public_key)
        for signer in await self._keys.list():
            if signer.info.key_id in _KEY_IDS and spki_der(signer.public_key) == wanted:
                return self._made(svid, signer, reattestable=data.reattestable)
        self._log.warning("The key of the stored agent SVID is gone, the agent attests again")
        return None

    async def holds_key(self, svid: AgentSvid) -> bool:
        """Tell whether the key of an SVID is still there; a TPM that was cleared has lost it.

        A key manager that cannot answer has lost nothing.
        """
        try:
            listed = await self._keys.list()
        except SpireHwError:
            return True
        wanted = spki_der(svid.signer.public_key)
        return any(spki_der(signer.public_key) == wanted for signer in listed)

    async def attest(self, current: AgentSvid | None) -> AgentSvid:
        """Attest this node and return its SVID, stored.

        Raises:
            DeniedError: the server does not want this node.
            VerificationError: the server's answer does not hold; nothing was stored.
            SpireHwError: anything else that went wrong.
        """
        if current is None:
            return await self._attest(None)
        with Timed(self._metrics, _ROTATE):
            return await self._attest(current)

    async def _attest(self, current: AgentSvid | None) -> AgentSvid:
        trusted = await self._trust.for_attestation()
        signer = await self._next_key(current)
        csr = await build_csr(signer, spiffe_id=None)
        svid_key = SvidKey(self._keys.manager, signer.info.key_id, signer.public_key)

        async def drive(exchange: AgentExchange) -> None:
            await self._attestor.aid_attestation(exchange, svid_key)

        with Timed(self._metrics, _NEW_SVID, {"attestor": self._attestor_name}):
            issued, bundle = await self._upstream.attest(self._attestor_name, csr, drive, trusted)
        return await self._accept(issued, bundle, signer)

    async def renew(self, current: AgentSvid) -> AgentSvid:
        """Renew an SVID without attestation, stored; errors as in `attest`."""
        with Timed(self._metrics, _ROTATE):
            signer = await self._next_key(current)
            issued = await self._upstream.renew(await build_csr(signer, spiffe_id=None))
            return await self._accept(issued, await self._upstream.get_bundle(), signer)

    async def _next_key(self, current: AgentSvid | None) -> ManagedSigner:
        """Make a key in the slot that the current SVID does not need."""
        used = current.signer.info.key_id if current is not None else None
        key_id = next(k for k in _KEY_IDS if k != used)
        return await self._keys.generate(key_id, KeyType.EC_P256)

    async def _accept(
        self, issued: IssuedAgentSvid, bundle: Bundle, signer: ManagedSigner
    ) -> AgentSvid:
        """Check what the server issued against the bundle it publishes, then store both."""
        try:
            svid = self._check(issued, bundle, signer)
        except SpireHwError as e:
            raise VerificationError(f"result: {e.message}") from e
        await self._trust.accept(bundle)
        await asyncio.to_thread(
            self._storage.store_svid, issued.chain, reattestable=issued.reattestable
        )
        return self._made(svid, signer, reattestable=issued.reattestable)

    def _check(self, issued: IssuedAgentSvid, bundle: Bundle, signer: ManagedSigner) -> X509Svid:
        now = self._clock.now()
        svid = parse_x509_svid(issued.chain)
        check_agent_id(svid.spiffe_id, self._trust_domain)
        if spki_der(svid.public_key) != spki_der(signer.public_key):
            raise VerificationError("certificate is not for our key")
        if svid.not_after <= now + _SKEW:
            raise VerificationError(f"certificate has expired at {svid.not_after.isoformat()}")
        # A clock that is slow must not keep the node out: validity begins when it was issued.
        verify_x509_svid(svid, {bundle.trust_domain: bundle}, max(now, svid.not_before))
        return svid

    def _made(self, svid: X509Svid, signer: ManagedSigner, *, reattestable: bool) -> AgentSvid:
        return AgentSvid(
            svid.spiffe_id,
            svid.chain,
            self._renew_at(svid.not_before, svid.not_after),
            svid.not_after,
            signer,
            reattestable,
            issuing_authority_id(svid.certificates),
        )

"""How a node gets its first SVID, and every SVID after it: bootstrap, attest, renew.

Each function makes one try; when to try again is `spire_hw_agent.identity`'s business.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp

from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.bundle.document import parse_document, parse_pem
from spire_hw.errors import (
    EncodingError,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import KeyType, spki_der
from spire_hw.plugin.nodeattestor import SvidKey
from spire_hw.spiffeid import SpiffeId, TrustDomain, check_agent_id
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.x509.csr import build_csr

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import Keys, ManagedSigner
    from spire_hw.plugin.nodeattestor import AgentExchange, AgentNodeAttestor
    from spire_hw_agent.config import AgentSettings
    from spire_hw_agent.storage import Storage
    from spire_hw_agent.upstream import IssuedAgentSvid, Upstream

_KEY_IDS = ("agent-svid-A", "agent-svid-B")
_MAX_BUNDLE_BYTES = 4 << 20
_FETCH_TIMEOUT_S = 30.0
_SKEW = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class AgentSvid:
    """The agent's own X509-SVID together with its key.

    Attributes:
        chain: DER, leaf first.
        renew_at: when its successor is asked for.
    """

    spiffe_id: SpiffeId
    chain: tuple[bytes, ...]
    renew_at: datetime
    not_after: datetime
    signer: ManagedSigner
    reattestable: bool


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
        storage: Storage,
        clock: Clock,
        log: Logger,
        renew_at: Callable[[datetime, datetime], datetime],
    ) -> None:
        self._renew_at = renew_at
        self._trust_domain = trust_domain
        self._keys = keys
        self._attestor_name = attestor_name
        self._attestor = attestor
        self._upstream = upstream
        self._storage = storage
        self._clock = clock
        self._log = log

    async def load(self) -> AgentSvid | None:
        """Return the stored SVID when it is alive and its key is at hand."""
        data = self._storage.load()
        if not data.svid:
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
                return AgentSvid(
                    svid.spiffe_id,
                    data.svid,
                    self._renew_at(svid.not_before, svid.not_after),
                    svid.not_after,
                    signer,
                    data.reattestable,
                )
        self._log.warning("The key of the stored agent SVID is gone, the agent attests again")
        return None

    async def attest(self, current: AgentSvid | None) -> AgentSvid:
        """Attest this node and return its SVID, stored.

        Raises:
            DeniedError: the server does not want this node.
            SpireHwError: anything else that went wrong.
        """
        signer = await self._next_key(current)
        csr = await build_csr(signer, spiffe_id=None)
        svid_key = SvidKey(self._keys.manager, signer.info.key_id, signer.public_key)

        async def drive(exchange: AgentExchange) -> None:
            await self._attestor.aid_attestation(exchange, svid_key)

        issued = await self._upstream.attest(self._attestor_name, csr, drive)
        return await self._accept(issued, signer)

    async def renew(self, current: AgentSvid) -> AgentSvid:
        """Renew an SVID without attestation, stored."""
        signer = await self._next_key(current)
        issued = await self._upstream.renew(await build_csr(signer, spiffe_id=None))
        return await self._accept(issued, signer)

    async def _next_key(self, current: AgentSvid | None) -> ManagedSigner:
        """Make a key in the slot that the current SVID does not need."""
        used = current.signer.info.key_id if current is not None else None
        key_id = next(k for k in _KEY_IDS if k != used)
        return await self._keys.generate(key_id, KeyType.EC_P256)

    async def _accept(self, issued: IssuedAgentSvid, signer: ManagedSigner) -> AgentSvid:
        """Check what the server issued against the bundle it publishes, then store both."""
        bundle = await self._upstream.get_bundle()
        svid = parse_x509_svid(issued.chain)
        check_agent_id(svid.spiffe_id, self._trust_domain)
        verify_x509_svid(svid.chain, {bundle.trust_domain: bundle}, self._clock.now())
        if spki_der(svid.public_key) != spki_der(signer.public_key):
            raise SpireHwError("server issued an SVID for another key")
        roots = tuple(root.der for root in bundle.x509_authorities)
        await asyncio.to_thread(self._storage.store_bundle, roots)
        await asyncio.to_thread(
            self._storage.store_svid, issued.chain, reattestable=issued.reattestable
        )
        return AgentSvid(
            svid.spiffe_id,
            issued.chain,
            self._renew_at(svid.not_before, svid.not_after),
            svid.not_after,
            signer,
            issued.reattestable,
        )


async def bootstrap_bundle(settings: AgentSettings, storage: Storage, log: Logger) -> Bundle | None:
    """Return the bundle to trust the server by: the stored one, else the configured source's.

    Returns:
        None when insecure bootstrap was asked for.

    Raises:
        NotReadyError: no source, or what it gives is no bundle.
        UnavailableError: the URL cannot be fetched.
    """
    stored = storage.load().bundle
    if stored:
        return Bundle(settings.trust_domain, tuple(X509Root(der) for der in stored))
    if settings.trust_bundle_path is not None:
        raw = _read(settings.trust_bundle_path)
        return _parse(settings, raw, str(settings.trust_bundle_path))
    if settings.trust_bundle_url:
        raw = await _fetch(settings.trust_bundle_url, settings.trust_bundle_unix_socket)
        return _parse(settings, raw, settings.trust_bundle_url)
    if settings.insecure_bootstrap:
        log.warning(
            "INSECURE BOOTSTRAP: the server is trusted without proof on this first connection; "
            "anyone in between can take over this node. Use trust_bundle_path or trust_bundle_url."
        )
        return None
    raise NotReadyError(
        "no trust bundle: set trust_bundle_path or trust_bundle_url "
        "(`spire-hw-server bundle show` prints the bundle)"
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            raw = f.read(_MAX_BUNDLE_BYTES + 1)
    except FileNotFoundError as e:
        raise NotFoundError(f"trust bundle {path} does not exist") from e
    except OSError as e:
        raise NotReadyError(f"trust bundle {path} cannot be read: {e.strerror}") from e
    return _sized(raw, str(path))


async def _fetch(url: str, unix_socket: str) -> bytes:
    connector: Callable[[], aiohttp.BaseConnector] = aiohttp.TCPConnector
    if unix_socket:

        def connector() -> aiohttp.BaseConnector:
            return aiohttp.UnixConnector(unix_socket)

    timeout = aiohttp.ClientTimeout(total=_FETCH_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(connector=connector(), timeout=timeout) as session,
            # A redirect could leave https: the operator named the place, nobody else does.
            session.get(url, allow_redirects=False) as answer,
        ):
            if answer.status != HTTPStatus.OK:
                raise UnavailableError(f"trust bundle {url}: the server answers {answer.status}")
            raw = bytearray()
            async for chunk in answer.content.iter_chunked(1 << 16):
                raw += chunk
                _sized(raw, url)
            return bytes(raw)
    except (aiohttp.ClientError, TimeoutError, OSError) as e:
        raise UnavailableError(f"trust bundle {url} cannot be fetched: {e}") from e


def _sized(raw: bytes | bytearray, source: str) -> bytes:
    if len(raw) > _MAX_BUNDLE_BYTES:
        raise InvalidInputError(f"trust bundle {source} is larger than 4 MiB")
    return bytes(raw)


def _parse(settings: AgentSettings, raw: bytes, source: str) -> Bundle:
    parse = parse_document if settings.trust_bundle_format == "spiffe" else parse_pem
    try:
        bundle = parse(settings.trust_domain, raw)
    except EncodingError as e:
        raise InvalidInputError(f"trust bundle {source}: {e.message}") from e
    if not bundle.x509_authorities:
        raise InvalidInputError(f"trust bundle {source} holds no X.509 authority")
    return bundle

"""Whom the agent believes: the bundle it was given to start with, and every one it learnt since.

A bundle that a server sent over a verified connection is stored and outlives restarts. When the
server can no longer be verified by it, the configured source is asked again (rebootstrap).
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

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
from spire_hw.files import NoFileError, read_bounded
from spire_hw_agent.config import RebootstrapMode

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    import aiohttp

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_agent.config import AgentSettings
    from spire_hw_agent.storage import Storage

_MAX_BUNDLE_BYTES: Final = 4 << 20
_FETCH_TIMEOUT_S: Final = 30.0


class Trust:
    """The own trust domain's bundle over the agent's life.

    Attributes:
        distrusted_since: since when the server cannot be verified by the bundle, None while it can.
    """

    def __init__(
        self, settings: AgentSettings, storage: Storage, *, clock: Clock, log: Logger
    ) -> None:
        self._settings = settings
        self._storage = storage
        self._clock = clock
        self._log = log
        self.distrusted_since: datetime | None = None
        stored = storage.load().bundle
        self._bundle = (
            Bundle(settings.trust_domain, tuple(X509Root(der) for der in stored))
            if stored
            else None
        )

    @property
    def bundle(self) -> Bundle | None:
        """Return what was learnt from the server, in this run or an earlier one."""
        return self._bundle

    def tainted(self) -> frozenset[str]:
        """Return the ids of authorities whose certificates have to be replaced."""
        roots = self._bundle.x509_authorities if self._bundle is not None else ()
        return frozenset(root.authority_id for root in roots if root.tainted)

    async def accept(self, bundle: Bundle) -> None:
        """Believe a bundle from a verified server; stored before this returns.

        Raises:
            SpireHwError: it is another trust domain's, holds no authority, or cannot be stored.
        """
        if bundle == self._bundle:
            return
        if bundle.trust_domain != self._settings.trust_domain:
            raise SpireHwError(f"server sent the bundle of {bundle.trust_domain}")
        if not bundle.root_certificates():
            raise SpireHwError("server sent a bundle without a usable X.509 authority")
        await asyncio.to_thread(
            self._storage.store_bundle, tuple(root.der for root in bundle.x509_authorities)
        )
        self._bundle = bundle

    def distrust(self) -> None:
        """Note that the server's certificate was signed by nobody in the bundle."""
        if self.distrusted_since is None:
            self.distrusted_since = self._clock.now()
            self._log.warning(
                "The server's certificate is signed by an authority that is not in this agent's "
                "trust bundle",
                rebootstrap_mode=self._settings.rebootstrap_mode.value,
                rebootstrap_delay_s=self._settings.rebootstrap_delay.total_seconds(),
            )

    def trust_again(self) -> None:
        """Note that the server was verified."""
        self.distrusted_since = None

    def is_rebootstrap_due(self) -> bool:
        """Tell whether the mismatch has lasted long enough to ask the source again."""
        return (
            self._bundle is not None
            and self.distrusted_since is not None
            and self._settings.rebootstrap_mode is not RebootstrapMode.NEVER
            and self._clock.now() - self.distrusted_since >= self._settings.rebootstrap_delay
        )

    async def for_attestation(self) -> Bundle | None:
        """Return the bundle to verify the server by when this node attests.

        What was learnt is kept until an attestation under the source's bundle has succeeded: who
        merely stands in the way of the server cannot make the agent forget it.

        Returns:
            None when insecure bootstrap was asked for and nothing is known yet.

        Raises:
            NotReadyError: no source, or what it gives is no bundle.
            NotFoundError: the file of the source does not exist.
            UnavailableError: the URL of the source cannot be fetched.
        """
        if self._bundle is not None and not self.is_rebootstrap_due():
            return self._bundle
        if self._bundle is not None:
            self._log.warning("Bootstrapping again: the server is no longer known by the bundle")
        return await fetch_bundle(self._settings, self._log)


async def fetch_bundle(settings: AgentSettings, log: Logger) -> Bundle | None:
    """Return what the configured source gives; errors as in `Trust.for_attestation`."""
    if settings.trust_bundle_path is not None:
        return await asyncio.to_thread(read_bundle_file, settings, settings.trust_bundle_path)
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


def read_bundle_file(settings: AgentSettings, path: Path) -> Bundle:
    """Return the bundle in a file; errors as in `Trust.for_attestation`."""
    return _parse(settings, _read(path), str(path))


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, _MAX_BUNDLE_BYTES, "trust bundle", pipes=True)
    except NoFileError as e:
        raise NotFoundError(f"trust bundle {path} does not exist") from e
    except InvalidInputError as e:
        raise NotReadyError(e.message) from e


async def _fetch(url: str, unix_socket: str) -> bytes:
    import aiohttp  # noqa: PLC0415 - few agents bootstrap this way; it costs 9 MiB

    def connector() -> aiohttp.BaseConnector:
        return aiohttp.UnixConnector(unix_socket) if unix_socket else aiohttp.TCPConnector()

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
        raise NotReadyError(f"trust bundle {source} is larger than 4 MiB")
    return bytes(raw)


def _parse(settings: AgentSettings, raw: bytes, source: str) -> Bundle:
    parse = parse_document if settings.trust_bundle_format == "spiffe" else parse_pem
    try:
        bundle = parse(settings.trust_domain, raw)
    except (EncodingError, InvalidInputError) as e:
        raise NotReadyError(f"trust bundle {source}: {e.message}") from e
    if not bundle.x509_authorities:
        raise NotReadyError(f"trust bundle {source} holds no X.509 authority")
    return bundle

"""State changes posted as JSON, signed with a secret both ends know.

The receiver checks `X-Spire-Hw-Signature: sha256=<hex>`, an HMAC-SHA256 over the value of
`X-Spire-Hw-Timestamp` (seconds since the epoch), a dot, and the body; the time keeps an old message
from being played again.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import ssl
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, NotReadyError, UnavailableError
from spire_hw.files import read_bounded

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw_server.postureconfig import WebhookSettings

TIMESTAMP: Final = "X-Spire-Hw-Timestamp"
SIGNATURE: Final = "X-Spire-Hw-Signature"
_TIMEOUT_S: Final = 10.0
_LEAST_SECRET_BYTES: Final = 16
_MOST_SECRET_BYTES: Final = 4096
_TRY_AGAIN: Final = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}


class Webhook:
    """One receiver."""

    name = "webhook"

    def __init__(self, settings: WebhookSettings, *, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._secret: bytes | None = None
        self._context: ssl.SSLContext | None = None

    async def start(self) -> None:
        """Read the secret and the receiver's authorities.

        Raises:
            NotReadyError: a file cannot be read or is not what it should be.
            InvalidInputError: the secret is too long.
        """
        await asyncio.to_thread(self._read)

    def _read(self) -> None:
        settings = self._settings
        if settings.secret_path is not None:
            self._secret = _read_secret(settings.secret_path)
        try:
            self._context = ssl.create_default_context(cafile=settings.ca_path)
        except (OSError, ssl.SSLError) as e:
            raise NotReadyError(f"posture.webhook: ca_path {settings.ca_path}: {e}") from e

    async def send(self, event: dict[str, object]) -> None:
        """Post one event.

        Raises:
            UnavailableError: it may be tried again.
            InvalidInputError: the receiver refused it for good.
        """
        import aiohttp  # noqa: PLC0415 - few servers have a webhook; it costs 9 MiB

        body = json.dumps(event, separators=(",", ":"), ensure_ascii=True).encode()
        headers = self._headers(body)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                # A redirect could leave https: the operator named the place, nobody else does.
                session.post(
                    self._settings.url,
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    ssl=self._context or True,
                ) as answer,
            ):
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise UnavailableError(str(e) or type(e).__name__) from e
        if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            return
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _TRY_AGAIN:
            raise UnavailableError(f"the receiver answers {status}")
        raise InvalidInputError(f"the receiver answers {status}")

    def _headers(self, body: bytes) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self._secret is not None:
            timestamp = str(int(self._clock.now().timestamp()))
            headers[TIMESTAMP] = timestamp
            headers[SIGNATURE] = f"sha256={sign(self._secret, timestamp, body)}"
        return headers


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """Return the signature of a message, lower-case hex."""
    return hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def _read_secret(path: Path) -> bytes:
    content = read_bounded(path, _MOST_SECRET_BYTES, "posture.webhook: secret_path")
    secret = content.rstrip(b"\r\n")
    if len(secret) < _LEAST_SECRET_BYTES:
        raise NotReadyError(
            f"posture.webhook: {path} holds {len(secret)} bytes, expected at least"
            f" {_LEAST_SECRET_BYTES} (such as `openssl rand -hex 32` prints)"
        )
    return secret

"""TLS for the fronts and the dialer: contexts, handshakes in memory, who the peer proved to be.

A connection keeps two small buffers and OpenSSL's own state; asyncio's TLS would add a quarter of
a megabyte each. Handshakes whose key lives in a device run in a thread, so the loop never waits
for a TPM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, cast

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typing_extensions import override

from spire_hw.errors import (
    ChainError,
    ErrorKind,
    InvalidInputError,
    SpireHwError,
    UnavailableError,
    VerificationError,
)
from spire_hw.key import HashAlgorithm, PrivateKey, Signer, SignOptions, spki_der
from spire_hw.svid.x509svid import X509Svid, parse_x509_svid, verify_x509_svid
from spire_hw.transport import keymethod
from spire_hw.transport.half import Half
from spire_hw.x509.certificate import encode_pem
from spire_hw.x509.chain import MAX_CHAIN, UnknownAuthorityError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.spiffeid import TrustDomain

MAX_CHAIN_BYTES: Final = 64 * 1024
# X509_V_ERR_*: self-signed leaf, self-signed in chain, issuer not found, leaf not verifiable.
_UNKNOWN: Final = {18, 19, 20, 21}
# X509_V_FLAG_NO_CHECK_TIME: validity is held against the Clock, in `verify_peer`.
NO_CHECK_TIME: Final = 0x20_0000
_RECORD_BYTES: Final = 16 * 1024
_SIGN_TIMEOUT_S: Final = 20.0
_DIGEST_HASH: Final = {algorithm.digest_size: algorithm for algorithm in HashAlgorithm}


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """What we show in a handshake: a certificate chain and its key.

    Attributes:
        chain_der: certificates, leaf first, roots left out.
        private_key: the leaf's key in this process; or
        signer: something that signs with the leaf's key, on an elliptic curve.
        version: changes whenever chain or key do.
    """

    chain_der: tuple[bytes, ...]
    private_key: PrivateKey | None = None
    signer: Signer | None = None
    version: int = 0

    def __post_init__(self) -> None:
        if (self.private_key is None) == (self.signer is None):
            raise InvalidInputError("a TLS identity has either a private key or a signer")
        if not self.chain_der:
            raise InvalidInputError("a TLS identity has at least one certificate")
        signer = self.signer
        if signer is not None and not isinstance(signer.public_key, ec.EllipticCurvePublicKey):
            raise InvalidInputError(
                "TLS with a key in a device needs an elliptic-curve key; choose ec-p256 or ec-p384"
            )


@dataclass(frozen=True, slots=True)
class TlsContext:
    """A context ready for handshakes.

    Attributes:
        context: the context itself.
        attachment: where a device key's failures are noted, None for a software key.
    """

    context: ssl.SSLContext
    attachment: keymethod.Attachment | None

    @property
    def may_block(self) -> bool:
        """Tell whether handshakes have to run in a thread."""
        return self.attachment is not None


def build_context(
    *,
    server_side: bool,
    verify: ssl.VerifyMode,
    roots: Sequence[bytes],
    identity: TlsIdentity | None,
    alpn: str = "h2",
    least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    loop: asyncio.AbstractEventLoop | None = None,
) -> TlsContext:
    """Build a context: TLS 1.2 or later, no tickets, no resumption, no renegotiation.

    Args:
        server_side: whether it accepts or connects.
        verify: what OpenSSL demands of the peer; the SPIFFE rules come on top.
        roots: DER certificates OpenSSL may build paths to; intermediates count as well.
        identity: what we show, None to show nothing.
        alpn: protocol offered.
        least: oldest version of TLS that will do.
        loop: where a device's `Signer` runs; the running loop by default.

    Raises:
        InvalidInputError: identity or roots cannot be used.
        NotReadyError: the key is in a device and OpenSSL cannot reach it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = verify
    context.minimum_version = least
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols([alpn])
    if server_side:
        context.num_tickets = 0
    keymethod.harden(context, chain_bytes=MAX_CHAIN_BYTES, depth=MAX_CHAIN)
    if roots:
        try:
            context.load_verify_locations(cadata=encode_pem(roots).decode("ascii"))
        except ssl.SSLError as e:
            raise InvalidInputError(f"trust bundle cannot be loaded: {e}") from e
    attachment = None if identity is None else _use(context, identity, loop)
    return TlsContext(context, attachment)


def _use(
    context: ssl.SSLContext, identity: TlsIdentity, loop: asyncio.AbstractEventLoop | None
) -> keymethod.Attachment | None:
    chain = encode_pem(identity.chain_der)
    if identity.signer is not None:
        keymethod.self_test()
        sign = bridge(identity.signer, loop or asyncio.get_running_loop())
        return keymethod.attach(context, chain, spki_der(identity.signer.public_key), sign)
    key = cast("PrivateKey", identity.private_key).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    descriptor = os.memfd_create("svid", os.MFD_CLOEXEC)  # the key stays off the disk
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(chain + key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    except ssl.SSLError as e:
        raise InvalidInputError(f"certificate and key cannot be used for TLS: {e.reason}") from e
    finally:
        os.close(descriptor)
    return None


def bridge(
    signer: Signer, loop: asyncio.AbstractEventLoop, timeout_s: float = _SIGN_TIMEOUT_S
) -> keymethod.SignDigest:
    """Return a blocking function that asks a signer living on an event loop.

    It must not be called in the loop's own thread: that would wait for itself.
    """

    async def ask(digest: bytes, algorithm: HashAlgorithm) -> bytes:
        async with asyncio.timeout(timeout_s):
            return await signer.sign(digest, SignOptions(algorithm, urgent=True))

    def sign(digest: bytes) -> bytes:
        algorithm = _DIGEST_HASH.get(len(digest))
        if algorithm is None:
            raise InvalidInputError(f"a digest of {len(digest)} bytes cannot be signed")
        coroutine = ask(digest, algorithm)
        try:
            answer: Future[bytes] = asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError as e:
            coroutine.close()
            raise UnavailableError("the signer's event loop is closed") from e
        try:
            return answer.result(timeout_s + 1)
        except TimeoutError as e:
            answer.cancel()
            raise SpireHwError(
                f"the key did not sign within {timeout_s:g} s", kind=ErrorKind.DEADLINE_EXCEEDED
            ) from e

    return sign


def handshake_threads() -> ThreadPoolExecutor:
    """Return a small pool for handshakes with device keys."""
    return ThreadPoolExecutor(max_workers=4, thread_name_prefix="tls-handshake")


class _SslObject(Protocol):
    """The private half of `ssl.SSLObject`."""

    def get_unverified_chain(self) -> list[object] | None: ...


def peer_chain(connection: ssl.SSLObject) -> tuple[bytes, ...]:
    """Return the DER certificates the peer showed, leaf first; empty when it showed none.

    Raises:
        VerificationError: more or larger than any chain we accept.
    """
    # Not the public method of Python 3.13: it fails when a client showed no certificate, for which
    # the list holds a None.
    private: _SslObject = connection._sslobj  # type: ignore[attr-defined]  # noqa: SLF001
    shown = private.get_unverified_chain() or []
    chain = tuple(_der(certificate) for certificate in shown if certificate is not None)
    if len(chain) > MAX_CHAIN or sum(map(len, chain)) > MAX_CHAIN_BYTES:
        raise VerificationError("the certificate chain is too long")
    return chain


def _der(certificate: object) -> bytes:
    encoding_der = 2  # _ssl.ENCODING_DER
    der: bytes = certificate.public_bytes(encoding_der)  # type: ignore[attr-defined]
    return der


def verify_peer(
    chain: Sequence[bytes], bundles: Mapping[TrustDomain, Bundle], at: datetime
) -> X509Svid:
    """Hold a chain against the bundle of its ID's own trust domain, and no other.

    Raises:
        VerificationError: not an X509-SVID, not valid now, or no path to that bundle.
    """
    svid = parse_x509_svid(chain)
    verify_x509_svid(svid, bundles, at)
    return svid


class TlsHalf(Half):
    """A relay end that speaks TLS to its peer and plain bytes to its other half."""

    __slots__ = ("_done", "_in", "_out", "_pool", "_tls", "_tls_context", "failure")

    def __init__(
        self,
        context: TlsContext,
        *,
        server_side: bool,
        pool: Executor | None,
        server_hostname: str | None = None,
        on_end: Callable[[], None] | None = None,
        begins: bytes | None = None,
    ) -> None:
        super().__init__(on_end, begins=begins)
        self.failure: str | None = None  # what ended an established connection, such as an alert
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._pool = pool if context.may_block else None
        self._tls_context = context
        self._tls = context.context.wrap_bio(
            self._in, self._out, server_side=server_side, server_hostname=server_hostname
        )
        self._done: asyncio.Future[None] | None = asyncio.get_running_loop().create_future()

    @property
    def tls(self) -> ssl.SSLObject:
        """Return the TLS connection."""
        return self._tls

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Not now: in Python 3.11.2 a transport starts reading after this even when it was paused in
        # here, and a handshake in a thread must have the buffers to itself. A server has nothing
        # to say before it has heard something.
        if not self._tls.server_side:
            asyncio.get_running_loop().call_soon(self._step)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None:
            self._fail(UnavailableError("the connection ended in the middle of the TLS handshake"))
        super().connection_lost(exc)

    @override
    def buffer_updated(self, nbytes: int) -> None:
        self._in.write(self._view[:nbytes])
        if self._done is None:
            self._pump()
        else:
            self._step()

    async def handshaken(self) -> None:
        """Wait for the end of the handshake; nothing is passed on after it until `resume`.

        A server resumes at once: what has arrived by then stays in the TLS buffer.

        Raises:
            VerificationError: the peer, or we, found something wrong.
            UnavailableError: the connection ended, or our key could not sign.
        """
        if self._done is not None:
            await self._done
            self._done = None

    @override
    def send(self, data: bytes) -> None:
        try:
            self._tls.write(data)
        except ssl.SSLError:
            self.abort()
            return
        self._flush()

    @override
    def resume(self) -> None:
        super().resume()
        if self._done is None:
            self._pump()

    @override
    def end(self) -> None:
        established = self._done is None
        if established and self.transport is not None and not self.transport.is_closing():
            with contextlib.suppress(
                ssl.SSLError
            ):  # wants the peer's answer, which we do not await
                self._tls.unwrap()
            self._flush()
        super().end()

    def _flush(self) -> None:
        if self._out.pending and self.transport is not None:
            self.transport.write(self._out.read())

    def _step(self) -> None:
        """Take the handshake as far as the bytes at hand allow."""
        if self._done is None or self._done.done():
            return
        if self._pool is not None:
            self.pause()  # the thread has the buffers to itself
            job = asyncio.get_running_loop().run_in_executor(self._pool, self._tls.do_handshake)
            job.add_done_callback(lambda job: self._stepped(job.exception()))
            return
        try:
            self._tls.do_handshake()
        except ssl.SSLError as e:
            self._stepped(e)
        else:
            self._stepped(None)

    def _stepped(self, error: BaseException | None) -> None:
        if self._done is None or self._done.done():
            return
        self._flush()
        if error is None:
            if not self._tls.server_side:
                self.pause()  # a client may look at whom it has reached for as long as it likes
            self._done.set_result(None)
        elif isinstance(error, ssl.SSLWantReadError):
            if self._pool is not None:
                super().resume()
        else:
            self._fail(self._explain(error))

    def _explain(self, error: BaseException) -> SpireHwError:
        attachment = self._tls_context.attachment
        if attachment is not None and attachment.error is not None:
            cause, attachment.error = attachment.error, None
            failed = UnavailableError(f"the TLS key could not sign: {cause}")
            failed.__cause__ = cause
            return failed
        refused: SpireHwError
        if isinstance(error, ssl.SSLCertVerificationError):
            kind = UnknownAuthorityError if error.verify_code in _UNKNOWN else ChainError
            refused = kind(f"certificate refused: {error.verify_message}")
        else:
            refused = UnavailableError(f"TLS handshake failed: {_reason(error)}")
        refused.__cause__ = error
        return refused

    def _fail(self, error: SpireHwError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
            self._done.exception()  # whoever waited may have gone: not worth a warning

    def _pump(self) -> None:
        """Decrypt what has arrived and pass it on."""
        chunks: list[bytes] = []
        ended = False
        try:
            while True:
                chunk = self._tls.read(_RECORD_BYTES)
                if not chunk:
                    ended = True
                    break
                chunks.append(chunk)
                if not (self._in.pending or self._tls.pending()):
                    break  # asking for more would only make an exception
        except ssl.SSLWantReadError:
            ended = False
        except ssl.SSLError as e:
            ended = True
            self.failure = _reason(e)
        if chunks:
            self.received(b"".join(chunks))
        self._flush()
        if ended:
            self.end()


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else type(error).__name__

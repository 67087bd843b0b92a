"""TLS signed by a key we may only ask to sign (TPM, HSM), attached to a stdlib `ssl.SSLContext`.

Python's `ssl` has no signing hook, OpenSSL has: an EC_KEY whose EC_KEY_METHOD calls back into us.
One method serves the process; the callback finds the signer through the key's address. EC keys
only, OpenSSL 3 as a shared library only; `self_test` says so before anybody relies on it.

Source: OpenSSL 3.0 EC_KEY_METHOD_new(3), SSL_CTX_use_certificate(3), SSL_CTX_set1_sigalgs(3).
"""

from __future__ import annotations

import ctypes as c
import os
import ssl
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError
from spire_hw.key import HashAlgorithm, SignOptions, default_hash, parse_spki, sign_digest, spki_der

# Takes a digest, returns a DER ECDSA signature; runs in the thread that does the handshake.
SignDigest = Callable[[bytes], bytes]

_OPENSSL_3: Final = (3, 0)
_CTRL_SET_SIGALGS_LIST: Final = 98
_CTRL_SET_CLIENT_SIGALGS_LIST: Final = 102
_CTRL_MODE: Final = 33
_MODE_NO_AUTO_CHAIN: Final = 8  # a leaf sent alone would get the root from the trust store
_CTRL_SET_SESS_CACHE_MODE: Final = 44
_CTRL_SET_MAX_CERT_LIST: Final = 51
_SIGALGS: Final = {
    HashAlgorithm.SHA256: b"ECDSA+SHA256",
    HashAlgorithm.SHA384: b"ECDSA+SHA384",
    HashAlgorithm.SHA512: b"ECDSA+SHA512",
}
_ANY_SIGALG: Final = b":".join(
    kind + b"+" + size
    for kind in (b"ECDSA", b"RSA-PSS", b"RSA")
    for size in (b"SHA256", b"SHA384", b"SHA512")
)
_P = c.c_void_p
_SIGN: Final = c.CFUNCTYPE(
    c.c_int,
    c.c_int,
    c.POINTER(c.c_ubyte),
    c.c_int,
    c.POINTER(c.c_ubyte),
    c.POINTER(c.c_uint),
    _P,
    _P,
    _P,
)
_PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    "EC_KEY_OpenSSL": (_P,),
    "EC_KEY_METHOD_new": (_P, _P),
    "EC_KEY_METHOD_get_sign": (None, _P, _P, _P, _P),
    "EC_KEY_METHOD_set_sign": (None, _P, _P, _P, _P),
    "EC_KEY_set_method": (c.c_int, _P, _P),
    "EC_KEY_free": (None, _P),
    "ECDSA_size": (c.c_int, _P),
    "d2i_EC_PUBKEY": (_P, _P, c.POINTER(c.c_char_p), c.c_long),
    "EVP_PKEY_new": (_P,),
    "EVP_PKEY_set1_EC_KEY": (c.c_int, _P, _P),
    "EVP_PKEY_free": (None, _P),
    "ERR_clear_error": (None,),
    "SSL_CTX_use_certificate_chain_file": (c.c_int, _P, c.c_char_p),
    "SSL_CTX_use_PrivateKey": (c.c_int, _P, _P),
    "SSL_CTX_check_private_key": (c.c_int, _P),
    "SSL_CTX_ctrl": (c.c_long, _P, c.c_int, c.c_long, _P),
    "SSL_CTX_get_options": (c.c_uint64, _P),
    "SSL_CTX_set_verify_depth": (None, _P, c.c_int),
}


@dataclass(slots=True)
class Attachment:
    """A signer attached to a context; it lasts as long as the context does.

    Attributes:
        error: why the last signature failed, None while all went well.
    """

    sign: SignDigest
    room: int
    error: BaseException | None = field(default=None)

    def make(self, digest: bytes) -> bytes:
        """Return a signature that fits where OpenSSL wants it.

        Raises:
            SpireHwError: it does not fit, or the signer failed.
        """
        signature = self.sign(digest)
        if not 0 < len(signature) <= self.room:
            raise SpireHwError(f"the signature has {len(signature)} bytes")
        return signature


class _OpenSsl:
    """The functions of the OpenSSL that Python's `ssl` itself uses, and our one key method."""

    def __init__(self) -> None:
        if sys.implementation.name != "cpython":
            raise NotReadyError("TLS with a device key needs CPython")
        if ssl.OPENSSL_VERSION_INFO < _OPENSSL_3:
            raise NotReadyError(f"TLS with a device key needs OpenSSL 3, not {ssl.OPENSSL_VERSION}")
        try:
            import _ssl  # noqa: PLC0415 - only to learn where it was loaded from

            library = c.CDLL(_ssl.__file__)
            for name, (result, *arguments) in _PROTOTYPES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (ImportError, OSError, AttributeError) as e:
            raise NotReadyError(
                "TLS with a device key needs a Python whose ssl module uses a shared OpenSSL 3 "
                f"(Debian's does): {e}"
            ) from e
        self._library = library
        self.attachments: dict[int, Attachment] = {}
        self._callback = _SIGN(self._sign)
        self._method = self._make_method()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def _make_method(self) -> int:
        method = self._library.EC_KEY_METHOD_new(self._library.EC_KEY_OpenSSL())
        if not method:
            raise NotReadyError(f"{ssl.OPENSSL_VERSION} cannot make an EC key method")
        sign, setup, signature = _P(), _P(), _P()
        self._library.EC_KEY_METHOD_get_sign(
            method, c.byref(sign), c.byref(setup), c.byref(signature)
        )
        self._library.EC_KEY_METHOD_set_sign(method, c.cast(self._callback, _P), setup, signature)
        return int(method)

    def _sign(
        self,
        _type: int,
        digest: Any,
        digest_size: int,
        out: Any,
        out_size: Any,
        _kinv: int | None,
        _r: int | None,
        key: int | None,
    ) -> int:
        attachment = self.attachments.get(key or 0)
        if attachment is None:
            return 0
        try:
            signature = attachment.make(bytes(digest[:digest_size]))
        except BaseException as e:  # noqa: BLE001 - nothing may pass through C; kept for the caller
            attachment.error = e
            return 0
        c.memmove(out, signature, len(signature))
        out_size[0] = len(signature)
        return 1

    def context_pointer(self, context: ssl.SSLContext) -> int:
        """Return the SSL_CTX behind a context, proved by reading its options back."""
        pointer = _P.from_address(id(context) + object.__basicsize__).value
        known = int(context.options) & 0xFFFF_FFFF
        if not pointer or int(self._library.SSL_CTX_get_options(pointer)) & 0xFFFF_FFFF != known:
            raise NotReadyError(
                "this Python keeps its SSL_CTX elsewhere; device keys cannot be used"
            )
        return pointer

    def key_pair(self, spki: bytes) -> tuple[int, int]:
        """Return (EC_KEY, EVP_PKEY) with our method for a public key; the caller owns both."""
        text = c.c_char_p(spki)
        key = self._library.d2i_EC_PUBKEY(None, c.byref(text), len(spki))
        if not key:
            self._library.ERR_clear_error()
            raise InvalidInputError("TLS with a device key needs an EC key")
        envelope = self._library.EVP_PKEY_new()
        if (
            not envelope
            or not self._library.EC_KEY_set_method(key, self._method)
            or not self._library.EVP_PKEY_set1_EC_KEY(envelope, key)
        ):
            self._library.EVP_PKEY_free(envelope)
            self._library.EC_KEY_free(key)
            self._library.ERR_clear_error()
            raise NotReadyError(f"{ssl.OPENSSL_VERSION} does not take an EC key with our method")
        return key, envelope


_lock = threading.Lock()


@lru_cache(maxsize=1)
def _load() -> _OpenSsl:
    return _OpenSsl()


def _openssl() -> _OpenSsl:
    with _lock:
        return _load()


def attach(context: ssl.SSLContext, chain_pem: bytes, spki: bytes, sign: SignDigest) -> Attachment:
    """Give a context a certificate whose key is reached only through a function.

    Args:
        context: fresh context without a key.
        chain_pem: certificates, leaf first.
        spki: DER SubjectPublicKeyInfo of the leaf's key, on P-256, P-384 or P-521.
        sign: gets a digest of the curve's own hash (SHA-256 on P-256), returns a DER ECDSA
            signature. May block; runs in the thread that does the handshake.

    Raises:
        InvalidInputError: not an EC key, or it is not the leaf's.
        NotReadyError: this Python or OpenSSL cannot do it.
    """
    library = _openssl()
    algorithm = default_hash(parse_spki(spki))
    pointer = library.context_pointer(context)
    key, envelope = library.key_pair(spki)
    attachment = Attachment(sign, int(library.ECDSA_size(key)))
    library.attachments[key] = attachment
    weakref.finalize(context, _detach, library, key)
    try:
        _use(library, pointer, chain_pem, envelope)
    finally:
        library.EVP_PKEY_free(envelope)
    own = _SIGALGS[algorithm]
    if context.protocol == ssl.PROTOCOL_TLS_SERVER:
        library.SSL_CTX_ctrl(pointer, _CTRL_SET_SIGALGS_LIST, 0, c.cast(c.c_char_p(own), _P))
        library.SSL_CTX_ctrl(
            pointer, _CTRL_SET_CLIENT_SIGALGS_LIST, 0, c.cast(c.c_char_p(_ANY_SIGALG), _P)
        )
    else:
        library.SSL_CTX_ctrl(pointer, _CTRL_SET_CLIENT_SIGALGS_LIST, 0, c.cast(c.c_char_p(own), _P))
    return attachment


def _use(library: _OpenSsl, pointer: int, chain_pem: bytes, envelope: int) -> None:
    descriptor = os.memfd_create("chain", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, chain_pem)
        path = f"/proc/self/fd/{descriptor}".encode()
        if not library.SSL_CTX_use_certificate_chain_file(pointer, path):
            raise InvalidInputError("the certificate chain does not parse")
        if not library.SSL_CTX_use_PrivateKey(
            pointer, envelope
        ) or not library.SSL_CTX_check_private_key(pointer):
            raise InvalidInputError("certificate and key do not match")
    finally:
        library.ERR_clear_error()
        os.close(descriptor)


def _detach(library: _OpenSsl, key: int) -> None:
    library.attachments.pop(key, None)
    library.EC_KEY_free(key)


def harden(context: ssl.SSLContext, *, chain_bytes: int, depth: int) -> bool:
    """Switch off what Python cannot: session cache, automatic chains, long chains from peers.

    Returns False where this OpenSSL is out of reach; callers then refuse resumed sessions after
    the handshake, and chains are bounded by OpenSSL's own 100 KiB.
    """
    try:
        library = _openssl()
        pointer = library.context_pointer(context)
    except NotReadyError:
        return False
    library.SSL_CTX_ctrl(pointer, _CTRL_SET_SESS_CACHE_MODE, 0, None)
    library.SSL_CTX_ctrl(pointer, _CTRL_MODE, _MODE_NO_AUTO_CHAIN, None)
    library.SSL_CTX_ctrl(pointer, _CTRL_SET_MAX_CERT_LIST, chain_bytes, None)
    library.SSL_CTX_set_verify_depth(pointer, depth)
    return True


@lru_cache(maxsize=1)
def self_test() -> None:
    """Do one handshake in memory with a key behind a function.

    Raises:
        NotReadyError: device keys cannot be used for TLS here; the message says why.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(key)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    digests: list[bytes] = []

    def sign(digest: bytes) -> bytes:
        digests.append(digest)
        return sign_digest(key, digest, SignOptions(HashAlgorithm.SHA256))

    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    attach(server, pem, spki_der(key.public_key()), sign)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=pem.decode())
    try:
        shown = _handshake(server, client)
    except ssl.SSLError as e:
        raise NotReadyError(
            f"{ssl.OPENSSL_VERSION} failed its self-test for device keys: {e}"
        ) from e
    if not digests or shown != certificate.public_bytes(serialization.Encoding.DER):
        raise NotReadyError(f"{ssl.OPENSSL_VERSION} did not use the device key in its self-test")


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes | None:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_side=False),
        server.wrap_bio(up, down, server_side=True),
    ]
    waiting = list(ends)
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
        if not waiting:
            return ends[0].getpeercert(binary_form=True)
    raise ssl.SSLError("the handshake does not end")


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self-test")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(9999, 1, 1, tzinfo=UTC))
        .sign(key, hashes.SHA256())
    )

"""A key for `x509pop` that lies in a PKCS#11 token, found by URI.

    pkcs11:token=node;object=machine-key?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/pin

The token is opened for an attestation and left again; its module runs in a process of its own. A
PIN that was refused is not sent again before it is another one.

Spec: RFC 7512.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError, InvalidInputError, NotFoundError, NotReadyError
from spire_hw.key import key_type_of, spki_der
from spire_hw.pkcs11 import uri as pkcs11_uri
from spire_hw.pkcs11.module import check_module_path
from spire_hw.pkcs11.pin import FilePin, PinGuard
from spire_hw.pkcs11.pool import Limits, Pool
from spire_hw.pkcs11.process import Launch
from spire_hw.pkcs11.profile import ProfileChoice
from spire_hw.pkcs11.seat import Opening
from spire_hw.pkcs11.wire import Kind, SignItem, SignKey, unpack_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from spire_hw.key import PublicKey, SignOptions
    from spire_hw.log import Logger

SCHEME: Final = "pkcs11:"
_KEY: Final = frozenset({"object", "token", "serial"})
_TOKEN: Final = frozenset({"model", "manufacturer", "slot-description", "slot-manufacturer"})


def check_uri(text: str) -> pkcs11_uri.Pkcs11Uri:
    """Return a URI that names a key, its token, the module and a PIN file.

    Raises:
        InvalidInputError: it does not; the message says what is missing.
    """
    parsed = pkcs11_uri.parse(text)
    if parsed.attributes.get("object") is None and parsed.id is None:
        raise InvalidInputError("pkcs11 URI names no key: object= or id= is required")
    if parsed.token is None and parsed.serial is None:
        raise InvalidInputError("pkcs11 URI names no token: token= or serial= is required")
    if parsed.module_path is None:
        raise InvalidInputError("pkcs11 URI names no module: ?module-path= is required")
    if parsed.pin_file is None:
        raise InvalidInputError("pkcs11 URI names no PIN file: &pin-source=file:/... is required")
    odd = sorted(set(parsed.attributes) - _KEY - _TOKEN)
    if odd:
        raise InvalidInputError(f"pkcs11 URI attribute {odd[0]} cannot be used here")
    return parsed


class TokenSigner:
    """A `Signer` over a key in an open token."""

    def __init__(self, pool: Pool, cka_id: bytes, public_key: PublicKey) -> None:
        self._pool = pool
        self._key = SignKey(cka_id, spki_der(public_key))
        self._public_key = public_key

    @property
    def public_key(self) -> PublicKey:
        """Return the public half, from the certificate."""
        return self._public_key

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        """Have the token sign; its worker verifies what came out with the certificate's key."""
        return await self._pool.sign(SignItem(self._key, digest, options))


class TokenKey:
    """Where a key is, and the memory of refused PINs."""

    def __init__(self, text: str, log: Logger) -> None:
        self._uri = check_uri(text)
        self._guard = PinGuard(FilePin(Path(self._uri.pin_file or "")))
        self._log = log

    @asynccontextmanager
    async def open(self, public_key: PublicKey) -> AsyncIterator[TokenSigner]:
        """Open the token and yield what signs for a public key.

        Args:
            public_key: the certificate's; its private half must be the key the URI names.

        Raises:
            InvalidInputError: the module may not be loaded, or the key is of an unknown type.
            NotFoundError: there is no such key.
            NotReadyError: the URI fits several keys.
            TokenError: token or PIN are not what they have to be.
        """
        key_type_of(public_key)
        uri = self._uri
        module = await asyncio.to_thread(check_module_path, uri.module_path or "")
        token: dict[str, object] = {
            "module": module,
            "label": uri.token,
            "serial": uri.serial,
            "uri": {n: v for n, v in uri.attributes.items() if n in _TOKEN},
            "slot_id": uri.slot_id,
            "profile": ProfileChoice().to_dict(),
        }
        opening = Opening(Launch(dict(os.environ)), token, self._guard)
        pool = Pool(opening, Limits(), self._log)
        await pool.start()
        try:
            yield TokenSigner(pool, await self._find(pool), public_key)
        finally:
            await pool.close()

    async def _find(self, pool: Pool) -> bytes:
        """Return the CKA_ID of the one private key the URI names."""
        label = self._uri.attributes.get("object")
        listing = await pool.ask(Kind.LIST, {"prefix": label or ""}, what="find the key")
        halves = listing.get("halves")
        if not isinstance(halves, list):
            raise EncodingError("token listing", "halves is not a list")
        found = {
            unpack_bytes(half.get("id"))
            for half in halves
            if half.get("private") is True and (label is None or half.get("label") == label)
        }
        if self._uri.id is not None:
            found &= {self._uri.id}
        if not found:
            raise NotFoundError(f"no private key in token {pool.facts.device} fits the pkcs11 URI")
        if len(found) > 1:
            raise NotReadyError("several keys fit the pkcs11 URI; add id= to choose one")
        return found.pop()

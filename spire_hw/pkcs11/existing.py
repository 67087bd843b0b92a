"""One key in a token, named by the operator: found and proved to be the one that is meant, or made.

Nothing that is on the token is changed or destroyed. The module runs in worker processes of its own.
"""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from spire_hw.clock import SystemClock
from spire_hw.errors import (
    AlreadyExistsError,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
)
from spire_hw.key import SignOptions, default_hash, key_type_of, spki_der
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.evidence import check_evidence, read_evidence
from spire_hw.pkcs11.inventory.inventory import listed_halves, read_material
from spire_hw.pkcs11.keyring.disposal import Disposal
from spire_hw.pkcs11.keyring.fitness import check_type
from spire_hw.pkcs11.keyring.generation import Making
from spire_hw.pkcs11.keys import public_key_of
from spire_hw.pkcs11.pool.place import Place, opening_of
from spire_hw.pkcs11.pool.pool import Limits, Pool
from spire_hw.pkcs11.wire import Kind, SignItem, SignKey, unpack_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from spire_hw.key import KeyType, PublicKey
    from spire_hw.log import Logger
    from spire_hw.pkcs11.evidence import Evidence
    from spire_hw.pkcs11.pool.pin import PinGuard

_GONE: Final = "hsm.key_gone"
_CHECK: Final = b"spire-hw key possession check\0"


class ExistingKey:
    """A `Signer` over one key of an open token.

    Attributes:
        label: CKA_LABEL of the private half.
        cka_id: its CKA_ID.
        evidence: what the token says of it.
    """

    def __init__(
        self, pool: Pool, label: str, cka_id: bytes, public_key: PublicKey, evidence: Evidence
    ) -> None:
        self._pool = pool
        self._key = SignKey(cka_id, spki_der(public_key))
        self._public_key = public_key
        self.label = label
        self.cka_id = cka_id
        self.evidence = evidence

    @property
    def public_key(self) -> PublicKey:
        """Return the public half."""
        return self._public_key

    @property
    def location(self) -> str:
        """Return where the key is, for messages."""
        return f"token {self._pool.facts.device}, key {self.label or self.cka_id.hex()}"

    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        """Have the token sign; its worker verifies what came out with the public half.

        Raises:
            TokenError: the token failed, or does not show the key any more.
        """
        item = SignItem(self._key, digest, options)
        try:
            return await self._sign(item)
        except TokenError as e:
            if e.reason != _GONE:
                raise
        # A library may go on showing what it saw while the token was away.
        self._pool.recycle()
        try:
            return await self._sign(item)
        except TokenError as e:
            if e.reason != _GONE:
                raise
            raise TokenError(
                f"{self.location} is not there any more; bring the token or the key back",
                reason="hsm.key_vanished",
                operation="sign",
                cure=Cure.OPERATOR,
                kind=ErrorKind.UNAVAILABLE,
            ) from e

    async def _sign(self, item: SignItem) -> bytes:
        try:
            return await self._pool.sign(item)
        except TokenError as e:
            name = self.label or self.cka_id.hex()
            raise e.about_key(name, self._pool.facts.device) from e

    async def prove(self) -> None:
        """Have the key sign something that can be nothing else.

        Raises:
            TokenError: the token failed; reason `hsm.bad_signature` when it is another key.
        """
        options = SignOptions(default_hash(self._public_key))
        await self.sign(options.hash.digest(_CHECK + secrets.token_bytes(32)), options)

    async def close(self) -> None:
        """Log out and end the workers."""
        await self._pool.close()


async def open_existing(
    place: Place,
    guard: PinGuard,
    log: Logger,
    *,
    public_key: PublicKey | None = None,
    limits: Limits | None = None,
) -> ExistingKey:
    """Open a token and return what signs with a key of it; the caller closes it.

    Args:
        place: the token, and the key by label, by id or by both.
        guard: gives the PIN.
        log: where the workers' fate is told.
        public_key: what the key has to be, such as a certificate's; None takes what the token
            shows.
        limits: of the worker pool.

    Raises:
        InvalidInputError: the module may not be loaded, or the key is of an unknown type.
        NotFoundError: there is no such key.
        NotReadyError: several fit, or the one that fits is not the one that is meant.
        TokenError: token or PIN are not what they have to be.
    """
    if public_key is not None:
        key_type_of(public_key)
    pool = Pool(await opening_of(place, guard), limits or Limits(), log)
    await pool.start()
    try:
        key = await _find(pool, place, public_key)
        await _prove(key)
    except BaseException:
        await pool.close()
        raise
    return key


async def make_key(place: Place, guard: PinGuard, log: Logger, key_type: KeyType) -> ExistingKey:
    """Open a token and make a key on it; the caller closes it.

    Args:
        place: the token, and the label that the key gets.
        guard: gives the PIN.
        log: where the workers' fate is told.
        key_type: its type.

    Raises:
        InvalidInputError: the module may not be loaded, or no label is given.
        AlreadyExistsError: there is a key of that label.
        TokenError: the token failed, or what it made is not what a CA key has to be.
    """
    if not place.object_label:
        raise InvalidInputError("the new key needs a label: object=... in the URI")
    pool = Pool(await opening_of(place, guard), Limits(), log)
    await pool.start()
    try:
        return await _make(pool, place, place.object_label, key_type, log)
    except BaseException:
        await pool.close()
        raise


async def _make(
    pool: Pool, place: Place, label: str, key_type: KeyType, log: Logger
) -> ExistingKey:
    listing = await pool.ask(Kind.LIST, {"prefix": ""}, what="look for the key")
    halves, facts = listed_halves(listing), pool.facts
    if any(h.get("label") == label for h in halves):
        raise AlreadyExistsError(
            f'token {facts.device} has a key labelled "{label}": use it (-existing), or give another label'
        )
    taken = {unpack_bytes(h.get("id")) for h in halves}
    if place.object_id in taken:
        raise AlreadyExistsError(f"token {facts.device} has a key with that id: use another")
    check_type(key_type, facts)

    def fresh_id() -> bytes:
        if place.object_id is not None:
            return place.object_id
        cka_id = secrets.token_bytes(facts.profile.id_bytes)
        return fresh_id() if cka_id in taken else cka_id

    making = Making(pool, key_type, fresh_id, label)
    disposal = Disposal(pool, SystemClock(), log)
    try:
        made = await making.generate(disposal)
        check_evidence(f'generated key "{label}"', made.evidence, key_type, facts.profile)
        key = ExistingKey(pool, label, making.cka_id, made.public_key, made.evidence)
        # Workers that were there before may not see it.
        pool.recycle()
        await _prove(key)
    except BaseException:
        # What is not fit to be a CA's key is not left behind under its name.
        disposal.add([(making.cka_id, label)])
        await disposal.now()
        raise
    return key


@asynccontextmanager
async def opened(
    place: Place, guard: PinGuard, log: Logger, public_key: PublicKey | None = None
) -> AsyncIterator[ExistingKey]:
    """Open a token for a while; arguments and errors as in `open_existing`."""
    key = await open_existing(place, guard, log, public_key=public_key)
    try:
        yield key
    finally:
        await key.close()


async def _find(pool: Pool, place: Place, wanted: PublicKey | None) -> ExistingKey:
    label = place.object_label
    listing = await pool.ask(Kind.LIST, {"prefix": label or ""}, what="find the key")
    halves = [h for h in listed_halves(listing) if label is None or h.get("label") == label]
    privates = {unpack_bytes(h.get("id")): h for h in halves if h.get("private") is True}
    if place.object_id is not None:
        privates = {i: h for i, h in privates.items() if i == place.object_id}
    named = _named(place)
    if not privates:
        raise NotFoundError(
            f"no private key in token {pool.facts.device} fits {named}; list what there is with the "
            "device's own tool and correct label or id"
        )
    if len(privates) > 1:
        ids = ", ".join(sorted(i.hex() for i in privates))
        raise NotReadyError(f"several keys fit {named} (CKA_ID {ids}); add the id to choose one")
    cka_id, private = privates.popitem()
    same = [h for h in halves if unpack_bytes(h.get("id")) == cka_id]
    shown = [m for h in same if (m := read_material(h.get("material"))) is not None]
    held = public_key_of(shown[0]) if shown else None
    if held is None and wanted is None:
        raise NotReadyError(
            f"token {pool.facts.device} does not show the public half of the key that fits {named}"
        )
    if held is not None and wanted is not None and spki_der(held) != spki_der(wanted):
        raise NotReadyError(
            f"the key that fits {named} in token {pool.facts.device} is not the certificate's: "
            "correct label, id or certificate"
        )
    public_key = wanted if wanted is not None else held
    if public_key is None:
        raise NotReadyError(f"the public half of the key that fits {named} is unknown")
    key_type_of(public_key)
    found = str(private.get("label") or "")
    return ExistingKey(pool, found, cka_id, public_key, read_evidence(private))


def _named(place: Place) -> str:
    parts = []
    if place.object_label is not None:
        parts.append(f'label "{place.object_label}"')
    if place.object_id is not None:
        parts.append(f"id {place.object_id.hex()}")
    return " and ".join(parts) or "what is asked for"


async def _prove(key: ExistingKey) -> None:
    try:
        await key.prove()
    except TokenError as e:
        if e.reason != "hsm.bad_signature":
            raise
        raise TokenError(
            f"{key.location} does not belong to the certificate: what it signs does not verify",
            reason="hsm.key_mismatch",
            operation="prove key",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        ) from e

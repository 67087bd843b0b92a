"""A key that signs nothing but tests: so that a device that fails is found before it is needed.

Once in a while it makes a signature. It is no authority's and no caller can name it: its label has
a character that no key's has. It is made once for each owner and stays on the token.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.key import KeyType, SignOptions, default_hash, spki_der
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.inventory import read_material
from spire_hw.pkcs11.keyring.fitness import check_type, check_writable
from spire_hw.pkcs11.keyring.generation import Making
from spire_hw.pkcs11.keys import public_key_of
from spire_hw.pkcs11.wire import Kind, SignItem, SignKey, unpack_bytes

if TYPE_CHECKING:
    from spire_hw.clock import Clock
    from spire_hw.key import PublicKey
    from spire_hw.log import Logger
    from spire_hw.pkcs11.inventory.labels import Owner
    from spire_hw.pkcs11.keyring.disposal import Disposal
    from spire_hw.pkcs11.pool.pool import Pool

_TYPES: Final = (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048)
_EVERY_S: Final = 300.0
_CONTENT: Final = b"spire-hw periodic test signature\0"


class TestKey:
    """Signs with a token's test key every five minutes."""

    __test__ = False

    def __init__(
        self, pool: Pool, owner: Owner, disposal: Disposal, *, clock: Clock, log: Logger
    ) -> None:
        self._pool = pool
        self._label = owner.test_label
        self._disposal = disposal
        self._clock = clock
        self._log = log
        self._key: SignKey | None = None
        self._public_key: PublicKey | None = None

    async def run(self) -> None:
        """Sign, rest, sign; never ends."""
        while True:
            await self._clock.sleep(_EVERY_S)
            try:
                await self.sign()
            except SpireHwError as e:
                self._log.error("hsm.test_signature_failed", error=e.message)

    async def sign(self) -> None:
        """Make one signature; the key is found or made first when it is not known.

        Raises:
            SpireHwError: the token does not sign, or no test key can be had.
        """
        if self._key is None or self._public_key is None:
            self._public_key, self._key = await self._find() or await self._make()
        options = SignOptions(default_hash(self._public_key))
        digest = options.hash.digest(_CONTENT + secrets.token_bytes(32))
        try:
            await self._pool.sign(SignItem(self._key, digest, options))
        except TokenError as e:
            if e.reason == "hsm.key_gone":
                self._key = None
            raise

    async def _find(self) -> tuple[PublicKey, SignKey] | None:
        listing = await self._pool.ask(Kind.LIST, {"prefix": self._label}, what="find the test key")
        halves = [h for h in listing.get("halves", ()) if h.get("label") == self._label]
        private = {str(h.get("id")) for h in halves if h.get("private") is True}
        for half in halves:
            if half.get("private") is not True and half.get("id") in private:
                return self._known(half)
        return None

    def _known(self, half: dict[str, Any]) -> tuple[PublicKey, SignKey]:
        material = read_material(half.get("material"))
        if material is None:
            raise InvalidInputError("the token does not show the test key's public half")
        public_key = public_key_of(material)
        return public_key, SignKey(unpack_bytes(half.get("id")), spki_der(public_key))

    async def _make(self) -> tuple[PublicKey, SignKey]:
        facts = self._pool.facts
        check_writable(facts)
        length = facts.profile.id_bytes
        key_type = self._key_type()
        making = Making(self._pool, key_type, lambda: secrets.token_bytes(length), self._label)
        made = await making.generate(self._disposal)
        self._log.info("hsm.test_key_made", label=self._label)
        return made.public_key, SignKey(made.cka_id, spki_der(made.public_key))

    def _key_type(self) -> KeyType:
        """Return the first type that the token can make."""
        for key_type in _TYPES:
            with suppress(TokenError):
                check_type(key_type, self._pool.facts)
                return key_type
        check_type(_TYPES[0], self._pool.facts)
        return _TYPES[0]

"""The signatures of one worker: from CKA_ID and digests to what the token makes of them.

Runs in the worker only. Nothing is verified here: that is not left to the process that holds the
token's library.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import MGF, Attribute, Mechanism, ObjectClass
from pkcs11.exceptions import PKCS11Error

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.device import functions
from spire_hw.pkcs11.device.functions import CkrError
from spire_hw.pkcs11.errors import Cure, TokenError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.pkcs11.device.token import TokenSession
    from spire_hw.pkcs11.keys import SignScheme

# A key that shows no CKA_SIGN has no method to sign with: AttributeError.
_ODD: Final = (PKCS11Error, ValueError, NotImplementedError, AttributeError)


class Strokes:
    """Signs with the private keys of one logged-in token."""

    def __init__(self, token: TokenSession) -> None:
        self._token = token
        self._keys: dict[bytes, Any] = {}

    def sign(
        self, cka_id: bytes, scheme: SignScheme, digests: Sequence[bytes]
    ) -> list[bytes | TokenError]:
        """Return the token's raw outputs; a lost session or a stale handle is replaced once.

        A token that is away is not asked for the rest.
        """
        wanted = [scheme.data(digest) for digest in digests]
        results: list[bytes | TokenError] = []
        while len(results) < len(wanted):
            made, error = self._sign_some(cka_id, scheme, wanted[len(results) :])
            results += made
            if error is not None and error.cure in {Cure.SESSION, Cure.KEY}:
                made, error = self._sign_some(cka_id, scheme, [wanted[len(results)]])
                results += made
            if error is not None:
                is_away = error.cure is Cure.RESTART
                results += [error] * (len(wanted) - len(results) if is_away else 1)
        return results

    def _sign_some(
        self, cka_id: bytes, scheme: SignScheme, wanted: Sequence[bytes]
    ) -> tuple[list[bytes], TokenError | None]:
        """Return outputs up to the first failure, and that."""
        token, made = self._token, list[bytes]()
        try:
            key = self._keys.get(cka_id) or self._find(cka_id)
            if token.functions is None:
                made.extend(_sign_by_binding(key, scheme, data) for data in wanted)
            else:
                token.functions.sign(token.handle, _mechanism(scheme), key.handle, wanted, made)
        except TokenError as e:
            return made, e
        except CkrError as e:
            error = TokenError.of_code(e.code, "sign", token.device)
        except _ODD as e:
            error = TokenError.of(e, "sign", token.device)
        else:
            return made, None
        try:
            # Whatever failed, the operation may still be active: the session signs no more.
            self._keys.clear()
            token.renew()
        except TokenError as lost:
            return made, lost
        return made, error

    def _find(self, cka_id: bytes) -> Any:
        wanted = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.ID: cka_id}
        found = list(self._token.session.get_objects(wanted))
        if len(found) > 1:
            raise self._refused("hsm.key_ambiguous", "several private keys have one CKA_ID")
        if not found:
            # Not logged in, a token hides its private keys: only a search that was logged in tells
            # that they are gone.
            self._token.check_logged_in()
            raise TokenError(
                "key is not on the token",
                reason="hsm.key_gone",
                operation="find key",
                device=self._token.device,
            )
        if _says_no(found[0]):
            raise self._refused("hsm.key_not_permitted", "key no longer permits signing")
        self._keys[cka_id] = found[0]
        return found[0]

    def _refused(self, reason: str, message: str) -> TokenError:
        return TokenError(
            message,
            reason=reason,
            operation="sign",
            device=self._token.device,
            kind=ErrorKind.FAILED_PRECONDITION,
        )


def _sign_by_binding(key: Any, scheme: SignScheme, data: bytes) -> bytes:
    """Sign the long way, for modules whose functions are not shared."""
    param = None
    if scheme.pss is not None:
        hash_mechanism, mgf, salt = scheme.pss
        param = (Mechanism(hash_mechanism), MGF(mgf), salt)
    signature: bytes = key.sign(data, mechanism=Mechanism(scheme.mechanism), mechanism_param=param)
    return signature


def _says_no(key: Any) -> bool:
    """Tell whether a key says that it must not sign; one that does not say is asked to sign."""
    try:
        return key[Attribute.SIGN] is False
    except _ODD:
        return False


@lru_cache(maxsize=32)
def _mechanism(scheme: SignScheme) -> functions.Mechanism:
    return functions.Mechanism(scheme.mechanism, scheme.pss)

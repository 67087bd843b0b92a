"""Keys that somebody else made on the token, a ceremony perhaps, and that are used as they are.

They are found by label, by CKA_ID or by both, never generated over, never destroyed. Values in,
values out; nothing here talks to a token.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import ErrorKind, InvalidInputError
from spire_hw.pkcs11 import uri as pkcs11_uri
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.evidence import read_evidence
from spire_hw.pkcs11.inventory.inventory import Pair, read_material
from spire_hw.pkcs11.inventory.labels import SCHEME
from spire_hw.pkcs11.wire import unpack_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spire_hw.pkcs11.pool.seat import TokenFacts

_ATTRIBUTES: Final = frozenset({"token", "serial", "object"})


@dataclass(frozen=True, slots=True)
class Import:
    """An existing key that is to be used under a key id.

    Attributes:
        key_id: the key id.
        selector: how the configuration names the key.
        label: its CKA_LABEL, None for any.
        cka_id: its CKA_ID, None for any.
        token: label of the token it is on, None for any.
        serial: serial number of that token, None for any.
    """

    key_id: str
    selector: str
    label: str | None = None
    cka_id: bytes | None = None
    token: str | None = None
    serial: str | None = None

    @classmethod
    def of_uri(cls, key_id: str, text: str) -> Import:
        """Read an RFC 7512 URI that names a key.

        Raises:
            InvalidInputError: it names none, or says more than which key on which token.
        """
        parsed = pkcs11_uri.parse(text)
        if parsed.attributes.get("object") is None and parsed.id is None:
            raise InvalidInputError("pkcs11 URI names no key: object= or id= is required")
        odd = sorted(set(parsed.attributes) - _ATTRIBUTES)
        others = {
            "slot-id": parsed.slot_id,
            "type": parsed.type if parsed.names_other_object else None,
            "pin-source": parsed.pin_source,
            "module-path": parsed.module_path,
            "module-name": parsed.module_name,
        }
        odd += [name for name, value in others.items() if value is not None]
        if odd:
            raise InvalidInputError(
                f"pkcs11 URI attribute {odd[0]} cannot be used here: what is named is a private key, "
                "token and module are those of the key manager"
            )
        return cls(
            key_id,
            text,
            label=parsed.attributes.get("object"),
            cka_id=parsed.id,
            token=parsed.token,
            serial=parsed.serial,
        )

    def find(self, halves: Sequence[Mapping[str, Any]], facts: TokenFacts) -> Pair | None:
        """Return the key among all that a token lists, None when it is not there.

        Raises:
            TokenError: FAILED_PRECONDITION, several fit, or what fits may not be used.
        """
        if self.token not in {None, facts.label} or self.serial not in {None, facts.serial}:
            raise self._refused(f"names another token than {facts.device}")
        by_id: dict[bytes, list[Mapping[str, Any]]] = defaultdict(list)
        for half in halves:
            by_id[unpack_bytes(half.get("id"))].append(half)
        found = [
            half for halves in by_id.values() for half in halves if half.get("private") is True
        ]
        found = [half for half in found if self._fits(half)]
        if not found:
            return None
        ids = sorted({unpack_bytes(half.get("id")).hex() or "none" for half in found})
        if len(found) > 1:
            raise self._refused(f"fits several keys (CKA_ID {', '.join(ids)}); name one by its id")
        private = found[0]
        cka_id, label = unpack_bytes(private.get("id")), str(private.get("label") or "")
        if not cka_id:
            raise self._refused("fits a key without CKA_ID; give it one with the token's own tool")
        if label.startswith(f"{SCHEME}:"):
            raise self._refused(f"fits {label}, which is the key of a running server")
        same = by_id[cka_id]
        publics = [half for half in same if half.get("private") is not True]
        shown = [read_material(half.get("material")) for half in (*publics, private)]
        return Pair(
            cka_id=cka_id,
            label=label,
            name="",
            generation=0,
            privates=len(same) - len(publics),
            publics=len(publics),
            material=next((m for m in shown if m is not None), None),
            evidence=read_evidence(private),
        )

    def _fits(self, half: Mapping[str, Any]) -> bool:
        if self.label is not None and half.get("label") != self.label:
            return False
        return self.cka_id is None or unpack_bytes(half.get("id")) == self.cka_id

    def missing(self, facts: TokenFacts, *, was_there: bool) -> TokenError:
        """Return the error that says that the key is not on the token."""
        if was_there:
            return TokenError(
                f'import "{self.key_id}": {self.selector} is no longer on token {facts.device}; '
                "bring the key or its token back",
                reason="hsm.keys_missing",
                operation="list objects",
                device=facts.device,
                kind=ErrorKind.UNAVAILABLE,
            )
        return self._refused(
            f"fits no private key on token {facts.device}; list what there is with the token's own "
            "tool and correct label or id"
        )

    def changed(self, before: str, now: str) -> TokenError:
        """Return the error that says that the selector fits another key than before."""
        return self._refused(
            f"fits another key than before ({now}, not {before}); if that is meant, name it by "
            "label and id"
        )

    def taken(self) -> TokenError:
        """Return the error that says that nothing is generated in its place."""
        return TokenError(
            f'key "{self.key_id}" is an existing key ({self.selector}) that is never replaced; take '
            f'import "{self.key_id}" out of the configuration to have keys generated for it',
            reason="hsm.key_imported",
            operation="generate key pair",
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    def _refused(self, why: str) -> TokenError:
        return TokenError(
            f'import "{self.key_id}": {self.selector} {why}',
            reason="hsm.import",
            operation="find key",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

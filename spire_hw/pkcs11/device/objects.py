"""Key pairs and data objects on a token: find, create, destroy.

Runs in the worker only. Nothing is ever modified: no C_SetAttributeValue, since several devices lack
it and a full SoftHSM destroys the object it was to change.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.constants import DEFAULT
from pkcs11.exceptions import ObjectHandleInvalid, PKCS11Error

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import Cure, TokenError, ckr_of
from spire_hw.pkcs11.memory import Memory
from spire_hw.pkcs11.profile import PRIVATE_TEMPLATE, PUBLIC_TEMPLATE
from spire_hw.pkcs11.wire import ID_TAKEN, pack_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from spire_hw.pkcs11.device.token import TokenSession
    from spire_hw.pkcs11.profile import Profile

_EVIDENCE: Final = {
    "LOCAL": Attribute.LOCAL,
    "KEY_GEN_MECHANISM": Attribute.KEY_GEN_MECHANISM,
    "TOKEN": Attribute.TOKEN,
    "PRIVATE": Attribute.PRIVATE,
    "SENSITIVE": Attribute.SENSITIVE,
    "ALWAYS_SENSITIVE": Attribute.ALWAYS_SENSITIVE,
    "EXTRACTABLE": Attribute.EXTRACTABLE,
    "NEVER_EXTRACTABLE": Attribute.NEVER_EXTRACTABLE,
    "SIGN": Attribute.SIGN,
    "DECRYPT": Attribute.DECRYPT,
    "UNWRAP": Attribute.UNWRAP,
    "DERIVE": Attribute.DERIVE,
}
_VALUE_INVALID: Final = "ATTRIBUTE_VALUE_INVALID"
_TEMPLATE_REFUSED: Final = frozenset({"TEMPLATE_INCONSISTENT", _VALUE_INVALID})
# Also how tpm2-pkcs11 answers a template with explicit FALSE usage flags.
_TEMPLATE_MAYBE: Final = _TEMPLATE_REFUSED | {"GENERAL_ERROR", "ATTRIBUTE_TYPE_INVALID"}
_MORE_LISTINGS: Final = 4
_ODD: Final = (ValueError, NotImplementedError, UnicodeDecodeError)
_NO_ANSWER: Final = frozenset(
    {
        *("DEVICE_ERROR", "DEVICE_MEMORY", "DEVICE_REMOVED", "HOST_MEMORY", "TOKEN_NOT_PRESENT"),
        *("SESSION_CLOSED", "SESSION_HANDLE_INVALID", "USER_NOT_LOGGED_IN"),
        *("CRYPTOKI_NOT_INITIALIZED", "OBJECT_HANDLE_INVALID"),
    }
)


class TokenObjects:
    """The objects of one logged-in token."""

    def __init__(self, token: TokenSession, profile: Profile) -> None:
        self._token = token
        self._profile = profile

    def listing(self, prefix: str, *, data_only: bool = False) -> dict[str, Any]:
        """Return all key halves and data objects whose label starts with prefix.

        Args:
            prefix: what labels start with.
            data_only: only the data objects that have it for their whole label: that is quick.

        Raises:
            TokenError: not logged in, or the search failed.
        """
        for _ in range(_MORE_LISTINGS):
            try:
                return self._list(prefix, data_only=data_only)
            except TokenError as e:
                # What others destroy between being found and being read is no fault of the token.
                if e.cure is not Cure.KEY:
                    raise
        return self._list(prefix, data_only=data_only)

    def _list(self, prefix: str, *, data_only: bool) -> dict[str, Any]:
        self._token.check_logged_in()
        try:
            halves: list[dict[str, Any]] = []
            if data_only:
                data = self._data(prefix, {Attribute.LABEL: prefix})
            else:
                halves += self._halves(ObjectClass.PRIVATE_KEY, prefix)
                halves += self._halves(ObjectClass.PUBLIC_KEY, prefix)
                data = self._data(prefix, {})
        except PKCS11Error as e:
            error = TokenError.of(e, "list objects", self._token.device)
            self._token.renew()
            raise error from e
        self._token.check_logged_in()
        memory = {} if data_only else self._memory().fields
        return {"halves": halves, "data": data, "memory": memory}

    def _memory(self) -> Memory:
        return self._token.memory() if self._profile.tells_memory else Memory()

    def _find(self, attributes: dict[Attribute, Any]) -> list[Any]:
        return list(self._token.session.get_objects(attributes))

    def _halves(self, kind: ObjectClass, prefix: str) -> list[dict[str, Any]]:
        found = []
        for item in self._find({Attribute.CLASS: kind}):
            label = _read(item, Attribute.LABEL)
            if isinstance(label, str) and label.startswith(prefix):
                found.append(_describe(item, label, is_private=kind is ObjectClass.PRIVATE_KEY))
        return found

    def _data(self, prefix: str, narrowed: dict[Attribute, Any]) -> list[dict[str, Any]]:
        found = []
        for item in self._find({Attribute.CLASS: ObjectClass.DATA, **narrowed}):
            label = _read(item, Attribute.LABEL)
            if isinstance(label, str) and label.startswith(prefix):
                value = _read(item, Attribute.VALUE)
                found.append({"label": label, "value": _pack(value)})
        return found

    def generate(self, key_type: dict[str, Any], cka_id: bytes, label: str) -> dict[str, Any]:
        """Make a key pair and return its private half as `listing` does, with the public key.

        Args:
            key_type: `{"ec_params": base64 text}` or `{"bits": n}`.
            cka_id: CKA_ID of both halves.
            label: CKA_LABEL of both halves.

        Raises:
            TokenError: the token refused; nothing of the pair is left behind.
        """
        profile = self._profile
        if not profile.generates:
            raise self._cannot_generate()
        memory = self._memory()
        if memory.lacks_room(key_type.get("bits")):
            raise self._full(memory)
        try:
            try:
                public, private = self._generate(key_type, cka_id, label, profile)
            except PKCS11Error as e:
                if ckr_of(e).name == _VALUE_INVALID and self._is_taken(cka_id, label):
                    raise self._taken() from e
                if profile == profile.minimal or ckr_of(e).name not in _TEMPLATE_MAYBE:
                    raise
                self.destroy(cka_id, label)
                public, private = self._generate(key_type, cka_id, label, profile.minimal)
            described = _describe(private, label, is_private=True)
            described["material"] = _material(public) or described["material"]
        except PKCS11Error as e:
            error = self._generate_error(e)
            # A half that cannot be removed now is found and removed at the next start.
            with suppress(TokenError):
                self._token.renew()
                self.destroy(cka_id, label)
            raise error from e
        return described

    def _full(self, memory: Memory) -> TokenError:
        return TokenError(
            f"the token says that it has {memory.words} left, too little for a key pair; make room "
            "on it, or set tells_memory = false in profile_overrides if that is wrong",
            reason="hsm.token_full",
            operation="generate key pair",
            device=self._token.device,
            kind=ErrorKind.RESOURCE_EXHAUSTED,
        )

    def _is_taken(self, cka_id: bytes, label: str) -> bool:
        """Tell whether an object that is none of this pair has its CKA_ID."""
        found = self._find({Attribute.ID: cka_id})
        return any(_read(item, Attribute.LABEL) != label for item in found)

    def _taken(self) -> TokenError:
        return TokenError(
            f"token refused a CKA_ID: CKR_{_VALUE_INVALID}, another object has it",
            reason=ID_TAKEN,
            operation="generate key pair",
            device=self._token.device,
            kind=ErrorKind.ABORTED,
        )

    def _generate_error(self, cause: PKCS11Error) -> TokenError:
        error = TokenError.of(cause, "generate key pair", self._token.device)
        if ckr_of(cause).name not in _TEMPLATE_REFUSED:
            return error
        return TokenError(
            f"token refused key template (profile {self._profile.name}): CKR_{ckr_of(cause).name}; "
            "set the profile of its maker, or profile_overrides for what it must not be sent",
            reason="hsm.template_refused",
            operation="generate key pair",
            device=self._token.device,
            code=error.code,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    def _cannot_generate(self) -> TokenError:
        return TokenError(
            f"keys cannot be made over PKCS#11 in this token (profile {self._profile.name}): make "
            "the key with the maker's own tool and adopt it by its URI",
            reason="hsm.cannot_generate",
            operation="generate key pair",
            device=self._token.device,
            kind=ErrorKind.FAILED_PRECONDITION,
        )

    def _generate(
        self, key_type: dict[str, Any], cka_id: bytes, label: str, profile: Profile
    ) -> tuple[Any, Any]:
        private = _template(PRIVATE_TEMPLATE, profile.private_template)
        public = _template(PUBLIC_TEMPLATE, profile.public_template)
        common: dict[str, Any] = {
            "id": cka_id,
            "label": label,
            "store": True,
            "capabilities": MechanismFlag.SIGN | MechanismFlag.VERIFY,
            "public_template": public,
            "private_template": private,
        }
        session = self._token.session
        if "bits" in key_type:
            mechanism = Mechanism(profile.rsa_mechanism)
            bits = key_type["bits"]
            pair = session.generate_keypair(KeyType.RSA, bits, mechanism=mechanism, **common)
        else:
            parameters = session.create_domain_parameters(
                KeyType.EC, {Attribute.EC_PARAMS: key_type["ec_params"]}, local=True
            )
            pair = parameters.generate_keypair(**common)
        return pair[0], pair[1]

    def destroy(self, cka_id: bytes, label: str) -> int:
        """Destroy the objects of one pair, private half first; return how many there were.

        Raises:
            TokenError: the token refused.
        """
        gone = 0
        try:
            for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
                wanted = {Attribute.CLASS: kind, Attribute.ID: cka_id, Attribute.LABEL: label}
                for item in self._find(wanted):
                    item.destroy()
                    gone += 1
        except PKCS11Error as e:
            error = TokenError.of(e, "destroy key pair", self._token.device)
            self._token.renew()
            raise error from e
        return gone

    def destroy_data(self, label: str) -> int:
        """Destroy the data objects of a label; return how many there were.

        Raises:
            TokenError: the token refused.
        """
        found = []
        try:
            found = self._find({Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: label})
            for item in found:
                item.destroy()
        except PKCS11Error as e:
            error = TokenError.of(e, "destroy data object", self._token.device)
            self._token.renew()
            raise error from e
        return len(found)

    def put_data(self, label: str, application: str, value: bytes) -> None:
        """Write a data object, then destroy older ones of that label.

        Raises:
            TokenError: the token refused.
        """
        wanted = {Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: label}
        try:
            older = self._find(wanted)
            self._token.session.create_object(
                {
                    Attribute.CLASS: ObjectClass.DATA,
                    Attribute.TOKEN: True,
                    Attribute.PRIVATE: True,
                    Attribute.LABEL: label,
                    Attribute.APPLICATION: application,
                    Attribute.VALUE: value,
                }
            )
            for item in older:
                # Another instance may have done the same meanwhile.
                with suppress(ObjectHandleInvalid):
                    item.destroy()
        except PKCS11Error as e:
            error = TokenError.of(e, "write data object", self._token.device)
            self._token.renew()
            raise error from e


def _template(all_names: Iterable[str], sent: Mapping[str, bool]) -> dict[Attribute, Any]:
    # What is not named would be filled in by the library: DEFAULT keeps it out of the call.
    return {Attribute[name]: sent.get(name, DEFAULT) for name in all_names}


def _read(item: Any, attribute: Attribute) -> object:
    # An attribute that cannot be read or decoded counts as not proven, see inventory; a device that
    # fails just now has said nothing of it.
    try:
        return item[attribute]
    except PKCS11Error as e:
        if ckr_of(e).name in _NO_ANSWER:
            raise
        return None
    except _ODD:
        return None


def _pack(value: object) -> str:
    return pack_bytes(bytes(value)) if isinstance(value, bytes | bytearray) else ""


def _describe(item: Any, label: str, *, is_private: bool) -> dict[str, Any]:
    evidence: dict[str, bool | int | None] = {}
    if is_private:
        for name, attribute in _EVIDENCE.items():
            value = _read(item, attribute)
            evidence[name] = (
                int(value)
                if name == "KEY_GEN_MECHANISM" and isinstance(value, int)
                else (value if isinstance(value, bool) else None)
            )
    return {
        "id": _pack(_read(item, Attribute.ID)),
        "label": label,
        "private": is_private,
        "material": _material(item),
        "evidence": evidence,
    }


def _material(item: Any) -> dict[str, Any] | None:
    kind = _read(item, Attribute.KEY_TYPE)
    if not isinstance(kind, int):
        return None
    if kind == KeyType.EC:
        point = _pack(_read(item, Attribute.EC_POINT))
        params = _pack(_read(item, Attribute.EC_PARAMS))
        return {"kind": int(kind), "params": params, "point": point} if point else None
    if kind != KeyType.RSA:
        return {"kind": int(kind)}
    modulus = _pack(_read(item, Attribute.MODULUS))
    exponent = _pack(_read(item, Attribute.PUBLIC_EXPONENT))
    return {"kind": int(kind), "modulus": modulus, "exponent": exponent} if modulus else None

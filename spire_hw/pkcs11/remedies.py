"""What an operator can do about each return code of a token, at the step that met it.

Text in, text out; the meaning of the codes for callers is in `spire_hw.pkcs11.errors`.

Spec: PKCS #11 v2.40 section 11.1 (return values).
"""

from __future__ import annotations

from typing import Final

SIGN: Final = "sign"
GENERATE: Final = "generate key pair"
DESTROY: Final = "destroy key pair"
WRITE: Final = "write data object"

_LOOK: Final = "look at the device: it may be away, full or not writable"
_BACK: Final = "bring the token back"
_OFFICER: Final = "its security officer (SO) is logged in: end that session"
_PIN: Final = "correct the PIN at its source"
_SESSIONS: Final = "look at its time-outs, and at what else uses it"
_TEMPLATE: Final = "set the profile of its maker, or profile_overrides for what it must not be sent"
_DIGEST: Final = "it does not sign digests of this length with this key: use another hash"
_PROTECTED: Final = "the token is write-protected: lift that"
_OBJECT_GONE: Final = "the object is gone or was replaced: see what else uses the token"
_MEMORY: Final = "it has no memory left for that: close what else uses it, or set fewer workers"
_MAKERS_TOOL: Final = "make the key with the maker's own tool and import it"

_REMEDIES: Final = {
    "ACTION_PROHIBITED": "its policy forbids that: see to its settings and the object's attributes",
    "ARGUMENTS_BAD": "it does not take what it is sent: update its module",
    "ATTRIBUTE_READ_ONLY": _TEMPLATE,
    "ATTRIBUTE_SENSITIVE": "it hides what has to be read: look at the object with its own tool",
    "ATTRIBUTE_TYPE_INVALID": _TEMPLATE,
    "ATTRIBUTE_VALUE_INVALID": _TEMPLATE,
    "CRYPTOKI_ALREADY_INITIALIZED": "its module is loaded by two paths: name it by one",
    "CRYPTOKI_NOT_INITIALIZED": "its module lost its state: update it if that goes on",
    "DATA_INVALID": _DIGEST,
    "DATA_LEN_RANGE": _DIGEST,
    "DEVICE_ERROR": _LOOK,
    "DEVICE_MEMORY": _MEMORY,
    "DEVICE_REMOVED": _BACK,
    "FUNCTION_CANCELED": "something cancelled it at the device: look there",
    "FUNCTION_FAILED": _LOOK,
    "FUNCTION_NOT_SUPPORTED": "its module cannot do that: update it",
    "GENERAL_ERROR": _LOOK,
    "HOST_MEMORY": "this host has no memory left: end what uses it up",
    "KEY_FUNCTION_NOT_PERMITTED": "the key must not do that any more: give CKA_SIGN back",
    "KEY_HANDLE_INVALID": _OBJECT_GONE,
    "KEY_SIZE_RANGE": "it does not take keys of this size: use another key type",
    "KEY_TYPE_INCONSISTENT": "it is another kind of key there: look at it with the token's own tool",
    "MECHANISM_INVALID": "see to its configuration or firmware, or use another key type",
    "MECHANISM_PARAM_INVALID": "it does not take these parameters: use another hash or no PSS",
    "OBJECT_HANDLE_INVALID": _OBJECT_GONE,
    "OPERATION_ACTIVE": _SESSIONS,
    "OPERATION_NOT_INITIALIZED": _SESSIONS,
    "PIN_EXPIRED": "set a new PIN with the token's own tool and put it at its source",
    "PIN_INCORRECT": _PIN,
    "PIN_INVALID": _PIN,
    "PIN_LEN_RANGE": _PIN,
    "PIN_LOCKED": "an operator must unlock the PIN",
    "SESSION_CLOSED": _SESSIONS,
    "SESSION_COUNT": "it has no session left: close what else uses it, or set fewer workers",
    "SESSION_HANDLE_INVALID": _SESSIONS,
    "SESSION_READ_ONLY": _PROTECTED,
    "SESSION_READ_ONLY_EXISTS": "a read-only session is in the way: end what else uses the token",
    "SESSION_READ_WRITE_SO_EXISTS": _OFFICER,
    "SLOT_ID_INVALID": _BACK,
    "TEMPLATE_INCOMPLETE": _TEMPLATE,
    "TEMPLATE_INCONSISTENT": _TEMPLATE,
    "TOKEN_NOT_PRESENT": _BACK,
    "TOKEN_NOT_RECOGNIZED": "its module does not know what is in the slot: look at the device",
    "TOKEN_WRITE_PROTECTED": _PROTECTED,
    "USER_ALREADY_LOGGED_IN": "another login is in the way: see what else uses its module",
    "USER_ANOTHER_ALREADY_LOGGED_IN": _OFFICER,
    "USER_NOT_LOGGED_IN": _SESSIONS,
    "USER_PIN_NOT_INITIALIZED": "have its security officer set a user PIN",
    "USER_TOO_MANY_TYPES": "others are logged in and it takes no more: see what else uses it",
}
_FULL: Final = "the token is full: make room on it"
_AT_STEP: Final = {
    ("ACTION_PROHIBITED", SIGN): "its policy forbids that: see to its settings and CKA_SIGN",
    ("ACTION_PROHIBITED", GENERATE): f"its policy forbids that: allow it there, or {_MAKERS_TOOL}",
    ("ACTION_PROHIBITED", DESTROY): "it may not be destroyed: see to CKA_DESTROYABLE",
    ("DEVICE_MEMORY", GENERATE): _FULL,
    ("DEVICE_MEMORY", WRITE): _FULL,
    ("FUNCTION_NOT_SUPPORTED", GENERATE): f"it cannot make keys: {_MAKERS_TOOL}",
}
_OTHER_CODE: Final = "look the code up in its maker's documentation"
_NO_CODE: Final = "what its module answered cannot be understood: update it"


def remedy_of(name: str, value: int, step: str) -> str:
    """Return what to do about a return code.

    Args:
        name: of the code, without the `CKR_` in front.
        value: its number; 0 when the library raised something that is no return code.
        step: what was asked of the token, such as `sign`.
    """
    found = _AT_STEP.get((name, step)) or _REMEDIES.get(name)
    return found or (_OTHER_CODE if value else _NO_CODE)

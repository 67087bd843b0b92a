"""The process that looks at one module: its slots, tokens and mechanisms, without any login.

Started as `python -P -m spire_hw.pkcs11.device.surveyor <parent pid> <module>`. A vendor's library may
crash, hang or print; so it is loaded here and nowhere near the program that asked. One JSON object
goes to what was standard output; the library's own words go nowhere.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from spire_hw.pkcs11.channel import harden
from spire_hw.pkcs11.errors import TokenError, ckr_of
from spire_hw.pkcs11.module import load_fault

_FLAGS: Final = {
    "TOKEN_INITIALIZED": "initialized",
    "USER_PIN_INITIALIZED": "user_pin_set",
    "LOGIN_REQUIRED": "login_required",
    "WRITE_PROTECTED": "write_protected",
    "PROTECTED_AUTHENTICATION_PATH": "protected_authentication_path",
    "USER_PIN_COUNT_LOW": "user_pin_count_low",
    "USER_PIN_FINAL_TRY": "user_pin_final_try",
    "USER_PIN_LOCKED": "user_pin_locked",
}


def survey(module: str) -> dict[str, Any]:
    """Return what a module shows; "problem" says why it shows nothing."""
    try:
        import pkcs11  # noqa: PLC0415 - its absence is answered in words
    except ImportError as e:
        return {"problem": f"python-pkcs11 cannot be loaded ({e.name or 'shared library'})"}
    from pkcs11.exceptions import PKCS11Error  # noqa: PLC0415 - likewise

    try:
        library = pkcs11.lib(module)
        slots = [_slot(slot, library, module) for slot in library.get_slots()]
    except PKCS11Error as e:
        return {"problem": _problem(e, "initialise module")}
    return {
        "library": {
            "manufacturer": library.manufacturer_id,
            "description": library.library_description,
            "version": _version(library.library_version),
            "cryptoki": _version(library.cryptoki_version),
        },
        "slots": slots,
    }


def _slot(slot: Any, library: Any, module: str) -> dict[str, Any]:
    from pkcs11 import SlotFlag  # noqa: PLC0415 - after `survey` has found it
    from pkcs11.exceptions import PKCS11Error  # noqa: PLC0415 - likewise

    shown: dict[str, Any] = {
        "id": slot.slot_id,
        "description": slot.slot_description,
        "manufacturer": slot.manufacturer_id,
    }
    if not slot.flags & SlotFlag.TOKEN_PRESENT:
        return shown
    try:
        shown["token"] = _token(slot.get_token(), slot, library, module)
    except PKCS11Error as e:
        shown["problem"] = _problem(e, "look at token")
    return shown


def _token(token: Any, slot: Any, library: Any, module: str) -> dict[str, Any]:
    from pkcs11 import TokenFlag  # noqa: PLC0415 - after `survey` has found it

    from spire_hw.pkcs11.device.slots import mechanisms_of  # noqa: PLC0415 - likewise

    words = [token.manufacturer_id, token.model, slot.manufacturer_id, slot.slot_description]
    words += [library.manufacturer_id, library.library_description, Path(module).name]
    return {
        "label": token.label,
        "serial": token.serial.decode("ascii", "replace").strip("\0 "),
        "manufacturer": token.manufacturer_id,
        "model": token.model,
        "flags": [word for name, word in _FLAGS.items() if token.flags & TokenFlag[name]],
        "mechanisms": mechanisms_of(slot)[0],
        "memory": _memory(slot, module),
        "words": words,
    }


def _memory(slot: Any, module: str) -> dict[str, int]:
    from spire_hw.pkcs11.device.functions import CkrError, Functions  # noqa: PLC0415 - likewise

    try:
        return Functions(module).memory(slot.slot_id).fields
    except CkrError:
        return {}


def _version(version: Any) -> str:
    return ".".join(str(part) for part in version)


def _problem(error: BaseException, operation: str) -> str:
    if fault := load_fault(error, "a library it needs cannot be found"):
        return fault
    return TokenError.of(error, operation).message if ckr_of(error).value else operation + " failed"


def main() -> None:
    """Survey the module named by the arguments and print what was found."""
    harden(int(sys.argv[1]))
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    found = json.dumps(survey(sys.argv[2])).encode()
    while found:
        found = found[os.write(answer, found) :]
    # Not by way of the library's own clean-up, which may crash or hang.
    os._exit(0)


if __name__ == "__main__":
    main()

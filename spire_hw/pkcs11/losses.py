"""Does a listing show every key there has to be?

A token that went away lists nothing and says no error; a backup put back lists old keys. Neither
may be taken for the truth, or a server would make itself a new CA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.labels import key_name

if TYPE_CHECKING:
    from spire_hw.pkcs11.inventory import Inventory
    from spire_hw.pkcs11.ledger import Ledger


def check_losses(inventory: Inventory, ledger: Ledger, device: str) -> None:
    """Refuse a listing that shows fewer keys, or older ones, than note and manifest name.

    Raises:
        TokenError: UNAVAILABLE when keys are missing, FAILED_PRECONDITION when they are older.
    """
    ids = ledger.ids(inventory)
    shown = {ids[name]: pair for name, pair in inventory.current.items() if name in ids}
    expected = {key_name(k): k for k in (*ledger.state.keys, *ledger.entries)}
    if inventory.manifest is not None:
        expected = {**inventory.manifest.keys, **expected}
    missing = sorted(key_id for key_id in expected.values() if key_id not in shown)
    older = sorted(
        key_id
        for key_id, known in ledger.state.keys.items()
        if key_id in shown and shown[key_id].generation < known.generation
    )
    if missing:
        message = (
            f"manifest names {len(expected)} keys, token {device} shows {len(shown)}; "
            f"missing: {', '.join(missing)}"
        )
        kind = ErrorKind.UNAVAILABLE
    elif older:
        message = f"token {device} shows older generations of {', '.join(older)}"
        kind = ErrorKind.FAILED_PRECONDITION
    else:
        return
    raise TokenError(
        f"{message}; set accept_key_loss to go on without them",
        reason="hsm.keys_missing",
        operation="list objects",
        device=device,
        kind=kind,
    )

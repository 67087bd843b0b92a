"""Does a listing show every key there has to be?

A token that went away lists nothing and says no error; a backup put back lists old keys. Neither
may be taken for the truth, or a server would make itself a new CA. Values in, values out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spire_hw.errors import ErrorKind
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.inventory.labels import key_name
from spire_hw.pkcs11.wire import unpack_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from spire_hw.pkcs11.inventory.choice import Choice
    from spire_hw.pkcs11.inventory.inventory import Inventory, Pair
    from spire_hw.pkcs11.keyring.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Losses:
    """What a listing does not show.

    Attributes:
        missing: key ids of which no usable generation is there.
        older: key ids of which only older generations are there.
        unreadable: key ids of which a generation has to be current, but shows no public half.
        expected: how many keys there have to be.
        shown: how many there are.
    """

    missing: tuple[str, ...]
    older: tuple[str, ...]
    unreadable: tuple[str, ...]
    expected: int
    shown: int

    def without(self, gone: Collection[str]) -> Losses:
        """Return what is lost besides keys that are known to be gone.

        A listing that shows none proves nothing: so does that of a token that went away.
        """
        if self.shown == 0:
            return self
        return replace(self, missing=tuple(k for k in self.missing if k not in gone))

    def error(self, device: str) -> TokenError | None:
        """Return the error that says so; None when nothing is lost."""
        if self.missing:
            message = (
                f"manifest names {self.expected} keys, token {device} shows {self.shown}; "
                f"missing: {', '.join(self.missing)}"
            )
            kind = ErrorKind.UNAVAILABLE
        elif self.older:
            message = f"token {device} shows older generations of {', '.join(self.older)}"
            kind = ErrorKind.FAILED_PRECONDITION
        elif self.unreadable:
            message = (
                f"token {device} shows private keys of {', '.join(self.unreadable)} that lost their "
                "public halves, which only the note of the host that made them could tell: bring "
                "that file back"
            )
            kind = ErrorKind.FAILED_PRECONDITION
        else:
            return None
        return TokenError(
            f"{message}; set accept_key_loss to go on without them",
            reason="hsm.keys_missing",
            operation="list objects",
            device=device,
            kind=kind,
        )


def losses_of(inventory: Inventory, ledger: Ledger) -> Losses:
    """Compare a listing with what note, manifest and keys in use tell of."""
    ids = ledger.ids(inventory)
    shown = {ids[name]: pair for name, pair in inventory.current.items() if name in ids}
    in_use = [key_id for key_id, entry in ledger.entries.items() if not entry.is_existing]
    expected = {key_name(k): k for k in (*ledger.state.keys, *in_use)}
    if inventory.manifest is not None:
        expected = {**inventory.manifest.keys, **expected}
    private = [h for h in inventory.halves if h.privates and h.name in ids]
    unreadable = {
        ids[half.name]
        for half in private
        if _may_be_current(half, ids[half.name], shown, expected.values())
    } - {*ledger.state.keys, *in_use}
    missing = sorted(k for k in expected.values() if k not in shown and k not in unreadable)
    older = sorted(
        key_id
        for key_id, known in ledger.state.keys.items()
        if key_id in shown
        and shown[key_id].generation < known.generation
        and not _is_taken_back(shown[key_id], inventory.choices.get(key_id), known.generation)
    )
    lost = tuple(sorted(unreadable))
    return Losses(tuple(missing), tuple(older), lost, len(expected), len(shown))


def _is_taken_back(pair: Pair, choice: Choice | None, known: int) -> bool:
    """Tell whether an operator chose the older one, perhaps by way of another host."""
    return choice is not None and choice.generation == pair.generation and choice.over >= known


def _may_be_current(
    half: Pair, key_id: str, shown: Mapping[str, Pair], expected: Collection[str]
) -> bool:
    if key_id not in shown:
        # What nobody tells of is what a crash left of a first generation.
        return key_id in expected
    return shown[key_id].generation < half.generation


def find_moved(
    missing: Iterable[str], ledger: Ledger, halves: Sequence[Mapping[str, Any]], device: str
) -> TokenError | None:
    """Return an error with a hint when a missing key is there under another label or CKA_ID.

    Args:
        missing: key ids.
        ledger: knows their CKA_IDs.
        halves: every key object that the token lists.
        device: the token, for messages.
    """
    privates = [half for half in halves if half.get("private") is True]
    hints = []
    for key_id in missing:
        known = ledger.state.keys.get(key_id)
        if known is None:
            continue
        label = ledger.owner.key_label(key_id, known.generation)
        for half in privates:
            cka_id = unpack_bytes(half.get("id"))
            if cka_id == known.cka_id and half.get("label") != label:
                hints.append(
                    f'"{key_id}" is now labelled "{half.get("label")}": give back "{label}"'
                )
            elif half.get("label") == label and cka_id != known.cka_id:
                hints.append(
                    f'"{key_id}" has now CKA_ID {cka_id.hex()}: give back {known.cka_id.hex()}'
                )
    if not hints:
        return None
    return TokenError(
        f"keys were renamed on token {device}: {'; '.join(hints)}",
        reason="hsm.key_renamed",
        operation="list objects",
        device=device,
        cure=Cure.OPERATOR,
        kind=ErrorKind.FAILED_PRECONDITION,
    )

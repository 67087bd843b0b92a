"""This host's notes of its keys when it has several tokens: one for each, found by the token's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotReadyError
from spire_hw.pkcs11.cluster.member import held_keys
from spire_hw.pkcs11.keyring.state import StateFile

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from spire_hw.pkcs11.inventory.labels import Owner

_FOLDER: Final = "pkcs11-tokens"


class Notes:
    """The notes of one owner.

    Args:
        data_dir: where the note of a single token is; those of several are in a folder below.
        owner: whose keys.
    """

    def __init__(self, data_dir: Path, owner: Owner) -> None:
        self._data_dir = data_dir
        self._owner = owner

    def of(self, name: str, token: Mapping[str, object]) -> StateFile:
        """Return the note of a token; the one from when it was the only token goes on in it.

        Args:
            name: what the configuration calls it.
            token: how it is chosen: `label` and `serial`.

        Raises:
            NotReadyError: there is no place for it.
            TokenError: a note cannot be read or written.
        """
        folder = self._data_dir / _FOLDER / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise NotReadyError(f"{folder} cannot be made: {e.strerror}") from e
        file = StateFile(folder, self._owner)
        if file.path.exists():
            return file
        single = StateFile(self._data_dir, self._owner).load()
        serial, label = token.get("serial"), token.get("label")
        is_it = single.token_serial == serial if serial else single.token_label == label
        if single.token_serial and is_it:
            file.save(single)
        return file

    def floors(self, names: Collection[str]) -> dict[str, int]:
        """Return the generations that were on tokens which are configured no more, by key id.

        Raises:
            TokenError: a note cannot be read.
        """
        floors: dict[str, int] = {}
        folder = self._data_dir / _FOLDER
        former = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name not in names]
        for path in former:
            note = StateFile(path, self._owner).load()
            for key_id, held in held_keys(note, self._owner).items():
                if not held.entry.is_existing:
                    floors[key_id] = max(floors.get(key_id, 0), held.rank)
        return floors

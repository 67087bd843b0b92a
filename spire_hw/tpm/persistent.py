"""Keys under persistent handles: kept in the TPM itself, ready without loading.

A handle is just a number that any program may take, so a key is always known by its Name: nothing
is used, overwritten or removed because of its handle alone. All functions are parts of a job.

Spec: TPM 2.0 Library, Part 3 "TPM2_EvictControl"; TCG Registry of Reserved TPM 2.0 Handles.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from spire_hw.errors import NotReadyError
from spire_hw.tpm.connection import PERSISTENT_HANDLES, Hierarchy
from spire_hw.tpm.errors import Rc, TpmError
from spire_hw.tpm.storage import name_of_handle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.tpm.connection import Connection


def persist(connection: Connection, key: Any, handle: int) -> None:
    """Keep a loaded key under a persistent handle; nothing happens when it is there already.

    Args:
        connection: the TPM.
        key: its transient handle.
        handle: the number, in the owner's range.

    Raises:
        NotReadyError: the handle holds another key.
        TpmError: the TPM refused, for one because it has no room.
    """
    name = name_of_handle(connection, key)
    found = persistent_names(connection, handle, 1).get(handle)
    if found == name:
        return
    if found is not None:
        raise NotReadyError(f"handle 0x{handle:08X} holds another key")
    with connection.authorised(Hierarchy.OWNER) as (owner, session):
        made = connection.call(connection.esys.evict_control, owner, key, handle, session1=session)
    _forget(connection, made)


def evict(connection: Connection, handle: int, name: bytes) -> bool:
    """Take a key out of the TPM; tell whether it was there.

    Only the key of the given Name is touched: the handle may be another program's by now.

    Raises:
        TpmError: the TPM refused.
    """
    if persistent_names(connection, handle, 1).get(handle) != name:
        return False
    kept = connection.call(connection.esys.tr_from_tpmpublic, handle)
    with connection.authorised(Hierarchy.OWNER) as (owner, session):
        # The library's object goes with the key.
        connection.call(connection.esys.evict_control, owner, kept, handle, session1=session)
    return True


def persistent_names(connection: Connection, first: int, count: int) -> dict[int, bytes]:
    """Return the Names of the keys in a range of persistent handles."""
    found = {}
    for number in connection.handles(PERSISTENT_HANDLES):
        if first <= number < first + count:
            kept = connection.call(connection.esys.tr_from_tpmpublic, number)
            found[number] = name_of_handle(connection, kept)
            _forget(connection, kept)
    return found


@contextlib.contextmanager
def kept_key(connection: Connection, handle: int, name: bytes) -> Iterator[Any]:
    """Give the library's handle of a persistent key, None when there is none of this Name."""
    kept = _open(connection, handle)
    if kept is None:
        yield None
        return
    try:
        yield kept if name_of_handle(connection, kept) == name else None
    finally:
        _forget(connection, kept)


def _open(connection: Connection, handle: int) -> Any:
    """Return the library's object of a persistent handle, None when nothing is there."""
    try:
        return connection.call(connection.esys.tr_from_tpmpublic, handle)
    except TpmError as e:
        if not e.is_any(frozenset({Rc.HANDLE})):
            raise
        return None


def _forget(connection: Connection, handle: Any) -> None:
    """Drop the library's object; the key stays where it is."""
    if not connection.is_lost:
        connection.esys.tr_close(handle)

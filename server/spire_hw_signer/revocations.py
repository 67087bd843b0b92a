"""Clients that operators have shut out, besides those that the policy file names."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.files import NoFileError, parse_file, replace_file
from spire_hw_signer.audit.record import canonical, load_canonical

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_signer.policy import Policy

FILE_NAME: Final = "revoked.json"
MAX_REVOKED: Final = 10_000
_MAX_BYTES: Final = 8 << 20
_WHAT: Final = "revoked clients"


class Revocations:
    """The list, in a file that is replaced at each change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identities: frozenset[str] = frozenset()
        self._applied: tuple[Policy, frozenset[str], Policy] | None = None

    @property
    def identities(self) -> frozenset[str]:
        """Return who is shut out."""
        return self._identities

    async def load(self) -> None:
        """Read the file; none is nobody.

        Raises:
            NotReadyError: it cannot be read.
            InvalidInputError: it is not what was written.
        """
        try:
            self._identities = await asyncio.to_thread(
                parse_file, self._path, _MAX_BYTES, _parse, _WHAT
            )
        except NoFileError:
            self._identities = frozenset()

    def apply(self, policy: Policy) -> Policy:
        """Return a policy that shuts them out, too."""
        if not self._identities:
            return policy
        applied = self._applied
        if applied is None or applied[0] is not policy or applied[1] is not self._identities:
            made = replace(policy, revoked=policy.revoked | self._identities)
            applied = self._applied = (policy, self._identities, made)
        return applied[2]

    async def change(self, identity: str, *, revoked: bool) -> bool:
        """Shut somebody out or let them in again; it is on the disk once this returns.

        Returns:
            Whether that changed anything.

        Raises:
            InvalidInputError: there are too many.
            NotWrittenError: the file cannot be written.
        """
        if (identity in self._identities) is revoked:
            return False
        changed = self._identities ^ {identity}
        if len(changed) > MAX_REVOKED:
            raise InvalidInputError(f"more than {MAX_REVOKED} clients are revoked")
        content = canonical({"revoked": sorted(changed)}) + b"\n"
        await asyncio.to_thread(replace_file, self._path, content, _WHAT)
        self._identities = changed
        return True


def _parse(content: bytes) -> frozenset[str]:
    found = load_canonical(content.removesuffix(b"\n"), "content")
    names = found.get("revoked")
    if set(found) != {"revoked"} or not isinstance(names, list):
        raise EncodingError("content", "expected the member revoked, a list")
    if not all(isinstance(name, str) for name in names):
        raise EncodingError("content", "expected identities")
    return frozenset(names)

"""Who has keys on one token, and whose may be cleared away.

A token may serve several servers; one that is no more leaves its keys behind, and an HSM gives no
second thought to a destroyed key. So nothing is cleared away of which it is not certain whose it is
and that its server has been silent for long. Values in, values out; nothing here talks to a token.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, NotReadyError
from spire_hw.pkcs11.inventory.inventory import listed_data, listed_halves
from spire_hw.pkcs11.inventory.labels import SCHEME, Owner
from spire_hw.pkcs11.inventory.manifest import Manifest
from spire_hw.pkcs11.wire import unpack_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# A clock that is off by more is not believed when it says what is old.
JUMP_S: Final = 3600.0
_PREFIX_PARTS: Final = 3


@dataclass(frozen=True, slots=True)
class Tenant:
    """One server, or one agent, with objects on a token.

    Attributes:
        prefix: what its labels start with.
        owner: whose they are in full; None when no manifest says so.
        is_own: these are the caller's keys.
        marked: when its manifest was written last, Unix seconds; 0 when that is unknown.
        pairs: CKA_ID and label of its key objects, each once.
    """

    prefix: str
    owner: Owner | None
    is_own: bool
    marked: float
    pairs: tuple[tuple[bytes, str], ...]

    def why_kept(self, own: Owner, now: float, older_than_s: float) -> str:
        """Return why its keys are not to be cleared away, "" when they may be.

        Args:
            own: the caller.
            now: Unix seconds.
            older_than_s: for how long it must have been silent.
        """
        if self.is_own:
            return "keys of this server"
        if self.owner is None:
            return "no manifest says whose they are"
        if self.owner.trust_domain != own.trust_domain:
            return "another trust domain's"
        if self.marked <= 0:
            return "its manifest does not say when it was seen"
        if now - self.marked < older_than_s:
            return "seen too recently"
        return ""


@dataclass(frozen=True, slots=True)
class Tenancy:
    """All objects of a token by whom they belong to.

    Attributes:
        tenants: those with labels of ours, the caller first.
        nameless: key objects without label or without CKA_ID.
        foreign: other key objects.
    """

    tenants: tuple[Tenant, ...]
    nameless: int
    foreign: int

    def check_clock(self, now: float) -> None:
        """Refuse to judge ages by a clock that nobody's marks agree with.

        Raises:
            NotReadyError: no mark is within an hour of now.
        """
        newest = max((tenant.marked for tenant in self.tenants), default=0.0)
        if newest <= 0:
            raise NotReadyError(
                "nobody has marked a manifest on this token yet, so that no age can be trusted; "
                "start this server first"
            )
        if abs(now - newest) > JUMP_S:
            hours = abs(now - newest) / JUMP_S
            direction = "ahead of" if now > newest else "behind"
            raise NotReadyError(
                f"this machine's clock is {hours:.1f} h {direction} the newest mark on the token: "
                "nothing is destroyed; correct the clock or start this server, which marks again"
            )

    def is_vouched(self, now: float) -> bool:
        """Tell whether a server other than the caller has marked about now: by a clock of its own.

        The caller's own mark says nothing of a clock that was wrong from the start.
        """
        others = (tenant.marked for tenant in self.tenants if not tenant.is_own)
        return any(marked > 0 and abs(now - marked) <= JUMP_S for marked in others)


def read_tenancy(listing: Mapping[str, Any], own: Owner) -> Tenancy:
    """Sort out a listing of everything on a token.

    Raises:
        EncodingError: the listing does not decode.
    """
    pairs: dict[str, dict[tuple[bytes, str], None]] = defaultdict(dict)
    nameless = foreign = 0
    for half in listed_halves(listing):
        label, cka_id = str(half.get("label") or ""), unpack_bytes(half.get("id"))
        prefix = _prefix_of(label)
        if prefix is not None and cka_id:
            pairs[prefix][cka_id, label] = None
        elif not label or not cka_id:
            nameless += 1
        else:
            foreign += 1
    manifests: dict[str, list[Manifest]] = defaultdict(list)
    for item in listed_data(listing):
        prefix = _prefix_of(str(item.get("label") or ""))
        if prefix is not None:
            manifests[prefix] += _manifest_of(item)
    found = [
        _tenant(prefix, pairs.get(prefix, {}), manifests.get(prefix, []), own)
        for prefix in sorted({*pairs, *manifests})
    ]
    return Tenancy(tuple(sorted(found, key=lambda t: not t.is_own)), nameless, foreign)


def _prefix_of(label: str) -> str | None:
    parts = label.split(":")
    if len(parts) <= _PREFIX_PARTS or parts[0] != SCHEME:
        return None
    return ":".join([*parts[:_PREFIX_PARTS], ""])


def _manifest_of(item: Mapping[str, Any]) -> list[Manifest]:
    try:
        return [Manifest.parse(unpack_bytes(item.get("value")))]
    except EncodingError:
        # Somebody else's, or broken: its keys are nobody's that is known, and stay.
        return []


def _tenant(
    prefix: str, pairs: Iterable[tuple[bytes, str]], manifests: list[Manifest], own: Owner
) -> Tenant:
    owners = {manifest.owner for manifest in manifests if manifest.owner.prefix == prefix}
    return Tenant(
        prefix=prefix,
        owner=owners.pop() if len(owners) == 1 else None,
        is_own=prefix == own.prefix,
        marked=max((manifest.time for manifest in manifests), default=0.0),
        pairs=tuple(pairs),
    )

"""What a listing of a token means: which pair is current, what is left over, what is wrong.

Values in, values out; nothing here talks to a token.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, ErrorKind, InvalidInputError
from spire_hw.key import fingerprint, spki_der
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.evidence import Evidence, read_evidence
from spire_hw.pkcs11.inventory.choice import Choice, merged
from spire_hw.pkcs11.inventory.labels import Owner, key_name
from spire_hw.pkcs11.inventory.manifest import Manifest
from spire_hw.pkcs11.keys import PublicMaterial, public_key_of
from spire_hw.pkcs11.wire import unpack_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Pair:
    """One generation of one key as it is on the token.

    Attributes:
        cka_id: CKA_ID of its halves.
        label: CKA_LABEL of its halves.
        name: key part of the label.
        generation: generation part of the label.
        privates: private objects with this id and label.
        publics: public objects with this id and label.
        material: the public key, None when no object shows it.
        evidence: attributes of the private half.
    """

    cka_id: bytes
    label: str
    name: str
    generation: int
    privates: int
    publics: int
    material: PublicMaterial | None
    evidence: Evidence = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Tell whether both halves are there."""
        return self.privates > 0 and self.publics > 0

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint for messages: `unknown` or `unreadable` when there is none."""
        try:
            if self.material is None:
                return "unknown"
            return fingerprint(spki_der(public_key_of(self.material)))
        except InvalidInputError:
            return "unreadable"


@dataclass(frozen=True, slots=True)
class Inventory:
    """A token's objects of one owner, sorted.

    Attributes:
        current: the generation of each name that is to be used: the highest, or a chosen one.
        retired: complete pairs that are not current.
        halves: pairs that miss a half and are not current.
        manifest: the owner's manifest, None when there is none.
        top: the highest generation of each name, complete or not.
        choices: by key id, the latest choice that note or manifest tell of.
        existing: by key id, keys made elsewhere that are to be used.
    """

    current: Mapping[str, Pair]
    retired: tuple[Pair, ...]
    halves: tuple[Pair, ...]
    manifest: Manifest | None
    top: Mapping[str, int]
    choices: Mapping[str, Choice] = field(default_factory=dict)
    existing: Mapping[str, Pair] = field(default_factory=dict)

    @property
    def everything(self) -> tuple[Pair, ...]:
        """Return all pairs of this owner's, whole or not."""
        return (*self.current.values(), *self.retired, *self.halves)

    @property
    def cka_ids(self) -> set[bytes]:
        """Return every CKA_ID in use."""
        return {p.cka_id for p in (*self.everything, *self.existing.values())}

    def pair(self, cka_id: bytes) -> Pair | None:
        """Return the complete pair with a CKA_ID."""
        everything = (*self.current.values(), *self.retired, *self.existing.values())
        return next((p for p in everything if p.cka_id == cka_id), None)


_NO_CHOICES: Final[Mapping[str, Choice]] = {}


def read_listing(
    owner: Owner,
    listing: Mapping[str, Any],
    known: Mapping[str, bytes] | None = None,
    choices: Mapping[str, Choice] = _NO_CHOICES,
) -> Inventory:
    """Sort out what a worker listed.

    Args:
        owner: whose objects; anything else is passed over.
        listing: the worker's answer to LIST.
        known: CKA_IDs by name whose public key is known from elsewhere, so that a lost public half
            does not make the key unusable.
        choices: what the host's note knows of generations that were taken back.

    Raises:
        EncodingError: the answer does not decode.
        TokenError: FAILED_PRECONDITION, two keys claim one place, or the manifest is another's.
    """
    manifest = _manifest(owner, _items(listing, "data"))
    all_choices = merged(choices, {} if manifest is None else manifest.choices)
    by_choice = {key_name(key_id): choice for key_id, choice in all_choices.items()}
    by_name: dict[str, list[Pair]] = defaultdict(list)
    for pair in _pairs(owner, _items(listing, "halves")):
        by_name[pair.name].append(pair)
    current: dict[str, Pair] = {}
    retired: list[Pair] = []
    halves: list[Pair] = []
    for name, pairs in by_name.items():
        chosen = _choose(pairs, (known or {}).get(name), by_choice.get(name))
        if chosen is not None:
            current[name] = chosen
        rest = [p for p in pairs if p is not chosen]
        retired += [p for p in rest if p.is_complete]
        halves += [p for p in rest if not p.is_complete]
    top = {name: max(p.generation for p in pairs) for name, pairs in by_name.items()}
    return Inventory(current, tuple(retired), tuple(halves), manifest, top, all_choices)


def listed_halves(listing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the descriptions of key objects in a worker's answer to LIST.

    Raises:
        EncodingError: the answer does not decode.
    """
    return _items(listing, "halves")


def listed_data(listing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the descriptions of data objects in a worker's answer to LIST.

    Raises:
        EncodingError: the answer does not decode.
    """
    return _items(listing, "data")


def _items(listing: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    items = listing.get(name)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise EncodingError("token listing", f"{name} is not a list of objects")
    return items


def _pairs(owner: Owner, halves: Iterable[dict[str, Any]]) -> list[Pair]:
    groups: dict[tuple[bytes, str], list[dict[str, Any]]] = defaultdict(list)
    for half in halves:
        groups[unpack_bytes(half.get("id")), str(half.get("label"))].append(half)
    pairs = []
    for (cka_id, label), members in groups.items():
        parsed = owner.parse(label)
        if parsed is None:
            continue
        private = [m for m in members if m.get("private") is True]
        public = [m for m in members if m.get("private") is not True]
        shown = [read_material(m.get("material")) for m in (*public, *private)]
        pairs.append(
            Pair(
                cka_id=cka_id,
                label=label,
                name=parsed.name,
                generation=parsed.generation,
                privates=len(private),
                publics=len(public),
                material=next((m for m in shown if m is not None), None),
                evidence=read_evidence(private[0]) if private else {},
            )
        )
    return pairs


def _choose(pairs: list[Pair], known: bytes | None, choice: Choice | None) -> Pair | None:
    usable = [p for p in pairs if p.is_complete or (p.privates and p.cka_id == known)]
    if not usable:
        # A private half that shows its public key; beside whole pairs it is one in the making.
        usable = [p for p in pairs if p.privates and p.material]
    if not usable:
        return None
    wanted = max(p.generation for p in usable)
    if choice is not None and choice.holds(wanted):
        # Gone, it is missing: what an operator turned away from does not come back by itself.
        wanted = choice.generation
    claims = [p for p in usable if p.generation == wanted]
    if not claims:
        return None
    if len(claims) > 1 or claims[0].privates > 1 or claims[0].publics > 1:
        ids = ", ".join(sorted({f"{p.cka_id.hex()}, key {p.fingerprint}" for p in claims}))
        raise _operator(
            "hsm.key_duplicate",
            f"several objects are labelled {claims[0].label} (CKA_ID {ids}); "
            "will not choose, remove those that do not belong",
        )
    return claims[0]


def _manifest(owner: Owner, data: list[dict[str, Any]]) -> Manifest | None:
    values = [d.get("value") for d in data if d.get("label") == owner.manifest_label]
    found = [Manifest.parse(unpack_bytes(value)) for value in values]
    for manifest in found:
        if manifest.owner != owner:
            raise _operator(
                "hsm.owner_collision",
                f'label prefix {owner.prefix} belongs to server "{manifest.owner.server}" of trust '
                f'domain "{manifest.owner.trust_domain}"; choose another server id',
            )
    if not found:
        return None
    # A crash between writing the new and destroying the old one leaves both: they add up.
    keys = {name: key_id for manifest in found for name, key_id in manifest.keys.items()}
    choices: dict[str, Choice] = {}
    for manifest in found:
        choices = merged(choices, manifest.choices)
    # A token copied from another one has the manifests of both, from one instance.
    time = max(manifest.time for manifest in found)
    newest = {manifest.nonce for manifest in found if manifest.time == time}
    nonce = newest.pop() if len(newest) == 1 else ""
    older = [n for manifest in found for n in (*manifest.before, manifest.nonce)]
    before = tuple(dict.fromkeys(n for n in older if n != nonce))
    places = {manifest.place for manifest in found}
    place = places.pop() if len(places) == 1 else ""
    return Manifest(owner, nonce, keys, time, choices, before, place)


def read_material(fields: object) -> PublicMaterial | None:
    """Return the public key in a worker's description of an object.

    Raises:
        EncodingError: it does not decode.
    """
    if not isinstance(fields, dict):
        return None
    kind = fields.get("kind")
    if not isinstance(kind, int):
        raise EncodingError("token listing", "key type is missing")
    parts = {n: unpack_bytes(fields.get(n, "")) for n in ("params", "point", "modulus", "exponent")}
    return PublicMaterial(
        kind, parts["params"], parts["point"], parts["modulus"], parts["exponent"]
    )


def _operator(reason: str, message: str) -> TokenError:
    return TokenError(
        message,
        reason=reason,
        operation="inventory",
        cure=Cure.OPERATOR,
        kind=ErrorKind.FAILED_PRECONDITION,
    )

"""What a listing of a token means: which pair is current, what is left over, what is wrong.

Values in, values out; nothing here talks to a token.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, ErrorKind, InvalidInputError
from spire_hw.key import fingerprint, spki_der
from spire_hw.pkcs11.choice import Choice, merged
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.keys import (
    MECHANISM_NAMES,
    PublicMaterial,
    is_ec,
    mechanisms_for,
    public_key_of,
)
from spire_hw.pkcs11.labels import Owner, key_name
from spire_hw.pkcs11.profile import RSA_KEY_GEN, USAGES, Profile
from spire_hw.pkcs11.wire import SignKey, unpack_bytes

if TYPE_CHECKING:
    from spire_hw.key import KeyType, PublicKey
    from spire_hw.plugin.keymanager import KeyInfo

Evidence = Mapping[str, bool | int | None]
# What a private key has to prove (PKCS #11 v2.40 section 4.9): made here, never readable.
_REQUIRED: Final = {
    "TOKEN": True,
    "LOCAL": True,
    "SENSITIVE": True,
    "ALWAYS_SENSITIVE": True,
    "EXTRACTABLE": False,
    "NEVER_EXTRACTABLE": True,
    "SIGN": True,
}


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


@dataclass(frozen=True, slots=True)
class Manifest:
    """The data object that says in full whose keys these are.

    Attributes:
        owner: trust domain and server id in full.
        nonce: the running instance that wrote it.
        keys: key part of the label to key id.
        time: when it was written, Unix seconds; 0 when it does not say.
        choices: key ids of which an older generation was taken back.
    """

    owner: Owner
    nonce: str
    keys: Mapping[str, str]
    time: float = 0.0
    choices: Mapping[str, Choice] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the object's value."""
        fields = {
            "version": 1,
            "trust_domain": self.owner.trust_domain,
            "server": self.owner.server,
            "nonce": self.nonce,
            "keys": dict(self.keys),
            "time": self.time,
            "choices": {key_id: choice.fields() for key_id, choice in self.choices.items()},
        }
        return json.dumps(fields, sort_keys=True).encode("utf-8")

    @classmethod
    def parse(cls, value: bytes) -> Manifest:
        """Read an object's value.

        Raises:
            EncodingError: not a manifest.
        """
        try:
            fields = json.loads(value)
            owner = Owner(str(fields["trust_domain"]), str(fields["server"]))
            keys = {str(name): str(key_id) for name, key_id in fields["keys"].items()}
            choices = {
                str(key_id): Choice.of_fields(choice)
                for key_id, choice in fields.get("choices", {}).items()
            }
            time = float(fields.get("time", 0.0))
            if not math.isfinite(time):
                raise ValueError("no time")  # noqa: TRY301 - one answer to all that is odd
            return cls(owner, str(fields["nonce"]), keys, time, choices)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise EncodingError("key manifest", "does not decode") from None


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
        ids = ", ".join(sorted({f"{p.cka_id.hex()}, key {_fingerprint(p)}" for p in claims}))
        raise _operator(
            "hsm.key_duplicate",
            f"several objects are labelled {claims[0].label} (CKA_ID {ids}); "
            "will not choose, remove those that do not belong",
        )
    return claims[0]


def _fingerprint(pair: Pair) -> str:
    try:
        if pair.material is None:
            return "unknown"
        return fingerprint(spki_der(public_key_of(pair.material)))
    except InvalidInputError:
        return "unreadable"


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
    nonces = {manifest.nonce for manifest in found}
    nonce = nonces.pop() if len(nonces) == 1 else ""
    return Manifest(owner, nonce, keys, max(m.time for m in found), choices)


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


def read_evidence(described: Mapping[str, Any]) -> Evidence:
    """Return the evidence in a worker's description of a private key."""
    fields = described.get("evidence")
    if not isinstance(fields, dict):
        return {}
    return {
        str(name): value if isinstance(value, bool | int) else None
        for name, value in fields.items()
    }


def check_evidence(key: str, evidence: Evidence, key_type: KeyType, profile: Profile) -> None:
    """Refuse a private key that is not proven to have been made in the token for signing only.

    Args:
        key: how a message calls it.
        evidence: what the token says.
        key_type: its type.
        profile: may allow what this kind of token permits every key.

    Raises:
        TokenError: FAILED_PRECONDITION, names the attributes that do not hold.
    """
    wrong = [n for n, wanted in _REQUIRED.items() if evidence.get(n) is not wanted]
    wrong += [n for n in sorted(USAGES - profile.usage_allowed) if evidence.get(n) is True]
    if evidence.get("KEY_GEN_MECHANISM") not in _made_by(key_type):
        wrong.append("KEY_GEN_MECHANISM")
    if wrong:
        raise _operator("hsm.key_policy", f"{key} violates policy: {', '.join(wrong)}")


def _made_by(key_type: KeyType) -> set[int]:
    return {mechanisms_for(key_type)[0]} if is_ec(key_type) else set(RSA_KEY_GEN.values())


def evidence_texts(evidence: Evidence) -> dict[str, str]:
    """Return evidence for an operator's eyes."""
    texts = {}
    for name, value in evidence.items():
        if value is None:
            texts[name] = "unknown"
        elif isinstance(value, bool):
            texts[name] = "true" if value else "false"
        else:
            texts[name] = MECHANISM_NAMES.get(value, f"0x{value:x}")
    return texts


def _operator(reason: str, message: str) -> TokenError:
    return TokenError(
        message,
        reason=reason,
        operation="inventory",
        cure=Cure.OPERATOR,
        kind=ErrorKind.FAILED_PRECONDITION,
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """A key in use.

    Attributes:
        key_id: the caller's id.
        key_type: its type.
        public_key: its public half.
        fingerprint: fingerprint of this instance.
        sign_key: CKA_ID and public key, as workers need them.
        label: CKA_LABEL on the token.
        generation: its generation; 0 for a key made elsewhere.
    """

    key_id: str
    key_type: KeyType
    public_key: PublicKey
    fingerprint: str
    sign_key: SignKey
    label: str
    generation: int

    @property
    def is_existing(self) -> bool:
        """Tell whether somebody else made it: it is used, never replaced nor destroyed."""
        return self.generation == 0

    @classmethod
    def of(cls, info: KeyInfo, cka_id: bytes, label: str, generation: int) -> Entry:
        """Build from the contract's view of a key and its place on the token."""
        sign_key = SignKey(cka_id, spki_der(info.public_key))
        return cls(
            info.key_id,
            info.key_type,
            info.public_key,
            info.fingerprint,
            sign_key,
            label,
            generation,
        )

    @property
    def cka_id(self) -> bytes:
        """Return the CKA_ID on the token."""
        return self.sign_key.cka_id

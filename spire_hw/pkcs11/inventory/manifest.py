"""The data object on a token that says in full whose keys these are."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError
from spire_hw.pkcs11.inventory.choice import Choice
from spire_hw.pkcs11.inventory.labels import Owner

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BEFORE: Final = 8


@dataclass(frozen=True, slots=True)
class Manifest:
    """Whose keys these are, and how they are called.

    Attributes:
        owner: trust domain and server id in full.
        nonce: the running instance that wrote it.
        keys: key part of the label to key id.
        time: when it was written, Unix seconds; 0 when it does not say.
        choices: key ids of which an older generation was taken back.
        before: instances whose manifests that one wrote over when it started, the last one last.
        place: where that instance runs, such that no two can run there; "" when it does not say.
    """

    owner: Owner
    nonce: str
    keys: Mapping[str, str]
    time: float = 0.0
    choices: Mapping[str, Choice] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    place: str = ""

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
            "before": list(self.before[-MAX_BEFORE:]),
            "place": self.place,
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
            before = tuple(str(nonce) for nonce in fields.get("before", ()))[-MAX_BEFORE:]
            place = str(fields.get("place", ""))
            return cls(owner, str(fields["nonce"]), keys, time, choices, before, place)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise EncodingError("key manifest", "does not decode") from None

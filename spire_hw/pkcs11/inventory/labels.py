"""How our objects on a token are called, so that servers can share one and nobody's keys are touched.

`sh1:<td6>:<srv6>:<key>:<gen6>` names a key pair: trust domain and server as six base32 characters
of their SHA-256, the key id (hashed when it is long or has odd characters) and a base36 generation.
37 characters, so it fits the shortest label field in use (YubiHSM 2: 40 bytes) and needs no escape
in a URI. Nothing is ever relabelled: a replacement is a new generation.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from spire_hw.errors import InvalidInputError

APPLICATION: Final = "spire-hw"
SCHEME: Final = "sh1"
_SHORT: Final = 6
_NAME_LENGTH: Final = 12
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,12}")
_LABEL = re.compile(r"([A-Za-z0-9_-]{1,12}|~[a-z2-7]{11}):([0-9a-z]{6})")
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
MAX_GENERATION: Final = 36**6 - 1


@dataclass(frozen=True, slots=True)
class KeyLabel:
    """A label of ours taken apart.

    Attributes:
        name: the key id, or `~` and eleven characters of its hash.
        generation: counts up with each replacement, from 1.
    """

    name: str
    generation: int


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose keys: one server in one trust domain.

    Attributes:
        trust_domain: its name.
        server: the server's own id; never shared between servers.
    """

    trust_domain: str
    server: str

    @property
    def prefix(self) -> str:
        """Return what every label of this owner starts with."""
        return f"{SCHEME}:{_short(self.trust_domain)}:{_short(self.server)}:"

    @property
    def manifest_label(self) -> str:
        """Return the label of the owner's manifest object."""
        return f"{self.prefix}manifest"

    @property
    def test_label(self) -> str:
        """Return the label of the owner's test key: no key's, since no key part has a dot."""
        return f"{self.prefix}.test"

    def key_label(self, key_id: str, generation: int) -> str:
        """Return the label of one generation of a key.

        Raises:
            InvalidInputError: the generation counter is used up.
        """
        return f"{self.prefix}{key_name(key_id)}:{_base36(generation)}"

    def parse(self, label: str) -> KeyLabel | None:
        """Return the parts of a key label, None when it is not one of this owner's."""
        if not label.startswith(self.prefix):
            return None
        match = _LABEL.fullmatch(label[len(self.prefix) :])
        if match is None or int(match.group(2), 36) == 0:
            return None
        return KeyLabel(match.group(1), int(match.group(2), 36))


def key_name(key_id: str) -> str:
    """Return the key part of a label: the id itself when short and plain, else a hash of it."""
    if _PLAIN_NAME.fullmatch(key_id):
        return key_id
    return "~" + _hash32(key_id)[: _NAME_LENGTH - 1]


def _short(text: str) -> str:
    return _hash32(text)[:_SHORT]


def _hash32(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii").lower()


def _base36(number: int) -> str:
    if not 1 <= number <= MAX_GENERATION:
        raise InvalidInputError(f"key generation {number} is out of range")
    digits = ""
    for _ in range(_SHORT):
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits

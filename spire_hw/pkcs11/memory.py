"""How much room a token says that it has (pure).

Few tokens say it. Those that do are believed: what surely finds no room is not begun, and an operator
hears of it while some keys can still be made.

Spec: PKCS #11 v2.40, section 3.2 (CK_TOKEN_INFO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from spire_hw.pkcs11.keys import is_ec, key_bits

if TYPE_CHECKING:
    from collections.abc import Collection

    from spire_hw.key import KeyType

# CK_UNAVAILABLE_INFORMATION is all ones, of 32 bits in some modules.
_UNKNOWN: Final = 1 << 31
_FEW: Final = 3
# Label, id and flags of one half.
_ATTRIBUTES: Final = 256
# No key of ours is shorter, in bytes.
_SHORTEST: Final = 32


@dataclass(frozen=True, slots=True)
class Memory:
    """Free memory of a token.

    Attributes:
        private: bytes for private objects, None when it does not say.
        public: the same for public ones.
    """

    private: int | None = None
    public: int | None = None

    @classmethod
    def of(cls, *, public: tuple[int, int], private: tuple[int, int]) -> Self:
        """Return what CK_TOKEN_INFO tells, as (total, free) bytes of either kind."""
        return cls(_free(*private), _free(*public))

    @classmethod
    def read(cls, fields: object) -> Self:
        """Return what another process wrote with `fields`; nothing is known of what does not decode."""
        given = fields if isinstance(fields, dict) else {}
        private, public = given.get("private"), given.get("public")
        return cls(_number(private), _number(public))

    @property
    def fields(self) -> dict[str, int]:
        """Return what is known by name, `private` and `public`."""
        both = {"private": self.private, "public": self.public}
        return {name: free for name, free in both.items() if free is not None}

    @property
    def words(self) -> str:
        """Return what is known, for people."""
        return ", ".join(f"{free} bytes of {name} memory" for name, free in self.fields.items())

    def lacks_room(self, bits: int | None = None) -> bool:
        """Tell whether a new pair surely finds no room: less is left than its numbers take.

        Args:
            bits: size of an RSA modulus, None for a curve.
        """
        least = _SHORTEST if bits is None else bits // 8
        return any(free < least for free in self.fields.values())

    def is_short(self, key_types: Collection[KeyType]) -> bool:
        """Tell whether only a few pairs more, if any, find room.

        Args:
            key_types: which may be made; a curve's when there are none.
        """
        private = _FEW * max(map(_private_size, key_types), default=_SHORTEST + _ATTRIBUTES)
        public = _FEW * max(map(_public_size, key_types), default=_SHORTEST + _ATTRIBUTES)
        is_private_short = self.private is not None and self.private < private
        return is_private_short or (self.public is not None and self.public < public)


def _free(total: int, free: int) -> int | None:
    # Some show zeros for what they do not know.
    if not total or not 0 <= free < _UNKNOWN or total < free:
        return None
    return free


def _number(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < _UNKNOWN else None


def _private_size(key_type: KeyType) -> int:
    size = key_bits(key_type) // 8
    # Scalar and point; or modulus, exponent and the five numbers that are half as long.
    return (3 * size if is_ec(key_type) else 9 * size // 2) + _ATTRIBUTES


def _public_size(key_type: KeyType) -> int:
    size = key_bits(key_type) // 8
    return (2 * size if is_ec(key_type) else size) + _ATTRIBUTES

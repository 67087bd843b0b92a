"""Distinguished names in DER: the subjects we write, and small changes to those we were given.

Spec: X.501 names as RFC 5280 section 4.1.2.4 wants them; attribute order is upstream's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.x509 import der

if TYPE_CHECKING:
    from collections.abc import Sequence

_COUNTRY: Final = der.oid("2.5.4.6")
_ORGANIZATION: Final = der.oid("2.5.4.10")
_ORGANIZATIONAL_UNIT: Final = der.oid("2.5.4.11")
_COMMON_NAME: Final = der.oid("2.5.4.3")
_SERIAL_NUMBER: Final = der.oid("2.5.4.5")
# After these, in this order, an organizational unit is put in; upstream writes them first.
_BEFORE_UNIT: Final = frozenset({_COUNTRY, _ORGANIZATION})

_MAX_ATTRIBUTE: Final = 64
_COUNTRY_LETTERS: Final = 2
# UTF8String, PrintableString, IA5String, BMPString.
_TEXT_ENCODINGS: Final = {0x0C: "utf-8", 0x13: "ascii", 0x16: "ascii", 0x1E: "utf-16-be"}
_PRINTABLE: Final = frozenset(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 '()+,-./:=?"
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A subject in words.

    Attributes:
        country: two letters each.
        organization: at most 64 characters each; so are the rest.
        organizational_unit: departments.
        common_name: "" leaves it out.
        serial_number: "" leaves it out.
    """

    country: Sequence[str] = ()
    organization: Sequence[str] = ()
    organizational_unit: Sequence[str] = ()
    common_name: str = ""
    serial_number: str = ""

    def encode(self) -> bytes:
        """Return the DER Name.

        Raises:
            InvalidInputError: an attribute is empty or too long.
        """
        return der.sequence(
            *(_attribute(_COUNTRY, text) for text in self.country),
            *(_attribute(_ORGANIZATION, text) for text in self.organization),
            *(_attribute(_ORGANIZATIONAL_UNIT, text) for text in self.organizational_unit),
            *(_attribute(_COMMON_NAME, text) for text in [self.common_name] if text),
            *(_attribute(_SERIAL_NUMBER, text) for text in [self.serial_number] if text),
        )


def encode_name(attributes: Sequence[tuple[str, str]]) -> bytes:
    """Return a DER Name.

    Args:
        attributes: dotted OID and text of each, in order.

    Raises:
        InvalidInputError: an attribute is empty or too long, or an OID is none.
    """
    return der.sequence(*(_attribute(der.oid(dotted), text) for dotted, text in attributes))


def decode_name(name: bytes) -> list[tuple[str, str]]:
    """Return dotted OID and text of each attribute of a DER Name, in order.

    Raises:
        EncodingError: not a DER Name, or a kind of text that is not in use any more.
    """
    found: list[tuple[str, str]] = []
    level = der.Reader(name, "name").enter(der.SEQUENCE)
    while level.more():
        attributes = level.enter(der.SET)
        while attributes.more():
            attribute = attributes.enter(der.SEQUENCE)
            dotted = der.dotted(attribute.content(der.OBJECT_IDENTIFIER))
            tag = attribute.next_tag()
            encoding = _TEXT_ENCODINGS.get(tag)
            if encoding is None:
                raise EncodingError("name", f"text of type {tag} cannot be read")
            try:
                found.append((dotted, attribute.content(tag).decode(encoding)))
            except UnicodeDecodeError as e:
                raise EncodingError("name", "text that does not decode") from e
    return found


def _attribute(kind: bytes, text: str) -> bytes:
    limit = _COUNTRY_LETTERS if kind == _COUNTRY else _MAX_ATTRIBUTE
    if not text or len(text) > limit:
        raise InvalidInputError(f"subject attribute is empty or longer than {limit} characters")
    if _PRINTABLE.issuperset(text):
        value = der.encode(der.PRINTABLE_STRING, text.encode("ascii"))
    else:
        try:
            value = der.encode(der.UTF8_STRING, text.encode())
        except UnicodeEncodeError as e:
            raise InvalidInputError("subject attribute is not valid Unicode") from e
    return der.encode(der.SET, der.sequence(kind, value))


EMPTY_NAME: Final = der.sequence()
SVID_SUBJECT: Final = Subject(country=("US",), organization=("SPIRE",)).encode()
CA_SUBJECT: Final = Subject(country=("US",), organization=("SPIFFE",)).encode()


@lru_cache(maxsize=1024)
def svid_subject(common_name: str = "") -> bytes:
    """Return the subject of an SVID, DER.

    Args:
        common_name: first DNS name; left out when longer than the 64 characters X.509 allows.
    """
    if len(common_name) > _MAX_ATTRIBUTE:
        common_name = ""
    return Subject(country=("US",), organization=("SPIRE",), common_name=common_name).encode()


def with_serial_number(name: bytes, number: str) -> bytes:
    """Return the name with a serialNumber attribute; one that is there stays.

    Raises:
        EncodingError: not a DER Name.
    """
    parts = _relative_names(name)
    if any(_SERIAL_NUMBER in kinds for _, kinds in parts):
        return name
    return der.sequence(*(part for part, _ in parts), _attribute(_SERIAL_NUMBER, number))


def with_organizational_unit(name: bytes, unit: str) -> bytes:
    """Return the name with its organizational units replaced by one.

    Raises:
        EncodingError: not a DER Name.
    """
    kept = [
        (part, kinds) for part, kinds in _relative_names(name) if _ORGANIZATIONAL_UNIT not in kinds
    ]
    at = max((i + 1 for i, (_, kinds) in enumerate(kept) if kinds & _BEFORE_UNIT), default=0)
    parts = [part for part, _ in kept]
    parts.insert(at, _attribute(_ORGANIZATIONAL_UNIT, unit))
    return der.sequence(*parts)


def check_name(name: bytes) -> bytes:
    """Return name when it is a well-formed DER Name.

    Raises:
        EncodingError: anything else.
    """
    _relative_names(name)
    return name


def _relative_names(name: bytes) -> list[tuple[bytes, frozenset[bytes]]]:
    outer = der.Reader(name, "name")
    level = outer.enter(der.SEQUENCE)
    outer.finish()
    parts = []
    while level.more():
        start = level.at
        attributes = level.enter(der.SET)
        kinds = set()
        while True:
            attribute = attributes.enter(der.SEQUENCE)
            kinds.add(attribute.element(der.OBJECT_IDENTIFIER))
            attribute.element(attribute.next_tag())
            attribute.finish()
            if not attributes.more():
                break
        parts.append((name[start : level.at], frozenset(kinds)))
    return parts

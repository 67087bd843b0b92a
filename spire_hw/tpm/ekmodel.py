"""What an endorsement certificate says about its TPM: manufacturer, model, firmware version.

Becomes selectors and stands in logs, so whatever is ambiguous or not plain text is refused.

Spec: TCG EK Credential Profile, section 3.2.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError
from spire_hw.tpm import der

if TYPE_CHECKING:
    from spire_hw.tpm.certificate import Certificate

SAN: Final = "2.5.29.17"
_ATTRIBUTES: Final = {
    "2.23.133.2.1": "manufacturer",
    "2.23.133.2.2": "model",
    "2.23.133.2.3": "version",
}
_DIRECTORY_NAME = 0xA4
_STRING_TAGS: Final = frozenset({0x0C, 0x13, 0x16})  # UTF8String, PrintableString, IA5String
_MAX_MODEL_CHARS = 64
_MANUFACTURER_HEX = 8


@dataclass(frozen=True, slots=True)
class TpmModel:
    """What an endorsement certificate says about its TPM; None where it says nothing.

    Attributes:
        manufacturer: `id:` and 8 hex digits of the vendor's TCG number.
        model: part number.
        version: firmware version at manufacture.
    """

    manufacturer: str | None = None
    model: str | None = None
    version: str | None = None


def read_model(leaf: Certificate) -> TpmModel:
    """Read manufacturer, model and version from the subject alternative name.

    Raises:
        EncodingError: the extension is malformed.
        InvalidInputError: a value is ambiguous or holds characters that are not allowed.
    """
    extension = leaf.extensions.get(SAN)
    return TpmModel() if extension is None else _read_names(extension.value)


@functools.lru_cache(maxsize=64)
def _read_names(value: bytes) -> TpmModel:
    """Read a subject alternative name; all TPMs of a model have the same."""
    names = der.read_all(value, "ek: subject alternative name", der.SEQUENCE).members()
    directories = [name for name in names if name.tag == _DIRECTORY_NAME]
    if len(directories) > 1:
        raise InvalidInputError("ek: TPM manufacturer is ambiguous: two directory names")
    found: dict[str, str] = {}
    for directory in directories:
        for kind, text in _walk_name(directory):
            if found.setdefault(kind, text) != text:
                raise InvalidInputError(f"ek: TPM {kind} is ambiguous")
    manufacturer = found.get("manufacturer")
    return TpmModel(
        manufacturer=None if manufacturer is None else _check_manufacturer(manufacturer),
        model=found.get("model"),
        version=found.get("version"),
    )


def _walk_name(directory: der.Value) -> list[tuple[str, str]]:
    what = directory.what
    found = []
    for rdn in der.read_all(directory.content, what, der.SEQUENCE).members():
        for pair in rdn.expect(der.SET).members():
            parts = pair.expect(der.SEQUENCE).members()
            if len(parts) != 2:  # noqa: PLR2004 - type and value
                raise pair.fail("attribute is malformed")
            kind = _ATTRIBUTES.get(der.oid(parts[0]))
            if kind is not None:
                found.append((kind, _read_text(kind, parts[1])))
    return found


def _read_text(kind: str, value: der.Value) -> str:
    text = value.content.decode("utf-8", "replace")
    allowed = text.isascii() and text.isprintable() and 0 < len(text) <= _MAX_MODEL_CHARS
    if value.tag not in _STRING_TAGS or not allowed:
        raise InvalidInputError(f"ek: TPM {kind} contains characters that are not allowed")
    return text


def _check_manufacturer(text: str) -> str:
    digits = text.removeprefix("id:")
    if len(digits) != _MANUFACTURER_HEX or text == digits or set(digits) - set(_HEX_DIGITS):
        raise InvalidInputError("ek: TPM manufacturer is not id: and 8 hexadecimal digits")
    return text


_HEX_DIGITS: Final = "0123456789abcdefABCDEF"

"""Distinguished names as text for people, also those that strict parsers refuse.

Not for comparing: names are compared as the bytes they came in.
"""

from __future__ import annotations

from typing import Final

from spire_hw.errors import EncodingError
from spire_hw.tpm import der

_LABELS: Final = {
    "2.5.4.3": "CN",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
}
_BMP_STRING = 0x1E
_COMMON_NAME: Final = "2.5.4.3"
_MAX_CHARS = 200
_SPECIAL: Final = frozenset(",=\\")


def format_name(raw: bytes) -> str:
    """Return a DER Name as `C=DE,O=Maker,CN=Root`; what is special or not printable is escaped.

    Returns:
        The text, at most 200 characters; `(malformed)` when it does not parse.
    """
    try:
        pairs = _read(raw)
    except EncodingError:
        return "(malformed)"
    return ",".join(f"{_LABELS.get(kind, kind)}={_shown(text)}" for kind, text in pairs)[
        :_MAX_CHARS
    ]


def common_name(raw: bytes) -> str:
    """Return the last common name of a DER Name, else its last attribute, "" without any."""
    try:
        pairs = _read(raw)
    except EncodingError:
        return ""
    named = [text for kind, text in pairs if kind == _COMMON_NAME] or [text for _, text in pairs]
    return _shown(named[-1])[:_MAX_CHARS] if named else ""


def _read(raw: bytes) -> list[tuple[str, str]]:
    found = []
    for rdn in der.read_all(raw, "name", der.SEQUENCE).members():
        for pair in rdn.expect(der.SET).members():
            parts = pair.expect(der.SEQUENCE).members()
            if len(parts) != 2:  # noqa: PLR2004 - type and value
                raise pair.fail("attribute is malformed")
            coding = "utf-16-be" if parts[1].tag == _BMP_STRING else "utf-8"
            found.append((der.oid(parts[0]), parts[1].content.decode(coding, "replace")))
    return found


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() and c not in _SPECIAL else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    return f"\\{char}" if char in _SPECIAL else ascii(char)[1:-1]

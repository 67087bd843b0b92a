"""RFC 7512 `pkcs11:` URIs: which token, which module, where its PIN is.

Strict where the RFC says "match nothing": an unknown or repeated path attribute is refused, since a
URI that silently matched more than meant would pick the wrong token. PINs inside a URI and PIN
commands are refused too.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from spire_hw.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_SCHEME: Final = "pkcs11:"
_PATH_CHARS = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=&]|%[0-9A-Fa-f]{2})*")
_QUERY_CHARS = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=/?|]|%[0-9A-Fa-f]{2})*")
_VENDOR = re.compile(r"x-[A-Za-z0-9_-]+|[A-Za-z0-9_-]+")
_TYPES: Final = frozenset({"public", "private", "cert", "secret-key", "data"})
_TEXT: Final = frozenset(
    {
        "token",
        "manufacturer",
        "serial",
        "model",
        "library-manufacturer",
        "library-version",
        "library-description",
        "slot-manufacturer",
        "slot-description",
        "object",
    }
)
_UNRESERVED: Final = frozenset(string.ascii_letters.encode() + string.digits.encode() + b"-._~")
_MAX_LENGTH: Final = 4096


@dataclass(frozen=True, slots=True)
class Pkcs11Uri:
    """A parsed URI; a field is None where the attribute is absent.

    Attributes:
        attributes: text path attributes by name (`token`, `serial`, `object` ...).
        id: CKA_ID bytes.
        slot_id: a hint only, slot numbers change.
        type: class of the object that is meant.
        pin_source: where the PIN is: a path or `file:` URI.
        module_path: absolute path of the module.
        module_name: name of the module without directory.
        ignored: unknown query attributes, for a warning.
    """

    attributes: dict[str, str] = field(default_factory=dict)
    id: bytes | None = None
    slot_id: int | None = None
    type: str | None = None
    pin_source: str | None = None
    module_path: str | None = None
    module_name: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def token(self) -> str | None:
        """Return the token label."""
        return self.attributes.get("token")

    @property
    def serial(self) -> str | None:
        """Return the token's serial number."""
        return self.attributes.get("serial")

    @property
    def names_other_object(self) -> bool:
        """Tell whether what is meant is something else than a private key."""
        return self.type not in {None, "private"}

    @property
    def pin_file(self) -> str | None:
        """Return the path that `pin-source` names.

        Raises:
            InvalidInputError: it is not a local file.
        """
        if self.pin_source is None:
            return None
        return _file_of(self.pin_source)


def parse(text: str) -> Pkcs11Uri:
    """Parse a URI.

    Raises:
        InvalidInputError: the message names the attribute at fault, never a value.

    Spec: RFC 7512 section 2.3 (syntax), 2.4 (matching).
    """
    if len(text) > _MAX_LENGTH:
        raise InvalidInputError("pkcs11 URI is too long")
    if not text.startswith(_SCHEME):
        raise InvalidInputError('pkcs11 URI does not start with "pkcs11:"')
    path, _, query = text[len(_SCHEME) :].partition("?")
    path_pairs = _split(path, ";", _PATH_CHARS, "path")
    query_pairs = _split(query, "&", _QUERY_CHARS, "query")
    known_query = {"pin-source", "pin-value", "module-name", "module-path"}
    if "pin-source" in query_pairs and "pin-value" in query_pairs:
        raise InvalidInputError("pkcs11 URI has both pin-source and pin-value")
    if "pin-value" in query_pairs:
        raise InvalidInputError("pkcs11 URI holds a PIN in pin-value; use pin-source or pin_file")
    return Pkcs11Uri(
        attributes={n: _text(n, v) for n, v in path_pairs.items() if n in _TEXT},
        id=_convert(path_pairs, "id", lambda v: v),
        slot_id=_convert(path_pairs, "slot-id", _decimal),
        type=_convert(path_pairs, "type", lambda v: _text("type", v)),
        pin_source=_convert(query_pairs, "pin-source", _pin_source),
        module_path=_convert(query_pairs, "module-path", _module_path),
        module_name=_convert(query_pairs, "module-name", _module_name),
        ignored=tuple(n for n in query_pairs if n not in known_query),
    )


def encode(uri: Pkcs11Uri) -> str:
    """Return the text of a URI; `parse` gives the same value back."""
    path = [f"{n}={_escape(v.encode('utf-8'))}" for n, v in uri.attributes.items()]
    if uri.id is not None:
        path.append("id=" + "".join(f"%{b:02X}" for b in uri.id))
    if uri.slot_id is not None:
        path.append(f"slot-id={uri.slot_id}")
    if uri.type is not None:
        path.append(f"type={uri.type}")
    queries = (
        ("pin-source", uri.pin_source),
        ("module-path", uri.module_path),
        ("module-name", uri.module_name),
    )
    query = [f"{n}={_escape(v.encode('utf-8'))}" for n, v in queries if v is not None]
    return _SCHEME + ";".join(path) + ("?" + "&".join(query) if query else "")


def _split(text: str, separator: str, allowed: re.Pattern[str], part: str) -> dict[str, bytes]:
    pairs: dict[str, bytes] = {}
    for item in text.split(separator) if text else []:
        name, equals, value = item.partition("=")
        if not equals or not _VENDOR.fullmatch(name):
            raise InvalidInputError(f"pkcs11 URI has a {part} attribute that is not name=value")
        if part == "path" and name not in _TEXT | {"id", "slot-id", "type"}:
            raise InvalidInputError(f"pkcs11 URI attribute {name} is unknown")
        if name in pairs:
            raise InvalidInputError(f"pkcs11 URI attribute {name} is given twice")
        if not allowed.fullmatch(value):
            raise InvalidInputError(f"pkcs11 URI attribute {name} has a character to be escaped")
        pairs[name] = _unescape(value)
    kind = pairs.get("type")
    if part == "path" and kind is not None and kind.decode("utf-8", "replace") not in _TYPES:
        raise InvalidInputError("pkcs11 URI attribute type is none of the RFC's")
    if part == "path" and "id" in pairs and not _is_escaped_id(text):
        raise InvalidInputError("pkcs11 URI attribute id must be percent-encoded bytes")
    return pairs


def _is_escaped_id(path: str) -> bool:
    # Some tools write hex digits (id=7331), others percent-encode; only the latter is unambiguous.
    value = next(i for i in path.split(";") if i.startswith("id="))[3:]
    return re.fullmatch(r"(?:%[0-9A-Fa-f]{2})+", value) is not None


def _unescape(text: str) -> bytes:
    out, position = bytearray(), 0
    while position < len(text):
        if text[position] == "%":
            out.append(int(text[position + 1 : position + 3], 16))
            position += 3
        else:
            out.append(ord(text[position]))
            position += 1
    return bytes(out)


def _escape(raw: bytes) -> str:
    return "".join(chr(b) if b in _UNRESERVED else f"%{b:02X}" for b in raw)


def _text(name: str, value: bytes) -> str:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError(f"pkcs11 URI attribute {name} is not UTF-8") from None
    if "\0" in text:
        raise InvalidInputError(f"pkcs11 URI attribute {name} holds a NUL")
    return text


def _convert(pairs: dict[str, bytes], name: str, convert: Callable[[bytes], T]) -> T | None:
    value = pairs.get(name)
    return None if value is None else convert(value)


def _decimal(value: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", value):
        raise InvalidInputError("pkcs11 URI attribute slot-id is not a decimal number")
    return int(value)


def _pin_source(value: bytes) -> str:
    text = _text("pin-source", value)
    _file_of(text)
    return text


def _file_of(source: str) -> str:
    if source.startswith("|"):
        raise InvalidInputError("pkcs11 URI attribute pin-source is a command: refused")
    path = source
    if source.startswith("file:"):
        path = source[len("file:") :]
        path = path.removeprefix("//localhost") if path.startswith("//localhost/") else path
        path = path.removeprefix("//") if path.startswith("///") else path
    if not path.startswith("/") or path.startswith("//"):
        raise InvalidInputError("pkcs11 URI attribute pin-source is not an absolute file path")
    return path


def _module_path(value: bytes) -> str:
    text = _text("module-path", value)
    if not text.startswith("/"):
        raise InvalidInputError("pkcs11 URI attribute module-path is not absolute")
    return text


def _module_name(value: bytes) -> str:
    text = _text("module-name", value)
    if not text or "/" in text:
        raise InvalidInputError("pkcs11 URI attribute module-name must be a bare file name")
    return text

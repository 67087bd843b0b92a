"""Log lines as text: rendering as upstream's, and what must never be seen in them.

Text is `time="..." level=info msg="..." key=value`, keys after `msg` sorted; JSON is one object a
line with sorted keys. Source: the formatters of sirupsen/logrus 1.9 as upstream sets them up.
"""

from __future__ import annotations

import enum
import json
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOCATION: Final = {"_func": "func", "_file": "file"}
_BARE: Final = re.compile(r"[A-Za-z0-9\-._/@^+]*", re.ASCII)
_HTML: Final = re.compile("[<>&\x7f-\x9f\u2028\u2029]")
_GO_ESCAPES: Final = {
    "\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v",
    '"': '\\"', "\\": "\\\\",
}  # fmt: skip
_ASCII_END: Final = 0x7F
_BMP_END: Final = 0xFFFF


def format_time(moment: datetime) -> str:
    """Return RFC 3339 in UTC with the fraction's trailing zeros cut, as Go's RFC3339Nano."""
    text = moment.astimezone(UTC).isoformat()[: len("YYYY-MM-DDTHH:MM:SS")]
    fraction = f".{moment.microsecond:06d}".rstrip("0").rstrip(".")
    return f"{text}{fraction}Z"


def render_text(level: str, now: datetime, message: str, fields: Mapping[str, Any]) -> str:
    """Return a line of text without its newline."""
    parts = [f"time={_quoted(format_time(now))}", f"level={level}"]
    if message:
        parts.append(f"msg={_quoted(message)}")
    parts += [f"{name}={_quoted(str(fields[k]))}" for k, name in _LOCATION.items() if k in fields]
    rest = {_unclashed(k): v for k, v in fields.items() if k not in _LOCATION}
    parts += [f"{key}={_quoted(_go_text(rest[key]))}" for key in sorted(rest)]
    return " ".join(parts)


def render_json(level: str, now: datetime, message: str, fields: Mapping[str, Any]) -> str:
    """Return one JSON object on one line."""
    values = {_unclashed(k): v for k, v in fields.items() if k not in _LOCATION}
    values |= {name: fields[k] for k, name in _LOCATION.items() if k in fields}
    values |= {"time": format_time(now), "level": level, "msg": message}
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return _HTML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _unclashed(key: str) -> str:
    return f"fields.{key}" if key in {"time", "level", "msg"} else key


def _quoted(text: str) -> str:
    if _BARE.fullmatch(text):
        return text
    if text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return '"' + "".join(map(_go_char, text)) + '"'


def _go_char(char: str) -> str:
    if char in _GO_ESCAPES:
        return _GO_ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    if code <= _ASCII_END:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= _BMP_END else f"\\U{code:08x}"


def _go_text(value: Any) -> str:
    if type(value) is str:  # most are
        return value
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + " ".join(map(_go_text, value)) + "]"
    if isinstance(value, dict):
        return "map[" + " ".join(f"{k}:{_go_text(v)}" for k, v in value.items()) + "]"
    return str(value)


# --- redaction --------------------------------------------------------------------------------

REDACTED: Final = "[redacted]"
_MAX_CHARS: Final = 16 * 1024
_MAX_ITEMS: Final = 256
_MAX_NESTING: Final = 6
_KEY: Final = re.compile(r"[^A-Za-z0-9_.\-@]", re.ASCII)
_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_WORDS: Final = frozenset(
    [
        "pin",
        "pins",
        "sopin",
        "token",
        "tokens",
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "secret",
        "secrets",
        "jwt",
        "jwts",
        "credential",
        "credentials",
        "authorization",
        "cookie",
    ]
)
_SECRET_PAIRS: Final = frozenset(
    {"private key", "svid token", "token value", "jwt svid", "pin value"}
)
_HIDDEN: Final = re.compile(
    r"eyJ[A-Za-z0-9_\-]{4,}\.[A-Za-z0-9_\-]{4,}\.[A-Za-z0-9_\-]*"
    r"|-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----.*?(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----|\Z)"
    r"|(?<=pin-value=)[^&\s;]+",
    re.DOTALL,
)
# What every match of the pattern holds; most texts hold none of it.
_HIDDEN_SIGNS: Final = ("eyJ", "-----BEGIN ", "pin-value=")


@lru_cache(maxsize=1024)
def is_secret_key(key: str) -> bool:
    """Tell whether values under this key are withheld: its last word or two name a secret.

    `user_pin`, `join_token`, `clientSecret` are; `token_label`, `pin_file`, `jwt_svid_ttl` are not.
    """
    words = [w.lower() for w in _WORDS.findall(key)]
    return bool(words) and (words[-1] in _SECRET_WORDS or " ".join(words[-2:]) in _SECRET_PAIRS)


@lru_cache(maxsize=1024)
def clean_key(key: str) -> str:
    """Return a key as it may stand in a line."""
    return _KEY.sub("_", key)[:128] or "_"


def redacted(key: str, value: Any, nesting: int = 0) -> Any:  # noqa: PLR0911 - one per type
    """Return the value as it may be shown: plain types only, secrets replaced, sizes bounded."""
    if value is None or isinstance(value, bool):
        return value
    if is_secret_key(key):
        return REDACTED
    if nesting > _MAX_NESTING:
        return "..."
    if type(value) is str:  # most are
        return hidden(plain_text(value))
    if isinstance(value, (int, float)) and not isinstance(value, enum.Enum):
        return value if value == value and abs(value) < 1e300 else str(value)[:64]  # noqa: PLR0124, PLR2004 - NaN, huge
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        held = list(value.items())[:_MAX_ITEMS]
        return {clean_key(str(k)): redacted(str(k), v, nesting + 1) for k, v in held}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redacted(key, v, nesting + 1) for v in list(value)[:_MAX_ITEMS]]
    if isinstance(value, datetime):
        return format_time(value) if value.tzinfo else value.isoformat()
    return hidden(plain_text(value))


def plain_text(value: Any) -> str:
    """Return any value as text of bounded length."""
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception as e:  # noqa: BLE001 - a broken __str__ must not stop the caller
        text = f"<{type(value).__name__} that cannot be shown: {type(e).__name__}>"
    if len(text) > _MAX_CHARS:
        text = text[:_MAX_CHARS] + "..."
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def hidden(text: str) -> str:
    """Return a text with tokens, private keys and PINs in it replaced."""
    for sign in _HIDDEN_SIGNS:
        if sign in text:
            return _HIDDEN.sub(REDACTED, text)
    return text

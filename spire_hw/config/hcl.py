"""HCL 1 text to a tree that keeps order, repeats and line numbers, and back.

Nothing is evaluated: `${...}` in strings passes through. Which keys and types make sense is the
business of `spire_hw.config.schema`. A file whose first character is `{` is JSON.

Source: behaviour of github.com/hashicorp/hcl 1.0 as upstream uses it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from spire_hw.config.tree import (
    MAX_CHARS,
    MAX_DEPTH,
    Block,
    Body,
    Integer,
    Item,
    Value,
    make_items,
    quote,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "MAX_CHARS",
    "MAX_DEPTH",
    "Block",
    "Body",
    "Integer",
    "Item",
    "Value",
    "expand_env",
    "make_items",
    "parse",
    "quote",
]


def parse(text: str, file: str = "") -> Body:
    """Read HCL 1, or JSON when the first character that is not blank is `{`.

    Args:
        text: the whole file, after `expand_env` if that was asked for.
        file: its name for messages.

    Raises:
        ConfigError: it does not parse, nests deeper than `MAX_DEPTH` or is over `MAX_CHARS` long.
    """
    from spire_hw.config import grammar  # noqa: PLC0415 - lark takes 0.2 s that --help can spare

    return grammar.parse(text, file)


_ENV: Final = re.compile(
    r"\$(?:\{(?P<special>[*#$@!?\-0-9])\}|(?P<braced>\{)(?:(?P<name>[^}]*)\})?"
    r"|(?P<one>[*#$@!?\-0-9])|(?P<word>[A-Za-z_][A-Za-z0-9_]*))"
)


def expand_env(text: str, environ: Mapping[str, str]) -> str:
    """Put environment variables into raw text, with the rules of Go's `os.Expand`.

    `$NAME` and `${NAME}` are replaced, by nothing when unset; `$$` becomes `$`; `${}` and an open
    `${` disappear; any other `$` stays.
    """

    def replace(found: re.Match[str]) -> str:
        name = found["special"] or found["name"] or found["one"] or found["word"] or ""
        return "$" if name == "$" else environ.get(name, "")

    return _ENV.sub(replace, text)

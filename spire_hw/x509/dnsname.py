"""Which DNS names may stand in a certificate."""

from __future__ import annotations

import re
from typing import Final

from spire_hw.errors import InvalidInputError

_MAX_BYTES: Final = 253
_DNS_NAME: Final = re.compile(
    r"(?:\*\.)?(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)"
    r"(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*",
    re.ASCII,
)


def check_dns_name(name: str) -> str:
    """Return name when it may be a DNS SAN.

    Args:
        name: ASCII labels of letters, digits and inner hyphens, 1 to 63 each, 253 bytes in all, no
            final dot; the first label may be `*` when others follow.

    Raises:
        InvalidInputError: anything else.
    """
    if len(name) > _MAX_BYTES or _DNS_NAME.fullmatch(name) is None:
        raise InvalidInputError(
            f"DNS name {name[:_MAX_BYTES]!a} is not made of labels of letters, digits and hyphens"
        )
    return name


def check_dns_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names when each may be a DNS SAN and none is there twice.

    Raises:
        InvalidInputError: a name is not allowed, or stands there twice.
    """
    for name in names:
        check_dns_name(name)
    if len(set(names)) != len(names):
        raise InvalidInputError("the same DNS name is given twice")
    return names

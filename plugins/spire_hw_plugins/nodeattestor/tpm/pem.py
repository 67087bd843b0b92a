"""An endorsement key as the Go plugins send it: its certificate, its public key, or both, in PEM."""

from __future__ import annotations

import base64
import re
from typing import Final

from spire_hw.errors import InvalidInputError
from spire_hw_plugins.nodeattestor import strictjson

_PEM_LABELS: Final = ("CERTIFICATE", "PUBLIC KEY")
_PEM_BLOCK = re.compile(
    r"-----BEGIN ([A-Z0-9 ]{1,40})-----\r?\n([A-Za-z0-9+/=\r\n]*)\r?\n-----END \1-----\s*"
)


def join(certificate: bytes | None, spki: bytes | None) -> bytes:
    """Return a bundle; the certificate goes first, since dialect A reads one block only."""
    found = {"CERTIFICATE": certificate, "PUBLIC KEY": spki}
    return b"".join(_block(label, der) for label, der in found.items() if der is not None)


def _block(label: str, der: bytes) -> bytes:
    text = base64.b64encode(der).decode()
    lines = "\n".join(text[i : i + 64] for i in range(0, len(text), 64))
    return f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n".encode()


def split(data: bytes) -> tuple[bytes | None, bytes | None]:
    """Return certificate and public key of a bundle, each None when it is not there.

    Raises:
        InvalidInputError: neither, one of them twice, another block, or text beside the blocks.
    """
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as e:
        raise InvalidInputError("ek: no endorsement key in the request: not PEM") from e
    found: dict[str, bytes] = {}
    place = 0
    while place < len(text):
        block = _PEM_BLOCK.match(text, place)
        if block is None:
            what = "text beside PEM blocks" if "-----BEGIN " in text else "not PEM"
            raise InvalidInputError(f"ek: no endorsement key in the request: {what}")
        label, body = block[1], block[2]
        if label not in _PEM_LABELS:
            raise InvalidInputError("ek: unexpected PEM block")
        if label in found:
            raise InvalidInputError("ek: expected one certificate and at most one public key")
        found[label] = strictjson.decode64("".join(body.split()), "EK", stage="ek")
        place = block.end()
    if not found:
        raise InvalidInputError("ek: no endorsement key in the request")
    return found.get("CERTIFICATE"), found.get("PUBLIC KEY")

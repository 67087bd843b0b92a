"""Where endorsement keys to enrol come from: tables in CSV, and what a node's agent says of its TPM.

Bytes in; one value or fault for each key out. Nothing in a file is believed: hashes are computed
again from the keys they are said to be of.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from spire_hw.errors import InvalidInputError
from spire_hw.key import check_public_key, fingerprint, spki_der
from spire_hw.tpm.castore import split
from spire_hw.tpm.certificate import Certificate, parse_certificate

MAX_CSV_BYTES: Final = 16 << 20
MAX_NODE_BYTES: Final = 1 << 20
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_COLUMNS: Final = ("ek_hash", "comment", "owner")
_MAX_SHOWN: Final = 80
_MAX_KEYS: Final = 32


@dataclass(frozen=True, slots=True)
class Wanted:
    """A key to enrol.

    Attributes:
        place: where it was read, such as `line 3`.
        ek_hash: lower-case hex SHA-256; as it was written where it is at fault.
        comment: free text.
        owner: who answers for the machine.
        fault: why it cannot be enrolled, "" when it can.
    """

    place: str
    ek_hash: str
    comment: str = ""
    owner: str = ""
    fault: str = ""


def normalise_hash(text: str) -> str:
    """Return an endorsement key hash as it is kept.

    Raises:
        InvalidInputError: it is none.
    """
    ek_hash = text.strip().lower().removeprefix("sha256:").replace(":", "")
    if _HASH.fullmatch(ek_hash) is None:
        raise InvalidInputError(
            f'"{text[:_MAX_SHOWN]}" is not an endorsement key hash: 64 hex digits, as'
            " `spire-hw-agent tpm ek-hash` prints them on the machine"
        )
    return ek_hash


def read_csv(raw: bytes, comment: str = "", owner: str = "") -> list[Wanted]:
    """Read a table of keys: hash, comment, owner.

    The first line may name the columns, then they may stand in any order. Empty lines and lines
    that begin with `#` are passed over.

    Args:
        raw: the file, in UTF-8.
        comment: for lines without one.
        owner: likewise.

    Raises:
        InvalidInputError: too large, not UTF-8, not CSV, or with columns that are not known.
    """
    if len(raw) > MAX_CSV_BYTES:
        raise InvalidInputError(f"larger than {MAX_CSV_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"not UTF-8 at byte {e.start}") from e
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as e:
        raise InvalidInputError(f"line {reader.line_num}: not CSV: {e}") from e
    rows = [(n, row) for n, row in rows if any(row) and not row[0].startswith("#")]
    columns: tuple[str, ...] = _COLUMNS
    if rows and "ek_hash" in (names := [cell.lower() for cell in rows[0][1]]):
        columns = _check_columns(names)
        rows = rows[1:]
    found: list[Wanted] = []
    seen: dict[str, str] = {}
    for number, row in rows:
        one = _read_row(f"line {number}", dict(zip(columns, row, strict=False)), comment, owner)
        if len(row) > len(columns):
            one = Wanted(one.place, one.ek_hash, fault=f"more than {len(columns)} columns")
        if not one.fault and one.ek_hash in seen:
            one = Wanted(one.place, one.ek_hash, fault=f"same EK hash as {seen[one.ek_hash]}")
        seen.setdefault(one.ek_hash, one.place)
        found.append(one)
    return found


def _check_columns(names: list[str]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in _COLUMNS]
    if unknown or len(set(names)) != len(names):
        shown = ", ".join(names)[:_MAX_SHOWN]
        raise InvalidInputError(f"columns are {shown}; known are {', '.join(_COLUMNS)}, each once")
    return tuple(names)


def _read_row(place: str, cells: dict[str, str], comment: str, owner: str) -> Wanted:
    written = cells.get("ek_hash", "")
    try:
        ek_hash = normalise_hash(written)
    except InvalidInputError as e:
        return Wanted(place, written[:_MAX_SHOWN], fault=e.message)
    return Wanted(place, ek_hash, cells.get("comment") or comment, cells.get("owner") or owner)


def read_node(raw: bytes, template: str = "") -> str:
    """Return the hash of the endorsement key a node attests with.

    Args:
        raw: what `spire-hw-agent tpm info -output json` or `tpm ek-hash -output json` printed.
        template: take the key of this template, such as `L-1`, instead.

    Raises:
        InvalidInputError: something else, a node without a usable key, a weak key, or a hash or
            certificate that is not the key's.
    """
    ek_hash, _ = _read_key(raw, template)
    return ek_hash


def read_certificates(raw: bytes) -> tuple[Certificate, tuple[bytes, ...]]:
    """Return an endorsement certificate and the DER of the issuers that came with it.

    Args:
        raw: PEM, the endorsement certificate first; DER; or what the agent printed, see
            `read_node`.

    Raises:
        InvalidInputError: none of these, or without a certificate.
    """
    if not raw.lstrip().startswith(b"{"):
        ders = split(raw)
        if not ders:
            raise InvalidInputError("holds no certificate")
        return parse_certificate(ders[0]), tuple(ders[1:])
    _, key = _read_key(raw, "")
    leaf, chain = _leaf_of(key), key.get("chain", [])
    if leaf is None:
        raise InvalidInputError("the node's endorsement key has no certificate that can be read")
    try:
        return leaf, tuple(bytes.fromhex(one) for one in chain)
    except (TypeError, ValueError) as e:
        raise InvalidInputError("chain is not a list of certificates in hexadecimal") from e


def _read_key(raw: bytes, template: str) -> tuple[str, dict[str, Any]]:
    """Return the hash of a node's endorsement key, and the key as it was printed."""
    key = _pick_key(_read_json(raw), template)
    text, stated = key.get("public_key"), key.get("ek_hash")
    if not isinstance(text, str) or not isinstance(stated, str):
        raise InvalidInputError("endorsement key has no public_key or no ek_hash")
    try:
        public = check_public_key(serialization.load_pem_public_key(text.encode()))
    except (ValueError, UnsupportedAlgorithm) as e:
        reason = e.message if isinstance(e, InvalidInputError) else "it does not parse"
        raise InvalidInputError(f"public_key is not acceptable: {reason}") from e
    spki = spki_der(public)
    ek_hash = fingerprint(spki)
    if stated != ek_hash:
        raise InvalidInputError("ek_hash is not that of public_key: the file was changed")
    leaf = _leaf_of(key)
    if leaf is not None and leaf.spki != spki:
        raise InvalidInputError("certificate is of another key than public_key")
    return ek_hash, key


def _read_json(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_NODE_BYTES:
        raise InvalidInputError(f"larger than {MAX_NODE_BYTES} bytes")
    try:
        document = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise InvalidInputError("not JSON") from e
    if not isinstance(document, dict):
        raise InvalidInputError(
            "not what `spire-hw-agent tpm info -output json` prints: no JSON object"
        )
    return document


def _pick_key(document: dict[str, Any], template: str) -> dict[str, Any]:
    keys = document.get("endorsement_keys", [document] if "public_key" in document else None)
    if not isinstance(keys, list) or len(keys) > _MAX_KEYS:
        raise InvalidInputError(
            "not what `spire-hw-agent tpm info -output json` prints: no endorsement_keys"
        )
    member, wanted = ("template", template) if template else ("ek_hash", document.get("ek_hash"))
    for key in keys:
        if isinstance(key, dict) and key.get(member) == wanted:
            return key
    if template:
        there = sorted({str(k.get("template"))[:8] for k in keys if isinstance(k, dict)})
        shown = ", ".join(there) or "none"
        raise InvalidInputError(f"the node has no endorsement key {template[:8]}; it has: {shown}")
    raise InvalidInputError("the node has no endorsement key its agent could attest with")


def _leaf_of(key: dict[str, Any]) -> Certificate | None:
    """Return the certificate of a key, None without one that its own agent could read."""
    certificate = key.get("certificate")
    if not isinstance(certificate, dict) or "fault" in certificate:
        return None
    try:
        return parse_certificate(bytes.fromhex(str(certificate.get("der"))))
    except InvalidInputError:
        raise
    except ValueError as e:
        raise InvalidInputError("certificate is not in hexadecimal") from e

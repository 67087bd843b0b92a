"""Registration entries from a JSON file, and as text: upstream's shapes of both."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from spire_hw._pb import types_pb2
from spire_hw.cli.files import read_input
from spire_hw.cli.output import go_time, table
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_server.cli.connect import id_text

if TYPE_CHECKING:
    from collections.abc import Callable

_LABEL_WIDTH: Final = 24
_MAX_BYTES: Final = 64 * 1024 * 1024
_MAX_INT32: Final = 2**31 - 1
_MAX_INT64: Final = 2**63 - 1


def read_json(path: str) -> Any:
    """Return what a JSON file holds; `-` is standard input.

    Raises:
        NotReadyError: it cannot be read.
        InvalidInputError: it is too large.
        ConfigError: it is not JSON.
    """
    name = "standard input" if path == "-" else path
    raw = read_input(path, _MAX_BYTES)
    try:
        return json.loads(raw)
    except json.JSONDecodeError as e:
        raise ConfigError(name, [ConfigFault(e.lineno, f"is not JSON: {e.msg}")]) from e
    except (UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(name, [ConfigFault(0, "is not JSON")]) from e


def load_entries(path: str) -> list[types_pb2.Entry]:
    """Return the entries of `{"entries": [...]}` in a file, `-` for standard input.

    Raises:
        ConfigError: with the faults of all entries.
    """
    held = read_json(path)
    raw = held.get("entries") if isinstance(held, dict) else None
    if not isinstance(raw, list):
        message = 'must be an object with a list "entries"'
        raise ConfigError(path, [ConfigFault(0, message)])
    faults: list[ConfigFault] = []
    entries = []
    for number, one in enumerate(raw):
        reader = _EntryReader(one if isinstance(one, dict) else {})
        if not isinstance(one, dict):
            reader.faults.append("must be an object")
        entries.append(reader.read())
        faults += [ConfigFault(0, f"entries[{number}]: {fault}") for fault in reader.faults]
    if faults:
        raise ConfigError(path, faults)
    return entries


class _EntryReader:
    """Reads one entry and notes everything that is wrong with it."""

    def __init__(self, held: dict[str, Any]) -> None:
        self._held = {key.lower(): value for key, value in held.items()}
        self._names = {key.lower(): key for key in held}
        self.faults: list[str] = []

    def read(self) -> types_pb2.Entry:
        entry = types_pb2.Entry(
            id=self._take("entry_id", str, ""),
            spiffe_id=self._id("spiffe_id"),
            parent_id=self._id("parent_id"),
            selectors=self._selectors(),
            x509_svid_ttl=self._number("x509_svid_ttl", _MAX_INT32),
            jwt_svid_ttl=self._number("jwt_svid_ttl", _MAX_INT32),
            federates_with=self._texts("federates_with", trust_domain_name),
            admin=self._take("admin", bool, default=False),
            downstream=self._take("downstream", bool, default=False),
            expires_at=self._number("entryExpiry", _MAX_INT64),
            dns_names=self._texts("dns_names", str),
            store_svid=self._take("store_svid", bool, default=False),
            hint=self._take("hint", str, ""),
        )
        extra = self._take("additional_attributes", dict, {})
        for key, value in extra.items():
            if key not in types_pb2.Entry.AdditionalAttributes.DESCRIPTOR.fields_by_name:
                self.faults.append(f'unknown key "additional_attributes.{key}"')
            elif not isinstance(value, bool):
                self.faults.append(f'"additional_attributes.{key}" must be true or false')
            else:
                setattr(entry.additional_attributes, key, value)
        self.faults += [f'unknown key "{self._names[key]}"' for key in self._held]
        return entry

    def _take(self, key: str, kind: type, default: Any) -> Any:
        value = self._held.pop(key.lower(), None)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            words = {str: "text", bool: "true or false", int: "a whole number", list: "a list"}
            self.faults.append(f'"{key}" must be {words.get(kind, "an object")}')
            return default
        return value

    def _number(self, key: str, most: int) -> int:
        value: int = self._take(key, int, 0)
        if 0 <= value <= most:
            return value
        self.faults.append(f'"{key}" must be between 0 and {most}')
        return 0

    def _id(self, key: str) -> types_pb2.SPIFFEID:
        text: str = self._take(key, str, "")
        try:
            found = SpiffeId.parse(text)
        except InvalidInputError as e:
            self.faults.append(f'"{key}": {e.message}')
            return types_pb2.SPIFFEID()
        return types_pb2.SPIFFEID(trust_domain=found.trust_domain.name, path=found.path)

    def _texts(self, key: str, parse: Callable[[str], str]) -> list[str]:
        found = []
        for value in self._take(key, list, []):
            try:
                if not isinstance(value, str):
                    raise InvalidInputError("must hold text only")  # noqa: TRY301 - one place for both
                found.append(parse(value))
            except InvalidInputError as e:
                self.faults.append(f'"{key}": {e.message}')
        return found

    def _selectors(self) -> list[types_pb2.Selector]:
        found = []
        for value in self._take("selectors", list, []):
            fields = value if isinstance(value, dict) else {}
            kind, text = fields.get("type"), fields.get("value")
            if not isinstance(kind, str) or not isinstance(text, str):
                self.faults.append('"selectors" must hold objects with "type" and "value"')
                continue
            try:
                Selector(type=kind, value=text)
            except InvalidInputError as e:
                self.faults.append(f'"selectors": {e.message}')
            found.append(types_pb2.Selector(type=kind, value=text))
        return found


def trust_domain_name(text: str) -> str:
    """Return the name of a trust domain, given by name or as its SPIFFE ID.

    Raises:
        SpiffeIdError: it does not parse.
    """
    return TrustDomain.parse(text.removeprefix("spiffe://")).name


def entry_text(entry: types_pb2.Entry) -> str:
    """Return the lines about an entry, in upstream's layout, without the blank line after it."""
    rows = [
        ("Entry ID", entry.id or "(none)"),
        ("SPIFFE ID", id_text(entry.spiffe_id)),
        ("Parent ID", id_text(entry.parent_id)),
        ("Revision", str(entry.revision_number)),
    ]
    rows += [("Downstream", "true")] if entry.downstream else []
    rows += [
        ("X509-SVID TTL", str(entry.x509_svid_ttl or "default")),
        ("JWT-SVID TTL", str(entry.jwt_svid_ttl or "default")),
    ]
    rows += [("Expiration time", go_time(entry.expires_at, utc=True))] if entry.expires_at else []
    rows += [("Selector", f"{s.type}:{s.value}") for s in entry.selectors]
    rows += [("FederatesWith", name) for name in entry.federates_with]
    rows += [("DNS name", name) for name in entry.dns_names]
    rows += [("Admin", "true")] if entry.admin else []
    rows += [("StoreSvid", "true")] if entry.store_svid else []
    rows += [("Hint", entry.hint)] if entry.hint else []
    extra = entry.additional_attributes
    rows += [("DisableX509SvidPrefetch", "true")] if extra.disable_x509_svid_prefetch else []
    rows += [("JwtSvidIncludeJti", "true")] if extra.jwt_svid_include_jti else []
    return table(rows, _LABEL_WIDTH)

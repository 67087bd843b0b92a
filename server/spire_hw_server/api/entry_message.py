"""Registration entries between the wire and the store: checks on the way in, masks both ways."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from spire_hw._pb import types_pb2
from spire_hw.errors import InvalidInputError
from spire_hw.rpc import convert
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain, check_member, check_workload_id
from spire_hw.x509.dnsname import check_dns_name
from spire_hw_server.datastore.records import Entry, EntryFilter, Match

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_HINT_BYTES: Final = 1024
_ENTRY_ID: Final = re.compile(r"[A-Za-z0-9._-]{0,255}", re.ASCII)
_MAX_TIME: Final = 253402300799  # end of year 9999

# Mask bits that may be set on update, with the attributes they stand for.
MASKED: Final[dict[str, tuple[str, ...]]] = {
    "spiffe_id": ("spiffe_id",),
    "parent_id": ("parent_id",),
    "selectors": ("selectors",),
    "x509_svid_ttl": ("x509_svid_ttl_s",),
    "federates_with": ("federates_with",),
    "admin": ("admin",),
    "downstream": ("downstream",),
    "expires_at": ("expires_at",),
    "dns_names": ("dns_names",),
    "store_svid": ("store_svid",),
    "jwt_svid_ttl": ("jwt_svid_ttl_s",),
    "hint": ("hint",),
    "additional_attributes": ("disable_x509_svid_prefetch", "jwt_svid_include_jti"),
}


def parse_entry(message: types_pb2.Entry, trust_domain: TrustDomain) -> Entry:
    """Return the entry of a create request.

    Raises:
        InvalidInputError: a field breaks a rule; the message names the field.
    """
    blank = Entry(
        entry_id=check_entry_id(message.id),
        spiffe_id=_spiffe_id(message, trust_domain),
        parent_id=_parent_id(message, trust_domain),
        selectors=_selectors(message.selectors),
    )
    rest = set(MASKED) - {"spiffe_id", "parent_id", "selectors"}
    return _checked(replace(blank, **_attributes(message, rest, trust_domain)))


def parse_update(
    message: types_pb2.Entry,
    mask: types_pb2.EntryMask | None,
    trust_domain: TrustDomain,
    stored: Entry,
) -> tuple[Entry, frozenset[str]]:
    """Return a stored entry after an update request and the attributes the request names.

    Args:
        message: the request's entry; fields outside the mask are not looked at.
        mask: None stands for all fields.
        trust_domain: ours.
        stored: the entry as it is.

    Raises:
        InvalidInputError: a named field breaks a rule.
    """
    named = {n for n in MASKED if mask is None or getattr(mask, n)}
    values = _attributes(message, named, trust_domain)
    return _checked(replace(stored, **values)), frozenset(values)


def check_entry_id(entry_id: str) -> str:
    """Return a client's entry id, which may be empty.

    Raises:
        InvalidInputError: too long, or a character outside `A-Za-z0-9._-`.
    """
    if _ENTRY_ID.fullmatch(entry_id) is None:
        raise InvalidInputError("entry id is not made of up to 255 letters, digits, '.', '_', '-'")
    return entry_id


def encode_entry(entry: Entry, mask: types_pb2.EntryMask | None = None) -> types_pb2.Entry:
    """Return the message of an entry; a mask leaves fields out, never the id."""
    message = types_pb2.Entry(id=entry.entry_id)
    for name, write in _WRITERS.items():
        if mask is None or getattr(mask, name):
            write(message, entry)
    return message


def parse_filter(message: Any, trust_domain: TrustDomain) -> EntryFilter:
    """Return the filter of a list or count request.

    Raises:
        InvalidInputError: a bad id, selector or trust domain, or an empty set of them.
    """
    where = EntryFilter()
    if message.HasField("by_spiffe_id"):
        where = replace(where, spiffe_id=_filter_id(message.by_spiffe_id, "SPIFFE", trust_domain))
    if message.HasField("by_parent_id"):
        where = replace(where, parent_id=_filter_id(message.by_parent_id, "parent", trust_domain))
    if message.HasField("by_selectors"):
        where = replace(where, selectors=parse_selector_match(message.by_selectors))
    if message.HasField("by_federates_with"):
        where = replace(where, federates_with=_federates_with_match(message.by_federates_with))
    if message.HasField("by_hint"):
        where = replace(where, hint=message.by_hint.value)
    if message.HasField("by_downstream") and message.by_downstream.value:
        where = replace(where, downstream=True)
    return where


def parse_selector_match(
    message: types_pb2.SelectorMatch,
) -> tuple[Match, tuple[Selector, ...]]:
    """Return a selector condition.

    Raises:
        InvalidInputError: no selectors, a bad one, or an unknown match behaviour.
    """
    if not message.selectors:
        raise InvalidInputError("malformed selectors filter: no selectors")
    return _match(message.match), _selectors(message.selectors)


def _federates_with_match(
    message: types_pb2.FederatesWithMatch,
) -> tuple[Match, tuple[TrustDomain, ...]]:
    if not message.trust_domains:
        raise InvalidInputError("malformed federates with filter: no trust domains")
    return _match(message.match), _federates_with(message.trust_domains)


def _match(number: int) -> Match:
    try:
        return Match(number)
    except ValueError as e:
        raise InvalidInputError(f"match behaviour {number} is unknown") from e


def _filter_id(message: types_pb2.SPIFFEID, what: str, trust_domain: TrustDomain) -> SpiffeId:
    try:
        spiffe_id = convert.id_from_pb(message)
        check_member(spiffe_id, trust_domain)
    except InvalidInputError as e:
        raise InvalidInputError(f"malformed {what} ID filter: {e.message}") from e
    return spiffe_id


def _spiffe_id(message: types_pb2.Entry, trust_domain: TrustDomain) -> SpiffeId:
    if not message.HasField("spiffe_id"):
        raise InvalidInputError("entry has no spiffe_id")
    spiffe_id = convert.id_from_pb(message.spiffe_id)
    check_workload_id(spiffe_id, trust_domain)
    return spiffe_id


def _parent_id(message: types_pb2.Entry, trust_domain: TrustDomain) -> SpiffeId:
    if not message.HasField("parent_id"):
        raise InvalidInputError("entry has no parent_id")
    parent_id = convert.id_from_pb(message.parent_id)
    check_member(parent_id, trust_domain, path_required=True)
    return parent_id


def _selectors(messages: Iterable[types_pb2.Selector]) -> tuple[Selector, ...]:
    found = {Selector(type=m.type, value=m.value) for m in messages}
    if not found:
        raise InvalidInputError("selector list is empty")
    return tuple(sorted(found))


def _ttl(what: str, seconds: int) -> int:
    if seconds < 0:
        raise InvalidInputError(f"{what} is negative")
    return seconds


def _time(what: str, seconds: int) -> datetime | None:
    if not 0 <= seconds <= _MAX_TIME:
        raise InvalidInputError(f"{what} is not a time")
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def _hint(hint: str) -> str:
    if len(hint.encode()) > MAX_HINT_BYTES:
        raise InvalidInputError(f"hint is longer than {MAX_HINT_BYTES} bytes")
    return hint


def _federates_with(names: Iterable[str]) -> tuple[TrustDomain, ...]:
    return tuple(dict.fromkeys(convert.trust_domain_from_pb(name) for name in names))


def _dns_names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(check_dns_name(name) for name in names))


def _attributes(
    message: types_pb2.Entry, named: set[str], trust_domain: TrustDomain
) -> dict[str, Any]:
    readers: dict[str, Callable[[], Any]] = {
        "spiffe_id": lambda: _spiffe_id(message, trust_domain),
        "parent_id": lambda: _parent_id(message, trust_domain),
        "selectors": lambda: _selectors(message.selectors),
        "x509_svid_ttl": lambda: _ttl("x509_svid_ttl", message.x509_svid_ttl),
        "federates_with": lambda: _federates_with(message.federates_with),
        "admin": lambda: message.admin,
        "downstream": lambda: message.downstream,
        "expires_at": lambda: _time("expires_at", message.expires_at),
        "dns_names": lambda: _dns_names(message.dns_names),
        "store_svid": lambda: message.store_svid,
        "jwt_svid_ttl": lambda: _ttl("jwt_svid_ttl", message.jwt_svid_ttl),
        "hint": lambda: _hint(message.hint),
    }
    values = {MASKED[n][0]: read() for n, read in readers.items() if n in named}
    if "additional_attributes" in named:
        extra = message.additional_attributes
        values["disable_x509_svid_prefetch"] = extra.disable_x509_svid_prefetch
        values["jwt_svid_include_jti"] = extra.jwt_svid_include_jti
    return values


def _checked(entry: Entry) -> Entry:
    if not entry.store_svid:
        return entry
    if len({selector.type for selector in entry.selectors}) > 1:
        raise InvalidInputError("selectors of an entry with store_svid must be of one type")
    if entry.disable_x509_svid_prefetch:
        raise InvalidInputError("an entry with store_svid cannot have its prefetch disabled")
    return entry


def _write_additional(message: types_pb2.Entry, entry: Entry) -> None:
    if entry.disable_x509_svid_prefetch or entry.jwt_svid_include_jti:
        message.additional_attributes.disable_x509_svid_prefetch = entry.disable_x509_svid_prefetch
        message.additional_attributes.jwt_svid_include_jti = entry.jwt_svid_include_jti


def _write_spiffe_id(message: types_pb2.Entry, entry: Entry) -> None:
    message.spiffe_id.trust_domain = entry.spiffe_id.trust_domain.name
    message.spiffe_id.path = entry.spiffe_id.path


def _write_parent_id(message: types_pb2.Entry, entry: Entry) -> None:
    message.parent_id.trust_domain = entry.parent_id.trust_domain.name
    message.parent_id.path = entry.parent_id.path


def _write_selectors(message: types_pb2.Entry, entry: Entry) -> None:
    for selector in entry.selectors:
        message.selectors.add(type=selector.type, value=selector.value)


def _seconds(moment: datetime | None) -> int:
    return 0 if moment is None else int(moment.timestamp())


def _scalar(name: str, read: Callable[[Entry], Any]) -> Callable[[types_pb2.Entry, Entry], None]:
    def write(message: types_pb2.Entry, entry: Entry) -> None:
        setattr(message, name, read(entry))

    return write


_WRITERS: Final[dict[str, Callable[[types_pb2.Entry, Entry], None]]] = {
    "spiffe_id": _write_spiffe_id,
    "parent_id": _write_parent_id,
    "selectors": _write_selectors,
    "x509_svid_ttl": _scalar("x509_svid_ttl", lambda e: e.x509_svid_ttl_s),
    "federates_with": lambda m, e: m.federates_with.extend(t.name for t in e.federates_with),
    "admin": _scalar("admin", lambda e: e.admin),
    "downstream": _scalar("downstream", lambda e: e.downstream),
    "expires_at": _scalar("expires_at", lambda e: _seconds(e.expires_at)),
    "dns_names": lambda m, e: m.dns_names.extend(e.dns_names),
    "revision_number": _scalar("revision_number", lambda e: e.revision_number),
    "store_svid": _scalar("store_svid", lambda e: e.store_svid),
    "jwt_svid_ttl": _scalar("jwt_svid_ttl", lambda e: e.jwt_svid_ttl_s),
    "hint": _scalar("hint", lambda e: e.hint),
    "created_at": _scalar("created_at", lambda e: _seconds(e.created_at)),
    "additional_attributes": _write_additional,
}

"""What the server keeps, and the questions it asks of the store.

Values are plain and frozen. Every method is one transaction. Absent things raise NotFoundError,
present ones AlreadyExistsError, an unusable store UnavailableError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Protocol

from spire_hw.bundle.bundle import Bundle
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain


@dataclass(frozen=True, slots=True)
class Entry:
    """A registration entry.

    Attributes:
        entry_id: up to 255 of `A-Za-z0-9-._`; "" before creation lets the store choose a UUID.
        selectors: sorted, without duplicates.
        x509_svid_ttl_s: seconds, 0 means the server's default; jwt_svid_ttl_s likewise.
        expires_at: when the store may drop the entry, None means never.
        revision_number: 0 at creation, one more at every update.
        created_at: set by the store.
    """

    entry_id: str
    spiffe_id: SpiffeId
    parent_id: SpiffeId
    selectors: tuple[Selector, ...]
    x509_svid_ttl_s: int = 0
    jwt_svid_ttl_s: int = 0
    federates_with: tuple[TrustDomain, ...] = ()
    admin: bool = False
    downstream: bool = False
    expires_at: datetime | None = None
    dns_names: tuple[str, ...] = ()
    revision_number: int = 0
    store_svid: bool = False
    hint: str = ""
    created_at: datetime | None = None


class Match(Enum):
    """How a set is compared with the one asked for (upstream's numbers)."""

    EXACT = 0
    SUBSET = 1
    SUPERSET = 2
    ANY = 3


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """Conditions combined by AND; None leaves one out."""

    spiffe_id: SpiffeId | None = None
    parent_id: SpiffeId | None = None
    selectors: tuple[Match, tuple[Selector, ...]] | None = None
    federates_with: tuple[Match, tuple[TrustDomain, ...]] | None = None
    hint: str | None = None
    downstream: bool | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list: at most `size` items (0 means all) after `token`."""

    size: int = 0
    token: str = ""


@dataclass(frozen=True, slots=True)
class EntryPage:
    """Part of the entries and the token of the next part, "" at the end."""

    entries: list[Entry]
    next_token: str


@dataclass(frozen=True, slots=True)
class Node:
    """An attested node.

    Attributes:
        serial_number: decimal serial of its current SVID, "" when banned.
        new_serial_number: serial of a renewed SVID that was not used yet, "" when there is none.
        selectors: with the attestor's name as type.
    """

    agent_id: SpiffeId
    attestation_type: str
    serial_number: str
    expires_at: datetime
    new_serial_number: str = ""
    new_expires_at: datetime | None = None
    can_reattest: bool = False
    agent_version: str = ""
    selectors: tuple[Selector, ...] = ()

    @property
    def banned(self) -> bool:
        """Tell whether an operator banned it."""
        return not self.serial_number and not self.new_serial_number


@dataclass(frozen=True, slots=True)
class NodeFilter:
    """Conditions combined by AND; None leaves one out."""

    attestation_type: str | None = None
    selectors: tuple[Match, tuple[Selector, ...]] | None = None
    banned: bool | None = None
    can_reattest: bool | None = None
    expires_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class NodePage:
    """Part of the nodes and the token of the next part, "" at the end."""

    nodes: list[Node]
    next_token: str


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A single-use token; the value is a secret."""

    value: str = field(repr=False)
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class EnrolledEk:
    """A TPM allowed by the hash of its endorsement key.

    Attributes:
        ek_hash: lower-case hex SHA-256, as `spire-hw-agent tpm ek-hash` prints it.
    """

    ek_hash: str
    comment: str = ""
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class JournalRow:
    """One server's CA journal.

    Attributes:
        row_id: assigned by the store, 0 for a new one.
        active_x509_authority_id: lower-case hex subject key id; the row is found by it.
        data: serialised journal.
    """

    row_id: int
    active_x509_authority_id: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Change:
    """Something about an entry or node changed; followed by caches."""

    event_id: int
    kind: str  # "entry" or "node"
    key: str  # entry id or agent id


class Datastore(Protocol):
    """Everything the server asks of its store."""

    async def create_entry(self, entry: Entry) -> Entry:
        """Store a new entry.

        Raises:
            SimilarEntryError: same id, parent and selectors exist; carries the one that is there.
            AlreadyExistsError: the entry_id is taken.
        """
        ...

    async def get_entry(self, entry_id: str) -> Entry: ...
    async def get_entries(self, entry_ids: Sequence[str]) -> dict[str, Entry]: ...
    async def list_entries(self, where: EntryFilter, page: Page) -> EntryPage: ...
    async def count_entries(self, where: EntryFilter) -> int: ...
    async def update_entry(self, entry: Entry, fields: frozenset[str] | None) -> Entry:
        """Replace the named attributes (None means all) of the entry with that entry_id."""
        ...

    async def delete_entry(self, entry_id: str) -> Entry: ...
    async def prune_entries(self, expired_before: datetime) -> int: ...

    async def put_node(self, node: Node) -> Node:
        """Store a node with its selectors, replacing one with the same agent ID."""
        ...

    async def get_node(self, agent_id: SpiffeId) -> Node: ...
    async def list_nodes(self, where: NodeFilter, page: Page) -> NodePage: ...
    async def count_nodes(self, where: NodeFilter) -> int: ...
    async def set_node_serials(
        self,
        agent_id: SpiffeId,
        *,
        serial_number: str,
        expires_at: datetime,
        new_serial_number: str,
        new_expires_at: datetime | None,
    ) -> Node: ...
    async def set_node_version(self, agent_id: SpiffeId, version: str) -> None: ...
    async def ban_node(self, agent_id: SpiffeId) -> Node: ...
    async def delete_node(self, agent_id: SpiffeId) -> Node: ...

    async def create_join_token(self, token: JoinToken) -> None: ...
    async def take_join_token(self, value: str) -> JoinToken:
        """Delete and return a token in one step, so that it works once only."""
        ...

    async def prune_join_tokens(self, expired_before: datetime) -> int: ...

    async def get_bundle(self, trust_domain: TrustDomain) -> Bundle: ...
    async def list_bundles(self) -> list[Bundle]: ...
    async def append_bundle(self, bundle: Bundle) -> Bundle:
        """Merge authorities into a bundle (created when absent); the sequence grows on change."""
        ...

    async def set_bundle(self, bundle: Bundle) -> Bundle: ...
    async def delete_bundle(self, trust_domain: TrustDomain) -> None: ...
    async def prune_bundle(self, trust_domain: TrustDomain, expired_before: datetime) -> bool: ...

    async def find_journal(self, x509_authority_ids: Sequence[str]) -> JournalRow | None: ...
    async def save_journal(self, row: JournalRow) -> JournalRow: ...

    async def allow_ek(self, ek: EnrolledEk) -> EnrolledEk: ...
    async def deny_ek(self, ek_hash: str) -> None: ...
    async def list_eks(self) -> list[EnrolledEk]: ...
    async def is_ek_allowed(self, ek_hash: str) -> bool: ...

    async def list_changes(self, after: int, limit: int) -> list[Change]: ...
    async def last_change(self) -> int: ...
    async def close(self) -> None: ...

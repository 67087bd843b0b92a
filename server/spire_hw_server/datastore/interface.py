"""What the server keeps, and the questions it asks of the store.

Values are plain and frozen. Every method is one transaction that happens as a whole or not at
all. Absent things raise NotFoundError, present ones AlreadyExistsError, arguments that cannot be
stored InvalidInputError, an unusable store UnavailableError. Times are kept to the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

from spire_hw.errors import AlreadyExistsError, DeniedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime

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
        revision_number: 0 at creation, one more at every update; counted by the store.
        created_at: set by the store at creation, never changed.
        disable_x509_svid_prefetch: agents make its X509-SVID when a workload asks.
        jwt_svid_include_jti: its JWT-SVIDs carry a `jti` and are never cached.
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
    disable_x509_svid_prefetch: bool = False
    jwt_svid_include_jti: bool = False


class SimilarEntryError(AlreadyExistsError):
    """An entry with the same SPIFFE ID, parent ID and set of selectors is there already.

    Attributes:
        entry: the one that is there.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__(
            f'an entry with this SPIFFE ID, parent and selectors exists: "{entry.entry_id}"'
        )
        self.entry = entry


class KeyInUseError(DeniedError):
    """A key that one node alone may have is another node's.

    Attributes:
        role: what the key was to be.
        owner: whose it is; for the log, not for the one who asked.
    """

    def __init__(self, role: KeyRole, owner: SpiffeId) -> None:
        super().__init__("the key belongs to another node")
        self.role = role
        self.owner = owner


class QuarantinedError(DeniedError):
    """A node is in quarantine, and what was to be done does not lift it.

    Attributes:
        reason_code: why it is in quarantine.
    """

    def __init__(self, agent_id: SpiffeId, reason_code: str) -> None:
        super().__init__(f'agent "{agent_id}" is in quarantine: {reason_code}')
        self.reason_code = reason_code


class Match(Enum):
    """How a stored set is compared with the one asked for (upstream's numbers).

    A stored empty set matches nothing. Asking with an empty set is InvalidInputError.
    """

    EXACT = 0  # the same
    SUBSET = 1  # the stored set lies within the one asked for
    SUPERSET = 2  # the stored set holds all that was asked for
    ANY = 3  # at least one in common


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
    """Which part of a list: at most `size` items (0 means all) after `token`.

    The token is the decimal row number of the last item of the part before: adding and deleting
    meanwhile neither repeats nor skips what stayed.
    """

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
        quarantine: reason code of the quarantine it is in, "" when it is in none.
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
    quarantine: str = ""

    @property
    def banned(self) -> bool:
        """Tell whether an operator banned it."""
        return not self.serial_number and not self.new_serial_number


class KeyRole(Enum):
    """What a node's key is for; the values are the database's."""

    ATTESTATION = 1  # signs the statements of its TPM
    SVID = 2  # of its current SVID
    NEW_SVID = 3  # of a renewed SVID that was not used yet


# Keys a node has for itself: SHA-256 of the DER SubjectPublicKeyInfo by role.
NodeKeys = Mapping[KeyRole, bytes]
NO_KEYS: Final[NodeKeys] = MappingProxyType({})


# Reason code of a quarantine that an operator alone lifts.
BY_OPERATOR: Final = "operator"
QUARANTINED: Final = "quarantined"
BANNED: Final = "banned"


@dataclass(frozen=True, slots=True)
class Posture:
    """What is known of a node's machine.

    Attributes:
        state: one of the words of `NodeState`, but for those that follow from the node itself.
        reasons: codes, the decisive one first; at most 64, each at most 64 ASCII characters.
        message: at most 1024 characters.
        since: when it got into this state.
        last_good_at: when evidence was last accepted, None for never.
        last_seen_at: when evidence last came.
        policy: name of the policy it was last judged by, "" for none.
        policy_version: its version, 0 for none.
        memory: what the next evidence is compared with; ASCII.
        evidence: the last that was accepted; None for none, and where it was not asked for.
        records: how many records of its history were ever made; the store counts.
    """

    agent_id: SpiffeId
    state: str
    reasons: tuple[str, ...]
    message: str
    since: datetime
    last_good_at: datetime | None = None
    last_seen_at: datetime | None = None
    policy: str = ""
    policy_version: int = 0
    memory: str = ""
    evidence: bytes | None = None
    records: int = 0


@dataclass(frozen=True, slots=True)
class EvidenceRecord:
    """One line of a node's history.

    Attributes:
        made_at: server's time.
        occasion: `attestation`, `heartbeat`, `policy_update`, `silence` or `operator`.
        verdict: what became of it: accept, refuse, quarantine or ban.
        state: of the node after it.
        findings: JSON, ASCII.
        policy: name of the policy, "" for none; version and digest of its text with it.
        evidence_sha256: lower-case hex digest of the whole document, "" for none.
        summary: in a few words; at most 1024 characters.
        document: the whole evidence; None when it is not kept, and in lists.
        has_document: it is kept.
        number: given by the store, from 1 for each node.
    """

    made_at: datetime
    occasion: str
    verdict: str
    state: str
    findings: str = ""
    policy: str = ""
    policy_version: int = 0
    policy_sha256: str = ""
    evidence_sha256: str = ""
    summary: str = ""
    document: bytes | None = field(default=None, repr=False)
    has_document: bool = False
    number: int = 0


@dataclass(frozen=True, slots=True)
class ImaPart:
    """A part of a node's IMA list.

    Attributes:
        first: number of its first entry; 0 starts a new list.
        entries: opaque to the store.
    """

    first: int
    entries: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PostureUpdate:
    """What one judgement changes, in one step.

    Attributes:
        posture: as it is now; an `evidence` of None leaves what is stored.
        record: a line for the history, None for none.
        ima: to be added to the list; None leaves it.
        by_operator: an operator wants it, so a quarantine of an operator does not stand against it.
    """

    posture: Posture
    record: EvidenceRecord | None = None
    ima: ImaPart | None = None
    by_operator: bool = False


@dataclass(frozen=True, slots=True)
class Sighting:
    """Good evidence that changed nothing but times and counters.

    Attributes:
        records: as in the posture it was compared with, like `since`; anything else in the store
            means that somebody judged the node meanwhile, and nothing is changed.
    """

    agent_id: SpiffeId
    records: int
    since: datetime
    last_good_at: datetime
    memory: str
    ima: ImaPart | None = None


@dataclass(frozen=True, slots=True)
class EvidencePage:
    """Part of a history and the token of the next part, "" at the end."""

    records: list[EvidenceRecord]
    next_token: str


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
    """A single-use token; the value is a secret, of which the store keeps a digest only."""

    value: str = field(repr=False)
    expires_at: datetime


MAX_EK_COMMENT: Final = 1024
MAX_EK_OWNER: Final = 256


@dataclass(frozen=True, slots=True)
class EnrolledEk:
    """A TPM allowed by the hash of its endorsement key.

    Attributes:
        ek_hash: lower-case hex SHA-256, as `spire-hw-agent tpm ek-hash` prints it.
        comment: at most `MAX_EK_COMMENT` characters.
        created_at: when it was enrolled first.
        owner: who answers for the machine; at most `MAX_EK_OWNER` characters.
    """

    ek_hash: str
    comment: str = ""
    created_at: datetime | None = None
    owner: str = ""


class EkChange(Enum):
    """What enrolling a TPM did to the list."""

    ADDED = "added"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """One version of a policy.

    Attributes:
        name: its name, ASCII.
        version: from 1; never given twice, not even after the policy was deleted.
        text: whole, with the files it refers to; "" in lists, and when this version deletes it.
        sha256: lower-case hex digest of the text, "" when this version deletes it.
        comment: for people.
        created_at: set by the store.
        created_by: who made this version.
    """

    name: str
    version: int
    text: str = field(repr=False)
    sha256: str
    comment: str = ""
    created_at: datetime | None = None
    created_by: str = ""

    @property
    def deleted(self) -> bool:
        """Tell whether the policy ends with this version."""
        return not self.sha256


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
class Federation:
    """How the bundle of a foreign trust domain is fetched.

    Attributes:
        bundle_endpoint_url: `https://...`.
        endpoint_spiffe_id: who answers there (profile https_spiffe); None for profile https_web.
    """

    trust_domain: TrustDomain
    bundle_endpoint_url: str
    endpoint_spiffe_id: SpiffeId | None = None


class BundleDeletion(Enum):
    """What happens to entries that federate with a bundle to be deleted (upstream's numbers)."""

    RESTRICT = 0  # refuse while there are any
    DELETE = 1  # delete them too
    DISSOCIATE = 2  # they no longer federate with it


class ChangeKind(Enum):
    """What a change is about."""

    ENTRY = "entry"
    NODE = "node"
    BUNDLE = "bundle"
    FEDERATION = "federation"
    POLICY = "policy"


@dataclass(frozen=True, slots=True)
class Change:
    """Something was created, updated or deleted; followed by caches of every server.

    Attributes:
        event_id: grows by exactly one from change to change, in the order they became visible.
        kind: what it is about.
        key: entry id, agent ID, trust domain name or name of a policy.
        node: the node as this change left it, None when only asking the store can tell.
    """

    event_id: int
    kind: ChangeKind
    key: str
    node: Node | None = None


class Signal(Protocol):
    """The id of the last change made through one store object; a `Watch[int]` is one."""

    @property
    def value(self) -> int:
        """Return the id, 0 before the first change."""
        ...

    @property
    def version(self) -> int:
        """Return how often it was set."""
        ...

    async def wait(self, seen: int) -> tuple[int, int]:
        """Return (value, version) as soon as the version is past `seen`."""
        ...


class Datastore(Protocol):
    """Everything the server asks of its store."""

    @property
    def changed(self) -> Signal:
        """Return the id of the last change made through this object; wakes local caches."""
        ...

    def recent_changes(self, after: int) -> Sequence[Change]:
        """Return changes made through this object that follow a number without a gap.

        From memory, so empty when the next change is too old or was made by another server:
        `list_changes` knows those.
        """
        ...

    async def create_entry(self, entry: Entry) -> Entry:
        """Store a new entry.

        Raises:
            SimilarEntryError: same id, parent and selectors exist; carries the one that is there.
            AlreadyExistsError: the entry_id is taken.
            InvalidInputError: no selectors, or it federates with a trust domain without a bundle.
        """
        ...

    async def get_entry(self, entry_id: str) -> Entry:
        """Return an entry."""
        ...

    async def get_entries(self, entry_ids: Collection[str]) -> dict[str, Entry]:
        """Return those that exist, by entry id."""
        ...

    async def list_entries(self, where: EntryFilter, page: Page) -> EntryPage:
        """Return entries in the order they were created.

        Raises:
            InvalidInputError: an unreadable page token, or an empty set to match with.
        """
        ...

    async def count_entries(self, where: EntryFilter) -> int:
        """Return how many entries there are."""
        ...

    async def update_entry(self, entry: Entry, fields: frozenset[str] | None) -> Entry:
        """Replace the named attributes (None means all) of the entry with that entry_id.

        Entry id, revision number and creation time are the store's own and may not be named.

        Raises:
            NotFoundError: no such entry.
            SimilarEntryError: it would become similar to another.
            InvalidInputError: as in create_entry, or an attribute that cannot be replaced.
        """
        ...

    async def delete_entry(self, entry_id: str) -> Entry:
        """Delete an entry and return what it was."""
        ...

    async def prune_entries(self, expired_before: datetime) -> int:
        """Delete entries whose expires_at is before a moment; return how many."""
        ...

    async def put_node(
        self, node: Node, keys: NodeKeys = NO_KEYS, update: PostureUpdate | None = None
    ) -> Node:
        """Store a node with its selectors and keys, replacing one with the same agent ID.

        An empty agent_version leaves the one that is stored.

        Args:
            node: its quarantine is what `update` says, none without one.
            keys: what it alone may have.
            update: what its evidence changes.

        Raises:
            DeniedError: the stored node is banned; only deleting it lifts that.
            QuarantinedError: it is in quarantine, and there is no update or an operator put it
                there.
            KeyInUseError: one of the keys is another node's.
        """
        ...

    async def set_posture(self, update: PostureUpdate) -> Node:
        """Store what evidence or an operator changes of an attested node.

        State `quarantined` puts the node in quarantine, `banned` bans it, all else frees it.

        Raises:
            NotFoundError: no such node.
            DeniedError: it is banned.
            QuarantinedError: an operator put it in quarantine, and the update is no operator's.
        """
        ...

    async def note_sightings(self, sightings: Sequence[Sighting]) -> None:
        """Store good evidence that changed nothing else, of many nodes in one step.

        No change is recorded for it. Nodes that are gone or in another state are passed over.
        """
        ...

    async def get_posture(self, agent_id: SpiffeId) -> Posture | None:
        """Return what is known of a node's machine, None when nothing is."""
        ...

    async def get_postures(self, agent_ids: Collection[SpiffeId]) -> dict[SpiffeId, Posture]:
        """Return those that exist, by agent ID, without evidence."""
        ...

    async def list_postures(self, page: Page) -> tuple[list[Posture], str]:
        """Return a part of all, without evidence, and the token of the next part."""
        ...

    async def list_silent(self, since: datetime, limit: int) -> list[SpiffeId]:
        """Return nodes attested or drifted whose last good evidence is older, the oldest first."""
        ...

    async def list_ima(self, agent_id: SpiffeId) -> list[ImaPart]:
        """Return the parts of a node's IMA list in order."""
        ...

    async def list_evidence(self, agent_id: SpiffeId, page: Page) -> EvidencePage:
        """Return a node's history, the newest first, without documents.

        Raises:
            NotFoundError: no such node.
        """
        ...

    async def get_evidence(self, agent_id: SpiffeId, number: int) -> EvidenceRecord:
        """Return a record with its document."""
        ...

    async def prune_evidence(self, made_before: datetime) -> int:
        """Delete records of all histories made before a moment; return how many."""
        ...

    async def get_node(self, agent_id: SpiffeId) -> Node:
        """Return a node."""
        ...

    async def find_node(self, agent_id: SpiffeId, keys: NodeKeys = NO_KEYS) -> Node | None:
        """Return a node, None when there is none, after a look at keys it wants to have.

        Raises:
            KeyInUseError: one of the keys is another node's.
        """
        ...

    async def find_by_attestation_key(self, digest: bytes) -> Node | None:
        """Return the node whose TPM speaks with a key, None when there is none.

        Args:
            digest: SHA-256 of the key's DER SubjectPublicKeyInfo.
        """
        ...

    async def get_nodes(self, agent_ids: Collection[SpiffeId]) -> dict[SpiffeId, Node]:
        """Return those that exist, by agent ID."""
        ...

    async def list_nodes(self, where: NodeFilter, page: Page) -> NodePage:
        """Return nodes in the order they were first stored."""
        ...

    async def count_nodes(self, where: NodeFilter) -> int:
        """Return how many nodes there are."""
        ...

    async def set_node_serials(
        self,
        agent_id: SpiffeId,
        *,
        serial_number: str,
        expires_at: datetime,
        new_serial_number: str,
        new_expires_at: datetime | None,
        expected_serial_number: str | None = None,
        new_key: bytes | None = None,
    ) -> Node:
        """Store the serials after a renewal, or when the new one is used for the first time.

        Args:
            agent_id: whose they are.
            serial_number: the current one, not empty.
            expires_at: when it ends.
            new_serial_number: the renewed one, "" when there is none.
            new_expires_at: when that ends.
            expected_serial_number: the current serial the caller decided on; anything else in
                the store means the node attested anew meanwhile and nothing is changed.
            new_key: SHA-256 of the renewed SVID's DER SubjectPublicKeyInfo.

        Raises:
            NotFoundError: no such node.
            KeyInUseError: the new key is another node's.
            DeniedError: AGENT_BANNED when it is banned, AGENT_NOT_ACTIVE when the current serial
                is not the expected one.
        """
        ...

    async def set_node_version(self, agent_id: SpiffeId, version: str) -> None:
        """Store the version an agent reports; at most 255 characters."""
        ...

    async def ban_node(self, agent_id: SpiffeId) -> Node:
        """Blank both serials of a node."""
        ...

    async def delete_node(self, agent_id: SpiffeId) -> Node:
        """Delete a node, and the alias entry of a node that came with a join token."""
        ...

    async def create_join_token(self, token: JoinToken, alias: Entry | None = None) -> None:
        """Store a join token, and in the same step the entry that gives its agent another ID.

        Raises:
            AlreadyExistsError: the value is taken.
            SimilarEntryError: the alias exists; the token is not stored.
        """
        ...

    async def take_join_token(self, value: str) -> JoinToken:
        """Delete and return a token in one step, so that it works once only.

        One that has expired is deleted and returned too, and its alias with it.
        """
        ...

    async def prune_join_tokens(self, expired_before: datetime) -> int:
        """Delete unused tokens that expired before a moment, with their aliases."""
        ...

    async def get_bundle(self, trust_domain: TrustDomain) -> Bundle:
        """Return a bundle."""
        ...

    async def list_bundles(self) -> list[Bundle]:
        """Return all bundles, by trust domain."""
        ...

    async def append_bundle(self, bundle: Bundle) -> Bundle:
        """Merge authorities into a bundle (created when absent); the sequence grows on change.

        Raises:
            InvalidInputError: a JWT key id is taken by another key.
        """
        ...

    async def create_bundle(self, bundle: Bundle) -> Bundle:
        """Store a bundle as it is.

        Raises:
            AlreadyExistsError: there is one.
        """
        ...

    async def set_bundle(self, bundle: Bundle) -> Bundle:
        """Store a bundle as it is, sequence included, replacing the one that is there."""
        ...

    async def update_bundle(
        self, trust_domain: TrustDomain, change: Callable[[Bundle], Bundle]
    ) -> Bundle:
        """Change a bundle while nobody else can; the sequence grows when something changed.

        A new sequence number is the old one plus one, or the time in seconds when that is more:
        it grows also over a restored backup.

        Args:
            trust_domain: whose bundle.
            change: pure, quick, called in another thread, perhaps more than once; the error it
                raises is passed on and nothing is stored.
        """
        ...

    async def delete_bundle(
        self, trust_domain: TrustDomain, mode: BundleDeletion = BundleDeletion.RESTRICT
    ) -> None:
        """Delete a bundle; its federation relationship, if any, stays.

        Raises:
            NotReadyError: mode RESTRICT and entries federate with it.
        """
        ...

    async def prune_bundle(self, trust_domain: TrustDomain, expired_before: datetime) -> bool:
        """Drop authorities that expired before a moment; tell whether there were any.

        Raises:
            NotReadyError: nothing usable would be left.
        """
        ...

    async def create_federation(self, federation: Federation) -> Federation:
        """Store a new relationship."""
        ...

    async def get_federation(self, trust_domain: TrustDomain) -> Federation:
        """Return a relationship."""
        ...

    async def list_federations(self) -> list[Federation]:
        """Return all relationships, by trust domain."""
        ...

    async def update_federation(self, federation: Federation) -> Federation:
        """Replace a relationship."""
        ...

    async def delete_federation(self, trust_domain: TrustDomain) -> None:
        """Delete a relationship; its bundle stays."""
        ...

    async def find_journal(self, x509_authority_ids: Sequence[str]) -> JournalRow | None:
        """Return the newest journal whose active authority is one of these."""
        ...

    async def save_journal(self, row: JournalRow) -> JournalRow:
        """Store a journal: a new one when row_id is 0, else in place of the one there.

        Raises:
            NotFoundError: row_id is not 0 and there is no such row.
        """
        ...

    async def list_journals(self) -> list[JournalRow]:
        """Return all journals, oldest first."""
        ...

    async def delete_journal(self, row_id: int) -> None:
        """Delete a journal."""
        ...

    async def allow_ek(self, ek: EnrolledEk) -> EnrolledEk:
        """Enroll a TPM; enrolling it again replaces comment and owner."""
        ...

    async def enroll_eks(
        self, wanted: Sequence[EnrolledEk], *, dry_run: bool = False
    ) -> list[EkChange]:
        """Enroll TPMs with different hashes, all or none; return what that did to each.

        With `dry_run` the list stays as it is.

        Raises:
            InvalidInputError: a hash, comment or owner that breaks the rules.
        """
        ...

    async def deny_ek(self, ek_hash: str) -> None:
        """Take a TPM off the list."""
        ...

    async def list_eks(self) -> list[EnrolledEk]:
        """Return all enrolled TPMs, oldest first."""
        ...

    async def is_ek_allowed(self, ek_hash: str) -> bool:
        """Tell whether a TPM is enrolled."""
        ...

    async def add_policy(self, policy: StoredPolicy, after: int) -> StoredPolicy:
        """Store the next version of a policy, or of a new one.

        Args:
            policy: its version is greater than any before.
            after: the newest version the caller knows, 0 for none.

        Raises:
            AlreadyExistsError: the newest version is another one.
            InvalidInputError: the version is not greater, or something is too long.
        """
        ...

    async def list_policies(self) -> list[StoredPolicy]:
        """Return the newest version of each policy by name, with texts; deleted ones left out."""
        ...

    async def list_policy_versions(self, name: str) -> list[StoredPolicy]:
        """Return all versions of a policy without their texts, oldest first."""
        ...

    async def get_policy(self, name: str, version: int = 0) -> StoredPolicy:
        """Return a version of a policy; 0 for the one in force.

        Raises:
            NotFoundError: no such version; version 0 and the policy is deleted.
        """
        ...

    async def list_changes(self, after: int, limit: int) -> list[Change]:
        """Return changes in order; the first has id `after + 1` unless it was pruned."""
        ...

    async def last_change(self) -> int:
        """Return the id of the last change ever made, 0 before the first."""
        ...

    async def prune_changes(self, made_before: datetime) -> int:
        """Delete changes made before a moment; return how many."""
        ...

    async def ping(self) -> None:
        """Make sure that the store answers."""
        ...

    async def close(self) -> None:
        """Let go of the database; called once, last."""
        ...

"""What the server keeps, and the questions it asks of the store.

Values are plain and frozen. Every method is one transaction that happens as a whole or not at
all. Absent things raise NotFoundError, present ones AlreadyExistsError, arguments that cannot be
stored InvalidInputError, an unusable store UnavailableError. Times are kept to the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from spire_hw_server.datastore.records import (
    NO_CERTIFICATES,
    NO_KEYS,
    BundleDeletion,
    Certificates,
    Change,
    EkChange,
    EnrolledEk,
    Entry,
    EntryFilter,
    EntryPage,
    EvidencePage,
    EvidenceRecord,
    Federation,
    ImaPart,
    JoinToken,
    JournalRow,
    Node,
    NodeCertificates,
    NodeFilter,
    NodeKeys,
    NodePage,
    Page,
    Posture,
    PostureUpdate,
    Sighting,
    StoredPolicy,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.spiffeid import SpiffeId, TrustDomain


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
        self,
        node: Node,
        keys: NodeKeys = NO_KEYS,
        update: PostureUpdate | None = None,
        certificates: Certificates = NO_CERTIFICATES,
    ) -> Node:
        """Store a node with its selectors and keys, replacing one with the same agent ID.

        An empty agent_version leaves the one that is stored.

        Args:
            node: its quarantine is what `update` says, none without one.
            keys: what it alone may have.
            update: what its evidence changes.
            certificates: what it was let in with, in place of those of the time before.

        Raises:
            InvalidInputError: the certificates are larger than 128 KiB.
            DeniedError: the stored node is banned; only deleting it lifts that.
            QuarantinedError: it is in quarantine, and there is no update or an operator alone lifts
                it.
            KeyInUseError: one of the keys is another node's.
        """
        ...

    async def get_certificates(self, agent_id: SpiffeId) -> Certificates:
        """Return the certificates a node was let in with, none when there is no such node."""
        ...

    async def list_certificates(self, page: Page) -> tuple[list[NodeCertificates], str]:
        """Return a part of the nodes that have certificates, and the token of the next part."""
        ...

    async def set_posture(self, update: PostureUpdate) -> Node:
        """Store what evidence or an operator changes of an attested node.

        State `quarantined` puts the node in quarantine, `banned` bans it, all else frees it.

        Raises:
            NotFoundError: no such node.
            DeniedError: it is banned.
            QuarantinedError: it is in a quarantine that an operator alone lifts, and the update is
                no operator's and no ban.
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

"""What the datastore keeps: values, filters, pages, and the errors that name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from spire_hw.errors import AlreadyExistsError, DeniedError
from spire_hw.posture.reasons import REVOKED

if TYPE_CHECKING:
    from datetime import datetime

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


# Certificates a node was let in with: chains, each DER from its leaf on; no key is in them.
Certificates = tuple[tuple[bytes, ...], ...]
NO_CERTIFICATES: Final[Certificates] = ()


@dataclass(frozen=True, slots=True)
class NodeCertificates:
    """The certificates one node was let in with.

    Attributes:
        attestation_type: the attestor that took them.
        certificates: what its attestor wants kept of them, None when they cannot be read.
    """

    agent_id: SpiffeId
    attestation_type: str
    certificates: Certificates | None


# Keys a node has for itself: SHA-256 of the DER SubjectPublicKeyInfo by role.
NodeKeys = Mapping[KeyRole, bytes]
NO_KEYS: Final[NodeKeys] = MappingProxyType({})


# Reason code of a quarantine that an operator ordered.
BY_OPERATOR: Final = "operator"
# Those that an operator alone lifts: evidence, also that which is under way, says nothing against
# the reason.
LIFTED_BY_HAND: Final = REVOKED | {"cloned_tpm", BY_OPERATOR}
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
        occasion: `attestation`, `heartbeat`, `policy_update`, `silence`, `revocation` or
            `operator`.
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

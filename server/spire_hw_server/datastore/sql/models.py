"""The tables. Migrations make them; a test holds both together.

What is matched in queries has a column or a row of its own; lists that are only read back are
JSON beside it, so that a whole entry is one row. Selectors of nodes have no index of their own:
every attestation would write a page for each of them, and only operators' lists ask for them.
Nor have times of changes, which are looked at when old ones are deleted.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    UniqueConstraint,
)

from spire_hw_server.datastore.sql.types import (
    Ascii,
    Digest,
    Exact,
    blob,
    json_text,
    row_number,
    seconds,
)

ID_CHARACTERS: Final = 2048
NAME_CHARACTERS: Final = 255
_KEY_CHARACTERS: Final = 2048

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

bundles = Table(
    "bundles",
    metadata,
    Column("row_id", row_number(), primary_key=True, autoincrement=True),
    Column("trust_domain", Ascii(NAME_CHARACTERS), nullable=False),
    Column("sequence", seconds(), nullable=False),
    Column("refresh_hint_s", seconds(), nullable=False),
    Column("authorities", blob(), nullable=False),
    UniqueConstraint("trust_domain"),
)

federations = Table(
    "federations",
    metadata,
    Column("row_id", row_number(), primary_key=True, autoincrement=True),
    Column("trust_domain", Ascii(NAME_CHARACTERS), nullable=False),
    Column("bundle_endpoint_url", Exact(8192), nullable=False),
    Column("endpoint_spiffe_id", Ascii(ID_CHARACTERS), nullable=True),
    UniqueConstraint("trust_domain"),
)

entries = Table(
    "entries",
    metadata,
    Column("row_id", row_number(), primary_key=True, autoincrement=True),
    Column("entry_id", Ascii(NAME_CHARACTERS), nullable=False),
    Column("spiffe_id", Ascii(ID_CHARACTERS), nullable=False),
    Column("parent_id", Ascii(ID_CHARACTERS), nullable=False),
    Column("similar_digest", Digest(), nullable=False),
    Column("x509_svid_ttl_s", Integer(), nullable=False),
    Column("jwt_svid_ttl_s", Integer(), nullable=False),
    Column("admin", Boolean(), nullable=False),
    Column("downstream", Boolean(), nullable=False),
    Column("store_svid", Boolean(), nullable=False),
    Column("disable_x509_svid_prefetch", Boolean(), nullable=False),
    Column("jwt_svid_include_jti", Boolean(), nullable=False),
    Column("expires_at", seconds(), nullable=True),
    Column("created_at", seconds(), nullable=False),
    Column("revision_number", seconds(), nullable=False),
    Column("hint", Exact(4096), nullable=False),
    Column("selectors", json_text(), nullable=False),
    Column("dns_names", json_text(), nullable=False),
    Column("federates_with", json_text(), nullable=False),
    UniqueConstraint("entry_id"),
    UniqueConstraint("similar_digest"),
    Index(None, "spiffe_id"),
    Index(None, "parent_id"),
    Index(None, "expires_at"),
    sqlite_autoincrement=True,
)

entry_selectors = Table(
    "entry_selectors",
    metadata,
    Column(
        "entry_row", row_number(), ForeignKey("entries.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("digest", Digest(), nullable=False),
    PrimaryKeyConstraint("entry_row", "digest"),
    Index("ix_entry_selectors_digest", "digest", "entry_row"),
)

entry_federations = Table(
    "entry_federations",
    metadata,
    Column(
        "entry_row", row_number(), ForeignKey("entries.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column(
        "trust_domain", Ascii(NAME_CHARACTERS), ForeignKey("bundles.trust_domain"), nullable=False
    ),
    PrimaryKeyConstraint("entry_row", "trust_domain"),
    Index("ix_entry_federations_trust_domain", "trust_domain", "entry_row"),
)

nodes = Table(
    "nodes",
    metadata,
    Column("row_id", row_number(), primary_key=True, autoincrement=True),
    Column("agent_id", Ascii(ID_CHARACTERS), nullable=False),
    Column("attestation_type", Exact(NAME_CHARACTERS), nullable=False),
    Column("serial_number", Ascii(NAME_CHARACTERS), nullable=False),
    Column("expires_at", seconds(), nullable=False),
    Column("new_serial_number", Ascii(NAME_CHARACTERS), nullable=False),
    Column("new_expires_at", seconds(), nullable=True),
    Column("can_reattest", Boolean(), nullable=False),
    Column("agent_version", Exact(1024), nullable=False),
    Column("selectors", json_text(), nullable=False),
    # Reason code of the quarantine it is in, NULL when it is in none.
    Column("quarantine", Exact(255), nullable=True),
    UniqueConstraint("agent_id"),
    Index(None, "expires_at"),
    sqlite_autoincrement=True,
)

node_selectors = Table(
    "node_selectors",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("digest", Digest(), nullable=False),
    PrimaryKeyConstraint("node_row", "digest"),
    sqlite_with_rowid=False,
)

# Keys that one node has for itself, by SHA-256 of their SubjectPublicKeyInfo.
node_keys = Table(
    "node_keys",
    metadata,
    Column("digest", Digest(), nullable=False),
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("role", Integer(), nullable=False),
    PrimaryKeyConstraint("digest"),
    Index(None, "node_row"),
    sqlite_with_rowid=False,
)

# What a node was let in with, by chain: a count, then each certificate's length and DER.
node_certificates = Table(
    "node_certificates",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("certificates", blob(), nullable=False),
    PrimaryKeyConstraint("node_row"),
)

# What is known of a node's machine; `memory` is what the next evidence is compared with, `evidence`
# the last that was accepted (deflated document), without the entries of its IMA list.
node_postures = Table(
    "node_postures",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("state", Ascii(16), nullable=False),
    Column("reasons", json_text(), nullable=False),
    Column("message", Exact(4096), nullable=False),
    Column("since", seconds(), nullable=False),
    Column("last_good_at", seconds(), nullable=True),
    Column("last_seen_at", seconds(), nullable=True),
    Column("policy", Exact(NAME_CHARACTERS), nullable=False),
    Column("policy_version", Integer(), nullable=False),
    Column("memory", json_text(), nullable=False),
    Column("evidence", blob(), nullable=True),
    Column("records", seconds(), nullable=False),
    PrimaryKeyConstraint("node_row"),
    Index(None, "last_good_at"),
)

# The IMA list of a node's present boot, part by part: the number of its first entry, the entries.
node_ima = Table(
    "node_ima",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("first", seconds(), nullable=False),
    Column("entries", blob(), nullable=False),
    PrimaryKeyConstraint("node_row", "first"),
)

# What a node showed and what became of it; numbers count up per node.
node_evidence = Table(
    "node_evidence",
    metadata,
    Column(
        "node_row", row_number(), ForeignKey("nodes.row_id", ondelete="CASCADE"), nullable=False
    ),
    Column("number", seconds(), nullable=False),
    Column("made_at", seconds(), nullable=False),
    Column("occasion", Ascii(16), nullable=False),
    Column("verdict", Ascii(16), nullable=False),
    Column("state", Ascii(16), nullable=False),
    Column("findings", json_text(), nullable=False),
    Column("policy", Exact(NAME_CHARACTERS), nullable=False),
    Column("policy_version", Integer(), nullable=False),
    Column("policy_sha256", Ascii(64), nullable=False),
    Column("evidence_sha256", Ascii(64), nullable=False),
    Column("summary", Exact(4096), nullable=False),
    Column("document", blob(), nullable=True),
    PrimaryKeyConstraint("node_row", "number"),
)

# Versions of named policies; the highest is in force.
policies = Table(
    "policies",
    metadata,
    Column("row_id", row_number(), primary_key=True, autoincrement=True),
    Column("name", Exact(NAME_CHARACTERS), nullable=False),
    Column("version", Integer(), nullable=False),
    Column("text", blob(), nullable=False),
    Column("sha256", Ascii(64), nullable=False),
    Column("comment", Exact(4096), nullable=False),
    Column("created_at", seconds(), nullable=False),
    Column("created_by", Exact(4096), nullable=False),
    UniqueConstraint("name", "version"),
    sqlite_autoincrement=True,
)

join_tokens = Table(
    "join_tokens",
    metadata,
    Column("row_id", row_number(), primary_key=True, autoincrement=True),
    Column("digest", Digest(), nullable=False),
    Column("expires_at", seconds(), nullable=False),
    Column("alias_entry_id", Ascii(NAME_CHARACTERS), nullable=True),
    UniqueConstraint("digest"),
    Index(None, "expires_at"),
)

ca_journals = Table(
    "ca_journals",
    metadata,
    Column("row_id", row_number(), primary_key=True, autoincrement=True),
    Column("active_x509_authority_id", Ascii(NAME_CHARACTERS), nullable=False),
    Column("data", blob(), nullable=False),
    Index(None, "active_x509_authority_id"),
)

enrolled_eks = Table(
    "enrolled_eks",
    metadata,
    Column("row_id", row_number(), primary_key=True, autoincrement=True),
    Column("ek_hash", Ascii(64), nullable=False),
    Column("comment", Exact(4096), nullable=False),
    Column("created_at", seconds(), nullable=False),
    Column("owner", Exact(1024), nullable=True),
    UniqueConstraint("ek_hash"),
)

changes = Table(
    "changes",
    metadata,
    Column("event_id", row_number(), primary_key=True, autoincrement=False),
    Column("kind", Ascii(16), nullable=False),
    Column("key", Ascii(_KEY_CHARACTERS), nullable=False),
    Column("created_at", seconds(), nullable=False),
)

# One row per counter; whoever counts up holds its lock until the end of the transaction.
counters = Table(
    "counters",
    metadata,
    Column("name", Ascii(32), primary_key=True),
    Column("value", seconds(), nullable=False),
)

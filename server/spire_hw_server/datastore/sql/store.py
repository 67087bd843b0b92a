"""The Datastore as a whole: each method is one transaction of the module that knows the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from spire_hw_server.datastore.interface import Datastore
from spire_hw_server.datastore.records import NO_CERTIFICATES, NO_KEYS, BundleDeletion
from spire_hw_server.datastore.sql import (
    bundles,
    eks,
    engine,
    entries,
    events,
    history,
    journal,
    nodes,
    policies,
    postures,
    tokens,
)
from spire_hw_server.datastore.sql import certificates as node_certs
from spire_hw_server.datastore.sql.sets import seconds_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime

    from spire_hw.aio.watch import Watch
    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.spiffeid import SpiffeId, TrustDomain
    from spire_hw_server.datastore.config import DatastoreConfig
    from spire_hw_server.datastore.records import (
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


async def open_datastore(config: DatastoreConfig, *, clock: Clock, log: Logger) -> Datastore:
    """Connect to the database and bring its schema up to date.

    Raises:
        InvalidInputError: the connection string is not usable.
        NotReadyError: the schema is newer than this program, someone else's, or old and
            migration is switched off.
        UnavailableError: the database or its driver is not there.
    """
    return SqlDatastore(await engine.open_database(config, clock=clock, log=log))


class SqlDatastore(Datastore):
    """The contract over a `Database`, which it closes."""

    def __init__(self, database: engine.Database) -> None:
        self._database = database

    @property
    @override
    def changed(self) -> Watch[int]:
        return self._database.changed

    @override
    def recent_changes(self, after: int) -> Sequence[Change]:
        return self._database.recent.since(after)

    @override
    async def create_entry(self, entry: Entry) -> Entry:
        return await self._database.write(lambda tx: entries.create(tx, entry))

    @override
    async def get_entry(self, entry_id: str) -> Entry:
        return await self._database.read(lambda tx: entries.get(tx, entry_id))

    @override
    async def get_entries(self, entry_ids: Collection[str]) -> dict[str, Entry]:
        return await self._database.read(lambda tx: entries.get_many(tx, entry_ids))

    @override
    async def list_entries(self, where: EntryFilter, page: Page) -> EntryPage:
        return await self._database.read(lambda tx: entries.list_page(tx, where, page))

    @override
    async def count_entries(self, where: EntryFilter) -> int:
        return await self._database.read(lambda tx: entries.count(tx, where), stale=True)

    @override
    async def update_entry(self, entry: Entry, fields: frozenset[str] | None) -> Entry:
        return await self._database.write(lambda tx: entries.update_one(tx, entry, fields))

    @override
    async def delete_entry(self, entry_id: str) -> Entry:
        return await self._database.write(lambda tx: entries.delete_one(tx, entry_id))

    @override
    async def prune_entries(self, expired_before: datetime) -> int:
        return await self._database.write(lambda tx: entries.prune(tx, expired_before))

    @override
    async def put_node(
        self,
        node: Node,
        keys: NodeKeys = NO_KEYS,
        update: PostureUpdate | None = None,
        certificates: Certificates = NO_CERTIFICATES,
    ) -> Node:
        return await self._database.write(
            lambda tx: nodes.put(tx, node, keys, update, certificates), prepared=True
        )

    @override
    async def get_certificates(self, agent_id: SpiffeId) -> Certificates:
        return await self._database.read(lambda tx: node_certs.get(tx, agent_id))

    @override
    async def list_certificates(self, page: Page) -> tuple[list[NodeCertificates], str]:
        return await self._database.read(lambda tx: node_certs.list_page(tx, page))

    @override
    async def set_posture(self, update: PostureUpdate) -> Node:
        return await self._database.write(lambda tx: nodes.set_posture(tx, update))

    @override
    async def note_sightings(self, sightings: Sequence[Sighting]) -> None:
        await self._database.write(lambda tx: postures.note(tx, sightings), prepared=True)

    @override
    async def get_posture(self, agent_id: SpiffeId) -> Posture | None:
        return await self._database.glance(lambda tx: postures.get(tx, agent_id))

    @override
    async def get_postures(self, agent_ids: Collection[SpiffeId]) -> dict[SpiffeId, Posture]:
        return await self._database.read(lambda tx: postures.get_many(tx, agent_ids))

    @override
    async def list_postures(self, page: Page) -> tuple[list[Posture], str]:
        return await self._database.read(lambda tx: postures.list_page(tx, page))

    @override
    async def list_silent(self, since: datetime, limit: int) -> list[SpiffeId]:
        return await self._database.read(lambda tx: postures.list_silent(tx, since, limit))

    @override
    async def list_ima(self, agent_id: SpiffeId) -> list[ImaPart]:
        return await self._database.read(lambda tx: postures.list_ima(tx, agent_id))

    @override
    async def list_evidence(self, agent_id: SpiffeId, page: Page) -> EvidencePage:
        return await self._database.read(lambda tx: history.list_page(tx, agent_id, page))

    @override
    async def get_evidence(self, agent_id: SpiffeId, number: int) -> EvidenceRecord:
        return await self._database.read(lambda tx: history.get(tx, agent_id, number))

    @override
    async def prune_evidence(self, made_before: datetime) -> int:
        before_s = seconds_of(made_before)
        return await self._database.write(lambda tx: history.prune(tx, before_s))

    @override
    async def get_node(self, agent_id: SpiffeId) -> Node:
        return await self._database.glance(lambda tx: nodes.get(tx, agent_id))

    @override
    async def find_node(self, agent_id: SpiffeId, keys: NodeKeys = NO_KEYS) -> Node | None:
        return await self._database.glance(lambda tx: nodes.find(tx, agent_id, keys))

    @override
    async def find_by_attestation_key(self, digest: bytes) -> Node | None:
        return await self._database.read(lambda tx: nodes.find_by_attestation_key(tx, digest))

    @override
    async def get_nodes(self, agent_ids: Collection[SpiffeId]) -> dict[SpiffeId, Node]:
        return await self._database.read(lambda tx: nodes.get_many(tx, agent_ids))

    @override
    async def list_nodes(self, where: NodeFilter, page: Page) -> NodePage:
        return await self._database.read(lambda tx: nodes.list_page(tx, where, page))

    @override
    async def count_nodes(self, where: NodeFilter) -> int:
        return await self._database.read(lambda tx: nodes.count(tx, where), stale=True)

    @override
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
        current = (serial_number, expires_at)
        renewed = (new_serial_number, new_expires_at)
        return await self._database.write(
            lambda tx: nodes.set_serials(
                tx, agent_id, current, renewed, expected=expected_serial_number, new_key=new_key
            )
        )

    @override
    async def set_node_version(self, agent_id: SpiffeId, version: str) -> None:
        await self._database.write(lambda tx: nodes.set_version(tx, agent_id, version))

    @override
    async def ban_node(self, agent_id: SpiffeId) -> Node:
        return await self._database.write(lambda tx: nodes.ban(tx, agent_id))

    @override
    async def delete_node(self, agent_id: SpiffeId) -> Node:
        return await self._database.write(lambda tx: nodes.delete_one(tx, agent_id))

    @override
    async def create_join_token(self, token: JoinToken, alias: Entry | None = None) -> None:
        await self._database.write(lambda tx: tokens.create(tx, token, alias))

    @override
    async def take_join_token(self, value: str) -> JoinToken:
        return await self._database.write(lambda tx: tokens.take(tx, value))

    @override
    async def prune_join_tokens(self, expired_before: datetime) -> int:
        return await self._database.write(lambda tx: tokens.prune(tx, expired_before))

    @override
    async def get_bundle(self, trust_domain: TrustDomain) -> Bundle:
        return await self._database.read(lambda tx: bundles.get(tx, trust_domain))

    @override
    async def list_bundles(self) -> list[Bundle]:
        return await self._database.read(bundles.list_all)

    @override
    async def append_bundle(self, bundle: Bundle) -> Bundle:
        return await self._database.write(lambda tx: bundles.append(tx, bundle))

    @override
    async def create_bundle(self, bundle: Bundle) -> Bundle:
        return await self._database.write(lambda tx: bundles.create(tx, bundle))

    @override
    async def set_bundle(self, bundle: Bundle) -> Bundle:
        return await self._database.write(lambda tx: bundles.put(tx, bundle))

    @override
    async def update_bundle(
        self, trust_domain: TrustDomain, change: Callable[[Bundle], Bundle]
    ) -> Bundle:
        return await self._database.write(lambda tx: bundles.change(tx, trust_domain, change))

    @override
    async def delete_bundle(
        self, trust_domain: TrustDomain, mode: BundleDeletion = BundleDeletion.RESTRICT
    ) -> None:
        await self._database.write(lambda tx: bundles.delete_one(tx, trust_domain, mode))

    @override
    async def prune_bundle(self, trust_domain: TrustDomain, expired_before: datetime) -> bool:
        return await self._database.write(
            lambda tx: bundles.prune(tx, trust_domain, expired_before)
        )

    @override
    async def create_federation(self, federation: Federation) -> Federation:
        return await self._database.write(lambda tx: bundles.create_federation(tx, federation))

    @override
    async def get_federation(self, trust_domain: TrustDomain) -> Federation:
        return await self._database.read(lambda tx: bundles.get_federation(tx, trust_domain))

    @override
    async def list_federations(self) -> list[Federation]:
        return await self._database.read(bundles.list_federations)

    @override
    async def update_federation(self, federation: Federation) -> Federation:
        return await self._database.write(lambda tx: bundles.update_federation(tx, federation))

    @override
    async def delete_federation(self, trust_domain: TrustDomain) -> None:
        await self._database.write(lambda tx: bundles.delete_federation(tx, trust_domain))

    @override
    async def find_journal(self, x509_authority_ids: Sequence[str]) -> JournalRow | None:
        return await self._database.read(lambda tx: journal.find(tx, x509_authority_ids))

    @override
    async def save_journal(self, row: JournalRow) -> JournalRow:
        return await self._database.write(lambda tx: journal.save(tx, row))

    @override
    async def list_journals(self) -> list[JournalRow]:
        return await self._database.read(journal.list_all)

    @override
    async def delete_journal(self, row_id: int) -> None:
        await self._database.write(lambda tx: journal.delete_one(tx, row_id))

    @override
    async def allow_ek(self, ek: EnrolledEk) -> EnrolledEk:
        return await self._database.write(lambda tx: eks.allow(tx, ek))

    @override
    async def enroll_eks(
        self, wanted: Sequence[EnrolledEk], *, dry_run: bool = False
    ) -> list[EkChange]:
        if dry_run:
            return await self._database.read(lambda tx: eks.compare(tx, wanted))
        return await self._database.write(lambda tx: eks.enroll(tx, wanted))

    @override
    async def deny_ek(self, ek_hash: str) -> None:
        await self._database.write(lambda tx: eks.deny(tx, ek_hash))

    @override
    async def list_eks(self) -> list[EnrolledEk]:
        return await self._database.read(eks.list_all)

    @override
    async def is_ek_allowed(self, ek_hash: str) -> bool:
        return await self._database.read(lambda tx: eks.is_allowed(tx, ek_hash))

    @override
    async def add_policy(self, policy: StoredPolicy, after: int) -> StoredPolicy:
        return await self._database.write(lambda tx: policies.add(tx, policy, after))

    @override
    async def list_policies(self) -> list[StoredPolicy]:
        return await self._database.read(policies.list_newest)

    @override
    async def list_policy_versions(self, name: str) -> list[StoredPolicy]:
        return await self._database.read(lambda tx: policies.list_versions(tx, name))

    @override
    async def get_policy(self, name: str, version: int = 0) -> StoredPolicy:
        return await self._database.read(lambda tx: policies.get(tx, name, version))

    @override
    async def list_changes(self, after: int, limit: int) -> list[Change]:
        return await self._database.read(
            lambda tx: events.list_changes(tx.connection, after, limit)
        )

    @override
    async def last_change(self) -> int:
        return await self._database.read(lambda tx: events.last_change(tx.connection))

    @override
    async def prune_changes(self, made_before: datetime) -> int:
        before_s = seconds_of(made_before)
        return await self._database.write(lambda tx: events.prune(tx.connection, before_s))

    @override
    async def ping(self) -> None:
        await self._database.read(engine.ping)

    @override
    async def close(self) -> None:
        await self._database.close()

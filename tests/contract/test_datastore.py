"""One suite for every dialect: SQLite always, PostgreSQL and MariaDB where they are installed."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from sqlalchemy import column, delete, func, select, table, text, update

from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import (
    AlreadyExistsError,
    DeniedError,
    DeniedReason,
    EncodingError,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.key import spki_der
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import (
    BundleDeletion,
    Change,
    ChangeKind,
    EkChange,
    EnrolledEk,
    Entry,
    EntryFilter,
    EvidenceRecord,
    Federation,
    ImaPart,
    JoinToken,
    JournalRow,
    KeyInUseError,
    KeyRole,
    Match,
    Node,
    NodeFilter,
    Page,
    Posture,
    PostureUpdate,
    QuarantinedError,
    Sighting,
    SimilarEntryError,
    StoredPolicy,
)
from spire_hw_server.datastore.sql.dialects import open_engine
from spire_hw_server.datastore.sql.migrations.versions import r0001_first
from spire_hw_server.datastore.sql.models import counters, metadata
from spire_hw_server.datastore.sql.sets import encode_selectors, selector_digest
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_sim import databases
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator

    from sqlalchemy.engine import Engine

    from spire_hw_server.datastore.interface import Datastore

TD = TrustDomain("example.org")
OTHER = TrustDomain("other.test")
THIRD = TrustDomain("third.test")
START = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
PARENT = TD.member("spire", "agent", "tpm", "p")
LOG = structlog.get_logger()
KEY_A, KEY_B, KEY_C = (bytes([i]) * 32 for i in range(3))
alembic_version = table("alembic_version", column("version_num"))


@pytest.fixture(scope="module", params=["sqlite3", "postgres", "mysql"])
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DatastoreConfig]:
    dialect: str = request.param
    with ExitStack() as stack:
        if dialect == "sqlite3":
            target = str(tmp_path_factory.mktemp("sqlite") / "datastore.sqlite3")
        elif dialect == "postgres":
            if reason := databases.missing_postgres():
                pytest.skip(reason)
            target = stack.enter_context(databases.postgres())
        else:
            if reason := databases.missing_mariadb():
                pytest.skip(reason)
            target = stack.enter_context(databases.mariadb())
        yield DatastoreConfig(dialect, target, max_open_conns=8, max_idle_conns=8)


@pytest.fixture(scope="module")
def raw(database: DatastoreConfig) -> Iterator[Engine]:
    """Give another way into the same database."""
    engine = open_engine(database, database.connection_string).engine
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> SimClock:
    return SimClock(START)


@pytest_asyncio.fixture
async def opened(database: DatastoreConfig, raw: Engine, clock: SimClock) -> AsyncIterator[Any]:
    """Open as many stores over one empty database as a test asks for."""
    stores: list[Datastore] = []

    async def one_more() -> Datastore:
        store = await open_datastore(database, clock=clock, log=LOG)
        stores.append(store)
        return store

    await one_more()
    with raw.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            if table is not counters:
                connection.execute(delete(table))
        connection.execute(update(counters).values(value=0))
    yield one_more
    for store in stores:
        await store.close()


@pytest_asyncio.fixture
async def store(opened: Any) -> Datastore:
    result: Datastore = await opened()
    return result


def make_entry(name: str = "web", *selectors: str, **changes: Any) -> Entry:
    chosen = tuple(Selector.parse(s) for s in selectors or ("unix:uid:1",))
    return replace(Entry("", TD.member(name), PARENT, chosen), **changes)


def make_node(name: str = "n", *selectors: str, **changes: Any) -> Node:
    node = Node(
        agent_id=TD.member("spire", "agent", "tpm", name),
        attestation_type="tpm",
        serial_number="1",
        expires_at=START + timedelta(hours=1),
        can_reattest=True,
        selectors=tuple(Selector.parse(s) for s in selectors),
    )
    return replace(node, **changes)


def make_root(days: int = 1) -> X509Root:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(START - timedelta(days=10))
        .not_valid_after(START + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return X509Root(certificate.public_bytes(Encoding.DER))


SPKI = spki_der(ec.generate_private_key(ec.SECP256R1()).public_key())


def names(entries: list[Entry]) -> list[str]:
    return [e.spiffe_id.path.removeprefix("/") for e in entries]


# Entries


@pytest.mark.asyncio
async def test_entry_comes_back_as_it_was_stored(store: Datastore, clock: SimClock) -> None:
    await store.set_bundle(Bundle(OTHER))
    entry = make_entry(
        "web",
        "unix:uid:1000",
        "unix:path:/a b ",
        "docker:label:ключ:значение",
        entry_id="My.Entry-1",
        x509_svid_ttl_s=60,
        jwt_svid_ttl_s=2**31 - 1,
        federates_with=(OTHER,),
        admin=True,
        downstream=True,
        expires_at=START + timedelta(days=400, microseconds=5),
        dns_names=("b.example.org", "a.example.org"),
        store_svid=True,
        hint="Hint ☃ with\0nul ",
        disable_x509_svid_prefetch=True,
        jwt_svid_include_jti=True,
        revision_number=9,
    )
    stored = await store.create_entry(entry)
    assert stored == replace(
        entry,
        selectors=tuple(sorted(entry.selectors)),
        expires_at=START + timedelta(days=400),
        revision_number=0,
        created_at=START,
    )
    assert await store.get_entry("My.Entry-1") == stored
    assert (await store.list_entries(EntryFilter(), Page())).entries == [stored]


@pytest.mark.asyncio
async def test_entry_without_id_gets_one_and_duplicates_collapse(store: Datastore) -> None:
    stored = await store.create_entry(make_entry("web", "b:1", "a:1", "b:1"))
    assert len(stored.entry_id) == 36
    assert [str(s) for s in stored.selectors] == ["a:1", "b:1"]


@pytest.mark.asyncio
async def test_similar_entry_is_refused_with_the_one_that_is_there(store: Datastore) -> None:
    first = await store.create_entry(make_entry("web", "a:1", "a:2"))
    with pytest.raises(SimilarEntryError) as caught:
        await store.create_entry(make_entry("web", "a:2", "a:1", entry_id="x", admin=True))
    assert caught.value.entry == first
    assert caught.value.kind is ErrorKind.ALREADY_EXISTS
    for other in (
        make_entry("web", "a:1"),
        make_entry("web", "a:1", "a:2", "a:3"),
        make_entry("Web", "a:1", "a:2"),
        make_entry("web", "A:1", "a:2"),
        make_entry("web", "a:1", "a:2 "),
        make_entry("web", "a:1", "a:2", parent_id=TD.member("spire", "agent", "tpm", "P")),
    ):
        await store.create_entry(other)
    assert await store.count_entries(EntryFilter()) == 7


@pytest.mark.asyncio
async def test_entry_id_is_taken_once_and_compared_exactly(store: Datastore) -> None:
    await store.create_entry(make_entry("a", entry_id="One"))
    with pytest.raises(AlreadyExistsError) as caught:
        await store.create_entry(make_entry("b", entry_id="One"))
    assert not isinstance(caught.value, SimilarEntryError)
    await store.create_entry(make_entry("b", entry_id="one"))
    for absent in ("ONE", "One ", "One\0", "", "x" * 300, "Öne"):
        with pytest.raises(NotFoundError):
            await store.get_entry(absent)
    found = await store.get_entries(["one", "ONE", "One", "one", "\ud800"])
    assert {i: e.spiffe_id.path for i, e in found.items()} == {"one": "/b", "One": "/a"}


@pytest.mark.asyncio
async def test_entry_update_replaces_only_what_is_named(store: Datastore, clock: SimClock) -> None:
    await store.set_bundle(Bundle(OTHER))
    before = await store.create_entry(make_entry("web", "a:1", hint="h", admin=True))
    await clock.advance(timedelta(hours=1))
    wanted = make_entry("api", "b:1", entry_id=before.entry_id, hint="new", federates_with=(OTHER,))
    after = await store.update_entry(wanted, frozenset({"hint", "federates_with"}))
    assert after == replace(before, hint="new", federates_with=(OTHER,), revision_number=1)
    whole = await store.update_entry(wanted, None)
    assert whole == replace(wanted, created_at=before.created_at, revision_number=2)
    assert await store.get_entry(before.entry_id) == whole
    same = await store.update_entry(wanted, frozenset())
    assert same.revision_number == 3
    by_new = EntryFilter(selectors=(Match.EXACT, (Selector("b", "1"),)))
    assert (await store.list_entries(by_new, Page())).entries == [same]
    by_old = EntryFilter(selectors=(Match.ANY, (Selector("a", "1"),)))
    assert (await store.list_entries(by_old, Page())).entries == []


@pytest.mark.asyncio
async def test_refused_update_changes_nothing(store: Datastore) -> None:
    one = await store.create_entry(make_entry("one"))
    two = await store.create_entry(make_entry("two"))
    with pytest.raises(SimilarEntryError) as caught:
        await store.update_entry(replace(two, spiffe_id=one.spiffe_id), None)
    assert caught.value.entry == one
    with pytest.raises(InvalidInputError):
        await store.update_entry(replace(two, selectors=()), frozenset({"selectors"}))
    with pytest.raises(InvalidInputError):
        await store.update_entry(replace(two, hint="x", federates_with=(THIRD,)), None)
    with pytest.raises(InvalidInputError):
        await store.update_entry(two, frozenset({"created_at"}))
    with pytest.raises(NotFoundError):
        await store.update_entry(replace(two, entry_id="none"), None)
    assert await store.get_entry(two.entry_id) == two


@pytest.mark.asyncio
async def test_entry_federates_only_with_stored_bundles(store: Datastore) -> None:
    with pytest.raises(InvalidInputError, match=r"other\.test"):
        await store.create_entry(make_entry(federates_with=(OTHER,)))
    assert await store.count_entries(EntryFilter()) == 0


@pytest.mark.parametrize(
    ("how", "asked", "expected"),
    [
        (Match.EXACT, "ab", {"ab"}),
        (Match.EXACT, "aab", {"ab"}),
        (Match.SUBSET, "ab", {"a", "b", "ab"}),
        (Match.SUPERSET, "ab", {"ab", "abc"}),
        (Match.ANY, "ab", {"a", "b", "ab", "bc", "abc"}),
        (Match.SUPERSET, "z", set()),
        (Match.SUBSET, "az", {"a"}),
    ],
)
@pytest.mark.asyncio
async def test_sets_are_matched_in_four_ways(
    store: Datastore, how: Match, asked: str, expected: set[str]
) -> None:
    def members(text: str) -> tuple[Selector, ...]:
        return tuple(Selector("t", c) for c in text)

    for members_of in ("a", "b", "c", "ab", "bc", "abc"):
        await store.create_entry(make_entry(members_of, selectors=members(members_of)))
        await store.put_node(make_node(members_of, selectors=members(members_of)))
    await store.put_node(make_node("empty"))
    entries = await store.list_entries(EntryFilter(selectors=(how, members(asked))), Page())
    assert set(names(entries.entries)) == expected
    where = NodeFilter(selectors=(how, members(asked)))
    nodes = await store.list_nodes(where, Page())
    assert {n.agent_id.path.rpartition("/")[2] for n in nodes.nodes} == expected
    assert await store.count_nodes(where) == len(expected)


@pytest.mark.asyncio
async def test_entry_filters_combine(store: Datastore) -> None:
    for trust_domain in (OTHER, THIRD):
        await store.set_bundle(Bundle(trust_domain))
    elsewhere = TD.member("elsewhere")
    await store.create_entry(make_entry("a", "s:1", hint="h", federates_with=(OTHER,)))
    await store.create_entry(make_entry("a", "s:2", downstream=True, parent_id=elsewhere))
    await store.create_entry(make_entry("b", "s:1", hint="H", federates_with=(OTHER, THIRD)))

    async def found(**where: Any) -> list[str]:
        page = await store.list_entries(EntryFilter(**where), Page())
        assert await store.count_entries(EntryFilter(**where)) == len(page.entries)
        return [f"{e.spiffe_id.path[1:]}{e.selectors[0].value}" for e in page.entries]

    assert await found() == ["a1", "a2", "b1"]
    assert await found(spiffe_id=TD.member("a")) == ["a1", "a2"]
    assert await found(spiffe_id=TD.member("A")) == []
    assert await found(parent_id=elsewhere) == ["a2"]
    assert await found(hint="h") == ["a1"]
    assert await found(hint="h ") == []
    assert await found(downstream=True) == ["a2"]
    assert await found(downstream=False) == ["a1", "b1"]
    assert await found(federates_with=(Match.SUPERSET, (OTHER,))) == ["a1", "b1"]
    assert await found(federates_with=(Match.EXACT, (OTHER,))) == ["a1"]
    one = (Match.ANY, (Selector("s", "1"),))
    assert await found(spiffe_id=TD.member("a"), selectors=one, hint="h") == ["a1"]
    assert await found(spiffe_id=TD.member("a"), selectors=one, hint="H") == []


@pytest.mark.asyncio
async def test_pages_neither_repeat_nor_skip(store: Datastore) -> None:
    created = [await store.create_entry(make_entry(f"e{i}", entry_id=f"e{i}")) for i in range(7)]
    first = await store.list_entries(EntryFilter(), Page(3))
    assert first.entries == created[:3]
    await store.delete_entry("e1")
    await store.delete_entry("e3")
    late = await store.create_entry(make_entry("late"))
    second = await store.list_entries(EntryFilter(), Page(3, first.next_token))
    assert second.entries == [created[4], created[5], created[6]]
    third = await store.list_entries(EntryFilter(), Page(3, second.next_token))
    assert third.entries == [late]
    assert third.next_token == ""
    exact = await store.list_entries(EntryFilter(), Page(6))
    assert (len(exact.entries), exact.next_token) == (6, "")
    assert (await store.list_entries(EntryFilter(), Page(2**40))).next_token == ""


@pytest.mark.asyncio
async def test_deleted_entry_is_gone_with_all_its_rows(store: Datastore) -> None:
    await store.set_bundle(Bundle(OTHER))
    entry = await store.create_entry(make_entry(federates_with=(OTHER,)))
    assert await store.delete_entry(entry.entry_id) == entry
    with pytest.raises(NotFoundError):
        await store.delete_entry(entry.entry_id)
    await store.delete_bundle(OTHER)
    again = await store.create_entry(make_entry(entry_id=entry.entry_id))
    assert again.revision_number == 0


@pytest.mark.asyncio
async def test_prune_takes_expired_entries_only(store: Datastore) -> None:
    for name, hours in (("old", -1), ("edge", 0), ("new", 1)):
        await store.create_entry(make_entry(name, expires_at=START + timedelta(hours=hours)))
    await store.create_entry(make_entry("forever"))
    assert await store.prune_entries(START) == 1
    page = await store.list_entries(EntryFilter(), Page())
    assert names(page.entries) == ["edge", "new", "forever"]


# Nodes


@pytest.mark.asyncio
async def test_node_comes_back_and_is_replaced(store: Datastore) -> None:
    node = make_node("n", "tpm:b", "tpm:a", agent_version="1.2.3 ü")
    stored = await store.put_node(node)
    assert stored == replace(node, selectors=tuple(sorted(node.selectors)))
    assert await store.get_node(node.agent_id) == stored
    again = make_node("n", "tpm:c", serial_number="2", can_reattest=False)
    replaced = await store.put_node(again)
    assert replaced == replace(again, agent_version="1.2.3 ü")
    assert await store.count_nodes(NodeFilter()) == 1
    old = NodeFilter(selectors=(Match.ANY, (Selector("tpm", "a"),)))
    assert await store.count_nodes(old) == 0
    with pytest.raises(NotFoundError):
        await store.get_node(TD.member("spire", "agent", "tpm", "N"))
    found = await store.get_nodes([node.agent_id, PARENT])
    assert found == {node.agent_id: replaced}


@pytest.mark.asyncio
async def test_banned_node_stays_banned_until_deleted(store: Datastore) -> None:
    node = await store.put_node(make_node())
    banned = await store.ban_node(node.agent_id)
    assert banned.banned
    with pytest.raises(DeniedError):
        await store.put_node(make_node(serial_number="2"))
    with pytest.raises(DeniedError) as caught:
        await store.set_node_serials(
            node.agent_id,
            serial_number="2",
            expires_at=START,
            new_serial_number="",
            new_expires_at=None,
        )
    assert caught.value.reason is DeniedReason.AGENT_BANNED
    assert (await store.get_node(node.agent_id)).banned
    assert await store.delete_node(node.agent_id) == banned
    assert not (await store.put_node(make_node(serial_number="2"))).banned


@pytest.mark.asyncio
async def test_renewal_is_refused_when_the_node_attested_anew(store: Datastore) -> None:
    node = await store.put_node(make_node())
    renewed = await store.set_node_serials(
        node.agent_id,
        serial_number="1",
        expires_at=node.expires_at,
        new_serial_number="2",
        new_expires_at=START + timedelta(hours=2),
        expected_serial_number="1",
    )
    assert (renewed.serial_number, renewed.new_serial_number) == ("1", "2")
    await store.put_node(make_node(serial_number="7"))
    with pytest.raises(DeniedError) as caught:
        await store.set_node_serials(
            node.agent_id,
            serial_number="2",
            expires_at=START,
            new_serial_number="",
            new_expires_at=None,
            expected_serial_number="1",
        )
    assert caught.value.reason is DeniedReason.AGENT_NOT_ACTIVE
    assert (await store.get_node(node.agent_id)).serial_number == "7"


@pytest.mark.asyncio
async def test_key_belongs_to_one_node(store: Datastore) -> None:
    first, second = make_node("first"), make_node("second")
    await store.put_node(first, {KeyRole.ATTESTATION: KEY_A, KeyRole.SVID: KEY_B})
    for role in KeyRole:
        for key in (KEY_A, KEY_B):
            for ask in (store.find_node, store.put_node):
                node: Any = second.agent_id if ask == store.find_node else second
                with pytest.raises(KeyInUseError) as caught:
                    await ask(node, {role: key})
                assert (caught.value.role, caught.value.owner) == (role, first.agent_id)
    assert await store.find_node(second.agent_id) is None
    assert await store.find_node(second.agent_id, {KeyRole.SVID: KEY_C}) is None
    kept = await store.find_node(first.agent_id, {KeyRole.ATTESTATION: KEY_A, KeyRole.SVID: KEY_B})
    assert kept == await store.get_node(first.agent_id)


@pytest.mark.asyncio
async def test_key_is_free_once_its_node_has_another_or_is_gone(store: Datastore) -> None:
    first, second = make_node("first"), make_node("second")
    await store.put_node(first, {KeyRole.ATTESTATION: KEY_A, KeyRole.SVID: KEY_B})
    await store.put_node(first, {KeyRole.ATTESTATION: KEY_A, KeyRole.SVID: KEY_C})
    await store.put_node(second, {KeyRole.SVID: KEY_B})
    await store.ban_node(first.agent_id)
    with pytest.raises(KeyInUseError):
        await store.put_node(second, {KeyRole.ATTESTATION: KEY_A})
    await store.delete_node(first.agent_id)
    await store.put_node(second, {KeyRole.ATTESTATION: KEY_A, KeyRole.SVID: KEY_C})


@pytest.mark.asyncio
async def test_a_node_is_found_by_its_attestation_key_alone(store: Datastore) -> None:
    first = make_node("first")
    assert await store.find_by_attestation_key(KEY_A) is None
    await store.put_node(first, {KeyRole.ATTESTATION: KEY_A, KeyRole.SVID: KEY_B})
    found = await store.find_by_attestation_key(KEY_A)
    assert found == await store.get_node(first.agent_id)
    assert await store.find_by_attestation_key(KEY_B) is None
    await store.delete_node(first.agent_id)
    assert await store.find_by_attestation_key(KEY_A) is None


@pytest.mark.asyncio
async def test_certificates_of_nodes_are_kept_replaced_and_listed(store: Datastore) -> None:
    first, second, none = make_node("first"), make_node("second"), make_node("none")
    chains = ((b"leaf", b"issuer" * 1000), (b"other",))
    await store.put_node(first, certificates=chains)
    await store.put_node(second, certificates=((b"x",),))
    await store.put_node(none)
    assert await store.get_certificates(first.agent_id) == chains
    assert await store.get_certificates(none.agent_id) == ()
    assert await store.get_certificates(make_node("stranger").agent_id) == ()
    page, token = await store.list_certificates(Page(1))
    assert [(c.agent_id, c.attestation_type) for c in page] == [
        (first.agent_id, first.attestation_type)
    ]
    assert page[0].certificates == chains
    rest, end = await store.list_certificates(Page(1, token))
    assert [c.agent_id for c in rest] == [second.agent_id]
    assert end == ""
    await store.put_node(first, certificates=((b"y", b""),))
    assert await store.get_certificates(first.agent_id) == ((b"y", b""),)
    with pytest.raises(InvalidInputError, match="certificates of a node"):
        await store.put_node(first, certificates=((bytes(129 << 10),),))
    assert await store.get_certificates(first.agent_id) == ((b"y", b""),)
    await store.put_node(second)
    await store.delete_node(first.agent_id)
    assert await store.list_certificates(Page()) == ([], "")


@pytest.mark.asyncio
async def test_certificates_that_were_spoilt_in_the_database(store: Datastore, raw: Engine) -> None:
    node, other = make_node("first"), make_node("second")
    await store.put_node(node, certificates=((b"leaf",),))
    table = metadata.tables["node_certificates"]
    for blob in (b"\0", b"\0\0\0\2\0\0\0\1x"):
        with raw.begin() as connection:
            connection.execute(update(table).values(certificates=blob))
        await store.put_node(other, certificates=((b"good",),))
        with pytest.raises(EncodingError, match="cannot be read"):
            await store.get_certificates(node.agent_id)
        page, _ = await store.list_certificates(Page())
        assert [(c.agent_id, c.certificates) for c in page] == [
            (node.agent_id, None),
            (other.agent_id, ((b"good",),)),
        ]


@pytest.mark.asyncio
async def test_renewed_key_is_the_nodes_beside_the_current_one(store: Datastore) -> None:
    node, other = make_node("n"), make_node("other")
    await store.put_node(node, {KeyRole.SVID: KEY_A})

    async def set_serials(serial: str, new_serial: str, new_key: bytes | None) -> None:
        await store.set_node_serials(
            node.agent_id,
            serial_number=serial,
            expires_at=node.expires_at,
            new_serial_number=new_serial,
            new_expires_at=node.expires_at if new_serial else None,
            new_key=new_key,
        )

    async def taken() -> str:
        found = ""
        for name, key in (("A", KEY_A), ("B", KEY_B), ("C", KEY_C)):
            try:
                await store.find_node(other.agent_id, {KeyRole.SVID: key})
            except KeyInUseError:
                found += name
        return found

    await set_serials("1", "2", KEY_B)
    assert await taken() == "AB"
    await set_serials("1", "3", KEY_C)
    assert await taken() == "AC"
    await set_serials("1", "4", KEY_A)
    assert await taken() == "A"
    await set_serials("4", "", None)
    assert await taken() == "A"
    await set_serials("4", "5", KEY_B)
    await set_serials("5", "", None)
    assert await taken() == "B"
    await store.put_node(other, {KeyRole.SVID: KEY_C})
    with pytest.raises(KeyInUseError):
        await set_serials("5", "6", KEY_C)
    assert (await store.get_node(node.agent_id)).new_serial_number == ""


@pytest.mark.asyncio
async def test_node_filters_and_pages(store: Datastore) -> None:
    await store.put_node(make_node("a"))
    await store.put_node(make_node("b", attestation_type="TPM"))
    await store.put_node(make_node("c", can_reattest=False, expires_at=START))
    await store.ban_node(make_node("a").agent_id)

    async def found(**where: Any) -> str:
        page = await store.list_nodes(NodeFilter(**where), Page())
        return "".join(n.agent_id.path[-1] for n in page.nodes)

    assert await found() == "abc"
    assert await found(attestation_type="tpm") == "ac"
    assert await found(attestation_type="tpm ") == ""
    assert await found(banned=True) == "a"
    assert await found(banned=False) == "bc"
    assert await found(can_reattest=False) == "c"
    assert await found(expires_before=START + timedelta(seconds=1)) == "c"
    first = await store.list_nodes(NodeFilter(), Page(2))
    rest = await store.list_nodes(NodeFilter(), Page(2, first.next_token))
    assert (len(first.nodes), len(rest.nodes), rest.next_token) == (2, 1, "")


@pytest.mark.asyncio
async def test_node_version_is_stored_and_bounded(store: Datastore) -> None:
    node = await store.put_node(make_node())
    await store.set_node_version(node.agent_id, "ß" * 255)
    assert (await store.get_node(node.agent_id)).agent_version == "ß" * 255
    with pytest.raises(InvalidInputError):
        await store.set_node_version(node.agent_id, "x" * 256)
    with pytest.raises(NotFoundError):
        await store.set_node_version(PARENT, "1")


# Join tokens


@pytest.mark.asyncio
async def test_join_token_works_once_and_exactly(store: Datastore) -> None:
    token = JoinToken("AbC", START + timedelta(minutes=10))
    await store.create_join_token(token)
    with pytest.raises(AlreadyExistsError):
        await store.create_join_token(token)
    for wrong in ("abc", "AbC ", "AbC\0", "", "x" * 100_000):
        with pytest.raises(NotFoundError):
            await store.take_join_token(wrong)
    assert await store.take_join_token("AbC") == token
    with pytest.raises(NotFoundError):
        await store.take_join_token("AbC")


@pytest.mark.asyncio
async def test_join_token_is_taken_by_one_of_many(opened: Any) -> None:
    stores = [await opened() for _ in range(2)]
    for i in range(5):
        await stores[0].create_join_token(JoinToken(f"t{i}", START))
        tries = [s.take_join_token(f"t{i}") for s in stores for _ in range(6)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(r, JoinToken) for r in results) == 1
        assert sum(isinstance(r, NotFoundError) for r in results) == 11


@pytest.mark.asyncio
async def test_join_token_alias_lives_as_long_as_its_node(store: Datastore) -> None:
    agent = TD.member("spire", "agent", "join_token", "t")
    alias = Entry("", TD.member("node"), agent, (Selector("spiffe_id", str(agent)),))
    await store.create_join_token(JoinToken("t", START + timedelta(hours=1)), alias)
    other = await store.create_entry(make_entry("workload", parent_id=agent))
    await store.take_join_token("t")
    await store.put_node(make_node(agent_id=agent, attestation_type="join_token"))
    assert await store.count_entries(EntryFilter()) == 2
    await store.delete_node(agent)
    assert (await store.list_entries(EntryFilter(), Page())).entries == [other]


@pytest.mark.asyncio
async def test_join_token_is_not_stored_without_its_alias(store: Datastore) -> None:
    agent = TD.member("spire", "agent", "join_token", "t")
    alias = Entry("", TD.member("node"), agent, (Selector("spiffe_id", str(agent)),))
    await store.create_entry(alias)
    with pytest.raises(SimilarEntryError):
        await store.create_join_token(JoinToken("t", START), alias)
    with pytest.raises(NotFoundError):
        await store.take_join_token("t")


@pytest.mark.asyncio
async def test_expired_tokens_go_with_their_aliases(store: Datastore) -> None:
    def alias(name: str) -> Entry:
        return make_entry(name, parent_id=TD.member("spire", "agent", "join_token", name))

    past, future = START - timedelta(seconds=1), START + timedelta(hours=1)
    await store.create_join_token(JoinToken("taken", past), alias("taken"))
    await store.create_join_token(JoinToken("left", past), alias("left"))
    await store.create_join_token(JoinToken("good", future), alias("good"))
    assert (await store.take_join_token("taken")).expires_at == past
    assert await store.prune_join_tokens(START) == 1
    assert names((await store.list_entries(EntryFilter(), Page())).entries) == ["good"]
    assert (await store.take_join_token("good")).expires_at == future
    assert await store.count_entries(EntryFilter()) == 1


# Bundles and federation


@pytest.mark.asyncio
async def test_bundle_comes_back_as_it_was_set(store: Datastore) -> None:
    bundle = Bundle(
        OTHER,
        (make_root(), replace(make_root(), tainted=True)),
        (JwtAuthority("k", SPKI, START), JwtAuthority("l", SPKI, None, tainted=True)),
        refresh_hint_s=300,
        sequence=7,
    )
    assert await store.set_bundle(bundle) == bundle
    assert await store.get_bundle(OTHER) == bundle
    with pytest.raises(AlreadyExistsError):
        await store.create_bundle(bundle)
    await store.create_bundle(Bundle(TD))
    assert await store.list_bundles() == [Bundle(TD), bundle]
    with pytest.raises(NotFoundError):
        await store.get_bundle(THIRD)


@pytest.mark.asyncio
async def test_bundle_sequence_grows_with_changes_only(store: Datastore, clock: SimClock) -> None:
    one, two = make_root(), make_root()
    first = await store.append_bundle(Bundle(TD, (one,)))
    assert first.sequence == int(START.timestamp())
    second = await store.append_bundle(Bundle(TD, (two,)))
    assert second == Bundle(TD, (one, two), sequence=first.sequence + 1)
    assert await store.append_bundle(Bundle(TD, (two,))) == second
    tainted = await store.update_bundle(TD, lambda b: b.with_tainted_x509(one.authority_id))
    assert tainted.sequence == second.sequence + 1
    assert tainted.x509_authorities[0].tainted
    await store.set_bundle(replace(tainted, sequence=3))
    await clock.advance(timedelta(hours=1))
    restored = await store.append_bundle(Bundle(TD, (), (JwtAuthority("k", SPKI),)))
    assert restored.sequence == int(clock.now().timestamp())


@pytest.mark.asyncio
async def test_failed_bundle_change_stores_nothing(store: Datastore) -> None:
    bundle = await store.append_bundle(Bundle(TD, (make_root(),), (JwtAuthority("k", SPKI),)))
    with pytest.raises(NotFoundError):
        await store.update_bundle(TD, lambda b: b.with_tainted_jwt("none"))
    with pytest.raises(InvalidInputError):
        await store.update_bundle(TD, lambda b: replace(b, trust_domain=OTHER))
    other = spki_der(ec.generate_private_key(ec.SECP256R1()).public_key())
    with pytest.raises(InvalidInputError):
        await store.append_bundle(Bundle(TD, (make_root(),), (JwtAuthority("k", other),)))
    with pytest.raises(NotFoundError):
        await store.update_bundle(THIRD, lambda b: b)
    assert await store.get_bundle(TD) == bundle


@pytest.mark.asyncio
async def test_bundle_appends_of_two_servers_are_not_lost(opened: Any) -> None:
    stores = [await opened() for _ in range(2)]
    roots = [make_root() for _ in range(12)]
    work = [stores[i % 2].append_bundle(Bundle(TD, (root,))) for i, root in enumerate(roots)]
    results = await asyncio.gather(*work)
    assert set((await stores[0].get_bundle(TD)).x509_authorities) == set(roots)
    assert len({b.sequence for b in results}) == len(roots)


@pytest.mark.asyncio
async def test_bundle_prune_never_empties_it(store: Datastore) -> None:
    old, new = make_root(-2), make_root(2)
    await store.set_bundle(Bundle(TD, (old, new), sequence=1))
    assert await store.prune_bundle(TD, START - timedelta(days=1))
    assert (await store.get_bundle(TD)).x509_authorities == (new,)
    assert not await store.prune_bundle(TD, START - timedelta(days=1))
    with pytest.raises(NotReadyError):
        await store.prune_bundle(TD, START + timedelta(days=30))


@pytest.mark.asyncio
async def test_bundle_deletion_in_three_modes(store: Datastore) -> None:
    for trust_domain in (OTHER, THIRD):
        await store.set_bundle(Bundle(trust_domain))
    entry = await store.create_entry(make_entry(federates_with=(OTHER, THIRD)))
    with pytest.raises(NotReadyError):
        await store.delete_bundle(OTHER)
    await store.delete_bundle(OTHER, BundleDeletion.DISSOCIATE)
    kept = await store.get_entry(entry.entry_id)
    assert kept == replace(entry, federates_with=(THIRD,), revision_number=1)
    await store.delete_bundle(THIRD, BundleDeletion.DELETE)
    assert await store.count_entries(EntryFilter()) == 0
    assert await store.list_bundles() == []
    with pytest.raises(NotFoundError):
        await store.delete_bundle(OTHER)


@pytest.mark.asyncio
async def test_federation_relationships(store: Datastore) -> None:
    web = Federation(OTHER, "https://other.test/bundle")
    spiffe = Federation(THIRD, "https://third.test:8443/b", SpiffeId("spiffe://third.test/s"))
    await store.create_federation(web)
    await store.create_federation(spiffe)
    with pytest.raises(AlreadyExistsError):
        await store.create_federation(web)
    assert await store.list_federations() == [web, spiffe]
    changed = replace(spiffe, trust_domain=OTHER)
    assert await store.update_federation(changed) == changed
    assert await store.get_federation(OTHER) == changed
    await store.delete_federation(OTHER)
    for work in (
        store.get_federation(OTHER),
        store.delete_federation(OTHER),
        store.update_federation(web),
    ):
        with pytest.raises(NotFoundError):
            await work


# Journals, endorsement keys


@pytest.mark.asyncio
async def test_journals_are_found_by_active_authority(store: Datastore) -> None:
    assert await store.find_journal(["aa"]) is None
    one = await store.save_journal(JournalRow(0, "aa", b"\0\xff" * 40_000))
    two = await store.save_journal(JournalRow(0, "bb", b""))
    assert await store.find_journal(["zz", "aa"]) == one
    moved = await store.save_journal(replace(one, active_x509_authority_id="cc", data=b"x"))
    assert await store.find_journal(["aa"]) is None
    assert await store.find_journal(["cc", ""]) == moved
    assert await store.save_journal(moved) == moved
    assert await store.list_journals() == [moved, two]
    await store.delete_journal(two.row_id)
    with pytest.raises(NotFoundError):
        await store.delete_journal(two.row_id)
    with pytest.raises(NotFoundError):
        await store.save_journal(two)
    assert await store.find_journal([]) is None


@pytest.mark.asyncio
async def test_endorsement_keys_are_enrolled_together(store: Datastore, clock: SimClock) -> None:
    first = [EnrolledEk(f"{n:064x}", f"rack {n}", owner="ops") for n in range(1100)]
    assert await store.enroll_eks(first, dry_run=True) == [EkChange.ADDED] * 1100
    assert await store.list_eks() == []
    assert await store.enroll_eks(first) == [EkChange.ADDED] * 1100
    await clock.advance(timedelta(minutes=1))
    assert await store.list_eks() == [replace(ek, created_at=START) for ek in first]
    again = [first[7], replace(first[8], owner="web ☃"), EnrolledEk("f" * 64)]
    expected = [EkChange.UNCHANGED, EkChange.UPDATED, EkChange.ADDED]
    assert await store.enroll_eks(again, dry_run=True) == expected
    assert await store.enroll_eks(again) == expected
    assert await store.enroll_eks(again) == [EkChange.UNCHANGED] * 3
    listed = {ek.ek_hash: ek for ek in await store.list_eks()}
    assert listed[first[8].ek_hash] == replace(first[8], owner="web ☃", created_at=START)
    assert listed["f" * 64].created_at == START + timedelta(minutes=1)
    assert await store.enroll_eks([]) == []
    new = EnrolledEk("e" * 64)
    for bad in (EnrolledEk("x"), replace(new, comment="c" * 1025), replace(new, owner="o" * 257)):
        with pytest.raises(InvalidInputError):
            await store.enroll_eks([EnrolledEk("d" * 64), bad])
    with pytest.raises(InvalidInputError, match="twice"):
        await store.enroll_eks([new, new])
    assert len(await store.list_eks()) == 1101


@pytest.mark.asyncio
async def test_endorsement_keys_are_enrolled_for_all_servers_at_once(opened: Any) -> None:
    here, there = await opened(), await opened()
    ek = EnrolledEk("a" * 64, "rack 1", owner="ops")
    await here.enroll_eks([ek])
    assert await there.is_ek_allowed(ek.ek_hash)
    assert await there.list_eks() == await here.list_eks() == [replace(ek, created_at=START)]
    await there.deny_ek(ek.ek_hash)
    assert not await here.is_ek_allowed(ek.ek_hash)
    # Two operators import the same table at the same time.
    table = [EnrolledEk(f"{n:064x}", "rack") for n in range(50)]
    changes = await asyncio.gather(*[store.enroll_eks(table) for store in (here, there)])
    assert sorted(change.value for change in [*changes[0], *changes[1]]) == (
        ["added"] * 50 + ["unchanged"] * 50
    )
    assert len(await here.list_eks()) == 50


@pytest.mark.asyncio
async def test_endorsement_keys_are_listed_by_hash(store: Datastore, clock: SimClock) -> None:
    hash_a, hash_b = "a" * 64, "b" * 64
    first = await store.allow_ek(EnrolledEk(hash_a, "rack 1 ☃", owner="ops"))
    assert first == EnrolledEk(hash_a, "rack 1 ☃", START, "ops")
    await clock.advance(timedelta(minutes=1))
    assert await store.allow_ek(EnrolledEk(hash_a, "rack 2")) == EnrolledEk(hash_a, "rack 2", START)
    await store.allow_ek(EnrolledEk(hash_b))
    assert [ek.comment for ek in await store.list_eks()] == ["rack 2", ""]
    assert await store.is_ek_allowed(hash_a)
    for wrong in (hash_a.upper(), hash_a[:-1], hash_a + "\n", "c" * 64, ""):
        assert not await store.is_ek_allowed(wrong)
    await store.deny_ek(hash_a)
    assert not await store.is_ek_allowed(hash_a)
    with pytest.raises(NotFoundError):
        await store.deny_ek(hash_a)
    with pytest.raises(InvalidInputError):
        await store.allow_ek(EnrolledEk(hash_a.upper()))


# Policies


def make_policy(version: int = 1, name: str = "web", **changes: Any) -> StoredPolicy:
    made = StoredPolicy(name, version, f"text {version} ☃", f"{version:064x}", "why", None, "ops")
    return replace(made, **changes)


def ended(policy: StoredPolicy) -> StoredPolicy:
    return replace(policy, version=policy.version + 1, text="", sha256="")


@pytest.mark.asyncio
async def test_newest_version_of_a_policy_is_in_force(store: Datastore, clock: SimClock) -> None:
    first = await store.add_policy(make_policy(), 0)
    assert first == make_policy(created_at=START)
    await clock.advance(timedelta(minutes=1))
    third = await store.add_policy(make_policy(3), 1)
    other = await store.add_policy(make_policy(name="db"), 0)
    assert await store.list_policies() == [other, third]
    assert await store.get_policy("web") == third
    assert await store.get_policy("web", 1) == first
    versions = await store.list_policy_versions("web")
    assert versions == [replace(first, text=""), replace(third, text="")]
    for version in (2, 4, -1, 2**31):
        with pytest.raises(NotFoundError):
            await store.get_policy("web", version)
    for name in ("WEB", "web ", "we", "", "☃"):
        with pytest.raises(NotFoundError):
            await store.get_policy(name)
        assert await store.list_policy_versions(name) == []


@pytest.mark.asyncio
async def test_versions_of_a_deleted_policy_are_not_given_again(store: Datastore) -> None:
    first = await store.add_policy(make_policy(), 0)
    end = await store.add_policy(ended(first), 1)
    assert end.deleted
    assert await store.list_policies() == []
    with pytest.raises(NotFoundError):
        await store.get_policy("web")
    assert await store.get_policy("web", 1) == first
    with pytest.raises(AlreadyExistsError):
        await store.add_policy(make_policy(), 0)
    again = await store.add_policy(make_policy(3), 2)
    assert await store.list_policies() == [again]
    assert [p.deleted for p in await store.list_policy_versions("web")] == [False, True, False]


@pytest.mark.asyncio
async def test_policies_are_followed_by_name(store: Datastore) -> None:
    start = await store.last_change()
    await store.add_policy(make_policy(), 0)
    changes = await store.list_changes(start, 10)
    assert [(c.kind, c.key) for c in changes] == [(ChangeKind.POLICY, "web")]


@pytest.mark.asyncio
async def test_one_of_many_makes_the_next_version_of_a_policy(opened: Any) -> None:
    stores = [await opened(), await opened()]
    for after in (0, 1):
        results = await asyncio.gather(
            *(
                stores[i % 2].add_policy(make_policy(after + 1, created_by=str(i)), after)
                for i in range(8)
            ),
            return_exceptions=True,
        )
        won = [r for r in results if isinstance(r, StoredPolicy)]
        assert len(won) == 1
        assert sum(isinstance(r, AlreadyExistsError) for r in results) == len(results) - 1
        assert await stores[0].get_policy("web") == won[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "ä"},
        {"name": "x" * 256},
        {"version": 0},
        {"version": 2**31},
        {"sha256": "A" * 64},
        {"sha256": ""},
        {"text": ""},
        {"text": "\ud800"},
        {"text": "x" * (8 * 1024 * 1024 + 1)},
        {"comment": "x" * 1025},
        {"created_by": "☃" * 342},
    ],
)
@pytest.mark.asyncio
async def test_policy_that_cannot_be_stored_is_refused(
    store: Datastore, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInputError):
        await store.add_policy(make_policy(**changes), 0)
    assert await store.list_policies() == []


@pytest.mark.asyncio
async def test_largest_policy_fits(store: Datastore) -> None:
    policy = make_policy(text="☃" * (1024 * 1024), comment="x" * 1024, created_by="y" * 1024)
    await store.add_policy(policy, 0)
    assert (await store.get_policy("web")).text == policy.text


# Changes


def make_posture(node: Node, state: str = "attested", *reasons: str, **changes: Any) -> Posture:
    posture = Posture(node.agent_id, state, reasons, "words", START, last_good_at=START)
    return replace(posture, memory="{}", evidence=b"evidence", **changes)


def make_record(**changes: Any) -> EvidenceRecord:
    return replace(EvidenceRecord(START, "attestation", "accept", "attested"), **changes)


@pytest.mark.asyncio
async def test_posture_is_stored_with_its_node(store: Datastore) -> None:
    node = make_node("n", "tpm:a")
    record = make_record(findings="[]", policy="web", policy_version=3, document=b"all of it")
    posture = make_posture(node, "drifted", "dbx_old", policy="web", policy_version=3)
    parts = [ImaPart(0, b"first"), ImaPart(5, b"second")]
    await store.put_node(node, {}, PostureUpdate(posture, record, parts[0]))
    assert await store.get_posture(node.agent_id) == replace(posture, records=1)
    assert await store.list_ima(node.agent_id) == parts[:1]
    page = await store.list_evidence(node.agent_id, Page())
    kept = replace(record, number=1, has_document=True)
    assert page.records == [replace(kept, document=None)]
    assert await store.get_evidence(node.agent_id, 1) == kept
    await store.put_node(node, {}, PostureUpdate(replace(posture, evidence=None), None, parts[1]))
    assert await store.get_posture(node.agent_id) == replace(posture, records=1)
    assert await store.list_ima(node.agent_id) == parts
    await store.put_node(node, {}, PostureUpdate(posture, None, ImaPart(0, b"anew")))
    assert await store.list_ima(node.agent_id) == [ImaPart(0, b"anew")]
    brief = replace(posture, records=1, evidence=None)
    assert await store.get_postures([node.agent_id, PARENT]) == {node.agent_id: brief}
    assert await store.list_postures(Page()) == ([brief], "")


@pytest.mark.asyncio
async def test_nothing_is_known_of_a_node_without_evidence_and_of_one_that_is_gone(
    store: Datastore,
) -> None:
    node = await store.put_node(make_node())
    assert await store.get_posture(node.agent_id) is None
    assert (await store.list_evidence(node.agent_id, Page())).records == []
    await store.set_posture(PostureUpdate(make_posture(node), make_record(), ImaPart(0, b"x")))
    await store.delete_node(node.agent_id)
    assert await store.get_posture(node.agent_id) is None
    assert await store.list_ima(node.agent_id) == []
    with pytest.raises(NotFoundError):
        await store.list_evidence(node.agent_id, Page())
    with pytest.raises(NotFoundError):
        await store.set_posture(PostureUpdate(make_posture(node)))
    await store.put_node(node)
    assert (await store.list_evidence(node.agent_id, Page())).records == []


@pytest.mark.asyncio
async def test_quarantine_is_in_the_node_and_evidence_lifts_it(store: Datastore) -> None:
    node = await store.put_node(make_node())
    held = await store.set_posture(
        PostureUpdate(make_posture(node, "quarantined", "pcr_mismatch", "uki"))
    )
    assert held.quarantine == "pcr_mismatch"
    assert held == await store.get_node(node.agent_id)
    with pytest.raises(QuarantinedError, match="pcr_mismatch"):
        await store.put_node(node)
    assert (await store.get_node(node.agent_id)).quarantine == "pcr_mismatch"
    freed = await store.put_node(node, {}, PostureUpdate(make_posture(node)))
    assert freed.quarantine == ""
    assert (await store.get_node(node.agent_id)).quarantine == ""


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", ["operator", "ek_revoked", "devid_revoked", "cloned_tpm"])
async def test_quarantines_that_end_by_an_operator_only(store: Datastore, reason: str) -> None:
    node = await store.put_node(make_node())
    hold = make_posture(node, "quarantined", reason)
    await store.set_posture(PostureUpdate(hold, by_operator=reason == "operator"))
    for posture in (make_posture(node), make_posture(node, "quarantined", "stale")):
        with pytest.raises(QuarantinedError, match=reason):
            await store.set_posture(PostureUpdate(posture))
        with pytest.raises(QuarantinedError, match=reason):
            await store.put_node(node, {}, PostureUpdate(posture))
    assert (await store.get_posture(node.agent_id)) == hold
    freed = await store.set_posture(PostureUpdate(make_posture(node), by_operator=True))
    assert freed.quarantine == ""


@pytest.mark.asyncio
async def test_ban_by_evidence_is_a_ban(store: Datastore) -> None:
    node = await store.put_node(make_node())
    hold = make_posture(node, "quarantined", "operator")
    await store.set_posture(PostureUpdate(hold, by_operator=True))
    banned = await store.set_posture(PostureUpdate(make_posture(node, "banned", "tpm_replaced")))
    assert banned.banned
    assert banned.quarantine == ""
    with pytest.raises(DeniedError):
        await store.put_node(node, {}, PostureUpdate(make_posture(node)))
    with pytest.raises(DeniedError):
        await store.set_posture(PostureUpdate(make_posture(node), by_operator=True))
    posture = await store.get_posture(node.agent_id)
    assert posture is not None
    assert (posture.state, posture.reasons) == ("banned", ("tpm_replaced",))


@pytest.mark.asyncio
async def test_history_of_a_node_is_bounded_and_read_backwards(store: Datastore) -> None:
    node = await store.put_node(make_node())
    other = await store.put_node(make_node("other"))
    for n in range(70):
        made = make_record(made_at=START + timedelta(seconds=n), summary=str(n), document=b"d")
        await store.set_posture(PostureUpdate(make_posture(node), made))
    await store.set_posture(PostureUpdate(make_posture(other), make_record()))
    found: list[str] = []
    token = ""
    while True:
        page = await store.list_evidence(node.agent_id, Page(size=30, token=token))
        found += [r.summary for r in page.records]
        token = page.next_token
        if not token:
            break
    assert found == [str(n) for n in range(69, 5, -1)]
    with pytest.raises(NotFoundError):
        await store.get_evidence(node.agent_id, 6)
    assert (await store.get_evidence(node.agent_id, 7)).document == b"d"
    assert await store.prune_evidence(START + timedelta(seconds=68)) == 63
    left = await store.list_evidence(node.agent_id, Page())
    assert [r.number for r in left.records] == [70, 69]
    assert (await store.list_evidence(other.agent_id, Page())).records == []
    posture = await store.get_posture(node.agent_id)
    assert posture is not None
    assert posture.records == 70


@pytest.mark.asyncio
async def test_sightings_are_stored_without_a_change(store: Datastore) -> None:
    nodes = [await store.put_node(make_node(name)) for name in ("a", "b", "c")]
    for node in nodes[:2]:
        await store.set_posture(PostureUpdate(make_posture(node), make_record()))
    before, later = await store.last_change(), START + timedelta(minutes=5)
    ids = [node.agent_id for node in nodes]
    await store.note_sightings(
        [
            Sighting(ids[0], 1, START, later, "new", ImaPart(3, b"more")),
            Sighting(ids[1], 0, START, later, "of another time"),
            Sighting(ids[1], 1, later, later, "of another life"),
            Sighting(ids[2], 0, START, later, "never seen"),
            Sighting(PARENT, 0, START, later, "no node"),
        ]
    )
    assert await store.last_change() == before
    a, b, c = [await store.get_posture(i) for i in ids]
    assert a is not None
    assert (a.last_good_at, a.last_seen_at, a.memory) == (later, later, "new")
    assert a.evidence == b"evidence"
    assert await store.list_ima(ids[0]) == [ImaPart(3, b"more")]
    assert b is not None
    assert (b.last_good_at, b.memory) == (START, "{}")
    assert c is None


@pytest.mark.asyncio
async def test_silent_nodes_are_found_oldest_first(store: Datastore) -> None:
    states = ("attested", "drifted", "stale", "quarantined", "attested", "attested")
    nodes = [await store.put_node(make_node(f"n{i}")) for i in range(len(states))]
    for n, (node, state) in enumerate(zip(nodes, states, strict=True)):
        good = START - timedelta(minutes=n) if n < 5 else None
        posture = make_posture(node, state, *["x"] * (state == "quarantined"))
        await store.set_posture(PostureUpdate(replace(posture, last_good_at=good)))
    found = await store.list_silent(START, 10)
    assert found == [nodes[4].agent_id, nodes[1].agent_id]
    assert await store.list_silent(START, 1) == [nodes[4].agent_id]
    everyone = await store.list_silent(START + timedelta(seconds=1), 10)
    assert everyone == [nodes[4].agent_id, nodes[1].agent_id, nodes[0].agent_id]


@pytest.mark.asyncio
async def test_posture_is_bounded(store: Datastore) -> None:
    node = await store.put_node(make_node())
    for wrong in (
        make_posture(node, "attested", *["r"] * 65),
        make_posture(node, "attested", "r" * 65),
        make_posture(node, message="m" * 1025),
        make_posture(node, "no such state at all"),
    ):
        with pytest.raises(InvalidInputError):
            await store.set_posture(PostureUpdate(wrong))
    assert await store.get_posture(node.agent_id) is None


@pytest.mark.asyncio
async def test_changes_are_written_with_what_they_tell(store: Datastore) -> None:
    entry = await store.create_entry(make_entry())
    with pytest.raises(SimilarEntryError):
        await store.create_entry(make_entry())
    await store.update_entry(replace(entry, hint="x"), None)
    node = await store.put_node(make_node())
    await store.set_node_version(node.agent_id, "1")
    await store.set_bundle(Bundle(OTHER))
    await store.set_bundle(Bundle(OTHER))
    await store.create_federation(Federation(OTHER, "https://x"))
    await store.delete_entry(entry.entry_id)
    expected = [
        (ChangeKind.ENTRY, entry.entry_id),
        (ChangeKind.ENTRY, entry.entry_id),
        (ChangeKind.NODE, str(node.agent_id)),
        (ChangeKind.BUNDLE, "other.test"),
        (ChangeKind.FEDERATION, "other.test"),
        (ChangeKind.ENTRY, entry.entry_id),
    ]
    changes = await store.list_changes(0, 100)
    assert changes == [Change(i, k, v) for i, (k, v) in enumerate(expected, 1)]
    assert await store.list_changes(4, 1) == changes[4:5]
    assert await store.last_change() == 6
    assert store.changed.value == 6


@pytest.mark.asyncio
async def test_pruned_changes_leave_the_count(store: Datastore, clock: SimClock) -> None:
    await store.create_entry(make_entry("a"))
    await clock.advance(timedelta(hours=1))
    await store.create_entry(make_entry("b"))
    assert await store.prune_changes(START + timedelta(minutes=1)) == 1
    assert [c.event_id for c in await store.list_changes(0, 10)] == [2]
    assert await store.prune_changes(START + timedelta(days=1)) == 1
    assert await store.last_change() == 2
    await store.create_entry(make_entry("c"))
    assert [c.event_id for c in await store.list_changes(0, 10)] == [3]


@pytest.mark.asyncio
async def test_changes_of_two_servers_have_no_gaps_and_no_late_comers(opened: Any) -> None:
    stores = [await opened() for _ in range(2)]
    reader = await opened()
    seen: list[int] = []
    done = threading.Event()

    async def follow() -> None:
        while not done.is_set() or len(seen) < await reader.last_change():
            changes = await reader.list_changes(seen[-1] if seen else 0, 7)
            seen.extend(c.event_id for c in changes)

    async def write() -> None:
        work = [stores[i % 2].create_entry(make_entry(f"e{i}")) for i in range(40)]
        failing = [stores[i % 2].create_entry(make_entry(f"e{i}")) for i in range(40)]
        await asyncio.gather(*work, *failing, return_exceptions=True)
        done.set()

    await asyncio.gather(follow(), write())
    assert seen == list(range(1, 41))


# Races


@pytest.mark.asyncio
async def test_one_of_many_similar_entries_wins_on_two_servers(opened: Any) -> None:
    stores = [await opened() for _ in range(2)]
    for i in range(4):
        tries = [
            s.create_entry(make_entry(f"e{i}", "a:1", "a:2", hint=str(n)))
            for s in stores
            for n in range(6)
        ]
        results = await asyncio.gather(*tries, return_exceptions=True)
        won = [r for r in results if isinstance(r, Entry)]
        lost = [r for r in results if isinstance(r, SimilarEntryError)]
        assert (len(won), len(lost)) == (1, 11)
        assert all(e.entry == won[0] for e in lost)


@pytest.mark.asyncio
async def test_racing_updates_count_every_revision(opened: Any) -> None:
    stores = [await opened() for _ in range(2)]
    entry = await stores[0].create_entry(make_entry())
    work = [
        stores[i % 2].update_entry(replace(entry, hint=str(i)), frozenset({"hint"}))
        for i in range(20)
    ]
    results = await asyncio.gather(*work)
    assert sorted(e.revision_number for e in results) == list(range(1, 21))


@pytest.mark.asyncio
async def test_attestation_and_ban_in_any_order_end_banned(opened: Any) -> None:
    stores = [await opened() for _ in range(2)]
    for i in range(5):
        node = await stores[0].put_node(make_node(f"n{i}"))
        work: list[Awaitable[Node]] = [stores[1].ban_node(node.agent_id)]
        work += [stores[n % 2].put_node(replace(node, serial_number=str(n + 2))) for n in range(4)]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert all(isinstance(r, (Node, DeniedError)) for r in results)
        assert (await stores[0].get_node(node.agent_id)).banned


@pytest.mark.asyncio
async def test_first_attestations_of_one_node_race_without_error(opened: Any) -> None:
    stores = [await opened() for _ in range(2)]
    node = make_node("n", "tpm:a", "tpm:b")
    work = [stores[i % 2].put_node(replace(node, serial_number=str(i + 1))) for i in range(10)]
    results = await asyncio.gather(*work)
    stored = await stores[0].get_node(node.agent_id)
    assert stored in results
    assert stored.selectors == node.selectors


@pytest.mark.asyncio
async def test_one_of_many_nodes_gets_a_key_on_two_servers(opened: Any) -> None:
    stores = [await opened(), await opened()]
    nodes = [make_node(f"n{i}") for i in range(8)]
    keys = [{KeyRole.ATTESTATION: KEY_A, KeyRole.SVID: KEY_B}, {KeyRole.ATTESTATION: KEY_B}]
    results = await asyncio.gather(
        *(stores[i % 2].put_node(node, keys[i // 2 % 2]) for i, node in enumerate(nodes)),
        return_exceptions=True,
    )
    won = [r for r in results if isinstance(r, Node)]
    assert len(won) == 1
    assert sum(isinstance(r, KeyInUseError) for r in results) == len(nodes) - 1
    assert await stores[0].count_nodes(NodeFilter()) == 1


@pytest.mark.asyncio
async def test_two_servers_opening_an_empty_database_migrate_it_once(
    raw: Engine, opened: Any
) -> None:
    metadata.drop_all(raw)
    with raw.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    stores = await asyncio.gather(*(opened() for _ in range(3)))
    await stores[0].create_entry(make_entry())
    assert await stores[1].count_entries(EntryFilter()) == 1


@pytest.mark.asyncio
async def test_newer_schema_is_refused(
    database: DatastoreConfig, raw: Engine, clock: SimClock, store: Any
) -> None:
    def set_revision(revision: str) -> None:
        with raw.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})

    with raw.begin() as connection:
        current = connection.scalar(text("SELECT version_num FROM alembic_version"))
    set_revision("9999")
    try:
        with pytest.raises(NotReadyError, match="newer"):
            await open_datastore(database, clock=clock, log=LOG)
    finally:
        set_revision(current)


@pytest.mark.asyncio
async def test_schema_of_the_first_release_is_migrated_with_its_nodes(
    raw: Engine, opened: Any
) -> None:
    node = make_node("old", "tpm:a", "tpm:b")
    first = r0001_first.metadata
    metadata.drop_all(raw)
    first.create_all(raw)
    with raw.begin() as connection:
        connection.execute(update(alembic_version).values(version_num="0001"))
        connection.execute(first.tables["counters"].insert().values(name="change", value=0))
        row = {
            "agent_id": node.agent_id.text,
            "attestation_type": "tpm",
            "serial_number": "1",
            "expires_at": int(node.expires_at.timestamp()),
            "new_serial_number": "",
            "can_reattest": True,
            "agent_version": "",
            "selectors": encode_selectors(node.selectors),
        }
        number = connection.execute(first.tables["nodes"].insert().values(row))
        for selector in node.selectors:
            connection.execute(
                first.tables["node_selectors"]
                .insert()
                .values(node_row=number.inserted_primary_key[0], digest=selector_digest(selector))
            )
    store = await opened()
    assert (await store.get_node(node.agent_id)).selectors == node.selectors
    found = await store.list_nodes(
        NodeFilter(selectors=(Match.SUPERSET, (Selector("tpm", "b"),))), Page()
    )
    assert [n.agent_id for n in found.nodes] == [node.agent_id]
    assert await store.list_certificates(Page()) == ([], "")
    large = (bytes(100 << 10),)  # more than a plain BLOB of MySQL takes
    await store.put_node(node, {KeyRole.SVID: KEY_A}, certificates=(large,))
    assert await store.get_certificates(node.agent_id) == (large,)
    with pytest.raises(KeyInUseError):
        await store.put_node(make_node("new"), {KeyRole.SVID: KEY_A})
    with raw.begin() as connection:
        connection.execute(delete(metadata.tables["nodes"]))
        for table in ("node_keys", "node_selectors", "node_certificates"):
            left = connection.scalar(select(func.count()).select_from(metadata.tables[table]))
            assert left == 0, table


@pytest.mark.asyncio
async def test_closed_store_says_so(opened: Any) -> None:
    store = await opened()
    await store.ping()
    await store.close()
    await store.close()
    with pytest.raises(SpireHwError) as caught:
        await store.ping()
    assert caught.value.kind is ErrorKind.UNAVAILABLE


# Hostile values


@pytest.mark.asyncio
async def test_page_tokens_of_others_are_refused(store: Datastore) -> None:
    await store.create_entry(make_entry())
    for token in ("x", "-1", "1.0", "\u0661", "9" * 20, "9223372036854775808", "1\n", " 1", "\0"):
        with pytest.raises(InvalidInputError):
            await store.list_entries(EntryFilter(), Page(1, token))
        with pytest.raises(InvalidInputError):
            await store.list_nodes(NodeFilter(), Page(0, token))
    with pytest.raises(InvalidInputError):
        await store.list_entries(EntryFilter(), Page(-1))
    last = await store.list_entries(EntryFilter(), Page(1, "9223372036854775807"))
    assert last.entries == []


@pytest.mark.asyncio
async def test_sets_to_match_with_are_bounded(store: Datastore) -> None:
    many = tuple(Selector("t", str(i)) for i in range(1001))
    for how in Match:
        for asked in ((), many):
            with pytest.raises(InvalidInputError):
                await store.list_entries(EntryFilter(selectors=(how, asked)), Page())
            with pytest.raises(InvalidInputError):
                await store.count_nodes(NodeFilter(selectors=(how, asked)))
        with pytest.raises(InvalidInputError):
            await store.count_entries(EntryFilter(federates_with=(how, ())))
        assert await store.count_entries(EntryFilter(selectors=(how, many[:1000]))) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"entry_id": "a b"},
        {"entry_id": "a\n"},
        {"entry_id": "ä"},
        {"entry_id": "x" * 256},
        {"selectors": ()},
        {"hint": "x" * 1025},
        {"hint": "\ud800"},
        {"x509_svid_ttl_s": -1},
        {"jwt_svid_ttl_s": 2**31},
    ],
)
@pytest.mark.asyncio
async def test_entry_that_cannot_be_stored_is_refused_alike(
    store: Datastore, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInputError):
        await store.create_entry(make_entry(**changes))
    assert await store.count_entries(EntryFilter()) == 0


@pytest.mark.asyncio
async def test_largest_values_fit(store: Datastore) -> None:
    longest = SpiffeId("spiffe://example.org/" + "a" * (2048 - 21))
    entry = make_entry(
        entry_id="i" * 255,
        spiffe_id=longest,
        parent_id=longest,
        selectors=tuple(Selector("t" * 255, f"{i:04}" + "☃" * 681) for i in range(300)),
        hint="☃" * 1024,
        dns_names=tuple(f"h{i}.example.org" for i in range(1000)),
    )
    stored = await store.create_entry(entry)
    assert stored.selectors == entry.selectors
    assert await store.get_entry(entry.entry_id) == stored
    node = make_node(
        agent_id=longest,
        attestation_type="☃" * 85,
        selectors=entry.selectors,
        serial_number="9" * 49,
    )
    assert await store.put_node(node) == await store.get_node(longest)
    with pytest.raises(InvalidInputError):
        await store.put_node(make_node(attestation_type="x" * 256))
    with pytest.raises(InvalidInputError):
        await store.save_journal(JournalRow(0, "x" * 300, b""))


@pytest.mark.parametrize("odd", ["'; DROP TABLE entries; --", "%", "_", "\\", "a\x00b", "\u202e"])
@pytest.mark.asyncio
async def test_text_is_never_read_as_a_statement_or_pattern(store: Datastore, odd: str) -> None:
    await store.create_entry(make_entry("plain", hint="plain"))
    await store.create_entry(make_entry("odd", hint=odd))
    found = await store.list_entries(EntryFilter(hint=odd), Page())
    assert names(found.entries) == ["odd"]
    await store.create_join_token(JoinToken(odd, START))
    assert (await store.take_join_token(odd)).value == odd

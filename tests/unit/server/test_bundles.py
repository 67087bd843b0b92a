from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.errors import InvalidInputError, NotFoundError, NotReadyError
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.bundles import Bundles
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore

TD = TrustDomain("example.org")
OTHER = TrustDomain("other.test")
LOG = structlog.get_logger()


def make_root(clock: SimClock) -> X509Root:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(clock.now() - timedelta(hours=1))
        .not_valid_after(clock.now() + timedelta(hours=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return X509Root(certificate.public_bytes(Encoding.DER))


@pytest.fixture
def clock() -> SimClock:
    return SimClock()


@pytest_asyncio.fixture
async def stores(tmp_path: Path, clock: SimClock) -> AsyncIterator[list[Datastore]]:
    """Two servers over one database."""
    config = DatastoreConfig("sqlite3", str(tmp_path / "d"))
    stores = [await open_datastore(config, clock=clock, log=LOG) for _ in range(2)]
    yield stores
    for store in stores:
        await store.close()


@pytest_asyncio.fixture
async def bundles(stores: list[Datastore], clock: SimClock) -> AsyncIterator[Bundles]:
    bundles = Bundles(stores[0], trust_domain=TD, clock=clock, log=LOG)
    await bundles.start()
    yield bundles
    await bundles.close()


@pytest.mark.asyncio
async def test_own_bundle_is_empty_until_something_is_appended(
    bundles: Bundles, clock: SimClock
) -> None:
    assert bundles.own == Bundle(TD)
    assert dict(bundles.all) == {}
    with pytest.raises(NotFoundError):
        await bundles.change(lambda b: b)
    assert not await bundles.prune(clock.now())
    root = make_root(clock)
    appended = await bundles.append(Bundle(TD, (root,)))
    assert bundles.own is appended
    assert appended.x509_authorities == (root,)
    assert bundles.all[TD] == appended
    assert bundles.watch.version == 1


@pytest.mark.asyncio
async def test_foreign_authorities_never_enter_the_own_bundle(
    bundles: Bundles, stores: list[Datastore], clock: SimClock
) -> None:
    with pytest.raises(InvalidInputError):
        await bundles.append(Bundle(OTHER, (make_root(clock),)))
    assert await stores[0].list_bundles() == []


@pytest.mark.asyncio
async def test_bundles_of_another_server_arrive_by_polling(
    bundles: Bundles, stores: list[Datastore], clock: SimClock
) -> None:
    root = make_root(clock)
    await stores[1].append_bundle(Bundle(TD, (root,)))
    await stores[1].set_bundle(Bundle(OTHER, sequence=4))
    assert await bundles.get(OTHER) == Bundle(OTHER, sequence=4)
    seen = bundles.watch.version
    await clock.advance(timedelta(seconds=5))
    await bundles.watch.wait(seen)
    assert bundles.own.x509_authorities == (root,)
    assert set(bundles.all) == {TD, OTHER}
    await stores[1].delete_bundle(OTHER)
    await bundles.refresh()
    assert set(bundles.all) == {TD}
    with pytest.raises(NotFoundError):
        await bundles.get(OTHER)


@pytest.mark.asyncio
async def test_taint_is_one_transaction_and_seen_at_once(bundles: Bundles, clock: SimClock) -> None:
    root = make_root(clock)
    before = await bundles.append(Bundle(TD, (root,)))
    after = await bundles.change(lambda b: b.with_tainted_x509(root.authority_id))
    assert after.x509_authorities == (replace(root, tainted=True),)
    assert after.sequence > before.sequence
    assert bundles.own is after
    with pytest.raises(InvalidInputError):
        await bundles.change(lambda b: b.with_tainted_x509(root.authority_id))
    assert bundles.own is after


@pytest.mark.asyncio
async def test_prune_drops_expired_authorities(bundles: Bundles, clock: SimClock) -> None:
    old = make_root(clock)
    await bundles.append(Bundle(TD, (old,)))
    await clock.advance(timedelta(hours=2))
    with pytest.raises(NotReadyError):
        await bundles.prune(clock.now())
    new = make_root(clock)
    await bundles.append(Bundle(TD, (new,)))
    assert await bundles.prune(clock.now())
    assert bundles.own.x509_authorities == (new,)
    assert not await bundles.prune(clock.now())


@pytest.mark.asyncio
async def test_watch_is_quiet_about_other_trust_domains(
    bundles: Bundles, stores: list[Datastore]
) -> None:
    await stores[0].set_bundle(Bundle(OTHER))
    await bundles.refresh()
    assert bundles.watch.version == 0
    assert bundles.all_watch.version == 1

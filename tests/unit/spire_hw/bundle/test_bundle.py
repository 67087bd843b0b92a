from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import InvalidInputError, NotFoundError, NotReadyError
from spire_hw.spiffeid import TrustDomain

if TYPE_CHECKING:
    from tests.unit.spire_hw.bundle.conftest import Material

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
DOMAIN = TrustDomain("example.org")
HOUR = timedelta(hours=1)


def test_merging_keeps_order_and_drops_what_is_known(material: Material) -> None:
    a, b, j, k = material.root(), material.root(), material.key("j"), material.key("k")
    one = Bundle(DOMAIN, (a,), (j,), refresh_hint_s=60, sequence=7)
    two = Bundle(DOMAIN, (b, a), (k, j), refresh_hint_s=5, sequence=9)
    merged = one.merged(two)
    assert merged == Bundle(DOMAIN, (a, b), (j, k), refresh_hint_s=60, sequence=7)
    assert merged.merged(two) is merged


def test_a_taint_on_either_side_stays(material: Material) -> None:
    root, key = material.root(), material.key("k")
    clean = Bundle(DOMAIN, (root,), (key,))
    tainted = Bundle(DOMAIN, (replace(root, tainted=True),), (replace(key, tainted=True),))
    assert clean.merged(tainted) == tainted
    assert tainted.merged(clean) is tainted


def test_bundles_of_different_trust_domains_do_not_merge() -> None:
    with pytest.raises(InvalidInputError):
        Bundle(DOMAIN).merged(Bundle(TrustDomain("example.com")))


def test_a_key_id_never_changes_its_key(material: Material) -> None:
    with pytest.raises(InvalidInputError):
        Bundle(DOMAIN, (), (material.key("k"),)).merged(Bundle(DOMAIN, (), (material.key("k"),)))


def test_pruning_drops_what_has_expired(material: Material) -> None:
    old, new = material.root(ends_in=-HOUR), material.root(ends_in=HOUR)
    gone, kept, endless = (
        material.key("a", ends_in=-HOUR),
        material.key("b", ends_in=HOUR),
        material.key("c"),
    )
    bundle = Bundle(DOMAIN, (old, new), (gone, kept, endless), sequence=3)
    assert bundle.pruned(NOW) == Bundle(DOMAIN, (new,), (kept, endless), sequence=3)
    assert bundle.pruned(NOW - 2 * HOUR) is bundle


def test_pruning_never_empties_a_bundle(material: Material) -> None:
    old, gone = material.root(ends_in=-HOUR), material.key("a", ends_in=-HOUR)
    with pytest.raises(NotReadyError):
        Bundle(DOMAIN, (old,)).pruned(NOW)
    with pytest.raises(NotReadyError):
        Bundle(DOMAIN, (material.root(),), (gone,)).pruned(NOW)
    Bundle(DOMAIN, (material.root(),)).pruned(NOW)


def test_an_x509_authority_is_tainted_before_it_is_revoked(material: Material) -> None:
    a, b = material.root(), material.root()
    bundle = Bundle(DOMAIN, (a, b))
    with pytest.raises(InvalidInputError):
        bundle.without_x509(a.authority_id)
    tainted = bundle.with_tainted_x509(a.authority_id)
    assert [root.tainted for root in tainted.x509_authorities] == [True, False]
    with pytest.raises(InvalidInputError):
        tainted.with_tainted_x509(a.authority_id)
    assert tainted.without_x509(a.authority_id).x509_authorities == (b,)
    for missing in (bundle.with_tainted_x509, bundle.without_x509):
        with pytest.raises(NotFoundError):
            missing("00")


def test_a_jwt_authority_is_tainted_before_it_is_revoked(material: Material) -> None:
    j, k = material.key("j"), material.key("k")
    bundle = Bundle(DOMAIN, (), (j, k))
    with pytest.raises(InvalidInputError):
        bundle.without_jwt("j")
    tainted = bundle.with_tainted_jwt("j")
    assert tainted.jwt_key("j") == replace(j, tainted=True)
    with pytest.raises(InvalidInputError):
        tainted.with_tainted_jwt("j")
    assert tainted.without_jwt("j").jwt_authorities == (k,)
    for missing in (bundle.with_tainted_jwt, bundle.without_jwt):
        with pytest.raises(NotFoundError):
            missing("x")


def test_keys_and_roots_are_parsed_once(material: Material) -> None:
    root, key = material.root(), material.key("k")
    bundle = Bundle(DOMAIN, (root,), (key,))
    assert bundle.root_certificates() == [root.certificate]
    assert bundle.root_certificates()[0] is bundle.root_certificates()[0]
    assert bundle.jwt_key("k") is key
    assert bundle.jwt_key("l") is None
    assert key.public_key is key.public_key
    assert root.expires_at == NOW + HOUR


def test_one_unusable_authority_does_not_disable_the_others(material: Material) -> None:
    root = material.root()
    bundle = Bundle(DOMAIN, (X509Root(b"junk"), root), (JwtAuthority("k", b"junk"),))
    assert bundle.root_certificates() == [root.certificate]
    with pytest.raises(InvalidInputError):
        _ = bundle.jwt_authorities[0].public_key

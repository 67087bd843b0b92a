from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.name import CA_SUBJECT
from spire_hw_server.ca.profile import Profile, capped, downstream_subject

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def test_a_wish_of_nothing_is_the_default() -> None:
    profile = Profile(TrustDomain("example.org"))
    assert profile.x509_ttl(0) == HOUR
    assert profile.jwt_ttl(0) == timedelta(minutes=5)
    assert profile.x509_ttl(30) == timedelta(seconds=30)
    with pytest.raises(InvalidInputError):
        profile.jwt_ttl(-1)


def test_nothing_ends_after_its_authority() -> None:
    assert capped(NOW, HOUR, NOW + 2 * HOUR) == NOW + HOUR
    assert capped(NOW, 3 * HOUR, NOW + 2 * HOUR) == NOW + 2 * HOUR
    assert capped(NOW, timedelta(days=10**8), NOW + 2 * HOUR) == NOW + 2 * HOUR
    with pytest.raises(NotReadyError):
        capped(NOW, HOUR, NOW)


def test_the_subject_of_a_ca_below_tells_its_depth() -> None:
    subject = downstream_subject(CA_SUBJECT, 2)
    assert "DOWNSTREAM-2" in subject.decode("latin-1")

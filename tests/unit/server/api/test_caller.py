from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from spire_hw.errors import DeniedError, DeniedReason
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId
from spire_hw_server.api.caller import (
    Caller,
    Certificate,
    Lookups,
    check_agent,
    classify,
)
from spire_hw_server.api.policy import CallerClass
from spire_hw_server.datastore.records import Entry, Node

NOW = datetime(2026, 1, 1, tzinfo=UTC)
AGENT_ID = SpiffeId("spiffe://example.org/spire/agent/x/1")
WORKLOAD_ID = SpiffeId("spiffe://example.org/tool")
METHOD = "/service/Method"


def certificate(
    spiffe_id: SpiffeId = AGENT_ID, serial: str = "7", life: timedelta = timedelta(hours=1)
) -> Certificate:
    return Certificate(spiffe_id, serial, NOW + life)


def node(serial: str = "7", new_serial: str = "") -> Node:
    return Node(AGENT_ID, "x", serial, NOW + timedelta(hours=1), new_serial_number=new_serial)


def entry(*, admin: bool = False, downstream: bool = False) -> Entry:
    return Entry(
        "e", WORKLOAD_ID, AGENT_ID, (Selector("a", "b"),), admin=admin, downstream=downstream
    )


def classified(
    *allowed: CallerClass,
    local: bool = False,
    shown: Certificate | None = None,
    admins: frozenset[SpiffeId] = frozenset(),
    entries: tuple[Entry, ...] = (),
    stored: Node | None = None,
) -> Caller:
    lookups = Lookups(admins, lambda _: entries, lambda _: stored)
    return classify(
        METHOD, frozenset(allowed), local=local, certificate=shown, lookups=lookups, now=NOW
    )


def test_anybody_may_call_what_is_open() -> None:
    assert classified(CallerClass.ANY).authorized_as is CallerClass.ANY
    assert classified(CallerClass.ANY, shown=certificate()).spiffe_id == AGENT_ID


def test_the_socket_is_local_and_nothing_else() -> None:
    assert classified(CallerClass.LOCAL, local=True).authorized_via == "transport"
    with pytest.raises(DeniedError, match=METHOD) as caught:
        classified(CallerClass.AGENT, local=True, shown=certificate(), stored=node())
    assert caught.value.reason is None


def test_an_admin_by_configuration_comes_before_one_by_entry() -> None:
    caller = classified(
        CallerClass.ADMIN,
        shown=certificate(WORKLOAD_ID),
        admins=frozenset({WORKLOAD_ID}),
        entries=(entry(admin=True),),
    )
    assert (caller.authorized_as, caller.authorized_via) == (CallerClass.ADMIN, "config")


def test_entries_make_admins_and_downstream_servers() -> None:
    both = (entry(admin=True), entry(downstream=True))
    admin = classified(CallerClass.ADMIN, shown=certificate(WORKLOAD_ID), entries=both)
    assert (admin.authorized_as, admin.entries) == (CallerClass.ADMIN, both[:1])
    server = classified(CallerClass.DOWNSTREAM, shown=certificate(WORKLOAD_ID), entries=both)
    assert (server.authorized_as, server.entries) == (CallerClass.DOWNSTREAM, both[1:])
    with pytest.raises(DeniedError):
        classified(
            CallerClass.ADMIN, CallerClass.DOWNSTREAM, shown=certificate(), entries=(entry(),)
        )


def test_an_agent_with_its_current_certificate_is_let_in() -> None:
    caller = classified(CallerClass.AGENT, shown=certificate(), stored=node())
    assert caller.authorized_as is CallerClass.AGENT
    assert caller.node == node()
    assert not caller.promote


def test_a_renewed_certificate_is_to_be_promoted() -> None:
    caller = classified(CallerClass.AGENT, shown=certificate(serial="8"), stored=node("7", "8"))
    assert caller.promote


@pytest.mark.parametrize(
    ("shown", "stored", "reason"),
    [
        (certificate(life=timedelta()), node(), DeniedReason.AGENT_EXPIRED),
        (certificate(), None, DeniedReason.AGENT_NOT_ATTESTED),
        (certificate(serial="9"), node("7", "8"), DeniedReason.AGENT_NOT_ACTIVE),
        (certificate(), node("", ""), DeniedReason.AGENT_BANNED),
    ],
)
def test_refused_agents_hear_why(
    shown: Certificate, stored: Node | None, reason: DeniedReason
) -> None:
    with pytest.raises(DeniedError, match=f"authorization denied for method {METHOD}") as caught:
        classified(CallerClass.AGENT, shown=shown, stored=stored)
    assert caught.value.reason is reason
    assert check_agent(shown, stored, NOW).reason is reason


@pytest.mark.parametrize("allowed", [CallerClass.ADMIN, CallerClass.DOWNSTREAM, CallerClass.LOCAL])
def test_without_a_valid_certificate_there_are_no_rights(allowed: CallerClass) -> None:
    for shown in (None, certificate(WORKLOAD_ID, life=-timedelta(seconds=1))):
        with pytest.raises(DeniedError) as caught:
            classified(
                allowed,
                shown=shown,
                admins=frozenset({WORKLOAD_ID}),
                entries=(entry(admin=True, downstream=True),),
            )
        assert caught.value.reason is None


def test_an_agent_is_no_operator() -> None:
    with pytest.raises(DeniedError) as caught:
        classified(CallerClass.LOCAL, CallerClass.ADMIN, shown=certificate(), stored=node())
    assert caught.value.reason is None


def test_nobody_may_call_what_has_no_row() -> None:
    with pytest.raises(DeniedError):
        classified(local=True)
    with pytest.raises(DeniedError):
        classified(shown=certificate(), stored=node())

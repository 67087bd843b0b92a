from __future__ import annotations

import re

import pytest

from spire_hw._pb import (
    hw_admin_pb2,
    hw_ca_pb2,
    hw_devid_pb2,
    hw_keys_pb2,
    hw_policy_pb2,
    hw_posture_pb2,
    server_agent_pb2,
    server_bundle_pb2,
    server_debug_pb2,
    server_entry_pb2,
    server_localauthority_pb2,
    server_logger_pb2,
    server_svid_pb2,
    server_trustdomain_pb2,
)
from spire_hw.rpc.health import health_methods
from spire_hw_server.api.policy import (
    LOCAL_SERVICES,
    POLICY,
    CallerClass,
    allowed_classes,
    service_of,
)

MODULES = [
    hw_admin_pb2,
    hw_ca_pb2,
    hw_devid_pb2,
    hw_keys_pb2,
    hw_policy_pb2,
    hw_posture_pb2,
    server_agent_pb2,
    server_bundle_pb2,
    server_debug_pb2,
    server_entry_pb2,
    server_localauthority_pb2,
    server_logger_pb2,
    server_svid_pb2,
    server_trustdomain_pb2,
]


async def _healthy() -> bool:
    return True


def all_methods() -> set[str]:
    described = {
        f"/{service.full_name}/{method.name}"
        for module in MODULES
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    return described | {m.path for m in health_methods(_healthy)}


def test_every_method_of_every_service_has_a_row_and_every_row_a_method() -> None:
    assert set(POLICY) == all_methods()


def test_every_row_lets_somebody_in() -> None:
    assert all(POLICY.values())


def test_a_method_without_a_row_is_nobodys() -> None:
    assert allowed_classes("/spire.api.server.svid.v1.SVID/Steal") == frozenset()


def test_only_attestation_and_the_bundle_are_open_to_anybody() -> None:
    open_to_all = {m for m, allowed in POLICY.items() if CallerClass.ANY in allowed}
    assert open_to_all == {
        "/spire.api.server.agent.v1.Agent/AttestAgent",
        "/spire.api.server.bundle.v1.Bundle/GetBundle",
    }


@pytest.mark.parametrize(
    ("wanted", "methods"),
    [
        (
            CallerClass.AGENT,
            (
                "BatchNewX509SVID NewJWTSVID BatchNewWITSVID GetFederatedBundle "
                "GetAuthorizedEntries SyncAuthorizedEntries RenewAgent PostStatus Heartbeat"
            ),
        ),
        (CallerClass.DOWNSTREAM, "NewDownstreamX509CA PublishJWTAuthority PublishWITAuthority"),
    ],
)
def test_agents_and_downstream_servers_have_their_few_methods(
    wanted: CallerClass, methods: str
) -> None:
    found = {m.rpartition("/")[2] for m, allowed in POLICY.items() if wanted in allowed}
    assert found == set(methods.split())


def test_local_services_are_for_the_socket_alone() -> None:
    for method, allowed in POLICY.items():
        if service_of(method) in LOCAL_SERVICES:
            assert allowed == {CallerClass.LOCAL}, method
        assert re.fullmatch(r"/[A-Za-z0-9_.]+/[A-Za-z0-9]+", method)

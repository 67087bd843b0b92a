"""Names of calls are upstream's."""

from __future__ import annotations

import pytest

from spire_hw.rpc.measure import metric_name


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("/spire.api.server.agent.v1.Agent/AttestAgent", "agent.v1.agent.attest_agent"),
        ("/spire.api.server.svid.v1.SVID/MintX509SVID", "svid.v1.svid.mint_x509svid"),
        (
            "/spire.api.server.localauthority.v1.LocalAuthority/GetX509AuthorityState",
            "localauthority.v1.local_authority.get_x509_authority_state",
        ),
        ("/spire.api.server.logger.v1.Logger/SetLogLevel", "logger.set_log_level"),
        ("/SpiffeWorkloadAPI/FetchX509SVID", "workload_api.fetch_x509svid"),
        ("/SpiffeWorkloadAPI/FetchJWTBundles", "workload_api.fetch_jwt_bundles"),
        (
            "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets",
            "sds.v3.stream_secrets",
        ),
        ("/grpc.health.v1.Health/Check", "health.check"),
        (
            "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs",
            "delegated_identity.subscribe_to_x509_svids",
        ),
        ("/x.Y/ABCDef", "x.y.abc_def"),
        ("/x.Y/OneTWOThree", "x.y.one_two_three"),
        ("/x.Y/one,two,three,Four", "x.y.one_two_three_four"),
    ],
)
def test_a_method_has_upstreams_metric_name(method: str, words: str) -> None:
    assert metric_name(method) == ("rpc", *words.split("."))

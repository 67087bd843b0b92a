"""What operators do besides entries and agents: bundles, authorities, TPMs, log, state, health."""

from __future__ import annotations

import json
from datetime import timedelta
from io import StringIO
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw import log as logs
from spire_hw._pb import (
    hw_admin_pb2,
    server_bundle_pb2,
    server_debug_pb2,
    server_localauthority_pb2,
    server_logger_pb2,
    types_pb2,
)
from spire_hw.config import hcl
from spire_hw.errors import (
    AlreadyExistsError,
    DeniedError,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.key import KeyType, generate_private_key, spki_der
from spire_hw.rpc import convert
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_sim.pki import Authority
from spire_hw_sim.servers import (
    BUNDLE,
    LOCAL_AUTHORITY,
    TIMEOUT_S,
    Operator,
    ScriptedAgent,
    entry_message,
    joined_agent,
    server_config,
    server_settings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio

TPM = "/spire_hw.server.v1.Tpm/"
DEBUG = "/spire.api.server.debug.v1.Debug/"
LOGGER = "/spire.api.server.logger.v1.Logger/"
HEALTH = "/grpc.health.v1.Health/"


async def ask(operator: Operator, path: str, request: Any, answer: Any) -> Any:
    return await operator.channel.unary(path, request, answer, timeout_s=TIMEOUT_S)


async def bundle_call(operator: Operator, name: str, request: Any) -> Any:
    answer = getattr(server_bundle_pb2, name + "Response")
    return await ask(operator, BUNDLE + name, request, answer)


# --- bundles


async def test_a_bundle_mask_leaves_fields_out(operator: Operator) -> None:
    request = server_bundle_pb2.GetBundleRequest(
        output_mask=types_pb2.BundleMask(sequence_number=True)
    )
    cut = await ask(operator, BUNDLE + "GetBundle", request, types_pb2.Bundle)
    assert cut.trust_domain == "example.org"
    assert cut.sequence_number
    assert not cut.x509_authorities
    assert not cut.jwt_authorities


async def test_authorities_can_be_appended(operator: Operator) -> None:
    other = Authority("example.org")
    key = generate_private_key(KeyType.EC_P256)
    before = await operator.bundle()
    request = server_bundle_pb2.AppendBundleRequest(
        x509_authorities=[types_pb2.X509Certificate(asn1=other.der)],
        jwt_authorities=[types_pb2.JWTKey(public_key=spki_der(key.public_key()), key_id="k")],
    )
    after = convert.bundle_from_pb(
        await ask(operator, BUNDLE + "AppendBundle", request, types_pb2.Bundle)
    )
    assert [r.der for r in after.x509_authorities][-1] == other.der
    assert after.jwt_key("k") is not None
    assert after.sequence > before.sequence
    assert await operator.bundle() == after


@pytest.mark.parametrize(
    "request_",
    [
        server_bundle_pb2.AppendBundleRequest(),
        server_bundle_pb2.AppendBundleRequest(x509_authorities=[{"asn1": b"junk"}]),
        server_bundle_pb2.AppendBundleRequest(jwt_authorities=[{"key_id": "k"}]),
        server_bundle_pb2.AppendBundleRequest(jwt_authorities=[{"public_key": b"x"}]),
    ],
)
async def test_bad_authorities_are_not_appended(
    operator: Operator, request_: server_bundle_pb2.AppendBundleRequest
) -> None:
    before = await operator.bundle()
    with pytest.raises(InvalidInputError):
        await ask(operator, BUNDLE + "AppendBundle", request_, types_pb2.Bundle)
    assert await operator.bundle() == before


def foreign(name: str, **fields: Any) -> types_pb2.Bundle:
    return types_pb2.Bundle(
        trust_domain=name,
        x509_authorities=[types_pb2.X509Certificate(asn1=Authority(name).der)],
        **fields,
    )


async def test_foreign_bundles_from_creation_to_deletion(
    operator: Operator, agent: ScriptedAgent
) -> None:
    one, two = foreign("one.test", refresh_hint=60), foreign("two.test")
    own = foreign("example.org")
    create = server_bundle_pb2.BatchCreateFederatedBundleRequest(
        bundle=[one, one, own, types_pb2.Bundle(trust_domain="BAD"), two]
    )
    made = await bundle_call(operator, "BatchCreateFederatedBundle", create)
    assert [r.status.code for r in made.results] == [0, 6, 3, 3, 0]
    assert made.results[0].bundle.trust_domain == "one.test"
    count = await bundle_call(operator, "CountBundles", server_bundle_pb2.CountBundlesRequest())
    assert count.count == 3

    listing = server_bundle_pb2.ListFederatedBundlesRequest(page_size=1)
    first = await bundle_call(operator, "ListFederatedBundles", listing)
    assert [b.trust_domain for b in first.bundles] == ["one.test"]
    listing.page_token = first.next_page_token
    second = await bundle_call(operator, "ListFederatedBundles", listing)
    assert [b.trust_domain for b in second.bundles] == ["two.test"]
    assert second.next_page_token == ""
    listing.page_size = -1
    with pytest.raises(InvalidInputError):
        await bundle_call(operator, "ListFederatedBundles", listing)

    get = server_bundle_pb2.GetFederatedBundleRequest(trust_domain="one.test")
    assert (await agent.call(BUNDLE + "GetFederatedBundle", get, types_pb2.Bundle)) == one
    for name, error in (
        ("example.org", InvalidInputError),
        ("nobody.test", NotFoundError),
        ("spiffe://nobody.test", NotFoundError),
        ("not a name", InvalidInputError),
    ):
        with pytest.raises(error):
            await ask(
                operator,
                BUNDLE + "GetFederatedBundle",
                server_bundle_pb2.GetFederatedBundleRequest(trust_domain=name),
                types_pb2.Bundle,
            )

    changed = foreign("one.test", refresh_hint=90)
    update = server_bundle_pb2.BatchUpdateFederatedBundleRequest(
        bundle=[changed, foreign("nobody.test")],
        input_mask=types_pb2.BundleMask(refresh_hint=True),
    )
    done = await bundle_call(operator, "BatchUpdateFederatedBundle", update)
    assert [r.status.code for r in done.results] == [0, 5]
    assert done.results[0].bundle.refresh_hint == 90
    assert done.results[0].bundle.x509_authorities == one.x509_authorities
    whole = server_bundle_pb2.BatchUpdateFederatedBundleRequest(bundle=[changed])
    done = await bundle_call(operator, "BatchUpdateFederatedBundle", whole)
    assert done.results[0].bundle.x509_authorities == changed.x509_authorities

    put = server_bundle_pb2.BatchSetFederatedBundleRequest(bundle=[one, foreign("three.test"), own])
    done = await bundle_call(operator, "BatchSetFederatedBundle", put)
    assert [r.status.code for r in done.results] == [0, 0, 3]

    assert agent.spiffe_id is not None
    await operator.create(entry_message("/w", agent.spiffe_id, federates_with=["one.test"]))
    delete = server_bundle_pb2.BatchDeleteFederatedBundleRequest(
        trust_domains=["one.test", "nobody.test", "example.org", "two.test"]
    )
    done = await bundle_call(operator, "BatchDeleteFederatedBundle", delete)
    assert [r.status.code for r in done.results] == [9, 5, 3, 0]
    delete = server_bundle_pb2.BatchDeleteFederatedBundleRequest(
        trust_domains=["one.test"],
        mode=server_bundle_pb2.BatchDeleteFederatedBundleRequest.DISSOCIATE,
    )
    done = await bundle_call(operator, "BatchDeleteFederatedBundle", delete)
    assert [r.status.code for r in done.results] == [0]
    delete.mode = 7  # type: ignore[assignment]
    with pytest.raises(InvalidInputError):
        await bundle_call(operator, "BatchDeleteFederatedBundle", delete)


# --- authorities


async def authority(operator: Operator, name: str, **fields: Any) -> Any:
    request = getattr(server_localauthority_pb2, name + "Request")(**fields)
    answer = getattr(server_localauthority_pb2, name + "Response")
    return await ask(operator, LOCAL_AUTHORITY + name, request, answer)


@pytest.mark.parametrize("kind", ["X509", "JWT"])
async def test_a_compromised_authority_is_rotated_tainted_and_revoked(
    operator: Operator, kind: str
) -> None:
    state = await authority(operator, f"Get{kind}AuthorityState")
    first = state.active.authority_id
    assert first
    assert state.active.expires_at
    assert not state.HasField("prepared")
    assert not state.HasField("old")
    with pytest.raises(SpireHwError) as caught:
        await authority(operator, f"Activate{kind}Authority", authority_id="x")
    assert caught.value.kind is ErrorKind.INTERNAL
    prepared = (await authority(operator, f"Prepare{kind}Authority")).prepared_authority
    for bad in ("", first, "x"):
        with pytest.raises(InvalidInputError):
            await authority(operator, f"Activate{kind}Authority", authority_id=bad)
    name = prepared.authority_id
    await authority(operator, f"Activate{kind}Authority", authority_id=name)
    state = await authority(operator, f"Get{kind}AuthorityState")
    assert (state.active.authority_id, state.old.authority_id) == (name, first)
    with pytest.raises(InvalidInputError):
        await authority(operator, f"Revoke{kind}Authority", authority_id=first)
    await authority(operator, f"Taint{kind}Authority", authority_id=first)
    with pytest.raises(InvalidInputError):
        await authority(operator, f"Taint{kind}Authority", authority_id=first)
    await authority(operator, f"Revoke{kind}Authority", authority_id=first)
    bundle = await operator.bundle()
    assert first not in {r.authority_id for r in bundle.x509_authorities}
    assert bundle.jwt_key(first) is None


async def test_a_tainted_authority_makes_the_server_renew_its_own_svid(
    server: Server, operator: Operator, clock: SimClock
) -> None:
    before = server.identity.svid
    prepared = (await authority(operator, "PrepareX509Authority")).prepared_authority
    await authority(operator, "ActivateX509Authority", authority_id=prepared.authority_id)
    await authority(operator, "TaintX509Authority", authority_id=before.authority_id)
    await server.identity.tick()
    after = server.identity.svid
    assert after.authority_id == prepared.authority_id
    assert after.tls.version == before.tls.version + 1
    await clock.advance(timedelta(minutes=31))
    await server.identity.tick()
    assert server.identity.svid is not after


async def test_agents_connect_after_the_server_changed_its_authority(
    server: Server, operator: Operator
) -> None:
    prepared = (await authority(operator, "PrepareX509Authority")).prepared_authority
    await authority(operator, "ActivateX509Authority", authority_id=prepared.authority_id)
    await server.identity.renew()
    agent = await joined_agent(server, operator)
    get = server_bundle_pb2.GetBundleRequest()
    bundle = await agent.call(BUNDLE + "GetBundle", get, types_pb2.Bundle)
    assert len(bundle.x509_authorities) == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("TaintX509UpstreamAuthority", ErrorKind.FAILED_PRECONDITION),
        ("RevokeX509UpstreamAuthority", ErrorKind.FAILED_PRECONDITION),
        ("GetWITAuthorityState", ErrorKind.UNIMPLEMENTED),
        ("PrepareWITAuthority", ErrorKind.UNIMPLEMENTED),
        ("ActivateWITAuthority", ErrorKind.UNIMPLEMENTED),
        ("TaintWITAuthority", ErrorKind.UNIMPLEMENTED),
        ("RevokeWITAuthority", ErrorKind.UNIMPLEMENTED),
    ],
)
async def test_authorities_there_are_not(operator: Operator, name: str, kind: ErrorKind) -> None:
    with pytest.raises(SpireHwError) as caught:
        await authority(operator, name)
    assert caught.value.kind is kind


# --- TPMs


async def tpm(operator: Operator, name: str, answer: Any, **fields: Any) -> Any:
    return await ask(
        operator, TPM + name, getattr(hw_admin_pb2, name + "Request")(**fields), answer
    )


async def test_tpms_are_enrolled_listed_and_taken_off(operator: Operator) -> None:
    hashes = [f"{i:064x}" for i in range(3)]
    for number, ek_hash in enumerate(hashes):
        made = await tpm(
            operator, "AllowEk", hw_admin_pb2.EnrolledEk, ek_hash=ek_hash, comment=f"host {number}"
        )
        assert made.comment == f"host {number}"
        assert made.created_at
    with pytest.raises(AlreadyExistsError):
        await tpm(operator, "AllowEk", hw_admin_pb2.EnrolledEk, ek_hash=hashes[0])
    page = await tpm(operator, "ListEks", hw_admin_pb2.ListEksResponse, page_size=2)
    assert [e.ek_hash for e in page.eks] == hashes[:2]
    rest = await tpm(
        operator,
        "ListEks",
        hw_admin_pb2.ListEksResponse,
        page_size=2,
        page_token=page.next_page_token,
    )
    assert [e.ek_hash for e in rest.eks] == hashes[2:]
    assert rest.next_page_token == ""
    await tpm(operator, "DenyEk", hw_admin_pb2.DenyEkResponse, ek_hash=hashes[0])
    with pytest.raises(NotFoundError):
        await tpm(operator, "DenyEk", hw_admin_pb2.DenyEkResponse, ek_hash=hashes[0])
    left = await tpm(operator, "ListEks", hw_admin_pb2.ListEksResponse)
    assert [e.ek_hash for e in left.eks] == hashes[1:]


async def test_bad_tpm_requests(operator: Operator, agent: ScriptedAgent) -> None:
    for bad in ("", "zz", "A" * 64, "a" * 63, "a" * 64 + "\n"):
        with pytest.raises(InvalidInputError):
            await tpm(operator, "AllowEk", hw_admin_pb2.EnrolledEk, ek_hash=bad)
    with pytest.raises(InvalidInputError):
        await tpm(
            operator, "AllowEk", hw_admin_pb2.EnrolledEk, ek_hash="a" * 64, comment="x" * 1025
        )
    with pytest.raises(InvalidInputError):
        await tpm(operator, "ListEks", hw_admin_pb2.ListEksResponse, page_size=-1)
    with pytest.raises(SpireHwError) as caught:
        await agent.call(
            TPM + "ListEks", hw_admin_pb2.ListEksRequest(), hw_admin_pb2.ListEksResponse
        )
    assert caught.value.kind is ErrorKind.UNIMPLEMENTED


async def enroll(operator: Operator, *items: tuple[str, str], dry_run: bool = False) -> list[Any]:
    request = hw_admin_pb2.EnrollEksRequest(dry_run=dry_run)
    for ek_hash, comment in items:
        request.eks.add(ek_hash=ek_hash, comment=comment)
    answer = hw_admin_pb2.EnrollEksResponse
    found = await ask(operator, TPM + "EnrollEks", request, answer)
    return [(result.outcome, result.message) for result in found.results]


async def test_many_tpms_are_enrolled_and_every_one_is_answered(operator: Operator) -> None:
    result = hw_admin_pb2.EnrollEkResult
    one, two = "1" * 64, "2" * 64
    items = [(one, "a"), ("A" * 64, ""), (two, "x" * 1025), (one, "b"), (two, "c")]
    messages = [
        "",
        "ek_hash is not a SHA-256 in 64 lower-case hex digits",
        "comment is longer than 1024 characters",
        "the same EK hash stood here before",
        "",
    ]
    expected = [(result.REFUSED if message else result.ADDED, message) for message in messages]
    assert await enroll(operator, *items, dry_run=True) == expected
    assert await enroll(operator, *items) == expected
    again = await enroll(operator, (one, "a"), (two, "new"))
    assert again == [(result.UNCHANGED, ""), (result.UPDATED, "")]
    assert await enroll(operator) == []
    with pytest.raises(InvalidInputError, match="more than 1000 TPMs"):
        await enroll(operator, *[(f"{n:064x}", "") for n in range(1001)])
    listed = await tpm(operator, "ListEks", hw_admin_pb2.ListEksResponse)
    assert [ek.comment for ek in listed.eks] == ["a", "new"]


# --- state, log, health


async def test_the_state_in_figures(
    server: Server, operator: Operator, agent: ScriptedAgent, clock: SimClock
) -> None:
    assert agent.spiffe_id is not None
    await operator.create(entry_message("/w", agent.spiffe_id))
    await clock.advance(timedelta(seconds=90))
    info = await ask(
        operator,
        DEBUG + "GetInfo",
        server_debug_pb2.GetInfoRequest(),
        server_debug_pb2.GetInfoResponse,
    )
    assert (info.agents_count, info.entries_count, info.federated_bundles_count) == (1, 1, 0)
    assert info.uptime == 90
    assert [c.id.path for c in info.svid_chain] == ["/spire/server"]
    assert info.svid_chain[0].expires_at == int(server.identity.svid.not_after.timestamp())


async def test_the_log_level_can_be_changed(operator: Operator) -> None:
    async def level(name: str, **fields: Any) -> Any:
        request = getattr(server_logger_pb2, name + "Request")(**fields)
        return await ask(operator, LOGGER + name, request, types_pb2.Logger)

    logs.output().reset_level()  # commands run in this process may have changed it
    try:
        before = await level("GetLogger")
        assert before.current_level == before.launch_level
        changed = await level("SetLogLevel", new_level="ERROR")
        assert changed.current_level == types_pb2.LogLevel.ERROR
        with pytest.raises(InvalidInputError):
            await level("SetLogLevel")
        with pytest.raises(InvalidInputError):
            await level("SetLogLevel", new_level=42)
        assert await level("ResetLogLevel") == before
    finally:
        logs.output().reset_level()


async def test_services_for_operators_are_not_on_tcp(agent: ScriptedAgent) -> None:
    for path, request, answer in (
        (DEBUG + "GetInfo", server_debug_pb2.GetInfoRequest(), server_debug_pb2.GetInfoResponse),
        (LOGGER + "GetLogger", server_logger_pb2.GetLoggerRequest(), types_pb2.Logger),
        (HEALTH + "Check", health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse),
    ):
        with pytest.raises(SpireHwError) as caught:
            await agent.call(path, request, answer)
        assert caught.value.kind is ErrorKind.UNIMPLEMENTED


async def health(operator: Operator) -> Any:
    request = health_pb2.HealthCheckRequest()
    return (await ask(operator, HEALTH + "Check", request, health_pb2.HealthCheckResponse)).status


async def test_health_over_the_socket(server: Server, operator: Operator, clock: SimClock) -> None:
    assert await health(operator) == health_pb2.HealthCheckResponse.SERVING
    named = health_pb2.HealthCheckRequest(service="x")
    with pytest.raises(InvalidInputError):
        await ask(operator, HEALTH + "Check", named, health_pb2.HealthCheckResponse)
    server.identity._clock = _Later(clock)
    await clock.advance(timedelta(hours=2))
    assert await health(operator) == health_pb2.HealthCheckResponse.NOT_SERVING


class _Later:
    """A clock whose sleepers never wake, so that nothing is renewed."""

    def __init__(self, clock: SimClock) -> None:
        self.now = clock.now
        self.monotonic = clock.monotonic

    async def sleep(self, seconds: float) -> None:
        raise NotReadyError(f"no time for {seconds}")


@pytest_asyncio.fixture
async def probed(short_dir: Path) -> AsyncIterator[Server]:
    text = server_config(short_dir, key_manager="memory") + (
        'health_checks { listener_enabled = true bind_address = "127.0.0.1" bind_port = "0"'
        ' live_path = "/l" ready_path = "/r" }'
    )
    server = Server(build_settings(hcl.parse(text, "server.conf")))
    await server.start()
    yield server
    await server.close()


async def test_health_over_http(probed: Server) -> None:
    async with aiohttp.ClientSession() as session:
        details: dict[str, Any] = {}
        for path in ("/l", "/r"):
            async with session.get(f"http://127.0.0.1:{probed.health_port}{path}") as answer:
                assert answer.status == 200
                details = json.loads(await answer.text())
        assert set(details) == {
            "server",
            "server.ca",
            "server.ca.rotator",
            "server.keymanager",
            "catalog.datastore",
        }
        probed.manager._failures = 11
        for path in ("/l", "/r"):
            async with session.get(f"http://127.0.0.1:{probed.health_port}{path}") as answer:
                assert answer.status == 500
                assert "err" in json.loads(await answer.text())["server.ca.rotator"]


async def test_the_audit_log_has_a_line_for_each_item(short_dir: Path, clock: SimClock) -> None:
    settings = server_settings(short_dir, key_manager="memory", more="audit_log_enabled = true")
    stream = StringIO()
    logs.configure(logs.LogSettings(format=logs.Format.JSON), stream=stream)
    server = Server(settings, clock=clock)
    try:
        await server.start()
        operator = Operator(settings.socket_path)
        bad = entry_message("/bad", TrustDomain("example.org").member("p"))
        bad.ClearField("selectors")
        await operator.create(entry_message("/w", TrustDomain("example.org").member("p")), bad)
        agent = await joined_agent(server, operator)
        with pytest.raises(DeniedError):
            await agent.call(
                BUNDLE + "CountBundles",
                server_bundle_pb2.CountBundlesRequest(),
                server_bundle_pb2.CountBundlesResponse,
            )
        await operator.close()
    finally:
        await server.close()
        logs.unconfigure()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    audit = [line for line in lines if line.get("type") == "audit"]
    created = [line for line in audit if line["method"] == "BatchCreateEntry"]
    assert [line["status"] for line in created] == ["success", "error"]
    assert created[0]["spiffe_id"] == "spiffe://example.org/w"
    assert created[0]["authorized_as"] == "local"
    assert created[0]["authorized_via"] == "transport"
    assert isinstance(created[0]["caller_uid"], int)
    assert created[1]["status_code"] == "INVALID_ARGUMENT"
    attested = [line for line in audit if line["method"] == "AttestAgent"]
    assert [line["agent_node_attestor_type"] for line in attested] == ["join_token"]
    refused = [line for line in audit if line["method"] == "CountBundles"]
    assert [line["status_code"] for line in refused] == ["PERMISSION_DENIED"]
    assert refused[0]["caller_id"] == str(agent.spiffe_id)

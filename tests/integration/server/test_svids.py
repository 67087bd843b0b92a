"""SVIDs: minted for operators, issued to agents and to servers below."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509

from spire_hw._pb import server_bundle_pb2, server_entry_pb2, types_pb2
from spire_hw._pb import server_svid_pb2 as pb
from spire_hw.errors import (
    DeniedError,
    ErrorKind,
    InvalidInputError,
    LimitError,
    NotFoundError,
    SpireHwError,
)
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key, spki_der
from spire_hw.spiffeid import SpiffeId
from spire_hw.svid.jwtsvid import verify_jwt_svid
from spire_hw.svid.x509svid import verify_x509_svid
from spire_hw.x509.certificate import load_certificate
from spire_hw.x509.csr import build_csr
from spire_hw.x509.name import EMPTY_NAME, Subject
from spire_hw_server.app import Server
from spire_hw_sim.servers import (
    BUNDLE,
    ENTRY,
    SVID,
    TIMEOUT_S,
    TRUST_DOMAIN,
    Operator,
    ScriptedAgent,
    entry_message,
    joined_agent,
    make_csr,
    server_settings,
)

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio


async def csr_for(uri: str | None, **more: Any) -> bytes:
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    return await build_csr(signer, spiffe_id=None if uri is None else SpiffeId(uri), **more)


async def mint(operator: Operator, csr: bytes, ttl: int = 0) -> types_pb2.X509SVID:
    answer = await operator.channel.unary(
        SVID + "MintX509SVID",
        pb.MintX509SVIDRequest(csr=csr, ttl=ttl),
        pb.MintX509SVIDResponse,
        timeout_s=TIMEOUT_S,
    )
    svid: types_pb2.X509SVID = answer.svid
    return svid


async def mint_jwt(operator: Operator, **fields: Any) -> types_pb2.JWTSVID:
    answer = await operator.channel.unary(
        SVID + "MintJWTSVID",
        pb.MintJWTSVIDRequest(**fields),
        pb.MintJWTSVIDResponse,
        timeout_s=TIMEOUT_S,
    )
    svid: types_pb2.JWTSVID = answer.svid
    return svid


async def test_a_minted_svid_is_what_the_csr_asks_for(server: Server, operator: Operator) -> None:
    subject = Subject(organization=("Example",), common_name="tool").encode()
    csr = await csr_for("spiffe://example.org/tool", dns_names=("tool.test",), subject=subject)
    svid = await mint(operator, csr, ttl=60)
    chain = list(svid.cert_chain)
    now = server.clock.now()
    assert str(verify_x509_svid(chain, await operator.bundle(), now)) == "spiffe://example.org/tool"
    leaf = load_certificate(chain[0])
    assert leaf.subject.public_bytes() == subject
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["tool.test"]
    assert leaf.not_valid_after_utc == now + timedelta(seconds=60)
    assert leaf.not_valid_before_utc == now - timedelta(seconds=10)
    assert svid.id.path == "/tool"
    assert svid.expires_at == int((now + timedelta(seconds=60)).timestamp())


async def test_a_minted_svid_without_wishes_has_the_defaults(
    server: Server, operator: Operator
) -> None:
    svid = await mint(operator, await csr_for("spiffe://example.org/tool", subject=EMPTY_NAME))
    leaf = load_certificate(svid.cert_chain[0])
    assert leaf.not_valid_after_utc == server.clock.now() + timedelta(hours=1)
    assert leaf.subject.rfc4514_string() == "O=SPIRE,C=US"


async def test_an_svid_never_outlives_its_authority(server: Server, operator: Operator) -> None:
    svid = await mint(operator, await csr_for("spiffe://example.org/tool"), ttl=1 << 30)
    active = server.manager.x509_slots.active
    assert active is not None
    assert svid.expires_at == int(active.not_after.timestamp())


@pytest.mark.parametrize(
    ("uri", "more"),
    [
        (None, {}),
        ("spiffe://other.test/tool", {}),
        ("spiffe://example.org", {}),
        ("spiffe://example.org/spire/agent/x/1", {}),
        ("spiffe://example.org/spire", {}),
        ("spiffe://example.org/tool", {"dns_names": ("*.a.test", "b.a.test")}),
    ],
)
async def test_minting_refuses_what_no_workload_may_have(
    operator: Operator, uri: str | None, more: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInputError):
        await mint(operator, await csr_for(uri, **more))


async def test_minting_refuses_bad_requests(operator: Operator) -> None:
    csr = await csr_for("spiffe://example.org/tool")
    forged = bytearray(csr)
    forged[-1] ^= 1
    for bad in (b"", b"junk", bytes(forged)):
        with pytest.raises(InvalidInputError):
            await mint(operator, bad)
    with pytest.raises(InvalidInputError):
        await mint(operator, csr, ttl=-1)


async def test_a_minted_jwt_holds(server: Server, operator: Operator) -> None:
    tool = types_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path="/tool")
    svid = await mint_jwt(operator, id=tool, audience=["one", "", "two"], ttl=30)
    bundle = await operator.bundle()
    now = server.clock.now()
    verified = verify_jwt_svid(
        svid.token, audience="two", bundles={bundle.trust_domain: bundle}, at=now
    )
    assert str(verified.spiffe_id) == "spiffe://example.org/tool"
    assert verified.audience == ("one", "two")
    assert svid.expires_at - svid.issued_at == 30
    default = await mint_jwt(operator, id=tool, audience=["one"])
    assert default.expires_at - default.issued_at == 300


@pytest.mark.parametrize(
    "fields",
    [
        {"id": {"trust_domain": "example.org", "path": "/tool"}},
        {"id": {"trust_domain": "example.org", "path": "/tool"}, "audience": [""]},
        {"audience": ["a"]},
        {"id": {"trust_domain": "example.org"}, "audience": ["a"]},
        {"id": {"trust_domain": "example.org", "path": "/spire/server"}, "audience": ["a"]},
        {"id": {"trust_domain": "other.test", "path": "/tool"}, "audience": ["a"]},
        {"id": {"trust_domain": "example.org", "path": "/tool"}, "audience": ["a"], "ttl": -1},
    ],
)
async def test_minting_a_jwt_refuses_bad_requests(
    operator: Operator, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInputError):
        await mint_jwt(operator, **fields)


async def test_a_batch_answers_item_by_item(
    server: Server, operator: Operator, agent: ScriptedAgent
) -> None:
    assert agent.spiffe_id is not None
    web, mail = await operator.create(
        entry_message(
            "/web", agent.spiffe_id, x509_svid_ttl=90, dns_names=["web.test"], hint="public"
        ),
        entry_message("/mail", SpiffeId("spiffe://example.org/spire/agent/x/other")),
    )
    key = generate_private_key(KeyType.EC_P384)
    csr = await make_csr(key)
    forged = bytearray(csr)
    forged[-1] ^= 1
    async with await agent.channel() as channel:
        results = await agent.batch_new(
            channel,
            [
                (web.entry.id, csr),
                (mail.entry.id, csr),
                ("nobody", csr),
                ("", csr),
                (web.entry.id, b""),
                (web.entry.id, bytes(forged)),
                (web.entry.id, csr),
            ],
        )
    assert [r.status.code for r in results] == [0, 5, 5, 3, 3, 3, 0]
    assert all(r.HasField("status") and r.status.message for r in results)
    svid = results[0].svid
    now = server.clock.now()
    owner = verify_x509_svid(list(svid.cert_chain), await operator.bundle(), now)
    assert str(owner) == "spiffe://example.org/web"
    leaf = load_certificate(svid.cert_chain[0])
    assert spki_der(leaf.public_key()) == spki_der(key.public_key())  # type: ignore[arg-type]
    assert leaf.not_valid_after_utc == now + timedelta(seconds=90)
    assert leaf.subject.rfc4514_string() == "CN=web.test,O=SPIRE,C=US"
    assert svid.hint == "public"
    assert not results[1].HasField("svid")
    serials = {load_certificate(r.svid.cert_chain[0]).serial_number for r in results[::6]}
    assert len(serials) == 2


async def test_an_empty_batch_is_refused(agent: ScriptedAgent) -> None:
    async with await agent.channel() as channel:
        with pytest.raises(InvalidInputError):
            await agent.batch_new(channel, [])


async def test_a_jwt_for_an_entry(server: Server, operator: Operator, agent: ScriptedAgent) -> None:
    assert agent.spiffe_id is not None
    attributes = types_pb2.Entry.AdditionalAttributes(jwt_svid_include_jti=True)
    (web,) = await operator.create(
        entry_message(
            "/web",
            agent.spiffe_id,
            jwt_svid_ttl=45,
            hint="public",
            additional_attributes=attributes,
        )
    )
    request = pb.NewJWTSVIDRequest(entry_id=web.entry.id, audience=["a"])
    answer = await agent.call(SVID + "NewJWTSVID", request, pb.NewJWTSVIDResponse)
    bundle = await operator.bundle()
    verified = verify_jwt_svid(
        answer.svid.token,
        audience="a",
        bundles={bundle.trust_domain: bundle},
        at=server.clock.now(),
    )
    assert verified.claims["jti"]
    assert "iss" not in verified.claims
    assert answer.svid.expires_at - answer.svid.issued_at == 45
    assert answer.svid.hint == "public"
    for entry_id, audience, error in (
        (web.entry.id, [], InvalidInputError),
        ("", ["a"], InvalidInputError),
        ("nobody", ["a"], NotFoundError),
    ):
        bad = pb.NewJWTSVIDRequest(entry_id=entry_id, audience=audience)
        with pytest.raises(error):
            await agent.call(SVID + "NewJWTSVID", bad, pb.NewJWTSVIDResponse)


async def test_wit_svids_are_not_there(operator: Operator, agent: ScriptedAgent) -> None:
    with pytest.raises(SpireHwError) as caught:
        await operator.channel.unary(
            SVID + "MintWITSVID", pb.MintWITSVIDRequest(), pb.MintWITSVIDResponse, timeout_s=5
        )
    assert caught.value.kind is ErrorKind.UNIMPLEMENTED
    with pytest.raises(SpireHwError) as caught:
        await agent.call(
            SVID + "BatchNewWITSVID", pb.BatchNewWITSVIDRequest(), pb.BatchNewWITSVIDResponse
        )
    assert caught.value.kind is ErrorKind.UNIMPLEMENTED


async def test_a_server_below_gets_a_ca_and_publishes_its_jwt_key(
    server: Server, operator: Operator, agent: ScriptedAgent
) -> None:
    assert agent.spiffe_id is not None
    down, plain = await operator.create(
        entry_message("/down", agent.spiffe_id, downstream=True),
        entry_message("/plain", agent.spiffe_id),
    )
    below = await agent.workload(down.entry.id)
    ca_key = generate_private_key(KeyType.EC_P256)
    csr = await make_csr(ca_key)
    path = SVID + "NewDownstreamX509CA"
    request = pb.NewDownstreamX509CARequest(csr=csr, preferred_ttl=7200)
    answer = await below.call(path, request, pb.NewDownstreamX509CAResponse)
    bundle = await operator.bundle()
    assert list(answer.x509_authorities) == [r.der for r in bundle.x509_authorities]
    (chain,) = answer.ca_cert_chain
    certificate = load_certificate(chain)
    certificate.verify_directly_issued_by(bundle.root_certificates()[0])
    assert certificate.not_valid_after_utc == server.clock.now() + timedelta(hours=2)
    assert "OU=DOWNSTREAM-1" in certificate.subject.rfc4514_string()
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert constraints.ca

    default = await below.call(
        path, pb.NewDownstreamX509CARequest(csr=csr), pb.NewDownstreamX509CAResponse
    )
    assert len(default.ca_cert_chain) == 1
    for bad in (
        pb.NewDownstreamX509CARequest(),
        pb.NewDownstreamX509CARequest(csr=csr, preferred_ttl=-1),
    ):
        with pytest.raises(InvalidInputError):
            await below.call(path, bad, pb.NewDownstreamX509CAResponse)
    other = await agent.workload(plain.entry.id)
    with pytest.raises(DeniedError):
        await other.call(path, request, pb.NewDownstreamX509CAResponse)

    key = types_pb2.JWTKey(public_key=spki_der(ca_key.public_key()), key_id="below")
    publish = BUNDLE + "PublishJWTAuthority"
    published = await below.call(
        publish,
        server_bundle_pb2.PublishJWTAuthorityRequest(jwt_authority=key),
        server_bundle_pb2.PublishJWTAuthorityResponse,
    )
    assert "below" in {k.key_id for k in published.jwt_authorities}
    assert (await operator.bundle()).jwt_key("below") is not None
    for bad_key in (None, types_pb2.JWTKey(key_id="x"), types_pb2.JWTKey(public_key=b"x")):
        with pytest.raises(InvalidInputError):
            await below.call(
                publish,
                server_bundle_pb2.PublishJWTAuthorityRequest(jwt_authority=bad_key),
                server_bundle_pb2.PublishJWTAuthorityResponse,
            )


async def test_jwt_can_be_switched_off(short_dir: Path, clock: SimClock) -> None:
    settings = server_settings(short_dir, key_manager="memory", more="disable_jwt_svids = true")
    server = Server(settings, clock=clock)
    await server.start()
    operator = Operator(settings.socket_path)
    try:
        assert (await operator.bundle()).jwt_authorities == ()
        tool = types_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path="/tool")
        with pytest.raises(SpireHwError) as caught:
            await mint_jwt(operator, id=tool, audience=["a"])
        assert caught.value.kind is ErrorKind.UNIMPLEMENTED
    finally:
        await operator.close()
        await server.close()


async def test_signing_is_limited_by_address_and_by_item(short_dir: Path, clock: SimClock) -> None:
    settings = server_settings(short_dir, key_manager="memory")
    server = Server(settings, clock=clock)
    await server.start()
    operator = Operator(settings.socket_path)
    try:
        agent = await joined_agent(server, operator)
        assert agent.spiffe_id is not None
        (web,) = await operator.create(entry_message("/web", agent.spiffe_id))
        csr = await make_csr(agent.key)
        async with await agent.channel() as channel:
            with pytest.raises(LimitError, match="burst"):
                await agent.batch_new(channel, [(web.entry.id, b"x")] * 501)
            results = await agent.batch_new(channel, [(web.entry.id, csr)] * 500)
            assert {r.status.code for r in results} == {0}
            request = pb.BatchNewX509SVIDRequest(
                params=[pb.NewX509SVIDParams(entry_id=web.entry.id, csr=csr)] * 250
            )
            with pytest.raises(LimitError):
                await channel.unary(
                    SVID + "BatchNewX509SVID",
                    request,
                    pb.BatchNewX509SVIDResponse,
                    timeout_s=0.4,
                )
        listed = await operator.channel.unary(
            ENTRY + "CountEntries",
            server_entry_pb2.CountEntriesRequest(),
            server_entry_pb2.CountEntriesResponse,
            timeout_s=TIMEOUT_S,
        )
        assert listed.count == 1
    finally:
        await operator.close()
        await server.close()

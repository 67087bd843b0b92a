"""A server whose CA is signed by an external UpstreamAuthority."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from spire_hw._pb import server_localauthority_pb2 as pb
from spire_hw.clock import SystemClock
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw_sim.workload import until
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from tests.integration.plugins.conftest import Outside

KEYS = 'KeyManager "disk" { plugin_data { keys_path = "HOME/keys.json" } }\n'
LOCAL = "/spire.api.server.localauthority.v1.LocalAuthority/"


def root_id(outside: Outside, name: str) -> str:
    root = x509.load_pem_x509_certificate((outside.directory / f"{name}.pem").read_bytes())
    found = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    return found.value.digest.hex()


def check_server_svid(world: World) -> None:
    """The server's SVID verifies against the bundle, through the CA that upstream signed."""
    svid = parse_x509_svid(world.server.identity.svid.chain)
    assert len(svid.chain) == 2
    bundle = world.server._bundles
    assert bundle is not None
    verify_x509_svid(svid, bundle.own, SystemClock().now())


@pytest.mark.asyncio
async def test_the_ca_hangs_from_the_root_above(outside: Outside) -> None:
    plugins = KEYS + outside.block("UpstreamAuthority", "above")
    async with World(server_plugins=plugins) as world:
        bundle = await world.bundle()
        assert [r.authority_id for r in bundle.x509_authorities] == [root_id(outside, "first")]
        active = world.server.manager.x509_slots.active
        assert active is not None
        assert active.upstream_authority_id == root_id(outside, "first")
        check_server_svid(world)
        async with await world.agent() as agent:
            assert agent.identity.is_alive()
        # After a restart the CA that was signed is used again.
        await world.start_server(await world.stop_server())
        again = world.server.manager.x509_slots.active
        assert again is not None
        assert again.authority_id == active.authority_id
        assert [e["event"] for e in outside.told("UpstreamAuthority")].count("mint") == 1


@pytest.mark.asyncio
async def test_a_tainted_root_above_makes_a_new_ca(outside: Outside) -> None:
    plugins = KEYS + outside.block("UpstreamAuthority", "above")
    async with World(server_plugins=plugins) as world:
        before = world.server.manager.x509_slots.active
        assert before is not None
        outside.set("second")
        bundles = world.server._bundles
        assert bundles is not None
        await until(lambda: any(r.tainted for r in bundles.own.x509_authorities))
        await world.server.manager.tick()
        active = world.server.manager.x509_slots.active
        assert active is not None
        assert active.upstream_authority_id == root_id(outside, "second")
        await world.server.identity.tick()
        check_server_svid(world)
        # The new stream no longer names the first root, and nothing of ours hangs from it but the
        # old authority.
        old = world.server.manager.x509_slots.old
        assert old is not None
        assert old.authority_id == before.authority_id


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("switch", "words"),
    [("refuse", "refused as asked"), ("wrong_key", "is not about the signer's key")],
)
async def test_what_cannot_be_used_keeps_the_server_from_starting(
    outside: Outside, switch: str, words: str
) -> None:
    outside.set(switch)
    world = World(server_plugins=KEYS + outside.block("UpstreamAuthority", "above"))
    with pytest.raises(SpireHwError) as caught:
        async with world:
            pass
    assert words in caught.value.message
    assert "upstreamauthority(above): " in caught.value.message


@pytest.mark.asyncio
async def test_a_server_that_gets_an_upstream_authority_makes_a_new_ca(outside: Outside) -> None:
    async with World(server_plugins=KEYS) as world:
        own = (await world.bundle()).x509_authorities
        port = await world.stop_server()
        world._server_plugins += outside.block("UpstreamAuthority", "above")
        await world.start_server(port)
        bundle = await world.bundle()
        ids = {r.authority_id for r in bundle.x509_authorities}
        # What was issued before is still verified.
        assert ids == {own[0].authority_id, root_id(outside, "first")}
        check_server_svid(world)


@pytest.mark.asyncio
async def test_a_server_whose_upstream_authority_is_gone_makes_a_ca_of_its_own(
    outside: Outside,
) -> None:
    above = outside.block("UpstreamAuthority", "above")
    async with World(server_plugins=KEYS + above) as world:
        before = world.server.manager.x509_slots.active
        assert before is not None
        port = await world.stop_server()
        world._server_plugins = world._server_plugins.removesuffix(above)
        await world.start_server(port)
        active = world.server.manager.x509_slots.active
        assert active is not None
        assert active.authority_id != before.authority_id
        assert active.upstream_authority_id == ""
        ids = {r.authority_id for r in (await world.bundle()).x509_authorities}
        assert ids == {active.authority_id, root_id(outside, "first")}


@pytest.mark.asyncio
async def test_authorities_above_are_tainted_and_revoked_by_hand(outside: Outside) -> None:
    plugins = KEYS + outside.block("UpstreamAuthority", "above")
    async with World(server_plugins=plugins) as world:
        first = root_id(outside, "first")
        request = pb.TaintX509UpstreamAuthorityRequest(subject_key_id=first)
        taint = LOCAL + "TaintX509UpstreamAuthority"
        with pytest.raises(SpireHwError, match="rotate to another one first") as caught:
            await world.call(taint, request, pb.TaintX509UpstreamAuthorityResponse)
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
        unknown = pb.TaintX509UpstreamAuthorityRequest(subject_key_id="ab" * 20)
        with pytest.raises(SpireHwError) as missing:
            await world.call(taint, unknown, pb.TaintX509UpstreamAuthorityResponse)
        assert missing.value.kind is ErrorKind.NOT_FOUND
        with pytest.raises(SpireHwError, match="taint and revoke its root instead"):
            await world.call(
                LOCAL + "TaintX509Authority",
                pb.TaintX509AuthorityRequest(authority_id="x"),
                pb.TaintX509AuthorityResponse,
            )

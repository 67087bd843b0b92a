from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from google.protobuf.wrappers_pb2 import StringValue
from typing_extensions import override

from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError, VerificationError
from spire_hw.key import KeyType, SignOptions, SoftwareSigner, generate_private_key
from spire_hw.rpc.client import connect
from spire_hw.rpc.server import RpcLimits
from spire_hw.spiffeid import SpiffeId
from spire_hw.transport.peer import TcpPeer
from spire_hw.transport.tls import build_context
from spire_hw.x509.chain import UnknownAuthorityError
from spire_hw_sim.echo import TIMEOUT_S, EchoWorld, echo_world, say
from spire_hw_sim.pki import HOUR, Authority, now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.transport.tls import TlsContext, TlsIdentity

pytestmark = pytest.mark.usefixtures("rpc_engine")


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[EchoWorld]:
    async with echo_world(tmp_path) as world:
        yield world


async def refused(world: EchoWorld, identity: TlsIdentity) -> None:
    with pytest.raises(UnavailableError):
        await world.who(identity)
    assert not world.echo.calls


@pytest.mark.asyncio
async def test_without_certificate_the_caller_is_anonymous(world: EchoWorld) -> None:
    assert await world.who() == "anonymous"
    peer = world.echo.calls[0].peer
    assert isinstance(peer, TcpPeer)
    assert (peer.address, peer.chain) == ("127.0.0.1", ())


@pytest.mark.asyncio
async def test_a_good_certificate_names_the_caller(world: EchoWorld) -> None:
    identity = world.authority.identity(world.agent())
    assert await world.who(identity) == world.agent()
    peer = world.echo.calls[0].peer
    assert isinstance(peer, TcpPeer)
    assert len(peer.chain) == 1


@pytest.mark.asyncio
async def test_callers_that_are_gone_are_noticed(world: EchoWorld) -> None:
    async with await world.over_tcp() as channel:
        assert await say(channel) == "hello"
        (lease,) = world.tcp._leases
        assert lease.outer is not None
        assert lease.outer.transport is not None
        connection: socket.socket = lease.outer.transport.get_extra_info("socket")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


@pytest.mark.asyncio
async def test_an_rsa_certificate_is_as_good(world: EchoWorld) -> None:
    key = rsa.generate_private_key(65537, 2048)
    identity = world.authority.identity(world.agent(), private_key=key)
    assert await world.who(identity) == world.agent()


@pytest.mark.asyncio
async def test_a_nested_certificate_comes_with_its_chain(world: EchoWorld) -> None:
    identity = world.authority.below().below().identity(world.agent())
    assert await world.who(identity) == world.agent()
    peer = world.echo.calls[0].peer
    assert isinstance(peer, TcpPeer)
    assert len(peer.chain) == 3


@pytest.mark.asyncio
async def test_an_intermediate_in_the_bundle_is_an_anchor(world: EchoWorld) -> None:
    below = world.authority.below()
    world.believe(below)
    assert await world.who(below.identity(world.agent())) == world.agent()


@pytest.mark.asyncio
async def test_an_unknown_authority_is_refused(world: EchoWorld) -> None:
    await refused(world, Authority("example.org").identity(world.agent()))


@pytest.mark.asyncio
@pytest.mark.parametrize(("start", "end"), [(-3, -1), (1, 3)])
async def test_a_certificate_outside_its_validity_is_refused(
    world: EchoWorld, start: int, end: int
) -> None:
    identity = world.authority.identity(
        world.agent(), start=now() + start * HOUR, end=now() + end * HOUR
    )
    await refused(world, identity)


@pytest.mark.asyncio
async def test_an_authority_speaks_for_its_own_trust_domain_only(world: EchoWorld) -> None:
    foreign = Authority("foreign.org")
    world.believe(world.authority, foreign)
    await refused(world, foreign.identity(world.agent()))
    await refused(world, world.authority.identity("spiffe://foreign.org/admin"))
    assert await world.who(foreign.identity("spiffe://foreign.org/a")) == "spiffe://foreign.org/a"


@pytest.mark.asyncio
async def test_a_foreign_id_has_to_be_admitted(world: EchoWorld) -> None:
    foreign = Authority("foreign.org")
    world.believe(world.authority, foreign)
    world.admitted = {SpiffeId.parse("spiffe://foreign.org/admin")}
    assert await world.who(foreign.identity("spiffe://foreign.org/admin"))
    world.echo.calls.clear()
    await refused(world, foreign.identity("spiffe://foreign.org/other"))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "uris",
    [
        ("spiffe://example.org/a", "spiffe://example.org/b"),
        ("https://example.org/a",),
        ("spiffe://example.org",),
        ("spiffe://example.org/a/../b",),
    ],
)
async def test_a_certificate_that_is_no_svid_is_refused(
    world: EchoWorld, uris: tuple[str, ...]
) -> None:
    await refused(world, world.authority.identity(world.agent(), uris=uris))


@pytest.mark.asyncio
async def test_a_ca_certificate_is_no_leaf(world: EchoWorld) -> None:
    await refused(world, world.authority.identity(world.agent(), ca=True))


@pytest.mark.asyncio
async def test_a_new_server_certificate_is_shown_to_the_next_connection(world: EchoWorld) -> None:
    async with await world.over_tcp() as old:
        await say(old)
        assert old.dialer is not None
        first = old.dialer.server_chain
        world.identity = world.authority.identity(str(world.server_id), version=1)
        async with await world.over_tcp() as new:
            await say(new)
            assert new.dialer is not None
            assert new.dialer.server_chain == world.identity.chain_der != first
        await say(old)  # what is open goes on


@pytest.mark.asyncio
async def test_a_bundle_change_decides_about_the_next_connection(world: EchoWorld) -> None:
    foreign = Authority("foreign.org")
    identity = foreign.identity("spiffe://foreign.org/a")
    await refused(world, identity)
    world.believe(world.authority, foreign)
    async with await world.over_tcp(identity) as channel:
        await say(channel)
        world.believe(world.authority)
        await say(channel)
        with pytest.raises(UnavailableError):
            await world.who(identity)


@pytest.mark.asyncio
async def test_an_unchanged_bundle_keeps_the_context(world: EchoWorld) -> None:
    await world.who()
    built = world.tcp._built
    world.believe(world.authority)
    await world.who()
    assert built is not None
    assert world.tcp._built is not None
    assert world.tcp._built[2] is built[2]


@pytest.mark.asyncio
async def test_the_wrong_server_is_left_before_a_call(world: EchoWorld) -> None:
    world.identity = world.authority.identity("spiffe://example.org/not/the/server")
    with pytest.raises(UnavailableError, match=r"expected spiffe://example\.org/spire/server") as e:
        await world.who()
    assert isinstance(e.value.__cause__, VerificationError)
    assert not world.echo.calls


@pytest.mark.asyncio
async def test_a_server_of_an_unknown_authority_is_told_apart(world: EchoWorld) -> None:
    world.identity = Authority("example.org").identity(str(world.server_id))
    with pytest.raises(UnavailableError) as e:
        await world.who()
    assert isinstance(e.value.__cause__, UnknownAuthorityError)


@pytest.mark.asyncio
async def test_an_expired_server_is_left(world: EchoWorld) -> None:
    world.identity = world.authority.identity(
        str(world.server_id), start=now() - 3 * HOUR, end=now() - HOUR
    )
    with pytest.raises(UnavailableError) as e:
        await world.who()
    assert isinstance(e.value.__cause__, VerificationError)


@pytest.mark.asyncio
async def test_insecure_bootstrap_takes_any_server_and_tells_its_chain(world: EchoWorld) -> None:
    world.identity = Authority("other.org").identity("spiffe://other.org/x")
    seen: list[tuple[bytes, ...]] = []
    assert await world.who(bundle=None, on_chain=seen.append) == "anonymous"
    assert seen == [world.identity.chain_der]


@pytest.mark.asyncio
async def test_who_looks_at_the_chain_may_refuse_it(world: EchoWorld) -> None:
    def look(_chain: tuple[bytes, ...]) -> None:
        raise VerificationError("not this one")

    with pytest.raises(UnavailableError, match="not this one"):
        await world.who(bundle=None, on_chain=look)


@pytest.mark.asyncio
async def test_a_refused_client_learns_that_it_was_its_certificate(world: EchoWorld) -> None:
    channel = await world.over_tcp(Authority("example.org").identity(world.agent()))
    async with channel:
        with pytest.raises(UnavailableError):
            await say(channel)
        assert channel.dialer is not None
        error = channel.dialer.last_error
    assert error is not None
    assert "unknown ca" in error.message


@pytest.mark.asyncio
async def test_nobody_listening_is_said_plainly(world: EchoWorld) -> None:
    dialer = world.dialer()
    dialer.port = 1
    async with await connect(dialer) as channel:
        with pytest.raises(UnavailableError, match=r"cannot connect to 127\.0\.0\.1:1"):
            await say(channel)


class SlowSigner(SoftwareSigner):
    """Signs only after the loop it lives on has done something else meanwhile."""

    def __init__(self, key_type: KeyType) -> None:
        super().__init__(generate_private_key(key_type))
        self.asked = asyncio.Event()
        self.go = asyncio.Event()

    @override
    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        self.asked.set()
        await self.go.wait()
        return await super().sign(digest, options)


def only(version: ssl.TLSVersion, front: EchoWorld) -> None:
    """Have the front speak one TLS version."""
    original = front.tcp._context

    def context() -> TlsContext:
        built = original()
        built.context.maximum_version = version
        built.context.minimum_version = version
        return built

    front.tcp._context = context  # type: ignore[method-assign]


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.asyncio
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384])
async def test_a_key_that_only_signs_proves_a_client(
    world: EchoWorld, version: ssl.TLSVersion, key_type: KeyType
) -> None:
    only(version, world)
    signer = SoftwareSigner(generate_private_key(key_type))
    identity = world.authority.identity(world.agent(), signer=signer)
    assert await world.who(identity) == world.agent()


@pytest.mark.asyncio
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384])
async def test_a_key_that_only_signs_proves_a_server(
    world: EchoWorld, version: ssl.TLSVersion, key_type: KeyType
) -> None:
    only(version, world)
    signer = SoftwareSigner(generate_private_key(key_type))
    world.identity = world.authority.identity(str(world.server_id), signer=signer, version=1)
    key = rsa.generate_private_key(65537, 2048)  # the client's algorithm is another one
    identity = world.authority.identity(world.agent(), private_key=key)
    assert await world.who(identity) == world.agent()


@pytest.mark.asyncio
async def test_the_loop_goes_on_while_a_device_signs(world: EchoWorld) -> None:
    signer = SlowSigner(KeyType.EC_P256)
    identity = world.authority.identity(world.agent(), signer=signer)
    async with asyncio.TaskGroup() as group:
        call = group.create_task(world.who(identity))
        await asyncio.wait_for(signer.asked.wait(), TIMEOUT_S)
        assert await world.who() == "anonymous"  # all of it on the loop the signer waits on
        signer.go.set()
    assert call.result() == world.agent()


class BrokenSigner(SoftwareSigner):
    @override
    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        raise UnavailableError("the TPM is away")


@pytest.mark.asyncio
async def test_a_device_that_cannot_sign_is_named_as_the_cause(world: EchoWorld) -> None:
    signer = BrokenSigner(generate_private_key(KeyType.EC_P256))
    with pytest.raises(UnavailableError, match="the TPM is away"):
        await world.who(world.authority.identity(world.agent(), signer=signer))


class WrongSigner(SoftwareSigner):
    @override
    async def sign(self, digest: bytes, options: SignOptions) -> bytes:
        return b"\x30" + b"\0" * 500


@pytest.mark.asyncio
async def test_an_oversized_signature_never_reaches_openssl(world: EchoWorld) -> None:
    signer = WrongSigner(generate_private_key(KeyType.EC_P256))
    with pytest.raises(UnavailableError, match="the signature has 501 bytes"):
        await world.who(world.authority.identity(world.agent(), signer=signer))


@pytest.mark.asyncio
async def test_certificate_and_key_have_to_match(world: EchoWorld) -> None:
    good = world.authority.identity(world.agent())
    bad = replace(good, private_key=ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(UnavailableError, match="cannot be used for TLS"):
        await world.who(bad)
    worse = replace(
        good, private_key=None, signer=SoftwareSigner(generate_private_key(KeyType.EC_P256))
    )
    with pytest.raises(UnavailableError, match="do not match"):
        await world.who(worse)


def _session(
    world: EchoWorld, session: ssl.SSLSession | None
) -> tuple[ssl.SSLSession | None, bool]:
    context = build_context(
        server_side=False, verify=ssl.CERT_NONE, roots=[], identity=None
    ).context
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context = _session.__dict__.setdefault("context", context)
    with (
        socket.create_connection(("127.0.0.1", world.tcp.port), TIMEOUT_S) as raw,
        context.wrap_socket(raw, session=session) as tls,
    ):
        assert tls.selected_alpn_protocol() == "h2"
        return tls.session, bool(tls.session_reused)


@pytest.mark.asyncio
async def test_sessions_are_not_resumed(world: EchoWorld) -> None:
    session, _ = await asyncio.to_thread(_session, world, None)
    assert session is not None
    assert not session.has_ticket
    _, reused = await asyncio.to_thread(_session, world, session)
    assert not reused


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_tls_1_1_is_refused(world: EchoWorld) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        await asyncio.open_connection("127.0.0.1", world.tcp.port, ssl=old)


@pytest.mark.asyncio
async def test_connections_are_asked_to_leave_at_their_age(tmp_path: Path) -> None:
    limits = RpcLimits(max_connection_age_s=0.2, max_connection_age_grace_s=0.2)
    async with echo_world(tmp_path, rpc_limits=limits) as world, await world.over_tcp() as channel:
        stream = channel.server_stream("/sim.Echo/Hold", StringValue(), StringValue)
        assert (await anext(stream)).value == "first"
        with pytest.raises(SpireHwError) as e:
            await asyncio.wait_for(anext(stream), TIMEOUT_S)
        assert e.value.kind is ErrorKind.UNAVAILABLE
        await say(channel)  # on a new connection


@pytest.mark.asyncio
async def test_a_name_is_tried_at_all_its_addresses(world: EchoWorld) -> None:
    dialer = world.dialer()
    dialer.address = "localhost"  # ::1 as well, where nobody listens
    async with await connect(dialer) as channel:
        assert await say(channel) == "hello"

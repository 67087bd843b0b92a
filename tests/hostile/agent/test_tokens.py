"""Forged tokens shown to a running agent's ValidateJWTSVID, and a socket pressed by its users."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from spire_hw._pb import workload_pb2 as pb
from spire_hw.bundle.document import parse_jwks
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError
from spire_hw.spiffeid import TrustDomain
from spire_hw_sim.workload import Workload, eventually
from spire_hw_sim.world import TRUST_DOMAIN, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.asyncio

OURS = ec.generate_private_key(ec.SECP256R1())


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def es256(head: str, body: str) -> str:
    r, s = decode_dss_signature(OURS.sign(f"{head}.{body}".encode(), ec.ECDSA(hashes.SHA256())))
    return f"{head}.{body}.{b64(r.to_bytes(32) + s.to_bytes(32))}"


class Genuine:
    """A real token, taken apart, and the key that signed it."""

    def __init__(self, token: str, public_key: Any) -> None:
        self.token = token
        self.head, self.body, self.signature = token.split(".")
        self.header: dict[str, Any] = json.loads(unb64(self.head))
        self.claims: dict[str, Any] = json.loads(unb64(self.body))
        self.public_key = public_key

    def signed(self, claims: dict[str, Any] | None = None, **header: Any) -> str:
        """Return a token with our key and these changes."""
        head = b64(json.dumps({**self.header, **header}).encode())
        return es256(head, b64(json.dumps({**self.claims, **(claims or {})}).encode()))

    def keyed(self, algorithm: str, secret: bytes) -> str:
        """Return a token that is signed with a public key used as a shared secret."""
        head = b64(json.dumps({**self.header, "alg": algorithm}).encode())
        made = hmac.new(secret, f"{head}.{self.body}".encode(), hashlib.sha256).digest()
        return f"{head}.{self.body}.{b64(made)}"

    def key_as(self, encoding: str, form: str) -> bytes:
        return bytes(
            self.public_key.public_bytes(
                getattr(serialization.Encoding, encoding),
                getattr(serialization.PublicFormat, form),
            )
        )


def _jwk() -> dict[str, str]:
    numbers = OURS.public_key().public_numbers()
    x, y = (b64(n.to_bytes(32)) for n in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y}


FORGERIES: dict[str, Callable[[Genuine], str]] = {
    "none": lambda g: f"{b64(json.dumps({**g.header, 'alg': 'none'}).encode())}.{g.body}.",
    "None with a signature": lambda g: g.signed(alg="None"),
    "unsigned": lambda g: f"{g.head}.{g.body}.",
    "HS256 with the PEM": lambda g: g.keyed("HS256", g.key_as("PEM", "SubjectPublicKeyInfo")),
    "HS256 with the DER": lambda g: g.keyed("HS256", g.key_as("DER", "SubjectPublicKeyInfo")),
    "HS256 with the point": lambda g: g.keyed("HS256", g.key_as("X962", "UncompressedPoint")),
    "ES384 for a P-256 key": lambda g: g.signed(alg="ES384"),
    "RS256 for an EC key": lambda g: g.signed(alg="RS256"),
    "our key under their kid": lambda g: g.signed(),
    "our key, jwk in the header": lambda g: g.signed(jwk=_jwk()),
    "our key, jku in the header": lambda g: g.signed(jku="https://127.0.0.1/keys"),
    "our key, x5c in the header": lambda g: g.signed(x5c=["AAAA"]),
    "crit": lambda g: g.signed(crit=["exp"]),
    "b64 false": lambda g: g.signed(b64=False),
    "no kid": lambda g: g.signed(kid=""),
    "kid of nobody": lambda g: g.signed(kid="../../etc/passwd"),
    "kid that is no text": lambda g: g.signed(kid=["x"]),
    "another subject": lambda g: g.signed({"sub": f"spiffe://{TRUST_DOMAIN}/admin"}),
    "foreign subject": lambda g: g.signed({"sub": "spiffe://partner.test/x"}),
    "genuine, subject exchanged": lambda g: (
        f"{g.head}.{b64(json.dumps({**g.claims, 'sub': 'spiffe://sim.example/x'}).encode())}"
        f".{g.signature}"
    ),
    "genuine, header exchanged": lambda g: (
        f"{b64(json.dumps({**g.header, 'typ': 'JOSE'}).encode())}.{g.body}.{g.signature}"
    ),
    "genuine with a fourth part": lambda g: g.token + ".x",
    "genuine with padding": lambda g: g.token + "=",
    "genuine with a line end": lambda g: g.token + "\n",
    "genuine with spare bits": lambda g: g.token[:-1] + chr(ord(g.token[-1]) + 1),
    "genuine, r and s zero": lambda g: f"{g.head}.{g.body}.{b64(bytes(64))}",
    "genuine, DER signature": lambda g: f"{g.head}.{g.body}.{b64(b'0' + unb64(g.signature))}",
    "members twice": lambda g: es256(
        b64(b'{"alg":"ES256","alg":"none","kid":"x","typ":"JWT"}'), g.body
    ),
    "huge": lambda g: g.token + "A" * 20_000,
    "deep": lambda g: es256(b64(b"[" * 5000), g.body),
}


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with asyncio.timeout(60), World() as made:
        yield made


async def test_forged_tokens_are_refused_and_never_shown(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    async with await world.agent() as agent, Workload(world.socket()) as workload:
        current = agent.identity.current
        assert current is not None
        await world.create_entry("/web", parent=current.spiffe_id)
        answer = await eventually(lambda: workload.jwt_svid(["db"]))
        bundles = await workload.jwt_bundles()
        own = TrustDomain(TRUST_DOMAIN)
        keys = parse_jwks(own, bundles.bundles[str(own.id)])
        token = answer.svids[0].svid
        kid = json.loads(unb64(token.split(".")[0]))["kid"]
        authority = keys.jwt_key(kid)
        assert authority is not None
        genuine = Genuine(token, authority.public_key)
        assert (await workload.validate("db", token)).spiffe_id.endswith("/web")
        for name, forge in FORGERIES.items():
            with pytest.raises(SpireHwError) as caught:
                await workload.validate("db", forge(genuine))
            assert caught.value.kind is ErrorKind.INVALID_ARGUMENT, name
            assert genuine.body[:20] not in caught.value.message, name
        for audience in ("d", "db2", "DB", "db ", "*"):
            with pytest.raises(InvalidInputError):
                await workload.validate(audience, token)
    shown = capsys.readouterr()
    for part in (genuine.body[:24], genuine.signature[:24]):
        assert part not in shown.out + shown.err


async def test_one_connection_holds_a_bounded_number_of_streams(world: World) -> None:
    async with await world.agent() as agent, Workload(world.socket()) as other:
        current = agent.identity.current
        assert current is not None
        await world.create_entry("/web", parent=current.spiffe_id)
        await eventually(other.x509_svid)
        async with AsyncExitStack() as held, Workload(world.socket()) as greedy:
            for _ in range(64):
                await anext(await held.enter_async_context(greedy.x509_svids()))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await greedy.x509_svid()
            assert (await other.x509_svid()).svids
        assert (await other.x509_svid()).svids


@pytest.mark.parametrize(
    "header",
    [
        (),
        (("workload.spiffe.io", "TRUE"),),
        (("workload.spiffe.io", "true"), ("workload.spiffe.io", "true")),
        (("workload.spiffe.io", "true "),),
        (("workload.spiffe.io", "true,true"),),
        (("x-workload.spiffe.io", "true"),),
    ],
)
async def test_calls_without_the_header_get_nothing(
    world: World, header: tuple[tuple[str, str], ...]
) -> None:
    async with await world.agent(), Workload(world.socket(), header) as bare:
        with pytest.raises(InvalidInputError):
            await bare.x509_svid()
        with pytest.raises(InvalidInputError):
            await bare.call("FetchJWTSVID", pb.JWTSVIDRequest(audience=["a"]), pb.JWTSVIDResponse)
        with pytest.raises(InvalidInputError):
            await bare.validate("a", "x.y.z")


async def test_requests_beyond_measure_are_refused(world: World) -> None:
    async with await world.agent() as agent, Workload(world.socket()) as workload:
        current = agent.identity.current
        assert current is not None
        await world.create_entry("/web", parent=current.spiffe_id)
        await eventually(workload.x509_svid)
        for audience in (["x" * 70_000], ["a"] * 65, ["a" * 20_000]):
            with pytest.raises(SpireHwError) as caught:
                await workload.jwt_svid(audience)
            assert caught.value.kind in {
                ErrorKind.INVALID_ARGUMENT,
                ErrorKind.RESOURCE_EXHAUSTED,
                ErrorKind.UNAVAILABLE,
            }
        assert (await workload.x509_svid()).svids

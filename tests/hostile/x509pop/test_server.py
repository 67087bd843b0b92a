"""Server half of x509pop against nodes that are not what they should be."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import secrets
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.config import hcl
from spire_hw.errors import (
    AttestationError,
    DeniedError,
    ErrorKind,
    InvalidInputError,
    LimitError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_plugins.nodeattestor.x509pop.server import X509PopServer, build
from spire_hw_sim.clock import SimClock
from spire_hw_sim.nodepki import PEM, Holder, make_root, rsa_key
from spire_hw_sim.pki import HOUR, Authority, now

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
URI = x509.UniformResourceIdentifier
Answer = dict[str, Any]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass
class Desk:
    """A configured server half and an agent that answers as a test says."""

    directory: Path
    bundle: Bundle | None = None
    banned: set[str] = field(default_factory=set)
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def open(self, config: str) -> X509PopServer:
        host = HostInfo(
            side=Side.SERVER,
            trust_domain=TD,
            data_dir=self.directory,
            log=get_logger("test"),
            clock=SimClock(now()),
            trust_bundle=None if self.bundle is None else lambda: self.bundle,  # type: ignore[arg-type,return-value]
        )
        plugin = build(host)
        body = hcl.parse(config, "server.conf")
        assert plugin.validate(body) == []
        await plugin.configure(body)
        return plugin

    async def trusting(self, *roots: Holder, more: str = "") -> X509PopServer:
        path = self.directory / "ca.pem"
        path.write_bytes(b"".join(root.certificate.public_bytes(PEM) for root in roots))
        return await self.open(f'ca_bundle_path = "{path}"\n{more}')

    async def attest(
        self,
        plugin: X509PopServer,
        node: Holder | bytes,
        *,
        answer: Callable[[dict[str, Any]], Answer | bytes] | None = None,
        address: str = "",
    ) -> AttestedIdentity:
        if isinstance(node, bytes):
            payload, respond = node, answer
        else:
            payload, respond = payload_of(*node.chain), answer or honest(node.key)

        async def challenge(data: bytes) -> bytes:
            asked = json.loads(data)
            self.asked.append(asked)
            assert respond is not None
            made = respond(asked)
            return made if isinstance(made, bytes) else json.dumps(made).encode()

        async def admit(identity: SpiffeId) -> None:
            if str(identity) in self.banned:
                raise DeniedError("banned")

        request = AttestationRequest(payload, challenge, None, admit, "", address)
        return await plugin.attest(request)


def payload_of(*certificates: bytes) -> bytes:
    return json.dumps({"certificates": [b64(c) for c in certificates]}).encode()


def signed(key: Any, server_nonce: bytes, own: bytes, salt: Any = padding.PSS.MAX_LENGTH) -> Answer:
    """Sign as upstream's agent does."""
    digest = hashlib.sha256(server_nonce + own).digest()
    hashed = utils.Prehashed(hashes.SHA256())
    if isinstance(key, rsa.RSAPrivateKey):
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), salt)
        made = {"nonce": b64(own), "signature": b64(key.sign(digest, pss, hashed))}
        return {"rsa_signature": made, "ecdsa_signature": None}
    r, s = utils.decode_dss_signature(key.sign(digest, ec.ECDSA(hashed)))
    halves = {n: b64(v.to_bytes((v.bit_length() + 7) // 8)) for n, v in (("r", r), ("s", s))}
    return {"rsa_signature": None, "ecdsa_signature": {"nonce": b64(own), **halves}}


def nonce_of(asked: dict[str, Any]) -> bytes:
    (member,) = [value for value in asked.values() if value is not None]
    return base64.b64decode(member["nonce"])


def honest(key: Any, **options: Any) -> Callable[[dict[str, Any]], Answer]:
    return lambda asked: signed(key, nonce_of(asked), secrets.token_bytes(32), **options)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(scope="module")
def root() -> Holder:
    return make_root()


# -- what is accepted ------------------------------------------------------------


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
async def test_ec_keys(desk: Desk, root: Holder, curve: ec.EllipticCurve) -> None:
    node = root.issue(ec.generate_private_key(curve))
    made = await desk.attest(await desk.trusting(root), node)
    fingerprint = hashlib.sha1(node.der, usedforsecurity=False).hexdigest()
    assert str(made.agent_id) == f"spiffe://example.org/spire/agent/x509pop/{fingerprint}"
    assert made.can_reattest
    assert desk.asked[0]["rsa_signature"] is None


@pytest.mark.parametrize("salt", [padding.PSS.MAX_LENGTH, 32, 20])
async def test_rsa_keys_whatever_their_salt(desk: Desk, root: Holder, salt: Any) -> None:
    node = root.issue(rsa_key())
    await desk.attest(await desk.trusting(root), node, answer=honest(node.key, salt=salt))
    assert desk.asked[0]["ecdsa_signature"] is None


async def test_selectors_are_upstreams(desk: Desk, root: Holder) -> None:
    middle = root.below()
    node = middle.issue(
        serial=0xABC,
        sans=[
            URI("x509pop://example.org/rack/r7"),
            URI("x509pop://example.org/zone/a/b%20c"),
            URI("x509pop://example.org/alone"),
            URI("x509pop://other.example/rack/r8"),
            URI("https://example.org/rack/r9"),
        ],
    )
    made = await desk.attest(await desk.trusting(root), node)
    shas = [hashlib.sha1(c.der, usedforsecurity=False).hexdigest() for c in (middle, root)]
    assert sorted(made.selector_values) == sorted(
        [
            "subject:cn:node-1",
            "serialnumber:0abc",
            "san:rack:r7",
            "san:zone:a/b c",
            *(f"ca:fingerprint:{sha}" for sha in shas),
        ]
    )


async def test_every_root_a_path_leads_to_is_a_selector(desk: Desk) -> None:
    one, other = make_root("Root One"), make_root("Root Two")
    middle = one.below()
    crossed = Holder(
        middle.key,
        other.issue(
            middle.key, common_name="Site Intermediate", ca=True, usage=("key_cert_sign",)
        ).certificate,
    )
    node = middle.issue()
    payload = payload_of(*node.chain, crossed.der)
    made = await desk.attest(await desk.trusting(one, other), payload, answer=honest(node.key))
    shas = {
        hashlib.sha1(c.der, usedforsecurity=False).hexdigest()
        for c in (one, other, middle, crossed)
    }
    assert {v for v in made.selector_values if v.startswith("ca:")} == {
        f"ca:fingerprint:{sha}" for sha in shas
    }


@pytest.mark.parametrize(
    "usages", [(), (ExtendedKeyUsageOID.CODE_SIGNING,), (ExtendedKeyUsageOID.CLIENT_AUTH,)]
)
async def test_extended_key_usage_does_not_matter(
    desk: Desk, root: Holder, usages: tuple[ObjectIdentifier, ...]
) -> None:
    await desk.attest(await desk.trusting(root), root.issue(extended=usages))


async def test_path_template(desk: Desk, root: Holder) -> None:
    plugin = await desk.trusting(root, more='agent_path_template = "/cn/{{ .Subject.CommonName }}"')
    made = await desk.attest(plugin, root.issue())
    assert made.agent_id.path == "/spire/agent/cn/node-1"


@pytest.mark.parametrize("name", ["", "../../server", "a/b/", "two words"])
async def test_names_that_make_no_path(desk: Desk, root: Holder, name: str) -> None:
    plugin = await desk.trusting(root, more='agent_path_template = "/cn/{{ .Subject.CommonName }}"')
    with pytest.raises(SpireHwError) as caught:
        await desk.attest(plugin, root.issue(common_name=name))
    assert caught.value.kind is ErrorKind.INTERNAL
    assert desk.asked == []


async def test_bundle_in_several_files(desk: Desk, tmp_path: Path) -> None:
    holders = [make_root(f"Root {n}") for n in range(2)]
    for number, holder in enumerate(holders):
        (tmp_path / f"{number}.pem").write_bytes(holder.certificate.public_bytes(PEM))
    plugin = await desk.open(f'ca_bundle_paths = ["{tmp_path}/0.pem", "{tmp_path}/1.pem"]')
    for holder in holders:
        await desk.attest(plugin, holder.issue())


# -- certificates ----------------------------------------------------------------


def hours(count: float) -> Any:
    return now() + count * HOUR


BAD_LEAVES: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"end": hours(-0.5)}, "has expired"),
    "not yet valid": ({"start": hours(1), "end": hours(2)}, "not valid before"),
    "no key usage": ({"usage": None}, "key_usage"),
    "other key usage": ({"usage": ("key_encipherment",)}, "key_usage"),
    "a CA": ({"ca": True, "usage": ("digital_signature", "key_cert_sign")}, "untrusted"),
    "unknown critical extension": (
        {"more": [x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")]},
        "untrusted",
    ),
}


@pytest.mark.parametrize("fields", BAD_LEAVES, ids=str)
async def test_leaves_that_will_not_do(desk: Desk, root: Holder, fields: str) -> None:
    given, words = BAD_LEAVES[fields]
    with pytest.raises(AttestationError) as caught:
        await desk.attest(await desk.trusting(root), root.issue(**given))
    assert words in caught.value.message
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED
    assert desk.asked == []


async def test_authorities_that_will_not_do(desk: Desk, root: Holder) -> None:
    plugin = await desk.trusting(root)
    stranger = make_root("Site Root")  # the same name
    chains = {
        "stranger": stranger.issue(),
        "stranger's intermediate": stranger.below().issue(),
        "expired intermediate": root.below(end=hours(-0.5)).issue(),
        "intermediate that is no CA": root.below(ca=False).issue(),
        "intermediate that may not sign": root.below(usage=("digital_signature",)).issue(),
        "path length": root.below(path_length=0).below(common_name="Deeper").issue(),
    }
    for name, node in chains.items():
        with pytest.raises(AttestationError) as caught:
            await desk.attest(plugin, node)
        assert "untrusted" in caught.value.message, name
    lonely = Holder(chains["stranger"].key, root.below().issue().certificate)
    with pytest.raises(AttestationError, match="no authority that is trusted here"):
        await desk.attest(plugin, lonely)
    assert desk.asked == []


async def test_expired_root(desk: Desk) -> None:
    old = make_root(start=hours(-3), end=hours(-1))
    with pytest.raises(AttestationError, match="expired"):
        await desk.attest(await desk.trusting(old), old.issue())


async def test_a_root_is_no_node(desk: Desk) -> None:
    root = make_root(usage=("key_cert_sign", "digital_signature"))
    with pytest.raises(AttestationError, match="untrusted"):
        await desk.attest(await desk.trusting(root), root)


async def test_number_of_intermediates(desk: Desk, root: Holder) -> None:
    holder = root
    for number in range(5):
        holder = holder.below(common_name=f"Level {number}")
    node = holder.issue()
    with pytest.raises(InvalidInputError, match="more than 4 intermediate"):
        await desk.attest(await desk.trusting(root), node)
    await desk.attest(await desk.trusting(root, more="max_intermediates = 5"), node)


@pytest.mark.parametrize("bits", [1024, 2047])
async def test_short_rsa_keys(desk: Desk, root: Holder, bits: int) -> None:
    node = root.issue(rsa_key(bits))
    with pytest.raises(InvalidInputError, match="RSA key has"):
        await desk.attest(await desk.trusting(root), node)


async def test_long_rsa_keys(desk: Desk, root: Holder) -> None:
    plugin = await desk.trusting(root, more="max_rsa_key_size = 2048")
    await desk.attest(plugin, root.issue(rsa_key()))
    with pytest.raises(InvalidInputError, match="more than 2048 bits"):
        await desk.attest(plugin, root.issue(rsa_key(2056)))


@pytest.mark.parametrize(
    "key",
    [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())],
    ids=["ed25519", "secp256k1"],
)
async def test_keys_of_other_kinds(desk: Desk, root: Holder, key: Any) -> None:
    with pytest.raises(InvalidInputError, match="certificate: node's own"):
        await desk.attest(await desk.trusting(root), root.issue(key))


# -- messages --------------------------------------------------------------------

BAD_PAYLOADS: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"\xff\xfe",
    "a list": b"[]",
    "no member": b"{}",
    "null": b'{"certificates": null}',
    "no certificate": b'{"certificates": []}',
    "text": b'{"certificates": "AAAA"}',
    "numbers": b'{"certificates": [1]}',
    "not base64": b'{"certificates": ["!!!"]}',
    "url-safe base64": b'{"certificates": ["_w=="]}',
    "unpadded": b'{"certificates": ["AA"]}',
    "not DER": b'{"certificates": ["AAAA"]}',
    "an empty one": b'{"certificates": [""]}',
    "twice": b'{"certificates": [], "certificates": ["AAAA"]}',
    "twice, other case": b'{"certificates": [], "Certificates": ["AAAA"]}',
    "deep": b'{"certificates": ' + b"[" * 60000,
    "two documents": b"{}{}",
}


@pytest.mark.parametrize("name", BAD_PAYLOADS)
async def test_payloads_that_do_not_parse(desk: Desk, root: Holder, name: str) -> None:
    with pytest.raises(InvalidInputError):
        await desk.attest(await desk.trusting(root), BAD_PAYLOADS[name])
    assert desk.asked == []


async def test_payload_that_is_too_large(desk: Desk, root: Holder) -> None:
    with pytest.raises(LimitError):
        await desk.attest(await desk.trusting(root), b" " * 70000)


async def test_certificates_cut_short_or_with_more_behind(desk: Desk, root: Holder) -> None:
    plugin = await desk.trusting(root)
    der = root.issue().der
    for wrong in (der[:-1], der + b"\0", der[: len(der) // 2], der + der):
        with pytest.raises(InvalidInputError, match="certificate: node's own"):
            await desk.attest(plugin, payload_of(wrong))
        with pytest.raises(InvalidInputError, match="certificate: intermediate 1"):
            await desk.attest(plugin, payload_of(der, wrong))


async def test_members_nobody_knows_are_passed_over(desk: Desk, root: Holder) -> None:
    node = root.issue()
    document = {"certificates": [b64(node.der)], "later": {"version": 9}}
    await desk.attest(
        await desk.trusting(root), json.dumps(document).encode(), answer=honest(node.key)
    )


def changed(change: Callable[[Answer], Answer | bytes | None], key: Any) -> Any:
    def answer(asked: dict[str, Any]) -> Answer | bytes:
        made = honest(key)(asked)
        found = change(made)
        return made if found is None else found

    return answer


def put(name: str, value: Any) -> Callable[[Answer], None]:
    def change(answer: Answer) -> None:
        member = next(v for v in answer.values() if v is not None)
        if value is None:
            del member[name]
        else:
            member[name] = value

    return change


ZERO32 = b64(bytes(32))
BAD_ANSWERS: dict[str, tuple[Callable[[Answer], Any], type[SpireHwError]]] = {
    "not JSON": (lambda _: b"{", InvalidInputError),
    "empty": (lambda _: b"", InvalidInputError),
    "neither": (lambda _: {}, InvalidInputError),
    "both null": (lambda _: {"rsa_signature": None, "ecdsa_signature": None}, InvalidInputError),
    "both": (
        lambda a: {"rsa_signature": a["ecdsa_signature"], "ecdsa_signature": a["ecdsa_signature"]},
        InvalidInputError,
    ),
    "too large": (lambda _: b" " * 20000, LimitError),
    "no nonce": (put("nonce", None), InvalidInputError),
    "short nonce": (put("nonce", b64(bytes(31))), InvalidInputError),
    "long nonce": (put("nonce", b64(bytes(33))), InvalidInputError),
    "empty nonce": (put("nonce", ""), InvalidInputError),
    "nonce not base64": (put("nonce", "x"), InvalidInputError),
    "nonce a number": (put("nonce", 7), InvalidInputError),
    "another nonce": (put("nonce", ZERO32), AttestationError),
    "no r": (put("r", None), InvalidInputError),
    "no s": (put("s", None), InvalidInputError),
    "r of zero": (put("r", b64(b"\0")), AttestationError),
    "s of zero": (put("s", b64(bytes(32))), AttestationError),
    "r too long": (put("r", b64(b"\1" * 2000)), InvalidInputError),
    "r beyond the order": (put("r", b64(b"\xff" * 32)), AttestationError),
    "s beyond the order": (put("s", b64(b"\xff" * 66)), AttestationError),
    "other r": (put("r", b64(b"\1" * 32)), AttestationError),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_answers_that_prove_nothing(desk: Desk, root: Holder, name: str) -> None:
    change, error = BAD_ANSWERS[name]
    node = root.issue()
    with pytest.raises(error):
        await desk.attest(await desk.trusting(root), node, answer=changed(change, node.key))
    assert len(desk.asked) == 1


async def test_rsa_answers_that_prove_nothing(desk: Desk, root: Holder) -> None:
    node, plugin = root.issue(rsa_key()), await desk.trusting(root)
    wrong = {
        "no signature": put("signature", None),
        "short": put("signature", b64(b"\1" * 255)),
        "long": put("signature", b64(b"\1" * 257)),
        "huge": put("signature", b64(b"\1" * 2000)),
        "zeros": put("signature", b64(bytes(256))),
        "beyond the modulus": put("signature", b64(b"\xff" * 256)),
    }
    for change in wrong.values():
        with pytest.raises((AttestationError, InvalidInputError)):
            await desk.attest(plugin, node, answer=changed(change, node.key))

    def pkcs1(asked: dict[str, Any]) -> Answer:
        own = secrets.token_bytes(32)
        digest = hashlib.sha256(nonce_of(asked) + own).digest()
        made = node.key.sign(digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))
        return {"rsa_signature": {"nonce": b64(own), "signature": b64(made)}}

    with pytest.raises(AttestationError, match="signature_mismatch"):
        await desk.attest(plugin, node, answer=pkcs1)


async def test_another_key_signs(desk: Desk, root: Holder) -> None:
    plugin = await desk.trusting(root)
    other = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(AttestationError, match="signature_mismatch"):
        await desk.attest(plugin, root.issue(), answer=honest(other))
    longer = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(AttestationError, match="signature_mismatch"):
        await desk.attest(plugin, root.issue(), answer=honest(longer))
    with pytest.raises(AttestationError, match="scheme_mismatch"):
        await desk.attest(plugin, root.issue(), answer=honest(rsa_key()))
    with pytest.raises(AttestationError, match="scheme_mismatch"):
        await desk.attest(plugin, root.issue(rsa_key()), answer=honest(other))


async def test_an_answer_fits_one_challenge(desk: Desk, root: Holder) -> None:
    node, plugin = root.issue(), await desk.trusting(root)
    seen: list[Answer] = []

    def remember(asked: dict[str, Any]) -> Answer:
        seen.append(honest(node.key)(asked))
        return seen[0]

    await desk.attest(plugin, node, answer=remember)
    with pytest.raises(AttestationError, match="signature_mismatch"):
        await desk.attest(plugin, node, answer=remember)
    nonces = {nonce_of(asked) for asked in desk.asked}
    assert len(nonces) == 2


async def test_a_nonce_is_not_sent_back(desk: Desk, root: Holder) -> None:
    node = root.issue()

    def mirror(asked: dict[str, Any]) -> Answer:
        return signed(node.key, nonce_of(asked), nonce_of(asked))

    with pytest.raises(AttestationError, match="nonce_reflected"):
        await desk.attest(await desk.trusting(root), node, answer=mirror)


async def test_a_signature_without_the_server_s_nonce(desk: Desk, root: Holder) -> None:
    node = root.issue()

    def alone(_: dict[str, Any]) -> Answer:
        return signed(node.key, bytes(32), secrets.token_bytes(32))

    with pytest.raises(AttestationError, match="signature_mismatch"):
        await desk.attest(await desk.trusting(root), node, answer=alone)


async def test_a_banned_node_is_asked_nothing(desk: Desk, root: Holder) -> None:
    node = root.issue()
    fingerprint = hashlib.sha1(node.der, usedforsecurity=False).hexdigest()
    desk.banned.add(f"spiffe://example.org/spire/agent/x509pop/{fingerprint}")
    with pytest.raises(DeniedError):
        await desk.attest(await desk.trusting(root), node)
    assert desk.asked == []


async def test_before_configure(desk: Desk, root: Holder) -> None:
    plugin = await desk.trusting(root)
    await plugin.close()
    with pytest.raises(NotReadyError):
        await desk.attest(plugin, root.issue())


# -- the agent's address ---------------------------------------------------------


async def test_address_of_the_caller(desk: Desk, root: Holder) -> None:
    plugin = await desk.trusting(root, more="verify_client_ip = true")
    addresses = [ipaddress.ip_address(a) for a in ("192.0.2.7", "2001:db8::7")]
    node = root.issue(sans=[x509.IPAddress(a) for a in addresses])
    for address in ("192.0.2.7", "2001:db8::7", "::ffff:192.0.2.7"):
        await desk.attest(plugin, node, address=address)
    for address in ("192.0.2.8", "2001:db8::8"):
        with pytest.raises(AttestationError, match="does not name the address"):
            await desk.attest(plugin, node, address=address)
    with pytest.raises(AttestationError, match="does not name the address"):
        await desk.attest(plugin, root.issue(), address="192.0.2.7")
    with pytest.raises(SpireHwError, match="address is not known") as caught:
        await desk.attest(plugin, node)
    assert caught.value.kind is ErrorKind.INTERNAL


# -- mode "spiffe" ---------------------------------------------------------------


@dataclass
class Exchange:
    """A desk in a trust domain with an authority of its own."""

    desk: Desk
    authority: Authority

    async def attest(self, plugin: X509PopServer, *uris: str, **fields: Any) -> AttestedIdentity:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self.authority.leaf(key.public_key(), "", uris=uris, **fields)
        return await self.desk.attest(plugin, payload_of(leaf), answer=honest(key))


@pytest.fixture
def exchange(desk: Desk) -> Exchange:
    authority = Authority("example.org")
    desk.bundle = authority.bundle()
    return Exchange(desk, authority)


async def test_an_svid_is_exchanged(exchange: Exchange) -> None:
    plugin = await exchange.desk.open('mode = "spiffe"')
    made = await exchange.attest(plugin, "spiffe://example.org/spire-exchange/rack/7")
    assert str(made.agent_id) == "spiffe://example.org/spire/agent/x509pop/rack/7"


@pytest.mark.parametrize("key", ["spiffe_prefix", "svid_prefix"])
@pytest.mark.parametrize("prefix", ["/boot", "/boot/"])
async def test_prefix(exchange: Exchange, key: str, prefix: str) -> None:
    plugin = await exchange.desk.open(f'mode = "spiffe"\n{key} = "{prefix}"')
    made = await exchange.attest(plugin, "spiffe://example.org/boot/7")
    assert made.agent_id.path == "/spire/agent/x509pop/7"
    for path in ("/booty/7", "/spire-exchange/7", "/boot"):
        with pytest.raises(AttestationError, match="svid_prefix"):
            await exchange.attest(plugin, f"spiffe://example.org{path}")


async def test_no_prefix(exchange: Exchange) -> None:
    plugin = await exchange.desk.open('mode = "spiffe"\nsvid_prefix = ""')
    made = await exchange.attest(plugin, "spiffe://example.org/any/7")
    assert made.agent_id.path == "/spire/agent/x509pop/any/7"


@pytest.mark.parametrize(
    ("uris", "words"),
    [
        (("spiffe://other.example/spire-exchange/7",), "foreign_svid"),
        (("https://example.org/spire-exchange/7",), "not_an_svid"),
        (("SPIFFE://example.org/spire-exchange/7",), "not_an_svid"),
        (("spiffe://example.org/spire-exchange/%2e%2e",), "not_an_svid"),
        (("spiffe://example.org/spire-exchange/../spire/server",), "not_an_svid"),
        (("spiffe://example.org/spire-exchange/7?a=b",), "not_an_svid"),
        (("spiffe://example.org/spire-exchange/7", "spiffe://example.org/x"), "not_an_svid"),
        (("spiffe://example.org/spire/agent/x509pop/7",), "svid_prefix"),
        (("spiffe://example.org",), "svid_prefix"),
    ],
)
async def test_svids_that_are_not_exchanged(
    exchange: Exchange, uris: tuple[str, ...], words: str
) -> None:
    plugin = await exchange.desk.open('mode = "spiffe"')
    with pytest.raises(AttestationError) as caught:
        await exchange.attest(plugin, *uris)
    assert words in caught.value.message
    assert exchange.desk.asked == []


async def test_authorities_of_the_trust_domain_as_they_are_now(exchange: Exchange) -> None:
    desk = exchange.desk
    plugin = await desk.open('mode = "spiffe"')
    uri = "spiffe://example.org/spire-exchange/7"
    await exchange.attest(plugin, uri)
    tainted = X509Root(exchange.authority.der, tainted=True)
    desk.bundle = replace(exchange.authority.bundle(), x509_authorities=(tainted,))
    with pytest.raises(AttestationError, match="untrusted"):
        await exchange.attest(plugin, uri)
    desk.bundle = Authority("example.org").bundle()
    with pytest.raises(AttestationError, match="untrusted"):
        await exchange.attest(plugin, uri)
    desk.bundle = exchange.authority.bundle()
    await exchange.attest(plugin, uri)
    with pytest.raises(AttestationError, match="expired"):
        await exchange.attest(plugin, uri, end=now() - timedelta(minutes=5))


# -- configuration ---------------------------------------------------------------

CA = 'ca_bundle_path = "/ca.pem"\n'
SPIFFE = 'mode = "spiffe"\n'


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "one of ca_bundle_path and ca_bundle_paths is required"),
        ("ca_bundle_paths = []", "one of ca_bundle_path and ca_bundle_paths is required"),
        (CA + 'ca_bundle_paths = ["/b.pem"]', "not both"),
        (CA + 'mode = "other"', "mode 'other' is unknown"),
        (CA + 'svid_prefix = "/x"', "svid_prefix is for mode spiffe"),
        (SPIFFE + CA, "cannot be used with mode spiffe"),
        (SPIFFE + 'svid_prefix = "/a"\nspiffe_prefix = "/a"', "set one"),
        (SPIFFE + 'svid_prefix = "a"', "must start with a slash"),
        (CA + "max_intermediates = 0", "max_intermediates must be 1 to 9"),
        (CA + "max_intermediates = 10", "max_intermediates must be 1 to 9"),
        (CA + "max_rsa_key_size = 0", "greater than 0"),
        (CA + 'agent_path_template = "/{{ .A"', "not closed"),
        (CA + "unknown = 1", "unknown key"),
    ],
)
async def test_configurations_that_cannot_be_used(desk: Desk, config: str, words: str) -> None:
    desk.bundle = Bundle(TD)
    with pytest.raises(AssertionError, match=words.replace("[", r"\[")):
        await desk.open(config)


async def test_mode_spiffe_needs_a_host_with_a_bundle(desk: Desk) -> None:
    with pytest.raises(AssertionError, match="tells its trust bundle"):
        await desk.open(SPIFFE)


@pytest.mark.parametrize("content", [None, b"", b"junk", b"x" * (5 << 20)])
async def test_bundles_that_cannot_be_used(
    desk: Desk, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((NotReadyError, InvalidInputError), match=str(path)):
        await desk.open(f'ca_bundle_path = "{path}"')

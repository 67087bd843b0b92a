"""A server that was taken over, with its key to the signer: what it asks for, and what comes of it.

Whatever is refused is in the audit log with its reason, and raises an alarm where policy was tried.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spire_hw._pb import hw_signer_admin_pb2 as admin_pb
from spire_hw._pb import hw_signer_pb2 as pb
from spire_hw.clock import SystemClock
from spire_hw.errors import ErrorKind, NotReadyError, SpireHwError
from spire_hw.jose.text import encode_base64url, encode_json
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.plugin.keymanager import KeyHealth
from spire_hw.rpc.client import connect_unix
from spire_hw.rpc.status import from_code
from spire_hw.x509 import der
from spire_hw_sim.liarsigner import write_client
from spire_hw_sim.remoterig import RemoteRig
from spire_hw_sim.signer import CLIENT_ID, SignerRig, client_policy
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
CA: Final = "x509-CA-A"
JWT: Final = "JWT-Signer-A"
OTHER: Final = "spiffe://infra.example/spire-server-2"
POLICY: Final = client_policy(raw="false") + client_policy(
    OTHER, trust_domain="other.org", server="s2", raw="true", keys='["x509-CA-*", "secret-*"]'
)
DAY: Final = timedelta(days=1)


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[SignerRig]:
    async with SignerRig(tmp_path, policy=POLICY) as made:
        yield made


async def records(rig: SignerRig) -> list[dict[str, Any]]:
    """Stop the signer and return what stands in its audit log."""
    await rig.hang_up()
    await rig.stop()
    return [
        json.loads(line)
        for file in sorted((rig.folder / "data").rglob("audit-*.log"))
        for line in file.read_text().splitlines()
    ]


async def refusals(rig: SignerRig) -> set[tuple[str, str]]:
    """Stop the signer; return client and reason of what was refused.

    A flood of the same refusals fills no disk: one line tells of several.
    """
    return {(r["client"], r["reason"]) for r in await records(rig) if r["kind"] == "refusal"}


def refused(result: Any, reason: str, kind: ErrorKind, what: str = "") -> None:
    assert not result.signature, what
    assert result.refusal.reason == reason, f"{what}: {result.refusal.message}"
    assert from_code(result.refusal.code, "").kind is kind


class Forger:
    """Certificates of every wrong kind, for a signing key that is the signer's."""

    def __init__(self, key: Any) -> None:
        self.public_key: Any = load_der_public_key(key.pkix_data)
        self.workload = ec.generate_private_key(ec.SECP256R1())

    def tbs(self, **changes: Any) -> bytes:
        """Return the body of an SVID as an honest server asks for it, but for the changes."""
        wanted: dict[str, Any] = {
            "uri": "spiffe://example.org/web",
            "ca": False,
            "key": self.workload.public_key(),
            "ttl": timedelta(hours=1),
            "aki": self.public_key,
            "start": SystemClock().now() - timedelta(seconds=10),
            "usage": (True, False),
            "path_length": None,
            "eku": True,
            "dns": "",
            "hash": hashes.SHA256(),
            **changes,
        }
        start: datetime = wanted["start"]
        signs, cert_sign = wanted["usage"]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SPIRE")]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SPIFFE")]))
            .public_key(wanted["key"])
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + wanted["ttl"])
            .add_extension(
                x509.BasicConstraints(ca=wanted["ca"], path_length=wanted["path_length"]),
                critical=True,
            )
            .add_extension(_usage(signs, cert_sign), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(wanted["aki"]), critical=False
            )
            .add_extension(
                x509.SubjectAlternativeName(
                    [
                        x509.UniformResourceIdentifier(wanted["uri"]),
                        *(x509.DNSName(name) for name in [wanted["dns"]] if name),
                    ]
                ),
                critical=False,
            )
        )
        if wanted["eku"]:
            uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        throwaway = ec.generate_private_key(ec.SECP256R1())
        return builder.sign(throwaway, wanted["hash"]).tbs_certificate_bytes

    def rewritten(self) -> bytes:
        """Return a leaf of the signing key, its point compressed."""
        usual, point = (
            self.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            self.public_key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint),
        )
        kind = der.sequence(der.oid("1.2.840.10045.2.1"), der.oid("1.2.840.10045.3.1.7"))
        other = der.sequence(kind, der.bit_string(point))
        content = der.Reader(self.tbs(key=self.public_key), "body").content(der.SEQUENCE)
        return der.sequence(content.replace(usual, other))

    def request(self, *names: str, own: bool = True, more: Any = None) -> bytes:
        """Return the body of a request for a certificate."""
        uris = [x509.UniformResourceIdentifier(name) for name in names]
        builder = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .add_extension(x509.SubjectAlternativeName(uris), critical=False)
        )
        if more is not None:
            builder = builder.add_extension(more, critical=False)
        made = builder.sign(self.workload, hashes.SHA256()).tbs_certrequest_bytes
        spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        theirs = self.workload.public_key().public_bytes(*spki)
        return made.replace(theirs, self.public_key.public_bytes(*spki)) if own else made

    def ca(self, **changes: Any) -> bytes:
        """Return the body of a CA certificate."""
        usage = {"ca": True, "usage": (False, True), "eku": False, "uri": "spiffe://example.org"}
        return self.tbs(**usage | changes)


def _usage(digital_signature: bool, cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=cert_sign,
        crl_sign=cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def stranger() -> Any:
    return ec.generate_private_key(ec.SECP256R1()).public_key()


FORGED: dict[str, Callable[[Forger], bytes]] = {
    "leaf that is a CA": lambda f: f.tbs(ca=True),
    "leaf that may sign certificates": lambda f: f.tbs(usage=(True, True)),
    "CA for another key": lambda f: f.ca(),
    "CA of another trust domain": lambda f: f.ca(key=f.public_key, uri="spiffe://evil.example"),
    "CA with a member's name": lambda f: f.ca(key=f.public_key, uri="spiffe://example.org/web"),
    "CA for ever": lambda f: f.ca(key=f.public_key, ttl=50 * 365 * DAY),
    "foreign trust domain": lambda f: f.tbs(uri="spiffe://evil.example/web"),
    "look-alike trust domain": lambda f: f.tbs(uri="spiffe://example.org.evil.example/web"),
    "trust domain itself": lambda f: f.tbs(uri="spiffe://example.org"),
    "not a SPIFFE ID": lambda f: f.tbs(uri="https://example.org/web"),
    "validity of 50 years": lambda f: f.tbs(ttl=50 * 365 * DAY),
    "validity of 25 hours": lambda f: f.tbs(ttl=timedelta(hours=25, minutes=2)),
    "starts in the past": lambda f: f.tbs(start=SystemClock().now() - DAY, ttl=2 * DAY),
    "another issuer's key id": lambda f: f.tbs(aki=stranger()),
    "another hash than said": lambda f: f.tbs(hash=hashes.SHA384()),
    "the CA's own key as a leaf": lambda f: f.tbs(key=f.public_key),
    "good for anything": lambda f: f.tbs(eku=False),
    "the CA's own key in another form": lambda f: f.rewritten(),
    "a DNS name with a zero in it": lambda f: f.tbs(dns="bank.example\0.example.org"),
    "bytes behind it": lambda f: f.tbs() + b"\0",
    "cut off": lambda f: f.tbs()[:-1],
    "nothing": lambda _: b"",
    "a whole certificate": lambda f: b"\x30\x82\x01\x00" + f.tbs(),
    "17 KiB": lambda _: b"\x30" + bytes(17 * 1024),
}


async def test_certificates_that_no_honest_server_asks_for(
    rig: SignerRig, capsys: pytest.CaptureFixture[str]
) -> None:
    forger = Forger((await rig.generate(CA)).public_key)
    assert (await rig.sign(CA, x509=forger.tbs())).signature  # the honest one
    for what, forge in FORGED.items():
        result = await rig.sign(CA, x509=forge(forger))
        refused(result, "tbs_policy", ErrorKind.PERMISSION_DENIED, what)
    assert await refusals(rig) == {(CLIENT_ID, "tbs_policy")}
    assert "Signer alarm" in "".join(capsys.readouterr())


OWN: Final = "spiffe://example.org"
BAD_REQUESTS: dict[str, Callable[[Forger], bytes]] = {
    "for the intruder's key": lambda f: f.request(OWN, own=False),
    "for another trust domain": lambda f: f.request("spiffe://evil.example"),
    "for a member": lambda f: f.request(f"{OWN}/web"),
    "for two": lambda f: f.request(OWN, "spiffe://evil.example"),
    "with what a CA may be for": lambda f: f.request(
        OWN, more=x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
    ),
    "with names it may sign for": lambda f: f.request(
        OWN, more=x509.NameConstraints([x509.DNSName("bank.example")], None)
    ),
    "that is a certificate": lambda f: f.tbs(),
    "nothing": lambda _: b"",
}


async def test_requests_that_no_honest_server_makes(
    rig: SignerRig, capsys: pytest.CaptureFixture[str]
) -> None:
    forger = Forger((await rig.generate(CA)).public_key)
    assert (await rig.sign(CA, csr=forger.request(OWN))).signature
    for what, forge in BAD_REQUESTS.items():
        result = await rig.sign(CA, csr=forge(forger))
        refused(result, "csr_policy", ErrorKind.PERMISSION_DENIED, what)
    # A certificate is not signed as a request, nor a request as a certificate.
    swapped = await rig.sign(CA, x509=forger.request(OWN))
    refused(swapped, "tbs_policy", ErrorKind.PERMISSION_DENIED)
    assert await refusals(rig) == {(CLIENT_ID, "csr_policy"), (CLIENT_ID, "tbs_policy")}
    assert "Signer alarm" in "".join(capsys.readouterr())


def token(**changes: Any) -> bytes:
    """Return what an honest server asks to sign as a token, but for the changes."""
    now = int(SystemClock().now().timestamp())
    header = {"alg": "ES256", "kid": "k1", "typ": "JWT"}
    claims = {"sub": "spiffe://example.org/web", "aud": ["db"], "exp": now + 300, "iat": now}
    for name, value in changes.items():
        part = header if name in {"alg", "kid", "typ", "crit", "jwk"} else claims
        if value is None:
            del part[name]
        else:
            part[name] = value
    return b".".join(encode_base64url(encode_json(p)).encode() for p in (header, claims))


BAD_TOKENS: dict[str, Callable[[], bytes]] = {
    "foreign subject": lambda: token(sub="spiffe://evil.example/web"),
    "subject is the trust domain": lambda: token(sub="spiffe://example.org"),
    "no subject": lambda: token(sub=None),
    "no end": lambda: token(exp=None),
    "ends in a year": lambda: token(exp=int(SystemClock().now().timestamp()) + 365 * 86400),
    "ends in 1e400": lambda: token(exp=10**400),
    "no audience": lambda: token(aud=[]),
    "alg none": lambda: token(alg="none"),
    "alg of another key": lambda: token(alg="RS256"),
    "critical header": lambda: token(crit=["x"]),
    "a key in the header": lambda: token(jwk={"kty": "EC"}),
    "other type": lambda: token(typ="at+jwt"),
    "members twice": lambda: (
        token().partition(b".")[0]
        + b"."
        + encode_base64url(b'{"sub":"spiffe://example.org/a","sub":"spiffe://e/b"}').encode()
    ),
    "three parts": lambda: token() + b".e30",
    "no dot": lambda: token().replace(b".", b""),
}


async def test_tokens_that_no_honest_server_asks_for(
    rig: SignerRig, capsys: pytest.CaptureFixture[str]
) -> None:
    await rig.generate(JWT)
    assert (await rig.sign(JWT, jwt=token())).signature
    for what, forge in BAD_TOKENS.items():
        result = await rig.sign(JWT, jwt=forge())
        refused(result, "jwt_policy", ErrorKind.PERMISSION_DENIED, what)
    assert await refusals(rig) == {(CLIENT_ID, "jwt_policy")}
    assert "Signer alarm" in "".join(capsys.readouterr())


async def test_bare_digests_and_keys_of_the_wrong_purpose(rig: SignerRig) -> None:
    await rig.generate(CA)
    await rig.generate(JWT)
    digest = hashlib.sha256(Forger((await rig.generate("x509-CA-B")).public_key).tbs()).digest()
    refused(await rig.sign(CA, digest=digest), "raw_denied", ErrorKind.PERMISSION_DENIED)
    refused(await rig.sign(CA, jwt=token()), "purpose", ErrorKind.PERMISSION_DENIED)
    body = Forger((await rig.call("GetPublicKeys", pb.GetPublicKeysRequest())).public_keys[1]).tbs()
    refused(await rig.sign(JWT, x509=body), "purpose", ErrorKind.PERMISSION_DENIED)
    assert await refusals(rig) == {(CLIENT_ID, "purpose"), (CLIENT_ID, "raw_denied")}


async def test_other_keys_look_the_same_whether_or_not_they_exist(rig: SignerRig) -> None:
    other = await rig.channel(rig.authority.identity(OTHER))
    assert (await rig.generate("secret-1", channel=other)).public_key.pkix_data
    there = await rig.sign("secret-1", digest=bytes(32))
    absent = await rig.sign("secret-2", digest=bytes(32))
    for result in (there, absent):
        refused(result, "key_id", ErrorKind.PERMISSION_DENIED)
    assert there.refusal.message == absent.refusal.message
    for key_id in ("secret-1", "secret-2", "audit-log"):
        answer = await rig.generate(key_id)
        assert answer.refusal.reason == "key_id"
        assert not answer.HasField("public_key")
    listed = await rig.call("GetPublicKeys", pb.GetPublicKeysRequest())
    assert list(listed.public_keys) == []
    # The same id is another key for another client: both have an `x509-CA-A`.
    mine = (await rig.generate(CA)).public_key
    theirs = (await rig.generate(CA, channel=other)).public_key
    assert mine.fingerprint != theirs.fingerprint
    assert await refusals(rig) == {(CLIENT_ID, "key_id")}


async def test_ids_that_are_tricks(rig: SignerRig) -> None:
    await rig.generate(CA)
    for key_id in ("", "x" * 10_000, CA + "\0", "../" + CA, "x509-CA-\u0391", CA + " "):
        refused(await rig.sign(key_id, jwt=token()), "malformed", ErrorKind.INVALID_ARGUMENT)
    refused(await rig.sign(CA.lower(), jwt=token()), "key_id", ErrorKind.PERMISSION_DENIED)
    assert await refusals(rig) == {(CLIENT_ID, "malformed"), (CLIENT_ID, "key_id")}


async def test_the_live_key_is_not_swapped(
    rig: SignerRig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (await rig.generate(CA)).public_key
    assert (await rig.sign(CA, x509=Forger(before).tbs())).signature
    answer = await rig.generate(CA)
    assert answer.refusal.reason == "replace_active"
    (listed,) = (await rig.call("GetPublicKeys", pb.GetPublicKeysRequest())).public_keys
    assert listed.fingerprint == before.fingerprint
    # Not after a restart either: when it signed is on the disk.
    await rig.restart()
    assert (await rig.generate(CA)).refusal.reason == "replace_active"
    assert "Signer alarm" in "".join(capsys.readouterr())
    assert await refusals(rig) == {(CLIENT_ID, "replace_active")}


async def test_who_lies_low_long_enough_swaps_a_key_and_an_operator_takes_it_back(
    tmp_path: Path,
) -> None:
    async with SignerRig(tmp_path, policy=client_policy(active_window='"1s"')) as rig:
        before = (await rig.generate(CA)).public_key
        assert (await rig.sign(CA, x509=Forger(before).tbs())).signature
        async with asyncio.timeout(60):
            while (answer := await rig.generate(CA)).HasField("refusal"):
                assert answer.refusal.reason == "replace_active"
                await asyncio.sleep(answer.refusal.retry_after_ms / 1000)
        assert answer.public_key.fingerprint != before.fingerprint
        order = admin_pb.CarryOutRequest.Direct(
            action="key.restore", target=f"example.org/s1/{CA}@1", comment="swapped by the intruder"
        )
        async with connect_unix(rig.admin_socket) as channel:
            await channel.unary(
                "/spire_hw.signer.v1.SignerAdmin/CarryOut",
                admin_pb.CarryOutRequest(direct=order),
                admin_pb.CarryOutResponse,
                timeout_s=30,
            )
        (listed,) = (await rig.call("GetPublicKeys", pb.GetPublicKeysRequest())).public_keys
        assert listed.fingerprint == before.fingerprint
        assert (await rig.sign(CA, x509=Forger(before).tbs())).signature
        log = await records(rig)
        made = [r["made_fingerprint"] for r in log if r.get("made_generation")]
        assert made == [before.fingerprint, answer.public_key.fingerprint]
        assert [r["action"] for r in log if r["kind"] == "order"] == ["key.restore"]


async def test_a_flood_of_generations_ends_at_the_budget(tmp_path: Path) -> None:
    policy = client_policy(generate='{ per_key_min_interval = "0s" per_day = 5 }')
    async with SignerRig(tmp_path, policy=policy) as rig:
        answers = [await rig.generate(f"x509-CA-{'AB'[n % 2]}") for n in range(12)]
        assert [a.refusal.reason for a in answers] == [""] * 5 + ["generate_budget"] * 7
        assert all(
            from_code(a.refusal.code, "").kind is ErrorKind.RESOURCE_EXHAUSTED for a in answers[5:]
        )
        await rig.restart()
        assert (await rig.generate(CA)).refusal.reason == "generate_budget"
        assert await refusals(rig) == {(CLIENT_ID, "generate_budget")}


async def test_a_flood_of_signatures_is_held_and_told_when_to_come_back(tmp_path: Path) -> None:
    policy = client_policy(sign_rate='{ "*" = "5/s burst 10" }')
    async with SignerRig(tmp_path, policy=policy) as rig:
        await rig.generate(JWT)
        items = [
            pb.SignItem(request_id=secrets.token_bytes(16), key_id=JWT, hash=5, jwt=token())
            for _ in range(64)
        ]
        answer = await rig.call("Sign", pb.SignRequest(items=items))
        signed = [r for r in answer.results if r.signature]
        assert 10 <= len(signed) <= 12
        for result in answer.results:
            if not result.signature:
                refused(result, "rate", ErrorKind.RESOURCE_EXHAUSTED)
                assert result.refusal.retry_after_ms > 0
        assert await refusals(rig) == {(CLIENT_ID, "rate")}


async def test_a_request_id_used_again_for_something_else(
    rig: SignerRig, capsys: pytest.CaptureFixture[str]
) -> None:
    forger = Forger((await rig.generate(CA)).public_key)
    request_id, body = secrets.token_bytes(16), forger.tbs()
    first = await rig.sign(CA, request_id=request_id, x509=body)
    again = await rig.sign(CA, request_id=request_id, x509=body)
    assert first.signature == again.signature  # a retry: signed once
    other = await rig.sign(CA, request_id=request_id, x509=forger.tbs())
    refused(other, "request_id_reused", ErrorKind.ALREADY_EXISTS)
    generation = secrets.token_bytes(16)
    made = await rig.generate(JWT, request_id=generation)
    assert (await rig.generate(JWT, request_id=generation)).public_key == made.public_key
    assert (
        await rig.generate("JWT-Signer-B", request_id=generation)
    ).refusal.reason == "request_id_reused"
    log = await records(rig)
    signed = [r for r in log if r["kind"] == "intent" and r["request"] == request_id.hex()]
    assert len(signed) == 1
    told = {r["reason"] for r in log if r["kind"] == "refusal"}
    assert told == {"request_id_reused"}
    assert "Signer alarm" in "".join(capsys.readouterr())


async def test_a_moved_clock_stops_what_cannot_be_judged(tmp_path: Path) -> None:
    clock = MovedClock()
    async with SignerRig(tmp_path, policy=POLICY, clock=clock) as rig:
        forger = Forger((await rig.generate(CA)).public_key)
        await rig.generate(JWT)
        for offset in (timedelta(minutes=10), timedelta(minutes=-10)):
            clock.offset = offset
            body = forger.tbs(start=clock.now() - timedelta(seconds=1))
            refused(await rig.sign(CA, x509=body), "clock_skew", ErrorKind.FAILED_PRECONDITION)
            refused(await rig.sign(JWT, jwt=token()), "clock_skew", ErrorKind.FAILED_PRECONDITION)
        clock.offset = timedelta()
        assert (await rig.sign(CA, x509=forger.tbs())).signature
        assert await refusals(rig) == {(CLIENT_ID, "clock_skew")}


class MovedClock(SystemClock):
    """The machine's time with somebody's hand on its wall clock."""

    offset = timedelta()

    def now(self) -> datetime:
        """Return the wall clock's time."""
        return super().now() + self.offset


async def test_everything_else_is_no_call_at_all(rig: SignerRig) -> None:
    for method in ("DeleteKey", "ExportKey", "ImportKey", "WrapKey", "ChangePin", "ReloadPolicy"):
        channel = await rig.channel()
        with pytest.raises(SpireHwError) as caught:
            await channel.unary(
                f"/spire_hw.signer.v1.Signer/{method}", b"", pb.LogHead, timeout_s=5
            )
        assert caught.value.kind is ErrorKind.UNIMPLEMENTED


class Victim:
    """A signer with a log that somebody meddles with, and a server that has witnessed it."""

    def __init__(self, folder: Path) -> None:
        self.rig = SignerRig(folder / "s", policy=client_policy(raw="true"))
        self.servers = RemoteRig(folder)
        self.servers.files = write_client(self.rig.authority, folder / "client")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.rig.port}"

    async def sign(self, count: int) -> None:
        """Have a server sign, on an address that stays the same."""
        manager = await self.servers.manager(self.line.address, require_witness=True)
        if await manager.get_public_keys() == []:
            await manager.generate_key(CA, KeyType.EC_P256)
        for _ in range(count):
            await manager.sign_data(CA, bytes(32), SignOptions(HashAlgorithm.SHA256))
        await manager.close()

    async def aim(self) -> None:
        """Lay the line to where the signer listens now."""
        if not hasattr(self, "line"):
            self.line = await self.servers.line(self.rig.port)
        self.line.aim(self.rig.port)

    def log_file(self) -> Path:
        (file,) = sorted((self.rig.folder / "data").rglob("audit-*.log"))
        return file


@pytest_asyncio.fixture
async def victim(tmp_path: Path) -> AsyncIterator[Victim]:
    made = Victim(tmp_path)
    async with made.rig, made.servers:
        await made.aim()
        yield made


@pytest.mark.parametrize("how", ["truncated", "an old one put back"])
async def test_a_log_that_lost_its_end_is_noticed_by_the_server(victim: Victim, how: str) -> None:
    await victim.sign(5)
    old = victim.log_file().read_bytes()
    if how == "an old one put back":
        await victim.sign(20)
    await victim.rig.hang_up()
    await victim.rig.stop()
    file = victim.log_file()
    if how == "truncated":
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-8]))
    else:
        file.write_bytes(old[: old.rindex(b"\n") + 1])
    try:
        await victim.rig.restart()
    except NotReadyError as e:  # the signer may know by itself: then nobody signs
        assert "log" in e.message  # noqa: PT017 - either is right
        return
    await victim.aim()
    with pytest.raises(NotReadyError, match="signer audit log rewound"):
        await victim.sign(1)
    # An alarm alone where a witness is not required.
    mild = await victim.servers.manager(victim.line.address, name="server")
    assert mild.key_health().health is KeyHealth.DEGRADED


@pytest.mark.parametrize("how", ["edited", "reordered", "a record missing"])
async def test_a_log_that_was_changed_stops_the_signer(victim: Victim, how: str) -> None:
    await victim.sign(10)
    await victim.rig.hang_up()
    await victim.rig.stop()
    file = victim.log_file()
    lines = file.read_bytes().splitlines(keepends=True)
    middle = len(lines) // 2
    if how == "edited":
        lines[middle] = (
            lines[middle]
            .replace(b"example.org", b"example.com", 1)
            .replace(b'"seq":', b'"seq": ', 1)
        )
    elif how == "reordered":
        lines[middle], lines[middle + 1] = lines[middle + 1], lines[middle]
    else:
        del lines[middle]
    file.write_bytes(b"".join(lines))
    with pytest.raises(NotReadyError, match="log"):
        await victim.rig.restart()
    assert file.read_bytes() == b"".join(lines)  # evidence is left as it is


async def test_whoever_is_shut_out_is_shut_out_now(rig: SignerRig) -> None:
    forger = Forger((await rig.generate(CA)).public_key)
    channel = await rig.channel()
    assert (await rig.sign(CA, channel=channel, x509=forger.tbs())).signature
    rig.write_policy(f'revoked = ["{CLIENT_ID}"]\n' + POLICY)
    assert await rig.signer.reload()
    with pytest.raises(SpireHwError) as caught:
        await rig.sign(CA, channel=channel, x509=forger.tbs())
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED


async def test_whoever_waits_for_a_key_is_shut_out_too(rig: SignerRig) -> None:
    before = (await rig.generate(CA)).public_key
    keys = next(k for o, k in rig.signer.live.owners.items() if o.server == "s1")
    async with keys.changing:  # the device is busy
        waiting = asyncio.gather(rig.generate("x509-CA-B"))
        async with asyncio.timeout(20):
            while all(t.get_name() != "generate key" for t in asyncio.all_tasks()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        rig.write_policy(f'{POLICY}\nrevoked = ["{CLIENT_ID}"]\n')
        assert await rig.signer.reload()
    with pytest.raises(SpireHwError) as caught:
        await waiting
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED
    assert [held.info.fingerprint for held in await keys.refresh()] == [before.fingerprint]
    assert (CLIENT_ID, "revoked") in await refusals(rig)


async def test_many_at_once_stay_within_the_rules(rig: SignerRig) -> None:
    """Good and bad in one batch: each is answered for itself, and only the good are signed."""
    forger = Forger((await rig.generate(CA)).public_key)
    good = [forger.tbs() for _ in range(20)]
    bad = [FORGED["leaf that is a CA"](forger) for _ in range(20)]
    items = [
        pb.SignItem(request_id=secrets.token_bytes(16), key_id=CA, hash=5, x509=body)
        for pair in zip(good, bad, strict=True)
        for body in pair
    ]
    answers = await asyncio.gather(
        rig.call("Sign", pb.SignRequest(items=items[:20])),
        rig.call("Sign", pb.SignRequest(items=items[20:])),
    )
    results = [r for answer in answers for r in answer.results]
    assert [bool(r.signature) for r in results] == [True, False] * 20
    log = await records(rig)
    done = [r for r in log if r["kind"] == "outcome" and r["result"] == "done"]
    assert len(done) == 20 + 1

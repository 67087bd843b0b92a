"""Callers that mean harm, and files and devices that fail: the numbered faults of a signer's host."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import socket
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID

from spire_hw._pb import hw_signer_pb2
from spire_hw.clock import SystemClock
from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.jose.text import encode_base64url
from spire_hw.key import KeyType, spki_der
from spire_hw.plugin.keymanager import ManagedSigner
from spire_hw.spiffeid import TrustDomain
from spire_hw.transport.mutual import MUTUAL_LIMITS
from spire_hw.x509.certificate import encode_pem
from spire_hw.x509.csr import build_csr
from spire_hw_signer import service
from spire_hw_signer.doors import LIMITS
from spire_hw_sim.clock import SimClock
from spire_hw_sim.liarsigner import write_client
from spire_hw_sim.pki import Authority
from spire_hw_sim.remoterig import RemoteRig
from spire_hw_sim.signer import (
    CLIENT_ID,
    INFRA,
    SERVICE,
    TIMEOUT_S,
    SignerRig,
    client_policy,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DIGEST = bytes(range(32))
LIST = hw_signer_pb2.GetPublicKeysRequest()
OTHER_ID = "spiffe://infra.example/spire-server-2"
HOUR = timedelta(hours=1)


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[SignerRig]:
    text = client_policy(raw="true") + client_policy(OTHER_ID, server="s2", raw="true")
    async with SignerRig(tmp_path, keys="disk", policy=text) as rig:
        yield rig


def records(rig: SignerRig) -> list[dict[str, Any]]:
    """Return all that stands in the audit log on the disk."""
    lines = []
    for path in sorted((rig.folder / "data" / "audit").glob("audit-*.log")):
        lines += path.read_bytes().splitlines()
    return [json.loads(line) for line in lines]


async def written(rig: SignerRig, kind: str, **members: object) -> list[dict[str, Any]]:
    """Return the records that have these members, once there is one."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            found = [r for r in records(rig) if r["kind"] == kind and members.items() <= r.items()]
            if found:
                return found
            await asyncio.sleep(0.01)


async def unauthenticated(rig: SignerRig, **how: Any) -> SpireHwError:
    with pytest.raises(SpireHwError) as caught:
        await rig.call("GetPublicKeys", LIST, **how)
    return caught.value


def code(result: Any) -> tuple[ErrorKind | None, str]:
    refusal = result.refusal
    return (ErrorKind(refusal.code) if refusal.code else None), refusal.reason


# -- 98: who is calling ------------------------------------------------------------------------


def raw_tls(rig: SignerRig, *, version: ssl.TLSVersion, with_certificate: bool) -> bytes:
    """Connect as plain OpenSSL does and return the first bytes of an answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if with_certificate:
        pem = rig.folder / "client.pem"
        key = rig.identity.private_key
        assert key is not None
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + x509.load_der_x509_certificate(rig.identity.chain_der[0]).public_bytes(
                serialization.Encoding.PEM
            )
        )
        context.load_cert_chain(pem)
    with (
        socket.create_connection(("127.0.0.1", rig.port), timeout=10) as plain,
        context.wrap_socket(plain) as secured,
    ):
        secured.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        return secured.recv(100)


@pytest.mark.asyncio
async def test_fault_98_no_certificate(rig: SignerRig) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.to_thread(
            raw_tls, rig, version=ssl.TLSVersion.TLSv1_3, with_certificate=False
        )
    found = await written(rig, "refusal", reason="unknown_client", method="TLS")
    assert found[0]["peer"] == "127.0.0.1"


@pytest.mark.asyncio
async def test_fault_98_an_older_tls(rig: SignerRig) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.to_thread(raw_tls, rig, version=ssl.TLSVersion.TLSv1_2, with_certificate=True)
    frame = await asyncio.to_thread(
        raw_tls, rig, version=ssl.TLSVersion.TLSv1_3, with_certificate=True
    )
    assert frame[3:4] == b"\x04"  # SETTINGS


@pytest.mark.asyncio
async def test_fault_98_certificates_of_others(rig: SignerRig) -> None:
    stranger = Authority(INFRA)
    bad = {
        "another authority": stranger.identity(CLIENT_ID),
        "expired": rig.authority.identity(
            CLIENT_ID, start=SystemClock().now() - 3 * HOUR, end=SystemClock().now() - HOUR
        ),
        "a CA": rig.authority.identity(CLIENT_ID, ca=True),
    }
    for name, identity in bad.items():
        error = await unauthenticated(rig, channel=await rig.channel(identity))
        assert error.kind in {ErrorKind.UNAVAILABLE, ErrorKind.UNAUTHENTICATED}, name
    assert await written(rig, "refusal", reason="unknown_client", method="TLS")


@pytest.mark.asyncio
async def test_fault_98_an_expired_certificate_is_named(rig: SignerRig) -> None:
    now = SystemClock().now()
    for authority, reason, client in (
        (rig.authority, "certificate_expired", CLIENT_ID),
        # Nobody whom it has to name: whoever likes writes such names.
        (Authority(INFRA), "unknown_client", ""),
    ):
        identity = authority.identity(CLIENT_ID, start=now - 3 * HOUR, end=now - HOUR)
        await unauthenticated(rig, channel=await rig.channel(identity))
        (found,) = await written(rig, "refusal", reason=reason, method="TLS")
        assert (found["client"], found["class"]) == (client, 1)
        assert bool(found["cert"]) is bool(client)


@pytest.mark.asyncio
async def test_fault_98_a_certificate_the_policy_does_not_know(rig: SignerRig) -> None:
    for spiffe_id in (
        "spiffe://infra.example/other",
        "spiffe://example.org/spire/server",
        "spiffe://infra.example/spire-server-1/x",
    ):
        channel = await rig.channel(rig.authority.identity(spiffe_id))
        error = await unauthenticated(rig, channel=channel)
        assert (error.kind, error.message) == (
            ErrorKind.UNAUTHENTICATED,
            "the client is not let in",
        )
        (found,) = await written(rig, "refusal", client=spiffe_id)
        assert (found["reason"], found["class"]) == ("unknown_client", 1)


@pytest.mark.asyncio
async def test_fault_98_revoked_and_from_another_address(tmp_path: Path) -> None:
    text = client_policy(raw="true", addresses='["10.0.0.0/8"]')
    async with SignerRig(tmp_path, keys="disk", policy=text) as rig:
        assert (await unauthenticated(rig)).kind is ErrorKind.UNAUTHENTICATED
        assert await written(rig, "refusal", reason="address")
        rig.write_policy(client_policy(raw="true"))
        assert await rig.signer.reload()
        await rig.call("GetPublicKeys", LIST)
        rig.write_policy(client_policy(raw="true") + f'revoked = ["{CLIENT_ID}"]\n')
        assert await rig.signer.reload()
        error = await unauthenticated(rig)
        assert error.message == "the client is not let in"
        assert await written(rig, "refusal", reason="revoked")


@pytest.mark.asyncio
async def test_fault_98_a_certificate_on_a_revocation_list(tmp_path: Path) -> None:
    rig = SignerRig(tmp_path, keys="disk")
    crl_file = tmp_path / "crl.pem"
    crl_file.write_bytes(crl(rig.authority))
    config = rig.config_file.read_text()
    line = f'crl_files = ["{crl_file}"]\n    client_ca_files'
    rig.config_file.write_text(config.replace("client_ca_files", line))
    rig.signer = rig._signer()
    async with rig:
        await rig.call("GetPublicKeys", LIST)
        serial = x509.load_der_x509_certificate(rig.identity.chain_der[0]).serial_number
        # With its issuer's name in another kind of text, too: that is the same name.
        for printable in (False, True):
            crl_file.write_bytes(crl(rig.authority, serial, printable=printable))
            assert await rig.signer.reload()
            assert (await unauthenticated(rig)).kind is ErrorKind.UNAUTHENTICATED
        crl_file.write_bytes(crl(Authority(INFRA)))
        assert not await rig.signer.reload()
        assert (await unauthenticated(rig)).kind is ErrorKind.UNAUTHENTICATED


@pytest.mark.asyncio
async def test_fault_98_an_intermediate_on_a_revocation_list(tmp_path: Path) -> None:
    rig = SignerRig(tmp_path, keys="disk")
    crl_file = tmp_path / "crl.pem"
    crl_file.write_bytes(crl(rig.authority))
    config = rig.config_file.read_text()
    line = f'crl_files = ["{crl_file}"]\n    client_ca_files'
    rig.config_file.write_text(config.replace("client_ca_files", line))
    rig.signer = rig._signer()
    lost, kept = rig.authority.below(), rig.authority.below()
    async with rig:
        stolen = await rig.channel(lost.identity(CLIENT_ID))
        honest = await rig.channel(kept.identity(CLIENT_ID))
        await rig.call("GetPublicKeys", LIST, channel=stolen)
        crl_file.write_bytes(crl(rig.authority, lost.certificate.serial_number))
        assert await rig.signer.reload()
        for channel in (stolen, await rig.channel(lost.identity(CLIENT_ID))):
            assert (await unauthenticated(rig, channel=channel)).kind is ErrorKind.UNAUTHENTICATED
        assert await written(rig, "refusal", reason="revoked", client=CLIENT_ID)
        await rig.call("GetPublicKeys", LIST, channel=honest)


@pytest.mark.asyncio
async def test_fault_98_an_authority_that_is_believed_no_more(rig: SignerRig) -> None:
    """Who is connected already is out as well, not only those who come later."""
    channel = await rig.channel()
    await rig.call("GetPublicKeys", LIST, channel=channel)
    other = Authority(INFRA)
    (rig.folder / "ca.pem").write_bytes(encode_pem([other.der]))
    assert await rig.signer.reload()
    assert (await unauthenticated(rig, channel=channel)).kind is ErrorKind.UNAUTHENTICATED
    assert await written(rig, "refusal", reason="unknown_client", client=CLIENT_ID)
    await rig.call("GetPublicKeys", LIST, channel=await rig.channel(other.identity(CLIENT_ID)))
    (rig.folder / "ca.pem").write_bytes(encode_pem([other.der, rig.authority.der]))
    assert await rig.signer.reload()
    await rig.call("GetPublicKeys", LIST, channel=channel)


def crl(authority: Authority, *serials: int, printable: bool = False) -> bytes:
    kind = _ASN1Type.PrintableString if printable else None
    name = x509.Name([x509.NameAttribute(a.oid, a.value, kind) for a in authority.name])
    return authority.revocation_list(*serials, name=name)


@pytest.mark.asyncio
async def test_fault_98_who_fails_much_is_not_listened_to(tmp_path: Path) -> None:
    clock = SimClock()
    newest = ssl.TLSVersion.TLSv1_3
    rig = SignerRig(tmp_path, keys="disk", clock=clock)
    rig.identity = long_lived(rig.authority)
    async with rig:
        for _ in range(30):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.to_thread(raw_tls, rig, version=newest, with_certificate=False)
        # The same source, with a good certificate: not even a handshake.
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(raw_tls, rig, version=newest, with_certificate=True)
        assert len([r for r in records(rig) if r["kind"] == "refusal"]) <= 1
        await clock.advance(timedelta(seconds=61))
        assert await asyncio.to_thread(raw_tls, rig, version=newest, with_certificate=True)


# -- 99, 100: key ids --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_fault_99_key_ids_of_another_client(tmp_path: Path) -> None:
    text = client_policy(raw="true") + client_policy(
        OTHER_ID, server="s2", raw="true", keys='["theirs", "also-theirs"]'
    )
    async with SignerRig(tmp_path, keys="disk", policy=text) as rig:
        other = await rig.channel(rig.authority.identity(OTHER_ID))
        await rig.generate("theirs", channel=other)
        answers = [await rig.sign(k, digest=DIGEST) for k in ("theirs", "also-theirs", "nobodys")]
        assert {a.SerializeToString() for a in answers} == {answers[0].SerializeToString()}
        assert code(answers[0]) == (ErrorKind.PERMISSION_DENIED, "key_id")
        made = [await rig.generate(k) for k in ("theirs", "also-theirs", "nobodys")]
        assert {m.refusal.SerializeToString() for m in made} == {
            made[0].refusal.SerializeToString()
        }
        assert (await rig.sign("theirs", digest=DIGEST, channel=other)).signature


BAD_IDS = [
    "",
    "x" * 256,
    "x" * 10_000,
    "x509-CA-A\0",
    "../x509-CA-A",
    "x509-CA-A/",
    "x509\u2010CA\u2010A",
    "\u0445509-CA-A",
    "x509-CA-A ",
    " x509-CA-A",
    "x509-CA-A\n",
    "x509-CA-\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("key_id", BAD_IDS)
async def test_fault_100_tricks_with_key_ids(rig: SignerRig, key_id: str) -> None:
    await rig.generate("x509-CA-A")
    assert code(await rig.sign(key_id, digest=DIGEST)) == (
        ErrorKind.INVALID_ARGUMENT,
        "malformed",
    )
    made = await rig.generate(key_id)
    assert code(made) == (ErrorKind.INVALID_ARGUMENT, "malformed")


@pytest.mark.asyncio
async def test_fault_100_another_case_is_another_id(rig: SignerRig) -> None:
    await rig.generate("x509-CA-A")
    assert code(await rig.sign("X509-ca-a", digest=DIGEST)) == (
        ErrorKind.PERMISSION_DENIED,
        "key_id",
    )


# -- 101: types, hashes, padding ---------------------------------------------------------------


@pytest.mark.asyncio
async def test_fault_101_outside_what_policy_allows(tmp_path: Path) -> None:
    text = client_policy(
        raw="true",
        types='{ "x509-CA-*" = ["ec-p256"], "JWT-*" = ["rsa-2048"] }',
        hash='{ "x509-CA-*" = ["sha256"], "*" = ["sha256", "sha384"] }',
    )
    async with SignerRig(tmp_path, keys="disk", policy=text) as rig:
        refused = await rig.generate("x509-CA-A", KeyType.EC_P384)
        assert code(refused) == (ErrorKind.PERMISSION_DENIED, "key_type")
        await rig.generate("x509-CA-A")
        await rig.generate("JWT-Signer-A", KeyType.RSA_2048)
        result = await rig.sign("x509-CA-A", hash_number=6, digest=bytes(48))
        assert code(result) == (ErrorKind.PERMISSION_DENIED, "hash")
        result = await rig.sign("x509-CA-A", digest=bytes(48))
        assert code(result) == (ErrorKind.INVALID_ARGUMENT, "digest_length")
        result = await rig.sign("x509-CA-A", digest=b"")
        assert code(result) == (ErrorKind.INVALID_ARGUMENT, "digest_length")
        item = hw_signer_pb2.SignItem(
            request_id=secrets.token_bytes(16), key_id="JWT-Signer-A", hash=5, digest=DIGEST
        )
        item.pss.salt_length = -1
        response = await rig.call("Sign", hw_signer_pb2.SignRequest(items=[item]))
        assert code(response.results[0]) == (ErrorKind.PERMISSION_DENIED, "padding")
        for salt in (-2, 100_000):
            item.pss.salt_length = salt
            response = await rig.call("Sign", hw_signer_pb2.SignRequest(items=[item]))
            assert code(response.results[0]) == (ErrorKind.INVALID_ARGUMENT, "malformed")


# -- 102, 103: generations ---------------------------------------------------------------------


@pytest.mark.asyncio
async def test_fault_102_swap_of_the_live_key(tmp_path: Path) -> None:
    clock = SimClock()
    rig = SignerRig(tmp_path, keys="disk", policy=client_policy(raw="true"), clock=clock)
    rig.identity = long_lived(rig.authority)
    async with rig:
        live = (await rig.generate("x509-CA-A")).public_key
        await rig.sign("x509-CA-A", digest=DIGEST)
        swapped = await rig.generate("x509-CA-A")
        assert code(swapped) == (ErrorKind.PERMISSION_DENIED, "replace_active")
        assert 0 < swapped.refusal.retry_after_ms <= 600_001
        assert await written(rig, "refusal", reason="replace_active", key="x509-CA-A")
        result = await rig.sign("x509-CA-A", digest=DIGEST)
        assert result.fingerprint == live.fingerprint
        await clock.advance(timedelta(seconds=601))
        again = await rig.generate("x509-CA-A")
        assert again.public_key.fingerprint != live.fingerprint


def long_lived(authority: Authority) -> Any:
    now = SystemClock().now()
    return authority.identity(CLIENT_ID, start=now - 24 * HOUR, end=now + 100_000 * HOUR)


@pytest.mark.parametrize(
    ("interval", "reason"), [("1m", "generate_interval"), ("0s", "replace_active")]
)
@pytest.mark.asyncio
async def test_fault_102_whoever_asks_again_for_a_ca_by_hand_is_told_when_it_will_work(
    tmp_path: Path, interval: str, reason: str
) -> None:
    """The request for a certificate is a signature: `ca csr -replace` has to wait for its key."""
    rule = f'{{ per_key_min_interval = "{interval}" per_day = 12 }}'
    rig = SignerRig(tmp_path / "s", keys="disk", policy=client_policy(generate=rule))
    async with rig, RemoteRig(tmp_path) as servers:
        servers.files = write_client(rig.authority, tmp_path / "client")
        manager = await servers.manager(f"127.0.0.1:{rig.port}")
        made = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
        signer = ManagedSigner(manager, "keymanager(remote)", made)
        await build_csr(signer, spiffe_id=TrustDomain("example.org").id)
        with pytest.raises(SpireHwError) as caught:
            await manager.generate_key("x509-CA-A", KeyType.EC_P256)
        said = re.search(r" s ago, .* it may work in (\d+) s \[(\w+)\]", caught.value.message)
        assert said is not None, caught.value.message
        assert said[2] == reason
        assert 0 <= 600 - int(said[1]) < 60


@pytest.mark.asyncio
async def test_fault_103_flood_of_generations(tmp_path: Path) -> None:
    text = client_policy(raw="true", generate='{ per_key_min_interval = "0s" per_day = 6 }')
    async with SignerRig(tmp_path, keys="disk", policy=text) as rig:
        made = [await rig.generate("x509-CA-A" if n % 2 else "x509-CA-B") for n in range(40)]
        assert [not m.refusal.code for m in made] == [True] * 6 + [False] * 34
        assert {code(m) for m in made[6:]} == {(ErrorKind.RESOURCE_EXHAUSTED, "generate_budget")}
        assert made[-1].refusal.retry_after_ms > 1000
        keys = json.loads((rig.folder / "data/owners/example.org@s1/keys.json").read_text())
        assert len(keys["keys"]) == 2


@pytest.mark.asyncio
async def test_fault_103_requests_do_not_pile_up(tmp_path: Path) -> None:
    rig = SignerRig(tmp_path, keys="disk", clock=SimClock())
    rig.identity = long_lived(rig.authority)
    async with rig:
        keys = next(iter(rig.signer.live.owners.values()))
        kinds = set()
        async with keys.changing:  # a device that takes its time; the callers do not wait for it
            for _ in range(4):
                calls = [
                    rig.call(
                        "GenerateKey",
                        hw_signer_pb2.GenerateKeyRequest(
                            request_id=secrets.token_bytes(16), key_id="x509-CA-A", key_type=1
                        ),
                        timeout_s=0.5,
                    )
                    for _ in range(60)
                ]
                answers = await asyncio.gather(*calls, return_exceptions=True)
                kinds |= {a.kind for a in answers if isinstance(a, SpireHwError)}
            waiting = [t for t in asyncio.all_tasks() if t.get_name() == "generate key"]
            assert 0 < len(waiting) <= 100
        assert ErrorKind.RESOURCE_EXHAUSTED in kinds


@pytest.mark.asyncio
async def test_a_key_that_was_made_stands_in_the_log_though_notes_fail(
    rig: SignerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = next(k for o, k in rig.signer.live.owners.items() if o.server == "s1")
    make, path = keys.manager.generate_key, keys.notes._path

    async def make_and_lose_the_disk(key_id: str, key_type: KeyType) -> Any:
        made = await make(key_id, key_type)
        keys.notes._path = path.parent / "gone" / path.name
        return made

    monkeypatch.setattr(keys.manager, "generate_key", make_and_lose_the_disk)
    request_id = secrets.token_bytes(16)
    made = (await rig.generate("x509-CA-A", request_id=request_id)).public_key
    (outcome,) = await written(rig, "outcome", result="done")
    assert outcome["made_fingerprint"] == made.fingerprint
    assert code(await rig.sign("x509-CA-A", digest=DIGEST))[0] is ErrorKind.UNAVAILABLE
    keys.notes._path = path
    assert (await rig.sign("x509-CA-A", digest=DIGEST)).signature
    assert (await rig.generate("x509-CA-A", request_id=request_id)).public_key == made


@pytest.mark.asyncio
async def test_a_generation_that_a_stop_cuts_off_has_an_unknown_outcome(
    rig: SignerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = next(k for o, k in rig.signer.live.owners.items() if o.server == "s1")

    async def hang(_key_id: str, _key_type: KeyType) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(keys.manager, "generate_key", hang)
    request = hw_signer_pb2.GenerateKeyRequest(
        request_id=secrets.token_bytes(16), key_id="x509-CA-A", key_type=1
    )
    with pytest.raises(SpireHwError):
        await rig.call("GenerateKey", request, timeout_s=0.5)
    (asked,) = await written(rig, "intent", method="GenerateKey")
    await rig.restart()
    (outcome,) = await written(rig, "outcome", intent=asked["seq"])
    assert outcome["result"] == "unknown"


@pytest.mark.asyncio
async def test_fault_103_one_key_again_and_again(tmp_path: Path) -> None:
    text = client_policy(raw="true", generate='{ per_key_min_interval = "1h" per_day = 100 }')
    async with SignerRig(tmp_path, keys="disk", policy=text) as rig:
        await rig.generate("x509-CA-A")
        assert code(await rig.generate("x509-CA-A")) == (
            ErrorKind.RESOURCE_EXHAUSTED,
            "generate_interval",
        )
        assert not (await rig.generate("x509-CA-B")).refusal.code


# -- 104: signatures ---------------------------------------------------------------------------


def batch(key_id: str, count: int = 64) -> Any:
    return hw_signer_pb2.SignRequest(
        items=[
            hw_signer_pb2.SignItem(
                request_id=secrets.token_bytes(16), key_id=key_id, hash=5, digest=DIGEST
            )
            for _ in range(count)
        ]
    )


@pytest.mark.asyncio
async def test_fault_104_flood_of_signatures(tmp_path: Path) -> None:
    text = client_policy(
        raw="true", sign_rate='{ "*" = "50/s burst 100" }', client_rate='"60/s"'
    ) + client_policy(OTHER_ID, server="s2", raw="true")
    # Time stands still: what is let through is the burst, however slow the machine is.
    async with SignerRig(tmp_path, keys="disk", policy=text, clock=SimClock()) as rig:
        other = await rig.channel(rig.authority.identity(OTHER_ID))
        await rig.generate("x509-CA-A")
        await rig.generate("x509-CA-A", channel=other)
        flood = asyncio.gather(*(rig.call("Sign", batch("x509-CA-A")) for _ in range(60)))
        others = [await rig.sign("x509-CA-A", digest=DIGEST, channel=other) for _ in range(20)]
        answers = [r for response in await flood for r in response.results]
        assert all(o.signature for o in others)
        signed = [a for a in answers if a.signature]
        assert len(signed) == 60
        refused = {code(a) for a in answers if not a.signature}
        assert refused == {(ErrorKind.RESOURCE_EXHAUSTED, "client_rate")}
        assert all(a.refusal.retry_after_ms for a in answers if not a.signature)
        # One record a second of what repeats, not one for each.
        assert len([r for r in records(rig) if r["kind"] == "refusal"]) < 100


@pytest.mark.asyncio
async def test_fault_104_too_many_at_once(tmp_path: Path) -> None:
    text = client_policy(raw="true", max_in_flight="10")
    async with SignerRig(tmp_path, keys="disk", policy=text) as rig:
        await rig.generate("x509-CA-A")
        response = await rig.call("Sign", batch("x509-CA-A", 30))
        assert sum(bool(r.signature) for r in response.results) == 10
        assert code(response.results[-1]) == (ErrorKind.RESOURCE_EXHAUSTED, "in_flight")
        response = await rig.call("Sign", batch("x509-CA-A", 10))
        assert all(r.signature for r in response.results)


# -- 105: replays ------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_fault_105_request_id_with_other_content(rig: SignerRig) -> None:
    await rig.generate("x509-CA-A")
    await rig.generate("x509-CA-B")
    request_id = secrets.token_bytes(16)
    first = await rig.sign("x509-CA-A", request_id=request_id, digest=DIGEST)
    for key_id, digest in (("x509-CA-A", bytes(32)), ("x509-CA-B", DIGEST)):
        result = await rig.sign(key_id, request_id=request_id, digest=digest)
        assert code(result) == (ErrorKind.ALREADY_EXISTS, "request_id_reused")
    again = await rig.sign("x509-CA-A", request_id=request_id, digest=DIGEST)
    assert again == first
    assert await written(rig, "refusal", reason="request_id_reused")
    for short in (b"x", b"x" * 17):
        result = await rig.sign("x509-CA-A", request_id=short, digest=DIGEST)
        assert code(result) == (ErrorKind.INVALID_ARGUMENT, "malformed")


@pytest.mark.asyncio
async def test_fault_105_ids_of_one_client_say_nothing_about_anothers(rig: SignerRig) -> None:
    other = await rig.channel(rig.authority.identity(OTHER_ID))
    await rig.generate("x509-CA-A")
    await rig.generate("x509-CA-A", channel=other)
    request_id = secrets.token_bytes(16)
    mine = await rig.sign("x509-CA-A", request_id=request_id, digest=DIGEST)
    theirs = await rig.sign("x509-CA-A", request_id=request_id, digest=bytes(32), channel=other)
    assert mine.signature
    assert theirs.signature


# -- 106: sizes, slowness, numbers -------------------------------------------------------------


@pytest.mark.asyncio
async def test_fault_106_a_call_without_a_deadline(rig: SignerRig) -> None:
    with pytest.raises(SpireHwError, match="deadline") as caught:
        await rig.call("GetPublicKeys", LIST, timeout_s=None)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


@pytest.mark.asyncio
async def test_fault_106_an_oversize_message(rig: SignerRig) -> None:
    await rig.generate("x509-CA-A")
    with pytest.raises(SpireHwError) as caught:
        await rig.sign("x509-CA-A", x509=bytes(70_000))
    assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED
    result = await rig.sign("x509-CA-A", x509=bytes(40_000))
    assert code(result) == (ErrorKind.PERMISSION_DENIED, "tbs_policy")
    assert (await rig.sign("x509-CA-A", digest=DIGEST)).signature


@pytest.mark.asyncio
async def test_fault_106_bytes_that_are_no_message(rig: SignerRig) -> None:
    channel = await rig.channel()
    with pytest.raises(SpireHwError) as caught:
        await channel.unary(
            SERVICE + "Sign", b"\xff" * 50, hw_signer_pb2.SignResponse, timeout_s=TIMEOUT_S
        )
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


@pytest.mark.asyncio
async def test_fault_106_many_connections_of_one_source(rig: SignerRig) -> None:
    opened = []
    for _ in range(MUTUAL_LIMITS.max_per_caller * 3):
        _reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        opened.append(writer)
    front = rig.signer._doors._front  # type: ignore[union-attr]
    assert front is not None
    assert front.connections <= MUTUAL_LIMITS.max_per_caller
    for writer in opened:
        writer.close()
    async with asyncio.timeout(TIMEOUT_S):
        while front.connections:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


def test_fault_106_one_source_leaves_room_for_others() -> None:
    most = MUTUAL_LIMITS.max_per_caller * LIMITS.max_streams
    assert LIMITS.max_calls is not None
    assert LIMITS.max_calls >= 2 * most


@pytest.mark.asyncio
async def test_fault_106_who_says_nothing_is_hung_up_on(rig: SignerRig) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a handshake, and no more
    async with asyncio.timeout(MUTUAL_LIMITS.handshake_s + TIMEOUT_S):
        assert await reader.read() == b""
    writer.close()


# -- 107: what is to be signed -----------------------------------------------------------------


def body(key: Any, **more: Any) -> bytes:
    """Return the body of a leaf that the key would sign, good unless told otherwise."""
    now = SystemClock().now()
    values: dict[str, Any] = {
        "uri": "spiffe://example.org/web",
        "end": now + HOUR,
        "ca": False,
        "issuer": key,
        **more,
    }
    issuer = serialization.load_der_public_key(values["issuer"])
    throw_away = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "SPIRE")])
    ca = values["ca"]
    usage = x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(throw_away.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(seconds=10))
        .not_valid_after(values["end"])
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer),  # type: ignore[arg-type]
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(values["uri"])]),
            critical=False,
        )
    )
    if not ca:
        uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(uses, critical=False)
    return builder.sign(throw_away, hashes.SHA256()).tbs_certificate_bytes


@pytest.mark.asyncio
async def test_fault_107_certificates_against_policy(rig: SignerRig) -> None:
    key = (await rig.generate("x509-CA-A")).public_key.pkix_data
    other = spki_der(ec.generate_private_key(ec.SECP256R1()).public_key())
    now = SystemClock().now()
    assert (await rig.sign("x509-CA-A", x509=body(key))).signature
    bad = {
        "CA of another trust domain": body(key, ca=True, uri="spiffe://evil.org"),
        "leaf with CA set": body(key, ca=True),
        "CA for another key": body(key, ca=True, uri="spiffe://example.org"),
        "another trust domain": body(key, uri="spiffe://evil.org/web"),
        "fifty years": body(key, end=now + 50 * 365 * 24 * HOUR),
        "another issuer": body(key, issuer=other),
        "not a certificate": b"\x30\x03\x02\x01\x05",
    }
    for name, tbs in bad.items():
        result = await rig.sign("x509-CA-A", x509=tbs)
        assert code(result) == (ErrorKind.PERMISSION_DENIED, "tbs_policy"), name
        assert result.refusal.message.startswith("tbs_policy: "), name
    assert await written(rig, "refusal", reason="tbs_policy", key="x509-CA-A")


@pytest.mark.asyncio
async def test_fault_107_tokens_against_policy(rig: SignerRig) -> None:
    await rig.generate("JWT-Signer-A")
    await rig.generate("JWT-Signer-B")
    now = int(SystemClock().now().timestamp())

    def token(kid: str = "a", **claims: object) -> bytes:
        header = {"alg": "ES256", "kid": kid, "typ": "JWT"}
        good = {"sub": "spiffe://example.org/web", "aud": ["x"], "exp": now + 300, **claims}
        parts = (encode_base64url(json.dumps(p).encode()) for p in (header, good))
        return ".".join(parts).encode()

    assert (await rig.sign("JWT-Signer-A", jwt=token())).signature
    for bad in (
        token(sub="spiffe://evil.org/web"),
        token(exp=now + 10**6),
        token(iss="https://evil.org"),
        b"e30.e30",
    ):
        result = await rig.sign("JWT-Signer-A", jwt=bad)
        assert code(result) == (ErrorKind.PERMISSION_DENIED, "jwt_policy")
    result = await rig.sign("JWT-Signer-B", jwt=token("a"))
    assert code(result) == (ErrorKind.PERMISSION_DENIED, "jwt_policy")
    assert (await rig.sign("JWT-Signer-B", jwt=token("b"))).signature


@pytest.mark.asyncio
async def test_fault_107_what_cannot_be_judged_is_refused_and_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_more: object) -> str:
        raise RuntimeError("a fault of the reader")

    async with SignerRig(tmp_path, keys="disk", policy=client_policy(max_in_flight="1")) as rig:
        key = (await rig.generate("x509-CA-A")).public_key.pkix_data
        with monkeypatch.context() as patched:
            patched.setattr(service, "check_certificate", broken)
            for _ in range(3):
                result = await rig.sign("x509-CA-A", x509=body(key))
                assert code(result) == (ErrorKind.PERMISSION_DENIED, "tbs_policy")
        assert (await rig.sign("x509-CA-A", x509=body(key))).signature


@pytest.mark.asyncio
async def test_fault_107_keys_are_for_one_purpose_and_digests_can_be_denied(
    tmp_path: Path,
) -> None:
    async with SignerRig(tmp_path, keys="disk") as rig:
        key = (await rig.generate("x509-CA-A")).public_key.pkix_data
        await rig.generate("JWT-Signer-A")
        assert code(await rig.sign("JWT-Signer-A", x509=body(key)))[1] == "purpose"
        assert code(await rig.sign("x509-CA-A", jwt=b"e30.e30"))[1] == "purpose"
        assert code(await rig.sign("x509-CA-A", digest=DIGEST))[1] == "raw_denied"


# -- 112, 113, 114: policy, clock, device ------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("text", ["client {", 'client "x" {}', "", "\0", None])
async def test_fault_112_a_bad_policy_on_reload(rig: SignerRig, text: str | None) -> None:
    await rig.generate("x509-CA-A")
    before = rig.signer.live.policy.hash
    if text is None:
        rig.policy_file.unlink()
    else:
        rig.write_policy(text)
    assert not await rig.signer.reload()
    assert rig.signer.live.policy.hash == before
    assert (await rig.sign("x509-CA-A", digest=DIGEST)).signature
    assert rig.signer.live.fault
    notes = await written(rig, "note", event="policy_refused")
    assert notes[0]["fields"]["error"]
    loaded = [r for r in records(rig) if r.get("event") == "policy_loaded"]
    assert [r["fields"]["policy"] for r in loaded] == [before]


@pytest.mark.asyncio
async def test_fault_112_the_hash_of_a_policy_is_in_the_log_before_anything_is_done_under_it(
    rig: SignerRig,
) -> None:
    await rig.generate("x509-CA-A")
    rig.write_policy(client_policy(raw="true", max_in_flight="99"))
    assert await rig.signer.reload()
    await rig.sign("x509-CA-A", digest=DIGEST)
    now = rig.signer.live.policy.hash
    intents = await written(rig, "intent", policy=now)
    (note,) = [
        r
        for r in records(rig)
        if r.get("event") == "policy_loaded" and r["fields"]["policy"] == now
    ]
    assert note["seq"] < min(i["seq"] for i in intents)


@pytest.mark.asyncio
async def test_fault_112_keys_of_a_new_client_that_cannot_be_opened(rig: SignerRig) -> None:
    before = rig.signer.live.policy.hash
    blocked = rig.folder / "data" / "owners" / "example.org@s3"
    blocked.write_text("in the way")
    rig.write_policy(client_policy(raw="true") + client_policy(OTHER_ID, server="s3", raw="true"))
    assert not await rig.signer.reload()
    assert rig.signer.live.policy.hash == before
    blocked.unlink()
    assert await rig.signer.reload()


class JumpingClock(SystemClock):
    """The machine's time, with a wall clock that somebody sets."""

    ahead = timedelta()

    def now(self) -> datetime:  # type: ignore[explicit-override]
        return datetime.now(UTC) + self.ahead  # noqa: TID251 - a clock


@pytest.mark.asyncio
@pytest.mark.parametrize("jump", [timedelta(days=-3), timedelta(hours=1)])
async def test_fault_113_a_clock_that_jumps(tmp_path: Path, jump: timedelta) -> None:
    clock = JumpingClock()
    text = client_policy(
        raw="true",
        sign_rate='{ "*" = "1/s burst 4" }',
        generate='{ per_key_min_interval = "10m" per_day = 3 }',
    )
    rig = SignerRig(tmp_path, keys="disk", policy=text, clock=clock)
    rig.identity = long_lived(rig.authority)
    async with rig:
        key = (await rig.generate("x509-CA-A")).public_key.pkix_data
        assert (await rig.sign("x509-CA-A", x509=body(key))).signature
        clock.ahead = jump
        if jump < timedelta():
            rig.identity = rig.authority.identity(
                CLIENT_ID, start=clock.now() - HOUR, end=clock.now() + 200 * HOUR
            )
        # Ends of certificates cannot be judged; budgets and rates go on as if nothing were.
        result = await rig.sign("x509-CA-A", x509=body(key))
        assert code(result) == (ErrorKind.FAILED_PRECONDITION, "clock_skew")
        assert code(await rig.generate("x509-CA-A"))[1] == "generate_interval"
        answers = [await rig.sign("x509-CA-A", digest=DIGEST) for _ in range(9)]
        assert code(answers[-1])[1] == "rate"
        clock.ahead = timedelta()
        assert code(await rig.sign("x509-CA-A", x509=body(key)))[1] in {"", "rate"}


@pytest.mark.hsm
@pytest.mark.asyncio
async def test_fault_114_a_device_that_fails_behind_the_signer(tmp_path: Path) -> None:
    async with SignerRig(tmp_path, policy=client_policy(raw="true")) as rig:
        made = await rig.generate("x509-CA-A")
        assert rig.hsm is not None
        rig.hsm.remove()
        keys = next(iter(rig.signer.live.owners.values()))
        for pid in keys.manager.worker_pids:  # type: ignore[attr-defined]
            os.kill(pid, 9)
        result = await rig.sign("x509-CA-A", digest=DIGEST)
        kind, reason = code(result)
        assert reason == "device"
        assert kind in {ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED}
        for secret in (str(tmp_path), "softhsm", "1234", rig.hsm.module):
            assert secret not in result.refusal.message
        assert "audit log tells why" in result.refusal.message
        with pytest.raises(UnavailableError, match="its log tells why") as caught:
            await rig.call("GetPublicKeys", LIST)
        for secret in (str(tmp_path), "softhsm", "1234", rig.hsm.module):
            assert secret not in caught.value.message
        outcome = await written(rig, "outcome", result="failed")
        assert outcome[0]["reason"]
        rig.hsm.put_back()
        async with asyncio.timeout(60):
            while not result.signature:
                result = await rig.sign("x509-CA-A", digest=DIGEST)
                await asyncio.sleep(0.05)
        assert result.fingerprint == made.public_key.fingerprint

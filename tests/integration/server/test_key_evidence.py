"""Evidence about the keys of a running server: in a token, in a TPM, in a file; and forged evidence."""

from __future__ import annotations

import base64
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw._pb import hw_keys_pb2 as pb
from spire_hw.errors import (
    AttestationError,
    EncodingError,
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    SpireHwError,
    VerificationError,
)
from spire_hw.evidence.document import KeyReport, parse, sign
from spire_hw.evidence.verify import Expected, verify
from spire_hw.key import SoftwareSigner, parse_spki, spki_der
from spire_hw.plugin.custody import Custody, DeviceStatement
from spire_hw.tpm.keys import KeyBlob
from spire_hw.tpm.public import parse_public
from spire_hw_plugins.keymanager import tpm_store
from spire_hw_server.ca.custody import EVIDENCE_KEY
from spire_hw_sim.pki import now
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import Swtpm, is_available
from spire_hw_sim.world import World
from spire_hw_sim.yubihsm import YubiHsm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from spire_hw.evidence.document import Document

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.tpm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
    pytest.mark.skipif(not is_available(), reason="swtpm or swtpm_setup is not installed"),
]

_SERVICE = "/spire_hw.server.v1.Keys/"
NONCE = bytes(range(16))
DAY = timedelta(days=1)


@asynccontextmanager
async def in_token(directory: Path) -> AsyncIterator[World]:
    token = SoftHsm(directory / "hsm")
    token.init_token("ca")
    pin = directory / "pin"
    pin.write_text("1234")
    pin.chmod(0o600)
    plugin = f"""KeyManager "pkcs11" {{ plugin_data {{
      module_path = "{token.module}"
      token_label = "ca"
      pin_file = "{pin}"
      key_identifier_value = "server-1"
      environment {{ SOFTHSM2_CONF = "{token.conf}" }}
    }} }}"""
    async with World(server_plugins=plugin) as world:
        yield world


@asynccontextmanager
async def in_tpm(directory: Path) -> AsyncIterator[World]:
    with Swtpm(directory / "tpm") as tpm:
        plugin = f'KeyManager "tpm" {{ plugin_data {{ tcti = "{tpm.tcti}" }} }}'
        async with World(server_plugins=plugin) as world:
            yield world


async def keys_of(world: World) -> dict[str, pb.Key]:
    answer = await world.call(_SERVICE + "ListKeys", pb.ListKeysRequest(), pb.ListKeysResponse)
    return {key.id: key for key in answer.keys}


async def attest(world: World, key_id: str = "x509-CA-A", **fields: Any) -> str:
    request = pb.AttestKeyRequest(id=key_id, **{"nonce": NONCE, **fields})
    answer = await world.call(_SERVICE + "AttestKey", request, pb.AttestKeyResponse)
    return answer.evidence


def codes(text: str, **expected: Any) -> set[str]:
    """Return what is wrong with a document."""
    with pytest.raises(AttestationError) as caught:
        verify(text, Expected(**expected), now())
    return {one.code for one in caught.value.findings}


async def resigned(text: str, change: Callable[[Document], Document]) -> str:
    """Return a document changed and signed by a key of the forger's own."""
    forger = SoftwareSigner(ec.generate_private_key(ec.SECP256R1()))
    document, _ = parse(text)
    report = KeyReport(EVIDENCE_KEY, spki_der(forger.public_key), document.signer.evidence)
    return await sign(replace(change(document), signer=report), forger)


async def test_keys_in_a_token_are_reported_with_what_it_says(short_dir: Path) -> None:
    async with in_token(short_dir) as world:
        listed = await keys_of(world)
        key = listed["x509-CA-A"]
        assert key.custody == Custody.HSM_REPORTED.value
        assert key.token.startswith("ca/")
        assert key.device.startswith("SoftHSM")
        assert key.generation == 1
        assert key.last_used_at > 0
        assert key.attributes["NEVER_EXTRACTABLE"] == "true"
        assert (key.authority.kind, key.authority.status) == ("X.509", "active")
        text = await attest(world)
        signer = (await keys_of(world))[EVIDENCE_KEY]
    found = verify(
        text,
        Expected(nonce=NONCE, max_age=DAY, key=key.fingerprint, signer=signer.fingerprint),
        now(),
    )
    assert found.document.key.evidence.attributes["LOCAL"] == "true"
    assert found.document.signer.evidence.custody is Custody.HSM_REPORTED
    assert found.proved == (f"the document was signed by key {signer.fingerprint}",)
    assert found.believed == ("custody hsm reported: the device's word, read back by this process",)


async def test_a_tpm_vouches_for_having_made_a_key(short_dir: Path) -> None:
    async with in_tpm(short_dir) as world:
        key = (await keys_of(world))["x509-CA-A"]
        assert key.custody == Custody.TPM_CERTIFIED.value
        assert key.created_at > 0
        text = await attest(world)
        other = await attest(world, "JWT-Signer-A")
    found = verify(text, Expected(nonce=NONCE, key=key.fingerprint), now())
    statement = found.document.statement
    assert statement is not None
    assert statement.kind == "tpm2-certify-creation"
    ak = parse_public(statement.parts["ak_public"]).name.hex()
    assert f"was made by, and is in, the TPM of attestation key {ak}" in found.proved[1]
    assert len(found.believed) == 2
    signer = found.document.signer.fingerprint
    assert verify(text, Expected(signer=signer, ak_name=ak), now()).believed == ()
    assert codes(text, ak_name="000b" + "0" * 64) == {"ak_unknown"}
    # One key's statement under another key's name.
    theirs = parse(other)[0].statement
    forged = await resigned(text, lambda d: replace(d, statement=theirs))
    assert codes(forged) == {"statement_key"}


async def test_a_key_of_before_proofs_were_kept_is_certified(short_dir: Path) -> None:
    async with in_tpm(short_dir) as world:
        directory = world.directory / "server" / "keys-tpm"
        (file,) = [p for p in directory.iterdir() if p.name.startswith("x509-CA-A")]
        port = await world.stop_server()
        stored = tpm_store.decode(file.read_bytes())
        blob = stored.current.blob
        bare = replace(stored.current, blob=KeyBlob(blob.public, blob.private, blob.parsed))
        file.write_bytes(tpm_store.encode(replace(stored, current=bare)))
        await world.start_server(port)
        text = await attest(world)
    found = verify(text, Expected(nonce=NONCE), now())
    assert found.document.statement is not None
    assert found.document.statement.kind == "tpm2-certify"
    assert "was made in a TPM and is in the TPM of attestation key" in found.proved[1]


@pytest.mark.parametrize(
    "part",
    [
        "ak_public",
        "ak_creation_data",
        "ak_attest",
        "ak_signature",
        "key_public",
        "attest",
        "signature",
        "creation_data",
    ],
)
async def test_no_part_of_a_tpms_statement_can_be_changed_or_left_out(
    short_dir: Path, part: str
) -> None:
    async with in_tpm(short_dir) as world:
        text = await attest(world)

    def changed(value: bytes | None) -> Callable[[Document], Document]:
        def change(document: Document) -> Document:
            assert document.statement is not None
            parts = {k: v for k, v in document.statement.parts.items() if k != part}
            if value is not None:
                parts[part] = value
            return replace(document, statement=DeviceStatement(document.statement.kind, parts))

        return change

    statement = parse(text)[0].statement
    assert statement is not None
    value = statement.parts[part]
    for wrong in (None, b"", value[:-1], value[:-1] + bytes((value[-1] ^ 1,)), value + b"\x00"):
        with pytest.raises((AttestationError, InvalidInputError)):
            verify(await resigned(text, changed(wrong)), Expected(), now())


async def test_a_statement_cannot_be_used_for_another_request(short_dir: Path) -> None:
    async with in_tpm(short_dir) as world:
        text = await attest(world)
    assert codes(text, nonce=NONCE[::-1]) == {"nonce_mismatch"}
    # The nonce is in what the TPM signed: to write another one into the document is no use.
    replayed = await resigned(text, lambda d: replace(d, nonce=NONCE[::-1]))
    assert codes(replayed, nonce=NONCE[::-1]) == {"nonce_mismatch"}
    moved = await resigned(text, lambda d: replace(d, trust_domain="other.example"))
    assert codes(moved) == {"nonce_mismatch"}


async def test_custody_is_not_taken_on_trust(short_dir: Path) -> None:
    async with in_token(short_dir) as world:
        text = await attest(world)
        signer = (await keys_of(world))[EVIDENCE_KEY].fingerprint

    def claiming(custody: Custody) -> Callable[[Document], Document]:
        def change(document: Document) -> Document:
            evidence = replace(document.key.evidence, custody=custody)
            return replace(document, key=replace(document.key, evidence=evidence))

        return change

    for custody in (Custody.TPM_CERTIFIED, Custody.HSM_ATTESTED):
        forged = await resigned(text, claiming(custody))
        assert codes(forged) == {"statement_missing"}
        assert codes(forged, signer=signer) == {"statement_missing", "signer_unknown"}
    unknown = DeviceStatement("a-new-kind", {"x": b"1"})
    forged = await resigned(text, lambda d: replace(d, statement=unknown))
    assert codes(forged) == {"statement_unknown"}


async def test_attributes_of_a_key_that_can_leave_are_refused(short_dir: Path) -> None:
    async with in_token(short_dir) as world:
        text = await attest(world)

    def weaker(document: Document) -> Document:
        attributes = {**document.key.evidence.attributes, "EXTRACTABLE": "true"}
        evidence = replace(document.key.evidence, attributes=attributes)
        return replace(document, key=replace(document.key, evidence=evidence))

    assert codes(await resigned(text, weaker)) == {"exportable"}


async def test_a_document_of_another_time_is_refused(short_dir: Path) -> None:
    async with in_token(short_dir) as world:
        text = await attest(world)
    later = now() + 2 * DAY
    with pytest.raises(AttestationError, match="too_old"):
        verify(text, Expected(max_age=DAY), later)
    with pytest.raises(AttestationError, match="made_in_future"):
        verify(text, Expected(), now() - DAY)


async def test_a_changed_document_does_not_verify(short_dir: Path) -> None:
    async with in_token(short_dir) as world:
        text = await attest(world)
    head, body, signature = text.split(".")
    fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))

    def packed(changed: dict[str, Any]) -> str:
        raw = base64.urlsafe_b64encode(json.dumps(changed).encode()).rstrip(b"=").decode()
        return f"{head}.{raw}.{signature}"

    with pytest.raises(VerificationError):
        verify(packed({**fields, "trust_domain": "other.example"}), Expected(), now())
    for name in fields:
        if name not in {"word", "statement"}:
            left = {k: v for k, v in fields.items() if k != name}
            with pytest.raises((EncodingError, VerificationError)):
                verify(packed(left), Expected(), now())
    for name, wrong in (
        ("version", 2),
        ("nonce", "00"),
        ("made_at", -1),
        ("made_at", 2**60),
        ("key", []),
        ("key", {**fields["key"], "spki": "00"}),
        ("key", {**fields["key"], "fingerprint": "0" * 64}),
        ("key", {**fields["key"], "custody": "mine"}),
        ("key", {**fields["key"], "location": "a\nb"}),
        ("key", {**fields["key"], "attributes": {str(n): "x" for n in range(100)}}),
        ("statement", {"kind": "x", "parts": {str(n): "00" for n in range(100)}}),
        ("statement", {"kind": "x", "parts": {"a": "zz"}}),
    ):
        with pytest.raises((EncodingError, InvalidInputError)):
            verify(packed({**fields, name: wrong}), Expected(), now())


async def test_what_a_request_may_hold(short_dir: Path) -> None:
    async with in_token(short_dir) as world:
        for nonce in (b"", bytes(7), bytes(65)):
            with pytest.raises(InvalidInputError, match="a nonce has 8 to 64 bytes"):
                await attest(world, nonce=nonce)
        with pytest.raises(NotFoundError):
            await attest(world, "nope")
        with pytest.raises(InvalidInputError, match="key id is required"):
            await attest(world, "")
        with pytest.raises(SpireHwError) as caught:
            await attest(world, attestation=[b"x", b"y"])
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


async def test_the_evidence_key_is_made_once_and_stays(short_dir: Path) -> None:
    async with in_token(short_dir) as world:
        assert EVIDENCE_KEY not in await keys_of(world)
        first = parse(await attest(world))[0].signer.fingerprint
        port = await world.stop_server()
        await world.start_server(port)
        assert parse(await attest(world))[0].signer.fingerprint == first
        last = (await keys_of(world))["x509-CA-A"].last_used_at
        assert last > 0
        assert world.server.manager.x509_slots.active is not None


async def test_a_devices_certificates_go_along_and_are_checked(short_dir: Path) -> None:
    device = YubiHsm()
    async with in_token(short_dir) as world:
        key = (await keys_of(world))["x509-CA-A"]
        mine = device.attestation(parse_spki(key.public_key), {})
        text = await attest(world, attestation=mine)
        other = ec.generate_private_key(ec.SECP256R1()).public_key()
        with pytest.raises(SpireHwError, match="statement_key"):
            await attest(world, attestation=device.attestation(other, {}))
    found = verify(text, Expected(nonce=NONCE, roots=(device.root,)), now())
    assert found.document.key.evidence.custody is Custody.HSM_ATTESTED
    assert "YubiHSM 7654321 (firmware 2.4.0) generated the key as object 0x1234" in found.proved[1]
    unnamed = verify(text, Expected(), now())
    assert "name the maker's root with -roots" in unnamed.believed[1]
    assert codes(text, roots=(YubiHsm().root,)) == {"statement_chain"}

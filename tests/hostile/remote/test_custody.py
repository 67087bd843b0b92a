"""What a signer says of where keys are: taken as its word, and only of the keys that are on note."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw._pb import hw_signer_pb2 as pb
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.evidence import document as evidence
from spire_hw.key import KeyType, generate_private_key, spki_der
from spire_hw.plugin.custody import Custody
from spire_hw_sim.remoterig import RemoteRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from spire_hw.evidence.document import Document

pytestmark = pytest.mark.asyncio
P256 = KeyType.EC_P256
NONCE = bytes(16)


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[RemoteRig]:
    async with RemoteRig(tmp_path) as made:
        yield made


async def test_what_a_signer_states_is_shown_as_its_word(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    info = await manager.generate_key("id", P256)
    told = await manager.key_evidence("id")
    assert (told.custody, told.stated) == (Custody.SIGNER_STATED, Custody.HSM_REPORTED)
    assert told.words == "signer stated: hsm reported"
    assert told.location == f"signer {signer.address}: a drawer"
    assert told.token == signer.lies.custody.token
    assert told.attributes["stated LOCAL"] == "true"
    assert told.attributes["fingerprint on note"] == info.fingerprint


@pytest.mark.parametrize(
    ("said", "stated"),
    [
        ("tpm certified", Custody.TPM_CERTIFIED),
        ("software", Custody.SOFTWARE),
        ("signer stated", Custody.UNKNOWN),
        ("hsm attested\n", Custody.UNKNOWN),
        ("", Custody.UNKNOWN),
    ],
)
async def test_words_nobody_knows_are_unknown(rig: RemoteRig, said: str, stated: Custody) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    attributes = {"fingerprint on note": "forged", "a\x1b[2J": "b\n" * 5000}
    signer.lies.custody = pb.KeyCustody(
        custody=said, location="x\r\n", attributes=attributes, created_at=2**62
    )
    told = await manager.key_evidence("id")
    assert (told.custody, told.stated, told.created) == (Custody.SIGNER_STATED, stated, None)
    texts = [told.location, *told.attributes, *told.attributes.values()]
    assert all(text.isprintable() and len(text) < 400 for text in texts)
    assert told.attributes["fingerprint on note"] != "forged"


async def test_custody_of_another_key_or_without_bound_is_refused(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    signer.lies.custody_of = "0" * 64
    with pytest.raises(SpireHwError, match="another key") as caught:
        await manager.key_evidence("id")
    assert caught.value.kind is ErrorKind.INTERNAL
    signer.lies.custody_of = ""
    signer.lies.custody = pb.KeyCustody(attributes={str(n): "" for n in range(65)})
    with pytest.raises(SpireHwError, match="attributes"):
        await manager.key_evidence("id")


async def test_evidence_is_passed_on_when_it_is_about_what_was_asked_for(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    info = await manager.generate_key("id", P256)
    document, _ = evidence.parse(await manager.attest_key("id", NONCE))
    assert (document.key.fingerprint, document.nonce) == (info.fingerprint, NONCE)
    told = await manager.key_evidence("id")
    assert document.signer.fingerprint == told.attributes["audit log key"]


def other_key(document: Document) -> Document:
    other = generate_private_key(P256).public_key()
    return replace(document, key=replace(document.key, spki=spki_der(other)))


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (other_key, "something else"),
        (lambda d: replace(d, nonce=bytes(8)), "something else"),
        (lambda d: replace(d, trust_domain="other.org"), "something else"),
        (lambda d: replace(d, signer=d.key), "does not hold"),
    ],
)
async def test_evidence_about_something_else_is_refused(
    rig: RemoteRig, lie: Callable[[Any], Any], why: str
) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    signer.lies.evidence = lie
    with pytest.raises(SpireHwError, match=why) as caught:
        await manager.attest_key("id", NONCE)
    assert caught.value.kind is ErrorKind.INTERNAL


async def test_evidence_under_another_key_than_the_logs_is_refused(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    signer.lies.log_key = generate_private_key(P256)
    with pytest.raises(SpireHwError, match="not signed by the key that signs its log") as caught:
        await manager.attest_key("id", NONCE)
    assert caught.value.kind is ErrorKind.INTERNAL

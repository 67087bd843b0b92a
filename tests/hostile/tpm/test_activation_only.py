"""Nodes that prove which TPM they have and nothing else: what they must not get by it."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from spire_hw.errors import AttestationError, ConfigError, ErrorKind, Finding, SpireHwError
from spire_hw.posture.evidence import Evidence, Tier
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.posture.policy import ima_start
from spire_hw.posture.verdict import Verdict
from spire_hw_plugins.nodeattestor.tpm import dialects
from spire_hw_plugins.nodeattestor.tpm.wire import encode_attestation_data
from spire_hw_sim.ekca import ek_spec
from spire_hw_sim.softtpm import NULL, OWNER, SoftTpm, make_ak, make_ek
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw.posture.evidence import EkFacts
    from spire_hw.spiffeid import SpiffeId
    from spire_hw_sim.tpmnode import TpmNode

pytestmark = pytest.mark.asyncio
IA, PD = ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED
OPEN = "accept_activation_only = true\n"
NO_QUOTE = "policy: this server requires a quote [activation_only]"


def a_node(lab: Lab, tpm: SoftTpm | None = None) -> TpmNode:
    """Return a node whose certificate needs no intermediate: there is no place for one to be sent."""
    node = lab.node(tpm)
    public = node.tpm.ek.private.public_key()
    node.certificate = lab.vendor.root.issue(ek_spec(public))
    return node


def old(node: TpmNode) -> bytes:
    """Return a first message without our object."""
    return encode_attestation_data(replace(node.data(), ek_pub=None))


async def refusal(lab: Lab, node: TpmNode, answer: bytes | None = None) -> SpireHwError:
    async def say(message: bytes) -> bytes:
        if answer is not None:
            return answer
        sealed = dialects.decode_challenge(message)
        assert sealed is not None
        return dialects.encode_response(node.tpm.activate(*sealed))

    return await lab.refusal(node, payload=old(node), answer=say)


def codes(error: SpireHwError) -> list[str]:
    assert isinstance(error, AttestationError)
    return [finding.code for finding in error.findings]


async def attest(lab: Lab, node: TpmNode) -> list[str]:
    async def say(message: bytes) -> bytes:
        assert set(json.loads(message)) == {"EC"}
        sealed = dialects.decode_challenge(message)
        assert sealed is not None
        return dialects.encode_response(node.tpm.activate(*sealed))

    return (await lab.attest(node, payload=old(node), answer=say)).selector_values


@pytest.mark.parametrize("ak", ["secp256r1", "rsa2048"])
@pytest.mark.parametrize("ek", ["L-1", "L-2", "H-3"])
async def test_it_says_how_little_it_proved(tmp_path: Path, ek: str, ak: str) -> None:
    lab = await Lab.make(tmp_path, OPEN)
    node = a_node(lab, SoftTpm(ek=make_ek(ek), ak=make_ak(ak)))
    assert await attest(lab, node) == ["tier:activation"]


SECRETS = {
    "wrong": dialects.encode_response(secrets.token_bytes(32)),
    "empty": dialects.encode_response(b""),
    "of another length": dialects.encode_response(bytes(31)),
}


@pytest.mark.parametrize("row", SECRETS)
async def test_wrong_secret_is_refused_with_one_message(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path, OPEN)
    error = await refusal(lab, a_node(lab), SECRETS[row])
    assert (error.kind, error.message) == (
        IA,
        "challenge: secret does not match [secret_mismatch]",
    )


@pytest.mark.parametrize(
    "answer", [b"", b"{}", b"[]", b'{"Secret":"AAAA","spire_hw":{"v":2}}', b'{"Secret":7}']
)
async def test_something_else_instead_of_an_answer_is_refused(
    tmp_path: Path, answer: bytes
) -> None:
    lab = await Lab.make(tmp_path, OPEN)
    assert (await refusal(lab, a_node(lab), answer)).kind is IA


async def test_keys_are_checked_as_ever(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, OPEN)
    loaded = a_node(lab, SoftTpm(ek=make_ek("L-2"), ak=make_ak(attributes=0x00040472)))
    assert "ak_attributes" in codes(await refusal(lab, loaded))
    nowhere = a_node(lab, SoftTpm(ek=make_ek("L-2"), ak=make_ak(parent=NULL)))
    assert codes(await refusal(lab, nowhere)) == ["ak_hierarchy"]
    unknown = a_node(lab)
    unknown.certificate = None
    assert codes(await refusal(lab, unknown)) == ["ek_no_certificate"]


def _spki(key: Any) -> bytes:
    made: bytes = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return made


def _compressed() -> bytes:
    point = ec.generate_private_key(ec.SECP256R1()).public_key()
    raw = point.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    )
    head = bytes.fromhex("3039301306072a8648ce3d020106082a8648ce3d030107032200")
    return head + raw


BARE_KEYS: dict[str, Callable[[], bytes]] = {
    "RSA-1024": lambda: _spki(rsa.generate_private_key(65537, 1024)),  # noqa: S505 - refused
    "exponent 3": lambda: _spki(rsa.generate_private_key(3, 2048)),
    "compressed": _compressed,
    "P-224": lambda: _spki(ec.generate_private_key(ec.SECP224R1())),
    "Ed25519": lambda: _spki(ed25519.Ed25519PrivateKey.generate()),
    "not a key": lambda: b"\x30\x03\x02\x01\x00",
    "bytes after": lambda: _spki(ec.generate_private_key(ec.SECP256R1())) + b"\0",
}


@pytest.mark.parametrize("row", BARE_KEYS)
async def test_a_bare_key_is_checked_as_one_in_an_area(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path, OPEN)
    data = replace(a_node(lab).data(), ek_pub=None, ek_certificate=None, ek_spki=BARE_KEYS[row]())
    error = await lab.refusal(a_node(lab), payload=encode_attestation_data(data))
    assert error.kind is IA
    assert error.message.startswith("ek: ")
    assert len(lab.admitted) == 1  # the honest node alone


async def test_owner_keys_are_theirs(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, OPEN)
    node = a_node(lab, SoftTpm(ek=make_ek("L-2"), ak=make_ak(parent=OWNER)))
    assert await attest(lab, node) == ["tier:activation"]


class Asks:
    """A host's judge that asks the first node for something, and knows who showed more before."""

    def __init__(self, asked: EvidenceRequest, *, knows_better: bool = False) -> None:
        self._asked = asked
        self._first = ""
        self._knows_better = knows_better

    async def request(self, agent_id: SpiffeId, ek: EkFacts) -> EvidenceRequest:
        self._first = self._first or ek.hash
        return self._asked if ek.hash == self._first else EvidenceRequest()

    async def judge(self, agent_id: SpiffeId, evidence: Evidence) -> Verdict:
        if self._knows_better and evidence.tier is Tier.ACTIVATION:
            text = "policy: node attested with quotes before and may not fall back"
            raise AttestationError([Finding("downgrade", text, PD)])
        return Verdict("", 0, "", (), ("boot:policy:web@7",))


@pytest.mark.parametrize(
    "asked",
    [
        EvidenceRequest(pcrs=(("sha256", (7,)),)),
        EvidenceRequest(boot_log=True),
        EvidenceRequest(ima=ima_start("sha256")),
        EvidenceRequest(counters=True),
    ],
)
async def test_a_policy_that_wants_more_is_not_met(tmp_path: Path, asked: EvidenceRequest) -> None:
    lab = await Lab.make(tmp_path, OPEN, judge=Asks(asked))
    error = await refusal(lab, a_node(lab))
    assert (error.kind, error.message) == (PD, NO_QUOTE)


async def test_the_judge_hears_of_it(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, OPEN, judge=Asks(EvidenceRequest(), knows_better=True))
    assert codes(await refusal(lab, a_node(lab))) == ["downgrade"]


async def test_a_policys_selectors_are_not_for_them(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, OPEN, judge=Asks(EvidenceRequest()))
    assert await attest(lab, a_node(lab)) == ["tier:activation"]


@pytest.mark.parametrize(
    "rule",
    [
        'pcrs = { sha256 = [4] }\npcr_values = { sha256 = { "4" = ["%s"] } }' % ("00" * 32),
        "boot_log = true",
        "ima = true",
    ],
)
async def test_it_does_not_go_with_rules_about_the_machine(tmp_path: Path, rule: str) -> None:
    with pytest.raises(ConfigError, match="by showing less"):
        await Lab.make(tmp_path, OPEN + rule)

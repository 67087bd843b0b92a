"""What a node with a DevID may not get away with; one fault in each otherwise good exchange."""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, utils
from cryptography.x509.oid import NameOID

from spire_hw.errors import AttestationError, ErrorKind, SpireHwError
from spire_hw.tpm import public as areas
from spire_hw.tpm import wire as tpm_wire
from spire_hw_plugins.nodeattestor.tpm_devid.wire import encode_response
from spire_hw_sim.again import refused
from spire_hw_sim.devidnode import DevIdLab, DevIdNode, peers_tpm, sign_nonce
from spire_hw_sim.nodepki import DER, Holder, make_root, rsa_key
from spire_hw_sim.pki import HOUR, now
from spire_hw_sim.softtpm import (
    AK_ATTRIBUTES,
    SVID_KEY_ATTRIBUTES,
    SoftTpm,
    encode_public,
    make_ak,
    make_ek,
    make_key,
    make_svid_key,
)
from spire_hw_sim.tpmnode import TpmNode

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_plugins.nodeattestor.tpm_devid.wire import AttestationData, Challenge, Response

pytestmark = pytest.mark.asyncio
# The library warns of names longer than X.520 has them, whoever wrote them.
LONG_NAMES = "ignore:Attribute's length must be"
IA, PD, RE = (
    ErrorKind.INVALID_ARGUMENT,
    ErrorKind.PERMISSION_DENIED,
    ErrorKind.RESOURCE_EXHAUSTED,
)


@pytest_asyncio.fixture
async def lab(tmp_path: Path) -> DevIdLab:
    return await DevIdLab.make(tmp_path)


def says(error: SpireHwError, kind: ErrorKind, text: str) -> None:
    assert error.kind is kind, error
    assert text in error.message


def code_of(error: SpireHwError) -> str:
    assert isinstance(error, AttestationError), error
    return error.findings[0].code


def members(node: DevIdNode) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.payload())
    return found


def bent(node: DevIdNode, **changes: object) -> bytes:
    return json.dumps({**members(node), **changes}).encode()


def ecc_tpm() -> SoftTpm:
    """Return a TPM whose challenges take no RSA: nothing of them stays in libraries below."""
    return SoftTpm(ek=make_ek("L-2"), ak=make_ak())


async def test_honest_nodes_of_every_kind_get_upstreams_id_and_selectors(lab: DevIdLab) -> None:
    below = lab.root.below()
    sha384 = (tpm_wire.ALG_ECDSA, tpm_wire.ALG_SHA384)
    ak = make_ak("secp384r1", scheme=sha384)
    p384 = SoftTpm(ek=make_ek("H-3"), ak=ak, ak_scheme=sha384)
    nodes = [
        lab.node(),
        lab.node(ecc_tpm()),
        lab.node(p384, make_svid_key("secp384r1")),
        lab.node(None, make_svid_key("rsa2048")),
        lab.node(None, None, below),
    ]
    for node in nodes:
        made = await lab.attest(node)
        digests = [hashlib.sha1(der, usedforsecurity=False).hexdigest() for der in node.chain]
        root = hashlib.sha1(lab.root.der, usedforsecurity=False).hexdigest()
        assert str(made.agent_id) == f"spiffe://example.org/spire/agent/tpm_devid/{digests[0]}"
        issuer = "DevID Root" if len(node.chain) == 1 else "Site Intermediate"
        assert made.selector_values == [
            "subject:cn:node-1",
            f"issuer:cn:{issuer}",
            *(f"ca:fingerprint:{d}" for d in [*digests[1:], root]),
        ]
        assert made.can_reattest
    assert lab.admitted[0].path.startswith("/spire/agent/tpm_devid/")


@pytest.mark.parametrize("value", [None, [], [""], [None], "AAAA", {}, [1], [[]]])
async def test_without_a_certificate(lab: DevIdLab, value: object) -> None:
    error = await lab.refusal(lab.node(), payload=bent(lab.node(), DevIDCert=value))
    assert error.kind is IA


async def test_the_certificate_is_missing_or_there_are_fifty(lab: DevIdLab) -> None:
    node = lab.node()
    for value in (None, [], [""]):
        error = await lab.refusal(node, payload=bent(node, DevIDCert=value))
        says(error, IA, "devid: certificate is missing")
    many = [base64.b64encode(node.chain[0]).decode()] * 50
    says(await lab.refusal(node, payload=bent(node, DevIDCert=many)), IA, "more than 10")
    garbage = base64.b64encode(b"no certificate").decode()
    says(await lab.refusal(node, payload=bent(node, DevIDCert=[garbage])), IA, "malformed")


async def test_certificates_nobody_should_trust(lab: DevIdLab) -> None:
    key = make_svid_key()
    stranger = make_root("DevID Root")  # the name alone is ours
    bad = [
        stranger.issue(key.private),
        make_root("Other").issue(key.private),
        lab.root.issue(key.private, end=now() - HOUR / 2),
        lab.root.issue(key.private, start=now() + HOUR),
        lab.root.issue(key.private, ca=True),
        lab.root.issue(key.private, more=[_critical()]),
        lab.root.issue(make_key("secp256r1")).issue(key.private),  # issued by a leaf
        lab.root.below(path_length=0).below().issue(key.private),
        lab.root.below(end=now() - HOUR / 2).issue(key.private),
        Holder(key.private, lab.root.certificate),
    ]
    for holder in bad:
        node = replace(lab.node(None, key), chain=tuple(holder.chain))
        error = await lab.refusal(node)
        assert error.kind in {PD, IA}, holder.certificate
        if holder.certificate != lab.root.certificate:
            assert code_of(error) == "devid_untrusted", holder.certificate


def _critical() -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")


async def test_the_key_in_the_tpm_is_another_than_the_certificates(lab: DevIdLab) -> None:
    """The thief of a certificate shows a key of his own TPM beside it."""
    honest, thief = lab.node(), lab.node()
    thief.chain = honest.chain
    error = await lab.refusal(thief)
    says(error, IA, "certificate and TPM key are different keys")
    assert code_of(error) == "devid_key_mismatch"
    assert lab.challenges == [lab.challenges[0]]  # of the honest node afterwards


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (AK_ATTRIBUTES & ~areas.RESTRICTED, "not restricted"),
        (AK_ATTRIBUTES & ~areas.FIXED_TPM, "not made in this TPM"),
        (AK_ATTRIBUTES & ~areas.SENSITIVE_DATA_ORIGIN, "not made in this TPM"),
        (AK_ATTRIBUTES & ~areas.FIXED_PARENT, "can leave"),
        (AK_ATTRIBUTES | areas.DECRYPT, "not those of an AK"),
        (AK_ATTRIBUTES & ~areas.SIGN, "not those of an AK"),
    ],
)
@pytest.mark.parametrize("kind", ["rsa2048", "secp256r1"])
async def test_attestation_keys_that_prove_nothing(
    lab: DevIdLab, kind: str, attributes: int, text: str
) -> None:
    tpm = SoftTpm(ek=make_ek("L-1"), ak=make_ak(kind, attributes=attributes))
    error = await lab.refusal(lab.node(tpm))
    says(error, IA, text)
    assert code_of(error) == "ak_attributes"


async def test_an_attestation_key_of_a_hierarchy_that_anybody_may_use(lab: DevIdLab) -> None:
    for handle in (tpm_wire.RH_NULL, tpm_wire.RH_PLATFORM):
        ak = make_ak("rsa2048", parent=handle.to_bytes(4, "big"))
        error = await lab.refusal(lab.node(SoftTpm(ek=make_ek("L-1"), ak=ak)))
        assert code_of(error) == "ak_hierarchy"


async def test_a_signature_of_another_type_than_its_key(lab: DevIdLab) -> None:
    node, other = lab.node(), lab.node(SoftTpm(ek=make_ek("L-2"), ak=make_ak()))
    swapped = other.data().signature
    error = await lab.refusal(node, data=lambda d: replace(d, signature=swapped))
    says(error, IA, "does not fit the key")
    other_way = node.data().signature
    error = await lab.refusal(other, data=lambda d: replace(d, signature=other_way))
    says(error, IA, "does not fit the key")
    error = await lab.refusal(node, data=lambda d: replace(d, signature=b"\x00\x14\x00\x0b"))
    assert error.kind is IA


@pytest.mark.parametrize(
    "attributes",
    [
        SVID_KEY_ATTRIBUTES & ~areas.FIXED_TPM,
        SVID_KEY_ATTRIBUTES & ~areas.FIXED_PARENT,
        SVID_KEY_ATTRIBUTES & ~areas.SENSITIVE_DATA_ORIGIN,
        SVID_KEY_ATTRIBUTES & ~areas.SIGN,
        SVID_KEY_ATTRIBUTES | areas.RESTRICTED,
        SVID_KEY_ATTRIBUTES | areas.ENCRYPTED_DUPLICATION,
        SVID_KEY_ATTRIBUTES | areas.ST_CLEAR,
        SVID_KEY_ATTRIBUTES | 1 << 25,
    ],
)
async def test_devid_keys_that_can_leave_or_came_from_elsewhere(
    lab: DevIdLab, attributes: int
) -> None:
    error = await lab.refusal(lab.node(None, make_svid_key(attributes=attributes)))
    says(error, IA, "attributes")
    assert code_of(error) == "devid_attributes"


async def test_statements_that_say_something_else(lab: DevIdLab) -> None:
    node = lab.node()
    tpm = node.tpm
    other = make_svid_key()
    body = tpm_wire.sized(node.key.name) + tpm_wire.sized(node.key.qualified_name)
    quote = tpm.quote_body((tpm_wire.PcrSelection("sha256", (0,)),))

    def signed(attest: bytes) -> tuple[bytes, bytes]:
        return attest, tpm.sign(attest)

    statements = {
        "certify_name": tpm.certify(other, b""),
        "certify_type": signed(tpm.attest(tpm_wire.ST_QUOTE, quote, b"")),
        "magic": signed(tpm.attest(tpm_wire.ST_CERTIFY, body, b"", magic=0xFF544348)),
        "certify_malformed": signed(tpm.attest(tpm_wire.ST_CERTIFY, body + b"\0", b"")),
        "nonce_mismatch": tpm.certify(node.key, b"of another protocol"),
        "certify_signature": (tpm.certify(node.key, b"")[0], tpm.sign(b"other")),
    }
    for code, (attest, signature) in statements.items():
        change = lambda d, a=attest, s=signature: replace(d, certified=a, signature=s)  # noqa: E731
        error = await lab.refusal(node, data=change)
        assert error.kind is IA
        assert code_of(error) == code
    for cut in range(0, len(node.data().certified), 7):
        error = await lab.refusal(node, data=lambda d, n=cut: replace(d, certified=d.certified[:n]))  # type: ignore[misc]
        assert error.kind is IA


Bend = dict[str, Any]


async def test_signatures_over_something_else(lab: DevIdLab) -> None:
    key = rsa_key()
    rsa_node = lab.node(ecc_tpm(), replace(make_svid_key("rsa2048"), private=key))
    rsa_node.key = replace(rsa_node.key, public=encode_public(key, SVID_KEY_ATTRIBUTES))
    ec_node = lab.node(ecc_tpm())
    curve_key = ec_node.key.private
    assert isinstance(curve_key, ec.EllipticCurvePrivateKey)
    sha256 = hashes.SHA256()
    prehashed = utils.Prehashed(sha256)

    def raw(nonce: bytes) -> bytes:
        halves = utils.decode_dss_signature(sign_nonce(curve_key, nonce))
        return b"".join(half.to_bytes(32, "big") for half in halves)

    bends = [
        (ec_node, lambda _: sign_nonce(curve_key, bytes(32))),
        (ec_node, lambda n: curve_key.sign(n, ec.ECDSA(prehashed))),
        (ec_node, lambda n: curve_key.sign(n, ec.ECDSA(hashes.SHA384()))),
        (ec_node, raw),
        (ec_node, lambda n: sign_nonce(make_key("secp256r1"), n)),
        (ec_node, lambda n: sign_nonce(curve_key, n) + b"\0"),
        (rsa_node, lambda n: key.sign(n, padding.PSS(padding.MGF1(sha256), 32), sha256)),
        (rsa_node, lambda n: key.sign(n, padding.PKCS1v15(), prehashed)),
        (rsa_node, lambda n: sign_nonce(curve_key, n)),
        (rsa_node, lambda n: b"\0" + sign_nonce(key, n)),
    ]
    for node, sign in bends:

        def change(made: Response, asked: Challenge, sign: Any = sign) -> Response:
            return replace(made, signature=sign(asked.nonce))

        error = await lab.refusal(node, response=change)
        says(error, IA, "nonce signature does not verify")
    assert (await lab.attest(rsa_node)).can_reattest


async def test_half_an_answer_is_none(lab: DevIdLab) -> None:
    node = lab.node(ecc_tpm())
    challenge: dict[str, str] = {}

    async def half(name: str, value: object) -> SpireHwError:
        async def answer(message: bytes) -> bytes:
            whole = json.loads(node.answer(message))
            challenge.update({"seen": "yes"})
            if value is ...:
                del whole[name]
            else:
                whole[name] = value
            return json.dumps(whole).encode()

        async def act() -> object:
            lab.challenges.clear()
            lab.admitted.clear()
            return await lab.attest(node, answer=answer)

        return await refused(act)

    for name in ("DevID", "CredActivation"):
        for value in (None, ...):
            says(await half(name, value), IA, "devid: answer is incomplete")
        says(await half(name, ""), IA, "is missing")
        says(await half(name, "AAAA" * 2000), IA, "too long")
    says(await half("CredActivation", "AAAA"), IA, "secret does not match")
    says(await lab.refusal(node, answer=b""), IA, "devid: answer is incomplete")
    says(await lab.refusal(node, answer=bytes(20_000)), RE, "limit")
    assert challenge == {"seen": "yes"}


async def test_secrets_of_another_exchange_do_not_count(lab: DevIdLab) -> None:
    node = lab.node()
    stale: list[Response] = []

    async def remember(message: bytes) -> bytes:
        from spire_hw_plugins.nodeattestor.tpm_devid.wire import decode_challenge  # noqa: PLC0415

        stale.append(node.respond(decode_challenge(message)))
        return encode_response(stale[0])

    await lab.attest(node, answer=remember)
    error = await lab.refusal(node, response=lambda made, _: replace(made, secret=stale[0].secret))
    says(error, IA, "secret does not match")
    error = await lab.refusal(
        node, response=lambda made, _: replace(made, signature=stale[0].signature)
    )
    says(error, IA, "nonce signature")


async def test_endorsement_keys_that_are_not_the_certificates(lab: DevIdLab) -> None:
    node, other = lab.node(), lab.node(SoftTpm(ek=make_ek("L-2"), ak=make_ak()))

    def other_key(data: AttestationData) -> AttestationData:
        return replace(data, ek_pub=make_ek("L-1", 9).public)

    error = await lab.refusal(node, data=other_key)
    says(error, IA, "certificate and public key are different keys")
    assert code_of(error) == "ek_key_mismatch"
    for curve in ("H-2", "H-3", "H-4"):
        change = lambda d, c=curve: replace(d, ek_pub=make_ek(c).public)  # noqa: E731
        error = await lab.refusal(other, data=change)
        assert code_of(error) == "ek_key_mismatch"
    error = await lab.refusal(node, data=lambda d: replace(d, ek_pub=other.tpm.ek.public))
    assert code_of(error) == "ek_key_mismatch"
    signing = lab.node()
    change = lambda d: replace(d, ek_pub=d.ak_pub)  # noqa: E731
    assert code_of(await lab.refusal(signing, data=change)) == "ek_signing_key"


async def test_endorsement_certificates_nobody_vouches_for(lab: DevIdLab, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    other = await DevIdLab.make(elsewhere)
    foreign = other.node()
    foreign.chain = lab.node(None, foreign.key).chain
    error = await lab.refusal(foreign)
    assert error.kind is PD
    assert code_of(error).startswith("ek_")
    without = lab.node()
    without.ek_chain = ()
    assert (await lab.refusal(without)).kind is PD


async def test_one_key_may_not_play_two_parts(lab: DevIdLab) -> None:
    tpm = peers_tpm()
    key = make_svid_key("rsa2048")
    same = replace(
        key,
        private=tpm.ak.private,
        public=encode_public(tpm.ak.private, SVID_KEY_ATTRIBUTES),
    )
    error = await lab.refusal(lab.node(tpm, same))
    assert code_of(error) == "keys_equal"


def _named(lab: DevIdLab, key: Any, names: list[str]) -> bytes:
    with warnings.catch_warnings(action="ignore"):  # of the library, about long names
        return _issue_named(lab, key, names)


def _issue_named(lab: DevIdLab, key: Any, names: list[str]) -> bytes:
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, n, _validate=False) for n in names]
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(lab.root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now() - HOUR)
        .not_valid_after(now() + HOUR)
    )
    return made.sign(lab.root.key, hashes.SHA256()).public_bytes(DER)


@pytest.mark.parametrize(
    "names",
    [["a\nb"], ["a\0b"], ["a\x1b[2J"], ["x" * 1000], ["x", "y"], ["\u202eabc"], ["a\u2028b"]],
)
@pytest.mark.filterwarnings(LONG_NAMES)
async def test_common_names_that_are_not_acceptable(lab: DevIdLab, names: list[str]) -> None:
    key = make_svid_key()
    node = lab.node(None, key)
    node.chain = (_named(lab, key.private, names),)
    error = await lab.refusal(node)
    says(error, IA, "subject common name is not acceptable")
    assert names[0] not in error.message


@pytest.mark.parametrize("name", ["02:00:5e:10:00:01", "Gerät 7", "a/b", "x" * 255])
@pytest.mark.filterwarnings(LONG_NAMES)
async def test_common_names_are_kept_as_they_are(lab: DevIdLab, name: str) -> None:
    key = make_svid_key()
    node = lab.node(None, key)
    node.chain = (_named(lab, key.private, [name]),)
    assert f"subject:cn:{name}" in (await lab.attest(node)).selector_values


@pytest.mark.parametrize(
    "member",
    ["DevIDPub", "EKCert", "EKPub", "AKPub", "CertifiedDevID", "CertificationSignature"],
)
async def test_every_member_is_needed_and_bounded(lab: DevIdLab, member: str) -> None:
    node = lab.node()
    for value in (None, "", "!", "AAAA", 5, [], {}, "AAAA" * 3000):
        error = await lab.refusal(node, payload=bent(node, **{member: value}))
        assert error.kind is IA, value
    whole = members(node)
    del whole[member]
    error = await lab.refusal(node, payload=json.dumps(whole).encode())
    assert error.kind is IA


async def test_envelopes(lab: DevIdLab) -> None:
    node = lab.node()
    text = node.payload()
    for payload in (
        b"",
        b"null",
        b"[]",
        b"{}",
        TpmNode(node.tpm).payload(),
        text + b" x",
        text.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + text,
        b"[" * 100_000 if len(text) > 70_000 else b"[" * 60_000,
        text.replace(b'"EKPub"', b'"AKPub"'),
        text.replace(b'"EKPub"', b'"akpub"'),
        bent(node, spire_hw={"ek_chain": ["AAAA"] * 7}),
        bent(node, spire_hw={"other": 1}),
    ):
        assert (await lab.refusal(node, payload=payload)).kind is IA
    says(await lab.refusal(node, payload=bytes(64 * 1024 + 1)), RE, "limit")


async def test_every_flipped_bit_of_the_statement_is_refused(lab: DevIdLab) -> None:
    node = lab.node(SoftTpm(ek=make_ek("L-2"), ak=make_ak()))
    data = node.data()
    for place in range(0, 8 * len(data.certified), 11):
        flipped = bytearray(data.certified)
        flipped[place // 8] ^= 1 << place % 8
        changed = replace(data, certified=bytes(flipped))
        error = await lab.refusal(node, data=lambda _, d=changed: d)  # type: ignore[misc]
        assert error.kind is IA

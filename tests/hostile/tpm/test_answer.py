"""The secret, the quote and the statement about the agent's key."""

from __future__ import annotations

import hashlib
import secrets
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.errors import AttestationError, ErrorKind, SpireHwError
from spire_hw.tpm import wire
from spire_hw.tpm.public import qualified_name
from spire_hw.tpm.wire import PcrSelection, encode_selections, sized
from spire_hw_plugins.nodeattestor.tpm.wire import (
    ChallengeMessage,
    QuoteEvidence,
    Response,
    SignedStatement,
    decode_challenge,
    encode_response,
)
from spire_hw_sim.softtpm import (
    OWNER,
    SVID_KEY_ATTRIBUTES,
    SoftKey,
    SoftTpm,
    encode_public,
    make_ak,
    make_ek,
    make_key,
    make_svid_key,
    sign,
)
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spire_hw_sim.tpmnode import TpmNode

pytestmark = pytest.mark.asyncio
IA, PD = ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED
PCRS = PcrSelection("sha256", (0, 2, 4, 7))
N256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def _codes(error: SpireHwError) -> list[str]:
    assert isinstance(error, AttestationError)
    return [finding.code for finding in error.findings]


# --- the secret ---------------------------------------------------------------------------------

SECRETS: dict[str, Callable[[bytes], bytes]] = {
    "wrong": lambda _: secrets.token_bytes(32),
    "empty": lambda _: b"",
    "first 31 bytes": lambda s: s[:31],
    "one byte more": lambda s: s + b"\0",
    "in hex": lambda s: s.hex().encode(),
    "last bit": lambda s: s[:-1] + bytes((s[-1] ^ 1,)),
}


@pytest.mark.parametrize("row", SECRETS)
async def test_wrong_secret_is_refused_with_one_message(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(
        lab.node(), response=lambda r: replace(r, secret=SECRETS[row](r.secret))
    )
    assert error.kind is IA
    assert error.message == "challenge: secret does not match [secret_mismatch]"
    assert _codes(error) == ["secret_mismatch"]


async def test_secret_of_another_open_exchange_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node, other = lab.node(), lab.node(SoftTpm(ek=make_ek("H-2")))

    async def swap(message: bytes) -> bytes:
        inner: list[bytes] = []

        async def keep(theirs: bytes) -> bytes:
            inner.append(theirs)
            return other.answer(theirs)

        await lab.attest(other, answer=keep)
        challenge = decode_challenge(inner[0])
        stolen = other.tpm.activate(challenge.credential, challenge.secret)
        return encode_response(replace(node.respond(decode_challenge(message)), secret=stolen))

    assert _codes(await lab.refusal(node, answer=swap)) == ["secret_mismatch"]


async def test_replayed_answer_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    kept: list[bytes] = []

    async def keep(message: bytes) -> bytes:
        kept.append(node.answer(message))
        return kept[0]

    await lab.attest(node, answer=keep)

    async def replay(_: bytes) -> bytes:
        return kept[0]

    assert _codes(await lab.refusal(node, answer=replay)) == ["secret_mismatch"]


async def test_every_exchange_draws_its_own_challenge(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    for _ in range(3):
        await lab.attest(node)
    seen = [decode_challenge(message) for message in lab.challenges]
    assert len({c.nonce for c in seen}) == len({c.credential for c in seen}) == 3


async def test_credential_opens_only_for_this_ak_in_this_tpm(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    await lab.attest(node)
    challenge = decode_challenge(lab.challenges[0])
    relayed = SoftTpm(ek=node.tpm.ek, ak=make_ak())
    with pytest.raises(ValueError, match="integrity"):
        relayed.activate(challenge.credential, challenge.secret)


# --- the quote ----------------------------------------------------------------------------------


async def _bend_quote(
    lab: Lab,
    node: TpmNode,
    bend: Callable[[ChallengeMessage, bytes], QuoteEvidence | list[QuoteEvidence]],
) -> SpireHwError:
    """Replace the quote; `bend` gets the challenge and the right qualifier."""

    async def answer(message: bytes) -> bytes:
        challenge = decode_challenge(message)
        honest = node.respond(challenge)
        made = bend(challenge, node.qualifier("quote", challenge, honest.secret))
        quotes = tuple(made) if isinstance(made, list) else (made,)
        return encode_response(replace(honest, quotes=quotes))

    return await lab.refusal(node, answer=answer)


def _signed(tpm: SoftTpm, attest: bytes, selection: PcrSelection = PCRS) -> QuoteEvidence:
    return QuoteEvidence(attest, tpm.sign(attest), tpm.pcr_values(selection))


SHAPES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "one byte after": (lambda a: a + b"\0", "quote_malformed"),
    "133 bytes after": (lambda a: a + bytes(133), "quote_malformed"),
    "20 kB after": (lambda a: a + bytes(20_000), "quote_malformed"),
    "magic 46": (lambda a: b"\xff\x54\x43\x46" + a[4:], "magic"),
    "magic 0": (lambda a: bytes(4) + a[4:], "magic"),
    "magic little-endian": (lambda a: a[3::-1] + a[4:], "magic"),
    "certify over a quote": (lambda a: a[:4] + b"\x80\x17" + a[6:], "quote_type"),
    "creation": (lambda a: a[:4] + b"\x80\x1a" + a[6:], "quote_type"),
    "time": (lambda a: a[:4] + b"\x80\x19" + a[6:], "quote_type"),
    "unknown": (lambda a: a[:4] + b"\x12\x34" + a[6:], "quote_type"),
    "cut by one": (lambda a: a[:-1], "quote_malformed"),
    "size 65535": (lambda a: a[:6] + b"\xff\xff" + a[8:], "quote_malformed"),
}


@pytest.mark.parametrize("row", SHAPES)
async def test_shape_of_a_signed_quote_is_demanded(tmp_path: Path, row: str) -> None:
    bend, code = SHAPES[row]
    lab = await Lab.make(tmp_path)
    node = lab.node()
    error = await _bend_quote(
        lab,
        node,
        lambda _, extra: _signed(
            node.tpm, bend(node.tpm.attest(wire.ST_QUOTE, node.tpm.quote_body((PCRS,)), extra))
        ),
    )
    assert error.kind is IA
    assert _codes(error) == [code]
    assert error.message.startswith("quote: ")


@pytest.mark.parametrize("safe", [2, 255])
async def test_clock_flag_is_0_or_1(tmp_path: Path, safe: int) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    def bend(_: ChallengeMessage, extra: bytes) -> QuoteEvidence:
        dirty = replace(node.tpm, safe=safe)
        return _signed(node.tpm, dirty.quote((PCRS,), extra)[0])

    error = await _bend_quote(lab, node, bend)
    assert _codes(error) == ["quote_malformed"]
    assert "clock flag is malformed" in error.message


async def test_quote_of_another_signer_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    for ak in (make_ak(), make_ak("rsa2048"), make_ak("secp384r1")):
        other = SoftTpm(ek=node.tpm.ek, ak=ak, pcrs=node.tpm.pcrs)

        def bend(_: ChallengeMessage, extra: bytes, tpm: SoftTpm = other) -> QuoteEvidence:
            return _signed(tpm, tpm.quote((PCRS,), extra)[0])

        assert _codes(await _bend_quote(lab, node, bend))[0] in {
            "quote_signature",
            "quote_scheme",
        }


RSASSA, RSAPSS = wire.ALG_RSASSA, wire.ALG_RSAPSS


@pytest.mark.parametrize(
    ("kind", "own", "used"),
    [
        ("rsa2048", (RSASSA, wire.ALG_SHA256), (RSAPSS, wire.ALG_SHA256)),
        ("rsa2048", (RSAPSS, wire.ALG_SHA256), (RSASSA, wire.ALG_SHA256)),
        ("rsa2048", (RSASSA, wire.ALG_SHA256), (RSASSA, wire.ALG_SHA1)),
        ("rsa2048", (RSASSA, wire.ALG_SHA256), (RSASSA, wire.ALG_SHA384)),
        ("secp256r1", (wire.ALG_ECDSA, wire.ALG_SHA256), (wire.ALG_ECDSA, wire.ALG_SHA1)),
        ("secp256r1", (wire.ALG_ECDSA, wire.ALG_SHA256), (wire.ALG_ECDSA, wire.ALG_SHA384)),
    ],
)
async def test_signature_has_the_scheme_of_its_key(
    tmp_path: Path, kind: str, own: tuple[int, int], used: tuple[int, int]
) -> None:
    lab = await Lab.make(tmp_path)
    tpm = SoftTpm(ek=make_ek("L-2"), ak=make_ak(kind, scheme=own), ak_scheme=own)
    node = lab.node(tpm)
    await lab.attest(node)

    def bend(_: ChallengeMessage, extra: bytes) -> QuoteEvidence:
        attest, _sig = tpm.quote((PCRS,), extra)
        return QuoteEvidence(attest, sign(tpm.ak.private, attest, used), tpm.pcr_values(PCRS))

    error = await _bend_quote(lab, node, bend)
    assert error.kind is IA
    assert _codes(error) == ["quote_scheme"]


async def test_signed_software_structure_needs_the_ak(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    def bend(_: ChallengeMessage, extra: bytes) -> QuoteEvidence:
        attest, _sig = node.tpm.quote((PCRS,), extra)
        key = make_key("secp256r1")
        forged = sign(key, attest, (wire.ALG_ECDSA, wire.ALG_SHA256))
        return QuoteEvidence(attest, forged, node.tpm.pcr_values(PCRS))

    assert _codes(await _bend_quote(lab, node, bend)) == ["quote_signature"]


QUALIFIERS: dict[str, Callable[[TpmNode, ChallengeMessage, bytes, bytes], bytes]] = {
    "empty": lambda _n, _c, _s, _q: b"",
    "31 bytes": lambda _n, _c, _s, q: q[:31],
    "more bytes": lambda _n, _c, _s, q: q + b"\0",
    "bare nonce": lambda _n, c, _s, _q: c.nonce,
    "certify's": lambda n, c, s, _q: n.qualifier("certify", c, s),
    "time's": lambda n, c, s, _q: n.qualifier("time", c, s),
    "heartbeat's": lambda n, c, s, _q: n.qualifier("heartbeat", c, s),
    "a heartbeat's": lambda n, c, _s, _q: n.qualifier("heartbeat", c, b""),
    "other CSR": lambda n, c, s, _q: replace(n, key=make_svid_key()).qualifier("quote", c, s),
    "no CSR": lambda n, c, s, _q: replace(n, key=None).qualifier("quote", c, s),
    "other secret": lambda n, c, _s, _q: n.qualifier("quote", c, bytes(32)),
    "other nonce": lambda n, c, s, _q: n.qualifier("quote", replace(c, nonce=bytes(32)), s),
    "other AK": lambda n, c, s, _q: replace(n, tpm=SoftTpm(ek=n.tpm.ek)).qualifier("quote", c, s),
}


@pytest.mark.parametrize("row", QUALIFIERS)
async def test_quote_is_bound_to_the_exchange(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    def bend(challenge: ChallengeMessage, expected: bytes) -> QuoteEvidence:
        secret = node.tpm.activate(challenge.credential, challenge.secret)
        extra = QUALIFIERS[row](node, challenge, secret, expected)
        return _signed(node.tpm, node.tpm.quote((PCRS,), extra)[0])

    error = await _bend_quote(lab, node, bend)
    assert _codes(error) == ["nonce_mismatch"]
    assert error.message == "quote: not for this exchange [nonce_mismatch]"


async def test_old_quote_with_the_other_s_is_still_an_old_quote(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    old: list[QuoteEvidence] = []

    async def keep(message: bytes) -> bytes:
        response = node.respond(decode_challenge(message))
        old.append(response.quotes[0])
        return encode_response(response)

    await lab.attest(node, answer=keep)
    assert _codes(await _bend_quote(lab, node, lambda _c, _e: old[0])) == ["nonce_mismatch"]
    other = replace(old[0], sig=_other_s(old[0].sig))
    assert _codes(await _bend_quote(lab, node, lambda _c, _e: other)) == ["nonce_mismatch"]


def _other_s(signature: bytes) -> bytes:
    s = int.from_bytes(signature[-32:], "big")
    return signature[:-32] + (N256 - s).to_bytes(32, "big")


async def test_other_s_and_short_r_in_a_fresh_quote_are_accepted(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    async def answer(message: bytes) -> bytes:
        response = node.respond(decode_challenge(message))
        quote = response.quotes[0]
        signature = _other_s(quote.sig)
        while signature[6] != 0:
            signature = _other_s(node.tpm.sign(quote.attest))
        r, s = signature[6:38].lstrip(b"\0"), signature[40:].lstrip(b"\0")
        short = signature[:4] + sized(r) + sized(s)
        return encode_response(replace(response, quotes=(replace(quote, sig=short),)))

    await lab.attest(node, answer=answer)


SIGNERS: dict[str, Callable[[TpmNode], bytes]] = {
    "empty": lambda _: b"",
    "another key": lambda _: make_ak().qualified_name,
    "another hierarchy": lambda n: qualified_name(OWNER, n.tpm.ak.name),
    "the name": lambda n: n.tpm.ak.name,
}


@pytest.mark.parametrize("row", SIGNERS)
async def test_qualified_signer_is_the_activated_key(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    def bend(_: ChallengeMessage, extra: bytes) -> QuoteEvidence:
        body = node.tpm.quote_body((PCRS,))
        attest = node.tpm.attest(wire.ST_QUOTE, body, extra, signer=SIGNERS[row](node))
        return _signed(node.tpm, attest)

    assert _codes(await _bend_quote(lab, node, bend)) == ["quote_signer"]


SELECTIONS: dict[str, tuple[tuple[PcrSelection, ...], str]] = {
    "empty": ((), "PCRs asked for were not quoted"),
    "bank not enabled": (
        (PcrSelection("sha256", ()),),
        "bank sha256 is not active on this TPM",
    ),
    "SHA-1 instead": ((PcrSelection("sha1", (0, 2, 4, 7)),), "bank sha1 was not asked for"),
    "SHA-1 too": ((PCRS, PcrSelection("sha1", (0,))), "bank sha1 was not asked for"),
    "one fewer": ((PcrSelection("sha256", (0, 2, 4)),), "PCR 7 was not quoted"),
    "one more": ((PcrSelection("sha256", (0, 2, 4, 7, 16)),), "PCR 16 was not asked for"),
    "bank twice": ((PCRS, PCRS), "bank sha256 was quoted twice"),
    "other PCRs": ((PcrSelection("sha256", (16, 23)),), "PCR 0 was not quoted"),
}


@pytest.mark.parametrize("row", SELECTIONS)
async def test_exactly_the_pcrs_asked_for_are_quoted(tmp_path: Path, row: str) -> None:
    selections, words = SELECTIONS[row]
    lab = await Lab.make(tmp_path)
    node = lab.node()
    error = await _bend_quote(
        lab, node, lambda _, extra: _signed(node.tpm, node.tpm.quote(selections, extra)[0])
    )
    assert "pcr_selection" in _codes(error)
    assert words in error.message


def _selection_bytes(count: int, *entries: bytes) -> bytes:
    return struct.pack(">I", count) + b"".join(entries)


ENTRY = struct.pack(">HB", wire.ALG_SHA256, 3) + b"\x95\x00\x00"
RAW_SELECTIONS = {
    "size 0": _selection_bytes(1, struct.pack(">HB", wire.ALG_SHA256, 0)),
    "size 5": _selection_bytes(1, struct.pack(">HB", wire.ALG_SHA256, 5) + b"\x95\0\0\0\0"),
    "size 255": _selection_bytes(1, struct.pack(">HB", wire.ALG_SHA256, 255) + bytes(255)),
    "PCR 24": _selection_bytes(1, struct.pack(">HB", wire.ALG_SHA256, 4) + b"\x95\0\0\x01"),
    "count": _selection_bytes(0xFFFFFFFF, ENTRY),
    "count of 17": _selection_bytes(17, *[ENTRY] * 17),
    "unknown bank": _selection_bytes(1, struct.pack(">HB", 0x12, 3) + b"\x95\0\0"),
}


@pytest.mark.parametrize("row", RAW_SELECTIONS)
async def test_pcr_selection_is_well_formed(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    def bend(_: ChallengeMessage, extra: bytes) -> QuoteEvidence:
        digest = node.tpm.quote_body((PCRS,))[-34:]
        attest = node.tpm.attest(wire.ST_QUOTE, RAW_SELECTIONS[row] + digest, extra)
        return _signed(node.tpm, attest)

    error = await _bend_quote(lab, node, bend)
    assert _codes(error) == ["quote_malformed"]
    assert "PCR selection is malformed" in error.message


@pytest.mark.parametrize("size", [1, 2, 4])
async def test_bitmap_of_another_size_is_accepted_when_empty_beyond(
    tmp_path: Path, size: int
) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    async def answer(message: bytes) -> bytes:
        challenge = decode_challenge(message)
        honest = node.respond(challenge)
        extra = node.qualifier("quote", challenge, honest.secret)
        entry = struct.pack(">HB", wire.ALG_SHA256, size) + b"\x95\0\0\0"[:size]
        body = _selection_bytes(1, entry) + node.tpm.quote_body((PCRS,))[-34:]
        quote = _signed(node.tpm, node.tpm.attest(wire.ST_QUOTE, body, extra))
        return encode_response(replace(honest, quotes=(quote,)))

    await lab.attest(node, answer=answer)


def _values(bend: Callable[[dict[int, bytes]], object]) -> Callable[[Response], Response]:
    def apply(response: Response) -> Response:
        quote = response.quotes[0]
        values = dict(quote.pcrs["sha256"])
        bend(values)
        return replace(response, quotes=(replace(quote, pcrs={"sha256": values}),))

    return apply


def _swap(values: dict[int, bytes]) -> None:
    values[0], values[2] = values[2], values[0]


VALUES: dict[str, tuple[Callable[[dict[int, bytes]], object], str, str]] = {
    "altered": (lambda v: v.update({4: bytes(32)}), "pcr_digest", "do not match the signed"),
    "swapped": (_swap, "pcr_digest", "do not match the signed digest"),
    "20 bytes": (
        lambda v: v.update({4: bytes(20)}),
        "pcr_values",
        "PCR 4 has 20 bytes, expected 32",
    ),
    "one byte": (lambda v: v.update({4: b"x"}), "pcr_values", "PCR 4 has 1 bytes"),
    "not selected": (
        lambda v: v.update({5: bytes(32)}),
        "pcr_values",
        "PCR 5 was not asked for",
    ),
    "missing": (lambda v: v.pop(7), "pcr_values", "value of PCR 7 is missing"),
    "shifted bytes": (
        lambda v: v.update({0: v[0] + v[2][:1], 2: v[2][1:]}),
        "pcr_values",
        "PCR 0 has 33 bytes",
    ),
}


@pytest.mark.parametrize("row", VALUES)
async def test_pcr_values_match_the_digest(tmp_path: Path, row: str) -> None:
    bend, code, words = VALUES[row]
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(lab.node(), response=_values(bend))
    assert error.kind is IA
    assert code in _codes(error)
    assert words in error.message


async def test_values_of_another_bank_are_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)

    def extra(response: Response) -> Response:
        quote = response.quotes[0]
        pcrs = {**quote.pcrs, "sha384": {0: bytes(48)}}
        return replace(response, quotes=(replace(quote, pcrs=pcrs),))

    assert _codes(await lab.refusal(lab.node(), response=extra)) == ["pcr_values"]


@pytest.mark.parametrize("size", [0, 20, 64])
async def test_digest_has_the_length_of_the_signing_hash(tmp_path: Path, size: int) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    def bend(_: ChallengeMessage, extra: bytes) -> QuoteEvidence:
        body = encode_selections((PCRS,)) + sized(bytes(size))
        return _signed(node.tpm, node.tpm.attest(wire.ST_QUOTE, body, extra))

    assert _codes(await _bend_quote(lab, node, bend)) == ["quote_digest_size"]


async def test_missing_and_repeated_quotes_are_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, "pcrs = { sha256 = [0, 7]  sha384 = [0, 7] }\n")
    node = lab.node()
    await lab.attest(node)
    for bend in (
        lambda r: replace(r, quotes=()),
        lambda r: replace(r, quotes=r.quotes[:1]),
    ):
        error = await lab.refusal(node, response=bend)
        assert error.message == "quote: evidence asked for is missing [evidence_missing]"
    twice = await lab.refusal(node, response=lambda r: replace(r, quotes=(r.quotes[0],) * 2))
    assert _codes(twice)[0] == "pcr_selection"
    swapped = await lab.refusal(node, response=lambda r: replace(r, quotes=r.quotes[::-1]))
    assert "pcr_selection" in _codes(swapped)


@pytest.mark.parametrize("blank", [b"\0", b"\xff"])
async def test_bank_the_firmware_never_used_is_denied(tmp_path: Path, blank: bytes) -> None:
    lab = await Lab.make(tmp_path)
    pcrs = {("sha256", n): blank * 32 for n in range(8)}
    node = lab.node(SoftTpm(ek=make_ek("L-2"), pcrs=pcrs))
    error = await lab.refusal(node)
    assert error.kind is PD
    assert error.message == "quote: bank sha256 was not used by the firmware [bank_unused]"


async def test_pcr_outside_policy_is_denied(tmp_path: Path) -> None:
    good = SoftTpm().pcrs
    allowed = f'pcr_values {{ sha256 {{ "4" = ["{good["sha256", 4].hex()}"]  "7" = ["{good["sha256", 7].hex()}"] }} }}\n'
    lab = await Lab.make(tmp_path, allowed)
    other = {("sha256", 4): b"\x01" * 32, ("sha256", 7): b"\x02" * 32}
    error = await lab.refusal(lab.node(SoftTpm(ek=make_ek("L-2"), pcrs=other)))
    assert error.kind is PD
    assert _codes(error) == ["pcr_mismatch", "pcr_mismatch"]
    assert error.message == (
        "policy: PCR 4 of bank sha256 is not among the allowed values [pcr_mismatch]"
    )
    assert good["sha256", 4].hex() not in error.message


# --- the agent's key ----------------------------------------------------------------------------


async def _bend_certify(
    lab: Lab, node: TpmNode, bend: Callable[[ChallengeMessage, bytes], SignedStatement | None]
) -> SpireHwError:
    async def answer(message: bytes) -> bytes:
        challenge = decode_challenge(message)
        honest = node.respond(challenge)
        expected = node.qualifier("certify", challenge, honest.secret)
        return encode_response(replace(honest, certify=bend(challenge, expected)))

    return await lab.refusal(node, answer=answer)


async def test_key_outside_the_tpm_is_denied(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    node.key, node.csr_spki = None, make_svid_key().spki
    error = await lab.refusal(node)
    assert error.kind is PD
    assert error.message == "policy: the agent key must be in the TPM [key_not_in_tpm]"


async def test_key_outside_the_tpm_is_accepted_when_allowed(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, "require_tpm_key = false\n")
    node = lab.node()
    node.key, node.csr_spki = None, make_svid_key().spki
    assert "key:tpm" not in (await lab.attest(node)).selector_values
    node.csr_spki = None
    assert "key:tpm" not in (await lab.attest(node)).selector_values


async def test_host_that_cannot_tell_the_csr_gets_no_key_selector(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    node.key = None
    assert _codes(await lab.refusal(node)) == ["key_not_in_tpm"]


async def test_certify_that_was_announced_must_come(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(lab.node(), response=lambda r: replace(r, certify=None))
    assert error.message == "certify: evidence asked for is missing [evidence_missing]"


def _changed(**changes: Any) -> Callable[[Response], Response]:
    return lambda response: replace(response, **changes)


async def test_evidence_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, "require_tpm_key = false\n")
    node = lab.node()
    node.key, node.csr_spki = None, make_svid_key().spki
    statement = SignedStatement(b"a", b"b")
    rows: list[dict[str, Any]] = [
        {"certify": statement},
        {"time": statement},
        {"log": b"x"},
        {"ima": b"x"},
        {"ima_from": 0},
    ]
    for changes in rows:
        error = await lab.refusal(node, response=_changed(**changes))
        assert _codes(error) == ["evidence_unasked"]


async def test_statement_about_another_object_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    other = make_svid_key()
    error = await _bend_certify(
        lab, node, lambda _, extra: SignedStatement(*node.tpm.certify(other, extra))
    )
    assert _codes(error) == ["certify_name"]
    assert error.message == "certify: statement is about another key [certify_name]"


async def test_csr_of_another_key_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(lab.node(), csr_spki=make_svid_key().spki)
    assert error.message == "certify: CSR holds another key [csr_key_mismatch]"


KEY_BITS = {
    "not fixed to the TPM": SVID_KEY_ATTRIBUTES & ~(1 << 1),
    "duplicable": SVID_KEY_ATTRIBUTES & ~(1 << 4),
    "imported": SVID_KEY_ATTRIBUTES & ~(1 << 5),
    "restricted": SVID_KEY_ATTRIBUTES | 1 << 16,
    "decrypting": SVID_KEY_ATTRIBUTES | 1 << 17,
    "not signing": SVID_KEY_ATTRIBUTES & ~(1 << 18),
    "encryptedDuplication": SVID_KEY_ATTRIBUTES | 1 << 11,
    "stClear": SVID_KEY_ATTRIBUTES | 1 << 2,
}


@pytest.mark.parametrize("row", KEY_BITS)
async def test_attributes_of_the_agent_key_are_demanded(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    node.key = make_svid_key(attributes=KEY_BITS[row])
    error = await lab.refusal(node)
    assert _codes(error) == ["key_attributes"]
    assert f"certify: attributes {KEY_BITS[row]:#010x} are not acceptable" in error.message


BOUND = hashlib.sha256(b"a policy over PCRs").digest()
KEY_POLICY = f'key_policies = ["{BOUND.hex()}"]'
# Without userWithAuth: the policy is the one way to use the key.
BY_POLICY_ALONE = SVID_KEY_ATTRIBUTES & ~0x40


def bound_key(policy: bytes, attributes: int) -> SoftKey:
    private = make_key("secp256r1")
    return SoftKey(private, encode_public(private, attributes, policy=policy), OWNER)


async def test_key_that_is_bound_to_an_expected_policy_is_accepted(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, KEY_POLICY)
    await lab.attest(replace(lab.node(), key=bound_key(BOUND, BY_POLICY_ALONE)))


@pytest.mark.parametrize(
    ("policy", "attributes"),
    [
        (b"", SVID_KEY_ATTRIBUTES),
        (b"", BY_POLICY_ALONE),
        (bytes(32), BY_POLICY_ALONE),
        (BOUND, SVID_KEY_ATTRIBUTES),
    ],
)
async def test_key_that_is_not_bound_as_expected_is_denied(
    tmp_path: Path, policy: bytes, attributes: int
) -> None:
    lab = await Lab.make(tmp_path, KEY_POLICY)
    node = replace(lab.node(), key=bound_key(policy, attributes))
    honest = replace(lab.node(), key=bound_key(BOUND, BY_POLICY_ALONE))
    error = await lab.refusal(node, afterwards=honest)
    assert error.kind is PD
    assert error.message == "certify: key is not bound to the expected policy [key_policy]"


async def test_key_outside_the_tpm_is_bound_to_nothing(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path, KEY_POLICY + "\nrequire_tpm_key = false")
    node = replace(lab.node(), key=None, csr_spki=make_svid_key().spki)
    honest = replace(lab.node(), key=bound_key(BOUND, BY_POLICY_ALONE))
    assert _codes(await lab.refusal(node, afterwards=honest)) == ["key_not_in_tpm"]


async def test_key_with_a_sha1_name_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    assert node.key is not None
    public = encode_public(node.key.private, SVID_KEY_ATTRIBUTES, name_alg=wire.ALG_SHA1)
    node.key = replace(node.key, public=public)
    assert _codes(await lab.refusal(node)) == ["key_name_alg"]


async def test_statement_of_another_signer_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    key = node.key
    assert key is not None

    def by_itself(_: ChallengeMessage, extra: bytes) -> SignedStatement:
        attest, _sig = node.tpm.certify(key, extra)
        scheme = (wire.ALG_ECDSA, wire.ALG_SHA256)
        return SignedStatement(attest, sign(key.private, attest, scheme))

    assert _codes(await _bend_certify(lab, node, by_itself)) == ["certify_signature"]
    other = SoftTpm(ek=node.tpm.ek)
    error = await _bend_certify(
        lab, node, lambda _, extra: SignedStatement(*other.certify(key, extra))
    )
    assert _codes(error) == ["certify_signature", "certify_signer"]


async def test_statement_of_another_exchange_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    key = node.key
    assert key is not None

    def quote_role(challenge: ChallengeMessage, _: bytes) -> SignedStatement:
        secret = node.tpm.activate(challenge.credential, challenge.secret)
        return SignedStatement(*node.tpm.certify(key, node.qualifier("quote", challenge, secret)))

    empty = _bend_certify(lab, node, lambda _c, _e: SignedStatement(*node.tpm.certify(key, b"")))
    for attempt in (_bend_certify(lab, node, quote_role), empty):
        error = await attempt
        assert error.message == "certify: not for this exchange [nonce_mismatch]"


NAMES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "SHA-1 name": lambda n, _q: b"\x00\x04" + n[2:22],
    "20 bytes": lambda n, _q: n[:20],
    "qualified name": lambda _n, q: q,
    "empty": lambda _n, _q: b"",
}


@pytest.mark.parametrize("row", NAMES)
async def test_certified_name_is_the_whole_name(tmp_path: Path, row: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    key = node.key
    assert key is not None

    def bend(_: ChallengeMessage, extra: bytes) -> SignedStatement:
        body = sized(NAMES[row](key.name, key.qualified_name)) + sized(key.qualified_name)
        attest = node.tpm.attest(wire.ST_CERTIFY, body, extra)
        return SignedStatement(attest, node.tpm.sign(attest))

    assert _codes(await _bend_certify(lab, node, bend)) == ["certify_name"]


async def test_certify_body_with_extra_bytes_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    key = node.key
    assert key is not None

    def bend(_: ChallengeMessage, extra: bytes) -> SignedStatement:
        attest = node.tpm.certify(key, extra)[0] + b"\0"
        return SignedStatement(attest, node.tpm.sign(attest))

    assert _codes(await _bend_certify(lab, node, bend)) == ["certify_malformed"]


@pytest.mark.parametrize("kind", ["secp256r1", "secp384r1", "rsa2048", "rsa4096"])
async def test_every_key_type_of_the_agent_is_certified(tmp_path: Path, kind: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    node.key = make_svid_key(kind)
    assert "key:tpm" in (await lab.attest(node)).selector_values


# --- everything at once -------------------------------------------------------------------------


async def test_all_faults_are_collected(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    def bend(response: Response) -> Response:
        quote = response.quotes[0]
        bad = replace(quote, sig=node.tpm.sign(b"other"), pcrs={"sha256": {0: bytes(32)}})
        return replace(response, certify=None, quotes=(bad,), log=b"x")

    assert _codes(await lab.refusal(node, response=bend)) == [
        "evidence_unasked",
        "evidence_missing",
        "quote_signature",
        "pcr_values",
        "pcr_values",
        "pcr_values",
    ]


async def test_swapped_fields_of_two_good_exchanges_are_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    old: list[Response] = []

    async def keep(message: bytes) -> bytes:
        old.append(node.respond(decode_challenge(message)))
        return encode_response(old[0])

    await lab.attest(node, answer=keep)
    first = old[0]
    swaps: list[Callable[[Response], Response]] = [
        lambda r: replace(r, secret=first.secret),
        lambda r: replace(r, quotes=first.quotes),
        lambda r: replace(r, certify=first.certify),
        lambda r: replace(r, quotes=(replace(r.quotes[0], sig=first.quotes[0].sig),)),
        lambda r: replace(r, quotes=(replace(r.quotes[0], attest=first.quotes[0].attest),)),
        lambda r: replace(r, certify=SignedStatement(r.quotes[0].attest, r.quotes[0].sig)),
    ]
    for swap in swaps:
        assert (await lab.refusal(node, response=swap)).kind is IA


async def test_power_cut_and_fallen_clock_are_accepted(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    await lab.attest(node)
    node.tpm.clock_ms, node.tpm.safe, node.tpm.reset_count = 5, 0, 9
    await lab.attest(node)


async def test_selectors_of_a_full_exchange(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    values = (await lab.attest(node)).selector_values
    pcrs = [f"pcr:sha256:{n}:{node.tpm.pcrs['sha256', n].hex()}" for n in (0, 2, 4, 7)]
    fixed = [
        f"pub_hash:{node.ek_hash}",
        "ak:hierarchy:endorsement",
        "ek:method:ca",
        "manufacturer:id:4E544300",
        "model:NPCT75x",
        "version:id:00070002",
        "key:tpm",
    ]
    last = [f"fw:4E544300:{node.tpm.firmware_version:016x}", "tier:quote"]
    assert [v for v in values if not v.startswith("ek:ca:")] == [*fixed, *pcrs, *last]
    assert sum(v.startswith("ek:ca:") for v in values) == 1


async def test_honest_ecc_node_uses_an_ecc_key() -> None:
    assert isinstance(make_ak().private, ec.EllipticCurvePrivateKey)

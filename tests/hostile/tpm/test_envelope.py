"""The first message and the answer as bytes."""

from __future__ import annotations

import asyncio
import base64
import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.errors import (
    AttestationError,
    DeniedError,
    ErrorKind,
    InvalidInputError,
    LimitError,
    SpireHwError,
)
from spire_hw_sim.again import refused
from spire_hw_sim.softtpm import SoftTpm, make_ek
from spire_hw_sim.tpmlab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.asyncio
IA, PD = ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED


def _json(bend: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(payload: bytes) -> bytes:
        value = json.loads(payload)
        bend(value)
        return json.dumps(value).encode()

    return apply


def _text(old: str, new: str) -> Callable[[bytes], bytes]:
    def apply(payload: bytes) -> bytes:
        assert old.encode() in payload
        return payload.replace(old.encode(), new.encode(), 1)

    return apply


def _set(path: str, value: object) -> Callable[[bytes], bytes]:
    def bend(message: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            message = message[parent]
        message[last] = value

    return _json(bend)


def _del(path: str) -> Callable[[bytes], bytes]:
    def bend(message: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            message = message[parent]
        del message[last]

    return _json(bend)


ENVELOPES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty payload": (lambda _: b"", "attestation data is missing"),
    "an answer first": (
        lambda _: b'{"Secret":"AAAA"}',
        "expected attestation data, got an answer",
    ),
    "a challenge first": (lambda _: b'{"EC":{}}', "expected attestation data, got an answer"),
    "another attestor's message": (lambda _: b'{"DevIDCert":["AAAA"]}', "member EK is missing"),
    "utf-16": (lambda p: p.decode().encode("utf-16"), "not UTF-8 JSON"),
    "utf-32": (lambda p: p.decode().encode("utf-32-le"), "not UTF-8 JSON"),
    "byte-order mark": (lambda p: b"\xef\xbb\xbf" + p, "not UTF-8 JSON"),
    "invalid utf-8": (lambda p: p.replace(b'"EK"', b'"E\xff"'), "not UTF-8 JSON"),
    "member twice": (_text("{", '{"EK":"AAAA",'), "member EK appears twice"),
    "member twice but for case": (_text("{", '{"ek":"AAAA",'), "member EK appears twice"),
    "member twice by case folding": (_text("{", '{"E\\u212a":"AAAA",'), "appears twice"),
    "inner member twice": (_text('"v":2', '"v":2,"v":2'), "member v appears twice"),
    "NaN": (_text("{", '{"x":NaN,'), "number not allowed here"),
    "Infinity": (_text("{", '{"x":-Infinity,'), "number not allowed here"),
    "huge float": (_text("{", '{"x":1e400,'), "number not allowed here"),
    "5000 digits": (_text("{", '{"x":' + "9" * 5000 + ","), "number not allowed here"),
    "deep nesting": (lambda _: b"[" * 60_000, "nested too deep"),
    "deep objects": (lambda _: b'{"a":' * 13_000, "nested too deep"),
    "second value": (lambda p: p + b"{}", "one JSON object expected"),
    "text after": (lambda p: p + b"x", "one JSON object expected"),
    "a list": (lambda _: b"[]", "one JSON object expected"),
    "a string": (lambda _: b'"x"', "one JSON object expected"),
    "null": (lambda _: b"null", "one JSON object expected"),
    "AK null": (_set("AK", None), "AK is missing"),
    "AK empty": (_set("AK", {}), "AK is missing"),
    "AK absent": (_del("AK"), "AK is missing"),
    "creation data absent": (_del("AK.CreateData"), "AK.CreateData is missing"),
    "AK a list": (_set("AK", [1]), "AK must be an object"),
    "EK a number": (_set("EK", 5), "EK must be a string"),
    "v true": (_set("spire_hw.v", True), "v must be an integer"),
    "v a float": (_text('"v":2', '"v":2.0'), "number not allowed here"),
    "ours a list": (_set("spire_hw", []), "spire_hw must be an object"),
    "chain a string": (_set("spire_hw.ek_chain", "AAAA"), "ek_chain must be a list"),
    "chain of numbers": (_set("spire_hw.ek_chain", [1]), "must be a list of strings"),
    "TCSD a string": (_set("AK.UseTCSDActivationFormat", "no"), "must be true or false"),
    "spare padding": (_set("AK.Public", "AAAA="), "AK.Public is not canonical base64"),
    "spare bits": (_set("AK.Public", "AB=="), "AK.Public is not canonical base64"),
    "url alphabet": (_set("AK.Public", "__--"), "AK.Public is not canonical base64"),
    "line break": (_set("AK.Public", "AA\nAA"), "AK.Public is not canonical base64"),
    "no padding": (_set("AK.Public", "AAA"), "AK.Public is not canonical base64"),
    "not ascii": (_set("AK.Public", "AA\u00e4A"), "AK.Public is not canonical base64"),
    "lone surrogate": (_text("{", '{"x":["\\ud800"],'), "text is not valid Unicode"),
    "lone surrogate in a name": (_text("{", '{"\\udfff":1,'), "text is not valid Unicode"),
    "dialect 0": (_set("spire_hw.v", 0), "dialect 0 is not supported"),
    "dialect 3": (_set("spire_hw.v", 3), "dialect 3 is not supported, this server speaks 2"),
    "dialect -2": (_set("spire_hw.v", -2), "dialect -2 is not supported"),
    "dialect as text": (_set("spire_hw.v", "2"), "v must be an integer"),
    "dialect absent": (_del("spire_hw.v"), "spire_hw.v is missing"),
    "unknown member": (_set("spire_hw.x", 1), "unknown member spire_hw.x"),
    "control characters": (_set("spire_hw.\x1b[31m", 1), r"unknown member spire_hw.\x1b[31m"),
    "quotes sent early": (_set("spire_hw.quotes", []), "evidence sent before it was asked for"),
    "log sent early": (_set("spire_hw.log", "AAAA"), "evidence sent before it was asked for"),
    "ima sent early": (_set("spire_hw.ima", "AAAA"), "evidence sent before it was asked for"),
    "announcement without size": (_set("spire_hw.log", {"sha256": "0" * 64}), "size is missing"),
    "announcement with a wrong hash": (
        _set("spire_hw.log", {"size": 1, "sha256": "A" * 64}),
        "not a lower-case hex SHA-256",
    ),
    "announcement out of range": (_set("spire_hw.ima", {"entries": -1}), "out of range"),
    "boot id not a UUID": (_set("spire_hw.boot_id", "x"), "boot_id is not a UUID"),
    "boot id too long": (_set("spire_hw.boot_id", "x" * 1000), "boot_id is too long"),
}


@pytest.mark.parametrize("row", ENVELOPES)
async def test_first_message_is_refused(tmp_path: Path, row: str) -> None:
    bend, words = ENVELOPES[row]
    lab = await Lab.make(tmp_path)
    node = lab.node()
    error = await lab.refusal(node, payload=bend(node.payload()))
    assert isinstance(error, InvalidInputError)
    assert error.kind is IA
    assert words in error.message
    assert error.message.startswith("envelope: ")


async def test_payload_over_64_kib_is_refused_before_reading(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    error = await lab.refusal(lab.node(), payload=b"{" * (64 * 1024 + 1))
    assert isinstance(error, LimitError)
    assert error.message == "envelope: payload is 65537 bytes, limit 65536"


async def test_payload_of_64_kib_is_read(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    payload = node.payload()
    await lab.attest(node, payload=payload + b" " * (64 * 1024 - len(payload)))


async def test_evidence_without_a_quote_is_denied(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    error = await lab.refusal(node, payload=_del("spire_hw")(node.payload()))
    assert error.kind is PD
    assert error.message == "policy: this server requires a quote [activation_only]"


async def test_unknown_outer_members_order_and_blanks_do_not_matter(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    value = json.loads(node.payload())
    value = {"Extra": {"a": [1, "\u00e4"]}, **dict(reversed(value.items()))}
    await lab.attest(node, payload=json.dumps(value, indent=3, ensure_ascii=True).encode())


async def test_announcements_are_read_and_change_nothing(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    payload = _set("spire_hw.log", {"size": 10, "sha256": "0" * 64})(node.payload())
    payload = _set("spire_hw.ima", {"entries": 4})(payload)
    payload = _set("spire_hw.boot_id", "8e7ab9f4-71c5-4d0a-9d5d-6c1f9d0a3b11")(payload)
    await lab.attest(node, payload=payload)


ANSWERS: dict[str, tuple[Callable[[bytes, bytes], bytes], str]] = {
    "another first message": (lambda first, _: first, "expected a challenge response"),
    "nothing": (lambda _first, _answer: b"", "expected a challenge response"),
    "not JSON": (lambda _first, _answer: b"\x00\x01", "not UTF-8 JSON"),
    "member twice": (lambda _, a: a.replace(b"{", b'{"Secret":"AAAA",', 1), "appears twice"),
    "ours missing": (lambda _, a: _del("spire_hw")(a), "spire_hw is missing"),
    "another dialect": (lambda _, a: _set("spire_hw.v", 1)(a), "dialect 1 is not supported"),
    "unknown member": (lambda _, a: _set("spire_hw.more", 1)(a), "unknown member spire_hw.more"),
    "unknown member of a quote": (
        lambda _, a: a.replace(b'"attest"', b'"at":"AAAA","attest"', 1),
        "unknown member spire_hw.quotes.at",
    ),
    "quotes missing": (lambda _, a: _del("spire_hw.quotes")(a), "quotes must be a list"),
    "quotes of text": (lambda _, a: _set("spire_hw.quotes", ["x"])(a), "a list of objects"),
    "too many quotes": (
        lambda _, a: _set("spire_hw.quotes", [{}] * 5)(a),
        "spire_hw.quotes has more than 4 entries",
    ),
    "certify empty": (lambda _, a: _set("spire_hw.certify", {})(a), "certify is missing"),
    "secret a number": (lambda _, a: _set("Secret", 5)(a), "Secret must be a string"),
    "secret in hex": (lambda _, a: _set("Secret", "zz")(a), "Secret is not canonical base64"),
}


@pytest.mark.parametrize("row", ANSWERS)
async def test_answer_is_refused(tmp_path: Path, row: str) -> None:
    bend, words = ANSWERS[row]
    lab = await Lab.make(tmp_path)
    node = lab.node()

    async def answer(message: bytes) -> bytes:
        return bend(node.payload(), node.answer(message))

    error = await lab.refusal(node, answer=answer)
    assert isinstance(error, InvalidInputError)
    assert words in error.message


async def test_answer_over_one_mib_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)

    async def answer(_: bytes) -> bytes:
        return b" " * (1024 * 1024 + 1)

    error = await lab.refusal(lab.node(), answer=answer)
    assert isinstance(error, LimitError)
    assert error.kind is ErrorKind.RESOURCE_EXHAUSTED


PCR_KEYS = ["07", "+7", "7 ", "1_0", "\u0667", "24", "-1", "", "0x7"]


@pytest.mark.parametrize("key", PCR_KEYS)
async def test_pcr_number_has_one_spelling(tmp_path: Path, key: str) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    def bend(message: dict[str, Any]) -> None:
        pcrs = message["spire_hw"]["quotes"][0]["pcrs"]["sha256"]
        pcrs[key] = pcrs.pop("7")

    async def answer(message: bytes) -> bytes:
        return _json(bend)(node.answer(message))

    error = await lab.refusal(node, answer=answer)
    assert error.message == "quote: PCR number is malformed"


@pytest.mark.parametrize(
    "change", [str.upper, lambda t: t + "\n", lambda t: t[:4] + " " + t[4:], lambda t: t[1:]]
)
async def test_pcr_value_is_lower_case_hex(tmp_path: Path, change: Callable[[str], str]) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    def bend(message: dict[str, Any]) -> None:
        pcrs = message["spire_hw"]["quotes"][0]["pcrs"]["sha256"]
        pcrs["7"] = change(pcrs["7"])

    async def answer(message: bytes) -> bytes:
        return _json(bend)(node.answer(message))

    error = await lab.refusal(node, answer=answer)
    assert error.message == "quote: PCR value is not lower-case hex"


async def test_pcr_bank_must_be_known(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    async def answer(message: bytes) -> bytes:
        return node.answer(message).replace(b'"sha256"', b'"sha3\\u001b"')

    error = await lab.refusal(node, answer=answer)
    assert error.message == r"quote: bank sha3\x1b is not known"


async def test_silence_ends_with_the_challenge_timeout(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    asked, cancelled = asyncio.Event(), asyncio.Event()

    async def silent(_: bytes) -> bytes:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return b""

    async def act() -> object:
        asked.clear()
        attempt = asyncio.ensure_future(lab.attest(node, answer=silent))  # noqa: TID251
        await asked.wait()
        await lab.clock.advance(timedelta(seconds=29))
        assert not attempt.done()
        await lab.clock.advance(timedelta(seconds=1))
        lab.challenges.clear()
        lab.admitted.clear()
        return await attempt

    error = await refused(act)
    assert isinstance(error, AttestationError)
    assert error.kind is ErrorKind.DEADLINE_EXCEEDED
    assert error.message == "challenge: not answered in 30 s [challenge_timeout]"
    assert cancelled.is_set()
    assert lab.server.open_exchanges == 0
    await lab.attest(node)


async def test_right_answer_after_the_time_limit_is_refused(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    async def late(message: bytes) -> bytes:
        answer = node.answer(message)
        lab.clock._monotonic += 31
        return answer

    error = await lab.refusal(node, answer=late)
    assert error.kind is ErrorKind.DEADLINE_EXCEEDED


async def test_wall_clock_jump_does_not_expire_the_challenge(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()

    async def jump(message: bytes) -> bytes:
        lab.clock._now += timedelta(days=365)
        return node.answer(message)

    await lab.attest(node, answer=jump)


async def test_error_of_the_stream_passes_through(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    broken = InvalidInputError("envelope: stream ended before the challenge was answered")

    async def answer(_: bytes) -> bytes:
        raise broken.with_traceback(None)  # one error raised again and again gathers frames

    assert await lab.refusal(node, answer=answer) is broken


async def test_one_node_has_one_exchange_at_a_time(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    second: list[SpireHwError] = []

    async def again() -> object:
        lab.challenges.clear()
        lab.admitted.clear()
        return await lab.attest(node)

    async def answer(message: bytes) -> bytes:
        second.append(await refused(again))
        return node.answer(message)

    await lab.attest(node, answer=answer)
    assert isinstance(second[0], LimitError)
    assert "attesting already" in second[0].message
    await lab.attest(node)


async def test_exchanges_are_bounded_in_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spire_hw_plugins.nodeattestor.tpm.server._MAX_OPEN", 1)
    lab = await Lab.make(tmp_path)
    node, other = lab.node(), lab.node(SoftTpm(ek=make_ek("H-2")))

    async def answer(message: bytes) -> bytes:
        with pytest.raises(LimitError, match="too many attestations in progress"):
            await lab.attest(other)
        return node.answer(message)

    await lab.attest(node, answer=answer)


async def test_banned_node_gets_no_challenge(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    made = await lab.attest(node)
    lab.banned[made.agent_id] = DeniedError("node: banned")
    sent = len(lab.challenges)
    with pytest.raises(DeniedError):
        await lab.attest(node)
    assert len(lab.challenges) == sent
    assert lab.server.open_exchanges == 0


async def test_node_cannot_choose_its_identity(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    payload = _set("id", "spiffe://example.org/spire/agent/tpm/other")(node.payload())
    made = await lab.attest(node, payload=payload)
    assert str(made.agent_id) == f"spiffe://example.org/spire/agent/tpm/{node.ek_hash}"
    error = await lab.refusal(node, payload=_set("spire_hw.id", "x")(node.payload()))
    assert "unknown member" in error.message


PEMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "EK is missing"),
    "not PEM": (lambda _: b"hello", "no endorsement key in the request"),
    "binary": (lambda _: b"\xff\xfe\x00", "no endorsement key in the request"),
    "three blocks": (lambda p: p + p, "expected one certificate and at most one public key"),
    "two certificates": (
        lambda p: p[: p.index(b"-----BEGIN PUBLIC")] * 2,
        "expected one certificate and at most one public key",
    ),
    "two public keys": (
        lambda p: p + p[p.index(b"-----BEGIN PUBLIC") :],
        "expected one certificate and at most one public key",
    ),
    "text before": (lambda p: b"x\n" + p, "text beside PEM blocks"),
    "text between": (lambda p: p.replace(b"-----\n-----", b"-----\nx\n-----"), "text beside"),
    "headers": (
        lambda p: p.replace(b"CERTIFICATE-----\n", b"CERTIFICATE-----\nA: b\n\n", 1),
        "text beside",
    ),
    "private key": (
        lambda _: b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
        "unexpected PEM block",
    ),
    "wrong base64": (
        lambda _: b"-----BEGIN PUBLIC KEY-----\nAB==\n-----END PUBLIC KEY-----\n",
        "not canonical base64",
    ),
}


@pytest.mark.parametrize("row", PEMS)
async def test_ek_bundle_is_refused(tmp_path: Path, row: str) -> None:
    bend, words = PEMS[row]
    lab = await Lab.make(tmp_path)
    node = lab.node()
    bundle = base64.b64decode(json.loads(node.payload())["EK"])
    bent = base64.b64encode(bend(bundle)).decode()
    error = await lab.refusal(node, payload=_set("EK", bent)(node.payload()))
    assert error.kind is IA
    assert words in error.message
    assert "c2VjcmV0" not in error.message


async def test_ek_bundle_in_any_order_and_with_crlf_is_accepted(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    bundle = base64.b64decode(json.loads(node.payload())["EK"])
    cut = bundle.index(b"-----BEGIN PUBLIC")
    swapped = (bundle[cut:] + bundle[:cut]).replace(b"\n", b"\r\n")
    await lab.attest(node, payload=_set("EK", base64.b64encode(swapped).decode())(node.payload()))


async def test_certificate_alone_names_the_key(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    node = lab.node()
    bundle = base64.b64decode(json.loads(node.payload())["EK"])
    alone = bundle[: bundle.index(b"-----BEGIN PUBLIC")]
    await lab.attest(node, payload=_set("EK", base64.b64encode(alone).decode())(node.payload()))

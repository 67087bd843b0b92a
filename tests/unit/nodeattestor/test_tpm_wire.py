from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from spire_hw.errors import InvalidInputError, LimitError
from spire_hw.tpm.wire import PcrSelection
from spire_hw_plugins.nodeattestor.tpm import dialects, rounds
from spire_hw_plugins.nodeattestor.tpm.wire import (
    AkEvidence,
    AttestationData,
    ChallengeMessage,
    LogAnnouncement,
    QuoteEvidence,
    Response,
    SignedStatement,
    decode_attestation_data,
    decode_challenge,
    decode_response,
    encode_attestation_data,
    encode_challenge,
    encode_response,
)
from spire_hw_sim.again import refused_now

AK = AkEvidence(b"public", b"data", b"attest", b"signature")
FULL = AttestationData(
    ek_certificate=b"certificate",
    ek_spki=b"key",
    ak=AK,
    ek_pub=b"ek",
    ek_chain=(b"one", b"two"),
    key_pub=b"svid key",
    ak_parent_pub=b"parent",
    log=LogAnnouncement(3, "0" * 64),
    ima_entries=7,
    boot_id="8e7ab9f4-71c5-4d0a-9d5d-6c1f9d0a3b11",
)
CHALLENGE = ChallengeMessage(
    credential=b"\0\4blob",
    secret=b"\0\3abc",
    nonce=bytes(range(32)),
    quote=(PcrSelection("sha256", (0, 7)), PcrSelection("sha384", (0,))),
    want=("log", "ima", "time"),
    ima_from=4,
    ima_reset=9,
    limits=(("log_bytes", 10), ("response_bytes", 20)),
    expires_ms=1000,
)
RESPONSE = Response(
    secret=bytes(32),
    quotes=(QuoteEvidence(b"a", b"s", {"sha256": {0: bytes(32), 7: b"\x07" * 32}}),),
    certify=SignedStatement(b"c", b"d"),
    time=SignedStatement(b"t", b"u"),
    log=b"log",
    ima=b"ima",
    ima_from=4,
    ima_left=5,
)


def test_first_message_reads_back() -> None:
    assert decode_attestation_data(encode_attestation_data(FULL)) == FULL
    least = AttestationData(ek_certificate=None, ek_spki=b"key", ak=AK, ek_pub=b"ek")
    assert decode_attestation_data(encode_attestation_data(least)) == least
    unseen = replace(least, csr=False)
    assert decode_attestation_data(encode_attestation_data(unseen)) == unseen


@pytest.mark.parametrize("value", [0, "false", None, {}])
def test_whether_the_csr_is_known_is_true_or_false(value: object) -> None:
    message = json.loads(encode_attestation_data(FULL))
    message["spire_hw"]["csr"] = value
    with pytest.raises(InvalidInputError, match="true or false"):
        decode_attestation_data(json.dumps(message).encode())


def test_a_key_is_not_sent_for_a_csr_that_is_unknown() -> None:
    with pytest.raises(InvalidInputError, match="key_pub"):
        decode_attestation_data(encode_attestation_data(replace(FULL, csr=False)))


def test_first_message_has_the_shape_the_go_plugins_read() -> None:
    value = json.loads(encode_attestation_data(FULL))
    pem = base64.b64decode(value["EK"]).decode()
    assert pem.index("BEGIN CERTIFICATE") < pem.index("BEGIN PUBLIC KEY")
    assert list(value) == ["EK", "AK", "spire_hw"]
    assert list(value["AK"]) == [
        "Public",
        "UseTCSDActivationFormat",
        "CreateData",
        "CreateAttestation",
        "CreateSignature",
    ]
    assert value["spire_hw"]["v"] == 2


def test_challenge_reads_back() -> None:
    for message in (CHALLENGE, replace(CHALLENGE, csr=False)):
        assert decode_challenge(encode_challenge(message)) == message
    value = json.loads(encode_challenge(CHALLENGE))
    assert list(value["EC"]) == ["Credential", "Secret"]


def test_answer_reads_back() -> None:
    assert decode_response(encode_response(RESPONSE)) == RESPONSE
    least = Response(b"", ())
    assert decode_response(encode_response(least)) == least


def test_first_message_of_other_dialects_lacks_our_object() -> None:
    old = AttestationData(
        ek_certificate=b"certificate", ek_spki=None, ak=AK, ek_pub=None, csr=False
    )
    assert list(json.loads(encode_attestation_data(old))) == ["EK", "AK"]
    assert decode_attestation_data(encode_attestation_data(old)) == old


def test_challenge_and_answer_of_other_dialects_read_back() -> None:
    message = dialects.encode_challenge(b"\0\4blob", b"\0\3abc")
    assert json.loads(message) == {"EC": {"Credential": "AARibG9i", "Secret": "AANhYmM="}}
    assert dialects.decode_challenge(message) == (b"\0\4blob", b"\0\3abc")
    assert dialects.decode_challenge(encode_challenge(CHALLENGE)) is None
    assert dialects.decode_response(dialects.encode_response(bytes(32))) == bytes(32)


def test_parts_of_a_list_read_back() -> None:
    assert rounds.decode_part_request(rounds.encode_part_request(12)) == 12
    part = rounds.ImaPart(b"packed", 12, 34)
    assert rounds.decode_part(rounds.encode_part(part)) == part


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ({"v": 2, "want": ["ima"], "ima_from": -1}, "out of range"),
        ({"v": 2, "want": ["log"], "ima_from": 0}, "not known"),
        ({"v": 2, "want": [], "ima_from": 0}, "not known"),
        ({"v": 2, "want": ["ima"]}, "ima_from is missing"),
        ({"v": 3, "want": ["ima"], "ima_from": 0}, "dialect 3"),
        ({"v": 2, "want": ["ima"], "ima_from": 0, "quote": []}, "unknown member spire_hw.quote"),
    ],
)
def test_hostile_request_for_a_part_is_refused(ours: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        rounds.decode_part_request(json.dumps({"spire_hw": ours}).encode())


def test_a_second_challenge_is_no_request_for_a_part() -> None:
    with pytest.raises(InvalidInputError, match="expected a request"):
        rounds.decode_part_request(encode_challenge(CHALLENGE))


def _bent(path: str, value: object) -> bytes:
    message: dict[str, Any] = json.loads(encode_challenge(CHALLENGE))
    *parents, last = path.split(".")
    place = message
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(message).encode()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


CHALLENGES: list[tuple[str, object, str]] = [
    ("EC", None, "challenge: credential is missing"),
    ("spire_hw", None, "spire_hw is missing"),
    ("spire_hw.v", 3, "dialect 3 is not supported"),
    ("spire_hw.nonce", _b64(bytes(31)), "nonce must be 32 bytes"),
    ("spire_hw.nonce", _b64(bytes(33)), "nonce must be 32 bytes"),
    ("spire_hw.nonce", _b64(bytes(10_000)), "nonce must be 32 bytes"),
    ("spire_hw.nonce", "", "nonce is missing"),
    ("spire_hw.quote", [{"bank": "sha256", "pcrs": []}], "PCR request is malformed"),
    ("spire_hw.quote", [{"bank": "sha256", "pcrs": [24]}], "PCR request is malformed"),
    ("spire_hw.quote", [{"bank": "sha256", "pcrs": [-1]}], "a list of numbers"),
    ("spire_hw.quote", [{"bank": "sha256", "pcrs": [True]}], "a list of numbers"),
    ("spire_hw.quote", [{"bank": "sha256", "pcrs": [1, 1]}], "PCR request is malformed"),
    ("spire_hw.quote", [{"bank": "sha256", "pcrs": [0] * 9000}], "PCR request is malformed"),
    ("spire_hw.quote", [{"bank": "md5", "pcrs": [0]}], "PCR request is malformed"),
    ("spire_hw.quote", [{}] * 5, "more than 4 entries"),
    ("spire_hw.quote", [{"bank": "sha256", "pcrs": [0], "x": 1}], "unknown member"),
    ("spire_hw.want", ["passwd"], "evidence asked for is not known"),
    ("spire_hw.want", ["log", "log"], "evidence asked for is not known"),
    ("spire_hw.limits", {"response_bytes": -1}, "out of range"),
    ("spire_hw.limits", [], "limits must be an object"),
    ("spire_hw.expires_ms", 2**64, "number not allowed|out of range"),
    ("spire_hw.path", "/etc/shadow", "unknown member spire_hw.path"),
    ("EC.Credential", _b64(b"\0\5blob"), "challenge: credential is malformed"),
    ("EC.Credential", _b64(b"blob"), "challenge: credential is malformed"),
    ("EC.Credential", _b64(b"\0\0"), "challenge: credential is malformed"),
    ("EC.Secret", _b64(b"\x03\xe8" + bytes(1000)), "challenge: secret is malformed"),
    ("EC.Secret", _b64(b"\0\2abc"), "challenge: secret is malformed"),
]


@pytest.mark.parametrize(("path", "value", "words"), CHALLENGES)
def test_hostile_challenge_is_refused(path: str, value: object, words: str) -> None:
    message = _bent(path, value)
    error = refused_now(lambda: decode_challenge(message))
    assert isinstance(error, InvalidInputError)
    assert re.search(words, error.message)


def test_challenge_without_optional_members_is_read() -> None:
    message = json.loads(encode_challenge(CHALLENGE))
    for name in ("want", "ima_from", "limits"):
        del message["spire_hw"][name]
    made = decode_challenge(json.dumps(message).encode())
    assert (made.want, made.ima_from, made.limits) == ((), 0, ())


def test_challenge_over_its_limit_is_refused() -> None:
    with pytest.raises(LimitError):
        decode_challenge(b" " * (64 * 1024 + 1))

"""Messages to and from a signer; whatever comes from it is checked here before it is used.

Source: `spire_hw.signer.v1.Signer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from spire_hw._pb import hw_signer_pb2 as pb
from spire_hw.errors import EncodingError, InvalidInputError, SpireHwError
from spire_hw.key import (
    KeyType,
    Purpose,
    SignOptions,
    fingerprint,
    key_type_of,
    parse_spki,
)
from spire_hw.plugin.custody import Custody
from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature
from spire_hw.rpc.status import from_code
from spire_hw_plugins.keymanager.remote.witness import LogHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

MAX_ITEMS: Final = 64
IN_FLIGHT: Final = "in_flight"  # the word of a signer that has too much under way for us
MAX_RESPONSE_BYTES: Final = 1 << 20
_SERVICE: Final = "/spire_hw.signer.v1.Signer/"
GET_PUBLIC_KEYS: Final = _SERVICE + "GetPublicKeys"
GENERATE_KEY: Final = _SERVICE + "GenerateKey"
SIGN: Final = _SERVICE + "Sign"
GET_LOG_HEAD: Final = _SERVICE + "GetLogHead"
GET_KEY_CUSTODY: Final = "/spire_hw.signer.v1.Custody/GetKeyCustody"
ATTEST_OWN_KEY: Final = "/spire_hw.signer.v1.Custody/AttestOwnKey"

PublicKeysResponse = pb.GetPublicKeysResponse
GenerateResponse = pb.GenerateKeyResponse
SignResponse = pb.SignResponse
LogHeadResponse = pb.GetLogHeadResponse
KeyCustodyResponse = pb.GetKeyCustodyResponse
AttestResponse = pb.AttestOwnKeyResponse

_MAX_KEYS: Final = 1024
_MAX_SIGNATURE_BYTES: Final = 512
_MAX_TEXT: Final = 300
_MAX_ATTRIBUTES: Final = 64
_MAX_TIME: Final = 253_402_300_800  # the year 10000
_STATED: Final = {one.value: one for one in Custody if one is not Custody.SIGNER_STATED}
_OVERHEAD_BYTES: Final = 64  # of an item on the wire, besides its key id and what is signed


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to sign.

    Attributes:
        request_id: 16 random bytes, the same in every try.
        key_id: by which key.
        purpose: what the content is, None for a digest.
        content: what is signed, or its digest.
        options: hash and padding.
    """

    request_id: bytes
    key_id: str
    purpose: Purpose | None
    content: bytes
    options: SignOptions

    @property
    def size(self) -> int:
        """Return about how many bytes it takes on the wire, not less."""
        return len(self.content) + len(self.key_id) + _OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Refused:
    """What a signer's policy, or its device, had against one thing.

    Attributes:
        error: for the caller, with the reason's code in its message.
        reason: that code, such as `tbs_policy`.
        retry_after_s: when it may work, 0 when that is not said.
    """

    error: SpireHwError
    reason: str
    retry_after_s: float = 0.0


def list_request() -> Message:
    """Return the request for all keys."""
    return pb.GetPublicKeysRequest()


def head_request() -> Message:
    """Return the request for the head of the log."""
    return pb.GetLogHeadRequest()


def custody_request(key_id: str) -> Message:
    """Return the request for where a key is."""
    return pb.GetKeyCustodyRequest(key_id=key_id)


def attest_request(key_id: str, nonce: bytes) -> Message:
    """Return the request for evidence about a key."""
    return pb.AttestOwnKeyRequest(key_id=key_id, nonce=nonce)


def generate_request(request_id: bytes, key_id: str, key_type: KeyType) -> Message:
    """Return the request for a new key."""
    return pb.GenerateKeyRequest(
        request_id=request_id,
        key_id=key_id,
        key_type=key_type.value,  # type: ignore[arg-type]  # its own enum has the same numbers
    )


def sign_request(items: Sequence[Item]) -> Message:
    """Return the request for a batch of signatures."""
    request = pb.SignRequest()
    for item in items:
        added = request.items.add(
            request_id=item.request_id, key_id=item.key_id, hash=item.options.hash.value
        )
        if item.options.pss:
            added.pss.salt_length = item.options.salt_length
        match item.purpose:
            case Purpose.X509:
                added.x509 = item.content
            case Purpose.CSR:
                added.csr = item.content
            case Purpose.JWT:
                added.jwt = item.content
            case None:
                added.digest = item.content
    return request


def head_of(message: pb.LogHead) -> LogHead:
    """Return the head of the log as an answer states it."""
    return LogHead(message.seq, message.hash)


def listed_keys(answer: pb.GetPublicKeysResponse) -> list[KeyInfo]:
    """Return the keys of an answer, in its order.

    Raises:
        EncodingError: a key does not parse, or an id is there twice.
    """
    if len(answer.public_keys) > _MAX_KEYS:
        raise EncodingError("list of keys", f"has more than {_MAX_KEYS}")
    found = [key_info(key) for key in answer.public_keys]
    if len({info.key_id for info in found}) != len(found):
        raise EncodingError("list of keys", "names a key id twice")
    return found


def key_info(message: pb.PublicKey) -> KeyInfo:
    """Return a key of an answer.

    Raises:
        EncodingError: it does not parse, or type or fingerprint are not the key's.
    """
    what = f'key "{clean(message.id)}"'
    try:
        public_key = parse_spki(message.pkix_data)
        key_type = key_type_of(public_key)
    except InvalidInputError as e:
        raise EncodingError(what, e.message) from e
    if not message.id or not message.id.isprintable():
        raise EncodingError(what, "has no proper id")
    mark = fingerprint(message.pkix_data)
    if message.type != key_type.value or message.fingerprint != mark:
        raise EncodingError(what, "says another type or fingerprint than its key has")
    return KeyInfo(message.id, key_type, public_key, mark)


def stated_custody(answer: pb.GetKeyCustodyResponse) -> KeyEvidence:
    """Return where a signer says that a key is; nobody but the signer vouches for it.

    Raises:
        EncodingError: it names too many attributes.
    """
    told = answer.custody
    if len(told.attributes) > _MAX_ATTRIBUTES:
        raise EncodingError("custody", f"has more than {_MAX_ATTRIBUTES} attributes")
    created = told.created_at
    return KeyEvidence(
        clean(told.location),
        {clean(name): clean(value) for name, value in sorted(told.attributes.items())},
        custody=Custody.SIGNER_STATED,
        device=clean(told.device),
        token=clean(told.token),
        generation=told.generation,
        created=datetime.fromtimestamp(created, UTC) if 0 < created < _MAX_TIME else None,
        stated=_STATED.get(told.custody, Custody.UNKNOWN),
    )


def signed(answer: pb.SignResponse, count: int) -> list[KeySignature | Refused]:
    """Return what became of each item of a batch, in its order.

    Raises:
        EncodingError: not as many results as items, or one is neither signature nor refusal.
    """
    if len(answer.results) != count:
        raise EncodingError("answer", f"has {len(answer.results)} results for {count} signatures")
    return [_result(result) for result in answer.results]


def _result(result: pb.SignResult) -> KeySignature | Refused:
    if result.HasField("refusal"):
        return refused(result.refusal)
    if not 1 <= len(result.signature) <= _MAX_SIGNATURE_BYTES:
        raise EncodingError("answer", f"has a signature of {len(result.signature)} bytes")
    return KeySignature(result.signature, result.fingerprint)


def refused(message: pb.Refusal) -> Refused:
    """Return a refusal; a status of 0 reads as an internal error."""
    reason = clean(message.reason)
    text = clean(message.message).removeprefix(f"{reason}: ") or "refused"
    if message.retry_after_ms:
        wait_s = max(0.1, message.retry_after_ms / 1000)
        text = f"{text}; it may work in {wait_s:.{1 if wait_s < 1 else 0}f} s"
    if reason:
        text = f"{text} [{reason}]"
    error = from_code(message.code or 13, f"signer: {text}")
    return Refused(error, reason, message.retry_after_ms / 1000)


def clean(text: str) -> str:
    """Return a signer's text as it may stand in a message or a log line."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_TEXT])

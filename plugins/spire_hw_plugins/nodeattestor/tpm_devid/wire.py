"""Messages of the `tpm_devid` node attestor, in upstream's form (no I/O).

One round trip of JSON objects with byte fields in padded base64: certificates, public areas and a
certify statement; a nonce and a credential; a signature and what the credential held. Members we
do not know are ignored, as upstream does; what two parsers could read differently is refused. One
member is ours: `spire_hw` carries the issuers of the endorsement certificate that the TPM holds.

Public areas are bare TPMT_PUBLIC, credential and secret come without their 2-byte size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from spire_hw.errors import InvalidInputError
from spire_hw_plugins.nodeattestor import strictjson

NAME: Final = "tpm_devid"
NONCE_BYTES: Final = 32
SECRET_BYTES: Final = 32
MAX_PAYLOAD_BYTES: Final = 64 * 1024
MAX_MESSAGE_BYTES: Final = 16 * 1024
MAX_CERTIFICATES: Final = 10
MAX_EK_CHAIN: Final = 6
_MAX_BLOB_BYTES: Final = 2048


@dataclass(frozen=True, slots=True)
class AttestationData:
    """The agent's first message.

    Attributes:
        certificates: DER, the node's own first, then intermediates.
        devid_pub: TPMT_PUBLIC of the key in the certificate.
        ek_certificate: DER.
        ek_pub: TPMT_PUBLIC of the endorsement key.
        ak_pub: TPMT_PUBLIC of the attestation key.
        certified: TPMS_ATTEST, the attestation key's word that the DevID key is in its TPM.
        signature: TPMT_SIGNATURE over it.
        ek_chain: DER issuers of the endorsement certificate.
    """

    certificates: tuple[bytes, ...]
    devid_pub: bytes
    ek_certificate: bytes
    ek_pub: bytes
    ak_pub: bytes
    certified: bytes
    signature: bytes
    ek_chain: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Challenge:
    """The server's message.

    Attributes:
        nonce: to be signed by the DevID key.
        credential: TPMS_ID_OBJECT, without size.
        secret: encrypted seed, without size.
    """

    nonce: bytes
    credential: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """The agent's answer.

    Attributes:
        signature: over the nonce with SHA-256; PKCS#1 v1.5, or DER ECDSA-Sig-Value.
        secret: what the credential held.
    """

    signature: bytes
    secret: bytes


def encode_attestation_data(data: AttestationData) -> bytes:
    """Return the first message."""
    members: dict[str, object] = {
        "DevIDCert": data.certificates,
        "DevIDPub": data.devid_pub,
        "EKCert": data.ek_certificate,
        "EKPub": data.ek_pub,
        "AKPub": data.ak_pub,
        "CertifiedDevID": data.certified,
        "CertificationSignature": data.signature,
    }
    if data.ek_chain:
        members["spire_hw"] = {"ek_chain": data.ek_chain}
    return strictjson.dump(members)


def decode_attestation_data(payload: bytes) -> AttestationData:
    """Read the first message.

    Raises:
        LimitError: larger than 64 KiB.
        InvalidInputError: anything else that is wrong with it.
    """
    if not payload:
        raise InvalidInputError("envelope: attestation data is missing")
    message = strictjson.load(payload, MAX_PAYLOAD_BYTES)
    if not message.has("DevIDCert"):
        raise InvalidInputError("devid: certificate is missing")
    return AttestationData(
        certificates=_certificates(message, "DevIDCert", MAX_CERTIFICATES),
        devid_pub=_bounded(message, "DevIDPub"),
        ek_certificate=message.blob("EKCert"),
        ek_pub=_bounded(message, "EKPub"),
        ak_pub=_bounded(message, "AKPub"),
        certified=_bounded(message, "CertifiedDevID"),
        signature=_bounded(message, "CertificationSignature"),
        ek_chain=_ek_chain(message),
    )


def _ek_chain(message: strictjson.StrictObject) -> tuple[bytes, ...]:
    if not message.has("spire_hw"):
        return ()
    ours = message.child("spire_hw")
    ours.closed("ek_chain")
    return _certificates(ours, "ek_chain", MAX_EK_CHAIN)


def _certificates(message: strictjson.StrictObject, name: str, limit: int) -> tuple[bytes, ...]:
    try:
        texts = message.texts(name)
    except InvalidInputError as e:
        raise InvalidInputError("devid: certificate is missing: an empty entry") from e
    if not texts:
        raise InvalidInputError("devid: certificate is missing")
    if len(texts) > limit:
        raise InvalidInputError(f"devid: {name} has more than {limit} certificates")
    return tuple(strictjson.decode64(t, f"{name}[{i}]") for i, t in enumerate(texts))


def encode_challenge(challenge: Challenge) -> bytes:
    """Return the challenge."""
    sealed = {"Credential": challenge.credential, "Secret": challenge.secret}
    return strictjson.dump({"DevID": challenge.nonce, "CredActivation": sealed})


def decode_challenge(data: bytes) -> Challenge:
    """Read the challenge.

    Raises:
        LimitError: larger than 16 KiB.
        InvalidInputError: anything else that is wrong with it.
    """
    message = strictjson.load(data, MAX_MESSAGE_BYTES)
    if not message.has("CredActivation") or not message.has("DevID"):
        raise InvalidInputError("challenge: nonce or credential is missing")
    sealed = message.child("CredActivation")
    return Challenge(
        nonce=_bounded(message, "DevID"),
        credential=_bounded(sealed, "Credential"),
        secret=_bounded(sealed, "Secret"),
    )


def encode_response(response: Response) -> bytes:
    """Return the answer."""
    return strictjson.dump({"DevID": response.signature, "CredActivation": response.secret})


def decode_response(data: bytes) -> Response:
    """Read the answer.

    Raises:
        LimitError: larger than 16 KiB.
        InvalidInputError: anything else that is wrong with it.
    """
    if not data:
        raise InvalidInputError("devid: answer is incomplete")
    message = strictjson.load(data, MAX_MESSAGE_BYTES)
    if not message.has("DevID") or not message.has("CredActivation"):
        raise InvalidInputError("devid: answer is incomplete")
    return Response(_bounded(message, "DevID"), _bounded(message, "CredActivation"))


def _bounded(message: strictjson.StrictObject, name: str) -> bytes:
    value = message.blob(name)
    if len(value) > _MAX_BLOB_BYTES:
        raise InvalidInputError(f"envelope: {name} is too long")
    return value

"""Messages of the `x509pop` node attestor and the proof of possession in them (no I/O).

One round trip: certificates, a nonce, a nonce of the agent's with a signature over both. All are
JSON objects with byte fields in padded base64. Members we do not know are ignored, as upstream
does; what two parsers could read differently is refused. The digest that is signed is
SHA-256(server's nonce ‖ agent's nonce): neither side alone chooses what the key signs.

Hostile bytes give an `InvalidInputError` whose text begins with `envelope: `, a `LimitError` for
size, or an `AttestationError`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, utils

from spire_hw.errors import AttestationError, ErrorKind, Finding, InvalidInputError
from spire_hw.key import HashAlgorithm, SignOptions
from spire_hw_plugins.nodeattestor import strictjson

if TYPE_CHECKING:
    from spire_hw.key import PublicKey

NAME: Final = "x509pop"
NONCE_BYTES: Final = 32
MAX_PAYLOAD_BYTES: Final = 64 * 1024
MAX_MESSAGE_BYTES: Final = 16 * 1024
_MAX_SIGNATURE_BYTES: Final = 1024
_PREHASHED: Final = utils.Prehashed(hashes.SHA256())


class Scheme(Enum):
    """How possession is proved; the value is the member's name in challenge and response."""

    RSA = "rsa_signature"
    ECDSA = "ecdsa_signature"

    @classmethod
    def of(cls, key: PublicKey) -> Scheme:
        """Return the scheme for a key."""
        return cls.ECDSA if isinstance(key, ec.EllipticCurvePublicKey) else cls.RSA

    @property
    def options(self) -> SignOptions:
        """Return how a `Signer` has to sign `combined`."""
        return SignOptions(HashAlgorithm.SHA256, pss=self is Scheme.RSA)


@dataclass(frozen=True, slots=True)
class Challenge:
    """The server's message: which proof it wants, and 32 bytes of its own."""

    scheme: Scheme
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """The agent's answer.

    Attributes:
        scheme: as in the challenge.
        nonce: 32 bytes of the agent's own.
        signature: over `combined`; RSASSA-PSS at modulus length, or DER ECDSA-Sig-Value.
    """

    scheme: Scheme
    nonce: bytes
    signature: bytes


def encode_payload(certificates: list[bytes]) -> bytes:
    """Return the agent's first message: DER certificates, the node's own first."""
    return strictjson.dump({"certificates": certificates})


def decode_payload(data: bytes, *, max_certificates: int) -> list[bytes]:
    """Return the DER certificates, unparsed; there is at least one."""
    texts = strictjson.load(data, MAX_PAYLOAD_BYTES).texts("certificates")
    if not texts:
        raise InvalidInputError("envelope: certificates is empty")
    if len(texts) > max_certificates:
        raise InvalidInputError(
            f"envelope: more than {max_certificates - 1} intermediate certificates"
        )
    return [strictjson.decode64(t, f"certificates[{i}]") for i, t in enumerate(texts)]


def encode_challenge(challenge: Challenge) -> bytes:
    """Return the challenge as upstream writes it, the other scheme's member null."""
    return strictjson.dump(
        {
            scheme.value: {"nonce": challenge.nonce} if scheme is challenge.scheme else None
            for scheme in Scheme
        }
    )


def decode_challenge(data: bytes) -> Challenge:
    """Read a challenge; exactly one scheme must be asked for."""
    scheme, member = _only(strictjson.load(data, MAX_MESSAGE_BYTES))
    return Challenge(scheme, _nonce(member))


def encode_response(response: Response) -> bytes:
    """Return the response as upstream writes it; an ECDSA signature as its two halves."""
    fields = {"nonce": response.nonce}
    if response.scheme is Scheme.RSA:
        fields["signature"] = response.signature
    else:
        for name, half in zip("rs", utils.decode_dss_signature(response.signature), strict=True):
            fields[name] = half.to_bytes((half.bit_length() + 7) // 8)
    return strictjson.dump({s.value: fields if s is response.scheme else None for s in Scheme})


def decode_response(data: bytes) -> Response:
    """Read a response; exactly one scheme must be answered."""
    scheme, member = _only(strictjson.load(data, MAX_MESSAGE_BYTES))
    nonce = _nonce(member)
    if scheme is Scheme.RSA:
        return Response(scheme, nonce, _bounded(member, "signature"))
    r, s = (int.from_bytes(_bounded(member, name)) for name in "rs")
    return Response(scheme, nonce, utils.encode_dss_signature(r, s))


def combined(challenge_nonce: bytes, response_nonce: bytes) -> bytes:
    """Return the digest to be signed.

    Raises:
        InvalidInputError: a nonce is not 32 bytes.
    """
    for nonce in (challenge_nonce, response_nonce):
        if len(nonce) != NONCE_BYTES:
            raise InvalidInputError(f"nonce is {len(nonce)} bytes, {NONCE_BYTES} are needed")
    return hashlib.sha256(challenge_nonce + response_nonce).digest()


def verify_response(key: PublicKey, challenge: Challenge, response: Response) -> None:
    """Check that whoever answered holds the private half of a key.

    Raises:
        AttestationError: PERMISSION_DENIED, another scheme than asked for, the server's nonce
            sent back, or a signature that does not hold.
    """
    if response.scheme is not challenge.scheme or challenge.scheme is not Scheme.of(key):
        raise _denied("scheme_mismatch", "response is not of the kind that was asked for")
    if response.nonce == challenge.nonce:
        raise _denied("nonce_reflected", "response sends the server's nonce back as its own")
    digest = combined(challenge.nonce, response.nonce)
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(response.signature, digest, ec.ECDSA(_PREHASHED))
        else:
            # Go signs with the longest salt that fits, others with 32 bytes.
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO)
            key.verify(response.signature, digest, pss, _PREHASHED)
    except (InvalidSignature, ValueError) as e:
        raise _denied("signature_mismatch", "signature does not verify") from e


def _denied(code: str, text: str) -> AttestationError:
    return AttestationError([Finding(code, f"challenge: {text}", ErrorKind.PERMISSION_DENIED)])


def _only(message: strictjson.StrictObject) -> tuple[Scheme, strictjson.StrictObject]:
    given = [scheme for scheme in Scheme if message.has(scheme.value)]
    if len(given) != 1:
        names = " or ".join(scheme.value for scheme in Scheme)
        raise InvalidInputError(f"envelope: exactly one of {names} expected")
    return given[0], message.child(given[0].value)


def _nonce(member: strictjson.StrictObject) -> bytes:
    nonce = member.blob("nonce")
    if len(nonce) != NONCE_BYTES:
        raise InvalidInputError(f"envelope: nonce is {len(nonce)} bytes, not {NONCE_BYTES}")
    return nonce


def _bounded(member: strictjson.StrictObject, name: str) -> bytes:
    value = member.blob(name)
    if len(value) > _MAX_SIGNATURE_BYTES:
        raise InvalidInputError(f"envelope: {name} is too long")
    return value

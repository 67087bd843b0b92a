"""Policies that bind a key to PCR values, and approvals that let other values take their place.

A bound key signs only while the machine is in a known state. Bound to values alone it is lost with
the next update; bound to an authority it signs whenever that authority has approved the state the
machine is in, so an update needs a new approval and no new key. Computes and checks over bytes;
what the TPM does with it is in `keys`.

Spec: TPM 2.0 Library, Part 3 "TPM2_PolicyPCR", "TPM2_PolicyAuthorize".
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from spire_hw.errors import InvalidInputError
from spire_hw.tpm import wire
from spire_hw.tpm.public import name_of, parse_public
from spire_hw.tpm.wire import PcrSelection

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from spire_hw.key import PrivateKey, PublicKey
    from spire_hw.tpm.public import TpmPublic

_CC_POLICY_AUTHORIZE, _CC_POLICY_PCR = 0x0000016A, 0x0000017F
_DIGEST_BYTES: Final = 32
# sign, userWithAuth: a public key that is in no TPM.
_EXTERNAL_ATTRIBUTES: Final = 0x00040040
_CURVES: Final = {
    "secp256r1": wire.CURVE_P256,
    "secp384r1": wire.CURVE_P384,
    "secp521r1": wire.CURVE_P521,
}
_VERSION: Final = 1
_MAX_FILE_BYTES: Final = 64 * 1024
_MAX_REF_BYTES: Final = 32
_PREHASHED: Final = utils.Prehashed(hashes.SHA256())
_SHA256: Final = hashes.SHA256()

PcrValues = dict[str, dict[int, bytes]]


def pcr_policy(values: Mapping[str, Mapping[int, bytes]]) -> bytes:
    """Return the policy that holds while PCRs have the given values.

    Args:
        values: bank to PCR number to value.
    """
    selections = selections_of(values)
    joined = b"".join(values[bank][n] for bank, n in wire.order_selection(selections))
    body = wire.encode_selections(selections) + hashlib.sha256(joined).digest()
    return _extend(bytes(_DIGEST_BYTES), struct.pack(">I", _CC_POLICY_PCR) + body)


def selections_of(values: Mapping[str, Mapping[int, bytes]]) -> tuple[PcrSelection, ...]:
    """Return which PCRs there are values of, banks in the order the policy takes them."""
    banks = sorted(values, key=wire.BANKS.__getitem__)
    return tuple(PcrSelection(bank, tuple(sorted(values[bank]))) for bank in banks)


def authorized_policy(signer_name: bytes, ref: bytes) -> bytes:
    """Return the policy that holds while another policy, approved by a signer, holds.

    Args:
        signer_name: Name of the approving key, see `signer_public`.
        ref: what the approvals are for; an approval counts for one only.
    """
    first = _extend(bytes(_DIGEST_BYTES), struct.pack(">I", _CC_POLICY_AUTHORIZE) + signer_name)
    return _extend(first, ref)


def _extend(policy: bytes, data: bytes) -> bytes:
    return hashlib.sha256(policy + data).digest()


def signer_public(key: PublicKey) -> bytes:
    """Return the TPMT_PUBLIC of a public key that is in no TPM, with SHA-256 as Name algorithm."""
    kind = wire.ALG_ECC if isinstance(key, ec.EllipticCurvePublicKey) else wire.ALG_RSA
    head = struct.pack(">HHI", kind, wire.ALG_SHA256, _EXTERNAL_ATTRIBUTES) + wire.sized(b"")
    head += struct.pack(">HH", wire.ALG_NULL, wire.ALG_NULL)
    numbers = key.public_numbers()
    if isinstance(numbers, ec.EllipticCurvePublicNumbers):
        size = (numbers.curve.key_size + 7) // 8
        head += struct.pack(">HH", _CURVES[numbers.curve.name], wire.ALG_NULL)
        x, y = (n.to_bytes(size, "big") for n in (numbers.x, numbers.y))
        return head + wire.sized(x) + wire.sized(y)
    size = numbers.n.bit_length() // 8
    return head + struct.pack(">HI", 8 * size, 0) + wire.sized(numbers.n.to_bytes(size, "big"))


@dataclass(frozen=True, slots=True)
class Binding:
    """What a key is bound to.

    Attributes:
        selections: PCRs of each bank, banks in the order of their numbers.
        authority: TPMT_PUBLIC of the key whose approvals count; None binds to the values at the
            time the key was made.
        ref: what the approvals have to be for, at most 32 bytes.
    """

    selections: tuple[PcrSelection, ...]
    authority: bytes | None = None
    ref: bytes = b""

    @property
    def signer(self) -> TpmPublic | None:
        """Return the approving key."""
        if self.authority is None:
            return None
        return parse_public(self.authority, "policy authority")

    def document(self) -> dict[str, object]:
        """Return its JSON form."""
        return {
            "pcrs": {entry.bank: list(entry.pcrs) for entry in self.selections},
            "authority": _text64(self.authority or b""),
            "ref": self.ref.hex(),
        }

    @classmethod
    def parse(cls, document: object) -> Binding:
        """Read its JSON form.

        Raises:
            InvalidInputError: not that form.
        """
        members = _members(document, "policy")
        authority = _blob(members, "authority")
        return cls(
            parse_selections(members.get("pcrs")),
            check_signer(authority) if authority else None,
            _ref(members),
        )


def check_signer(public: bytes) -> bytes:
    """Return a TPMT_PUBLIC when it is the one `signer_public` makes of its key.

    Raises:
        InvalidInputError: it does not parse, or would have another Name.
    """
    parsed = parse_public(public, "policy authority")
    if signer_public(parsed.key) != public:
        raise InvalidInputError("policy authority is not in its one form")
    return public


def parse_selections(document: object) -> tuple[PcrSelection, ...]:
    """Read PCR numbers by bank.

    Raises:
        InvalidInputError: unknown bank, no PCR, or numbers out of range or twice.
    """
    chosen: dict[str, dict[int, bytes]] = {}
    for bank, numbers in _members(document, "PCRs").items():
        if bank not in wire.BANKS or not isinstance(numbers, list) or not numbers:
            raise InvalidInputError("PCRs are not lists of numbers by bank, such as sha256")
        if not all(type(n) is int and 0 <= n < wire.PCR_COUNT for n in numbers):
            raise InvalidInputError(f"PCR numbers are not between 0 and {wire.PCR_COUNT - 1}")
        if len(set(numbers)) != len(numbers):
            raise InvalidInputError("a PCR is listed twice")
        chosen[bank] = dict.fromkeys(numbers, b"")
    if not chosen:
        raise InvalidInputError("no PCR is listed")
    return selections_of(chosen)


@dataclass(frozen=True, slots=True)
class Approval:
    """A signer's word that a policy is as good as the one a key was made with.

    Attributes:
        policy: the policy that is approved, 32 bytes.
        ref: what for.
        signer: Name of the approving key.
        signature: TPMT_SIGNATURE over `approved_digest`.
        comment: what it was approved for, in an operator's words.
    """

    policy: bytes
    ref: bytes
    signer: bytes
    signature: bytes
    comment: str = ""

    def encode(self) -> bytes:
        """Return the content of its file."""
        document = {
            "version": _VERSION,
            "comment": self.comment,
            "policy": self.policy.hex(),
            "ref": self.ref.hex(),
            "signer": self.signer.hex(),
            "signature": _text64(self.signature),
        }
        return json.dumps(document, indent="\t").encode() + b"\n"


def approved_digest(policy: bytes, ref: bytes) -> bytes:
    """Return what an approval signs."""
    return hashlib.sha256(policy + ref).digest()


def approve(key: PrivateKey, policy: bytes, ref: bytes = b"", comment: str = "") -> Approval:
    """Approve a policy.

    Args:
        key: the authority's private key.
        policy: from `pcr_policy`.
        ref: what for, as in the keys' settings.
        comment: free text.
    """
    digest = approved_digest(policy, ref)
    name = name_of(signer_public(key.public_key()))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        size = (key.curve.key_size + 7) // 8
        halves = utils.decode_dss_signature(key.sign(digest, ec.ECDSA(_PREHASHED)))
        parts, scheme = [h.to_bytes(size, "big") for h in halves], wire.ALG_ECDSA
    else:
        parts, scheme = [key.sign(digest, padding.PKCS1v15(), _PREHASHED)], wire.ALG_RSASSA
    head = struct.pack(">HH", scheme, wire.ALG_SHA256)
    return Approval(policy, ref, name, head + b"".join(map(wire.sized, parts)), comment)


def parse_approval(content: bytes) -> Approval:
    """Read the content of an approval's file; whether it counts is `find_approval`'s business.

    Raises:
        InvalidInputError: not that format.
    """
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidInputError("approval is too large")
    members = _load(content, "approval")
    if members.get("version") != _VERSION:
        raise InvalidInputError("approval is of a format that is not known")
    comment = members.get("comment", "")
    if not isinstance(comment, str):
        raise InvalidInputError("approval: comment is not text")
    policy = _hex(members, "policy")
    if len(policy) != _DIGEST_BYTES:
        raise InvalidInputError(f"approval: policy is not {_DIGEST_BYTES} bytes")
    signature = _blob(members, "signature")
    wire.parse_signature(signature, "approval: signature")
    return Approval(policy, _ref(members), _hex(members, "signer"), signature, comment)


def find_approval(
    approvals: Iterable[Approval], policy: bytes, binding: Binding
) -> Approval | None:
    """Return an approval of a policy by a binding's authority, None when there is none.

    Signatures are checked here, so that nothing unsigned is given to the TPM.
    """
    signer = binding.signer
    if signer is None:
        return None
    for approval in approvals:
        wanted = (policy, binding.ref, signer.name)
        if (approval.policy, approval.ref, approval.signer) == wanted and _holds(approval, signer):
            return approval
    return None


def _holds(approval: Approval, signer: TpmPublic) -> bool:
    found = wire.parse_signature(approval.signature, "approval: signature")
    digest, key = approved_digest(approval.policy, approval.ref), signer.key
    try:
        if isinstance(key, rsa.RSAPublicKey):
            if found.scheme != wire.ALG_RSASSA or found.hash != wire.ALG_SHA256:
                return False
            key.verify(found.parts[0], digest, padding.PKCS1v15(), _PREHASHED)
            return True
        if found.scheme != wire.ALG_ECDSA or found.hash != wire.ALG_SHA256:
            return False
        r, s = (int.from_bytes(part, "big") for part in found.parts)
        key.verify(utils.encode_dss_signature(r, s), digest, ec.ECDSA(_PREHASHED))
    except InvalidSignature:
        return False
    return True


def encode_values(values: Mapping[str, Mapping[int, bytes]]) -> bytes:
    """Return PCR values as a file for `parse_values`."""
    banks = {b: {str(n): v.hex() for n, v in sorted(pcrs.items())} for b, pcrs in values.items()}
    return json.dumps({"version": _VERSION, "pcrs": banks}, indent="\t").encode() + b"\n"


def parse_values(content: bytes) -> PcrValues:
    """Read PCR values by bank and number.

    Raises:
        InvalidInputError: not that format, or a value is not of its bank's length.
    """
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidInputError("PCR values are too large")
    members = _load(content, "PCR values")
    if members.get("version") != _VERSION:
        raise InvalidInputError("PCR values are of a format that is not known")
    found: PcrValues = {}
    for bank, pcrs in _members(members.get("pcrs"), "PCR values").items():
        if bank not in wire.BANKS:
            raise InvalidInputError("PCR values: unknown bank")
        size = wire.HASHES[wire.BANKS[bank]][1]
        found[bank] = {}
        for number, value in _members(pcrs, "PCR values").items():
            n = _pcr(number)
            raw = _unhex(value, "PCR values")
            if len(raw) != size:
                raise InvalidInputError(f"PCR values: PCR {n} has {len(raw)} bytes, not {size}")
            found[bank][n] = raw
    if not found or not all(found.values()):
        raise InvalidInputError("PCR values: there are none")
    return found


def _pcr(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or str(int(text[:3])) != text:
        raise InvalidInputError("PCR values: a PCR is not a number")
    if int(text) >= wire.PCR_COUNT:
        raise InvalidInputError(f"PCR values: PCR above {wire.PCR_COUNT - 1}")
    return int(text)


def _load(content: bytes, what: str) -> dict[str, Any]:
    try:
        return _members(json.loads(content), what)
    except InvalidInputError:
        raise
    except (ValueError, RecursionError) as e:
        raise InvalidInputError(f"{what}: not JSON") from e


def _members(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{what}: a JSON object expected")
    return value


def _hex(members: Mapping[str, object], name: str) -> bytes:
    return _unhex(members.get(name), name)


def _unhex(value: object, what: str) -> bytes:
    try:
        return bytes.fromhex(value) if isinstance(value, str) else _no_text(what)
    except ValueError as e:
        raise InvalidInputError(f"{what} is not hexadecimal") from e


def _no_text(what: str) -> bytes:
    raise InvalidInputError(f"{what} is missing")


def _ref(members: Mapping[str, object]) -> bytes:
    ref = _hex(members, "ref")
    if len(ref) > _MAX_REF_BYTES:
        raise InvalidInputError(f"ref is longer than {_MAX_REF_BYTES} bytes")
    return ref


def _blob(members: Mapping[str, object], name: str) -> bytes:
    value = members.get(name)
    if not isinstance(value, str):
        return _no_text(name)
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as e:
        raise InvalidInputError(f"{name} is not base64") from e


def _text64(data: bytes) -> str:
    return base64.b64encode(data).decode()

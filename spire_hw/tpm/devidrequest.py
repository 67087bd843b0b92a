"""A request for a DevID certificate, with the proof that its key is in the TPM of an attested node.

The proof is a certify statement of the node's attestation key, bound to this very request. The
server knows that key by the node's attestation; here everything else is checked. No I/O.

Spec: TCG TPM 2.0 Keys for Device Identity and Attestation, "LDevID".
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Final

from spire_hw.errors import AttestationError, Finding, InvalidInputError
from spire_hw.tpm import public as areas
from spire_hw.tpm import verify, wire
from spire_hw.tpm.public import TpmPublic, check_ak, parse_public, qualified_name
from spire_hw.tpm.verify import Statement
from spire_hw.x509.csr import Csr, parse_csr

MAX_REQUEST_BYTES: Final = 64 * 1024
_DOMAIN: Final = b"spire-hw devid v1\x00"
_VERSION: Final = 1
_MEMBERS: Final = ("csr", "public", "ak", "attest", "signature")
_ORIGIN: Final = areas.FIXED_TPM | areas.FIXED_PARENT | areas.SENSITIVE_DATA_ORIGIN
_ALLOWED: Final = (
    _ORIGIN
    | areas.SIGN
    | areas.DECRYPT
    | areas.USER_WITH_AUTH
    | areas.ADMIN_WITH_POLICY
    | areas.NO_DA
)


def check_devid_key(public: TpmPublic) -> None:
    """Demand that a public area is that of a DevID key: made in its TPM, free to sign, there to stay.

    Raises:
        AttestationError: code `devid_attributes`.
    """
    if not public.has(_ORIGIN | areas.SIGN) or public.attributes & ~_ALLOWED:
        text = f"devid: attributes {public.attributes:#010x} are not acceptable"
        raise AttestationError([Finding("devid_attributes", text)])


@dataclass(frozen=True, slots=True)
class DevIdRequest:
    """A request as a node writes it.

    Attributes:
        csr: DER CertificationRequest, signed by the DevID key.
        public: TPMT_PUBLIC of that key.
        ak: TPMT_PUBLIC of the attestation key.
        attest: TPMS_ATTEST, the attestation key's word about the DevID key.
        signature: TPMT_SIGNATURE over it.
    """

    csr: bytes
    public: bytes
    ak: bytes
    attest: bytes
    signature: bytes

    def encode(self) -> bytes:
        """Return the content of its file."""
        members = {name: base64.b64encode(getattr(self, name)).decode() for name in _MEMBERS}
        return json.dumps({"version": _VERSION, **members}, indent="\t").encode() + b"\n"


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request whose proof holds, if the attestation key is who it should be.

    Attributes:
        csr: what is asked for.
        ak_spki: DER SubjectPublicKeyInfo of the attestation key.
    """

    csr: Csr
    ak_spki: bytes


def qualifier(csr: bytes) -> bytes:
    """Return the qualifying data that binds a certify statement to a request."""
    return hashlib.sha256(_DOMAIN + csr).digest()


def parse_request(content: bytes) -> DevIdRequest:
    """Read the content of a request's file; `check_request` checks it.

    Raises:
        InvalidInputError: not that format.
    """
    if len(content) > MAX_REQUEST_BYTES:
        raise InvalidInputError("DevID request is too large")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise InvalidInputError("DevID request is not JSON") from e
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise InvalidInputError("DevID request is of a format that is not known")
    return DevIdRequest(**{name: _blob(document.get(name), name) for name in _MEMBERS})


def _blob(value: object, name: str) -> bytes:
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError as e:
        raise InvalidInputError(f"DevID request: {name} is not base64") from e
    if not data:
        raise InvalidInputError(f"DevID request: {name} is missing")
    return data


def check_request(request: DevIdRequest) -> CheckedRequest:
    """Check everything about a request but whose attestation key it is.

    Raises:
        InvalidInputError: a part does not parse.
        VerificationError: the request's own signature does not hold.
        AttestationError: `devid_key_mismatch`, `devid_attributes`, `keys_equal`, or what
            `check_ak` and `verify_certify` find.
    """
    csr = parse_csr(request.csr)
    key = parse_public(request.public, "devid: public area")
    if key.spki != csr.spki:
        text = "devid: request and TPM key are different keys"
        raise AttestationError([Finding("devid_key_mismatch", text)])
    check_devid_key(key)
    ak = parse_public(request.ak, "ak: public area")
    check_ak(ak)
    if ak.spki == key.spki:
        raise AttestationError([Finding("keys_equal", "ak: keys must be different")])
    verify.verify_certify(
        ak,
        qualified_name(wire.RH_ENDORSEMENT.to_bytes(4, "big"), ak.name),
        key=key,
        expected=qualifier(request.csr),
        statement=Statement(request.attest, request.signature),
    )
    return CheckedRequest(csr, ak.spki)

"""Signing keys of a TPM: create under a storage key, load, sign digests.

All functions are parts of a job: they take a `Connection` and run in the device's thread. A key is
kept as two blobs only this TPM can use; what is loaded is flushed at the end of each block. A key
may besides have a persistent handle, be bound to PCR values, and be used under sessions that
protect it from whoever sits on the bus.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import rsa, utils
from tpm2_pytss.constants import ESYS_TR, TPM2_SE
from tpm2_pytss.types import (
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_PCR_SELECTION,
    TPMT_PUBLIC_PARMS,
    TPMT_SIG_SCHEME,
    TPMT_SIGNATURE,
)

from spire_hw.errors import (
    EncodingError,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, check_digest, verify_digest
from spire_hw.tpm import wire
from spire_hw.tpm.connection import Capability
from spire_hw.tpm.errors import NOT_SUPPORTED, STALE, Rc, TpmError
from spire_hw.tpm.pcrpolicy import (
    Approval,
    Binding,
    approved_digest,
    authorized_policy,
    find_approval,
)
from spire_hw.tpm.persistent import kept_key
from spire_hw.tpm.pss import pss_salt_bytes
from spire_hw.tpm.public import TpmPublic, parse_public
from spire_hw.tpm.storage import (
    KeyLostError,
    encrypting,
    plain_policy_session,
    public_from,
    salted_session,
    storage,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.tpm.connection import Connection

# sign, fixedTPM, fixedParent, sensitiveDataOrigin, noDA; userWithAuth unless a policy guards the
# key. adminWithPolicy is clear, so that an attestation key may certify it.
_SIGNING_ATTRIBUTES: Final = 0x00040432
_USER_WITH_AUTH: Final = 0x00000040

_NULL: Final = struct.pack(">H", wire.ALG_NULL)
_EMPTY: Final = struct.pack(">H", 0)

_CURVES: Final = {KeyType.EC_P256: wire.CURVE_P256, KeyType.EC_P384: wire.CURVE_P384}
_RSA_BITS: Final = {KeyType.RSA_2048: 2048, KeyType.RSA_4096: 4096}
_HASH_IDS: Final = {
    HashAlgorithm.SHA256: wire.ALG_SHA256,
    HashAlgorithm.SHA384: wire.ALG_SHA384,
    HashAlgorithm.SHA512: wire.ALG_SHA512,
}
# What a TPM says to a policy that is not met, and to one whose PCRs changed since it was.
_UNMET: Final = frozenset({Rc.POLICY_FAIL, Rc.PCR_CHANGED})
_SIGN_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class CreationProof:
    """What a TPM needs to be told to vouch for the creation of a key later.

    Attributes:
        data: TPMS_CREATION_DATA.
        digest: of that.
        ticket: TPMT_TK_CREATION; holds until TPM2_Clear, as the key does.
    """

    data: bytes
    digest: bytes
    ticket: bytes


@dataclass(frozen=True, slots=True)
class KeyBlob:
    """A key outside its TPM: useless to anybody without that TPM.

    Attributes:
        public: TPM2B_PUBLIC bytes.
        private: TPM2B_PRIVATE bytes, wrapped by the storage key.
        parsed: the public area.
        creation: proof of creation, where it was kept.
    """

    public: bytes
    private: bytes
    parsed: TpmPublic
    creation: CreationProof | None = None

    @classmethod
    def parse(cls, public: bytes, private: bytes) -> KeyBlob:
        """Check both parts' shape.

        Raises:
            InvalidInputError: a size prefix is wrong or the public area does not parse.
        """
        for what, data in (("public", public), ("private", private)):
            if len(data) <= 2 or int.from_bytes(data[:2], "big") != len(data) - 2:  # noqa: PLR2004
                raise EncodingError(f"{what} part of a TPM key", "size does not fit")
        return cls(public, private, parse_public(public[2:], "public part of a TPM key"))


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What it takes to use a key.

    Attributes:
        storage_name: Name of the storage key it is wrapped by, where that is known.
        handle: persistent handle, None for a key that is loaded each time.
        binding: PCRs it is bound to.
        approvals: of the binding's authority, as they are now.
        salted: whether commands go under sessions that protect them on the bus.
    """

    storage_name: bytes | None = None
    handle: int | None = None
    binding: Binding | None = None
    approvals: tuple[Approval, ...] = ()
    salted: bool = False


_AS_IT_IS: Final = KeyUse()


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a TPM can do for us."""

    key_types: frozenset[KeyType]
    hashes: frozenset[HashAlgorithm]


def read_abilities(connection: Connection) -> Abilities:
    """Ask the TPM which key types and hashes it has."""
    types = frozenset(key_type for key_type in KeyType if _is_supported(connection, key_type))
    algorithms = {number for number, _ in connection.capability(Capability.ALGORITHMS)}
    hashes = frozenset(h for h, number in _HASH_IDS.items() if number in algorithms)
    return Abilities(types, hashes)


def _is_supported(connection: Connection, key_type: KeyType) -> bool:
    kind = wire.ALG_ECC if key_type in _CURVES else wire.ALG_RSA
    raw = struct.pack(">H", kind) + _parameters(key_type)
    parameters, _ = TPMT_PUBLIC_PARMS.unmarshal(raw)
    try:
        connection.call(connection.esys.test_parms, parameters)
    except TpmError as e:
        if not e.is_any(NOT_SUPPORTED):
            raise
        return False
    return True


def create_key(
    connection: Connection,
    key_type: KeyType,
    *,
    binding: Binding | None = None,
    salted: bool = False,
) -> tuple[KeyBlob, bytes]:
    """Make a signing key.

    Args:
        connection: the TPM.
        key_type: one of `read_abilities`.
        binding: PCRs to bind it to.
        salted: whether the commands are protected on the bus.

    Returns:
        The key and the Name of the storage key it was made under.

    Raises:
        InvalidInputError: a PCR of the binding is in no active bank.
        TpmError: the TPM refused.
    """
    policy = b"" if binding is None else _policy_of(connection, binding)
    attributes = _SIGNING_ATTRIBUTES | (0 if policy else _USER_WITH_AUTH)
    kind = wire.ALG_ECC if key_type in _CURVES else wire.ALG_RSA
    template = (
        struct.pack(">HHI", kind, wire.ALG_SHA256, attributes)
        + wire.sized(policy)
        + _parameters(key_type)
        + (_EMPTY + _EMPTY if key_type in _CURVES else _EMPTY)
    )
    with contextlib.ExitStack() as stack:
        session: Any = ESYS_TR.PASSWORD
        if salted:
            session = encrypting(connection, stack.enter_context(salted_session(connection)))
        parent, parent_name = stack.enter_context(storage(connection))
        made = connection.call(
            connection.esys.create,
            parent,
            TPM2B_SENSITIVE_CREATE(),
            public_from(template),
            session1=session,
        )
        private, public, data = (bytes(part.marshal()) for part in made[:3])
        proof = CreationProof(data[2:], bytes(made[3]), bytes(made[4].marshal()))
    blob = replace(KeyBlob.parse(public, private), creation=proof)
    connection.remember(blob.parsed.name)
    return blob, parent_name


def _parameters(key_type: KeyType) -> bytes:
    """Return TPMS_ECC_PARMS or TPMS_RSA_PARMS: no child cipher, no fixed scheme."""
    if key_type in _CURVES:
        return _NULL + _NULL + struct.pack(">H", _CURVES[key_type]) + _NULL
    return _NULL + _NULL + struct.pack(">HI", _RSA_BITS[key_type], 0)


def check_binding(connection: Connection, binding: Binding) -> None:
    """Refuse what this TPM cannot bind a key to.

    Raises:
        InvalidInputError: a bank is not active, or the TPM cannot use the authority's key.
        TpmError: the TPM refused for another reason.
    """
    _check_banks(connection, binding)
    signer = binding.signer
    if signer is None:
        return
    try:
        with _external(connection, signer):
            pass
    except TpmError as e:
        if not e.is_any(NOT_SUPPORTED):
            raise
        raise InvalidInputError(
            "this TPM cannot use a key of the policy authority's type; EC P-256 and RSA-2048 are "
            "safe choices"
        ) from e


@contextlib.contextmanager
def _external(connection: Connection, signer: TpmPublic) -> Iterator[Any]:
    """Load a public key that is in no TPM, for the block."""
    handle = connection.call(
        connection.esys.load_external, public_from(signer.raw), hierarchy=ESYS_TR.OWNER
    )
    with connection.loaded(handle):
        yield handle


def _check_banks(connection: Connection, binding: Binding) -> None:
    """Refuse PCRs the TPM does not have: a policy over them would hold in any state."""
    banks = connection.pcr_banks()
    for entry in binding.selections:
        if not set(entry.pcrs) <= set(banks.get(entry.bank, ())):
            active = ", ".join(bank for bank, pcrs in banks.items() if pcrs)
            raise InvalidInputError(
                f"PCR bank {entry.bank} is not active on this TPM; active are {active}"
            )


def _policy_of(connection: Connection, binding: Binding) -> bytes:
    _check_banks(connection, binding)
    if binding.signer is not None:
        return authorized_policy(binding.signer.name, binding.ref)
    return present_policy(connection, binding)


def present_policy(connection: Connection, binding: Binding) -> bytes:
    """Return the policy that holds in the present state of a binding's PCRs.

    Raises:
        TpmError: the TPM refused.
    """
    with plain_policy_session(connection, TPM2_SE.TRIAL) as trial:
        return _satisfy_pcrs(connection, trial, binding)


def _satisfy_pcrs(connection: Connection, session: Any, binding: Binding) -> bytes:
    """Put present PCR values into a policy session; return its policy."""
    chosen, _ = TPML_PCR_SELECTION.unmarshal(wire.encode_selections(binding.selections))
    connection.call(connection.esys.policy_pcr, session, b"", chosen)
    return bytes(connection.call(connection.esys.policy_get_digest, session))


@contextlib.contextmanager
def loaded_key(connection: Connection, blob: KeyBlob, use: KeyUse = _AS_IT_IS) -> Iterator[Any]:
    """Load a key for the block and give its handle.

    Args:
        connection: the TPM.
        blob: from `create_key`.
        use: where it may be persistent, and what it was made under.

    Raises:
        KeyLostError: the TPM was cleared or is another one; the key is lost.
        TpmError: the TPM refused.
    """
    name = blob.parsed.name
    if use.handle is not None:
        with kept_key(connection, use.handle, name) as kept:
            if kept is not None:
                yield kept
                return
    with connection.cached(name, lambda: _load(connection, blob, use)) as handle:
        connection.remember(name)
        yield handle


def _load(connection: Connection, blob: KeyBlob, use: KeyUse) -> Any:
    public, _ = TPM2B_PUBLIC.unmarshal(blob.public)
    private, _ = TPM2B_PRIVATE.unmarshal(blob.private)
    with contextlib.ExitStack() as stack:
        session: Any = ESYS_TR.PASSWORD
        if use.salted:
            made = salted_session(connection, storage_name=use.storage_name)
            session = encrypting(connection, stack.enter_context(made))
        parent, _name = stack.enter_context(storage(connection, use.storage_name))
        try:
            return connection.call(connection.esys.load, parent, private, public, session1=session)
        except TpmError as e:
            if not e.is_any(STALE):
                raise
            raise KeyLostError(
                "TPM was cleared or replaced, or the key's file was damaged: the key does not "
                f"load and must be regenerated ({e.decoded.name})"
            ) from e


def check_sign_options(blob: KeyBlob, digest: bytes, options: SignOptions) -> None:
    """Refuse what a TPM cannot sign.

    Raises:
        InvalidInputError: digest length, PSS for an EC key, or a PSS salt that is not as long as
            the hash (a TPM takes no salt length).
    """
    check_digest(digest, options)
    if not options.pss:
        return
    if blob.parsed.type == wire.ALG_ECC:
        raise InvalidInputError("PSS options do not fit an EC key")
    if options.salt_bytes != options.hash.digest_size:
        raise InvalidInputError(
            f"PSS salt of {options.salt_bytes} bytes is not possible with a TPM; use the length "
            f"of the hash, {options.hash.digest_size}"
        )


def sign(
    connection: Connection,
    blob: KeyBlob,
    digest: bytes,
    options: SignOptions,
    use: KeyUse = _AS_IT_IS,
) -> bytes:
    """Sign a digest and check the signature.

    Args:
        connection: the TPM.
        blob: the key.
        digest: made with `options.hash`.
        options: hash and padding.
        use: what it takes to use the key.

    Returns:
        DER ECDSA-Sig-Value, or the RSA signature at modulus length.

    Raises:
        InvalidInputError: see `check_sign_options`.
        KeyLostError: the key is lost.
        NotReadyError: nobody approved the present state of the machine.
        UnavailableError: PCRs kept changing.
        TpmError: the TPM refused.
        SpireHwError: the TPM gave a signature that does not verify.
    """
    check_sign_options(blob, digest, options)
    if blob.parsed.type == wire.ALG_ECC:
        scheme_id = wire.ALG_ECDSA
    else:
        scheme_id = wire.ALG_RSAPSS if options.pss else wire.ALG_RSASSA
    scheme, _ = TPMT_SIG_SCHEME.unmarshal(struct.pack(">HH", scheme_id, _HASH_IDS[options.hash]))
    made = _sign(connection, blob, use, digest, scheme)
    signature = _plain_signature(made, blob)
    verify_own(blob, digest, signature, options)
    return signature


def _sign(connection: Connection, blob: KeyBlob, use: KeyUse, digest: bytes, scheme: Any) -> bytes:
    for _ in range(_SIGN_ATTEMPTS):
        with (
            _authority(connection, blob, use) as session,
            loaded_key(connection, blob, use) as handle,
        ):
            try:
                made = connection.call(
                    connection.esys.sign, handle, digest, scheme, session1=session
                )
            except TpmError as e:
                # A PCR changed between policy and signature, perhaps one that does not matter.
                if use.binding is None or not e.is_any(_UNMET):
                    raise
            else:
                return bytes(made.marshal())
    raise UnavailableError("PCRs changed each time the key was about to be used; try again")


@contextlib.contextmanager
def _authority(connection: Connection, blob: KeyBlob, use: KeyUse) -> Iterator[Any]:
    """Give the session that authorises use of a key."""
    if use.binding is None and not use.salted:
        yield ESYS_TR.PASSWORD
        return
    kind = TPM2_SE.HMAC if use.binding is None else TPM2_SE.POLICY
    opened = (
        salted_session(connection, kind, use.storage_name)
        if use.salted
        else plain_policy_session(connection, kind)
    )
    with opened as session:
        if use.binding is not None:
            _satisfy(connection, session, blob, use.binding, use.approvals)
        yield session


def _satisfy(
    connection: Connection,
    session: Any,
    blob: KeyBlob,
    binding: Binding,
    approvals: tuple[Approval, ...],
) -> None:
    present = _satisfy_pcrs(connection, session, binding)
    signer = binding.signer
    if signer is None:
        if present != blob.parsed.auth_policy:
            raise KeyLostError(
                "PCRs changed since the key was made, and it is bound to their values: it must "
                "be regenerated (bind keys to an authority to have approvals instead)"
            )
        return
    approval = find_approval(approvals, present, binding)
    if approval is None:
        raise NotReadyError(
            "the present state of this machine's PCRs is not approved: take "
            "`spire-hw-agent tpm policy read` to whoever holds the policy authority's key, and "
            f"put the approval into approvals_path (policy {present.hex()})"
        )
    esys = connection.esys
    signature, _ = TPMT_SIGNATURE.unmarshal(approval.signature)
    with _external(connection, signer) as handle:
        ticket = connection.call(
            esys.verify_signature, handle, approved_digest(present, binding.ref), signature
        )
    connection.call(
        esys.policy_authorize,
        session,
        approved_policy=present,
        key_sign=signer.name,
        check_ticket=ticket,
        policy_ref=binding.ref,
    )


def _plain_signature(raw: bytes, blob: KeyBlob) -> bytes:
    parts = wire.parse_signature(raw, "signature of the TPM").parts
    if blob.parsed.type == wire.ALG_ECC:
        r, s = (int.from_bytes(part, "big") for part in parts)
        return utils.encode_dss_signature(r, s)
    return parts[0]


def verify_own(blob: KeyBlob, digest: bytes, signature: bytes, options: SignOptions) -> None:
    """Check what the TPM signed, before it leaves us.

    Raises:
        SpireHwError: it does not verify, or has a salt of another length.
    """
    try:
        verify_digest(blob.parsed.key, digest, signature, options)
    except SpireHwError as e:
        key, salt = blob.parsed.key, None
        if options.pss and isinstance(key, rsa.RSAPublicKey):
            salt = pss_salt_bytes(key, signature, options.hash)
        if salt is not None and salt != options.salt_bytes:
            raise SpireHwError(
                f"this TPM makes PSS salts of {salt} bytes, which others refuse: "
                f"{options.salt_bytes} are needed; use an EC key"
            ) from e
        raise SpireHwError("the TPM gave a signature that does not verify") from e

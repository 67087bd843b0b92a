"""What a node says in its first message, as far as that can be checked before the challenge.

Attributes of a key are inside its Name, and the Name is what activation proves: until then all of
this is claimed, and afterwards all of it is fact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spire_hw.errors import ErrorKind
from spire_hw.tpm import verify
from spire_hw.tpm.public import USER_WITH_AUTH, check_ak, check_svid_key, parse_public
from spire_hw.tpm.verify import Statement
from spire_hw_plugins.nodeattestor.tpm.statements import Signer, refusal

if TYPE_CHECKING:
    from spire_hw.tpm.public import TpmPublic
    from spire_hw_plugins.nodeattestor.tpm.config import Settings
    from spire_hw_plugins.nodeattestor.tpm.endorsement import Endorsement
    from spire_hw_plugins.nodeattestor.tpm.wire import AttestationData


@dataclass(frozen=True, slots=True)
class Claims:
    """One node's keys.

    Attributes:
        ek: accepted endorsement key.
        signer: attestation key.
        csr_spki: the CSR's key, None when one of both halves does not know it.
        key: the same as an object of the TPM; None when it is not (known to be) one.
    """

    ek: Endorsement
    signer: Signer
    csr_spki: bytes | None
    key: TpmPublic | None


def check_claims(
    settings: Settings, data: AttestationData, ek: Endorsement, csr_spki: bytes | None
) -> Claims:
    """Check a first message beyond its endorsement key.

    Args:
        settings: the attestor's.
        data: the message.
        ek: its endorsement key, accepted.
        csr_spki: DER SubjectPublicKeyInfo of the CSR, None under a host that cannot tell.

    Raises:
        InvalidInputError: a key does not parse.
        AttestationError: a key that is not acceptable, or not known where it has to be.
    """
    signer = check_signer(settings, data, ek, csr_spki)
    known = _known_csr(settings, data, csr_spki)
    return Claims(ek, signer, known, _check_key(settings, data, known))


def check_signer(
    settings: Settings, data: AttestationData, ek: Endorsement, csr_spki: bytes | None
) -> Signer:
    """Return the attestation key, whose creation statement tells where it lives."""
    ak = parse_public(data.ak.public, "ak: public area")
    check_ak(ak)
    if ak.spki in {ek.public.spki, csr_spki}:
        raise refusal("keys_equal", "ak: keys must be different")
    statement = Statement(data.ak.create_attestation, data.ak.create_signature)
    if data.ek_pub is None:
        creation = verify.verify_child_creation(ak, data.ak.create_data, statement)
        return Signer(ak, creation.hierarchy, creation.qualified_name)
    parents: tuple[TpmPublic, ...] = ()
    if data.ak_parent_pub is not None:
        parents = (parse_public(data.ak_parent_pub, "ak: parent's public area"),)
    creation = verify.verify_creation(ak, data.ak.create_data, statement, parents)
    if creation.hierarchy != "endorsement" and not settings.allow_owner_ak:
        text = "ak: key is not in the endorsement hierarchy"
        raise refusal("ak_hierarchy", text, ErrorKind.PERMISSION_DENIED)
    return Signer(ak, creation.hierarchy, creation.qualified_name)


def _known_csr(settings: Settings, data: AttestationData, csr_spki: bytes | None) -> bytes | None:
    """Return the CSR's key when both halves know it: nothing else can evidence be bound to."""
    if data.csr or csr_spki is None:
        return csr_spki
    if settings.bind_csr:
        text = "policy: the agent's host does not show it the certificate request (bind_csr)"
        raise refusal("csr_unbound", text, ErrorKind.PERMISSION_DENIED)
    return None


def _check_key(
    settings: Settings, data: AttestationData, csr_spki: bytes | None
) -> TpmPublic | None:
    """Return the key to be certified, None when this node's key is not (known to be) in a TPM."""
    if csr_spki is None or data.key_pub is None:
        if settings.require_tpm_key or settings.key_policies:
            text = "policy: the agent key must be in the TPM"
            raise refusal("key_not_in_tpm", text, ErrorKind.PERMISSION_DENIED)
        return None
    key = parse_public(data.key_pub, "certify: public area")
    if key.spki != csr_spki:
        raise refusal("csr_key_mismatch", "certify: CSR holds another key")
    check_svid_key(key)
    if settings.key_policies and (
        key.auth_policy not in settings.key_policies or key.has(USER_WITH_AUTH)
    ):
        text = "certify: key is not bound to the expected policy"
        raise refusal("key_policy", text, ErrorKind.PERMISSION_DENIED)
    return key

"""DevID certificates: what an authority of the operator's says about a key in a machine's TPM.

Spec: IEEE 802.1AR; TCG TPM 2.0 Keys for Device Identity and Attestation, "LDevID Certificate".
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.key import default_hash, parse_spki, spki_der
from spire_hw.x509.certificate import key_identifier, public_key_of

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.key import PrivateKey

_BACKDATE: Final = timedelta(minutes=5)
_MAX_COMMON_NAME: Final = 64


def issue_devid(
    authority: x509.Certificate,
    key: PrivateKey,
    *,
    spki: bytes,
    common_name: str,
    now: datetime,
    ttl: timedelta,
) -> bytes:
    """Issue a DevID certificate.

    Args:
        authority: the provisioning CA's certificate.
        key: its private key.
        spki: DER SubjectPublicKeyInfo of the DevID key.
        common_name: of the machine, 1 to 64 printable characters.
        now: aware.
        ttl: how long it is valid; not longer than the authority.

    Returns:
        The DER certificate.

    Raises:
        InvalidInputError: the key is not the authority's, that is no CA, or the name is not
            acceptable.
        NotReadyError: the authority is not valid now.
    """
    if spki_der(public_key_of(authority)) != spki_der(key.public_key()):
        raise InvalidInputError("the private key is not that of the provisioning CA's certificate")
    _check_authority(authority)
    if not common_name.isprintable() or not 1 <= len(common_name.encode()) <= _MAX_COMMON_NAME:
        raise InvalidInputError(f"common name is not 1 to {_MAX_COMMON_NAME} printable characters")
    if not authority.not_valid_before_utc <= now < authority.not_valid_after_utc:
        raise NotReadyError("the provisioning CA's certificate is not valid now")
    issuer_key = spki_der(public_key_of(authority))
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(authority.subject)
        .public_key(parse_spki(spki))
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(now - _BACKDATE, authority.not_valid_before_utc))
        .not_valid_after(min(now + ttl, authority.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier(key_identifier(spki)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier(_identifier(authority, issuer_key), None, None),
            critical=False,
        )
    )
    made = builder.sign(key, default_hash(key.public_key()).instance)  # type: ignore[arg-type]
    return made.public_bytes(serialization.Encoding.DER)


def _check_authority(authority: x509.Certificate) -> None:
    extensions = authority.extensions
    try:
        is_ca = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    try:
        may_sign = extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        may_sign = True
    if not is_ca or not may_sign:
        raise InvalidInputError("the provisioning CA's certificate is not that of a CA")


def _identifier(authority: x509.Certificate, spki: bytes) -> bytes:
    try:
        found = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return key_identifier(spki)
    return found.value.digest

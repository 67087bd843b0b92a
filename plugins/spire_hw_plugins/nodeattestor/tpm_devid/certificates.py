"""Whether a DevID certificate is one: issued by an authority we trust, and not revoked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from cryptography.x509.oid import NameOID

from spire_hw.errors import AttestationError, ChainError, ErrorKind, Finding, InvalidInputError
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.x509.certificate import encode_der, load_certificate, public_key_of
from spire_hw.x509.chain import MAX_CHAIN, find_paths

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from cryptography import x509

    from spire_hw.key import PublicKey
    from spire_hw.tpm.crl import Revocations
    from spire_hw_plugins.nodeattestor.tpm_devid.config import Issuers

_DENIED: Final = ErrorKind.PERMISSION_DENIED
_MAX_COMMON_NAME: Final = 255


@dataclass(frozen=True, slots=True)
class DevId:
    """A trusted DevID certificate.

    Attributes:
        leaf: the node's certificate.
        key: its public key.
        authorities: every other certificate on a path from it to a root.
        common_name: of the node, "" without one.
        issuer: common name of its issuer, "" without one.
    """

    leaf: x509.Certificate
    key: PublicKey
    authorities: tuple[x509.Certificate, ...]
    common_name: str
    issuer: str


def check_devid(
    issuers: Issuers, crls: Revocations | None, encoded: Sequence[bytes], now: datetime
) -> DevId:
    """Return the certificate a node shows.

    Args:
        issuers: who may have issued it.
        crls: their revocation lists, None to ask none.
        encoded: DER, the node's own first, then intermediates; at least one.
        now: the time to check for.

    Raises:
        InvalidInputError: a certificate does not parse.
        AttestationError: denied `devid_untrusted`, `devid_revoked`; `common_name`;
            `devid_revocation_unknown`, unavailable.
    """
    leaf, *sent = (_load(der) for der in encoded)
    common_name = _common_name(leaf.subject, "subject")
    issuer = _common_name(leaf.issuer, "issuer")
    helpers = _helpers(leaf, sent, issuers.intermediates)
    try:
        paths = find_paths(leaf, helpers, issuers.roots, now)
    except ChainError as e:
        text = f"devid: certificate is not trusted: {e.message}"
        raise refusal("devid_untrusted", text, _DENIED) from e
    if crls is not None:
        paths = _unrevoked(paths, crls, now)
    authorities = {encode_der(c): c for path in paths for c in path[1:]}
    return DevId(leaf, public_key_of(leaf), tuple(authorities.values()), common_name, issuer)


def refusal(code: str, text: str, kind: ErrorKind = ErrorKind.INVALID_ARGUMENT) -> AttestationError:
    """Return an error with one finding."""
    return AttestationError([Finding(code, text, kind)])


def _load(der: bytes) -> x509.Certificate:
    try:
        certificate = load_certificate(der)
        public_key_of(certificate)
    except InvalidInputError as e:
        raise InvalidInputError(f"devid: certificate is malformed: {e.message}") from e
    return certificate


def _helpers(
    leaf: x509.Certificate, sent: list[x509.Certificate], known: tuple[x509.Certificate, ...]
) -> list[x509.Certificate]:
    """Return what was sent, with those of our own intermediates that a path could lead through."""
    found, wanted = list(sent), {c.issuer for c in (leaf, *sent)}
    for _ in range(MAX_CHAIN):
        more = [c for c in known if c.subject in wanted and c not in found]
        if not more:
            break
        found += more
        wanted = {c.issuer for c in more}
    return found


def _unrevoked(
    paths: list[list[x509.Certificate]], crls: Revocations, now: datetime
) -> list[list[x509.Certificate]]:
    """Return the paths on which nothing is revoked.

    Raises:
        AttestationError: there is none; why the first is not.
    """
    fault: AttestationError | None = None
    good = []
    for path in paths:
        try:
            _check_path(path, crls, now)
        except AttestationError as e:
            fault = fault or e
        else:
            good.append(path)
    if fault is not None and not good:
        raise fault
    return good


def _check_path(path: list[x509.Certificate], crls: Revocations, now: datetime) -> None:
    parsed = [parse_certificate(encode_der(c), "devid: certificate") for c in path]
    for subject, issuer in pairwise(parsed):
        crls.check(subject, issuer, now, "devid")


def _common_name(name: x509.Name, whose: str) -> str:
    """Return a common name that is fit for a selector, "" when there is none."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not found:
        return ""
    value = found[0].value
    fits = isinstance(value, str) and value.isprintable() and len(value) <= _MAX_COMMON_NAME
    if len(found) > 1 or not fits:
        raise refusal("common_name", f"devid: {whose} common name is not acceptable")
    return str(value)

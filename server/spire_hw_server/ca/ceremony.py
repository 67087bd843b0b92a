"""A root that is kept offline: what is signed with it, and the record for those who watch.

Runs on a machine of its own, with the token and without a server. Everything is decided first and
shown; nothing is signed before somebody agreed. The record is signed by nobody: it is printed, and
witnesses put their names below.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509

from spire_hw import __version__
from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.key import fingerprint, key_type_of, parse_spki, spki_der
from spire_hw.tpm.names import format_name
from spire_hw.x509.authority import ParentCa, check_parent_certificate
from spire_hw.x509.certificate import encode_pem, load_certificate, public_key_of, subject_key_id
from spire_hw.x509.csr import parse_csr
from spire_hw.x509.issue import issue_ca_certificate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from spire_hw.key import Signer
    from spire_hw.spiffeid import TrustDomain

_BACKDATE: Final = timedelta(minutes=5)
_NO_END: Final = "no limit"


@dataclass(frozen=True, slots=True)
class Plan:
    """A CA certificate that is to be signed.

    Attributes:
        what: "root" or "intermediate".
        subject: DER Name.
        spki: DER SubjectPublicKeyInfo of the key it is about.
        trust_domain: whose SVIDs it signs, None for a root.
        not_before: start of its validity.
        not_after: end of its validity.
        path_length: CA certificates that may follow below it, None for no limit.
        issuer: DER of the certificate above, None for a root.
        request: SHA-256 of the request in hex, "" for a root.
    """

    what: str
    subject: bytes
    spki: bytes
    trust_domain: TrustDomain | None
    not_before: datetime
    not_after: datetime
    path_length: int | None
    issuer: bytes | None = None
    request: str = ""

    def fields(self) -> dict[str, str]:
        """Return what witnesses have to look at before anything is signed."""
        shown = {
            "Signs": self.what,
            "Subject": format_name(self.subject),
            "Trust domain": "any" if self.trust_domain is None else str(self.trust_domain.id),
            "Key type": key_type_of(parse_spki(self.spki)).config_name,
            "Key SHA-256": fingerprint(self.spki),
            "Not before": self.not_before.isoformat(),
            "Not after": self.not_after.isoformat(),
            "Path length": _NO_END if self.path_length is None else str(self.path_length),
        }
        if self.request:
            shown["Request SHA-256"] = self.request
        if self.issuer is not None:
            above = load_certificate(self.issuer)
            shown["Issuer"] = format_name(above.subject.public_bytes())
            shown["Issuer SHA-256"] = _sha256(self.issuer)
        return shown


def plan_root(
    public: Signer, subject: bytes, life: timedelta, path_length: int | None, now: datetime
) -> Plan:
    """Decide what a root will look like.

    Raises:
        InvalidInputError: it would be of no use.
    """
    _check_life(life)
    if path_length is not None and path_length < 1:
        raise InvalidInputError("a root with path length 0 could not sign a CA: use 1 or more")
    start = now.replace(microsecond=0) - _BACKDATE
    return Plan(
        "root", subject, spki_der(public.public_key), None, start, start + life, path_length
    )


def plan_intermediate(
    csr: bytes,
    issuer: bytes,
    trust_domain: TrustDomain,
    *,
    life: timedelta,
    path_length: int | None,
    now: datetime,
) -> Plan:
    """Decide what the CA certificate of a server will look like.

    Args:
        csr: DER of the server's request.
        issuer: DER of the certificate whose key signs.
        trust_domain: whose SVIDs the CA is to sign; the request has to say the same.
        life: how long it is to live; the issuer's own end comes first.
        path_length: CA certificates that may follow below it.
        now: the time.

    Raises:
        InvalidInputError: the request is not that of a CA of the trust domain, or the issuer may not
            sign it.
        NotReadyError: the issuer has ended, or has not begun.
        VerificationError: whoever asks does not hold the key.
    """
    _check_life(life)
    request = parse_csr(csr)
    key_type_of(request.public_key)
    if request.uris != (str(trust_domain.id),) or request.dns_names:
        names = ", ".join((*request.uris, *request.dns_names)) or "nothing"
        raise InvalidInputError(
            f'the request is for {names[:256]!a}, not for "{trust_domain.id}" alone: it is not the '
            "one of this trust domain's CA"
        )
    above = load_certificate(issuer)
    check_parent_certificate(above)
    limit = above.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    if limit is not None and (path_length is None or path_length >= limit):
        raise InvalidInputError(
            f"path length {_NO_END if path_length is None else path_length} is not below the issuer's "
            f"own, {limit}"
        )
    if spki_der(public_key_of(above)) == request.spki:
        raise InvalidInputError("the request is for the issuer's own key")
    if now >= above.not_valid_after_utc:
        raise NotReadyError(f"the issuer has ended at {above.not_valid_after_utc.isoformat()}")
    if now < above.not_valid_before_utc:
        raise NotReadyError(
            f"the issuer begins at {above.not_valid_before_utc.isoformat()}: is the clock right?"
        )
    start = now.replace(microsecond=0) - _BACKDATE
    return Plan(
        "intermediate",
        request.subject,
        request.spki,
        trust_domain,
        start,
        min(start + life, above.not_valid_after_utc),
        path_length,
        issuer,
        _sha256(csr),
    )


async def sign(plan: Plan, signer: Signer) -> bytes:
    """Sign what was decided; returns the DER certificate.

    Raises:
        InvalidInputError: the signer's key is not the issuer's.
        SpireHwError: the signer failed.
    """
    if plan.issuer is None:
        return await issue_ca_certificate(
            None,
            trust_domain=None,
            not_before=plan.not_before,
            not_after=plan.not_after,
            signer=signer,
            subject_der=plan.subject,
            path_length=plan.path_length,
            check_signature=True,
        )
    return await issue_ca_certificate(
        ParentCa(plan.issuer, signer),
        trust_domain=plan.trust_domain,
        not_before=plan.not_before,
        not_after=plan.not_after,
        spki=plan.spki,
        subject_der=plan.subject,
        path_length=plan.path_length,
        check_signature=True,
    )


def record_of(
    plan: Plan, made: bytes, place: Mapping[str, str], now: datetime
) -> tuple[dict[str, Any], str]:
    """Return the record of a ceremony: for machines, and for witnesses to sign.

    Args:
        plan: what was decided.
        made: DER of the certificate.
        place: where the key is and what the device says of it.
        now: when it was signed.
    """
    certificate = load_certificate(made)
    result = {
        "Signed at": now.replace(microsecond=0).isoformat(),
        "Program": f"spire-hw-server {__version__}",
        "Serial number": f"{certificate.serial_number:x}",
        "Certificate SHA-256": _sha256(made),
        "Authority id": subject_key_id(certificate).hex(),
    }
    sections = {"plan": plan.fields(), "key": dict(place), "result": result}
    values: dict[str, Any] = {
        name: {_snake(k): v for k, v in fields.items()} for name, fields in sections.items()
    }
    values["certificate"] = encode_pem([made]).decode("ascii")
    width = max(len(k) for fields in sections.values() for k in fields)
    lines = ["CEREMONY RECORD", ""]
    for title, fields in (
        ("What was signed", sections["plan"]),
        ("Key that signed", sections["key"]),
        ("Result", sections["result"]),
    ):
        lines += [title, *(f"  {k:<{width}} : {v}" for k, v in fields.items()), ""]
    lines += [values["certificate"].rstrip(), "", "Witnesses (name, date, signature)"]
    lines += ["", *("_" * 60 + "\n" for _ in range(3))]
    return values, "\n".join(lines)


def _check_life(life: timedelta) -> None:
    if life <= timedelta(0):
        raise InvalidInputError("the lifetime has to be more than nothing")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _snake(title: str) -> str:
    return title.lower().replace(" ", "_").replace("-", "")

"""Holds an evidence document against what its reader expects, without asking anybody.

What is found wrong is collected, each with a stable code. What is only believed, because the reader
named nobody to hold it against, is told apart from what was proved.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from spire_hw.errors import AttestationError, EncodingError, Finding, InvalidInputError
from spire_hw.evidence import yubihsm
from spire_hw.evidence.document import WORDS, challenge, parse
from spire_hw.key import spki_der
from spire_hw.plugin.custody import Custody
from spire_hw.tpm.public import check_ak, check_svid_key, parse_public
from spire_hw.tpm.verify import (
    Statement,
    verify_certify,
    verify_creation,
    verify_key_creation,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from cryptography import x509

    from spire_hw.evidence.document import Document
    from spire_hw.plugin.custody import DeviceStatement

TPM_CREATION: Final = "tpm2-certify-creation"
TPM_CERTIFY: Final = "tpm2-certify"
_AHEAD: Final = timedelta(minutes=5)
_NEEDS: Final = {
    Custody.TPM_CERTIFIED: frozenset({TPM_CREATION, TPM_CERTIFY}),
    Custody.HSM_ATTESTED: frozenset({yubihsm.KIND}),
}
# What a token has to report of a key that was made in it and stays there.
_STAYS: Final = {
    "LOCAL": "true",
    "SENSITIVE": "true",
    "ALWAYS_SENSITIVE": "true",
    "EXTRACTABLE": "false",
    "NEVER_EXTRACTABLE": "true",
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What a reader knows beforehand; whatever is None is not held against anything.

    Attributes:
        nonce: the one that was sent with the request.
        max_age: how old a document may be.
        key: fingerprint of the key it should be about.
        signer: fingerprint of the key that should have signed it.
        ak_name: Name of the TPM's attestation key, hex.
        roots: the HSM maker's certificates.
    """

    nonce: bytes | None = None
    max_age: timedelta | None = None
    key: str | None = None
    signer: str | None = None
    ak_name: str | None = None
    roots: tuple[x509.Certificate, ...] = ()


@dataclass(frozen=True, slots=True)
class Verified:
    """What a document came to.

    Attributes:
        document: the document.
        proved: sentences that hold.
        believed: sentences that somebody says whom the reader did not name.
    """

    document: Document
    proved: tuple[str, ...]
    believed: tuple[str, ...]


def verify(text: str, expected: Expected, now: datetime) -> Verified:
    """Check a document.

    Args:
        text: the document.
        expected: what the reader knows.
        now: the reader's time.

    Raises:
        EncodingError: it is none.
        VerificationError: its signature does not hold.
        AttestationError: codes `made_in_future`, `too_old`, `nonce_mismatch`, `key_mismatch`,
            `signer_unknown`, `statement_missing`, `statement_unknown`, `statement_malformed`,
            `statement_key`, `ak_unknown`, `exportable`, and those of `tpm.verify` and of
            `evidence.yubihsm`.
    """
    document, _ = parse(text)
    found = list(_circumstances(document, expected, now))
    proved = [f"the document was signed by key {document.signer.fingerprint}"]
    believed = []
    if expected.signer is None:
        believed.append(
            "that signing key is the server's or signer's: compare it, or name it with -signer"
        )
    custody, statement = document.key.evidence.custody, document.statement
    wanted = _NEEDS.get(custody, frozenset())
    try:
        if statement is not None:
            said = _check_statement(document, statement, expected)
            proved += said[0]
            believed += said[1]
        if custody is Custody.HSM_REPORTED:
            _check_reported(document.key.evidence.attributes)
    except AttestationError as e:
        found += e.findings
    if wanted and (statement is None or statement.kind not in wanted):
        text = f'custody "{custody.value}" without the statement that proves it'
        found.append(Finding("statement_missing", text))
    if found:
        raise AttestationError(found)
    if not wanted:
        believed.append(f"custody {custody.value}: {WORDS[custody]}")
    return Verified(document, tuple(proved), tuple(believed))


def _circumstances(document: Document, expected: Expected, now: datetime) -> list[Finding]:
    found = []
    if document.made_at > now + _AHEAD:
        found.append(Finding("made_in_future", f"it says it was made at {document.made_at}"))
    if expected.max_age is not None and now - document.made_at > expected.max_age:
        found.append(Finding("too_old", f"it was made at {document.made_at}"))
    if expected.nonce is not None and document.nonce != expected.nonce:
        found.append(Finding("nonce_mismatch", "it was made for another request"))
    if expected.key is not None and document.key.fingerprint != expected.key:
        text = f"it is about key {document.key.fingerprint}"
        found.append(Finding("key_mismatch", text))
    if expected.signer is not None and document.signer.fingerprint != expected.signer:
        text = f"it was signed by key {document.signer.fingerprint}, not by the one that was named"
        found.append(Finding("signer_unknown", text))
    return found


def _check_reported(attributes: Mapping[str, str]) -> None:
    """Refuse what a token reports of a key that may be elsewhere too."""
    wrong = [n for n, value in _STAYS.items() if attributes.get(n, value) != value]
    if wrong:
        text = f"the token reports otherwise: {', '.join(wrong)}"
        raise AttestationError([Finding("exportable", text)])


def _check_statement(
    document: Document, statement: DeviceStatement, expected: Expected
) -> tuple[list[str], list[str]]:
    if statement.kind in {TPM_CREATION, TPM_CERTIFY}:
        return _check_tpm(document, statement, expected)
    if statement.kind == yubihsm.KIND:
        return _check_yubihsm(document, statement, expected.roots)
    text = f'a statement of kind "{statement.kind}" cannot be read'
    raise AttestationError([Finding("statement_unknown", text)])


def _check_tpm(
    document: Document, statement: DeviceStatement, expected: Expected
) -> tuple[list[str], list[str]]:
    parts = _Parts(statement.parts)
    try:
        ak = parse_public(parts.take("ak_public"), "attestation key")
        key = parse_public(parts.take("key_public"), "key")
    except (EncodingError, InvalidInputError) as e:
        raise AttestationError([Finding("statement_malformed", e.message)]) from e
    check_ak(ak)
    check_svid_key(key)
    if spki_der(key.key) != document.key.spki:
        raise AttestationError([Finding("statement_key", "the statement is for another key")])
    place = verify_creation(
        ak,
        parts.take("ak_creation_data"),
        Statement(parts.take("ak_attest"), parts.take("ak_signature")),
    )
    wanted = challenge(document.nonce, document.trust_domain, document.key.spki)
    signed = Statement(parts.take("attest"), parts.take("signature"))
    if statement.kind == TPM_CREATION:
        verify_key_creation(
            ak,
            place.qualified_name,
            key=key,
            creation_data=parts.take("creation_data"),
            expected=wanted,
            statement=signed,
        )
        what = "was made by, and is in,"
    else:
        verify_certify(ak, place.qualified_name, key=key, expected=wanted, statement=signed)
        what = "was made in a TPM and is in"
    name = ak.name.hex()
    if expected.ak_name is not None and name != expected.ak_name:
        text = f"the attestation key is {name}, not the one that was named"
        raise AttestationError([Finding("ak_unknown", text)])
    sentence = f"the key {what} the TPM of attestation key {name}, which it cannot leave"
    if expected.ak_name is not None:
        return [sentence], []
    return [sentence], ["that attestation key is a TPM's: name one you activated, with -ak"]


def _check_yubihsm(
    document: Document, statement: DeviceStatement, roots: Sequence[x509.Certificate]
) -> tuple[list[str], list[str]]:
    chain = [statement.parts[name] for name in sorted(statement.parts)]
    said, is_trusted = yubihsm.verify_attestation(chain, document.key.spki, roots)
    leaves = "can leave it under a wrapping key" if said.is_exportable else "cannot leave it"
    sentence = (
        f"YubiHSM {said.serial} (firmware {said.firmware}) generated the key as object "
        f"{said.object_id:#06x}; it {leaves}"
    )
    if is_trusted:
        return [sentence], []
    return [], [f"{sentence}: name the maker's root with -roots"]


class _Parts:
    """Parts of a statement; one that is missing is a finding."""

    def __init__(self, parts: Mapping[str, bytes]) -> None:
        self._parts = parts

    def take(self, name: str) -> bytes:
        part = self._parts.get(name)
        if part is None:
            text = f"the statement has no part {name}"
            raise AttestationError([Finding("statement_malformed", text)])
        return part

"""Peers of `tpm` that others wrote for SPIRE, as their messages are: old (A) and current (B).

The agent works on a real TPM with a key of its own kind: RSA, below the storage primary. The server
takes the messages apart as the Go code does: exact member names, first PEM block or both.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_public_key
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TPMA_OBJECT
from tpm2_pytss.types import (
    TPM2B_DATA,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_PCR_SELECTION,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF,
)

from spire_hw.key import spki_der
from spire_hw.tpm import verify
from spire_hw.tpm.credential import make_credential
from spire_hw.tpm.device import shared
from spire_hw.tpm.ekarea import build_ek_area
from spire_hw.tpm.endorsement import EkType, Endorsement, endorsement_key, find_endorsement
from spire_hw.tpm.public import USER_WITH_AUTH, check_ak, parse_public
from spire_hw.tpm.verify import Statement

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spire_hw.tpm.connection import Connection

Dialect = Literal["A", "A with key", "B"]
AK_TEMPLATE = "rsa2048:rsassa-sha256:null"
AK_ATTRIBUTES = (
    TPMA_OBJECT.FIXEDTPM
    | TPMA_OBJECT.FIXEDPARENT
    | TPMA_OBJECT.SENSITIVEDATAORIGIN
    | TPMA_OBJECT.USERWITHAUTH
    | TPMA_OBJECT.NODA
    | TPMA_OBJECT.RESTRICTED
    | TPMA_OBJECT.SIGN_ENCRYPT
)


def _pem(label: str, der: bytes) -> str:
    text = base64.encodebytes(der).decode().replace("\n", "")
    lines = "\n".join(text[i : i + 64] for i in range(0, len(text), 64))
    return f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n"


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass
class GoAgent:
    """One exchange of a Go agent.

    Attributes:
        tcti: its TPM.
        dialect: which PEM blocks it sends.
        hierarchy: where the parent of its attestation key is.
        ek_type: which endorsement key it uses.
    """

    tcti: str
    dialect: Dialect = "B"
    hierarchy: ESYS_TR = ESYS_TR.OWNER
    ek_type: EkType = EkType.RSA_2048
    # A child is another one each time it is made, so its blobs are kept between the steps.
    _kept: tuple[Any, Any] | None = None

    async def attest(self, ask: Callable[[bytes], Awaitable[Any]]) -> Any:
        """Give the payload to `ask`, which has its challenges answered by `answer`."""
        device = shared(self.tcti)
        try:
            made = await device.run("make keys", self._make)
            return await ask(made)
        finally:
            await device.close()

    def _make(self, connection: Connection) -> bytes:
        ek = find_endorsement(connection, self.ek_type)
        with self._parent(connection) as parent:
            area, _, data, attest, signature = self._ak(connection, parent)
        blocks = []
        if ek.certificate is not None and self.dialect != "A with key":
            blocks.append(_pem("CERTIFICATE", ek.certificate))
        if self.dialect != "A" or ek.certificate is None:
            blocks.append(_pem("PUBLIC KEY", ek.parsed.spki))
        message = {
            "EK": _b64("".join(blocks).encode()),
            "AK": {
                "Public": _b64(area),
                "UseTCSDActivationFormat": False,
                "CreateData": _b64(data),
                "CreateAttestation": _b64(attest),
                "CreateSignature": _b64(signature),
            },
        }
        return json.dumps(message, separators=(",", ":")).encode()

    async def answer(self, challenge: bytes) -> bytes:
        """Open a challenge."""
        ec = json.loads(challenge)["EC"]
        device = shared(self.tcti)
        try:
            secret = await device.run(
                "activate",
                lambda connection: self._activate(
                    connection,
                    base64.b64decode(ec["Credential"], validate=True),
                    base64.b64decode(ec["Secret"], validate=True),
                ),
            )
        finally:
            await device.close()
        return json.dumps({"Secret": _b64(secret)}).encode()

    def _parent(self, connection: Connection) -> Any:
        template = TPM2B_PUBLIC.parse(
            "ecc256:aes128cfb",
            objectAttributes=TPMA_OBJECT.DEFAULT_TPM2_TOOLS_CREATEPRIMARY_ATTRS,
        )
        handle = connection.call(
            connection.esys.create_primary, TPM2B_SENSITIVE_CREATE(), template, self.hierarchy
        )[0]
        return connection.loaded(handle)

    def _ak(self, connection: Connection, parent: Any) -> tuple[bytes, bytes, bytes, bytes, bytes]:
        esys = connection.esys
        template = TPM2B_PUBLIC.parse(AK_TEMPLATE, objectAttributes=AK_ATTRIBUTES)
        private, public, data, digest, ticket = connection.call(
            esys.create,
            parent,
            TPM2B_SENSITIVE_CREATE(),
            template,
            TPM2B_DATA(),
            TPML_PCR_SELECTION(),
        )
        self._kept = (private, public)
        with connection.loaded(connection.call(esys.load, parent, private, public)) as handle:
            attest, signature = connection.call(
                esys.certify_creation,
                handle,
                handle,
                b"",
                digest,
                TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL),
                ticket,
            )
            name = bytes(esys.tr_get_name(handle))
        return (
            bytes(public.marshal())[2:],
            name,
            bytes(data.marshal())[2:],
            bytes(attest),
            bytes(signature.marshal()),
        )

    def _activate(self, connection: Connection, credential: bytes, secret: bytes) -> bytes:
        assert self._kept is not None
        esys, ek = connection.esys, find_endorsement(connection, self.ek_type)
        sealed, _ = TPM2B_ID_OBJECT.unmarshal(credential)
        wrapped, _ = TPM2B_ENCRYPTED_SECRET.unmarshal(secret)
        # One after another: a bare TPM has room for three objects.
        with self._parent(connection) as parent:
            ak = connection.call(esys.load, parent, *self._kept)
        with connection.loaded(ak), endorsement_key(connection, ek) as ek_handle:
            session = self._session(connection, ek)
            with (
                connection.loaded(session)
                if session != ESYS_TR.PASSWORD
                else contextlib.nullcontext()
            ):
                opened = connection.call(
                    esys.activate_credential,
                    ak,
                    ek_handle,
                    sealed,
                    wrapped,
                    session1=ESYS_TR.PASSWORD,
                    session2=session,
                )
                return bytes(opened)

    def _session(self, connection: Connection, ek: Endorsement) -> Any:
        if ek.parsed.has(USER_WITH_AUTH):
            return ESYS_TR.PASSWORD
        session = connection.call(
            connection.esys.start_auth_session,
            ESYS_TR.NONE,
            ESYS_TR.NONE,
            TPM2_SE.POLICY,
            TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL),
            TPM2_ALG.SHA256,
        )
        connection.call(connection.esys.policy_secret, ESYS_TR.ENDORSEMENT, session)
        return session


@dataclass
class GoServer:
    """The server side of one exchange, as the Go plugins check it."""

    dialect: Dialect = "B"
    secret: bytes = b""
    ek_hash: str = ""

    def challenge(self, payload: bytes) -> bytes:
        """Check a payload and return the challenge."""
        message = json.loads(payload)
        spki = self._ek(base64.b64decode(message["EK"], validate=True))
        self.ek_hash = hashlib.sha256(spki).hexdigest()
        ak = message["AK"]
        assert ak["UseTCSDActivationFormat"] is False
        public = parse_public(base64.b64decode(ak["Public"], validate=True))
        check_ak(public)
        statement = Statement(
            base64.b64decode(ak["CreateAttestation"], validate=True),
            base64.b64decode(ak["CreateSignature"], validate=True),
        )
        data = base64.b64decode(ak["CreateData"], validate=True)
        verify.verify_child_creation(public, data, statement)
        self.secret = secrets.token_bytes(32)
        key = load_der_public_key(spki)
        sealed = make_credential(build_ek_area(key), public.name, self.secret)  # type: ignore[arg-type]
        ec = {"Credential": _b64(sealed.id_object), "Secret": _b64(sealed.encrypted_secret)}
        return json.dumps({"EC": ec}).encode()

    def check(self, answer: bytes) -> None:
        """Check the answer."""
        given = base64.b64decode(json.loads(answer)["Secret"], validate=True)
        assert hmac.compare_digest(given, self.secret)

    def _ek(self, text: bytes) -> bytes:
        blocks = []
        for block in text.decode().split("-----END ")[:-1]:
            label, _, body = block.partition("-----BEGIN ")[2].partition("-----")
            blocks.append((label, base64.b64decode(body)))
        if self.dialect != "B":
            blocks = blocks[:1]
        assert len(blocks) <= 2
        found = dict(blocks)
        if self.dialect == "B":
            return found["PUBLIC KEY"]
        if "CERTIFICATE" in found:
            return spki_der(x509.load_der_x509_certificate(found["CERTIFICATE"]).public_key())  # type: ignore[arg-type]
        return found["PUBLIC KEY"]

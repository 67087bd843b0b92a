"""A node that attests with a software TPM: the agent's side of the `tpm` exchange, open to bending.

Each step returns the message object, so a test can replace one field before it is sent.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from dataclasses import dataclass, field, replace
from typing import Final

from spire_hw.tpm.public import qualified_name
from spire_hw.tpm.verify import NO_CSR, qualifier
from spire_hw_plugins.nodeattestor.tpm.rounds import ImaPart, decode_part_request, encode_part
from spire_hw_plugins.nodeattestor.tpm.wire import (
    AkEvidence,
    AttestationData,
    ChallengeMessage,
    LogAnnouncement,
    QuoteEvidence,
    Response,
    SignedStatement,
    decode_challenge,
    encode_attestation_data,
    encode_response,
)
from spire_hw_sim.ekca import EkCa, ek_spec
from spire_hw_sim.softtpm import OWNER, SoftKey, SoftTpm, make_key, make_svid_key

_HASH_BYTES: Final = 32


@dataclass(slots=True)
class TpmNode:
    """One machine.

    Attributes:
        tpm: its TPM.
        key: the key its CSR is for, None when that is not in the TPM.
        certificate: DER endorsement certificate, None without one.
        chain: intermediates it sends.
        parent: parent of the AK, None for a primary.
        csr_spki: SubjectPublicKeyInfo of a CSR key outside the TPM.
        boot_log: firmware's log, None without one.
        ima: lines of the kernel's list, None without one.
        part_lines: how many of them go into one message.
    """

    tpm: SoftTpm = field(default_factory=SoftTpm)
    key: SoftKey | None = field(default_factory=make_svid_key)
    certificate: bytes | None = None
    chain: tuple[bytes, ...] = ()
    parent: SoftKey | None = None
    csr_spki: bytes | None = None
    boot_log: bytes | None = None
    ima: bytes | None = None
    part_lines: int = 4000

    @property
    def spki(self) -> bytes | None:
        """Return the SubjectPublicKeyInfo of its CSR."""
        return self.key.spki if self.key is not None else self.csr_spki

    @property
    def ek_hash(self) -> str:
        """Return the hash of its endorsement key."""
        return hashlib.sha256(self.tpm.ek.spki).hexdigest()

    def data(self) -> AttestationData:
        """Return its first message."""
        created = self.tpm.creation_data(None if self.parent is None else self.parent.name)
        attest, signature = self.tpm.creation(created)
        log = None
        if self.boot_log is not None:
            log = LogAnnouncement(len(self.boot_log), hashlib.sha256(self.boot_log).hexdigest())
        return AttestationData(
            ek_certificate=self.certificate,
            ek_spki=self.tpm.ek.spki,
            ak=AkEvidence(self.tpm.ak.public, created, attest, signature),
            ek_pub=self.tpm.ek.public,
            ek_chain=self.chain,
            key_pub=None if self.key is None else self.key.public,
            ak_parent_pub=None if self.parent is None else self.parent.public,
            log=log,
        )

    def payload(self) -> bytes:
        """Return its first message as sent."""
        return encode_attestation_data(self.data())

    def qualifier(self, role: str, challenge: ChallengeMessage, secret: bytes) -> bytes:
        """Return the qualifying data of one statement."""
        spki = self.spki
        csr = NO_CSR if spki is None else hashlib.sha256(spki).digest()
        return qualifier(role, challenge.nonce, csr, secret, self.tpm.ak.name)

    def respond(self, challenge: ChallengeMessage) -> Response:
        """Return the honest answer to a challenge."""
        secret = self.tpm.activate(challenge.credential, challenge.secret)
        quotes = []
        for selection in challenge.quote:
            attest, signature = self.tpm.quote(
                (selection,), self.qualifier("quote", challenge, secret)
            )
            quotes.append(QuoteEvidence(attest, signature, self.tpm.pcr_values(selection)))
        certify = None
        if self.key is not None:
            made = self.tpm.certify(self.key, self.qualifier("certify", challenge, secret))
            certify = SignedStatement(*made)
        response = Response(secret, tuple(quotes), certify)
        if "time" in challenge.want:
            made = self.tpm.time(self.qualifier("time", challenge, secret))
            response = replace(response, time=SignedStatement(*made))
        if "log" in challenge.want and self.boot_log is not None:
            response = replace(response, log=_packed(self.boot_log))
        if "ima" in challenge.want and self.ima is not None:
            is_new = challenge.ima_reset not in {None, self.tpm.reset_count}
            part = self.part(0 if is_new else challenge.ima_from)
            return replace(response, ima=part.data, ima_from=part.start, ima_left=part.left)
        return response

    def part(self, start: int) -> ImaPart:
        """Return a part of the list."""
        lines = (self.ima or b"").splitlines(keepends=True)
        chosen = lines[start : start + self.part_lines]
        left = max(len(lines) - start - len(chosen), 0)
        return ImaPart(zlib.compress(b"".join(chosen)), start, left)

    def answer(self, challenge: bytes) -> bytes:
        """Return the honest answer as sent, to the first challenge or a later one."""
        if b'"EC"' not in challenge:
            return encode_part(self.part(decode_part_request(challenge)))
        return encode_response(self.respond(decode_challenge(challenge)))


@functools.lru_cache(maxsize=16)
def _packed(data: bytes) -> bytes:
    """Return a log as it is sent; a node sends the same one again and again."""
    return zlib.compress(data)


def under(parent: SoftKey) -> bytes:
    """Return the qualified name a child of an owner-hierarchy primary has above it."""
    return qualified_name(OWNER, parent.name)


@dataclass(frozen=True, slots=True)
class Vendor:
    """A manufacturer with root and intermediate."""

    root: EkCa
    intermediate: EkCa

    @classmethod
    def make(cls, text: str = "Vendor") -> Vendor:
        """Return a manufacturer with P-256 CAs."""
        root = EkCa.root(f"{text} Root", make_key("secp256r1"))
        return cls(root, root.child(f"{text} EK CA", make_key("secp256r1")))

    def certify(self, tpm: SoftTpm) -> bytes:
        """Return an endorsement certificate of a TPM."""
        return self.intermediate.issue(ek_spec(tpm.ek.private.public_key()))

    def equip(self, node: TpmNode) -> TpmNode:
        """Give a node its certificate and chain; return it."""
        node.certificate = self.certify(node.tpm)
        node.chain = (self.intermediate.certificate,)
        return node

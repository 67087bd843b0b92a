"""A node with a DevID in a software TPM, and the server half it attests to; open to bending."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding

from spire_hw.config.hcl import parse
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.nodeattestor import AttestationRequest
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.tpm.wire import sized
from spire_hw_plugins.nodeattestor.tpm_devid.server import DevIdServer, build
from spire_hw_plugins.nodeattestor.tpm_devid.wire import (
    AttestationData,
    Challenge,
    Response,
    decode_challenge,
    encode_attestation_data,
    encode_response,
)
from spire_hw_sim.again import refused
from spire_hw_sim.clock import SimClock
from spire_hw_sim.ekca import ek_spec
from spire_hw_sim.nodepki import PEM, Holder, make_root
from spire_hw_sim.pki import now
from spire_hw_sim.softtpm import SoftKey, SoftTpm, make_ak, make_ek, make_svid_key
from spire_hw_sim.tpmhost import open_host
from spire_hw_sim.tpmnode import Vendor, under

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from spire_hw.errors import SpireHwError
    from spire_hw.key import PrivateKey
    from spire_hw.plugin.nodeattestor import AttestedIdentity


def peers_tpm() -> SoftTpm:
    """Return a TPM as upstream's agent uses it: RSA keys, the attestation key below the owner's."""
    parent = make_svid_key("rsa2048", number=7)  # whatever: nobody ever sees it
    return SoftTpm(ek=make_ek("L-1"), ak=make_ak("rsa2048", parent=under(parent)))


@dataclass(slots=True)
class DevIdNode:
    """One machine.

    Attributes:
        tpm: its TPM.
        key: its DevID key.
        chain: DER, its certificate first.
        ek_certificate: DER.
        ek_chain: DER issuers it sends along.
    """

    tpm: SoftTpm
    key: SoftKey
    chain: tuple[bytes, ...]
    ek_certificate: bytes
    ek_chain: tuple[bytes, ...] = ()

    def data(self) -> AttestationData:
        """Return its first message."""
        certified, signature = self.tpm.certify(self.key, b"")
        return AttestationData(
            certificates=self.chain,
            devid_pub=self.key.public,
            ek_certificate=self.ek_certificate,
            ek_pub=self.tpm.ek.public,
            ak_pub=self.tpm.ak.public,
            certified=certified,
            signature=signature,
            ek_chain=self.ek_chain,
        )

    def payload(self) -> bytes:
        """Return its first message as sent."""
        return encode_attestation_data(self.data())

    def respond(self, challenge: Challenge) -> Response:
        """Return the honest answer to a challenge."""
        secret = self.tpm.activate(sized(challenge.credential), sized(challenge.secret))
        return Response(sign_nonce(self.key.private, challenge.nonce), secret)

    def answer(self, challenge: bytes) -> bytes:
        """Return the honest answer as sent."""
        return encode_response(self.respond(decode_challenge(challenge)))


def sign_nonce(key: PrivateKey, nonce: bytes) -> bytes:
    """Return an honest signature over a nonce."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(nonce, ec.ECDSA(hashes.SHA256()))
    return key.sign(nonce, padding.PKCS1v15(), hashes.SHA256())


@dataclass(slots=True)
class DevIdLab:
    """A server half with the authorities it trusts.

    Attributes:
        server: configured.
        vendor: the TPM maker it trusts.
        root: issues DevID certificates.
        clock: its time.
        admitted: agent IDs it asked about.
        challenges: messages it sent.
    """

    server: DevIdServer
    vendor: Vendor
    root: Holder
    clock: SimClock
    admitted: list[SpiffeId] = field(default_factory=list)
    challenges: list[bytes] = field(default_factory=list)

    @classmethod
    async def make(cls, directory: Path) -> DevIdLab:
        """Configure a server half; its files go into a directory."""
        vendor, root, clock = Vendor.make(), make_root("DevID Root"), SimClock(now())
        makers, issuers = directory / "makers.pem", directory / "devid.pem"
        makers.write_bytes(pem_of(vendor.root.certificate))
        issuers.write_bytes(root.certificate.public_bytes(PEM))
        host = HostInfo(
            Side.SERVER,
            TrustDomain.parse("example.org"),
            directory,
            get_logger("tpm_devid"),
            clock,
        )
        server = build(host)
        text = f'devid_ca_path = "{issuers}"\nendorsement_ca_path = "{makers}"'
        await server.configure(parse(text))
        return cls(server, vendor, root, clock)

    def node(
        self, tpm: SoftTpm | None = None, key: SoftKey | None = None, issuer: Holder | None = None
    ) -> DevIdNode:
        """Return an honest node."""
        tpm, key = tpm or peers_tpm(), key or make_svid_key()
        chain = tuple((issuer or self.root).issue(key.private).chain)
        certificate = self.vendor.intermediate.issue(ek_spec(tpm.ek.private.public_key()))
        return DevIdNode(tpm, key, chain, certificate, (self.vendor.intermediate.certificate,))

    async def attest(
        self,
        node: DevIdNode,
        *,
        payload: bytes | None = None,
        answer: Callable[[bytes], Awaitable[bytes]] | None = None,
    ) -> AttestedIdentity:
        """Let a node attest; what it says may be replaced."""

        async def challenge(message: bytes) -> bytes:
            self.challenges.append(message)
            return node.answer(message) if answer is None else await answer(message)

        async def admit(spiffe_id: SpiffeId) -> None:
            self.admitted.append(spiffe_id)

        first = node.payload() if payload is None else payload
        return await self.server.attest(AttestationRequest(first, challenge, None, admit))

    async def refusal(
        self,
        node: DevIdNode,
        *,
        payload: bytes | None = None,
        data: Callable[[AttestationData], AttestationData] | None = None,
        response: Callable[[Response, Challenge], Response] | None = None,
        answer: bytes | None = None,
    ) -> SpireHwError:
        """Return the error a bent exchange ends in, after an honest one that must succeed.

        It goes through the admission of a server with a store, in which it leaves an audit record
        and nothing else.

        Raises:
            AssertionError: the bent exchange succeeded.
        """
        first = encode_attestation_data(data(node.data())) if data else payload

        async def bent(message: bytes) -> bytes:
            if answer is not None:
                return answer
            challenge = decode_challenge(message)
            made = node.respond(challenge)
            return encode_response(response(made, challenge) if response else made)

        first = node.payload() if first is None else first
        sent = len(self.challenges)
        async with open_host("tpm_devid", self.server) as host:

            async def challenge(message: bytes) -> bytes:
                self.challenges.append(message)
                return await bent(message)

            async def act() -> object:
                del self.challenges[sent:]
                if not first:  # a server does not get as far as the attestor
                    return await self.attest(node, payload=first)
                return await host.attest(first, node.key.spki, challenge)

            error = await refused(act)
            if first:
                host.check_after(error)
        await self.attest(self.node())
        return error


def pem_of(der: bytes) -> bytes:
    """Return a certificate in PEM."""
    return x509.load_der_x509_certificate(der).public_bytes(PEM)

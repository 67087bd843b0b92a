"""The server half of `tpm` with a vendor and nodes around it, in one process and without a TPM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spire_hw.config.hcl import parse
from spire_hw.log import get_logger
from spire_hw.plugin.info import EkList, HostInfo, Side
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw_plugins.nodeattestor.tpm.server import TpmServer, build
from spire_hw_plugins.nodeattestor.tpm.wire import (
    AttestationData,
    Response,
    decode_challenge,
    encode_attestation_data,
    encode_response,
)
from spire_hw_sim.again import refused
from spire_hw_sim.clock import SimClock
from spire_hw_sim.softtpm import SoftTpm, make_ek
from spire_hw_sim.tpmhost import open_host
from spire_hw_sim.tpmnode import TpmNode, Vendor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from spire_hw.errors import SpireHwError
    from spire_hw.posture.judge import Judge


@dataclass(slots=True)
class ListedEks:
    """An enrolment list in memory."""

    hashes: set[str] = field(default_factory=set)

    async def is_ek_allowed(self, ek_hash: str) -> bool:
        """Tell whether the hash is in the list."""
        return ek_hash in self.hashes


@dataclass(slots=True)
class Lab:
    """One server half and what it needs.

    Attributes:
        server: the plugin under test, configured.
        vendor: the manufacturer it trusts.
        clock: its time.
        admitted: agent IDs it asked about.
        banned: agent IDs that are refused by the host, with the error to raise.
        challenges: challenge messages it sent.
    """

    server: TpmServer
    vendor: Vendor
    clock: SimClock
    admitted: list[SpiffeId] = field(default_factory=list)
    banned: dict[SpiffeId, SpireHwError] = field(default_factory=dict)
    challenges: list[bytes] = field(default_factory=list)

    @classmethod
    async def make(
        cls,
        directory: Path,
        settings: str = "",
        *,
        ek_list: EkList | None = None,
        vendor: Vendor | None = None,
        judge: Judge | None = None,
    ) -> Lab:
        """Configure a server half.

        Args:
            directory: for the root file.
            settings: HCL put after the defaults: policy `ca`, PCRs 0, 2, 4 and 7.
            ek_list: enrolled endorsement keys.
            vendor: the trusted manufacturer, a new one when None.
            judge: the host's judge.
        """
        maker, clock = vendor or Vendor.make(), SimClock()
        path = directory / "roots.der"
        path.write_bytes(maker.root.certificate)
        host = HostInfo(
            side=Side.SERVER,
            trust_domain=TrustDomain.parse("example.org"),
            data_dir=directory,
            log=get_logger("tpm"),
            clock=clock,
            ek_list=ek_list,
            judge=judge,
        )
        server = build(host)
        pcrs = "" if "pcrs =" in settings else "pcrs = { sha256 = [0, 2, 4, 7] }\n"
        head = f'endorsement_ca_path = "{path}"\nek_policy = "ca"\n{pcrs}'
        await server.configure(parse(head + settings))
        return cls(server, maker, clock)

    def node(self, tpm: SoftTpm | None = None) -> TpmNode:
        """Return an honest node of the trusted manufacturer."""
        return self.vendor.equip(TpmNode(tpm or SoftTpm(ek=make_ek("L-2"))))

    async def attest(
        self,
        node: TpmNode,
        *,
        payload: bytes | None = None,
        answer: Callable[[bytes], Awaitable[bytes]] | None = None,
        csr_spki: bytes | None = None,
        source: str = "",
    ) -> AttestedIdentity:
        """Let a node attest; what it says may be replaced."""

        async def admit(spiffe_id: SpiffeId) -> None:
            self.admitted.append(spiffe_id)
            if spiffe_id in self.banned:
                raise self.banned[spiffe_id]

        first = node.payload() if payload is None else payload
        spki = node.spki if csr_spki is None else csr_spki
        challenge = self._relay(node, answer)
        return await self.server.attest(AttestationRequest(first, challenge, spki, admit, source))

    def _relay(
        self, node: TpmNode, answer: Callable[[bytes], Awaitable[bytes]] | None
    ) -> Callable[[bytes], Awaitable[bytes]]:
        """Return what takes challenges to a node, or to what answers in its place."""

        async def challenge(message: bytes) -> bytes:
            self.challenges.append(message)
            return node.answer(message) if answer is None else await answer(message)

        return challenge

    async def refusal(
        self,
        node: TpmNode,
        *,
        payload: bytes | None = None,
        data: Callable[[AttestationData], AttestationData] | None = None,
        response: Callable[[Response], Response] | None = None,
        answer: Callable[[bytes], Awaitable[bytes]] | None = None,
        csr_spki: bytes | None = None,
        afterwards: TpmNode | None = None,
    ) -> SpireHwError:
        """Return the error a bent exchange ends in, after making sure nothing was left behind.

        The exchange goes through the admission of a server with a store, in which it leaves an
        audit record and nothing else.

        Args:
            node: who attests.
            payload: replaces the first message.
            data: bends the first message.
            response: bends the honest answer.
            answer: replaces the answer.
            csr_spki: replaces the key of the CSR.
            afterwards: the honest node that attests when all is over, a new one when None.

        Raises:
            AssertionError: the exchange succeeded, left something open, or the honest node is
                refused afterwards.
        """
        first = encode_attestation_data(data(node.data())) if data else payload
        if response is not None:
            bend = response

            async def bent(message: bytes) -> bytes:
                if b'"EC"' not in message:  # a later round
                    return node.answer(message)
                return encode_response(bend(node.respond(decode_challenge(message))))

            answer = bent
        error = await self.refused(node, payload=first, answer=answer, csr_spki=csr_spki)
        await self.attest(afterwards or self.node())
        return error

    async def refused(
        self,
        node: TpmNode,
        *,
        payload: bytes | None = None,
        answer: Callable[[bytes], Awaitable[bytes]] | None = None,
        csr_spki: bytes | None = None,
    ) -> SpireHwError:
        """Return the error an exchange ends in, as `refusal` does, without an honest one afterwards.

        Args:
            node: who attests.
            payload: replaces the first message.
            answer: replaces answers.
            csr_spki: replaces the key of the CSR.

        Raises:
            AssertionError: the exchange succeeded, or left something behind.
        """
        spki = node.spki if csr_spki is None else csr_spki
        first = node.payload() if payload is None else payload
        sent, asked = len(self.challenges), len(self.admitted)
        async with open_host("tpm", self.server) as host:

            async def act() -> object:
                del self.challenges[sent:], self.admitted[asked:]
                try:
                    if not first or spki is None:  # a server does not get as far as the attestor
                        return await self.attest(node, payload=first, answer=answer)
                    return await host.attest(first, spki, self._relay(node, answer))
                finally:
                    if self.server.open_exchanges:
                        raise AssertionError("an exchange stayed open")

            error = await refused(act)
            if first and spki is not None:
                host.check_after(error)
        return error

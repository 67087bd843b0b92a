"""One light node: it attests, keeps a stream to the server open and answers its heartbeats."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

from spire_hw._pb import hw_posture_pb2, server_agent_pb2, types_pb2
from spire_hw.errors import SpireHwError, UnavailableError
from spire_hw.key import SoftwareSigner
from spire_hw.posture.heartbeat import HeartbeatAnswer, SignedQuote
from spire_hw.rpc.client import connect
from spire_hw.spiffeid import server_id
from spire_hw.svid.x509svid import parse_x509_svid
from spire_hw.tpm.verify import qualifier
from spire_hw.tpm.wire import PcrSelection
from spire_hw.transport.dialer import Dialer
from spire_hw.transport.tls import TlsIdentity
from spire_hw.x509.csr import build_csr
from spire_hw_agent.upstream.posture import HEARTBEAT, Asked, HeartbeatStream, Standing
from spire_hw_sim.servers import AGENT, TIMEOUT_S

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.posture.heartbeat import HeartbeatChallenge
    from spire_hw.rpc.client import Channel
    from spire_hw_sim.fleet.tally import Tally
    from spire_hw_sim.softtpm import SoftKey
    from spire_hw_sim.tpmnode import TpmNode


class LightNode:
    """A node of a fleet.

    Args:
        machine: its TPM.
        key: of its SVID, in that TPM.
        address: of the server.
        port: likewise.
        bundle: whom it believes.
        local_address: IP address it calls from, "" for any.

    Attributes:
        standing: what the server last said of it, None while no stream is open.
        renew_at: when it attests again, None before it attested.
    """

    def __init__(
        self,
        machine: TpmNode,
        key: SoftKey,
        *,
        address: str,
        port: int,
        bundle: Bundle,
        local_address: str = "",
    ) -> None:
        self._machine = machine
        self._key = key
        self._address = address
        self._port = port
        self._bundle = bundle
        self._local_address = local_address
        self._identity: TlsIdentity | None = None
        self._spki_sha256 = hashlib.sha256(key.spki).digest()
        self.standing: Standing | None = None
        self.renew_at: datetime | None = None

    async def _connect(self, identity: TlsIdentity | None) -> Channel:
        dialer = Dialer(
            self._address,
            self._port,
            server_id=server_id(self._bundle.trust_domain),
            bundle=lambda: self._bundle,
            identity=identity,
            local_address=self._local_address,
        )
        return await connect(dialer)

    async def attest(self) -> None:
        """Attest over a new connection and keep the SVID.

        Raises:
            SpireHwError: the server refused, or is away.
        """
        csr = await build_csr(SoftwareSigner(self._key.private))
        params = server_agent_pb2.AttestAgentRequest.Params(
            data=types_pb2.AttestationData(type="tpm", payload=self._machine.payload()),
            params=server_agent_pb2.AgentX509SVIDParams(csr=csr),
        )
        answer_type = server_agent_pb2.AttestAgentResponse
        async with (
            await self._connect(None) as channel,
            channel.bidi(AGENT + "AttestAgent", answer_type, timeout_s=TIMEOUT_S) as call,
        ):
            await call.send(server_agent_pb2.AttestAgentRequest(params=params))
            answer = await call.receive()
            while answer is not None and answer.WhichOneof("step") == "challenge":
                response = self._machine.answer(answer.challenge)
                await call.send(server_agent_pb2.AttestAgentRequest(challenge_response=response))
                answer = await call.receive()
        if answer is None:
            raise SpireHwError("the server ended the attestation without a result")
        chain = tuple(answer.result.svid.cert_chain)
        svid = parse_x509_svid(chain)
        self._identity = TlsIdentity(chain, private_key=self._key.private)
        self.renew_at = svid.not_after - (svid.not_after - svid.not_before) / 2

    async def beat(self, tally: Tally, leave_after_s: float) -> None:
        """Answer heartbeats over one connection for a while.

        Args:
            tally: counts them; the latency is that of the server's verdict on an answer.
            leave_after_s: then it ends, between two heartbeats.

        Raises:
            SpireHwError: the stream could not be opened, or has ended.
        """
        try:
            async with (
                await self._connect(self._identity) as channel,
                channel.bidi(HEARTBEAT, hw_posture_pb2.HeartbeatResponse) as call,
            ):
                stream = HeartbeatStream(call)
                await stream.hello("", can_answer=True)
                await self._listen(stream, tally, leave_after_s)
        finally:
            self.standing = None

    async def _listen(self, stream: HeartbeatStream, tally: Tally, leave_after_s: float) -> None:
        leave_at = asyncio.get_running_loop().time() + leave_after_s
        while True:
            try:
                async with asyncio.timeout_at(leave_at):
                    message = await stream.receive()
            except TimeoutError:
                return
            if isinstance(message, Asked):
                with tally.watching():
                    while isinstance(message, Asked):  # servers may want more before they judge
                        await stream.answer(self._answer(message.challenge))
                        message = await stream.receive()
            if message is None:
                raise UnavailableError("the server ended the heartbeat stream")
            self.standing = message

    def _answer(self, challenge: HeartbeatChallenge) -> HeartbeatAnswer:
        tpm = self._machine.tpm
        extra = qualifier("heartbeat", challenge.nonce, self._spki_sha256, b"", tpm.ak.name)
        quotes = []
        for bank, numbers in challenge.wanted.pcrs:
            selection = PcrSelection(bank, numbers)
            quotes.append(SignedQuote(*tpm.quote((selection,), extra), tpm.pcr_values(selection)))
        return HeartbeatAnswer(tuple(quotes))

"""The agent's end of an AttestAgent stream.

The stream begins with the first message: a server waits for that one a few seconds, while a slow
TPM may take a minute until it can say who it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw._pb import server_agent_pb2
from spire_hw.errors import ErrorKind, SpireHwError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spire_hw.rpc.client import Bidi


class Exchange:
    """One attestation as the attestor drives it (`AgentExchange`).

    Args:
        attestor: its name.
        csr: DER, sent along with the first message.
        open_stream: begins the call.
        server_verified: whether the server's certificate was verified by a bundle.
    """

    def __init__(
        self,
        attestor: str,
        csr: bytes,
        open_stream: Callable[[], Awaitable[Bidi[server_agent_pb2.AttestAgentResponse]]],
        *,
        server_verified: bool,
    ) -> None:
        self._attestor = attestor
        self._csr = csr
        self._open_stream = open_stream
        self._stream: Bidi[server_agent_pb2.AttestAgentResponse] | None = None
        self._server_verified = server_verified
        self._result: server_agent_pb2.AttestAgentResponse | None = None

    @property
    def server_verified(self) -> bool:
        """Tell whether the server was known by its certificate before the exchange began."""
        return self._server_verified

    async def send(self, data: bytes) -> None:
        """Send the payload, later the answer to a challenge."""
        message = server_agent_pb2.AttestAgentRequest()
        if self._stream is not None:
            message.challenge_response = data
        else:
            self._stream = await self._open_stream()
            message.params.data.type = self._attestor
            message.params.data.payload = data
            message.params.params.csr = self._csr
        await self._stream.send(message)

    async def receive(self) -> bytes:
        """Return the next challenge.

        Raises:
            SpireHwError: the server refused, is gone, or sent the result.
        """
        challenge = await self.next_challenge()
        if challenge is None:
            raise SpireHwError("server answered a result where a challenge was expected")
        return challenge

    async def next_challenge(self) -> bytes | None:
        """Return the next challenge, None once the server has sent the result.

        Raises:
            SpireHwError: the server refused, or is gone.
        """
        if self._result is None:
            answer = await self._next()
            if answer.WhichOneof("step") == "challenge":
                return answer.challenge
            self._result = answer
        return None

    async def result(self) -> server_agent_pb2.AttestAgentResponse.Result:
        """Return the result.

        Raises:
            SpireHwError: the server refused, is gone, or sent another challenge.
        """
        answer = await self._next() if self._result is None else self._result
        if answer.WhichOneof("step") != "result":
            raise SpireHwError("server sent a challenge where the result was expected")
        return answer.result

    async def _next(self) -> server_agent_pb2.AttestAgentResponse:
        if self._stream is None:
            raise SpireHwError("the attestor has sent nothing yet", kind=ErrorKind.INTERNAL)
        answer = await self._stream.receive()
        if answer is None:
            raise SpireHwError("server ended the attestation without a result")
        return answer

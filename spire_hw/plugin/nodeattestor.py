"""NodeAttestor: proves on the agent, and checks on the server, what machine an agent runs on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from spire_hw.spiffeid import SpiffeId

if TYPE_CHECKING:
    from spire_hw.errors import Finding
    from spire_hw.key import PublicKey
    from spire_hw.plugin.keymanager import KeyManager
    from spire_hw.posture.evidence import Evidence
    from spire_hw.posture.verdict import Verdict


@dataclass(frozen=True, slots=True)
class SvidKey:
    """The key the agent's CSR is for, as the agent half may see it.

    Attributes:
        manager: the agent's KeyManager; offers `TpmKeys` when the key is in the TPM.
        key_id: the key's id there.
        public_key: its public half.
    """

    manager: KeyManager
    key_id: str
    public_key: PublicKey


class AgentExchange(Protocol):
    """The agent's end of one attestation stream."""

    @property
    def server_verified(self) -> bool:
        """Tell whether the server was known by its certificate before the exchange began.

        False with an insecure bootstrap, and under a host that cannot tell.
        """
        ...

    async def send(self, data: bytes) -> None:
        """Send the payload (first call) or a challenge response (later calls)."""
        ...

    async def receive(self) -> bytes:
        """Return the server's next challenge.

        Raises:
            SpireHwError: the server refused, closed the stream, or asks nothing more.
        """
        ...

    async def next_challenge(self) -> bytes | None:
        """Return the server's next challenge, None when it asks nothing more.

        For attestors whose number of rounds is not known beforehand; errors as in `receive`.
        """
        ...


class AgentNodeAttestor(Protocol):
    """The half in the agent."""

    async def aid_attestation(self, exchange: AgentExchange, svid_key: SvidKey | None) -> None:
        """Send the payload and answer challenges; return after the last answer was sent.

        Args:
            exchange: the stream; `receive` may be called only after `send`.
            svid_key: the key to be certified, None under a host that cannot tell.
        """
        ...


@dataclass(frozen=True, slots=True)
class AttestedIdentity:
    """What a server half proved.

    Attributes:
        agent_id: below `/spire/agent/<attestor name>/`.
        selector_values: values without the type; the host puts the attestor's name in front.
        can_reattest: whether the agent attests again instead of renewing.
        attestation_key: DER SubjectPublicKeyInfo of the key that spoke for the machine; the host
            sees to it that no other node has it. None when there is none.
        evidence: what was proved about the machine, for the host to keep; None when nothing was.
        verdict: what the host's judge made of it, None when there was no judge.
        certificates: chains of DER the node was let in with, at most 128 KiB in all, for the host
            to keep and to show to `Rechecks.recheck` later.
    """

    agent_id: SpiffeId
    selector_values: list[str]
    can_reattest: bool
    attestation_key: bytes | None = None
    evidence: Evidence | None = None
    verdict: Verdict | None = None
    certificates: tuple[tuple[bytes, ...], ...] = ()


# Sends one challenge to the agent, returns its answer.
Challenge = Callable[[bytes], Awaitable[bytes]]
# Raises DeniedError when this agent ID is banned: lets an attestor stop before costly work.
Admit = Callable[[SpiffeId], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class AttestationRequest:
    """What the server half works on.

    Attributes:
        payload: the agent's first message; hostile until checked.
        challenge: one round trip to the agent.
        csr_spki: DER SubjectPublicKeyInfo of the CSR, None under a host that cannot tell.
        admit: early ban check.
        source: where the exchange comes from, to be counted by: an IP address, or the network it
            is in; "" when the host cannot tell.
        address: IP address the agent calls from, "" when the host cannot tell. Behind a load
            balancer it is that one's.
    """

    payload: bytes
    challenge: Challenge
    csr_spki: bytes | None
    admit: Admit
    source: str = ""
    address: str = ""


class ServerNodeAttestor(Protocol):
    """The half in the server."""

    async def attest(self, request: AttestationRequest) -> AttestedIdentity:
        """Check one node.

        Raises:
            InvalidInputError: a message that does not parse.
            AttestationError: evidence that does not hold, or holds and is not trusted; its kind
                (invalid argument, permission denied, deadline exceeded) tells which.
            LimitError: a message too large, or too many exchanges at once.
            DeniedError: the node is banned.
        """
        ...


@runtime_checkable
class Rechecks(Protocol):
    """Optional ability of a server half: what it let nodes in with is looked at again.

    Certificates are revoked while nodes are attested, and the next attestation may be hours away.
    """

    async def lists_version(self) -> int | None:
        """Return a number that grows with every change of the lists of revoked certificates.

        Also when other lists were configured. None when there are no lists to ask.
        """
        ...

    async def recheck(self, certificates: tuple[tuple[bytes, ...], ...]) -> list[Finding]:
        """Return why a node would be refused for good by now; empty when nothing is revoked.

        That a list is missing or has run out is no reason: it will be there again.

        Args:
            certificates: as in `AttestedIdentity`, perhaps of an earlier release.

        Raises:
            InvalidInputError: they do not parse.
        """
        ...

"""Who is calling, and what is refused: the first check, and how every refusal is told and written.

Refusals cost an attacker nothing, records cost the signer disk: of those that repeat, one a second
is written down, with the number of those that were not. Strangers share a bound of their own, so that
however many they are, nothing that a client tries goes under.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.transport.mutual import ExpiredPeerError, MutualPeer
from spire_hw.transport.peer import TcpPeer, UnixPeer
from spire_hw_signer.audit.log import AuditLog, Intent, Refused
from spire_hw_signer.policy import Client, Denial, Policy, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.rpc.service import Call
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw.transport.peer import Peer
    from spire_hw_signer.tlsfiles import TlsFiles

_QUIET_S: Final = 1.0
_MAX_SEEN: Final = 4096
_MAX_WRITTEN: Final = 50  # records in a second of callers that nobody knows
ALARM: Final = ("alarm",)
REFUSED: Final = ("refused",)


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller that policy knows.

    Attributes:
        client: what it may do.
        cert_hash: lower-case hex SHA-256 of its certificate, "" on a unix socket.
        peer: where it calls from, in words.
        policy_hash: of the policy that let it in.
    """

    client: Client
    cert_hash: str
    peer: str
    policy_hash: str

    def intent(
        self,
        method: str,
        *,
        request_id: bytes = b"",
        key_id: str = "",
        generation: int = 0,
        fingerprint: str = "",
        hash_alg: str = "",
        digest_sha256: str = "",
    ) -> Intent:
        """Return what it is about to have done, for the audit log."""
        return Intent(
            client=self.client.identity,
            cert_hash=self.cert_hash,
            peer=self.peer,
            method=method,
            request_id=request_id.hex(),
            key_id=key_id,
            generation=generation,
            fingerprint=fingerprint,
            hash_alg=hash_alg,
            digest_sha256=digest_sha256,
            policy_hash=self.policy_hash,
        )


class Gate:
    """Lets callers in and writes refusals down."""

    def __init__(
        self,
        policy: Callable[[], Policy],
        audit: AuditLog,
        *,
        tls: TlsFiles | None = None,
        metrics: Metrics,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._policy = policy
        self._audit = audit
        self._tls = tls
        self._metrics = metrics
        self._clock = clock
        self._log = log
        self._seen: dict[tuple[str, str], list[float]] = {}
        self._since = 0.0
        self._written = 0

    @property
    def policy(self) -> Policy:
        """Return the policy as it is now."""
        return self._policy()

    def caller(self, call: Call) -> Caller:
        """Return who is calling (1); a call has to have a deadline (2).

        Raises:
            SpireHwError: UNAUTHENTICATED, or INVALID_ARGUMENT without a deadline.
        """
        policy = self._policy()
        identities, cert_hash, address = _proofs(call.peer)
        where = describe(call.peer)
        client, denial = policy.admit(identities, _network(address))
        denial = denial or self._out_of_force(call.peer)
        method = call.method.rpartition("/")[2]
        if client is None or denial is not None:
            denial = denial or Denial(Reason.UNKNOWN_CLIENT, "")
            name = identities[-1] if identities else ""
            self.refuse(_stranger(name, cert_hash, where, method, policy.hash), denial)
            raise error_of(denial)
        caller = Caller(client, cert_hash, where, policy.hash)
        if call.deadline_s is None:
            denial = Denial(Reason.NO_DEADLINE, "a call has to have a deadline")
            self.refuse(caller.intent(method), denial)
            raise error_of(denial)
        return caller

    def refuse(self, intent: Intent, denial: Denial, *, stranger: bool = False) -> None:
        """Count a refusal, write it down, raise an alarm where it is due.

        Args:
            intent: what was to be done.
            denial: why it is not.
            stranger: the caller is nobody whom the policy knows.
        """
        reason = denial.reason
        self._metrics.count(REFUSED, labels={"key": self._name(intent), "reason": reason.word})
        if reason.alarms:
            self._metrics.count(ALARM, labels={"reason": reason.word})
        # Not by key id: that can be any of millions.
        who = (intent.client or intent.peer, reason.word)
        stranger = stranger or reason is Reason.UNKNOWN_CLIENT
        unwritten = self._admit(who, stranger=stranger)
        if unwritten is None:
            return
        self._audit.refuse([Refused(intent, reason.word, reason.step, 1 + unwritten)])
        tell = self._log.error if reason.alarms else self._log.info
        tell(
            "Signer alarm: request refused" if reason.alarms else "Request refused",
            reason=reason.word,
            error=denial.text,
            client=intent.client,
            peer=intent.peer,
            key_id=intent.key_id,
            method=intent.method,
            unwritten=unwritten,
        )

    def stranger(self, address: str, error: SpireHwError) -> None:
        """Write down a caller that did not prove itself in the TLS handshake, or too late."""
        policy, name, cert_hash, reason = self._policy(), "", "", Reason.UNKNOWN_CLIENT
        if isinstance(error, ExpiredPeerError):
            proved, cert_hash, _ = _proofs(error.peer)
            known = next((one for one in proved if one in policy.clients), None)
            name, reason = known or proved[-1], Reason.CERTIFICATE_EXPIRED
        intent = _stranger(name, cert_hash, address, "TLS", policy.hash)
        self.refuse(intent, Denial(reason, error.message), stranger=True)

    def _name(self, intent: Intent) -> str:
        """Return the key as the policy names it, "" for one that is none of the client's."""
        client = self._policy().clients.get(intent.client)
        rule = client.rule(intent.key_id) if client is not None and intent.key_id else None
        return "" if rule is None else rule.name

    def _out_of_force(self, peer: Peer) -> Denial | None:
        """Tell what became of a certificate since the connection was made."""
        if not isinstance(peer, TcpPeer):
            return None
        now = self._clock.now()
        if now > peer.chain[0].not_valid_after_utc:
            return Denial(Reason.CERTIFICATE_EXPIRED, "the client's certificate has expired")
        if self._tls is not None and self._tls.is_revoked(peer.chain):
            text = "the client's certificate, or one above it, is on a revocation list"
            return Denial(Reason.REVOKED, text)
        if self._tls is not None and not self._tls.is_believed(peer.chain, now):
            text = "the client's certificate leads to none of client_ca_files any more"
            return Denial(Reason.UNKNOWN_CLIENT, text)
        return None

    def _admit(self, key: tuple[str, str], *, stranger: bool) -> int | None:
        """Return how many like this were not written, None when this one is not either."""
        now = self._clock.monotonic()
        seen = self._seen.get(key)
        if seen is not None and now - seen[0] < _QUIET_S:
            seen[1] += 1
            return None
        if now - self._since >= _QUIET_S:
            self._since, self._written = now, 0
        if stranger and self._written >= _MAX_WRITTEN:
            return None
        self._written += stranger
        if seen is None and len(self._seen) >= _MAX_SEEN:
            self._seen = {k: s for k, s in self._seen.items() if now - s[0] < _QUIET_S}
        self._seen[key] = [now, 0]
        return 0 if seen is None else int(seen[1])


def _stranger(name: str, cert_hash: str, peer: str, method: str, policy_hash: str) -> Intent:
    return Intent(name, cert_hash, peer, method, "", "", 0, "", "", "", policy_hash)


def error_of(denial: Denial) -> SpireHwError:
    """Return a refusal of a whole call; who is not let in is not told why."""
    if denial.reason.kind is ErrorKind.UNAUTHENTICATED:
        return SpireHwError("the client is not let in", kind=ErrorKind.UNAUTHENTICATED)
    return SpireHwError(denial.message, kind=denial.reason.kind)


def device_error(error: SpireHwError, seq: int) -> SpireHwError:
    """Return what a client is told of a device that failed: the code, and where the rest stands."""
    text = f"the signer could not do it: record {seq} of its audit log tells why"
    return SpireHwError(text, kind=error.kind)


def describe(peer: Peer) -> str:
    """Return where a caller is, for the audit log."""
    if isinstance(peer, UnixPeer):
        return f"unix:uid={peer.process.uid},pid={peer.process.pid}"
    return f"[{peer.address}]:{peer.port}" if ":" in peer.address else f"{peer.address}:{peer.port}"


def _proofs(peer: Peer) -> tuple[tuple[str, ...], str, str | None]:
    """Return what a caller proved to be, the hash of its certificate, and its address."""
    if isinstance(peer, UnixPeer):
        return (f"unix:{peer.process.uid}",), "", None
    if not isinstance(peer, MutualPeer):
        return (), "", peer.address
    identities = [f"sha256:{peer.fingerprint}"]
    if peer.spiffe_id is not None:
        identities.append(peer.spiffe_id.text)
    return tuple(identities), peer.fingerprint, peer.address


@lru_cache(maxsize=256)
def _network(address: str | None) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    return None if address is None else ipaddress.ip_network(address.partition("%")[0])

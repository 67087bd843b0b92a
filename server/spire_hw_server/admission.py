"""Which node is this, and may it in: one attestation from the first message to the stored node.

The attestor of the claimed type decides who the node is; what it decided is checked here. Join
tokens are handled here altogether. Nothing is stored before the node's SVID is signed; a refusal
leaves an audit record and, where a join token was shown, that token spent.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from spire_hw.errors import (
    AttestationError,
    DeniedError,
    ErrorKind,
    Finding,
    InvalidInputError,
    LimitError,
    NotFoundError,
    NotReadyError,
    PluginError,
    SpireHwError,
)
from spire_hw.key import parse_spki
from spire_hw.logsample import Sampler
from spire_hw.plugin.nodeattestor import (
    AttestationRequest,
    AttestedIdentity,
    Challenge,
    ServerNodeAttestor,
)
from spire_hw.posture.evidence import Occasion
from spire_hw.selector import Selector
from spire_hw.spiffeid import SpiffeId, TrustDomain, agent_id, check_agent_id, check_segment
from spire_hw.telemetry.metrics import NO_METRICS, Timed
from spire_hw_server.datastore.records import (
    NO_CERTIFICATES,
    NO_KEYS,
    KeyInUseError,
    KeyRole,
    Node,
    QuarantinedError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.posture.evidence import Evidence
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Certificates, NodeKeys, PostureUpdate
    from spire_hw_server.posture.judge import NodeJudge
    from spire_hw_server.posture.outcome import Outcome

JOIN_TOKEN: Final = "join_token"  # noqa: S105 - the attestor's name
AGENT_ID_SELECTOR: Final = "spiffe_id"

_MAX_MESSAGE_BYTES: Final = 1 << 20
# An attestor's longest challenge, and its own work before and after.
_MAX_TIMEOUT_S: Final = 130.0
_MAX_ROUNDS: Final = 16
_ATTESTATION: Final = ("node", "attestation")
_REFUSED: Final = ("node", "attestation", "refused")
_MAX_SELECTORS: Final = 1000
_MAX_TOKEN: Final = 255
_NAME_SEGMENT: Final = 3  # of "/spire/agent/<name>/..."
_RECORDS_PER_MINUTE: Final = 100  # from one source; beyond, they are counted
_OUR_OWN: Final = frozenset({ErrorKind.INTERNAL, ErrorKind.UNAVAILABLE, ErrorKind.UNKNOWN})


@runtime_checkable
class ExchangeLimits(Protocol):
    """An attestor that needs more than the usual limits says so with these attributes.

    Attributes:
        max_message_bytes: largest message from the agent; at most 1 MiB is granted.
        timeout_s: longest exchange; at most 130 seconds are granted.
    """

    max_message_bytes: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Admission:
    """A node that proved who it is and may get an SVID.

    Attributes:
        agent_id: what the SVID is issued for.
        attestation_type: name of the attestor.
        selectors: sorted, with the attestor's name as type.
        can_reattest: whether it attests again instead of renewing.
        csr_spki: DER of the one public key the SVID may be issued for.
        keys: digests of the keys no other node may have.
        evidence: what was proved about its machine, None when nothing was.
        caller: IP address, for the audit record.
        certificates: what it was let in with, to be looked at again.
    """

    agent_id: SpiffeId
    attestation_type: str
    selectors: tuple[Selector, ...]
    can_reattest: bool
    csr_spki: bytes
    keys: NodeKeys
    evidence: Evidence | None = None
    caller: str = ""
    certificates: Certificates = NO_CERTIFICATES


class Admissions:
    """Lets nodes in.

    Args:
        datastore: where nodes and join tokens are.
        trust_domain: the server's own.
        attestors: server halves by name; `join_token` is always there.
        clock: time, for the expiry of join tokens.
        log: takes the audit records.
        timeout_s: longest exchange.
        max_message_bytes: largest message from the agent.
        agent_id_as_selector: add the selector `spiffe_id:<agent ID>` to every node.
        is_banned: tells from memory which agent IDs are banned, so that a banned node's exchange
            ends early; None asks the store. The store is asked at the end in any case.
        judge: what is made of evidence, and how it is stored; None without.
        strict_ids: refuse agent IDs outside `/spire/agent/<attestor>/`; else they are let through
            with a warning, as upstream does, unless they look like another attestor's.
        metrics: takes down who attested and what was refused.
    """

    def __init__(
        self,
        datastore: Datastore,
        *,
        trust_domain: TrustDomain,
        attestors: Mapping[str, ServerNodeAttestor],
        clock: Clock,
        log: Logger,
        timeout_s: float = 30.0,
        max_message_bytes: int = 65536,
        agent_id_as_selector: bool = False,
        is_banned: Callable[[SpiffeId], bool] | None = None,
        judge: NodeJudge | None = None,
        strict_ids: bool = True,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._metrics = metrics
        self._datastore = datastore
        self._trust_domain = trust_domain
        self._attestors = dict(attestors)
        self._generous: dict[str, ExchangeLimits] = {
            name: attestor
            for name, attestor in attestors.items()
            if isinstance(attestor, ExchangeLimits)
        }
        self._clock = clock
        self._log = log
        self._timeout_s = timeout_s
        self._max_message_bytes = max_message_bytes
        self._agent_id_as_selector = agent_id_as_selector
        self._is_banned = is_banned
        self._judge = judge
        self._strict_ids = strict_ids
        self._records = Sampler(clock, burst=_RECORDS_PER_MINUTE)

    async def admit(
        self,
        attestation_type: str,
        payload: bytes,
        csr_spki: bytes,
        challenge: Challenge,
        *,
        caller: str = "",
        source: str = "",
    ) -> Admission:
        """Run one attestation.

        Args:
            attestation_type: as the agent claims.
            payload: the agent's first message.
            csr_spki: DER public key of the CSR, whose own signature has been verified.
            challenge: sends a challenge and returns the answer.
            caller: IP address, for the audit record and for attestors that look at it.
            source: what open exchanges are counted by, "" for a caller that is not counted.

        Raises:
            NotReadyError: no attestor of that type.
            InvalidInputError: unusable key or message; join token unknown, used or expired.
            LimitError: a message too large, or too many exchanges at once.
            DeniedError: the node is banned.
            AttestationError: `key_reused` or `ak_reused`, the key of the CSR or that of the
                machine is another node's.
            PluginError: the attestor refused.
            SpireHwError: DEADLINE_EXCEEDED; INTERNAL for an attestor that gave a wrong answer.
        """
        # What an agent claims is no name for a metric.
        is_known = attestation_type in self._attestors or attestation_type == JOIN_TOKEN
        labels = {"attestor": attestation_type if is_known else "unknown"}
        try:
            with Timed(self._metrics, _ATTESTATION, labels):
                return await self._within_time(
                    attestation_type, payload, csr_spki, challenge, caller=caller, source=source
                )
        except SpireHwError as e:
            self._record_refusal(e, attestation_type, csr_spki, caller)
            raise

    async def store(
        self, admission: Admission, *, serial_number: str, expires_at: datetime
    ) -> Node:
        """Store an admitted node after its SVID was signed, before it is sent.

        Args:
            admission: as `admit` returned it.
            serial_number: decimal serial number of the SVID.
            expires_at: when the SVID ends.

        Raises:
            DeniedError: the node was banned meanwhile; the SVID must not be sent.
            AttestationError: another node got one of its keys meanwhile; likewise.
            SpireHwError: INTERNAL, the datastore failed.
        """
        node = Node(
            agent_id=admission.agent_id,
            attestation_type=admission.attestation_type,
            serial_number=serial_number,
            expires_at=expires_at,
            can_reattest=admission.can_reattest,
            selectors=admission.selectors,
        )
        try:
            with self.own_faults("cannot store the attestation", admission.agent_id):
                shown = await self._shown(admission)
                update = None if shown is None else shown[0]
                stored = await self._datastore.put_node(
                    node, admission.keys, update, admission.certificates
                )
        except (DeniedError, AttestationError) as e:
            refusal: SpireHwError = e
            if isinstance(e, KeyInUseError):
                refusal = self.reused(admission.attestation_type, admission.agent_id, e)
            elif isinstance(e, QuarantinedError):
                refusal = _quarantined(e)
            elif isinstance(e, DeniedError):
                refusal = _banned(admission.agent_id)
            self._record_refusal(
                refusal, admission.attestation_type, admission.csr_spki, admission.caller
            )
            raise refusal from e
        if shown is not None and self._judge is not None:
            self._judge.tell(shown[1].change(admission.agent_id, Occasion.ATTESTATION.value))
        self._log.info(
            "Node attested",
            agent_id=str(stored.agent_id),
            node_attestor_type=stored.attestation_type,
            serial_number=serial_number,
            selectors=len(stored.selectors),
        )
        return stored

    @contextmanager
    def own_faults(self, what: str, agent_id: SpiffeId) -> Iterator[None]:
        """Tell the operator why this server fails, and the node no more than that it does.

        Args:
            what: cannot be done.
            agent_id: for whom.

        Raises:
            SpireHwError: INTERNAL, in place of an error that is not the node's.
        """
        try:
            yield
        except SpireHwError as e:
            if e.kind not in _OUR_OWN:
                raise
            text = f"node: {what} now"
            self._log.error(text, agent_id=str(agent_id), error=e.message)
            raise SpireHwError(text, kind=ErrorKind.INTERNAL) from e

    async def _shown(self, admission: Admission) -> tuple[PostureUpdate, Outcome] | None:
        """Return what evidence changes of what is known of a machine."""
        if self._judge is None or admission.evidence is None:
            return None
        return await self._judge.admitted(admission.agent_id, admission.evidence)

    def reused(self, name: str, agent_id: SpiffeId, error: KeyInUseError) -> AttestationError:
        """Tell the operator of both nodes, and return what the one that asked is told.

        Args:
            name: of the attestor.
            agent_id: who wanted the key.
            error: what the store said.
        """
        self._log.error(
            "Two nodes have shown the same key; evict the one that must not have it",
            agent_id=str(agent_id),
            owner_id=str(error.owner),
            key_role=error.role.name.lower(),
        )
        text, code = "csr: key belongs to another node", "key_reused"
        if error.role is KeyRole.ATTESTATION:
            text, code = f"nodeattestor({name}): ak: key belongs to another node", "ak_reused"
        return AttestationError([Finding(code, text, ErrorKind.PERMISSION_DENIED)])

    async def _within_time(
        self,
        attestation_type: str,
        payload: bytes,
        csr_spki: bytes,
        challenge: Challenge,
        *,
        caller: str,
        source: str,
    ) -> Admission:
        attestor = self._attestors.get(attestation_type)
        if attestor is None and attestation_type != JOIN_TOKEN:
            raise NotReadyError(f"no node attestor {_shown(attestation_type)} is configured")
        timeout_s, max_bytes = self._limits(attestation_type)
        parse_spki(csr_spki)
        _check_size("attestation payload", payload, max_bytes)
        if not payload:
            raise InvalidInputError("attestation payload is empty")
        try:
            async with asyncio.timeout(timeout_s):
                if attestation_type == JOIN_TOKEN or attestor is None:
                    identity = await self._take_token(payload)
                else:
                    exchange = _Exchange(challenge, self._refuse_early, max_bytes)
                    request = AttestationRequest(
                        payload, exchange.challenge, csr_spki, exchange.admit, source, caller
                    )
                    identity = await self._ask(attestation_type, attestor, exchange, request)
                return await self._checked(attestation_type, identity, csr_spki, caller)
        except TimeoutError as e:
            raise SpireHwError(
                f"attestation took longer than {timeout_s:g} s", kind=ErrorKind.DEADLINE_EXCEEDED
            ) from e

    def _limits(self, name: str) -> tuple[float, int]:
        timeout_s, max_bytes = self._timeout_s, self._max_message_bytes
        own = self._generous.get(name)
        if own is not None:
            timeout_s = max(timeout_s, min(own.timeout_s, _MAX_TIMEOUT_S))
            max_bytes = max(max_bytes, min(own.max_message_bytes, _MAX_MESSAGE_BYTES))
        return timeout_s, max_bytes

    async def _ask(
        self,
        name: str,
        attestor: ServerNodeAttestor,
        exchange: _Exchange,
        request: AttestationRequest,
    ) -> AttestedIdentity:
        """Run the attestor; its errors get its name in front, those of the exchange do not."""
        prefix = f"nodeattestor({name})"
        try:
            return await attestor.attest(request)
        except SpireHwError as e:
            if e is exchange.error or isinstance(e, PluginError):
                raise
            raise PluginError(prefix, e) from e
        except TimeoutError:
            raise
        except Exception as e:
            self._log.exception("Node attestor failed unexpectedly", node_attestor_type=name)
            raise PluginError(prefix, SpireHwError("failed unexpectedly")) from e

    async def _take_token(self, payload: bytes) -> AttestedIdentity:
        """Spend a join token; whatever is wrong with it, the answer is the same."""
        refusal = InvalidInputError("join token is unknown, was used, or has expired")
        try:
            value = payload.decode("ascii")
            if len(value) > _MAX_TOKEN:
                raise refusal
            identity = agent_id(self._trust_domain, JOIN_TOKEN, check_segment(value))
            await self._refuse_banned(identity)
            token = await self._datastore.take_join_token(value)
        except (UnicodeDecodeError, InvalidInputError, NotFoundError):
            raise refusal from None
        if token.expires_at <= self._clock.now():
            raise refusal
        return AttestedIdentity(agent_id=identity, selector_values=[], can_reattest=False)

    async def _refuse_banned(self, identity: SpiffeId) -> None:
        await self._stored(identity, NO_KEYS)

    async def _refuse_early(self, identity: SpiffeId) -> None:
        if self._is_banned is None:
            await self._refuse_banned(identity)
        elif self._is_banned(identity):
            raise _banned(identity)

    async def _stored(self, identity: SpiffeId, keys: NodeKeys) -> Node | None:
        """Return the node that is stored under an ID, None when there is none.

        Raises:
            DeniedError: it is banned.
            KeyInUseError: one of the keys is another node's.
        """
        with self.own_faults("cannot look the node up", identity):
            node = await self._datastore.find_node(identity, keys)
        if node is not None and node.banned:
            raise _banned(identity)
        return node

    async def _checked(
        self, name: str, identity: AttestedIdentity, csr_spki: bytes, caller: str
    ) -> Admission:
        self._check_id(name, identity.agent_id)
        keys = {KeyRole.SVID: hashlib.sha256(csr_spki).digest()}
        if identity.attestation_key is not None:
            keys[KeyRole.ATTESTATION] = hashlib.sha256(identity.attestation_key).digest()
        try:
            stored = await self._stored(identity.agent_id, keys)
        except KeyInUseError as e:
            raise self.reused(name, identity.agent_id, e) from e
        if stored is not None and stored.quarantine and identity.evidence is None:
            raise _quarantined(QuarantinedError(stored.agent_id, stored.quarantine))
        if stored is not None and stored.attestation_type != name:
            raise DeniedError(
                f'agent ID "{identity.agent_id}" belongs to a node attested by'
                f" {_shown(stored.attestation_type)}; evict that one first"
            )
        return Admission(
            agent_id=identity.agent_id,
            attestation_type=name,
            selectors=self._selectors(name, identity),
            can_reattest=identity.can_reattest,
            csr_spki=csr_spki,
            keys=keys,
            evidence=identity.evidence,
            caller=caller,
            certificates=identity.certificates,
        )

    def _check_id(self, name: str, identity: SpiffeId) -> None:
        """Refuse an ID that this attestor has no business to give."""
        try:
            check_agent_id(identity, self._trust_domain)
        except InvalidInputError as e:
            raise _wrong_answer(name, e.message) from e
        owner = identity.path.split("/")[_NAME_SEGMENT]
        if owner == name and identity.path.count("/") > _NAME_SEGMENT:
            return
        if self._strict_ids or owner == JOIN_TOKEN or owner in self._attestors:
            raise _wrong_answer(name, f'"{identity}" is not below "/spire/agent/{name}/"')
        self._log.warning(
            "Agent ID is outside its attestor's namespace",
            agent_id=str(identity),
            node_attestor_type=name,
        )

    def _selectors(self, name: str, identity: AttestedIdentity) -> tuple[Selector, ...]:
        if len(identity.selector_values) > _MAX_SELECTORS:
            raise _wrong_answer(name, f"more than {_MAX_SELECTORS} selectors")
        try:
            found = {Selector(name, value) for value in identity.selector_values}
        except InvalidInputError as e:
            raise _wrong_answer(name, e.message) from e
        if self._agent_id_as_selector:
            found.add(Selector(AGENT_ID_SELECTOR, identity.agent_id.text))
        return tuple(sorted(found))

    def _record_refusal(
        self, error: SpireHwError, attestation_type: str, csr_spki: bytes, caller: str
    ) -> None:
        refused = _refused(error)
        for finding in [] if refused is None else refused.findings:
            self._metrics.count(_REFUSED, labels={"reason": finding.code})
        left_out = self._records.admit(caller)
        if left_out is None:
            return
        more: dict[str, object] = {"left_out": left_out} if left_out else {}
        if refused is not None:
            more |= refused.claimed
        self._log.warning(
            "Node attestation refused",
            type="audit",
            status="error",
            status_code=error.kind.name,
            status_message=error.message,
            reasons=[] if refused is None else [finding.code for finding in refused.findings],
            node_attestor_type=_shown(attestation_type),
            key_sha256=hashlib.sha256(csr_spki).hexdigest(),
            caller_addr=caller,
            **more,
        )


class _Exchange:
    """The agent's end as the attestor sees it: bounded, and its own errors are told apart."""

    def __init__(
        self, challenge: Challenge, refuse_banned: Callable[[SpiffeId], Awaitable[None]], limit: int
    ) -> None:
        self._challenge = challenge
        self._refuse_banned = refuse_banned
        self._limit = limit
        self._rounds = 0
        self.error: SpireHwError | None = None

    async def challenge(self, data: bytes) -> bytes:
        """Send a challenge and return the answer."""
        try:
            self._rounds += 1
            if self._rounds > _MAX_ROUNDS:
                raise LimitError(f"attestation took more than {_MAX_ROUNDS} rounds")
            answer = await self._challenge(data)
            _check_size("challenge response", answer, self._limit)
        except SpireHwError as e:
            self.error = e
            raise
        return answer

    async def admit(self, identity: SpiffeId) -> None:
        """Refuse a banned node before the costly part."""
        try:
            await self._refuse_banned(identity)
        except SpireHwError as e:
            self.error = e
            raise


def _banned(identity: SpiffeId) -> DeniedError:
    # Without a wire detail: an agent that attests has no identity yet to throw away.
    return DeniedError(f'agent "{identity}" is banned; evicting it lifts the ban')


def _quarantined(error: QuarantinedError) -> DeniedError:
    return DeniedError(f"node: quarantined: {error.reason_code}")


def _wrong_answer(name: str, reason: str) -> PluginError:
    return PluginError(
        f"nodeattestor({name})",
        SpireHwError(f"gave an answer that cannot be accepted: {reason}", kind=ErrorKind.INTERNAL),
    )


def _check_size(what: str, data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise LimitError(f"{what} is {len(data)} bytes, limit {limit}")


def _refused(error: BaseException | None) -> AttestationError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error may be its own cause
        if isinstance(error, AttestationError):
            return error
        seen.add(id(error))
        error = error.__cause__
    return None


def _shown(text: str) -> str:
    return ascii(text[:64])

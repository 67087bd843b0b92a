"""NodeAttestor `tpm`, server half: from a stranger's bytes to a machine that is known by its TPM.

The order of checks goes from cheap and stateless to dear: envelope, endorsement key, ban,
attestation key, the agent's own key; then one challenge that only this TPM can open; then the
statements made after opening it, and policy. A challenge lives in memory, for one stream and one
answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from spire_hw.errors import AttestationError, ErrorKind, LimitError, NotReadyError
from spire_hw.logsample import Sampler
from spire_hw.plugin.nodeattestor import AttestedIdentity
from spire_hw.posture.evidence import Evidence, Occasion, Tier
from spire_hw.posture.judge import EvidenceRequest
from spire_hw.posture.policy import ima_start
from spire_hw.spiffeid import agent_id
from spire_hw.tpm import eventlog, imalist
from spire_hw.tpm.credential import make_credential
from spire_hw_plugins.nodeattestor.tpm import dialects, replay, statements, wire
from spire_hw_plugins.nodeattestor.tpm.answer import Asked, check_answer, check_secret, draw
from spire_hw_plugins.nodeattestor.tpm.claims import check_claims, check_signer
from spire_hw_plugins.nodeattestor.tpm.config import build_settings, find_faults
from spire_hw_plugins.nodeattestor.tpm.endorsement import accept_ek, find_revoked, read_ek
from spire_hw_plugins.nodeattestor.tpm.exchanges import MAX_OPEN, Exchanges
from spire_hw_plugins.nodeattestor.tpm.heartbeat import check_heartbeat
from spire_hw_plugins.nodeattestor.tpm.selectors import selectors
from spire_hw_plugins.nodeattestor.tpm.statements import refusal
from spire_hw_plugins.nodeattestor.tpm.talk import Talk

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault, Finding
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.nodeattestor import AttestationRequest
    from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatChallenge, KnownNode
    from spire_hw.posture.verdict import Verdict
    from spire_hw.spiffeid import SpiffeId
    from spire_hw.tpm.public import TpmPublic
    from spire_hw_plugins.nodeattestor.tpm.config import Settings
    from spire_hw_plugins.nodeattestor.tpm.endorsement import Endorsement
    from spire_hw_plugins.nodeattestor.tpm.exchanges import Place

NAME: Final = "tpm"
_MAX_OPEN: Final = MAX_OPEN
_REFUSALS_PER_MINUTE: Final = 100  # told to the log of one address; beyond, they are counted
_DEFAULT_TIMEOUT_S: Final = 30.0
# What the checks before and after the challenge may take on a busy server.
_OWN_WORK_S: Final = 5.0
_NO_QUOTE: Final = "policy: this server requires a quote"


def build(host: HostInfo) -> TpmServer:
    """Return the server half of NodeAttestor `tpm`."""
    return TpmServer(host)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """One exchange under way: what the node said, what it has to show, and how to ask it."""

    data: wire.AttestationData
    ek: Endorsement
    asked: Asked
    place: Place
    talk: Talk


class TpmServer:
    """The ServerNodeAttestor contract over TPM evidence."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._log = host.log
        self._settings: Settings | None = None
        self._open = Exchanges(host.clock, max_open=_MAX_OPEN)
        self._refusals = Sampler(host.clock, burst=_REFUSALS_PER_MINUTE)

    @property
    def timeout_s(self) -> float:
        """Return how long the host has to wait for a whole exchange."""
        settings = self._settings
        limit = _DEFAULT_TIMEOUT_S if settings is None else settings.timeout.total_seconds()
        return limit + _OWN_WORK_S

    @property
    def max_message_bytes(self) -> int:
        """Return the largest message the host has to pass on."""
        return wire.MAX_RESPONSE_BYTES

    @property
    def open_exchanges(self) -> int:
        """Return how many attestations are open at this moment."""
        return len(self._open)

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching any file."""
        return find_faults(config, has_ek_list=self._host.ek_list is not None)

    async def configure(self, config: Body) -> None:
        """Read roots and hash list.

        Raises:
            ConfigError: the configuration has faults.
            NotReadyError: a file cannot be read.
            InvalidInputError: a file holds something else than it should.
        """
        has_list = self._host.ek_list is not None
        self._settings = await asyncio.to_thread(build_settings, config, has_ek_list=has_list)
        self._open.expect(self._settings.timeout.total_seconds())
        if {n for _, n in self._settings.policy} == {7}:
            self._log.warning("PCR 7 alone does not identify what was booted; list others too")

    async def close(self) -> None:
        """Forget the configuration; exchanges under way end by themselves."""
        self._settings = None

    async def attest(self, request: AttestationRequest) -> AttestedIdentity:
        """Check one node.

        Raises:
            InvalidInputError: a message that does not parse.
            LimitError: a message too large, or too many exchanges at once.
            AttestationError: evidence that does not hold, is not trusted or came too late; its
                kind tells which.
            DeniedError: the host bans this agent.
        """
        settings = self._settings
        if settings is None:
            raise NotReadyError("attestor is not configured")
        claimed: dict[str, str] = {}
        try:
            return await self._attest(settings, request, claimed)
        except AttestationError as e:
            e.claimed |= claimed
            codes = [finding.code for finding in e.findings]
            findings = [finding.message for finding in e.findings]
            if "ek_unlisted" in codes:
                claimed["remedy"] = f"spire-hw-server tpm allow {claimed['ek_hash']}"
            left_out = self._refusals.admit(request.address)
            if left_out is not None:
                if left_out:
                    claimed["left_out"] = str(left_out)
                self._log.warning(
                    "TPM attestation refused", codes=codes, findings=findings, **claimed
                )
            raise

    async def check_heartbeat(
        self,
        node: KnownNode,
        challenge: HeartbeatChallenge,
        answer: HeartbeatAnswer,
        now: datetime,
    ) -> Evidence:
        """Return what a heartbeat proved; see `spire_hw.posture.heartbeat.HeartbeatVerifier`."""
        return await check_heartbeat(node, challenge, answer, now)

    async def lists_version(self) -> int | None:
        """Return a number of the revocation lists; see `spire_hw.plugin.nodeattestor.Rechecks`."""
        settings = self._settings
        if settings is None or settings.crls is None:
            return None
        await settings.crls.current(self._host.clock, self._log)
        return settings.crls.version

    async def recheck(self, certificates: tuple[tuple[bytes, ...], ...]) -> list[Finding]:
        """Return what is revoked by now; see `spire_hw.plugin.nodeattestor.Rechecks`."""
        settings = self._settings
        if settings is None or settings.crls is None:
            return []
        return [
            finding
            for chain in certificates
            for finding in await find_revoked(settings, self._host, chain)
        ]

    async def _attest(
        self, settings: Settings, request: AttestationRequest, claimed: dict[str, str]
    ) -> AttestedIdentity:
        data = wire.decode_attestation_data(request.payload)
        if data.ek_pub is None and not settings.accept_activation_only:
            raise refusal("activation_only", _NO_QUOTE, ErrorKind.PERMISSION_DENIED)
        public, leaf = read_ek(data)
        claimed["ek_hash"] = hashlib.sha256(public.spki).hexdigest()
        ek = await accept_ek(settings, self._host, public, leaf, data.ek_chain)
        identity = agent_id(self._host.trust_domain, NAME, ek.hash)
        await request.admit(identity)
        asked = await self._asked(settings, identity, ek)
        with self._open.hold(ek.hash, request.source) as place:
            limit_s = settings.timeout.total_seconds()
            exchange = _Exchange(
                data, ek, asked, place, Talk(request.challenge, place, self._host.clock, limit_s)
            )
            if data.ek_pub is None:
                evidence, ak = await self._activate(settings, request, exchange)
            else:
                evidence, ak = await self._prove(settings, request, exchange)
            verdict = await self._judged(identity, evidence)
        self._tell(evidence)
        return AttestedIdentity(
            identity,
            selectors(evidence, verdict),
            can_reattest=True,
            attestation_key=ak.spki,
            evidence=evidence,
            verdict=verdict,
            certificates=(ek.certificates,) if ek.certificates else (),
        )

    async def _asked(self, settings: Settings, identity: SpiffeId, ek: Endorsement) -> Asked:
        """Return what a node has to show: what the host wants, and what is configured here."""
        judge = self._host.judge
        wanted = EvidenceRequest()
        if judge is not None:
            wanted = await judge.request(identity, ek.facts)
        pcrs = statements.selections(wanted.pcrs) or settings.selections
        pcrs = statements.with_pcrs(pcrs, settings.policy)
        # A log that no policy asks for is judged by nobody else.
        alone = settings.boot_log and not wanted.boot_log
        if settings.boot_log:
            wanted = replace(wanted, boot_log=True)
        if settings.ima and wanted.ima is None:
            wanted = replace(wanted, ima=ima_start(replay.log_bank(wanted, pcrs)))
        return Asked(wanted, replay.extended(wanted, pcrs), settings.policy, judge_boot=alone)

    async def _prove(
        self, settings: Settings, request: AttestationRequest, exchange: _Exchange
    ) -> tuple[Evidence, TpmPublic]:
        data, asked = exchange.data, exchange.asked
        claims = check_claims(settings, data, exchange.ek, request.csr_spki)
        _check_announced(asked.wanted, data)
        node, message = draw(claims, asked, data, round(settings.timeout.total_seconds() * 1000))
        response = wire.decode_response(await exchange.talk.ask(message))
        check_secret(response.secret, node.secret)
        self._open.win(exchange.place)
        evidence = await check_answer(node, response, exchange.talk, self._host.clock.now())
        return evidence, claims.signer.ak

    async def _activate(
        self, settings: Settings, request: AttestationRequest, exchange: _Exchange
    ) -> tuple[Evidence, TpmPublic]:
        """Let in a node of dialect A or B, which proves which TPM it has and nothing else."""
        if exchange.asked.wanted != EvidenceRequest():
            raise refusal("activation_only", _NO_QUOTE, ErrorKind.PERMISSION_DENIED)
        signer = check_signer(settings, exchange.data, exchange.ek, request.csr_spki)
        secret = secrets.token_bytes(wire.SECRET_BYTES)
        sealed = make_credential(exchange.ek.public, signer.ak.name, secret)
        message = dialects.encode_challenge(sealed.id_object, sealed.encrypted_secret)
        check_secret(dialects.decode_response(await exchange.talk.ask(message)), secret)
        self._open.win(exchange.place)
        evidence = Evidence(
            made_at=self._host.clock.now(),
            occasion=Occasion.ATTESTATION,
            tier=Tier.ACTIVATION,
            ek=exchange.ek.facts,
            ak_public=signer.ak.raw,
            ak_hierarchy=signer.hierarchy,
            ak_qualified_name=signer.qualified_name,
        )
        return evidence, signer.ak

    async def _judged(self, identity: SpiffeId, evidence: Evidence) -> Verdict | None:
        """Return the host's verdict; what speaks against a node by itself is told it as well."""
        judge, verdict = self._host.judge, None
        if judge is not None:
            verdict = await judge.judge(identity, evidence)
        if evidence.findings:
            raise AttestationError(list(evidence.findings))
        return verdict

    def _tell(self, evidence: Evidence) -> None:
        counters = evidence.counters
        self._log.debug(
            "TPM attested",
            ek_hash=evidence.ek.hash,
            tier=evidence.tier.value,
            reset_count=None if counters is None else counters.reset_count,
            restart_count=None if counters is None else counters.restart_count,
            firmware_version=None if counters is None else f"{counters.firmware_version:016x}",
        )


def _check_announced(wanted: EvidenceRequest, data: wire.AttestationData) -> None:
    """Refuse a node that says beforehand that its logs will not do."""
    if wanted.boot_log and (data.log is None or not data.log.size):
        raise refusal("log_missing", "log: boot log is missing")
    if wanted.boot_log and data.log is not None and data.log.size > eventlog.MAX_BYTES:
        raise LimitError(f"log: larger than {eventlog.MAX_BYTES} bytes")
    if wanted.ima is not None and data.ima_entries is not None:
        # After a reset the list is shorter than what is known of the one before.
        begun = wanted.ima.count if data.ima_entries >= wanted.ima.count else 0
        if data.ima_entries - begun > imalist.MAX_ENTRIES:
            raise LimitError(f"ima: more than {imalist.MAX_ENTRIES} entries")

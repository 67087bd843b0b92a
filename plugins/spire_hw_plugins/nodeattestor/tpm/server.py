"""NodeAttestor `tpm`, server half: from a stranger's bytes to a machine that is known by its TPM.

The order of checks goes from cheap and stateless to dear: envelope, endorsement key, ban,
attestation key, the agent's own key; then one challenge that only this TPM can open; then the
statements made after opening it, and policy. A challenge lives in memory, for one stream and one
answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from spire_hw.errors import (
    AttestationError,
    ErrorKind,
    Finding,
    NotReadyError,
    SpireHwError,
)
from spire_hw.plugin.nodeattestor import AttestedIdentity
from spire_hw.spiffeid import agent_id
from spire_hw.tpm import verify
from spire_hw.tpm.credential import make_credential
from spire_hw.tpm.public import check_ak, check_svid_key, parse_public
from spire_hw.tpm.verify import NO_CSR, Quote, Statement, qualifier
from spire_hw_plugins.nodeattestor.tpm import wire
from spire_hw_plugins.nodeattestor.tpm.config import build_settings, find_faults
from spire_hw_plugins.nodeattestor.tpm.endorsement import accept_ek, read_ek
from spire_hw_plugins.nodeattestor.tpm.exchanges import MAX_OPEN, Exchanges
from spire_hw_plugins.nodeattestor.tpm.heartbeat import check_heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.nodeattestor import AttestationRequest
    from spire_hw.posture.evidence import Evidence
    from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatChallenge, KnownNode
    from spire_hw.tpm.public import TpmPublic
    from spire_hw.tpm.wire import PcrSelection
    from spire_hw_plugins.nodeattestor.tpm.config import Settings
    from spire_hw_plugins.nodeattestor.tpm.endorsement import Endorsement
    from spire_hw_plugins.nodeattestor.tpm.exchanges import Place

NAME: Final = "tpm"
_MAX_OPEN: Final = MAX_OPEN
_DEFAULT_TIMEOUT_S: Final = 30.0
# What the checks before and after the challenge may take on a busy server.
_OWN_WORK_S: Final = 5.0
T = TypeVar("T")


def build(host: HostInfo) -> TpmServer:
    """Return the server half of NodeAttestor `tpm`."""
    return TpmServer(host)


@dataclass(frozen=True, slots=True)
class _Device:
    """What is known about a node before it answered the challenge; all still claims."""

    ek: Endorsement
    ak: TpmPublic
    creation: verify.Creation
    key: TpmPublic | None


@dataclass(frozen=True, slots=True)
class _Round:
    """One challenge: what was drawn for it, and what the statements have to be bound to."""

    secret: bytes
    nonce: bytes
    csr_sha256: bytes

    def expected(self, role: str, ak: TpmPublic) -> bytes:
        return qualifier(role, self.nonce, self.csr_sha256, self.secret, ak.name)


class TpmServer:
    """The ServerNodeAttestor contract over TPM evidence."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._log = host.log
        self._settings: Settings | None = None
        self._open = Exchanges(host.clock, max_open=_MAX_OPEN)

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
            codes = [finding.code for finding in e.findings]
            findings = [finding.message for finding in e.findings]
            if "ek_unlisted" in codes:
                claimed["remedy"] = f"spire-hw-server tpm allow {claimed['ek_hash']}"
            self._log.warning("TPM attestation refused", codes=codes, findings=findings, **claimed)
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

    async def _attest(
        self, settings: Settings, request: AttestationRequest, claimed: dict[str, str]
    ) -> AttestedIdentity:
        data = wire.decode_attestation_data(request.payload)
        public, leaf = read_ek(data)
        claimed["ek_hash"] = hashlib.sha256(public.spki).hexdigest()
        ek = await accept_ek(settings, self._host, public, leaf, data.ek_chain)
        identity = agent_id(self._host.trust_domain, NAME, ek.hash)
        await request.admit(identity)
        with self._open.hold(ek.hash, request.source) as place:
            ak, creation = _check_ak(settings, data, ek.public, request.csr_spki)
            csr_spki = _known_csr(settings, data, request.csr_spki)
            key = _check_key(settings, data, csr_spki)
            device = _Device(ek, ak, creation, key)
            drawn, message = _draw(settings, device, csr_spki)
            answer = await self._ask(settings, request, message, place)
            response = wire.decode_response(answer)
            quotes = _check_response(settings, device, drawn, response)
        self._log.debug(
            "TPM attested",
            ek_hash=ek.hash,
            reset_count=quotes[0].clock.reset_count,
            restart_count=quotes[0].clock.restart_count,
            firmware_version=f"{quotes[0].firmware_version:016x}",
        )
        return AttestedIdentity(
            identity,
            _selectors(device, quotes),
            can_reattest=True,
            attestation_key=device.ak.spki,
        )

    async def _ask(
        self, settings: Settings, request: AttestationRequest, message: bytes, place: Place
    ) -> bytes:
        """Send the challenge and return the answer, if it comes in time."""
        limit_s = settings.timeout.total_seconds()
        clock = self._host.clock
        start = clock.monotonic()
        answer: bytes | SpireHwError | None = None
        scope = asyncio.timeout(None)

        def end() -> None:
            scope.reschedule(asyncio.get_running_loop().time())

        async def expire() -> None:
            await clock.sleep(limit_s)
            end()

        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(expire())
            try:
                async with scope:
                    with place.interrupted_by(end):
                        answer = await request.challenge(message)
            except SpireHwError as e:
                answer = e
            except TimeoutError:
                if not scope.expired():
                    raise
            finally:
                watcher.cancel()
        place.check()
        if isinstance(answer, SpireHwError):
            raise answer
        if answer is None or clock.monotonic() - start > limit_s:
            text = f"challenge: not answered in {limit_s:g} s"
            finding = Finding("challenge_timeout", text, ErrorKind.DEADLINE_EXCEEDED)
            raise AttestationError([finding])
        return answer


def _refuse(code: str, text: str, kind: ErrorKind = ErrorKind.INVALID_ARGUMENT) -> AttestationError:
    return AttestationError([Finding(code, text, kind)])


def _check_ak(
    settings: Settings, data: wire.AttestationData, ek: TpmPublic, csr_spki: bytes | None
) -> tuple[TpmPublic, verify.Creation]:
    ak = parse_public(data.ak.public, "ak: public area")
    check_ak(ak)
    if ak.spki in {ek.spki, csr_spki}:
        raise _refuse("keys_equal", "ak: keys must be different")
    parents: tuple[TpmPublic, ...] = ()
    if data.ak_parent_pub is not None:
        parents = (parse_public(data.ak_parent_pub, "ak: parent's public area"),)
    statement = Statement(data.ak.create_attestation, data.ak.create_signature)
    creation = verify.verify_creation(ak, data.ak.create_data, statement, parents)
    if creation.hierarchy != "endorsement" and not settings.allow_owner_ak:
        text = "ak: key is not in the endorsement hierarchy"
        raise _refuse("ak_hierarchy", text, ErrorKind.PERMISSION_DENIED)
    return ak, creation


def _known_csr(
    settings: Settings, data: wire.AttestationData, csr_spki: bytes | None
) -> bytes | None:
    """Return the CSR's key when both halves know it: nothing else can evidence be bound to."""
    if data.csr or csr_spki is None:
        return csr_spki
    if settings.bind_csr:
        text = "policy: the agent's host does not show it the certificate request (bind_csr)"
        raise _refuse("csr_unbound", text, ErrorKind.PERMISSION_DENIED)
    return None


def _check_key(
    settings: Settings, data: wire.AttestationData, csr_spki: bytes | None
) -> TpmPublic | None:
    """Return the key to be certified, None when this node's key is not (known to be) in a TPM."""
    if csr_spki is None or data.key_pub is None:
        if settings.require_tpm_key:
            text = "policy: the agent key must be in the TPM"
            raise _refuse("key_not_in_tpm", text, ErrorKind.PERMISSION_DENIED)
        return None
    key = parse_public(data.key_pub, "certify: public area")
    if key.spki != csr_spki:
        raise _refuse("csr_key_mismatch", "certify: CSR holds another key")
    check_svid_key(key)
    return key


def _draw(settings: Settings, device: _Device, csr_spki: bytes | None) -> tuple[_Round, bytes]:
    """Draw what is random about this exchange and return it with the challenge message."""
    csr_sha256 = NO_CSR if csr_spki is None else hashlib.sha256(csr_spki).digest()
    drawn = _Round(
        secret=secrets.token_bytes(wire.SECRET_BYTES),
        nonce=secrets.token_bytes(wire.NONCE_BYTES),
        csr_sha256=csr_sha256,
    )
    sealed = make_credential(device.ek.public, device.ak.name, drawn.secret)
    message = wire.ChallengeMessage(
        credential=sealed.id_object,
        secret=sealed.encrypted_secret,
        nonce=drawn.nonce,
        quote=settings.selections,
        expires_ms=round(settings.timeout.total_seconds() * 1000),
        csr=csr_spki is not None,
    )
    return drawn, wire.encode_challenge(message)


def _check_response(
    settings: Settings, device: _Device, drawn: _Round, response: wire.Response
) -> list[Quote]:
    """Return what the quotes proved; every fault after the secret is collected first."""
    if not hmac.compare_digest(response.secret, drawn.secret):
        raise _refuse("secret_mismatch", "challenge: secret does not match")
    findings: list[Finding] = []
    if response.time or response.log or response.ima or response.ima_from is not None:
        findings.append(Finding("evidence_unasked", "envelope: evidence that was not asked for"))
    _collect(findings, partial(_check_certify, device, drawn, response))
    quotes = []
    if len(response.quotes) != len(settings.selections):
        findings.append(Finding("evidence_missing", "quote: evidence asked for is missing"))
    else:
        for selection, evidence in zip(settings.selections, response.quotes, strict=True):
            quote = _collect(findings, partial(_quote, device, drawn, selection, evidence))
            if quote is not None:
                quotes.append(quote)
                findings.extend(verify.find_unused_banks(quote.pcrs))
                findings.extend(_policy_findings(settings, quote))
    if findings:
        raise AttestationError(findings)
    return quotes


def _collect(findings: list[Finding], step: Callable[[], T]) -> T | None:
    try:
        return step()
    except AttestationError as e:
        findings.extend(e.findings)
        return None


def _check_certify(device: _Device, drawn: _Round, response: wire.Response) -> None:
    if device.key is None:
        if response.certify is not None:
            raise _refuse("evidence_unasked", "certify: evidence that was not asked for")
        return
    if response.certify is None:
        raise _refuse("evidence_missing", "certify: evidence asked for is missing")
    verify.verify_certify(
        device.ak,
        device.creation.qualified_name,
        key=device.key,
        expected=drawn.expected("certify", device.ak),
        statement=Statement(response.certify.attest, response.certify.sig),
    )


def _quote(
    device: _Device, drawn: _Round, selection: PcrSelection, evidence: wire.QuoteEvidence
) -> Quote:
    return verify.verify_quote(
        device.ak,
        device.creation.qualified_name,
        expected=drawn.expected("quote", device.ak),
        selections=(selection,),
        statement=Statement(evidence.attest, evidence.sig),
        values=evidence.pcrs,
    )


def _policy_findings(settings: Settings, quote: Quote) -> list[Finding]:
    return [
        Finding(
            "pcr_mismatch",
            f"policy: PCR {n} of bank {bank} is not among the allowed values",
            ErrorKind.PERMISSION_DENIED,
        )
        for (bank, n), value in quote.pcrs.items()
        if value not in settings.policy.get((bank, n), {value})
    ]


def _selectors(device: _Device, quotes: list[Quote]) -> list[str]:
    found = [f"pub_hash:{device.ek.hash}", f"ak:hierarchy:{device.creation.hierarchy}"]
    found += [f"ek:method:{method}" for method in device.ek.methods]
    if device.ek.verified is not None:
        model = device.ek.verified.model
        found.append(f"ek:ca:{device.ek.verified.root_fingerprint}")
        for name in ("manufacturer", "model", "version"):
            value = getattr(model, name)
            if value is not None:
                found.append(f"{name}:{value}")
    if device.key is not None:
        found.append("key:tpm")
    for quote in quotes:
        found += [f"pcr:{bank}:{n}:{value.hex()}" for (bank, n), value in quote.pcrs.items()]
    return [*found, "tier:quote"]

"""The challenge of one exchange and what its answer proves."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from spire_hw.errors import AttestationError, ErrorKind, Finding
from spire_hw.posture.evidence import Evidence, Occasion, Scramble, Tier
from spire_hw.tpm import eventlog, imalist, verify
from spire_hw.tpm.credential import make_credential
from spire_hw.tpm.verify import NO_CSR, Statement, qualifier
from spire_hw_plugins.nodeattestor.tpm import replay, wire
from spire_hw_plugins.nodeattestor.tpm.parts import fetch_list
from spire_hw_plugins.nodeattestor.tpm.statements import (
    Claim,
    check_quotes,
    collect,
    counters_of,
    refusal,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from spire_hw.posture.evidence import BootFacts, Counters
    from spire_hw.posture.judge import EvidenceRequest
    from spire_hw.tpm.wire import PcrSelection
    from spire_hw_plugins.nodeattestor.tpm.claims import Claims
    from spire_hw_plugins.nodeattestor.tpm.config import PcrPolicy
    from spire_hw_plugins.nodeattestor.tpm.statements import Quoted
    from spire_hw_plugins.nodeattestor.tpm.talk import Talk

_LIMITS = (
    ("response_bytes", wire.MAX_RESPONSE_BYTES),
    ("log_bytes", eventlog.MAX_BYTES),
    ("ima_bytes", imalist.MAX_BYTES),
    ("ima_entries", imalist.MAX_ENTRIES),
)
# A list that does not go on where it should may be garbage or rewritten: the whole of it tells.
_BROKEN = "ima_replay"


@dataclass(frozen=True, slots=True)
class Asked:
    """What one node has to show.

    Attributes:
        wanted: as the host or this attestor's configuration says.
        selections: what is quoted, one quote per bank.
        policy: this attestor's own allowed values.
        judge_boot: no policy looks at the boot log, so this attestor refuses what each of them would
            unless told otherwise.
    """

    wanted: EvidenceRequest
    selections: tuple[PcrSelection, ...]
    policy: PcrPolicy
    judge_boot: bool = False


@dataclass(frozen=True, slots=True)
class Challenged:
    """A node that was challenged: what was drawn for it, and what its statements are bound to.

    Attributes:
        claims: its keys.
        asked: what it has to show.
        data: its first message.
        secret: what its TPM has to open.
        nonce: 32 bytes.
        csr_sha256: digest of the CSR's key.
    """

    claims: Claims
    asked: Asked
    data: wire.AttestationData
    secret: bytes
    nonce: bytes
    csr_sha256: bytes

    def expected(self, role: str) -> bytes:
        """Return the qualifying data of a statement."""
        name = self.claims.signer.ak.name
        return qualifier(role, self.nonce, self.csr_sha256, self.secret, name)


def draw(
    claims: Claims, asked: Asked, data: wire.AttestationData, expires_ms: int
) -> tuple[Challenged, bytes]:
    """Draw what is random about an exchange and return it with the challenge message."""
    csr_sha256 = NO_CSR
    if claims.csr_spki is not None:
        csr_sha256 = hashlib.sha256(claims.csr_spki).digest()
    drawn = Challenged(
        claims,
        asked,
        data,
        secret=secrets.token_bytes(wire.SECRET_BYTES),
        nonce=secrets.token_bytes(wire.NONCE_BYTES),
        csr_sha256=csr_sha256,
    )
    sealed = make_credential(claims.ek.public, claims.signer.ak.name, drawn.secret)
    wanted = asked.wanted
    start = 0 if wanted.ima is None else wanted.ima.count
    wants = {
        "log": wanted.boot_log,
        "ima": wanted.ima is not None,
        "time": claims.signer.hierarchy != "endorsement",
    }
    message = wire.ChallengeMessage(
        credential=sealed.id_object,
        secret=sealed.encrypted_secret,
        nonce=drawn.nonce,
        quote=asked.selections,
        want=tuple(name for name, is_wanted in wants.items() if is_wanted),
        ima_from=start,
        ima_reset=wanted.reset_count if start else None,
        limits=_LIMITS,
        expires_ms=expires_ms,
        csr=claims.csr_spki is not None,
    )
    return drawn, wire.encode_challenge(message)


def check_secret(given: bytes, drawn: bytes) -> None:
    """Demand that the TPM opened the credential.

    Raises:
        AttestationError: `secret_mismatch`.
    """
    if not hmac.compare_digest(given, drawn):
        raise refusal("secret_mismatch", "challenge: secret does not match")


async def check_answer(
    node: Challenged, response: wire.Response, talk: Talk, now: datetime
) -> Evidence:
    """Return what an answer proves, after its secret was found to be right.

    Statements are checked first, with every fault of theirs collected. Logs are looked at, and the
    rest of a list is asked for, when all of them hold.

    Raises:
        InvalidInputError: a log that does not parse.
        LimitError: a log that is too large.
        AttestationError: something does not hold.
    """
    claims = node.claims
    findings = _find_unasked(node, response)
    collect(findings, partial(_check_certify, node, response))
    quoted = check_quotes(
        claims.signer,
        node.expected("quote"),
        node.asked.selections,
        [Claim(Statement(q.attest, q.sig), q.pcrs) for q in response.quotes],
        findings,
    )
    counted = None
    if quoted is not None:
        counted = collect(findings, partial(_check_counters, node, response, quoted))
    if quoted is None or counted is None or findings:
        raise AttestationError(findings)
    unused = verify.find_unused_banks(quoted.pcrs)
    evidence = Evidence(
        made_at=now,
        occasion=Occasion.ATTESTATION,
        tier=Tier.QUOTE,
        ek=claims.ek.facts,
        ak_public=claims.signer.ak.raw,
        ak_hierarchy=claims.signer.hierarchy,
        ak_qualified_name=claims.signer.qualified_name,
        ak_scramble=counted.scramble,
        key_in_tpm=claims.key is not None,
        counters=counted.counters,
        pcrs=quoted.pcrs,
        boot_id=node.data.boot_id,
        findings=(*unused, *_policy_findings(node.asked.policy, quoted)),
    )
    if unused:  # no log belongs to a bank that firmware left alone
        return evidence
    return await _add_logs(evidence, node, response, talk)


def _find_unasked(node: Challenged, response: wire.Response) -> list[Finding]:
    wanted = node.asked.wanted
    is_odd = (
        (response.time is not None and node.claims.signer.hierarchy == "endorsement")
        or (response.log is not None and not wanted.boot_log)
        or (response.ima is not None and wanted.ima is None)
        or (response.ima is None and (response.ima_from, response.ima_left) != (None, None))
    )
    text = "envelope: evidence that was not asked for"
    return [Finding("evidence_unasked", text)] if is_odd else []


def _check_certify(node: Challenged, response: wire.Response) -> None:
    claims = node.claims
    if claims.key is None:
        if response.certify is not None:
            raise refusal("evidence_unasked", "certify: evidence that was not asked for")
        return
    if response.certify is None:
        raise refusal("evidence_missing", "certify: evidence asked for is missing")
    verify.verify_certify(
        claims.signer.ak,
        claims.signer.qualified_name,
        key=claims.key,
        expected=node.expected("certify"),
        statement=Statement(response.certify.attest, response.certify.sig),
    )


@dataclass(frozen=True, slots=True)
class _Counted:
    """The TPM's true counters and what its key adds to them; None where that stays hidden."""

    counters: Counters | None = None
    scramble: Scramble | None = None


def _check_counters(node: Challenged, response: wire.Response, quoted: Quoted) -> _Counted:
    claims = node.claims
    said = counters_of(quoted.clock, quoted.first.firmware_version)
    if claims.signer.hierarchy == "endorsement":
        return _Counted(said)
    if response.time is None:
        if node.asked.wanted.counters:
            text = "counters: this AK hides the counters"
            raise refusal("counters_hidden", text, ErrorKind.PERMISSION_DENIED)
        return _Counted()
    proved = verify.verify_time(
        claims.signer.ak,
        claims.signer.qualified_name,
        expected=node.expected("time"),
        statement=Statement(response.time.attest, response.time.sig),
        quote=quoted.first,
    )
    true = counters_of(proved.clock, proved.firmware_version)
    return _Counted(true, Scramble.between(said, true))


def _policy_findings(policy: PcrPolicy, quoted: Quoted) -> list[Finding]:
    return [
        Finding(
            "pcr_mismatch",
            f"policy: PCR {n} of bank {bank} is not among the allowed values",
            ErrorKind.PERMISSION_DENIED,
        )
        for (bank, n), value in quoted.pcrs.items()
        if value not in policy.get((bank, n), {value})
    ]


async def _add_logs(
    evidence: Evidence, node: Challenged, response: wire.Response, talk: Talk
) -> Evidence:
    """Return evidence with what boot log and IMA list add to it."""
    wanted, log = node.asked.wanted, node.data.log
    counters = evidence.counters
    proved = replay.Proved(evidence.pcrs, None if counters is None else counters.reset_count)
    logs = replay.Logs()
    if wanted.boot_log:
        size, digest = (None, None) if log is None else (log.size, log.sha256)
        logs = replay.Logs(replay.unpack_log(response.log, size), digest)
    if wanted.ima is not None:
        logs = await fetch_list(logs, response, talk)
    shown = await _replayed(node.asked, logs, proved, talk)
    findings = (*evidence.findings, *shown.findings)
    if node.asked.judge_boot and shown.boot is not None:
        findings += tuple(_boot_findings(shown.boot))
    return replace(evidence, boot=shown.boot, ima=shown.ima, findings=findings)


def _boot_findings(boot: BootFacts) -> Iterator[Finding]:
    """Yield why a log that replays is that of no sound boot, whatever Secure Boot was set to."""
    denied = ErrorKind.PERMISSION_DENIED
    if boot.debug_mode:
        yield Finding("debug_mode", "log: firmware is in debug mode", denied)
    if boot.firmware_error:
        yield Finding("firmware_error", "log: firmware reported an error", denied)


async def _replayed(
    asked: Asked, logs: replay.Logs, proved: replay.Proved, talk: Talk
) -> replay.Replayed:
    try:
        return await replay.replay_logs(asked.wanted, asked.selections, logs, proved)
    except AttestationError as e:
        if not logs.ima_from or [finding.code for finding in e.findings] != [_BROKEN]:
            raise
    whole = await fetch_list(logs, None, talk)
    return await replay.replay_logs(asked.wanted, asked.selections, whole, proved)

"""What an audit log proves: every record is recomputed, every checkpoint and every witness compared.

Anybody who has the files can do this, without the signer and without its device. The log key's
public half, heads that clients have witnessed and checkpoints from another place each make a lie
harder: without any of them a log that was rewritten as a whole looks well.

This module is pure: lines in, findings out.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, VerificationError
from spire_hw.evidence.checkpoint import verify_checkpoint
from spire_hw_signer.audit.chain import FIRST, Chain, ChainError, LogHead
from spire_hw_signer.audit.record import Kind, Record, Result, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from spire_hw.key import PublicKey
    from spire_hw_signer.audit.folder import Line

MAX_FINDINGS: Final = 1000


class Verdict(Enum):
    """What a log comes to; the worst of its findings."""

    HOLDS = "holds"
    SEALED = "sealed"  # it was broken, and an operator went on after looking at it
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a log.

    Attributes:
        code: stable word for machines, such as `edited`.
        message: the same in words.
        file: where, "" for the log as a whole.
        line: where, 0 for the file as a whole.
        verdict: HOLDS for what is fine but worth telling.
    """

    code: str
    message: str
    file: str = ""
    line: int = 0
    verdict: Verdict = Verdict.BROKEN


@dataclass(frozen=True, slots=True)
class Witness:
    """A head that somebody else has seen.

    Attributes:
        head: what was seen.
        source: by whom, in words.
    """

    head: LogHead
    source: str


@dataclass(slots=True)
class Report:
    """What was found.

    Attributes:
        findings: everything but what is as it should be.
        files: how many were read.
        records: how many were read.
        head: the end of the log.
        log_id: what tells it from others.
        kinds: how many records there are of each kind.
        checkpoints: how many have a signature of the log key that was given.
        last_checkpoint: number of the last record that such a checkpoint vouches for.
        unknown: intents whose outcome nobody knows.
        open: intents without outcome at the end.
        witnessed: how many heads of witnesses fit.
        times: wall clock of the first and the last record.
    """

    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    records: int = 0
    head: LogHead = field(default_factory=LogHead)
    log_id: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    checkpoints: int = 0
    last_checkpoint: int = 0
    unknown: int = 0
    open: int = 0
    witnessed: int = 0
    times: tuple[str, str] = ("", "")

    @property
    def verdict(self) -> Verdict:
        """Return the worst of it."""
        found = {finding.verdict for finding in self.findings}
        return next((v for v in (Verdict.BROKEN, Verdict.SEALED) if v in found), Verdict.HOLDS)


class Verifier:
    """Reads one log, file after file, oldest first.

    Args:
        key: the log key; without it signatures are not checked.
        witnesses: heads that others have seen.
        copies: members of checkpoints from another place; their signatures are checked.
    """

    def __init__(
        self,
        key: PublicKey | None = None,
        witnesses: Iterable[Witness] = (),
        copies: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.report = Report()
        self._key = key
        self._chain: Chain | None = None
        self._first = 0
        self._sealed: list[tuple[int, int]] = []
        # The end of what is good, where the file that was read last has a break.
        self._good: Chain | None = None
        self._sealed_chain: Chain | None = None
        self._before: tuple[str, Callable[[], str]] | None = None
        self._counts = dict.fromkeys(Verdict, 0)
        self._seen: dict[int, list[Witness]] = {}
        self._file = ""
        self._line = 0
        for witness in witnesses:
            self._expect(witness)
        for number, body in enumerate(copies, start=1):
            self._expect_copy(body, f"checkpoint {number} of the other place")

    def _expect(self, witness: Witness) -> None:
        self._seen.setdefault(witness.head.seq, []).append(witness)

    def _expect_copy(self, body: Mapping[str, Any], source: str) -> None:
        if self._key is not None:
            try:
                verify_checkpoint(body, self._key)
            except VerificationError as e:
                self._find("copy_signature", f"{source} {e.message}")
                return
        self._expect(Witness(LogHead(body["at"], bytes.fromhex(body["head"])), source))

    def read(
        self, name: str, lines: Iterable[Line], digest: Callable[[], str], *, last: bool
    ) -> None:
        """Read a file.

        Args:
            name: its name.
            lines: what is in it.
            digest: returns its SHA-256 in hexadecimal; only asked when it is needed.
            last: it is the newest.
        """
        self.report.files += 1
        self._file, self._line = name, 0
        self._sealed_chain, self._good = self._good, None
        torn = ""
        first = True
        for number, line in enumerate(lines, start=1):
            if torn:
                self._find("unreadable", torn)
            self._line, torn = number, ""
            try:
                record = _parse(line)
            except EncodingError as e:
                torn = e.message
                self._remember()
            else:
                self._take(record, line.text, first=first)
                first = False
        if torn and last:
            text = "the last record is torn, as a crash leaves it; the next start cuts it off"
            self._find("torn", text, Verdict.HOLDS)
        elif torn:
            self._find("unreadable", torn)
        elif first and last:
            self._find("torn", "the file was begun when the signer ended", Verdict.HOLDS)
        elif first:
            self._find("empty", "the file has no record")
        self._before = (name, digest)

    def _remember(self) -> None:
        """Keep what is good before the first break of a file."""
        if self._good is None and self._chain is not None:
            self._good = deepcopy(self._chain)

    def _take(self, record: Record, line: bytes, *, first: bool) -> None:
        if self._chain is None:
            self._chain = self._begin(record)
        if first and record.kind is Kind.SEAL:
            self._take_seal(record)
        chain = self._chain
        try:
            chain.check(record, first_in_file=first)
        except ChainError as e:
            self._remember()
            self._find(e.code, e.message)
            self._go_on(chain, record)
        chain.take(record, line)
        self._count(record)
        if record.kind is Kind.CHECKPOINT:
            self._check_signature(record)
        for witness in self._seen.pop(record.seq, ()):
            self._compare(witness, chain.head)

    def _begin(self, record: Record) -> Chain:
        self.report.times = (record.time, record.time)
        self._first = record.seq
        if record.kind is Kind.START:
            return Chain()
        if record.kind in FIRST:
            text = f"the log is here from record {record.seq} on; what came before is not"
            self._find("start_missing", text, Verdict.HOLDS)
            return Chain.before(record)
        self._find("start_missing", f"the log does not begin with record {record.seq}")
        return Chain(head=LogHead(record.seq - 1, record.prev), starting=None)

    def _take_seal(self, record: Record) -> None:
        """Take what an operator said to a break, if it was said of this one."""
        body, before = record.body, self._before
        if self._sealed_chain is not None:
            self._chain = self._sealed_chain
        if before is not None and (body["file"], body["digest"]) != (before[0], before[1]()):
            self._find("seal", f"seal {record.seq} is about another file than {before[0]}")
            return
        self._forgive(body["file"])
        self._sealed.append((body["good"], record.seq))
        self._find(
            "sealed",
            f"records {body['good'] + 1} to {record.seq - 1} are not vouched for: {body['fault']};"
            f" sealed by {', '.join(body['operators'])}: {body['comment']}",
            Verdict.SEALED,
        )

    def _forgive(self, file: str) -> None:
        """Let the findings in a file that was sealed count as that."""
        for number, finding in enumerate(self.report.findings):
            if finding.file == file and finding.verdict is Verdict.BROKEN:
                self.report.findings[number] = Finding(
                    finding.code, finding.message, file, finding.line, Verdict.SEALED
                )

    def _go_on(self, chain: Chain, record: Record) -> None:
        """Take a record for right after a finding, so that the next break is seen, too."""
        chain.head = LogHead(record.seq - 1, record.prev)
        chain.recent.clear()
        chain.starting = None
        if record.kind is Kind.OUTCOME:
            chain.open.setdefault(record.body["intent"])
        chain.boot = ""

    def _count(self, record: Record) -> None:
        report, kind = self.report, record.kind.value
        report.records += 1
        report.kinds[kind] = report.kinds.get(kind, 0) + 1
        report.times = (report.times[0], record.time)
        if record.kind is Kind.OUTCOME and record.body["result"] == Result.UNKNOWN.value:
            report.unknown += 1
        if record.kind is Kind.RECOVERY:
            text = f"a torn last record of {record.body['bytes']} bytes was cut off at a start"
            self._find("recovery", text, Verdict.HOLDS)

    def _check_signature(self, record: Record) -> None:
        if self._key is None:
            return
        try:
            verify_checkpoint(record.body, self._key)
        except VerificationError as e:
            self._find("signature", f"checkpoint {record.seq} {e.message}")
            return
        self.report.checkpoints += 1
        self.report.last_checkpoint = record.body["at"]

    def _compare(self, witness: Witness, head: LogHead) -> None:
        if witness.head.hash == head.hash:
            self.report.witnessed += 1
        else:
            self._find("rewritten", f"{witness.source} saw another record {head.seq}")

    @property
    def end(self) -> Chain:
        """Return the log up to its end, or to the first break in the file that was read last."""
        return self._good or self._chain or Chain()

    def finish(self) -> Report:
        """Return what was found, once all files are read."""
        self._file, self._line = "", 0
        report, chain = self.report, self._chain
        if chain is None:
            self._find("empty", "there is no record")
            chain = Chain()
        report.head, report.log_id, report.open = chain.head, chain.log_id, len(chain.open)
        for seq, witnesses in sorted(self._seen.items()):
            for witness in witnesses:
                self._missing(witness, seq, chain.head.seq)
        if self._key is not None and not report.checkpoints and report.records:
            self._find("no_checkpoint", "no checkpoint of the log key vouches for these records")
        return report

    def _missing(self, witness: Witness, seq: int, end: int) -> None:
        if seq == 0:
            return
        if any(good < seq < seal for good, seal in self._sealed):
            text = f"{witness.source} saw record {seq}, which was sealed off"
            self._find("sealed", text, Verdict.SEALED)
        elif seq > end:
            self._find(
                "truncated",
                f"{witness.source} saw record {seq}, the log ends at {end}: it was cut off, or an"
                " older one was put back",
            )
        elif seq < self._first:
            text = f"{witness.source} saw record {seq}, which is not here"
            self._find("not_here", text, Verdict.HOLDS)
        else:
            self._find("gap", f"{witness.source} saw record {seq}, which is missing")

    def _find(self, code: str, message: str, verdict: Verdict = Verdict.BROKEN) -> None:
        self._counts[verdict] += 1
        if self._counts[verdict] <= MAX_FINDINGS:
            self.report.findings.append(Finding(code, message, self._file, self._line, verdict))


def _parse(line: Line) -> Record:
    if not line.whole:
        raise EncodingError("audit record", "is not whole")
    return parse(line.text)

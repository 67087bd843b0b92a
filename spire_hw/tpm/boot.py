"""What a boot log proves about a machine, once it replays to quoted PCR values.

A fact comes from quoted PCRs that the log explains and from event data that its digest covers, or
it is left out. Whoever has root on a running system can add measurements to any PCR, never take
one back: lists are complete, but their tail may be anybody's.

Spec: PC Client Platform Firmware Profile, 3.3.4 and 10; UEFI, GRUB, shim and systemd-stub for the
PCRs from 8 on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import AttestationError, Finding
from spire_hw.posture import phases
from spire_hw.posture.evidence import BootFacts, BootImage
from spire_hw.tpm import eventlog, secureboot, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from spire_hw.posture.evidence import PcrValues
    from spire_hw.tpm.eventlog import Log
    from spire_hw.tpm.secureboot import Measured

EV_SEPARATOR: Final = 0x00000004
EV_EVENT_TAG: Final = 0x00000006
EV_S_CRTM_CONTENTS: Final = 0x00000007
EV_S_CRTM_VERSION: Final = 0x00000008
EV_IPL: Final = 0x0000000D
EV_OMIT_BOOT_DEVICE: Final = 0x00000012
EV_EFI_ACTION: Final = 0x80000007

INVOCATION: Final = b"Exit Boot Services Invocation"
SUCCESS: Final = b"Exit Boot Services Returned with Success"
FAILURE: Final = b"Exit Boot Services Returned with Failure"
# What firmware that forgets to log these measurements has made, by what is missing from its log.
_COMPLETIONS: Final = (
    (INVOCATION, SUCCESS),
    (INVOCATION, FAILURE),
    (INVOCATION, FAILURE, SUCCESS),
    (SUCCESS,),
    (FAILURE,),
    (FAILURE, SUCCESS),
)
WORKAROUND_EXIT: Final = "exit_boot_services"

_SEPARATORS: Final = (bytes(4), b"\xff" * 4)
_ERROR_SEPARATOR: Final = (1).to_bytes(4, "little")
_FIRMWARE_PCRS: Final = range(8)
_HANDOVER_PCRS: Final = frozenset({4, 5})
_IMAGE_PCRS: Final = (2, 4)
_COMMAND_PCRS: Final = (8, 12)
_SECURE_BOOT, _FILES, _UKI, _MOK, _CONFIG = 7, 9, 11, 14, 5
_COMMAND_PREFIXES: Final = tuple(
    f"{kind}{end}".encode()
    for kind in ("grub_cmd", "kernel_cmdline", "grub_kernel_cmdline", "module_cmdline")
    for end in (": ", " ")
)
_NO_COMMANDS: Final = frozenset({EV_SEPARATOR, eventlog.EV_NO_ACTION})
_TAG_HEAD_BYTES: Final = 8
_MAX_ACTION: Final = 128


@dataclass(frozen=True, slots=True)
class BootRules:
    """Where a policy may tolerate what is refused by default.

    Attributes:
        empty_secure_boot: the SecureBoot variable may be empty, which reads as off.
        early_authority: an image may have been authorised before PCR 7's separator (option ROMs).
    """

    empty_secure_boot: bool = False
    early_authority: bool = False


STRICT: Final = BootRules()


def facts(log: Log, pcrs: PcrValues, bank: str, rules: BootRules = STRICT) -> BootFacts:
    """Replay a log and return what the quoted PCRs vouch for.

    Every quoted PCR of 0 to 7 must come out as quoted; others are explained or not.

    Args:
        log: from `eventlog.parse`.
        pcrs: verified values; other banks than `bank` are not looked at.
        bank: which digests to use.
        rules: what to tolerate.

    Raises:
        AttestationError: codes `log_replay`, `log_event_digest`, `log_type`, `log_order`,
            `secureboot_ambiguous`.
        InvalidInputError: the bank is not in the log, or an event does not parse.
    """
    boot = _Boot(log, bank)
    quoted = {pcr: value for (name, pcr), value in pcrs.items() if name == bank}
    explained, workarounds = boot.explain(quoted)
    boot.check_separators()
    boot.check_handover()
    secure = None
    if _SECURE_BOOT in explained:
        secure = secureboot.read(
            boot.events[_SECURE_BOOT],
            bank,
            empty_secure_boot=rules.empty_secure_boot,
            early_authority=rules.early_authority,
        )
    state = secure or secureboot.SecureBoot()
    return BootFacts(
        log_sha256=log.sha256,
        bank=bank,
        explained=tuple(sorted(explained)),
        secure_boot=None if secure is None else secure.on,
        debug_mode=state.debug_mode,
        dma_protection=state.dma_protection,
        firmware_error=boot.has_error(explained),
        variables=state.variables,
        db=state.db,
        dbx=state.dbx,
        sbat=state.sbat,
        authorities=state.authorities,
        images=tuple(boot.images(explained)),
        commands=tuple(boot.commands(explained)),
        files=tuple(boot.files(explained)),
        uki=boot.uki(quoted),
        mok=any(quoted[_MOK]) if _MOK in quoted else None,
        mok_digests=tuple(boot.digests(_MOK)) if _MOK in explained else (),
        crtm_version=boot.crtm_version() if 0 in explained else "",
        workarounds=workarounds,
    )


class _Boot:
    """One bank of one log, by PCR."""

    def __init__(self, log: Log, bank: str) -> None:
        index = log.bank_index(bank)
        self._bank = bank
        self._size = wire.HASHES[wire.BANKS[bank]][1]
        self._locality = log.locality
        self._new: Callable[[bytes], hashlib._Hash] = getattr(hashlib, bank)
        self._separators = frozenset(map(self._hash, (*_SEPARATORS, _ERROR_SEPARATOR)))
        self.events: list[list[Measured]] = [[] for _ in range(wire.PCR_COUNT)]
        for number, (pcr, kind, digests, data) in enumerate(log.events, 1):
            if pcr < wire.PCR_COUNT:
                self.events[pcr].append((number, kind, digests[index], data))

    def explain(self, quoted: Mapping[int, bytes]) -> tuple[set[int], tuple[str, ...]]:
        """Return the quoted PCRs that the log reproduces, and what had to be made up for."""
        explained: set[int] = set()
        findings, workarounds = [], []
        for pcr, value in sorted(quoted.items()):
            replayed = self._replay(pcr)
            if replayed == value:
                explained.add(pcr)
            elif pcr == _CONFIG and self._is_completed(replayed, value):
                explained.add(pcr)
                workarounds.append(WORKAROUND_EXIT)
            elif pcr in _FIRMWARE_PCRS:
                findings.append(Finding("log_replay", f"log: PCR {pcr} does not replay"))
        if findings:
            raise AttestationError(findings)
        return explained, tuple(workarounds)

    def check_separators(self) -> None:
        """Demand one separator per firmware PCR, and their digests under no other type."""
        for pcr, events in enumerate(self.events):
            count = 0
            for number, kind, digest, data in events:
                if kind == EV_SEPARATOR and pcr not in _FIRMWARE_PCRS:
                    continue
                if kind == EV_SEPARATOR:
                    count += 1
                    if digest not in self._separators or self._hash(data) != digest:
                        text = f"event {number} does not match its digest"
                        raise _refusal("log_event_digest", text)
                elif digest in self._separators and not self._is_empty_crtm(pcr, kind):
                    text = f"event {number} has a separator's digest under another type"
                    raise _refusal("log_order", text)
            if pcr in _FIRMWARE_PCRS and count != 1:
                amount = "more than one" if count else "no"
                raise _refusal("log_order", f"PCR {pcr} has {amount} separator")

    def _is_empty_crtm(self, pcr: int, kind: int) -> bool:
        """Tell whether this may be a part of firmware's root of trust that is all zero.

        Verified boot of some machines has one. What comes behind it is then not told from what
        comes behind the separator.
        """
        return pcr == 0 and kind == EV_S_CRTM_CONTENTS

    def check_handover(self) -> None:
        """Refuse boot measurements after firmware has handed over.

        The hand-over is told by its digest: the type and the text of an event are claims.
        """
        exits = {self._hash(text) for text in (INVOCATION, SUCCESS, FAILURE)}
        invocation = self._hash(INVOCATION)
        config = self.events[_CONFIG]
        first = next((number for number, _, digest, _ in config if digest == invocation), None)
        if first is None:
            return
        for pcr in _HANDOVER_PCRS:
            for number, kind, digest, _ in self.events[pcr]:
                is_exit = pcr == _CONFIG and digest in exits
                if number > first and kind != eventlog.EV_NO_ACTION and not is_exit:
                    raise _refusal("log_order", "image measured after hand-over")

    def has_error(self, explained: Iterable[int]) -> bool:
        """Tell whether firmware closed one of its PCRs with the error separator."""
        error = self._hash(_ERROR_SEPARATOR)
        return any(
            digest == error
            for pcr in explained
            if pcr in _FIRMWARE_PCRS
            for _, _, digest, _ in self.events[pcr]
        )

    def images(self, explained: Iterable[int]) -> Iterable[BootImage]:
        """Yield what was started: everything that is not proved to be something else."""
        for pcr in _IMAGE_PCRS:
            if pcr in explained:
                for event in self.events[pcr]:
                    if not self._is_note(event):
                        yield BootImage(pcr, event[2])

    def commands(self, explained: Iterable[int]) -> Iterable[str]:
        """Yield what boot loaders were told to do and to tell the kernel."""
        for pcr in _COMMAND_PCRS:
            if pcr in explained:
                for event in self.events[pcr]:
                    if event[1] not in _NO_COMMANDS:
                        yield self._command(event)

    def files(self, explained: Iterable[int]) -> Iterable[bytes]:
        """Yield digests of what boot loaders loaded."""
        return self.digests(_FILES) if _FILES in explained else ()

    def digests(self, pcr: int) -> Iterable[bytes]:
        """Yield the digests of a PCR without separators."""
        return (d for _, kind, d, _ in self._extended(pcr) if kind != EV_SEPARATOR)

    def uki(self, quoted: Mapping[int, bytes]) -> str | None:
        """Return PCR 11 as the stub left it, when boot phases alone lead from there to now."""
        kinds = {kind for _, kind, _, _ in self._extended(_UKI)}
        if _UKI not in quoted or kinds != {EV_IPL}:
            return None
        left = self._replay(_UKI)
        return None if phases.passed(left, quoted[_UKI], self._bank) is None else left.hex()

    def crtm_version(self) -> str:
        """Return what firmware says its version is, of what it measured before the separator."""
        for _, kind, digest, data in self.events[0]:
            if digest in self._separators:
                break
            if kind == EV_S_CRTM_VERSION and self._hash(data) == digest:
                text = _text(data)
                plain = text.isascii() and text.isprintable()
                return text if plain else f"hex:{data.hex()}"
        return ""

    def _extended(self, pcr: int) -> Sequence[Measured]:
        return [event for event in self.events[pcr] if event[1] != eventlog.EV_NO_ACTION]

    def _replay(self, pcr: int) -> bytes:
        new = self._new
        value = eventlog.initial(pcr, self._size, self._locality)
        for _, kind, digest, _ in self.events[pcr]:
            if kind != eventlog.EV_NO_ACTION:
                value = new(value + digest).digest()
        return value

    def _is_completed(self, replayed: bytes, quoted: bytes) -> bool:
        """Tell whether only the hand-over is missing from the log."""
        exits = {self._hash(text) for text in (SUCCESS, FAILURE)}
        events = self._extended(_CONFIG)
        last = events[-1][2] if events else b""
        if last in exits:
            return False
        begun = last == self._hash(INVOCATION)
        for texts in _COMPLETIONS:
            if (texts[0] != INVOCATION) == begun:
                value = replayed
                for text in texts:
                    value = self._hash(value + self._hash(text))
                if value == quoted:
                    return True
        return False

    def _is_note(self, event: Measured) -> bool:
        """Tell whether an event is proved to be no image: firmware's remark, or no measurement.

        The text is short and plain: an image's own bytes are a text with the right digest, too.
        """
        _, kind, digest, data = event
        if kind in {EV_SEPARATOR, eventlog.EV_NO_ACTION}:
            return True
        if kind not in {EV_EFI_ACTION, EV_OMIT_BOOT_DEVICE} or len(data) > _MAX_ACTION:
            return False
        plain = data.isascii() and data.decode("ascii").isprintable()
        return plain and self._hash(data) == digest

    def _command(self, event: Measured) -> str:
        _, kind, digest, data = event
        content = data[_TAG_HEAD_BYTES:] if kind == EV_EVENT_TAG else data
        for prefix in _COMMAND_PREFIXES:
            if content.startswith(prefix):
                content = content[len(prefix) :]
                break
        # GRUB mostly leaves the end of the string out, some releases and systemd do not.
        covered = content.removesuffix(b"\x00")
        if self._new(covered).digest() == digest:
            return _text(covered)
        for covered in (content, data):
            if self._hash(covered) == digest:
                return _text(covered)
        return f"digest:{digest.hex()}"

    def _hash(self, data: bytes) -> bytes:
        return self._new(data).digest()


def _text(data: bytes) -> str:
    """Return text that is UTF-16 when it holds zero bytes before its end, else UTF-8."""
    try:
        if b"\x00" not in data:
            return data.decode("utf-8")
        wide = b"\x00" in data.rstrip(b"\x00")
        text = data.decode("utf-16-le" if wide else "utf-8").rstrip("\x00")
    except UnicodeDecodeError:
        return f"hex:{data.hex()}"
    return f"hex:{data.hex()}" if "\x00" in text else text


def _refusal(code: str, text: str) -> AttestationError:
    return AttestationError([Finding(code, f"log: {text}")])

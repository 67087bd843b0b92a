"""One signer: calls to it, its audit log under our eyes, and whether it holds our keys."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from google.protobuf.message import Message

from spire_hw.errors import (
    EncodingError,
    ErrorKind,
    NotReadyError,
    SpireHwError,
    UnavailableError,
    VerificationError,
)
from spire_hw.evidence import document as evidence
from spire_hw.evidence.checkpoint import read_checkpoint
from spire_hw.key import fingerprint, parse_spki
from spire_hw.telemetry.metrics import count_fault
from spire_hw_plugins.keymanager.remote import wire
from spire_hw_plugins.keymanager.remote.state import LogNote
from spire_hw_plugins.keymanager.remote.witness import LogHead, Witness

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spire_hw.clock import Clock
    from spire_hw.key import KeyType
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_plugins.keymanager.remote.door import Door
    from spire_hw_plugins.keymanager.remote.wire import Item, Refused

M = TypeVar("M", bound=Message)

_TOLD_EVERY: Final = 1000  # records between two lines in our log
_TOLD_EVERY_S: Final = 60.0


class Link:
    """One signer.

    Attributes:
        name: its address or socket, for people.
        note: what is known of its log.
        trouble: why it is not used, None when it can be.
    """

    def __init__(
        self,
        door: Door,
        note: LogNote,
        *,
        require_witness: bool,
        clock: Clock,
        metrics: Metrics,
        log: Logger,
    ) -> None:
        self.name = door.name
        self.trouble: SpireHwError | None = UnavailableError(
            f"signer {door.name} was not asked yet"
        )
        self._door = door
        self._require_witness = require_witness
        self._log = log.bind(signer=door.name)
        self._witness = Witness(note.head)
        self._log_key = note.log_key
        self._fault = note.fault
        self._clock = clock
        self._metrics = metrics
        self._told_seq = self._witness.floor
        self._told_at = float("-inf")

    @property
    def note(self) -> LogNote:
        """Return what is known of its log."""
        return LogNote(self._witness.head, self._log_key, self._fault)

    @property
    def fault(self) -> str:
        """Return what speaks against its log, "" when nothing does."""
        return self._fault

    @property
    def log_key(self) -> str:
        """Return the fingerprint of the key that signs its checkpoints, "" when it is unknown."""
        return fingerprint(self._log_key) if self._log_key else ""

    async def list_keys(self, timeout_s: float) -> list[KeyInfo]:
        """Return the keys it holds for us, in its order.

        Raises:
            SpireHwError: as `Door.call`, INTERNAL when the answer is not one, FAILED_PRECONDITION
                when its log has gone back and that matters.
        """
        answer = await self._call(
            wire.GET_PUBLIC_KEYS, wire.list_request(), wire.PublicKeysResponse, timeout_s
        )
        with _reading(self.name):
            return wire.listed_keys(answer)

    async def generate(
        self, request_id: bytes, key_id: str, key_type: KeyType, timeout_s: float
    ) -> KeyInfo | Refused:
        """Have a key made; the same request id is answered with the same key.

        Raises:
            SpireHwError: as `list_keys`.
        """
        request = wire.generate_request(request_id, key_id, key_type)
        answer = await self._call(wire.GENERATE_KEY, request, wire.GenerateResponse, timeout_s)
        if answer.HasField("refusal"):
            return wire.refused(answer.refusal)
        with _reading(self.name):
            made = wire.key_info(answer.public_key)
            if made.key_id != key_id or made.key_type is not key_type:
                raise EncodingError("answer", "holds another key than was asked for")
            return made

    async def sign(self, items: Sequence[Item], timeout_s: float) -> list[KeySignature | Refused]:
        """Have things signed; each is answered for itself.

        Raises:
            SpireHwError: as `list_keys`, for all of them.
        """
        request = wire.sign_request(items)
        answer = await self._call(wire.SIGN, request, wire.SignResponse, timeout_s)
        with _reading(self.name):
            return wire.signed(answer, len(items))

    async def custody(self, info: KeyInfo, timeout_s: float) -> KeyEvidence:
        """Return where it says that a key is.

        Raises:
            SpireHwError: as `list_keys`, INTERNAL also when it says so of another key.
        """
        request = wire.custody_request(info.key_id)
        answer = await self._call(wire.GET_KEY_CUSTODY, request, wire.KeyCustodyResponse, timeout_s)
        with _reading(self.name):
            if answer.fingerprint != info.fingerprint:
                raise EncodingError("custody", "is told of another key than is on note")
            return wire.stated_custody(answer)

    async def attest(self, info: KeyInfo, nonce: bytes, trust_domain: str, timeout_s: float) -> str:
        """Return evidence about a key, signed by the key that signs its log.

        Raises:
            SpireHwError: as `list_keys`, INTERNAL also when the evidence is about something else.
        """
        request = wire.attest_request(info.key_id, nonce)
        answer = await self._call(wire.ATTEST_OWN_KEY, request, wire.AttestResponse, timeout_s)
        with _reading(self.name):
            try:
                document, _ = evidence.parse(answer.evidence)
            except (EncodingError, VerificationError) as e:
                raise EncodingError("evidence", f"does not hold: {e.message}") from e
            about = (document.key.fingerprint, document.nonce, document.trust_domain)
            if about != (info.fingerprint, nonce, trust_domain):
                raise EncodingError("evidence", "is about something else than was asked for")
            if not self._log_key or document.signer.spki != self._log_key:
                raise EncodingError("evidence", "is not signed by the key that signs its log")
        return answer.evidence

    async def look_at_log(self, timeout_s: float) -> None:
        """Ask for the head of its log, and whether the key that signed it before vouches for it.

        Raises:
            SpireHwError: as `list_keys`.
        """
        answer = await self._call(
            wire.GET_LOG_HEAD, wire.head_request(), wire.LogHeadResponse, timeout_s
        )
        if (against := self._judge_log_key(answer.log_key)) or (
            self._log_key and (against := self._judge_checkpoint(answer))
        ):
            self._suspect(against)

    def _judge_log_key(self, log_key: bytes) -> str:
        """Tell what speaks against the key that signs its checkpoints; the first one is believed."""
        if self._log_key and log_key != self._log_key:
            return "another key signs it than before" if log_key else "no key signs it any more"
        self._log_key = log_key
        return ""

    def _judge_checkpoint(self, answer: wire.LogHeadResponse) -> str:
        """Tell what speaks against its last checkpoint; before the first there is none."""
        vouched = None
        if answer.checkpoint:
            try:
                read = read_checkpoint(answer.checkpoint, parse_spki(self._log_key))
            except SpireHwError as e:
                return f"its last checkpoint does not hold: {wire.clean(e.message)}"
            vouched = LogHead(read.at, read.head)
        return self._witness.saw_checkpoint(vouched, wire.head_of(answer.log_head))

    async def close(self) -> None:
        """End all connections."""
        await self._door.close()

    async def _call(
        self, path: str, request: Message, response_type: type[M], timeout_s: float
    ) -> M:
        if self._fault and self._require_witness:
            raise self._rewound()
        floor = self._witness.floor
        answer = await self._door.call(path, request, response_type, timeout_s)
        head = wire.head_of(answer.log_head)  # type: ignore[attr-defined]  # every answer has it
        if against := self._witness.saw(head, floor):
            self._suspect(against)
        elif head.seq - self._told_seq >= _TOLD_EVERY or self._is_silent_for(_TOLD_EVERY_S):
            self._told_seq = head.seq
            self._log.info("signer audit log witnessed", seq=head.seq, head=head.hash.hex())
        return answer

    def _suspect(self, against: str) -> None:
        count_fault(self._metrics, "signer.log_rewound")
        if not self._fault or self._is_silent_for(_TOLD_EVERY_S):
            self._log.error("signer audit log rewound", alarm="signer.log_rewound", fault=against)
        self._fault = self._fault or against
        if self._require_witness:
            raise self._rewound()

    def _rewound(self) -> NotReadyError:
        return NotReadyError(
            f"signer audit log rewound: {self._fault}, at {self.name}; verify the log there, compare "
            "it with the heads in this server's log, then name the signer in accept_log for one start"
        )

    def _is_silent_for(self, seconds: float) -> bool:
        """Tell whether nothing was said about the log for a while; then something will be."""
        now = self._clock.monotonic()
        if now - self._told_at < seconds:
            return False
        self._told_at = now
        return True


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say of which signer an answer is that cannot be used."""
    try:
        yield
    except EncodingError as e:
        raise SpireHwError(f"signer {name}: {e.message}", kind=ErrorKind.INTERNAL) from e

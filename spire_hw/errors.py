"""The one error tree of the project.

Every error carries an `ErrorKind`, which has exactly one gRPC meaning (translated in
`spire_hw.rpc.status`). A message names the cause and, where there is one, the remedy; it never
holds a secret, PIN, token or key byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ErrorKind(Enum):
    """What went wrong, as the caller sees it; the value is the gRPC status number."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class DeniedReason(Enum):
    """Wire detail of a refusal (`spire.api.types.PermissionDeniedDetails.Reason`)."""

    AGENT_EXPIRED = 1
    AGENT_NOT_ATTESTED = 2
    AGENT_NOT_ACTIVE = 3
    AGENT_BANNED = 4
    AGENT_MUST_REATTEST = 5


class SpireHwError(Exception):
    """Root of all errors raised on purpose.

    Attributes:
        kind: what the caller is told.
        message: cause and remedy in words.
    """

    kind: ErrorKind = ErrorKind.INTERNAL

    def __init__(self, message: str, *, kind: ErrorKind | None = None) -> None:
        super().__init__(message)
        self.message = message
        if kind is not None:
            self.kind = kind


class InvalidInputError(SpireHwError, ValueError):
    """Something handed to us does not parse or breaks a rule."""

    kind = ErrorKind.INVALID_ARGUMENT


class SpiffeIdError(InvalidInputError):
    """Not a SPIFFE ID or trust domain name."""


class WeakKeyError(InvalidInputError):
    """A key whose private half can be computed from the public one."""


class EncodingError(InvalidInputError):
    """Bytes that do not decode.

    Attributes:
        what: the structure that was read.
        offset: byte offset of the fault, where it is known.
    """

    def __init__(self, what: str, reason: str, offset: int | None = None) -> None:
        place = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{what}{place}: {reason}")
        self.what = what
        self.offset = offset


@dataclass(frozen=True, slots=True)
class ConfigFault:
    """One fault of a configuration file; `line` is 1-based, 0 when unknown."""

    line: int
    message: str


class ConfigError(InvalidInputError):
    """A configuration that cannot be used; holds every fault that was found."""

    def __init__(self, file: str, faults: list[ConfigFault]) -> None:
        lines = [
            f"{file}:{f.line}: {f.message}" if f.line else f"{file}: {f.message}" for f in faults
        ]
        super().__init__("\n".join(lines))
        self.file = file
        self.faults = faults


class VerificationError(SpireHwError):
    """A signature, chain or claim that does not hold."""

    kind = ErrorKind.INVALID_ARGUMENT


class SvidError(VerificationError):
    """An X509-SVID or JWT-SVID that is not acceptable."""


class ChainError(VerificationError):
    """No path from a certificate to a trusted root."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing an attestation failed on.

    Attributes:
        code: stable reason code, such as `nonce_mismatch`.
        message: the same in words, with the stage it belongs to in front.
        kind: what the caller is told when this is the first finding.
    """

    code: str
    message: str
    kind: ErrorKind = ErrorKind.INVALID_ARGUMENT


class AttestationError(VerificationError):
    """Evidence of a node that does not hold; the first finding is the one reported.

    Attributes:
        findings: what does not hold.
        claimed: which machine the node says it is, such as `ek_hash`, for the operator's records.
    """

    def __init__(self, findings: list[Finding], *, kind: ErrorKind | None = None) -> None:
        first = findings[0]
        super().__init__(f"{first.message} [{first.code}]", kind=kind or first.kind)
        self.findings = findings
        self.claimed: dict[str, str] = {}


class NotFoundError(SpireHwError):
    """The thing asked for does not exist."""

    kind = ErrorKind.NOT_FOUND


class AlreadyExistsError(SpireHwError):
    """The thing to be created exists."""

    kind = ErrorKind.ALREADY_EXISTS


class DeniedError(SpireHwError):
    """The caller may not do this.

    Attributes:
        reason: detail for the wire, when upstream's agent acts on it.
    """

    kind = ErrorKind.PERMISSION_DENIED

    def __init__(self, message: str, reason: DeniedReason | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class NotReadyError(SpireHwError):
    """Not configured, or no active authority yet."""

    kind = ErrorKind.FAILED_PRECONDITION


class LimitError(SpireHwError):
    """A bound was reached."""

    kind = ErrorKind.RESOURCE_EXHAUSTED


class UnavailableError(SpireHwError):
    """A peer or device is away; the caller may retry."""

    kind = ErrorKind.UNAVAILABLE


class DeviceError(SpireHwError):
    """A TPM or token refused an operation.

    Attributes:
        device: which one, in the operator's words.
        operation: what was asked of it.
        code: native return code, 0 when there is none.
        retryable: whether the same call may succeed later.
    """

    kind = ErrorKind.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        device: str,
        operation: str,
        code: int = 0,
        retryable: bool = False,
        kind: ErrorKind | None = None,
    ) -> None:
        super().__init__(message, kind=kind)
        self.device = device
        self.operation = operation
        self.code = code
        self.retryable = retryable


class PluginError(SpireHwError):
    """An error of a plugin, with `<kind>(<name>): ` in front exactly once."""

    def __init__(self, prefix: str, cause: SpireHwError) -> None:
        text = cause.message
        head = f"{prefix}: "
        super().__init__(text if text.startswith(head) else head + text, kind=cause.kind)
        self.prefix = prefix

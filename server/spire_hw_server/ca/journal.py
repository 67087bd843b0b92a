"""The authorities of this server across restarts: records, and their bytes in the store.

The bytes are upstream's protobuf message, so a server that takes over upstream's database finds
its authorities. What the records mean is decided by `ca.slots` and `ca.restore`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from google.protobuf.message import DecodeError

from spire_hw._pb import server_journal_pb2 as pb
from spire_hw.errors import EncodingError
from spire_hw_server.ca.slots import Record, SlotName, Slots, Status

MAX_RECORDS = 10


@dataclass(frozen=True, slots=True)
class X509Record:
    """One X.509 authority.

    Attributes:
        authority_id: lower-case hex subject key id of the certificate.
        certificate: DER.
        upstream_chain: DER certificates from this one up to, not including, the root; empty for a
            self-signed authority.
        upstream_authority_id: subject key id of the upstream root, "" for a self-signed one.
        offline: it was signed by hand, under a root that no UpstreamAuthority reaches.
    """

    slot: SlotName
    authority_id: str
    issued_at: datetime
    not_after: datetime
    status: Status
    certificate: bytes
    upstream_chain: tuple[bytes, ...] = ()
    upstream_authority_id: str = ""
    offline: bool = False

    def with_status(self, status: Status) -> X509Record:
        """Return the same authority with another status."""
        return replace(self, status=status)


@dataclass(frozen=True, slots=True)
class JwtRecord:
    """One JWT signing key.

    Attributes:
        authority_id: the key id in tokens (`kid`).
        public_key: DER SubjectPublicKeyInfo.
    """

    slot: SlotName
    authority_id: str
    issued_at: datetime
    not_after: datetime
    status: Status
    public_key: bytes

    def with_status(self, status: Status) -> JwtRecord:
        """Return the same authority with another status."""
        return replace(self, status=status)


@dataclass(frozen=True, slots=True)
class Journal:
    """All records, in the order they were made."""

    x509: tuple[X509Record, ...] = ()
    jwt: tuple[JwtRecord, ...] = ()

    def updated(self, x509: Slots[X509Record], jwt: Slots[JwtRecord] | None) -> Journal:
        """Return the journal after the slots changed; the oldest records fall off the end.

        Args:
            x509: the X.509 authorities.
            jwt: the JWT keys; None leaves their records as they are.
        """
        return Journal(
            _updated(self.x509, x509), self.jwt if jwt is None else _updated(self.jwt, jwt)
        )

    def latest_end(self) -> datetime | None:
        """Return when the last authority of the journal ends, None for an empty one."""
        ends = [r.not_after for r in self.x509] + [r.not_after for r in self.jwt]
        return max(ends, default=None)


R = TypeVar("R", bound=Record)


def _updated(records: tuple[R, ...], slots: Slots[R]) -> tuple[R, ...]:
    held = {r.authority_id: r for r in slots.records()}
    kept: list[R] = []
    for record in records:
        now = held.pop(record.authority_id, None)
        if now is not None:
            kept.append(now)
        else:
            kept.append(record.with_status(Status.OLD))
    kept.extend(held.values())
    return tuple(kept[-MAX_RECORDS:])


def encode_journal(journal: Journal) -> bytes:
    """Return the bytes for the store."""
    message = pb.Entries(
        x509CAs=[
            pb.X509CAEntry(
                slot_id=r.slot.value,
                issued_at=int(r.issued_at.timestamp()),
                certificate=r.certificate,
                upstream_chain=r.upstream_chain,
                status=pb.Status.Name(r.status.value),
                authority_id=r.authority_id,
                not_after=int(r.not_after.timestamp()),
                upstream_authority_id=r.upstream_authority_id,
                offline=r.offline,
            )
            for r in journal.x509
        ],
        jwtKeys=[
            pb.JWTKeyEntry(
                slot_id=r.slot.value,
                issued_at=int(r.issued_at.timestamp()),
                not_after=int(r.not_after.timestamp()),
                kid=r.authority_id,
                public_key=r.public_key,
                status=pb.Status.Name(r.status.value),
                authority_id=r.authority_id,
            )
            for r in journal.jwt
        ],
    )
    return message.SerializeToString()


def parse_journal(data: bytes) -> Journal:
    """Read the bytes of the store.

    Raises:
        EncodingError: they are no journal.
    """
    try:
        message = pb.Entries.FromString(data)
    except DecodeError as e:
        raise EncodingError("CA journal", "does not decode") from e
    return Journal(
        x509=tuple(
            X509Record(
                slot=_slot(e.slot_id),
                authority_id=e.authority_id,
                issued_at=_time(e.issued_at),
                not_after=_time(e.not_after),
                status=_status(e.status),
                certificate=e.certificate,
                upstream_chain=tuple(e.upstream_chain),
                upstream_authority_id=e.upstream_authority_id,
                offline=e.offline,
            )
            for e in message.x509CAs
        ),
        jwt=tuple(
            JwtRecord(
                slot=_slot(e.slot_id),
                authority_id=e.authority_id or e.kid,
                issued_at=_time(e.issued_at),
                not_after=_time(e.not_after),
                status=_status(e.status),
                public_key=e.public_key,
            )
            for e in message.jwtKeys
        ),
    )


def _slot(slot_id: str) -> SlotName:
    try:
        return SlotName(slot_id)
    except ValueError as e:
        raise EncodingError("CA journal", f"slot {slot_id!r} is unknown") from e


def _status(number: int) -> Status:
    # Upstream wrote no status before 1.10: such an authority does not sign again, but stays known.
    return Status.OLD if number not in {s.value for s in Status} else Status(number)


def _time(seconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError) as e:
        raise EncodingError("CA journal", f"time {seconds} is out of range") from e

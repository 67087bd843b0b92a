"""What clients are told about where their keys are: custody as the device reports it, and evidence.

It is the signer's word; evidence is under the signature of its log key. Each question is one to the
device, so a client may ask for little at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from spire_hw._pb import hw_signer_pb2 as pb
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.evidence.document import MAX_NONCE_BYTES, MIN_NONCE_BYTES
from spire_hw.plugin.keymanager import Keys
from spire_hw.rpc.service import Method, bind
from spire_hw_signer.admission import Caller, Gate, error_of
from spire_hw_signer.attesting import NAME
from spire_hw_signer.policy import FOREIGN_KEY, Denial, Rate, Reason, is_key_id
from spire_hw_signer.rates import Buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import KeyEvidence
    from spire_hw.rpc.service import Call
    from spire_hw_signer.attesting import Attesting
    from spire_hw_signer.audit.log import AuditLog
    from spire_hw_signer.keys import HeldKey, OwnerKeys
    from spire_hw_signer.policy import Owner

_CUSTODY_RATE: Final = Rate(2, 32)
_ATTEST_RATE: Final = Rate(0.5, 8)
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["Custody"]


class CustodyService:
    """`spire_hw.signer.v1.Custody`.

    Args:
        gate: lets callers in.
        owners: the keys of each owner as they are now.
        attesting: makes evidence.
        audit: its head goes with every answer.
        clock: for rates.
        log: where failures of devices are told in full.
    """

    def __init__(
        self,
        gate: Gate,
        owners: Callable[[], Mapping[Owner, OwnerKeys]],
        attesting: Attesting,
        audit: AuditLog,
        *,
        clock: Clock,
        log: Logger,
    ) -> None:
        self._gate = gate
        self._owners = owners
        self._attesting = attesting
        self._audit = audit
        self._clock = clock
        self._log = log
        self._buckets = Buckets()

    async def get_key_custody(self, request: Any, call: Call) -> Any:
        """Tell where one of the caller's keys is."""
        caller = self._gate.caller(call)
        keys, held = self._find(caller, "GetKeyCustody", request.key_id, _CUSTODY_RATE)
        try:
            evidence = await Keys(keys.manager, NAME).evidence(held.info.key_id)
        except SpireHwError as e:
            raise self._failed(caller, held, e) from e
        return pb.GetKeyCustodyResponse(
            fingerprint=held.info.fingerprint,
            custody=custody_message(evidence),
            log_head=self._head(),
        )

    async def attest_own_key(self, request: Any, call: Call) -> Any:
        """Return signed evidence about one of the caller's keys."""
        caller = self._gate.caller(call)
        if not MIN_NONCE_BYTES <= len(request.nonce) <= MAX_NONCE_BYTES:
            text = f"a nonce has {MIN_NONCE_BYTES} to {MAX_NONCE_BYTES} bytes"
            raise self._refused(caller, "AttestOwnKey", "", Denial(Reason.MALFORMED, text))
        keys, held = self._find(caller, "AttestOwnKey", request.key_id, _ATTEST_RATE)
        try:
            evidence = await self._attesting.attest_held(
                keys, held, request.nonce, (), by=caller.client.identity
            )
        except SpireHwError as e:
            raise self._failed(caller, held, e) from e
        return pb.AttestOwnKeyResponse(evidence=evidence, log_head=self._head())

    def _find(
        self, caller: Caller, method: str, key_id: str, rate: Rate
    ) -> tuple[OwnerKeys, HeldKey]:
        """Check 2 to 5; return the key.

        Raises:
            SpireHwError: what it was refused for.
        """
        identity, now = caller.client.identity, self._clock.monotonic()
        if not is_key_id(key_id):
            denial = Denial(Reason.MALFORMED, "that is no key id")
            raise self._refused(caller, method, "", denial)
        if caller.client.rule(key_id) is None:
            raise self._refused(caller, method, key_id, FOREIGN_KEY)
        denied = self._buckets.take(identity, method, rate, None, now)
        if denied is not None:
            raise self._refused(caller, method, key_id, denied)
        keys = self._owners().get(caller.client.owner)
        if keys is None:
            raise SpireHwError("the client's keys are closed", kind=ErrorKind.UNAVAILABLE)
        held = keys.find(key_id)
        if held is None:
            denial = Denial(Reason.NO_KEY, f'key "{key_id}" not found')
            raise self._refused(caller, method, key_id, denial)
        return keys, held

    def _refused(self, caller: Caller, method: str, key_id: str, denial: Denial) -> SpireHwError:
        self._gate.refuse(caller.intent(method, key_id=key_id), denial)
        return error_of(denial)

    def _failed(self, caller: Caller, held: HeldKey, error: SpireHwError) -> SpireHwError:
        """Return what a client is told of a device that failed: the code, the rest is in the log."""
        self._log.error(
            "Custody of a key cannot be told",
            client=caller.client.identity,
            key_id=held.info.key_id,
            error=error.message,
        )
        return SpireHwError("the signer could not do it: its log tells why", kind=error.kind)

    def _head(self) -> pb.LogHead:
        head = self._audit.head
        return pb.LogHead(seq=head.seq, hash=head.hash)


def custody_methods(service: CustodyService) -> list[Method]:
    """Return the methods that clients call."""
    return bind(_SERVICE, service)


def custody_message(evidence: KeyEvidence) -> pb.KeyCustody:
    """Return where a key is as the protocol has it."""
    return pb.KeyCustody(
        custody=evidence.custody.value,
        location=evidence.location,
        device=evidence.device,
        token=evidence.token,
        generation=evidence.generation,
        created_at=0 if evidence.created is None else int(evidence.created.timestamp()),
        attributes=evidence.attributes,
    )

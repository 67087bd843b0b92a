"""Evidence of where a client's key is, signed by the signer's log key.

Who has it, has what the device said, and a signature of the one key that no client can use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotFoundError, UnavailableError
from spire_hw.evidence.document import KeyReport
from spire_hw.evidence.making import Witness, check_nonce, make_evidence
from spire_hw.key import spki_der
from spire_hw.plugin.keymanager import Keys
from spire_hw_signer.keys import LOG_KEY_ID, HeldSigner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.clock import Clock
    from spire_hw.plugin.keymanager import KeyInfo
    from spire_hw_signer.audit.log import AuditLog
    from spire_hw_signer.keys import HeldKey, OwnerKeys
    from spire_hw_signer.live import Live

NAME: Final = "signer"


class Attesting:
    """The keys of all owners, as far as evidence goes.

    Args:
        live: the owners.
        log_keys: hold the log key.
        audit: is told that evidence was given.
        clock: time.
    """

    def __init__(self, live: Live, log_keys: OwnerKeys, audit: AuditLog, *, clock: Clock) -> None:
        self._live = live
        self._log_keys = log_keys
        self._audit = audit
        self._clock = clock

    async def attest(self, target: str, nonce: bytes, attestation: Sequence[bytes]) -> str:
        """Return signed evidence about a key.

        Args:
            target: `TRUST-DOMAIN/SERVER/KEY-ID`.
            nonce: the requester's.
            attestation: certificates the device gave out another way, that of the key first.

        Raises:
            NotFoundError: no such key.
            InvalidInputError: the nonce is too short or too long.
            AttestationError: the certificates are not about this key.
            SpireHwError: a device failed, or nothing can be written into the audit log.
        """
        check_nonce(nonce)
        keys, key_id = self._find(target)
        held = keys.find(key_id)
        if held is None:
            raise NotFoundError(f'there is no key "{target[:400]}"')
        return await self.attest_held(keys, held, nonce, attestation)

    async def attest_held(
        self,
        keys: OwnerKeys,
        held: HeldKey,
        nonce: bytes,
        attestation: Sequence[bytes],
        *,
        by: str = "",
    ) -> str:
        """Return signed evidence about a key that was found; errors as in `attest`.

        Args:
            keys: whose key it is.
            held: the key.
            nonce: the requester's.
            attestation: certificates the device gave out another way, that of the key first.
            by: the client that asked, "" for an operator.
        """
        if self._audit.trouble:
            raise UnavailableError(f"audit log unavailable: {self._audit.trouble}")
        key = f"{keys.owner}/{held.info.key_id}"
        noted = {"key": key, "fingerprint": held.info.fingerprint}
        self._audit.note("key_attested", {**noted, "client": by} if by else noted)
        face = Keys(keys.manager, NAME)
        witness = HeldSigner(self._log_keys, LOG_KEY_ID)
        own = self._log_keys.find(LOG_KEY_ID)
        if own is None:
            raise NotFoundError("the signer has no log key")
        return await make_evidence(
            face,
            await _report(face, held.info),
            Witness(witness, await _report(Keys(self._log_keys.manager, NAME), own.info)),
            nonce=nonce,
            attestation=attestation,
            trust_domain=keys.owner.trust_domain.name,
            now=self._clock.now(),
        )

    def _find(self, target: str) -> tuple[OwnerKeys, str]:
        for owner, keys in self._live.owners.items():
            prefix = f"{owner}/"
            if target.startswith(prefix):
                return keys, target.removeprefix(prefix)
        raise NotFoundError(f'the policy names nobody who has a key "{target[:400]}"')


async def _report(keys: Keys, info: KeyInfo) -> KeyReport:
    return KeyReport(info.key_id, spki_der(info.public_key), await keys.evidence(info.key_id))

"""Where the keys of this server are: listed, told as signed evidence, shown in metrics.

Evidence is signed with a key of its own in the same KeyManager, made when it is first wanted.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, NotFoundError, PluginError, SpireHwError
from spire_hw.evidence.document import KeyReport
from spire_hw.evidence.making import Witness, check_nonce, make_evidence
from spire_hw.key import KeyType, fingerprint, spki_der
from spire_hw.plugin.custody import Custody, KeyAttestor
from spire_hw.plugin.keymanager import KeyEvidence
from spire_hw_server.ca.retained import RetainedKeys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.plugin.keymanager import Keys, ManagedSigner
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.telemetry.host import Telemetry
    from spire_hw_server.ca.manager import CaManager

EVIDENCE_KEY: Final = "evidence-log"
_CHECK_S: Final = 60.0
_ASK_AGAIN_S: Final = 3600.0
_GAUGE: Final = ("authority", "custody")


@dataclass(frozen=True, slots=True)
class Role:
    """What an authority of ours is, by its key."""

    kind: str
    authority_id: str
    status: str


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A key of the KeyManager.

    Attributes:
        key_type: its type.
        report: what is known of it.
        role: the authority it belongs to, None for a key of none.
        trouble: why the device could not be asked, "" when it was.
    """

    key_type: KeyType
    report: KeyReport
    role: Role | None
    trouble: str = ""


class Custodian:
    """The keys of one server and who says where they are.

    Attributes:
        retained: those that were replaced and are kept for a while.
    """

    def __init__(
        self,
        keys: Keys,
        manager: CaManager,
        *,
        trust_domain: TrustDomain,
        telemetry: Telemetry,
        clock: Clock,
        log: Logger,
    ) -> None:
        self.retained = RetainedKeys(keys, manager, log)
        self._keys = keys
        self._manager = manager
        self._trust_domain = trust_domain
        self._telemetry = telemetry
        self._clock = clock
        self._log = log
        self._making = asyncio.Lock()
        self._known: dict[str, str] = {}
        self._asked_at = 0.0

    async def list(self) -> list[ListedKey]:
        """Return all keys, the oldest first.

        Raises:
            PluginError: the KeyManager failed.
        """
        roles = self._roles()
        return [await self._listed(signer, roles) for signer in await self._keys.list()]

    async def get(self, key_id: str) -> ListedKey:
        """Return one key.

        Raises:
            PluginError: NOT_FOUND, or the KeyManager failed.
        """
        return await self._listed(await self._keys.get(key_id), self._roles())

    async def attest(self, key_id: str, nonce: bytes, attestation: Sequence[bytes]) -> str:
        """Return signed evidence about a key.

        Args:
            key_id: which key.
            nonce: the requester's.
            attestation: certificates the device gave out another way, that of the key first.

        Raises:
            InvalidInputError: the nonce is too short or too long.
            AttestationError: the certificates are not about this key.
            PluginError: the KeyManager failed.
        """
        check_nonce(nonce)
        signer = await self._keys.get(key_id)
        report = self._report(signer, await self._keys.evidence(key_id))
        if attestation and isinstance(self._keys.manager, KeyAttestor):
            raise InvalidInputError(
                "a signer holds the key and signs evidence about it: hand the device's certificates "
                "to it on its host, with `spire-hw-signer key attest -attestation`"
            )
        made = await self._keys.attested(key_id, nonce)
        if made is None:
            made = await make_evidence(
                self._keys,
                report,
                await self._witness(),
                nonce=nonce,
                attestation=attestation,
                trust_domain=str(self._trust_domain),
                now=self._clock.now(),
            )
        self._log.info(
            "evidence about a key was given",
            key_id=key_id,
            fp=report.fingerprint,
            custody=report.evidence.words,
            attested=bool(attestation),
        )
        return made

    async def run(self) -> None:
        """Keep the metric of the authorities' custody up to date; ends only when cancelled."""
        while True:
            await self._measure()
            await self._clock.sleep(_CHECK_S)

    async def _measure(self) -> None:
        active = {f: role for f, role in self._roles().items() if role.status == "active"}
        now = self._clock.monotonic()
        if active.keys() == self._known.keys() and now - self._asked_at < _ASK_AGAIN_S:
            return
        try:
            listed = {key.report.fingerprint: key for key in await self.list()}
        except SpireHwError as e:
            self._log.warning("custody of keys is not known", error=e.message)
            return
        # A device that was away for the moment is asked again at the next look.
        is_away = any(listed[found].trouble for found in active if found in listed)
        self._asked_at = float("-inf") if is_away else now
        self._telemetry.forget(*_GAUGE)
        known = {}
        for found, role in active.items():
            key = listed.get(found)
            custody = Custody.UNKNOWN.value if key is None else key.report.evidence.words
            known[found] = custody
            if self._known.get(found) != custody:
                self._log.info(
                    "custody of an authority's key",
                    kind=role.kind,
                    authority_id=role.authority_id,
                    custody=custody,
                )
            labels = {"kind": role.kind.replace(".", "").lower(), "custody": custody}
            self._telemetry.metrics.gauge(_GAUGE, 1, labels)
        self._known = known

    async def _listed(self, signer: ManagedSigner, roles: dict[str, Role]) -> ListedKey:
        info, trouble = signer.info, ""
        try:
            evidence = await self._keys.evidence(info.key_id)
        except SpireHwError as e:
            evidence, trouble = KeyEvidence("not known now", {}), e.message
        report = self._report(signer, evidence)
        return ListedKey(info.key_type, report, roles.get(info.fingerprint), trouble)

    def _report(self, signer: ManagedSigner, evidence: KeyEvidence) -> KeyReport:
        info, uses = signer.info, self._keys.uses
        last = None if uses is None else uses.last(info.fingerprint)
        return KeyReport(info.key_id, spki_der(info.public_key), evidence, last)

    async def _witness(self) -> Witness:
        """Return the key that signs evidence; make it when there is none."""
        async with self._making:
            try:
                signer = await self._keys.get(EVIDENCE_KEY)
            except PluginError as e:
                if e.kind is not NotFoundError.kind:
                    raise
                self._log.info("making the key that signs evidence", key_id=EVIDENCE_KEY)
                signer = await self._keys.generate(EVIDENCE_KEY, KeyType.EC_P256)
        return Witness(signer, self._report(signer, await self._keys.evidence(EVIDENCE_KEY)))

    def _roles(self) -> dict[str, Role]:
        """Return the authorities by the fingerprints of their keys."""
        return {
            fingerprint(spki): Role(kind, record.authority_id, record.status.name.lower())
            for kind, record, spki in self._manager.authorities()
        }

"""Agent half of the `tpm` node attestor: proves which TPM this is, its PCRs and where the key is.

The payload names the endorsement key and an attestation key of this run. Nothing is quoted or
certified before the TPM itself opened the server's credential, and every statement is bound to
that secret, to the server's nonce and to the CSR's key: a hostile server learns PCR values and
signatures that fit no other exchange.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.bootid import read_boot_id
from spire_hw.config.schema import Model, decode, faults
from spire_hw.errors import (
    ConfigError,
    ConfigFault,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.key import spki_der
from spire_hw.plugin.keymanager import TpmKeys
from spire_hw.tpm import attest, verify
from spire_hw.tpm.connection import Hierarchy
from spire_hw.tpm.device import TpmDevice, load_password, shared
from spire_hw.tpm.endorsement import EkType, Endorsement, find_endorsement
from spire_hw.tpm.keys import KeyBlob
from spire_hw_plugins.nodeattestor.tpm import dialects, wire
from spire_hw_plugins.nodeattestor.tpm.machine import BOOT_LOG, IMA_LOG, Machine, NoLogError
from spire_hw_plugins.nodeattestor.tpm.reply import send_answer
from spire_hw_plugins.nodeattestor.tpm.source import answer_heartbeat

if TYPE_CHECKING:
    from spire_hw.config.hcl import Body
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.nodeattestor import AgentExchange, SvidKey
    from spire_hw.posture.heartbeat import HeartbeatAnswer, HeartbeatChallenge
    from spire_hw.tpm.attest import AttestationKey
    from spire_hw.tpm.connection import Connection

NAME: Final = wire.NAME
# An RSA endorsement key takes slow hardware most of a minute to make.
_IDENTIFY_TIMEOUT_S: Final = 120.0
_MIN_ANSWER_S, _MAX_ANSWER_S = 5.0, 120.0


class Config(Model):
    """The plugin_data.

    Attributes:
        tpm_device_path: device node; the kernel's resource manager when unset.
        tcti: TCTI string instead of a device, such as `swtpm:host=localhost,port=2321`.
        endorsement_auth_path: file with the password of the endorsement hierarchy, if one is set.
        owner_auth_path: the same for the owner hierarchy.
        ek_type: `auto`, `ec-p256`, `ec-p384`, `rsa-2048` or `rsa-3072`.
        bind_csr: answer only servers whose attestor binds evidence to the certificate request.
        boot_log_path: firmware's log, where it is not in the kernel's usual place.
        ima_log_path: the kernel's list of measured files in ASCII, likewise.
        insecure_evidence: show both to servers that were not verified, too.
        accept_activation_only: answer servers that ask for credential activation and nothing else.
    """

    tpm_device_path: str = ""
    tcti: str = ""
    endorsement_auth_path: str = ""
    owner_auth_path: str = ""
    ek_type: str = EkType.AUTO.value
    bind_csr: bool = True
    boot_log_path: str = ""
    ima_log_path: str = ""
    insecure_evidence: bool = False
    accept_activation_only: bool = False


@dataclass(frozen=True, slots=True)
class _Node:
    """What identifies this TPM in one exchange."""

    ek: Endorsement
    ak: AttestationKey


@dataclass(frozen=True, slots=True)
class _Shown:
    """What this machine can show besides its TPM; None for what it does not have."""

    boot_log: bytes | None
    ima_entries: int | None
    boot_id: str | None

    @property
    def announcement(self) -> wire.LogAnnouncement | None:
        """Return what is said about the boot log beforehand."""
        if self.boot_log is None:
            return None
        digest = hashlib.sha256(self.boot_log).hexdigest()
        return wire.LogAnnouncement(len(self.boot_log), digest)


@dataclass(frozen=True, slots=True)
class _BoundKey:
    """The CSR's key: its hash in qualifiers, and its blob when it is in the TPM."""

    spki_sha256: bytes
    blob: KeyBlob | None

    @property
    def is_known(self) -> bool:
        """Tell whether the host showed the key."""
        return self.spki_sha256 != verify.NO_CSR


_UNBOUND: Final = _BoundKey(verify.NO_CSR, None)


class TpmAgentAttestor:
    """The agent's contract over a TPM."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._device: TpmDevice | None = None
        self._ek_type = EkType.AUTO
        self._settings = Config()
        self._machine = Machine()

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching the TPM."""
        found = faults(config, Config)
        return found or _conflicts(decode(config, Config))

    async def configure(self, config: Body) -> None:
        """Find the TPM; it is opened when the agent attests.

        Raises:
            ConfigError: something unknown is set, or device and TCTI both.
            NotReadyError: no TPM, or a password file cannot be read.
        """
        settings = decode(config, Config)
        if conflicts := _conflicts(settings):
            raise ConfigError(config.file or "configuration", conflicts)
        passwords = {
            Hierarchy.ENDORSEMENT: settings.endorsement_auth_path,
            Hierarchy.OWNER: settings.owner_auth_path,
        }
        loaded = {h: await asyncio.to_thread(load_password, p) for h, p in passwords.items()}
        await self.open(settings.tcti or settings.tpm_device_path, EkType(settings.ek_type), loaded)
        self._settings = settings
        self._machine = Machine(
            Path(settings.boot_log_path or BOOT_LOG), Path(settings.ima_log_path or IMA_LOG)
        )

    async def open(
        self,
        tcti: str,
        ek_type: EkType = EkType.AUTO,
        passwords: dict[Hierarchy, bytes] | None = None,
    ) -> None:
        """Choose the TPM; what `configure` does with its settings.

        Args:
            tcti: TCTI or device path; empty for the kernel's resource manager.
            ek_type: which endorsement key to attest with.
            passwords: hierarchy passwords; empty ones are as none.
        """
        device = shared(tcti)
        for hierarchy, password in (passwords or {}).items():
            if password:
                device.set_password(hierarchy, password)
        before, self._device = self._device, device
        self._ek_type = ek_type
        if before is not None:
            await before.close()

    async def close(self) -> None:
        """Give the TPM back."""
        device, self._device = self._device, None
        if device is not None:
            await device.close()

    async def aid_attestation(self, exchange: AgentExchange, svid_key: SvidKey | None) -> None:
        """Send who this TPM is, open the challenge, send statements bound to it."""
        device = self._device
        if device is None:
            raise NotReadyError("not configured")
        key = self._bind(svid_key)
        node = await device.run("identify the TPM", self._identify, timeout_s=_IDENTIFY_TIMEOUT_S)
        shown = await asyncio.to_thread(self._look)
        self._host.log.info("attesting", ek_hash=node.ek.hash, ek_template=node.ek.label)
        await exchange.send(wire.encode_attestation_data(_payload(node, key, shown)))
        first = await exchange.receive()
        sealed = dialects.decode_challenge(first)
        if sealed is not None:
            await exchange.send(await self._activate(device, node, sealed))
            return
        challenge = wire.decode_challenge(first)
        check_banks(challenge)
        self._check_wants(exchange, challenge)
        key = self._bound_as_asked(key, challenge)
        limit_s = min(max(challenge.expires_ms / 1000, _MIN_ANSWER_S), _MAX_ANSWER_S)
        response = await device.run(
            "answer the attestation challenge",
            lambda connection: _answer(connection, node, key, challenge),
            timeout_s=limit_s,
        )
        await send_answer(exchange, challenge, response, self._machine, shown.boot_log)

    async def heartbeat(
        self, challenge: HeartbeatChallenge, svid_spki_sha256: bytes
    ) -> HeartbeatAnswer:
        """Answer; see `spire_hw.posture.heartbeat.HeartbeatSource`."""
        device = self._device
        if device is None:
            raise NotReadyError("not configured")
        return await answer_heartbeat(device, self._machine, challenge, svid_spki_sha256)

    async def _activate(self, device: TpmDevice, node: _Node, sealed: tuple[bytes, bytes]) -> bytes:
        """Answer a server that wants to know which TPM this is and nothing else."""
        if not self._settings.accept_activation_only:
            raise NotReadyError(
                "challenge: the server asks for credential activation alone, as spire-tpm-plugin "
                "does: whoever sits between can have the identity issued for a key of its own; if "
                "that is what you run, set accept_activation_only = true"
            )
        secret = await device.run(
            "answer the attestation challenge",
            lambda connection: _open(connection, node, *sealed),
        )
        return dialects.encode_response(secret)

    def _look(self) -> _Shown:
        """Return what this machine can show besides its TPM."""
        log = None
        try:
            log = self._machine.boot_log()
        except NoLogError:
            log = None
        except SpireHwError as e:
            self._host.log.warning(
                "The boot log cannot be shown: a server that asks for it will refuse this node",
                error=e.message,
            )
        return _Shown(log or None, self._machine.ima_entries(), read_boot_id())

    def _check_wants(self, exchange: AgentExchange, challenge: wire.ChallengeMessage) -> None:
        if "time" in challenge.want:
            raise InvalidInputError("challenge: this node's AK hides no counters")
        may_show = self._settings.insecure_evidence or not challenge.want
        if not may_show and not exchange.server_verified:
            raise NotReadyError(
                "challenge: evidence is withheld from an unverified server; configure the trust "
                "bundle, or set insecure_evidence = true"
            )

    def _identify(self, connection: Connection) -> _Node:
        ek = find_endorsement(connection, self._ek_type)
        return _Node(ek, attest.create_attestation_key(connection))

    def _bind(self, svid_key: SvidKey | None) -> _BoundKey:
        if svid_key is None:
            return _UNBOUND
        spki = spki_der(svid_key.public_key)
        manager = svid_key.manager
        blob = None
        if isinstance(manager, TpmKeys):
            blob = KeyBlob.parse(*manager.tpm_key_blob(svid_key.key_id))
            if blob.parsed.spki != spki:
                raise NotReadyError(f'key "{svid_key.key_id}" was replaced during attestation')
        else:
            self._host.log.warning(
                "the SVID's key is not in the TPM: a server that asks for it will refuse this "
                'node; use KeyManager "tpm"'
            )
        return _BoundKey(hashlib.sha256(spki).digest(), blob)

    def _bound_as_asked(self, key: _BoundKey, challenge: wire.ChallengeMessage) -> _BoundKey:
        """Return what evidence is bound to, which is as much as both halves know."""
        if challenge.csr and not key.is_known:
            raise InvalidInputError("challenge: evidence is to be bound to a CSR nobody showed us")
        if challenge.csr or not key.is_known:
            return key
        if self._settings.bind_csr:
            raise InvalidInputError(
                "challenge: the server does not bind evidence to the certificate request, as "
                "SPIRE's own cannot; if that is what you run, set bind_csr = false"
            )
        return _UNBOUND


def check_banks(challenge: wire.ChallengeMessage) -> None:
    """Refuse a challenge that asks for no PCR, or for one bank more than once.

    Raises:
        InvalidInputError: it does.
    """
    if not challenge.quote:
        raise InvalidInputError("challenge: PCR request is malformed: it names no PCR")
    banks = [selection.bank for selection in challenge.quote]
    if len(set(banks)) != len(banks):
        raise InvalidInputError("challenge: PCR request is malformed: a bank is named twice")


def _payload(node: _Node, key: _BoundKey, shown: _Shown) -> wire.AttestationData:
    return wire.AttestationData(
        ek_certificate=node.ek.certificate,
        ek_spki=node.ek.parsed.spki,
        ak=wire.AkEvidence(
            public=node.ak.public,
            create_data=node.ak.creation_data,
            create_attestation=node.ak.creation_attest,
            create_signature=node.ak.creation_signature,
        ),
        ek_pub=node.ek.parsed.raw,
        ek_chain=node.ek.chain[: wire.MAX_CHAIN],
        key_pub=key.blob.parsed.raw if key.blob is not None else None,
        log=shown.announcement,
        ima_entries=shown.ima_entries,
        boot_id=shown.boot_id,
        csr=key.is_known,
    )


def _answer(
    connection: Connection, node: _Node, key: _BoundKey, challenge: wire.ChallengeMessage
) -> wire.Response:
    """Do the TPM's part in one job, activation first."""
    secret = _open(connection, node, challenge.credential, challenge.secret)

    def bound(role: str) -> bytes:
        return verify.qualifier(role, challenge.nonce, key.spki_sha256, secret, node.ak.name)

    quotes = []
    for selection in challenge.quote:
        made = attest.quote(connection, selection, bound("quote"))
        signed = made.signed
        values = {selection.bank: made.values}
        quotes.append(wire.QuoteEvidence(signed.attest, signed.signature, values))
    certified = None
    if key.blob is not None:
        signed = attest.certify(connection, key.blob, bound("certify"))
        certified = wire.SignedStatement(signed.attest, signed.signature)
    return wire.Response(secret=secret, quotes=tuple(quotes), certify=certified)


def _open(connection: Connection, node: _Node, credential: bytes, sealed: bytes) -> bytes:
    secret = attest.activate(connection, node.ek, credential, sealed)
    if len(secret) != wire.SECRET_BYTES:
        raise InvalidInputError(f"challenge: secret must be {wire.SECRET_BYTES} bytes")
    return secret


def _conflicts(settings: Config) -> list[ConfigFault]:
    found = []
    if settings.tcti and settings.tpm_device_path:
        found.append(ConfigFault(settings.line("tcti"), "set tpm_device_path or tcti, not both"))
    known = [member.value for member in EkType]
    if settings.ek_type not in known:
        text = f"ek_type {settings.ek_type!r} is unknown; use one of {', '.join(known)}"
        found.append(ConfigFault(settings.line("ek_type"), text))
    return found


def build(host: HostInfo) -> TpmAgentAttestor:
    """Make the plugin."""
    return TpmAgentAttestor(host)

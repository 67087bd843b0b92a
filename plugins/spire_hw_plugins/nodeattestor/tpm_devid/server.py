"""Server half of `tpm_devid`: a certificate of an authority we trust, for a key in a genuine TPM.

From the certificate to the TPM it goes in steps, each proved: the certificate leads to one of our
authorities; its key is the one that an attestation key certified; that attestation key is in the
TPM of a genuine endorsement key, shown by activation; and whoever answers can use the DevID key
now. Until the challenge is answered all of it is a claim.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import (
    AttestationError,
    EncodingError,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.key import HashAlgorithm, SignOptions, spki_der, verify_digest
from spire_hw.plugin.nodeattestor import AttestedIdentity
from spire_hw.posture.reasons import REVOKED
from spire_hw.spiffeid import agent_id
from spire_hw.tpm import public as areas
from spire_hw.tpm import verify
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.tpm.credential import make_credential
from spire_hw.tpm.devidrequest import check_devid_key
from spire_hw.tpm.ekcert import verify_ek_certificate
from spire_hw.tpm.public import check_ak, check_ek, parse_public
from spire_hw.tpm.wire import parse_attest
from spire_hw.x509.certificate import sha1_fingerprint
from spire_hw_plugins.nodeattestor.tpm_devid import wire
from spire_hw_plugins.nodeattestor.tpm_devid.certificates import check_devid, refusal
from spire_hw_plugins.nodeattestor.tpm_devid.config import build_settings, find_faults

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault, Finding
    from spire_hw.key import PublicKey
    from spire_hw.plugin.info import HostInfo
    from spire_hw.plugin.nodeattestor import AttestationRequest
    from spire_hw.tpm.certificate import Certificate
    from spire_hw.tpm.crl import Revocations
    from spire_hw.tpm.ekcert import ChainTime, EkRoots
    from spire_hw.tpm.public import TpmPublic
    from spire_hw_plugins.nodeattestor.tpm_devid.certificates import DevId
    from spire_hw_plugins.nodeattestor.tpm_devid.config import Settings

NAME: Final = wire.NAME
_OPTIONS: Final = SignOptions(HashAlgorithm.SHA256)


@dataclass(frozen=True, slots=True)
class _Makers:
    """Who may have issued an endorsement certificate; see `Settings`."""

    roots: EkRoots
    crls: Revocations | None
    chain_time: ChainTime


class DevIdServer:
    """The ServerNodeAttestor contract over DevID certificates."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._settings: Settings | None = None

    @property
    def max_message_bytes(self) -> int:
        """Return the largest message the host has to pass on."""
        return wire.MAX_PAYLOAD_BYTES

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching any file."""
        return find_faults(config)

    async def configure(self, config: Body) -> None:
        """Read the authorities.

        Raises:
            ConfigError: the configuration has faults.
            NotReadyError: a file cannot be read.
            InvalidInputError: a file holds something else than certificates.
        """
        self._settings = await asyncio.to_thread(build_settings, config)

    async def close(self) -> None:
        """Forget the configuration; exchanges under way end by themselves."""
        self._settings = None

    async def attest(self, request: AttestationRequest) -> AttestedIdentity:
        """Check one node.

        Raises:
            InvalidInputError: a message that does not parse.
            LimitError: a message too large.
            AttestationError: evidence that does not hold, or is not trusted; its kind tells.
            DeniedError: the host bans this agent.
        """
        settings = self._settings
        if settings is None:
            raise NotReadyError("attestor is not configured")
        data = wire.decode_attestation_data(request.payload)
        now = self._host.clock.now()
        devid = await self._check_certificate(settings, data.certificates, now)
        name = sha1_fingerprint(devid.leaf)
        identity = agent_id(self._host.trust_domain, NAME, name)
        await request.admit(identity)
        makers = await self._makers(settings)
        ek, ak = _check_residency(makers, data, devid.key, now)
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        secret = secrets.token_bytes(wire.SECRET_BYTES)
        sealed = make_credential(ek, ak.name, secret)
        challenge = wire.Challenge(nonce, sealed.id_object[2:], sealed.encrypted_secret[2:])
        answer = await request.challenge(wire.encode_challenge(challenge))
        response = wire.decode_response(answer)
        if not hmac.compare_digest(response.secret, secret):
            raise refusal("secret_mismatch", "challenge: secret does not match")
        _check_possession(devid.key, nonce, response.signature)
        self._host.log.debug("DevID attested", fingerprint=name, common_name=devid.common_name)
        return AttestedIdentity(
            identity,
            _selectors(devid),
            can_reattest=True,
            certificates=(data.certificates, (data.ek_certificate, *data.ek_chain)),
        )

    async def lists_version(self) -> int | None:
        """Return a number of the revocation lists; see `spire_hw.plugin.nodeattestor.Rechecks`."""
        settings = self._settings
        watched = [] if settings is None else [settings.devid_crls, settings.ek_crls]
        lists = [one for one in watched if one is not None]
        for one in lists:
            await one.current(self._host.clock, self._host.log)
        return max(one.version for one in lists) if lists else None

    async def recheck(self, certificates: tuple[tuple[bytes, ...], ...]) -> list[Finding]:
        """Return what is revoked by now; see `spire_hw.plugin.nodeattestor.Rechecks`."""
        settings = self._settings
        if settings is None:
            return []
        try:
            devid, (endorsement, *chain) = certificates
        except ValueError as e:
            raise InvalidInputError("devid: these are not two chains of certificates") from e
        now = self._host.clock.now()
        found: list[Finding] = []
        try:
            await self._check_certificate(settings, devid, now)
        except AttestationError as e:
            found += e.findings
        try:
            leaf = parse_certificate(endorsement)
            _check_maker(await self._makers(settings), leaf, tuple(chain), now)
        except AttestationError as e:
            found += e.findings
        return [finding for finding in found if finding.code in REVOKED]

    async def _check_certificate(
        self, settings: Settings, certificates: Sequence[bytes], now: datetime
    ) -> DevId:
        clock, log = self._host.clock, self._host.log
        issuers = await settings.issuers.current(clock, log)
        watched = settings.devid_crls
        crls = None if watched is None else await watched.current(clock, log)
        return check_devid(issuers, crls, certificates, now)

    async def _makers(self, settings: Settings) -> _Makers:
        clock, log = self._host.clock, self._host.log
        roots = await settings.ek_roots.current(clock, log)
        watched = settings.ek_crls
        crls = None if watched is None else await watched.current(clock, log)
        return _Makers(roots, crls, settings.chain_time)


def _check_residency(
    makers: _Makers, data: wire.AttestationData, key: PublicKey, now: datetime
) -> tuple[TpmPublic, TpmPublic]:
    """Return endorsement and attestation key of what claims to be the DevID key's TPM."""
    devid = parse_public(data.devid_pub, "devid: public area")
    if devid.spki != spki_der(key):
        raise refusal("devid_key_mismatch", "devid: certificate and TPM key are different keys")
    check_devid_key(devid)
    ek = _check_ek(makers, data, now)
    ak = parse_public(data.ak_pub, "ak: public area")
    check_ak(ak)
    if len({devid.spki, ek.spki, ak.spki}) != 3:  # noqa: PLR2004 - three roles
        raise refusal("keys_equal", "ak: keys must be different")
    statement = verify.Statement(data.certified, data.signature)
    verify.verify_certify(ak, _signer_of(data, ak), key=devid, expected=b"", statement=statement)
    return ek, ak


def _check_ek(makers: _Makers, data: wire.AttestationData, now: datetime) -> TpmPublic:
    leaf = parse_certificate(data.ek_certificate)
    ek = parse_public(data.ek_pub, "ek: public area")
    check_ek(ek)
    if leaf.spki != ek.spki:
        raise refusal("ek_key_mismatch", "ek: certificate and public key are different keys")
    _check_maker(makers, leaf, data.ek_chain, now)
    return ek


def _check_maker(makers: _Makers, leaf: Certificate, chain: Sequence[bytes], now: datetime) -> None:
    verify_ek_certificate(
        leaf,
        chain,
        makers.roots,
        now,
        chain_time=makers.chain_time,
        revocations=makers.crls,
    )


def _signer_of(data: wire.AttestationData, ak: TpmPublic) -> bytes:
    """Return where the attestation key says to be.

    Upstream's is below a storage key nobody shows, so its place cannot be computed; that it is in
    the TPM at all is what activation shows. A primary key must not be of a hierarchy that anybody
    may use.
    """
    try:
        signer = parse_attest(data.certified, "certify: structure").qualified_signer
    except EncodingError as e:
        raise refusal("certify_malformed", e.message) from e
    try:
        areas.hierarchy_of(signer, ak.name)
    except AttestationError as e:
        if e.findings[0].code == "ak_hierarchy":
            raise
    return signer


def _check_possession(key: PublicKey, nonce: bytes, signature: bytes) -> None:
    try:
        verify_digest(key, HashAlgorithm.SHA256.digest(nonce), signature, _OPTIONS)
    except SpireHwError as e:
        text = "devid: nonce signature does not verify"
        raise refusal("devid_signature", text) from e


def _selectors(devid: DevId) -> list[str]:
    found = [f"subject:cn:{devid.common_name}"] if devid.common_name else []
    found += [f"issuer:cn:{devid.issuer}"] if devid.issuer else []
    return found + [f"ca:fingerprint:{sha1_fingerprint(c)}" for c in devid.authorities]


def build(host: HostInfo) -> DevIdServer:
    """Make the plugin."""
    return DevIdServer(host)

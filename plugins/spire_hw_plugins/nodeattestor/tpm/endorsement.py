"""Whether an endorsement key is accepted: by its manufacturer's certificate, by enrolment, or both.

Until the challenge is answered a key is only a claim: whoever has seen a certificate can show it.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import AttestationError, ErrorKind, Finding, InvalidInputError, WeakKeyError
from spire_hw.key import parse_spki
from spire_hw.posture.evidence import EkFacts
from spire_hw.posture.reasons import EK_REVOKED
from spire_hw.tpm.certificate import parse_certificate
from spire_hw.tpm.ekarea import build_ek_area
from spire_hw.tpm.ekcert import EkRoots, VerifiedEk, verify_ek_certificate
from spire_hw.tpm.public import check_ek, parse_public

if TYPE_CHECKING:
    from spire_hw.plugin.info import HostInfo
    from spire_hw.tpm.certificate import Certificate
    from spire_hw.tpm.public import TpmPublic
    from spire_hw_plugins.nodeattestor.tpm.config import Settings
    from spire_hw_plugins.nodeattestor.tpm.wire import AttestationData

# An entry in a hash list does not make up for these: the maker or the mathematics disowned the key.
_FINAL: Final = frozenset({EK_REVOKED, "ek_weak"})
_NO_ROOTS: Final = EkRoots.of(())


@dataclass(frozen=True, slots=True)
class Endorsement:
    """An accepted endorsement key.

    Attributes:
        public: its public area.
        hash: lower-case hex SHA-256 of its SubjectPublicKeyInfo.
        methods: how it was allowed, of `ca` and `hash`.
        verified: what its certificate says, None without a verified one.
        certificates: the certificate and what the node sent with it, none where nobody asks for
            certificates.
    """

    public: TpmPublic
    hash: str
    methods: tuple[str, ...]
    verified: VerifiedEk | None
    certificates: tuple[bytes, ...] = ()

    @property
    def facts(self) -> EkFacts:
        """Return the same as evidence."""
        if self.verified is None:
            return EkFacts(self.hash, self.methods)
        model = self.verified.model
        return EkFacts(
            self.hash,
            self.methods,
            root=self.verified.root_fingerprint,
            manufacturer=model.manufacturer,
            model=model.model,
            version=model.version,
        )


def read_ek(data: AttestationData) -> tuple[TpmPublic, Certificate | None]:
    """Return the one key a first message is about, and its certificate if it has one.

    Raises:
        InvalidInputError: malformed, or a key that is not acceptable.
        AttestationError: `ek_key_mismatch`, `ek_template`, `ek_signing_key`, `ek_weak`.
    """
    try:
        return _read_ek(data)
    except WeakKeyError as e:
        raise AttestationError([Finding("ek_weak", e.message, ErrorKind.PERMISSION_DENIED)]) from e


def _read_ek(data: AttestationData) -> tuple[TpmPublic, Certificate | None]:
    leaf = None if data.ek_certificate is None else parse_certificate(data.ek_certificate)
    public = parse_public(_area(data, leaf), "ek: public area")
    check_ek(public)
    if leaf is not None:
        if data.ek_spki is not None and leaf.spki != data.ek_spki:
            raise _mismatch("ek: certificate and public key are different keys")
        if leaf.spki != public.spki:
            raise _mismatch("ek: public area and certificate are different keys")
    if data.ek_spki is not None and data.ek_spki != public.spki:
        raise _mismatch(
            "ek: public area and public key are different keys, or not in canonical form"
        )
    return public, leaf


def _area(data: AttestationData, leaf: Certificate | None) -> bytes:
    """Return the public area, which peers without our object leave to be guessed.

    Of each kind of key there is one usual name algorithm and cipher; where a guess is wrong, the
    TPM does not open the credential.
    """
    if data.ek_pub is not None:
        return data.ek_pub
    spki = data.ek_spki if leaf is None else leaf.spki
    if spki is None:
        raise InvalidInputError("ek: no endorsement key in the request")
    try:
        return build_ek_area(parse_spki(spki))
    except WeakKeyError:
        raise
    except InvalidInputError as e:
        raise InvalidInputError(f"ek: {e.message.removeprefix('ek: ')}") from e


def _mismatch(text: str) -> AttestationError:
    return AttestationError([Finding("ek_key_mismatch", text)])


async def accept_ek(
    settings: Settings,
    host: HostInfo,
    public: TpmPublic,
    leaf: Certificate | None,
    chain: tuple[bytes, ...],
) -> Endorsement:
    """Return an endorsement key that policy allows.

    Args:
        settings: the attestor's.
        host: its time and its list of enrolled keys.
        public: the key.
        leaf: its certificate, None without one.
        chain: DER intermediates that came along.

    Raises:
        InvalidInputError: a certificate of the chain does not parse.
        AttestationError: policy does not allow it, with every reason.
    """
    key_hash = hashlib.sha256(public.spki).hexdigest()
    verified, denied = await _check_certificate(settings, host, leaf, chain)
    if any(finding.code in _FINAL for finding in denied):
        raise AttestationError(denied)
    methods = ["ca"] if verified is not None else []
    if settings.use_hash and (settings.need_both or not methods):
        if await _is_listed(settings, host, key_hash):
            methods.append("hash")
        else:
            text = "ek: endorsement key is not registered"
            denied.append(Finding("ek_unlisted", text, ErrorKind.PERMISSION_DENIED))
    if not methods or (settings.need_both and denied):
        raise AttestationError(denied)
    shown = () if leaf is None or not settings.use_ca else (leaf.der, *chain)
    return Endorsement(public, key_hash, tuple(methods), verified, shown)


async def find_revoked(
    settings: Settings, host: HostInfo, certificates: tuple[bytes, ...]
) -> list[Finding]:
    """Return why the certificates of an accepted key are revoked, empty when they are not.

    Args:
        settings: the attestor's.
        host: its time.
        certificates: as in `Endorsement`.

    Raises:
        InvalidInputError: they do not parse.
    """
    if not certificates:
        raise InvalidInputError("ek: no certificate was kept")
    leaf, *chain = certificates
    _, denied = await _check_certificate(settings, host, parse_certificate(leaf), tuple(chain))
    return [finding for finding in denied if finding.code == EK_REVOKED]


async def _check_certificate(
    settings: Settings, host: HostInfo, leaf: Certificate | None, chain: tuple[bytes, ...]
) -> tuple[VerifiedEk | None, list[Finding]]:
    """Return the verified certificate, or why there is none."""
    if not settings.use_ca:
        return None, []
    if leaf is None:
        if settings.use_hash and not settings.need_both:
            return None, []
        text = "ek: endorsement certificate is missing"
        return None, [Finding("ek_no_certificate", text, ErrorKind.PERMISSION_DENIED)]
    clock, log = host.clock, host.log
    roots = _NO_ROOTS if settings.roots is None else await settings.roots.current(clock, log)
    crls = None if settings.crls is None else await settings.crls.current(clock, log)
    try:
        verified = verify_ek_certificate(
            leaf, chain, roots, clock.now(), chain_time=settings.chain_time, revocations=crls
        )
    except AttestationError as e:
        return None, list(e.findings)
    return verified, []


async def _is_listed(settings: Settings, host: HostInfo, key_hash: str) -> bool:
    if key_hash in settings.hashes:
        return True
    if settings.hash_dir is not None and await asyncio.to_thread(
        (settings.hash_dir / key_hash).is_file
    ):
        return True
    listed = host.ek_list
    return listed is not None and await listed.is_ek_allowed(key_hash)

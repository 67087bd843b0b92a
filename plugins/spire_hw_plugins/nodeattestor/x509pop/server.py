"""Server half of the `x509pop` node attestor: a trusted certificate, and who shows it holds its key.

The chain is verified before anything is asked, the possession before anything is said. Which path
the node gets is settled in between, so that a banned node costs no signature check.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from spire_hw.errors import (
    AttestationError,
    ChainError,
    ErrorKind,
    Finding,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
)
from spire_hw.plugin.nodeattestor import AttestationRequest, AttestedIdentity
from spire_hw.spiffeid import SpiffeId
from spire_hw.x509.certificate import (
    encode_der,
    load_certificate,
    public_key_of,
    sha1_fingerprint,
)
from spire_hw.x509.chain import find_paths
from spire_hw_plugins.nodeattestor.x509pop import wire
from spire_hw_plugins.nodeattestor.x509pop.config import Settings, build_settings, find_faults

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.key import PublicKey
    from spire_hw.plugin.info import HostInfo
    from spire_hw_plugins.nodeattestor.pathtemplate import Value

NAME: Final = wire.NAME
_DENIED: Final = ErrorKind.PERMISSION_DENIED
_SPIFFE_SCHEME: Final = "spiffe://"
# Go's names of what stands in a distinguished name; it keeps the last of the single ones.
_SINGLE: Final = {"CommonName": NameOID.COMMON_NAME, "SerialNumber": NameOID.SERIAL_NUMBER}
_SEVERAL: Final = {
    "Country": NameOID.COUNTRY_NAME,
    "Organization": NameOID.ORGANIZATION_NAME,
    "OrganizationalUnit": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "Locality": NameOID.LOCALITY_NAME,
    "Province": NameOID.STATE_OR_PROVINCE_NAME,
}


class X509PopServer:
    """The ServerNodeAttestor contract over certificates of a PKI that exists already."""

    def __init__(self, host: HostInfo) -> None:
        self._host = host
        self._settings: Settings | None = None

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching any file."""
        return find_faults(config, has_trust_bundle=self._host.trust_bundle is not None)

    async def configure(self, config: Body) -> None:
        """Read the trusted authorities.

        Raises:
            ConfigError: the configuration has faults.
            NotReadyError: a file cannot be read.
            InvalidInputError: a file holds something else than certificates.
        """
        has_bundle = self._host.trust_bundle is not None
        self._settings = await asyncio.to_thread(
            build_settings, config, has_trust_bundle=has_bundle
        )

    async def close(self) -> None:
        """Forget the configuration."""
        self._settings = None

    async def attest(self, request: AttestationRequest) -> AttestedIdentity:
        """Check one node.

        Raises:
            InvalidInputError: a message that does not parse.
            LimitError: a message too large.
            AttestationError: a certificate that is not trusted or not fit, or no possession.
            DeniedError: the host bans this agent.
            SpireHwError: the node's certificate gives no agent ID by the template (INTERNAL), or
                the host cannot tell where the agent calls from.
        """
        settings = self._settings
        if settings is None:
            raise NotReadyError("attestor is not configured")
        leaf, intermediates = _read(settings, request.payload)
        key = _check_leaf(leaf)
        paths = _verify(leaf, intermediates, self._roots(settings), self._host.clock.now())
        if settings.verify_client_ip:
            _check_address(leaf, request.address)
        selectors = _san_selectors(leaf, self._host.trust_domain.name)
        identity = self._identity(settings, leaf, selectors)
        await request.admit(identity)
        challenge = wire.Challenge(wire.Scheme.of(key), secrets.token_bytes(wire.NONCE_BYTES))
        answer = await request.challenge(wire.encode_challenge(challenge))
        wire.verify_response(key, challenge, wire.decode_response(answer))
        return AttestedIdentity(identity, _values(leaf, paths, selectors), can_reattest=True)

    def _roots(self, settings: Settings) -> Sequence[x509.Certificate]:
        if settings.roots is not None:
            return settings.roots
        if self._host.trust_bundle is None:
            raise NotReadyError("the host does not tell its trust bundle")
        # A tainted authority may be in others' hands: what it signs admits no node.
        bundle = self._host.trust_bundle()
        tainted = {root.der for root in bundle.x509_authorities if root.tainted}
        return [root for root in bundle.root_certificates() if encode_der(root) not in tainted]

    def _identity(
        self, settings: Settings, leaf: x509.Certificate, selectors: dict[str, str]
    ) -> SpiffeId:
        trust_domain = self._host.trust_domain
        data: dict[str, Value] = {
            "PluginName": NAME,
            "TrustDomain": trust_domain.name,
            "Fingerprint": sha1_fingerprint(leaf),
            "SerialNumber": leaf.serial_number,
            "SerialNumberHex": serial_hex(leaf.serial_number),
            "Subject": _name(leaf.subject),
            "Issuer": _name(leaf.issuer),
            "DNSNames": list[str](_sans(leaf, x509.DNSName)),
            "EmailAddresses": list[str](_sans(leaf, x509.RFC822Name)),
            "URISanSelectors": dict[str, "Value"](selectors),
            "SVIDPathTrimmed": "",
        }
        if settings.roots is None:
            data["SVIDPathTrimmed"] = self._svid_path(leaf, settings.prefix)
        try:
            return settings.template.agent_id(trust_domain, data)
        except InvalidInputError as e:
            raise SpireHwError(
                f"agent_path_template does not give an agent ID for this node: {e.message}",
                kind=ErrorKind.INTERNAL,
            ) from e

    def _svid_path(self, leaf: x509.Certificate, prefix: str) -> str:
        """Return the path of the SVID that is exchanged, without its prefix."""
        found = [uri for uri in _sans(leaf, x509.UniformResourceIdentifier) if _is_spiffe(uri)]
        if len(found) != 1:
            raise _refuse("not_an_svid", "certificate is not an X509-SVID: it needs one SPIFFE ID")
        try:
            spiffe_id = SpiffeId.parse(found[0])
        except InvalidInputError as e:
            raise _refuse("not_an_svid", "certificate has a SPIFFE ID that is not valid") from e
        if not spiffe_id.is_member_of(self._host.trust_domain):
            raise _refuse("foreign_svid", "certificate is of another trust domain")
        if not spiffe_id.path.startswith(prefix):
            raise _refuse("svid_prefix", f"path of the SPIFFE ID does not begin with {prefix}")
        return spiffe_id.path.removeprefix(prefix)


def serial_hex(serial: int) -> str:
    """Return a serial number in lower-case hex with an even number of digits."""
    text = f"{serial:x}"
    return text if len(text) % 2 == 0 else f"0{text}"


def _refuse(code: str, text: str, kind: ErrorKind = _DENIED) -> AttestationError:
    return AttestationError([Finding(code, f"certificate: {text}", kind)])


def _read(
    settings: Settings, payload: bytes
) -> tuple[x509.Certificate, tuple[x509.Certificate, ...]]:
    encoded = wire.decode_payload(payload, max_certificates=settings.max_intermediates + 1)
    parsed = []
    for number, data in enumerate(encoded):
        what = f"intermediate {number}" if number else "node's own"
        try:
            certificate = load_certificate(data)
            key = public_key_of(certificate)
        except InvalidInputError as e:
            raise InvalidInputError(f"certificate: {what}: {e.message}") from e
        if isinstance(key, rsa.RSAPublicKey) and key.key_size > settings.max_rsa_key_size:
            raise InvalidInputError(
                f"certificate: {what}: RSA key has more than {settings.max_rsa_key_size} bits"
            )
        parsed.append(certificate)
    return parsed[0], tuple(parsed[1:])


def _check_leaf(leaf: x509.Certificate) -> PublicKey:
    """Refuse a certificate whose key is not meant to sign; return the key."""
    try:
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        usage = None
    if usage is None or not usage.digital_signature:
        text = "key usage digitalSignature is missing: the key may not prove possession"
        raise _refuse("key_usage", text)
    return public_key_of(leaf)


def _verify(
    leaf: x509.Certificate,
    intermediates: tuple[x509.Certificate, ...],
    roots: Sequence[x509.Certificate],
    now: datetime,
) -> list[list[x509.Certificate]]:
    """Return a path to every root there is one to; extended key usages do not matter."""
    try:
        return find_paths(leaf, intermediates, roots, now)
    except ChainError as e:
        raise _refuse("untrusted", e.message) from e


def _check_address(leaf: x509.Certificate, address: str) -> None:
    if not address:
        raise SpireHwError(
            "verify_client_ip is set, but the agent's address is not known here",
            kind=ErrorKind.INTERNAL,
        )
    caller = ipaddress.ip_address(address)
    mapped = getattr(caller, "ipv4_mapped", None)
    if not {caller, mapped} & set(_sans(leaf, x509.IPAddress)):
        raise _refuse("address", f"does not name the address {address} the agent calls from")


def _sans(leaf: x509.Certificate, kind: type[x509.GeneralName]) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [name.value for name in names if isinstance(name, kind)]


def _is_spiffe(uri: str) -> bool:
    return uri[: len(_SPIFFE_SCHEME)].lower() == _SPIFFE_SCHEME


def _name(name: x509.Name) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for field, oid in _SINGLE.items():
        found[field] = ([str(a.value) for a in name.get_attributes_for_oid(oid)] or [""])[-1]
    for field, oid in _SEVERAL.items():
        found[field] = [str(a.value) for a in name.get_attributes_for_oid(oid)]
    return found


def _san_selectors(leaf: x509.Certificate, trust_domain: str) -> dict[str, str]:
    """Return what URI SANs of the form `x509pop://<trust domain>/<key>/<value>` say."""
    found = {}
    prefix = f"x509pop://{trust_domain}/"
    for uri in _sans(leaf, x509.UniformResourceIdentifier):
        if not uri.startswith(prefix):
            continue
        path = uri.removeprefix(prefix).partition("#")[0].partition("?")[0]
        key, _, value = unquote(path).strip("/").partition("/")
        if key and value:
            found[key] = value
    return found


def _values(
    leaf: x509.Certificate, paths: list[list[x509.Certificate]], sans: dict[str, str]
) -> list[str]:
    common_name = _name(leaf.subject)["CommonName"]
    values = [f"subject:cn:{common_name}"] if common_name else []
    authorities = [certificate for path in paths for certificate in path[1:]]
    values += [f"ca:fingerprint:{f}" for f in dict.fromkeys(map(sha1_fingerprint, authorities))]
    values.append(f"serialnumber:{serial_hex(leaf.serial_number)}")
    return values + [f"san:{key}:{value}" for key, value in sans.items()]


def build(host: HostInfo) -> X509PopServer:
    """Make the plugin."""
    return X509PopServer(host)

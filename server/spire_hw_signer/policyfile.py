"""The policy file: HCL to a `Policy`, with every fault at once and its line.

    client "spiffe://infra.example/spire-server-1" {
      trust_domain = "example.org"
      server       = "s1"
      keys         = ["x509-CA-A", "x509-CA-B", "JWT-Signer-A", "JWT-Signer-B"]
      types        = { "x509-CA-*" = ["ec-p384"], "JWT-Signer-*" = ["ec-p256"] }
      ...
    }

Keys nobody knows are refused: a restriction that is misspelt would not be one.
"""

from __future__ import annotations

import hashlib
import ipaddress
import pwd
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

from pydantic import Field

from spire_hw.config import hcl
from spire_hw.config.hcl import Body, Item
from spire_hw.config.host import parse_trust_domain
from spire_hw.config.schema import GoDuration, Model, at_least, check, parsed
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.files import read_bounded
from spire_hw.key import HashAlgorithm, KeyType
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509.dnsname import check_dns_name
from spire_hw_signer.policy import (
    MAX_KEY_ID,
    ByKey,
    Client,
    Custody,
    GenerateRule,
    Import,
    JwtRule,
    Owner,
    Pattern,
    Policy,
    Rate,
    Replace,
    X509Rule,
    fits_any,
    is_key_id,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")

# The trust domain of the signer's own keys on a device: no client's.
OWN_TRUST_DOMAIN: Final = "spire-hw-signer"
MAX_FILE_BYTES: Final = 1 << 20

_PATTERN: Final = re.compile(r"[A-Za-z0-9._+*-]{1,255}", re.ASCII)
_SERVER: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_FINGERPRINT: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_UID: Final = re.compile(r"unix:[0-9]{1,10}", re.ASCII)
_OID: Final = re.compile(r"[0-2](?:\.(?:0|[1-9][0-9]{0,9})){1,20}", re.ASCII)
_RATE: Final = re.compile(r"([0-9]{1,6})/s(?: burst ([0-9]{1,6}))?", re.ASCII)
_DEFAULT_HASHES: Final = frozenset(HashAlgorithm)
_DEFAULT_RATE: Final = Rate(200.0, 400.0)
_DEFAULT_X509_KEYS: Final = ["x509-CA-*"]
_DEFAULT_JWT_KEYS: Final = ["JWT-Signer-*"]

_Ttl = Annotated[GoDuration, at_least(timedelta(seconds=1))]
_Span = Annotated[GoDuration, at_least(timedelta())]


def _parse_pattern(text: str) -> Pattern:
    if _PATTERN.fullmatch(text) is None:
        raise InvalidInputError(
            f"{text[:64]!a} is no key id: 1 to {MAX_KEY_ID} letters, digits, '.', '_', '+', '-', "
            "and '*' for any of them"
        )
    return Pattern(text)


def _parse_server(text: str) -> str:
    if _SERVER.fullmatch(text) is None:
        raise InvalidInputError("is made of 1 to 64 letters, digits, '.', '_' and '-'")
    return text


def _parse_rate(text: str) -> Rate:
    found = _RATE.fullmatch(text)
    if found is None or int(found[1]) == 0 or found[2] == "0":
        raise InvalidInputError(f'{text[:40]!a} is no rate; write it like "200/s burst 400"')
    return Rate(float(found[1]), float(found[2] or found[1]))


def _parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as e:
        raise InvalidInputError(f"{text[:64]!a} is no IP address or network: {e}") from e


def _parse_oid(text: str) -> str:
    if _OID.fullmatch(text) is None:
        raise InvalidInputError(f"{text[:64]!a} is no dotted OID")
    return text


def _parse_suffix(text: str) -> str:
    if text.startswith("*"):
        raise InvalidInputError(f"write {text[:64]!a} without the star: names below are meant too")
    return check_dns_name(text).lower()


def parse_identity(text: str) -> str:
    """Return what a client is known by, in its one form.

    Args:
        text: a SPIFFE ID, `sha256:` and a certificate's fingerprint in hex (colons may stand in
            it), or `unix:` and a user's id or name.

    Raises:
        InvalidInputError: none of these.
    """
    if text.startswith("spiffe://"):
        return SpiffeId.parse(text).text
    kind, _, rest = text.partition(":")
    if kind == "sha256":
        text = f"sha256:{rest.replace(':', '').lower()}"
        if _FINGERPRINT.fullmatch(text):
            return text
    elif kind == "unix":
        if _UID.fullmatch(text):
            return f"unix:{int(rest)}"
        try:
            return f"unix:{pwd.getpwnam(rest).pw_uid}"
        except (KeyError, ValueError) as e:
            raise InvalidInputError(f"there is no user {rest[:64]!a} here") from e
    raise InvalidInputError(
        f'{text[:80]!a} is no client: write "spiffe://...", "sha256:<certificate>" or "unix:<user>"'
    )


_Pattern = Annotated[Pattern, parsed(_parse_pattern)]


class GenerateKeys(Model):
    """`generate { }`."""

    per_key_min_interval: _Span = timedelta(hours=1)
    per_day: Annotated[int, Field(ge=1, le=10_000)] = 12


class ImportKeys(Model):
    """`import "..." { }`."""

    uri: Annotated[str, Field(min_length=1)] | None = None
    label: Annotated[str, Field(min_length=1)] | None = None


class X509Keys(Model):
    """`x509 { }`."""

    keys: list[_Pattern] = Field(default_factory=lambda: [Pattern(k) for k in _DEFAULT_X509_KEYS])
    max_ca_ttl: _Ttl
    max_svid_ttl: _Ttl
    downstream: bool = False
    max_path_length: Annotated[int, Field(ge=0, le=10)] | None = None
    dns_names: bool = True
    dns_suffixes: list[Annotated[str, parsed(_parse_suffix)]] = Field(default_factory=list)
    csr: bool = True
    extensions: list[Annotated[str, parsed(_parse_oid)]] = Field(default_factory=list)


class JwtKeys(Model):
    """`jwt { }`."""

    keys: list[_Pattern] = Field(default_factory=lambda: [Pattern(k) for k in _DEFAULT_JWT_KEYS])
    max_ttl: _Ttl
    issuer: str = ""
    audiences: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)


class ClientKeys(Model):
    """`client "..." { }`."""

    trust_domain: Annotated[TrustDomain, parsed(parse_trust_domain)]
    server: Annotated[str, parsed(_parse_server)]
    keys: Annotated[list[_Pattern], Field(min_length=1)]
    types: Body
    hash: Body = Body.empty()
    sign_rate: Body = Body.empty()
    client_rate: Annotated[Rate, parsed(_parse_rate)] | None = None
    max_in_flight: Annotated[int, Field(ge=1, le=4096)] = 256
    pss: bool = False
    generate: GenerateKeys | None = None
    replace: Literal["not-last-signer", "never"] = "not-last-signer"
    active_window: _Ttl = timedelta(minutes=10)
    delete: Literal["never"] = "never"
    retain_replaced: _Span = timedelta(hours=26)
    imports: dict[str, ImportKeys] = Field(default_factory=dict, alias="import")
    raw: bool = False
    x509: X509Keys | None = None
    jwt: JwtKeys | None = None
    addresses: list[
        Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, parsed(_parse_network)]
    ] = Field(default_factory=list)


class PolicyFile(Model):
    """The whole file."""

    client: dict[str, ClientKeys] = Field(default_factory=dict)
    revoked: list[Annotated[str, parsed(parse_identity)]] = Field(default_factory=list)
    replay_window: Annotated[GoDuration, at_least(timedelta(seconds=10))] = timedelta(minutes=2)


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        NotReadyError: it cannot be read.
        InvalidInputError: it is larger than 1 MiB.
        ConfigError: with every fault of it.
    """
    content = read_bounded(path, MAX_FILE_BYTES, "policy_file")
    try:
        return parse_policy(content.decode(), str(path))
    except UnicodeDecodeError as e:
        raise ConfigError(str(path), [ConfigFault(0, "is not UTF-8 text")]) from e


def parse_policy(text: str, file: str = "") -> Policy:
    """Return the policy a text holds.

    Raises:
        ConfigError: with every fault.
    """
    body = hcl.parse(text, file)
    raw, faults = check(body, PolicyFile)
    if raw is None:
        raise ConfigError(file or "policy", faults)
    clients: dict[str, Client] = {}
    owners: dict[Owner, str] = {}
    for label, keys in raw.client.items():
        reader = _Reader(keys, label)
        client = reader.client()
        faults += reader.faults
        if client is None:
            continue
        if client.identity in clients:
            faults.append(ConfigFault(keys.line(""), f'client "{label}" is there twice'))
        other = owners.setdefault(client.owner, label)
        if other != label:
            message = f'trust_domain and server of client "{label}" are those of "{other}"'
            faults.append(ConfigFault(keys.line("server"), message))
        clients[client.identity] = client
    faults += _named_by_own_keys(raw)
    if not raw.client:
        faults.append(ConfigFault(0, "there is no client; nobody could use this signer"))
    if faults:
        raise ConfigError(file or "policy", sorted(faults, key=lambda f: f.line))
    digest = hashlib.sha256(body.to_hcl().encode()).hexdigest()
    return Policy(clients, frozenset(raw.revoked), raw.replay_window, digest)


def _named_by_own_keys(raw: PolicyFile) -> Iterator[ConfigFault]:
    """Find clients whose names could be had from keys that are kept here."""
    held = {keys.trust_domain.name for keys in raw.client.values()}
    for label, keys in raw.client.items():
        domain = label.removeprefix("spiffe://").partition("/")[0]
        if label.startswith("spiffe://") and domain in held:
            message = (
                f'client "{label}" has a name of trust domain {domain}, whose keys this signer holds:'
                " a server that was taken over could have itself signed a certificate of that name;"
                ' give it one of a trust domain for infrastructure, or write "sha256:<certificate>"'
            )
            yield ConfigFault(keys.line(""), message)


class _Reader:
    """Makes one client of its block, and notes what is wrong with it."""

    def __init__(self, keys: ClientKeys, label: str) -> None:
        self._keys = keys
        self._label = label
        self.faults: list[ConfigFault] = []

    def _fault(self, line: int, message: str) -> None:
        self.faults.append(ConfigFault(line, f'client "{self._label}": {message}'))

    def client(self) -> Client | None:
        """Return the client, None when there are faults."""
        keys = self._keys
        identity = ""
        try:
            identity = parse_identity(self._label)
        except InvalidInputError as e:
            self._fault(keys.line(""), e.message)
        if keys.trust_domain.name == OWN_TRUST_DOMAIN:
            self._fault(
                keys.line("trust_domain"), f'trust_domain "{OWN_TRUST_DOMAIN}" is the signer\'s own'
            )
        types = self._by_key("types", keys.types, self._many(_parse_type))
        hashes = self._by_key("hash", keys.hash, self._many(_parse_hash))
        rates = self._by_key("sign_rate", keys.sign_rate, _rate_of)
        if not keys.types.items:
            self._fault(keys.line("types"), "types names no key type")
        if not (keys.raw or keys.x509 or keys.jwt):
            self._fault(keys.line(""), "nothing is signed: set x509, jwt or raw")
        imports = tuple(self._imports())
        if self.faults:
            return None
        return Client(
            identity=identity,
            owner=Owner(keys.trust_domain, keys.server),
            keys=tuple(keys.keys),
            types=types,
            hashes=hashes if hashes.rows else ByKey(((Pattern("*"), _DEFAULT_HASHES),)),
            sign_rate=ByKey((*rates.rows, (Pattern("*"), _DEFAULT_RATE))),
            client_rate=keys.client_rate,
            max_in_flight=keys.max_in_flight,
            pss=keys.pss,
            generate=_generate_rule(keys.generate),
            replace=Replace(keys.replace),
            active_window=keys.active_window,
            custody=Custody(keys.retain_replaced, imports, is_said=keys.given("retain_replaced")),
            raw=keys.raw,
            x509=_x509_rule(keys.x509),
            jwt=_jwt_rule(keys.jwt),
            addresses=tuple(keys.addresses),
        )

    def _imports(self) -> Iterator[Import]:
        for key_id, one in self._keys.imports.items():
            if not is_key_id(key_id) or not fits_any(self._keys.keys, key_id):
                self._fault(one.line(""), f"import {key_id[:64]!a} is none of the client's keys")
            elif (one.uri is None) == (one.label is None):
                self._fault(one.line(""), f'import "{key_id}" needs one of uri and label')
            else:
                yield Import(key_id, one.uri or "", one.label or "")

    def _by_key(self, name: str, body: Body, parse: Callable[[object], T]) -> ByKey[T]:
        rows: list[tuple[Pattern, T]] = []
        for item in body.items:
            if not isinstance(item, Item):
                self._fault(item.line, f"{name} holds values by key id, no blocks")
                continue
            try:
                rows.append((_parse_pattern(item.key), parse(item.value)))
            except InvalidInputError as e:
                self._fault(item.line, f"{name}: {e.message}")
        return ByKey(tuple(rows))

    @staticmethod
    def _many(parse: Callable[[str], T]) -> Callable[[object], frozenset[T]]:
        def read(value: object) -> frozenset[T]:
            texts = value if isinstance(value, list) else [value]
            if not texts or not all(isinstance(t, str) for t in texts):
                raise InvalidInputError("expected a list of names")
            return frozenset(parse(t) for t in texts if isinstance(t, str))

        return read


def _parse_type(name: str) -> KeyType:
    return KeyType.parse(name)


def _parse_hash(name: str) -> HashAlgorithm:
    for known in HashAlgorithm:
        if known.name.lower() == name:
            return known
    raise InvalidInputError(f"hash {name[:40]!a} is unknown; use sha256, sha384 or sha512")


def _rate_of(value: object) -> Rate:
    if not isinstance(value, str):
        raise InvalidInputError('expected a rate such as "200/s burst 400"')
    return _parse_rate(value)


def _generate_rule(raw: GenerateKeys | None) -> GenerateRule | None:
    return None if raw is None else GenerateRule(raw.per_key_min_interval, raw.per_day)


def _x509_rule(raw: X509Keys | None) -> X509Rule | None:
    if raw is None:
        return None
    return X509Rule(
        keys=tuple(raw.keys),
        max_ca_ttl=raw.max_ca_ttl,
        max_svid_ttl=raw.max_svid_ttl,
        downstream=raw.downstream,
        max_path_length=raw.max_path_length,
        dns_names=raw.dns_names,
        dns_suffixes=tuple(raw.dns_suffixes),
        csr=raw.csr,
        extensions=frozenset(raw.extensions),
    )


def _jwt_rule(raw: JwtKeys | None) -> JwtRule | None:
    if raw is None:
        return None
    return JwtRule(
        keys=tuple(raw.keys),
        max_ttl=raw.max_ttl,
        issuer=raw.issuer,
        audiences=frozenset(raw.audiences),
    )


def describe(policy: Policy) -> Iterator[str]:
    """Yield what an operator should hear about a policy, one text each."""
    for client in policy.clients.values():
        if client.raw:
            yield (
                f"client {client.identity} may have bare digests signed: nothing tells what they "
                "are of; set raw = false where the server sends what is to be signed"
            )
        if client.x509 is not None and client.x509.downstream:
            yield f"client {client.identity} may have CA certificates signed for other keys"

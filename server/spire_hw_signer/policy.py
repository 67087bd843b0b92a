"""Who may do what with which key: the policy as data, and the decisions it comes to (pure).

A request is checked in one order, and nothing is asked of a device before the last check: who asks
(1), the form of the request (2), the key id (3), key type, hash and padding (4), rates (5), what is
signed and for which purpose (6), replacement (7), the audit log (8), the device (9). How many
signatures are under way belongs to 5 and waits for 6, which tells what is urgent. Each refusal
has a stable word; what an honest server never runs into raises an alarm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from typing_extensions import override

from spire_hw.errors import ErrorKind
from spire_hw.key import HashAlgorithm, KeyType, SignOptions

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Network, IPv6Network

    from spire_hw.spiffeid import TrustDomain

    Network = IPv4Network | IPv6Network

T = TypeVar("T")

MAX_BATCH: Final = 64
MAX_KEY_ID: Final = 255
REQUEST_ID_BYTES: Final = 16
_KEY_ID: Final = re.compile(r"[A-Za-z0-9._+-]{1,255}", re.ASCII)
_RSA: Final = frozenset({KeyType.RSA_2048, KeyType.RSA_4096})
_MAX_CACHED: Final = 256


class Reason(Enum):
    """Why a request was refused.

    Attributes:
        word: stable, as on the wire, in the audit log and in metrics.
        step: number of the check.
        kind: what the caller is told.
        alarms: whether an honest server never runs into it.
    """

    UNKNOWN_CLIENT = ("unknown_client", 1, ErrorKind.UNAUTHENTICATED, False)
    CERTIFICATE_EXPIRED = ("certificate_expired", 1, ErrorKind.UNAUTHENTICATED, False)
    REVOKED = ("revoked", 1, ErrorKind.UNAUTHENTICATED, True)
    ADDRESS = ("address", 1, ErrorKind.UNAUTHENTICATED, True)
    NO_DEADLINE = ("no_deadline", 2, ErrorKind.INVALID_ARGUMENT, False)
    MALFORMED = ("malformed", 2, ErrorKind.INVALID_ARGUMENT, False)
    METHOD = ("method", 2, ErrorKind.PERMISSION_DENIED, False)
    REPLAY = ("request_id_reused", 2, ErrorKind.ALREADY_EXISTS, True)
    KEY_ID = ("key_id", 3, ErrorKind.PERMISSION_DENIED, True)
    KEY_TYPE = ("key_type", 4, ErrorKind.PERMISSION_DENIED, True)
    HASH = ("hash", 4, ErrorKind.PERMISSION_DENIED, True)
    PADDING = ("padding", 4, ErrorKind.PERMISSION_DENIED, True)
    DIGEST = ("digest_length", 4, ErrorKind.INVALID_ARGUMENT, True)
    NO_KEY = ("no_key", 4, ErrorKind.NOT_FOUND, True)
    RATE = ("rate", 5, ErrorKind.RESOURCE_EXHAUSTED, False)
    CLIENT_RATE = ("client_rate", 5, ErrorKind.RESOURCE_EXHAUSTED, False)
    IN_FLIGHT = ("in_flight", 5, ErrorKind.RESOURCE_EXHAUSTED, False)
    GENERATE_INTERVAL = ("generate_interval", 5, ErrorKind.RESOURCE_EXHAUSTED, False)
    GENERATE_BUDGET = ("generate_budget", 5, ErrorKind.RESOURCE_EXHAUSTED, False)
    RAW = ("raw_denied", 6, ErrorKind.PERMISSION_DENIED, True)
    PURPOSE = ("purpose", 6, ErrorKind.PERMISSION_DENIED, True)
    TBS = ("tbs_policy", 6, ErrorKind.PERMISSION_DENIED, True)
    CSR = ("csr_policy", 6, ErrorKind.PERMISSION_DENIED, True)
    JWT = ("jwt_policy", 6, ErrorKind.PERMISSION_DENIED, True)
    CLOCK = ("clock_skew", 6, ErrorKind.FAILED_PRECONDITION, True)
    REPLACE_ACTIVE = ("replace_active", 7, ErrorKind.PERMISSION_DENIED, True)
    REPLACE_NEVER = ("replace_never", 7, ErrorKind.PERMISSION_DENIED, True)

    def __init__(self, word: str, step: int, kind: ErrorKind, alarms: bool) -> None:
        self.word = word
        self.step = step
        self.kind = kind
        self.alarms = alarms


@dataclass(frozen=True, slots=True)
class Denial:
    """A refusal.

    Attributes:
        reason: why.
        text: the same in words, without the reason's own.
        retry_after_s: when the same request may be let through, 0 when time changes nothing.
    """

    reason: Reason
    text: str
    retry_after_s: float = 0.0

    @property
    def message(self) -> str:
        """Return what the caller is told: the reason's word and the text."""
        return f"{self.reason.word}: {self.text}"


class Purpose(Enum):
    """What a signature is asked for."""

    X509 = "x509"
    CSR = "csr"
    JWT = "jwt"
    RAW = "digest"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose keys they are on the device: what policy says, never what a client says."""

    trust_domain: TrustDomain
    server: str

    @override
    def __str__(self) -> str:
        return f"{self.trust_domain.name}/{self.server}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A key id, or several with `*` for any characters."""

    text: str
    _match: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = (re.escape(part) for part in self.text.split("*"))
        object.__setattr__(self, "_match", re.compile(".*".join(parts)))

    def fits(self, key_id: str) -> bool:
        """Tell whether a key id fits."""
        return self._match.fullmatch(key_id) is not None


@dataclass(frozen=True, slots=True)
class ByKey(Generic[T]):
    """Values by key id pattern; the first pattern that fits counts."""

    rows: tuple[tuple[Pattern, T], ...]

    def find(self, key_id: str) -> T | None:
        """Return the value for a key id, None when no pattern fits."""
        return next((value for pattern, value in self.rows if pattern.fits(key_id)), None)


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket: so many a second, so many at once."""

    per_second: float
    burst: float


@dataclass(frozen=True, slots=True)
class GenerateRule:
    """How often keys may be made.

    Attributes:
        per_key_min_interval: between two generations of one key id.
        per_day: of all key ids, in any 24 hours.
    """

    per_key_min_interval: timedelta
    per_day: int


class Replace(Enum):
    """Whether a key that exists may be made anew."""

    NOT_LAST_SIGNER = "not-last-signer"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class X509Rule:
    """What certificates a client's keys may sign.

    Attributes:
        keys: key ids that sign certificates.
        max_ca_ttl: how far ahead a CA certificate may end.
        max_svid_ttl: how far ahead any other certificate may end.
        downstream: whether CA certificates for other keys are signed.
        max_path_length: the path length those have to have at most, None when they need none.
        dns_names: whether SVIDs may have DNS names.
        dns_suffixes: domains, lower-case, in or below which those have to be; empty for anywhere.
        csr: whether requests for the client's own keys are signed.
        extensions: dotted OIDs of further extensions that are let through, not critical.
    """

    keys: tuple[Pattern, ...]
    max_ca_ttl: timedelta
    max_svid_ttl: timedelta
    downstream: bool = False
    max_path_length: int | None = None
    dns_names: bool = True
    dns_suffixes: tuple[str, ...] = ()
    csr: bool = True
    extensions: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class JwtRule:
    """What tokens a client's keys may sign.

    Attributes:
        keys: key ids that sign tokens.
        max_ttl: how far ahead a token may expire.
        issuer: the `iss` a token has to have, "" when it may have none.
        audiences: the only ones there may be; empty for any.
    """

    keys: tuple[Pattern, ...]
    max_ttl: timedelta
    issuer: str = ""
    audiences: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Import:
    """A key that somebody else made on the device, named by one of its URI and its label."""

    key_id: str
    uri: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class Custody:
    """What the KeyManager of an owner is told besides whose keys it holds.

    Attributes:
        retain: how long replaced keys are kept, None where nothing says.
        is_said: whether somebody wrote that down; what is merely usual is not insisted on.
        imports: keys it uses without having made them.
    """

    retain: timedelta | None = None
    imports: tuple[Import, ...] = ()
    is_said: bool = False


@dataclass(frozen=True, slots=True)
class KeyRule:
    """What holds for one key id.

    Attributes:
        name: the pattern of the client's keys that it fits, for counters.
        types: types it may have.
        hashes: hashes it may sign.
        rate: how often it may sign.
    """

    name: str
    types: frozenset[KeyType]
    hashes: frozenset[HashAlgorithm]
    rate: Rate | None


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """What one client may do.

    Attributes:
        identity: `spiffe://...`, `sha256:<hex of the certificate>` or `unix:<uid>`.
        owner: whose keys it uses.
        keys: key ids it may use.
        types: key types by key id.
        hashes: hashes by key id.
        pss: whether RSA-PSS may be asked for.
        sign_rate: signatures by key id.
        client_rate: signatures with all keys together, None for no bound of their own.
        max_in_flight: signatures under way at once, a part of them only for what is urgent.
        generate: None when keys are not made for it.
        replace: whether keys are replaced.
        active_window: a key that signed within it is not replaced.
        custody: how long replaced keys are kept, and keys made elsewhere.
        raw: whether bare digests are signed.
        x509: None when certificates are not signed.
        jwt: None when tokens are not signed.
        addresses: where it may call from; empty for anywhere.
    """

    identity: str
    owner: Owner
    keys: tuple[Pattern, ...]
    types: ByKey[frozenset[KeyType]]
    hashes: ByKey[frozenset[HashAlgorithm]]
    sign_rate: ByKey[Rate]
    client_rate: Rate | None = None
    max_in_flight: int = 256
    pss: bool = False
    generate: GenerateRule | None = None
    replace: Replace = Replace.NOT_LAST_SIGNER
    active_window: timedelta = timedelta(minutes=10)
    custody: Custody = Custody(timedelta(hours=26))
    raw: bool = False
    x509: X509Rule | None = None
    jwt: JwtRule | None = None
    addresses: tuple[Network, ...] = ()
    _rules: dict[str, KeyRule] = field(default_factory=dict, repr=False)

    def rule(self, key_id: str) -> KeyRule | None:
        """Return what holds for a key id, None when it is not one of the client's."""
        found = self._rules.get(key_id)
        if found is not None:
            return found
        fitting = next((pattern for pattern in self.keys if pattern.fits(key_id)), None)
        if fitting is None:
            return None
        found = KeyRule(
            fitting.text,
            self.types.find(key_id) or frozenset(),
            self.hashes.find(key_id) or frozenset(),
            self.sign_rate.find(key_id),
        )
        if len(self._rules) < _MAX_CACHED:
            self._rules[key_id] = found
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """All of a policy file.

    Attributes:
        clients: by identity.
        revoked: identities that are let in no more, whatever else says so.
        replay_window: how long request ids of signatures are remembered.
        hash: lower-case hex SHA-256 of its canonical text.
    """

    clients: dict[str, Client]
    revoked: frozenset[str]
    replay_window: timedelta
    hash: str

    def owners(self) -> dict[Owner, Client]:
        """Return whose keys are used, each with the client they belong to."""
        return {client.owner: client for client in self.clients.values()}

    def admit(
        self, identities: Iterable[str], address: Network | None
    ) -> tuple[Client | None, Denial | None]:
        """Return the client that has one of the identities, or why there is none.

        Args:
            identities: what a caller has proved to be, the most telling first.
            address: where it calls from, as a network of one; None on a unix socket.
        """
        proved = tuple(identities)
        for identity in proved:
            if identity in self.revoked:
                return None, Denial(Reason.REVOKED, "the client was revoked")
        client = next((self.clients[i] for i in proved if i in self.clients), None)
        if client is None:
            return None, Denial(Reason.UNKNOWN_CLIENT, "the policy has no such client")
        if address is not None and client.addresses and not _within(address, client.addresses):
            return None, Denial(Reason.ADDRESS, "the client may not call from this address")
        return client, None


def _within(address: Network, networks: Iterable[Network]) -> bool:
    return any(
        address.version == network.version and address.subnet_of(network)  # type: ignore[arg-type]  # the versions are the same
        for network in networks
    )


def fits_any(patterns: Iterable[Pattern], key_id: str) -> bool:
    """Tell whether one of the patterns fits a key id."""
    return any(pattern.fits(key_id) for pattern in patterns)


def soonest(denials: Iterable[Denial | None]) -> Denial | None:
    """Return the first of several denials of one request, with the time when none is left of them."""
    found = [denial for denial in denials if denial is not None]
    if not found:
        return None
    waits = [denial.retry_after_s for denial in found]
    return replace(found[0], retry_after_s=max(waits) if all(waits) else 0.0)


def is_key_id(text: str) -> bool:
    """Tell whether a text may be a key id: 1 to 255 of `A-Za-z0-9._+-`."""
    return _KEY_ID.fullmatch(text) is not None


def check_form(request_id: bytes, key_id: str) -> Denial | None:
    """Check request id and key id for their form (2)."""
    if len(request_id) != REQUEST_ID_BYTES:
        return Denial(Reason.MALFORMED, f"a request id has {REQUEST_ID_BYTES} bytes")
    if not is_key_id(key_id):
        text = "a key id is made of 1 to 255 letters, digits, '.', '_', '+' and '-'"
        return Denial(Reason.MALFORMED, text)
    return None


# One text for all: who asks does not learn whether the key exists.
FOREIGN_KEY: Final = Denial(Reason.KEY_ID, "the client may not use this key id")


def check_type(rule: KeyRule, key_type: KeyType) -> Denial | None:
    """Check the type of a key (4)."""
    if key_type in rule.types:
        return None
    return Denial(Reason.KEY_TYPE, f"key type {key_type.config_name} is not allowed for this key")


def check_options(
    client: Client, rule: KeyRule, key_type: KeyType, options: SignOptions, digest_bytes: int
) -> Denial | None:
    """Check hash, padding and the length of what is signed (4)."""
    if options.hash not in rule.hashes:
        text = f"hash {options.hash.name.lower()} is not allowed for this key"
        return Denial(Reason.HASH, text)
    if options.pss and key_type not in _RSA:
        return Denial(Reason.MALFORMED, "PSS options do not fit an EC key")
    if options.pss and not client.pss:
        return Denial(Reason.PADDING, "RSA-PSS is not allowed for this client")
    if digest_bytes != options.hash.digest_size:
        text = f"digest is {digest_bytes} bytes, its hash has {options.hash.digest_size}"
        return Denial(Reason.DIGEST, text)
    return None


def check_purpose(client: Client, key_id: str, purpose: Purpose) -> Denial | None:
    """Check that a key may be used for a purpose at all (6); its content is checked elsewhere."""
    if purpose is Purpose.RAW:
        if client.raw:
            return None
        text = "bare digests are not signed for this client; send what is to be signed"
        return Denial(Reason.RAW, text)
    rule = client.jwt if purpose is Purpose.JWT else client.x509
    allowed = rule is not None and fits_any(rule.keys, key_id)
    if purpose is Purpose.CSR and client.x509 is not None:
        allowed = allowed and client.x509.csr
    return None if allowed else Denial(Reason.PURPOSE, f"the key is not for {purpose.value}")


def check_replace(client: Client, *, exists: bool, idle_s: float | None) -> Denial | None:
    """Check whether a key may be made anew (7).

    Args:
        client: whose key it is.
        exists: whether there is one already.
        idle_s: seconds since it signed last, None when it never did.
    """
    if not exists:
        return None
    if client.replace is Replace.NEVER:
        return Denial(Reason.REPLACE_NEVER, "keys of this client are not replaced")
    window_s = client.active_window.total_seconds()
    if idle_s is not None and idle_s < window_s:
        text = (
            f"the key is in use: it signed {idle_s:.0f} s ago, and is not replaced within"
            f" {window_s:.0f} s of that (active_window)"
        )
        return Denial(Reason.REPLACE_ACTIVE, text, window_s - idle_s)
    return None

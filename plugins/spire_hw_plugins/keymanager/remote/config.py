"""What an operator says about signers, and what it comes to.

`Config` is the plugin_data as written; `Settings` is what the key manager works with.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field, StringConstraints

from spire_hw.config.duration import parse_duration
from spire_hw.config.schema import GoDuration, Model, at_least, check
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.spiffeid import SpiffeId
from spire_hw.x509.dnsname import check_dns_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.config.hcl import Body

DEFAULT_PORT: Final = 8445
_MAX_SIGNERS: Final = 16
_MAX_PORT: Final = 65535
_Text = Annotated[str, StringConstraints(min_length=1)]
_Time = Annotated[GoDuration, at_least(timedelta(milliseconds=100))]


class Config(Model):
    """The plugin_data.

    Attributes:
        addresses: `host:port` of each signer, in order of preference; they share a token or clones.
        socket: unix socket of a signer on this host, instead of addresses.
        signer_ca: PEM file of the CA that signers' certificates are signed by.
        signer_id: SPIFFE ID in signers' certificates; or
        signer_name: DNS name in them.
        cert: PEM file of our certificate, with its intermediates.
        key: PEM file of its private key.
        timeout: for a signature, retries included.
        generate_timeout: for a new key, retries included.
        start_timeout: how long all signers may be away at start.
        purposes: send what is signed, not only its digest.
        require_witness: stop signing where a signer's audit log went back; without it there is an
            alarm alone.
        accept_listed_keys: take the keys that a signer lists although this server has no note of
            them; take it out again after one start.
        accept_changed_keys: key ids whose public key may differ from the one on note, once.
        accept_key_loss: go on although keys are gone; take it out again after one start.
        accept_log: signers, by address or socket, whose log may go on from where it is.
    """

    addresses: Annotated[list[_Text], Field(max_length=_MAX_SIGNERS)] = Field(default_factory=list)
    socket: _Text | None = None
    signer_ca: _Text | None = None
    signer_id: _Text | None = None
    signer_name: _Text | None = None
    cert: _Text | None = None
    key: _Text | None = None
    timeout: _Time = parse_duration("10s")
    generate_timeout: _Time = parse_duration("2m")
    start_timeout: _Time = parse_duration("30s")
    purposes: bool = True
    require_witness: bool = False
    accept_listed_keys: bool = False
    accept_changed_keys: list[str] = Field(default_factory=list)
    accept_key_loss: bool = False
    accept_log: list[str] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Whom to believe and what to show on the way to a signer.

    Attributes:
        signer_id: who a signer has to be, None when it is known by name.
        signer_name: its DNS name, "" when it is known by ID.
        ca: certificates its certificate leads to.
        cert: our chain, leaf first.
        key: the leaf's private key.
    """

    signer_id: SpiffeId | None
    signer_name: str
    ca: Path
    cert: Path
    key: Path

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """Return the files to watch."""
        return self.ca, self.cert, self.key


@dataclass(frozen=True, slots=True)
class Address:
    """Where a signer listens: a host and port, or a socket on this machine."""

    host: str = ""
    port: int = 0
    socket: str = ""

    @property
    def name(self) -> str:
        """Return what it is called in messages and in the configuration."""
        if self.socket:
            return self.socket
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Accepted:
    """What an operator has decided to put up with.

    Attributes:
        listed_keys: keys without a note.
        changed_keys: ids whose key may have changed.
        key_loss: keys may be gone.
        logs: signers whose log may start over.
    """

    listed_keys: bool = False
    changed_keys: frozenset[str] = frozenset()
    key_loss: bool = False
    logs: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Return the settings that say so, as they are written in the configuration."""
        said = {
            "accept_listed_keys": self.listed_keys,
            "accept_changed_keys": self.changed_keys,
            "accept_key_loss": self.key_loss,
            "accept_log": self.logs,
        }
        return tuple(name for name, value in said.items() if value)


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration that holds together; times are in seconds.

    Attributes:
        addresses: in order of preference, one at least.
        tls: None for a socket.
    """

    addresses: tuple[Address, ...]
    tls: TlsFiles | None
    timeout_s: float
    generate_timeout_s: float
    start_timeout_s: float
    purposes: bool
    require_witness: bool
    accepted: Accepted


def find_faults(body: Body) -> list[ConfigFault]:
    """Return what is wrong with a configuration, without touching file or network."""
    raw, found = check(body, Config)
    return found if raw is None else list(_conflicts(raw))


def read_settings(body: Body) -> Settings:
    """Return the settings of a configuration.

    Raises:
        ConfigError: it has faults.
    """
    raw, found = check(body, Config)
    if raw is not None:
        found = list(_conflicts(raw))
    if raw is None or found:
        raise ConfigError(body.file or "configuration", found)
    tls = None
    if raw.socket is None:
        files = (Path(text or "") for text in (raw.signer_ca, raw.cert, raw.key))
        signer_id = None if raw.signer_id is None else SpiffeId.parse(raw.signer_id)
        tls = TlsFiles(signer_id, raw.signer_name or "", *files)
        addresses = tuple(parse_address(text) for text in raw.addresses)
    else:
        addresses = (Address(socket=raw.socket),)
    return Settings(
        addresses=addresses,
        tls=tls,
        timeout_s=raw.timeout.total_seconds(),
        generate_timeout_s=raw.generate_timeout.total_seconds(),
        start_timeout_s=raw.start_timeout.total_seconds(),
        purposes=raw.purposes,
        require_witness=raw.require_witness,
        accepted=Accepted(
            raw.accept_listed_keys,
            frozenset(raw.accept_changed_keys),
            raw.accept_key_loss,
            frozenset(raw.accept_log),
        ),
    )


def parse_address(text: str) -> Address:
    """Return `host`, `host:port` or `[ipv6]:port` as an address; the port is 8445 when left out.

    Raises:
        InvalidInputError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    bare = host.removeprefix("[").removesuffix("]")
    bracketed = host != bare and host == f"[{bare}]"
    is_number = port.isascii() and port.isdigit() and 1 <= int(port) <= _MAX_PORT
    if not bare or not is_number or (":" in bare) != bracketed or not bare.isprintable():
        raise InvalidInputError(f'"{text}" is not an address such as "signer.example:8445"')
    return Address(bare, int(port))


def _conflicts(raw: Config) -> Iterator[ConfigFault]:
    files = {"signer_ca": raw.signer_ca, "cert": raw.cert, "key": raw.key}
    if raw.socket is not None:
        names = {"signer_id": raw.signer_id, "signer_name": raw.signer_name}
        yield from _socket_conflicts(raw, files | names)
        return
    yield from _address_conflicts(raw)
    for name, value in files.items():
        if value is None:
            yield ConfigFault(raw.line("addresses"), f"{name} is required with addresses")
    yield from _identity_conflicts(raw)


def _identity_conflicts(raw: Config) -> Iterator[ConfigFault]:
    if (raw.signer_id is None) == (raw.signer_name is None):
        yield ConfigFault(
            raw.line("signer_id"), "exactly one of signer_id and signer_name is needed"
        )
    try:
        if raw.signer_id is not None:
            SpiffeId.parse(raw.signer_id)
    except InvalidInputError as e:
        yield ConfigFault(raw.line("signer_id"), f"signer_id: {e.message}")
    try:
        if raw.signer_name is not None:
            check_dns_name(raw.signer_name)
    except InvalidInputError as e:
        yield ConfigFault(raw.line("signer_name"), f"signer_name: {e.message}")
    if (raw.signer_name or "").startswith("*"):
        yield ConfigFault(raw.line("signer_name"), "signer_name: a wildcard is no signer's name")


def _address_conflicts(raw: Config) -> Iterator[ConfigFault]:
    if not raw.addresses:
        yield ConfigFault(raw.line("addresses"), "addresses or socket is required")
    seen = set()
    for text in raw.addresses:
        try:
            address = parse_address(text)
        except InvalidInputError as e:
            yield ConfigFault(raw.line("addresses"), f"addresses: {e.message}")
            continue
        if address in seen:
            yield ConfigFault(raw.line("addresses"), f'addresses: "{text}" is given twice')
        seen.add(address)
    for name in sorted(set(raw.accept_log) - {address.name for address in seen}):
        yield ConfigFault(raw.line("accept_log"), f'accept_log: "{name}" is none of the signers')


def _socket_conflicts(raw: Config, files: dict[str, str | None]) -> Iterator[ConfigFault]:
    if raw.addresses:
        yield ConfigFault(raw.line("socket"), "addresses and socket exclude each other")
    if not (raw.socket or "").startswith("/"):
        yield ConfigFault(raw.line("socket"), "socket must be an absolute path")
    for name, value in files.items():
        if value is not None:
            text = f"{name} does not fit a socket, which knows its callers by user"
            yield ConfigFault(raw.line(name), text)

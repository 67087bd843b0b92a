"""What the configuration files of server and agent share: reading, overrides, logs, health."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping  # noqa: TC003 - as in the models
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import AfterValidator, Field

from spire_hw.config import hcl
from spire_hw.config.duration import format_duration
from spire_hw.config.hcl import Block, Body, Integer, Item
from spire_hw.config.schema import Model
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.log import Format, Level, LogSettings
from spire_hw.spiffeid import TrustDomain

T = TypeVar("T")

_MAX_SOCKET_PATH_BYTES: Final = 107  # struct sockaddr_un keeps one for the end

Port = Annotated[int, Field(ge=0, le=65535)]
# A command line flag's value for a key of the file.
Override = str | int | bool


class LogKeys(Model):
    """The log keys of both hosts."""

    log_file: str = ""
    log_level: str = "INFO"
    log_format: str = "text"
    log_source_location: bool = False


def _http_path(text: str) -> str:
    if not text.startswith("/") or not text.isprintable():
        raise InvalidInputError('must start with "/"')
    return text


class HealthChecks(Model):
    """`health_checks { }`: the HTTP listener for probes."""

    listener_enabled: bool = False
    bind_address: str = "localhost"
    bind_port: Port = 80
    live_path: Annotated[str, AfterValidator(_http_path)] = "/live"
    ready_path: Annotated[str, AfterValidator(_http_path)] = "/ready"


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Where probes are answered over HTTP."""

    bind_address: str
    bind_port: int
    live_path: str
    ready_path: str


class Collector:
    """Gathers faults while settings are built, so that all of them are reported together."""

    def __init__(self, faults: list[ConfigFault]) -> None:
        self.faults = faults

    def add(self, line: int, message: str) -> None:
        """Note a fault."""
        self.faults.append(ConfigFault(line, message))

    def read(self, raw: Model, key: str, parse: Callable[[str], T], default: T) -> T:
        """Return parse(value of key), or the default and a fault."""
        text = str(getattr(raw, key))
        try:
            return parse(text)
        except InvalidInputError as e:
            self.add(raw.line(key), f'"{key}": {e.message}')
            return default

    def duration(
        self, raw: Model, key: str, default: timedelta, *, least: timedelta = timedelta(seconds=1)
    ) -> timedelta:
        """Return a duration that must be at least `least` when it is given."""
        value: timedelta | None = getattr(raw, key)
        if value is None:
            return default
        if value < least:
            self.add(
                raw.line(key),
                f'"{key}": {format_duration(value)} is too short;'
                f" it must be at least {format_duration(least)}",
            )
            return default
        return value

    def check(self, file: str) -> None:
        """Raise when there were faults.

        Raises:
            ConfigError: with all of them, ordered by line.
        """
        if self.faults:
            raise ConfigError(file or "configuration", sorted(self.faults, key=lambda f: f.line))


def read_body(path: Path, *, expand_env: bool, environ: Mapping[str, str]) -> Body:
    """Read a configuration file.

    Args:
        path: the file.
        expand_env: put environment variables into the text first (`-expandEnv`).
        environ: where they come from.

    Raises:
        ConfigError: it cannot be read or does not parse.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(4 * hcl.MAX_CHARS + 1)
        text = raw.decode()
    except FileNotFoundError as e:
        fault = ConfigFault(0, "no such file; name another one with -config")
        raise ConfigError(str(path), [fault]) from e
    except OSError as e:
        raise ConfigError(str(path), [ConfigFault(0, f"cannot be read: {e.strerror}")]) from e
    except UnicodeDecodeError as e:
        raise ConfigError(str(path), [ConfigFault(0, "is not UTF-8 text")]) from e
    return hcl.parse(hcl.expand_env(text, environ) if expand_env else text, str(path))


def override(body: Body, section: str, values: Mapping[str, Override]) -> Body:
    """Return the body with values of the command line put last in a section, so that they win."""
    if not values:
        return body
    items = tuple(
        Item(k, Integer(v) if isinstance(v, int) and not isinstance(v, bool) else v)
        for k, v in values.items()
    )
    return Body((*body.items, Block((section,), Body(items))), body.line, body.file)


def parse_trust_domain(text: str) -> TrustDomain:
    """Return the trust domain for its name, also when written as its SPIFFE ID.

    Raises:
        SpiffeIdError: not a trust domain name.
    """
    return TrustDomain.parse(text.removeprefix("spiffe://"))


def parse_ip(text: str) -> str:
    """Return an IP address as it is.

    Raises:
        InvalidInputError: not an address.
    """
    try:
        ipaddress.ip_address(text)
    except ValueError as e:
        raise InvalidInputError(f'"{text[:64]}" is not an IP address') from e
    return text


def parse_socket_path(text: str) -> Path:
    """Return the path of a unix socket.

    Raises:
        InvalidInputError: empty, or longer than the kernel takes.
    """
    if not text:
        raise InvalidInputError("must not be empty")
    if len(text.encode()) > _MAX_SOCKET_PATH_BYTES:
        raise InvalidInputError(f"a socket path takes at most {_MAX_SOCKET_PATH_BYTES} bytes")
    return Path(text)


def log_settings(raw: LogKeys, collect: Collector) -> LogSettings:
    """Return the log settings of a host section."""
    return LogSettings(
        level=collect.read(raw, "log_level", Level.parse, Level.INFO),
        format=collect.read(raw, "log_format", _parse_format, Format.TEXT),
        file=Path(raw.log_file) if raw.log_file else None,
        source_location=raw.log_source_location,
    )


def health_settings(raw: HealthChecks | None) -> HealthSettings | None:
    """Return where probes are answered, None when the listener is off."""
    if raw is None or not raw.listener_enabled:
        return None
    return HealthSettings(raw.bind_address, raw.bind_port, raw.live_path, raw.ready_path)


def _parse_format(text: str) -> Format:
    for known in Format:
        if text.lower() == known.value:
            return known
    raise InvalidInputError(f'log format "{text[:40]}" is unknown; use text or json')

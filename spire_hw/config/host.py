"""What the configuration files of server and agent share: reading, overrides, logs, health."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Mapping  # noqa: TC003 - as in the models
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import Field

from spire_hw.config import hcl
from spire_hw.config.hcl import Block, Body, Integer, Item
from spire_hw.config.schema import Model, parsed
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.log import Format, Level, LogSettings
from spire_hw.spiffeid import TrustDomain

_MAX_SOCKET_PATH_BYTES: Final = 107  # struct sockaddr_un keeps one for the end

Port = Annotated[int, Field(ge=0, le=65535)]
# A command line flag's value for a key of the file.
Override = str | int | bool
_Settings = TypeVar("_Settings")


def _parse_format(text: str) -> Format:
    for known in Format:
        if text.lower() == known.value:
            return known
    raise InvalidInputError(f'log format "{text[:40]}" is unknown; use text or json')


class LogKeys(Model):
    """The log keys of both hosts."""

    log_file: str = ""
    log_level: Annotated[Level, parsed(Level.parse)] = Level.INFO
    log_format: Annotated[Format, parsed(_parse_format)] = Format.TEXT
    log_source_location: bool = False

    def log_settings(self) -> LogSettings:
        """Return what `spire_hw.log.configure` takes."""
        file = Path(self.log_file) if self.log_file else None
        return LogSettings(self.log_level, self.log_format, file, self.log_source_location)


def _http_path(text: str) -> str:
    if not text.startswith("/") or not text.isprintable():
        raise InvalidInputError('must start with "/"')
    return text


class HealthChecks(Model):
    """`health_checks { }`: the HTTP listener for probes."""

    listener_enabled: bool = False
    bind_address: str = "localhost"
    bind_port: Port = 80
    live_path: Annotated[str, parsed(_http_path)] = "/live"
    ready_path: Annotated[str, parsed(_http_path)] = "/ready"


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Where probes are answered over HTTP."""

    bind_address: str
    bind_port: int
    live_path: str
    ready_path: str


def load(
    build: Callable[[Body, Mapping[str, Override]], _Settings],
    path: Path,
    *,
    expand_env: bool = False,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Override] | None = None,
) -> _Settings:
    """Read and check a configuration file.

    Args:
        build: checks what was read.
        path: the file, HCL 1 or JSON.
        expand_env: put environment variables into its text first.
        environ: the variables; those of the process without it.
        overrides: keys of the program's section given on the command line; they win over the file.

    Raises:
        ConfigError: with every fault of the file; plugins check their own data later.
    """
    body = read_body(
        path, expand_env=expand_env, environ=os.environ if environ is None else environ
    )
    return build(body, overrides or {})


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


def health_settings(raw: HealthChecks | None) -> HealthSettings | None:
    """Return where probes are answered, None when the listener is off."""
    if raw is None or not raw.listener_enabled:
        return None
    return HealthSettings(raw.bind_address, raw.bind_port, raw.live_path, raw.ready_path)

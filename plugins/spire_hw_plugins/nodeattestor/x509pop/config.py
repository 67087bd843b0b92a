"""What an operator says about `x509pop` on the server, and what it comes to.

`ServerConfig` is the plugin_data as written; `Settings` is what the server half works with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.config.schema import Model, check
from spire_hw.errors import ConfigError, ConfigFault, InvalidInputError
from spire_hw.files import parse_file
from spire_hw.x509.certificate import load_pem
from spire_hw_plugins.nodeattestor.pathtemplate import PathTemplate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cryptography import x509

    from spire_hw.config.hcl import Body

EXTERNAL_PKI: Final = "external_pki"
SPIFFE: Final = "spiffe"
_MAX_INTERMEDIATES: Final = 9
_MAX_BUNDLE_BYTES: Final = 4 << 20
_DEFAULT_PREFIX: Final = "/spire-exchange"
# As upstream reads it, and as upstream's documentation calls it.
_PREFIXES: Final = ("spiffe_prefix", "svid_prefix")
_TEMPLATES: Final = {
    EXTERNAL_PKI: "/{{ .PluginName }}/{{ .Fingerprint }}",
    SPIFFE: "/{{ .PluginName }}/{{ .SVIDPathTrimmed }}",
}


class ServerConfig(Model):
    """The plugin_data of NodeAttestor `x509pop` on a server.

    Attributes:
        mode: `external_pki`, the default, or `spiffe`.
        ca_bundle_path: PEM file of trusted authorities.
        ca_bundle_paths: several such files, instead.
        spiffe_prefix: what the path of an SVID that is exchanged begins with.
        svid_prefix: the same; upstream's documentation calls it this.
        agent_path_template: path of the agent's ID below `/spire/agent`.
        max_intermediates: how many certificates may come beside the node's own.
        max_rsa_key_size: largest RSA key, in bits; above 4096 nothing is accepted anyway.
        verify_client_ip: the certificate must name the address the agent calls from.
    """

    mode: str = EXTERNAL_PKI
    ca_bundle_path: str = ""
    ca_bundle_paths: list[str] | None = None
    spiffe_prefix: str | None = None
    svid_prefix: str | None = None
    agent_path_template: str = ""
    max_intermediates: int = 4
    max_rsa_key_size: int = 8192
    verify_client_ip: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server half works with.

    Attributes:
        roots: trusted authorities, None for those of the server's own trust domain.
        prefix: with a slash at its end; what an exchanged SVID's path begins with.
        template: makes the agent's path.
        max_intermediates: see `ServerConfig`, as the two below.
    """

    roots: tuple[x509.Certificate, ...] | None
    prefix: str
    template: PathTemplate
    max_intermediates: int
    max_rsa_key_size: int
    verify_client_ip: bool


def find_faults(body: Body, *, has_trust_bundle: bool) -> list[ConfigFault]:
    """Return what is wrong with a configuration, without touching any file.

    Args:
        body: the plugin_data.
        has_trust_bundle: whether the host tells its own trust bundle.
    """
    raw, found = check(body, ServerConfig)
    return found if raw is None else sorted(_conflicts(raw, has_trust_bundle), key=_line)


def build_settings(body: Body, *, has_trust_bundle: bool) -> Settings:
    """Read the authorities and return the settings.

    Raises:
        ConfigError: the configuration has faults.
        NotReadyError: a file cannot be read.
        InvalidInputError: a file holds something else than certificates.
    """
    raw, found = check(body, ServerConfig)
    if raw is not None:
        found = sorted(_conflicts(raw, has_trust_bundle), key=_line)
    if raw is None or found:
        raise ConfigError(body.file or "configuration", found)
    roots = None if raw.mode == SPIFFE else tuple(_load(_paths(raw)))
    return Settings(
        roots=roots,
        prefix=_prefix(raw).rstrip("/") + "/",
        template=PathTemplate.parse(raw.agent_path_template or _TEMPLATES[raw.mode]),
        max_intermediates=raw.max_intermediates,
        max_rsa_key_size=raw.max_rsa_key_size,
        verify_client_ip=raw.verify_client_ip,
    )


def _line(fault: ConfigFault) -> int:
    return fault.line


def _paths(raw: ServerConfig) -> list[str]:
    return [raw.ca_bundle_path] if raw.ca_bundle_path else list(raw.ca_bundle_paths or ())


def _prefix(raw: ServerConfig) -> str:
    given = [getattr(raw, name) for name in _PREFIXES if getattr(raw, name) is not None]
    return str(given[0]) if given else _DEFAULT_PREFIX


def _conflicts(raw: ServerConfig, has_trust_bundle: bool) -> Iterator[ConfigFault]:
    if raw.mode == SPIFFE:
        yield from _spiffe_conflicts(raw, has_trust_bundle)
    elif raw.mode == EXTERNAL_PKI:
        yield from _external_conflicts(raw)
    else:
        text = f"mode {raw.mode!r} is unknown; use {EXTERNAL_PKI} or {SPIFFE}"
        yield ConfigFault(raw.line("mode"), text)
    if not 0 < raw.max_intermediates <= _MAX_INTERMEDIATES:
        text = f"max_intermediates must be 1 to {_MAX_INTERMEDIATES}"
        yield ConfigFault(raw.line("max_intermediates"), text)
    if raw.max_rsa_key_size <= 0:
        text = "max_rsa_key_size must be greater than 0"
        yield ConfigFault(raw.line("max_rsa_key_size"), text)
    try:
        PathTemplate.parse(raw.agent_path_template)
    except InvalidInputError as e:
        text = f"agent_path_template: {e.message}"
        yield ConfigFault(raw.line("agent_path_template"), text)


def _external_conflicts(raw: ServerConfig) -> Iterator[ConfigFault]:
    if not _paths(raw):
        yield ConfigFault(raw.line(""), "one of ca_bundle_path and ca_bundle_paths is required")
    if raw.ca_bundle_path and raw.ca_bundle_paths:
        text = "set ca_bundle_path or ca_bundle_paths, not both"
        yield ConfigFault(raw.line("ca_bundle_paths"), text)
    for name in _PREFIXES:
        if getattr(raw, name) is not None:
            yield ConfigFault(raw.line(name), f"{name} is for mode {SPIFFE}")


def _spiffe_conflicts(raw: ServerConfig, has_trust_bundle: bool) -> Iterator[ConfigFault]:
    if not has_trust_bundle:
        text = f"mode {SPIFFE} needs a host that tells its trust bundle"
        yield ConfigFault(raw.line("mode"), text)
    for name in ("ca_bundle_path", "ca_bundle_paths"):
        if getattr(raw, name):
            yield ConfigFault(raw.line(name), f"{name} cannot be used with mode {SPIFFE}")
    given = [name for name in _PREFIXES if getattr(raw, name) is not None]
    if len(given) > 1:
        text = f"{' and '.join(_PREFIXES)} are the same; set one"
        yield ConfigFault(raw.line(given[1]), text)
    elif _prefix(raw) and not _prefix(raw).startswith("/"):
        yield ConfigFault(raw.line(given[0]), f"{given[0]} must start with a slash")


def _load(paths: list[str]) -> Iterator[x509.Certificate]:
    for path in paths:
        yield from parse_file(Path(path), _MAX_BUNDLE_BYTES, load_pem, "trusted authorities")

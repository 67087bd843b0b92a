"""The section `telemetry { }` of the configuration files, upstream's keys."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final

from pydantic import Field

from spire_hw.config.host import Port
from spire_hw.config.schema import Model, parsed
from spire_hw.errors import ConfigFault, InvalidInputError
from spire_hw.spiffeid import SpiffeId

_LOCAL_HOST: Final = "localhost"
_PREFIX: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,63}")


def _prefix(text: str) -> str:
    if text and _PREFIX.fullmatch(text) is None:
        raise InvalidInputError("takes letters, digits, _ and :, at most 64, no digit first")
    return text


class TlsKeys(Model):
    """`tls { }` of the exporter."""

    authorized_spiffe_ids: list[Annotated[SpiffeId, parsed(SpiffeId.parse)]] = Field(
        default_factory=list
    )
    cert_file: str = ""
    client_ca_file: str = ""
    key_file: str = ""
    use_spire_svid: bool = False


class PrometheusKeys(Model):
    """`Prometheus { }`."""

    host: str = _LOCAL_HOST
    port: Port
    tls: TlsKeys | None = None


class InMemKeys(Model):
    """`InMem { }`: upstream keeps numbers in memory for a signal; there is nothing to set."""


class TelemetryKeys(Model):
    """`telemetry { }`."""

    unsupported: ClassVar[Mapping[str, object]] = {"DogStatsd": [], "M3": [], "Statsd": []}

    allowed_labels: list[str] | None = Field(default=None, alias="AllowedLabels")
    allowed_prefixes: list[str] = Field(default_factory=list, alias="AllowedPrefixes")
    blocked_labels: list[str] = Field(default_factory=list, alias="BlockedLabels")
    blocked_prefixes: list[str] = Field(default_factory=list, alias="BlockedPrefixes")
    hostname_label: bool = Field(default=True, alias="EnableHostnameLabel")
    trust_domain_label: bool = Field(default=False, alias="EnableTrustDomainLabel")
    in_mem: InMemKeys | None = Field(default=None, alias="InMem")
    prefix: Annotated[str, parsed(_prefix)] = Field(default="", alias="MetricPrefix")
    prometheus: PrometheusKeys | None = Field(default=None, alias="Prometheus")


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """How the exporter proves itself and whom it lets in.

    Attributes:
        files: certificate chain and key; None shows the host's own SVID.
        client_ca: whose certificates clients have to show.
        clients: SPIFFE IDs of which a client has to be one; empty lets everybody in.
    """

    files: tuple[Path, Path] | None
    client_ca: Path | None = None
    clients: frozenset[SpiffeId] = frozenset()


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """Where metrics can be read, and what is in them.

    Attributes:
        host, port: where the exporter listens; port 0 picks a free one.
        tls: None for plain HTTP.
        prefix: in place of the program's own, "" for that.
        hostname_label: put the label `host` on every series.
        trust_domain_label: put the label `trust_domain` on every series.
        allowed_labels: None keeps all of them.
    """

    host: str
    port: int
    tls: TlsSettings | None = None
    prefix: str = ""
    hostname_label: bool = True
    trust_domain_label: bool = False
    allowed_prefixes: tuple[str, ...] = ()
    blocked_prefixes: tuple[str, ...] = ()
    allowed_labels: frozenset[str] | None = None
    blocked_labels: frozenset[str] = frozenset()


def telemetry_settings(raw: TelemetryKeys | None) -> TelemetrySettings | None:
    """Return what was asked for, None when nobody can read metrics."""
    if raw is None or raw.prometheus is None:
        return None
    where = raw.prometheus
    return TelemetrySettings(
        host=where.host or _LOCAL_HOST,
        port=where.port,
        tls=None if where.tls is None else _tls_settings(where.tls),
        prefix=raw.prefix,
        hostname_label=raw.hostname_label,
        trust_domain_label=raw.trust_domain_label,
        allowed_prefixes=tuple(raw.allowed_prefixes),
        blocked_prefixes=tuple(raw.blocked_prefixes),
        allowed_labels=None if raw.allowed_labels is None else frozenset(raw.allowed_labels),
        blocked_labels=frozenset(raw.blocked_labels),
    )


def find_telemetry_faults(raw: TelemetryKeys | None) -> Iterator[ConfigFault]:
    """Return what does not fit together."""
    tls = None if raw is None or raw.prometheus is None else raw.prometheus.tls
    if tls is None:
        return
    if tls.use_spire_svid and (tls.cert_file or tls.key_file):
        line = tls.line("cert_file" if tls.cert_file else "key_file")
        yield ConfigFault(line, "cert_file and key_file do not go with use_spire_svid")
    if not tls.use_spire_svid and not (tls.cert_file and tls.key_file):
        yield ConfigFault(tls.line(""), "set cert_file and key_file, or use_spire_svid")
    if tls.authorized_spiffe_ids and tls.client_ca_file:
        line = tls.line("client_ca_file")
        yield ConfigFault(line, "client_ca_file does not go with authorized_spiffe_ids")


def telemetry_notices(raw: TelemetryKeys | None) -> Iterator[str]:
    """Return what the operator should hear at start."""
    if raw is None:
        return
    if raw.in_mem is not None:
        yield "telemetry.InMem has no effect: metrics can be read with Prometheus"
    where = raw.prometheus
    if where is not None and not _is_local(where.host) and where.tls is None:
        yield (
            f"metrics can be read by everybody who reaches {where.host}:{where.port}; "
            "set telemetry.Prometheus.tls, or leave host out for loopback alone"
        )


def _tls_settings(raw: TlsKeys) -> TlsSettings:
    return TlsSettings(
        files=None if raw.use_spire_svid else (Path(raw.cert_file), Path(raw.key_file)),
        client_ca=Path(raw.client_ca_file) if raw.client_ca_file else None,
        clients=frozenset(raw.authorized_spiffe_ids),
    )


def _is_local(host: str) -> bool:
    if host in {"", _LOCAL_HOST}:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""`telemetry { }`: upstream's keys, and what does not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from spire_hw.config.hcl import parse
from spire_hw.config.schema import check
from spire_hw.spiffeid import SpiffeId
from spire_hw.telemetry.config import (
    TelemetryKeys,
    TelemetrySettings,
    TlsSettings,
    find_telemetry_faults,
    telemetry_notices,
    telemetry_settings,
)

_BOTH = 'use_spire_svid = true client_ca_file = "c" authorized_spiffe_ids = ["spiffe://a/b"]'


def read(text: str) -> tuple[TelemetryKeys | None, list[str]]:
    raw, faults = check(parse(text, "x.conf"), TelemetryKeys)
    return raw, [f.message for f in (*faults, *find_telemetry_faults(raw))]


def settings(text: str) -> TelemetrySettings | None:
    raw, faults = read(text)
    assert faults == []
    return telemetry_settings(raw)


def test_upstreams_sample_without_other_collectors_is_taken() -> None:
    found = settings(
        """
        Prometheus {
          host = "127.0.0.1"
          port = 9988
        }
        InMem {}
        MetricPrefix = "mine"
        EnableTrustDomainLabel = true
        EnableHostnameLabel = false
        AllowedLabels = ["a"]
        BlockedLabels = []
        AllowedPrefixes = ["mine.rpc"]
        BlockedPrefixes = ["mine"]
        """
    )
    assert found == TelemetrySettings(
        host="127.0.0.1",
        port=9988,
        prefix="mine",
        hostname_label=False,
        trust_domain_label=True,
        allowed_prefixes=("mine.rpc",),
        blocked_prefixes=("mine",),
        allowed_labels=frozenset({"a"}),
    )


def test_loopback_is_the_default_host() -> None:
    found = settings("Prometheus { port = 9988 }")
    assert found is not None
    assert (found.host, found.tls) == ("localhost", None)


@pytest.mark.parametrize("text", ["", "InMem {}", "Statsd = []"])
def test_without_prometheus_nothing_is_measured(text: str) -> None:
    assert settings(text) is None


def test_tls_of_all_kinds() -> None:
    found = settings('Prometheus { port = 1 tls { cert_file = "c" key_file = "k" } }')
    assert found is not None
    assert found.tls == TlsSettings((Path("c"), Path("k")))
    found = settings(
        'Prometheus { port = 1 tls { use_spire_svid = true authorized_spiffe_ids = ["spiffe://a/b"] } }'
    )
    assert found is not None
    assert found.tls == TlsSettings(None, None, frozenset({SpiffeId.parse("spiffe://a/b")}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Prometheus {}", '"port": is required'),
        ("Prometheus { port = 70000 }", "port"),
        ("Prometheus { port = 1 tls {} }", "set cert_file and key_file, or use_spire_svid"),
        ('Prometheus { port = 1 tls { cert_file = "c" } }', "set cert_file and key_file"),
        (
            'Prometheus { port = 1 tls { use_spire_svid = true key_file = "k" } }',
            "do not go with use_spire_svid",
        ),
        (
            f"Prometheus {{ port = 1 tls {{ {_BOTH} }} }}",
            "client_ca_file does not go with authorized_spiffe_ids",
        ),
        ('Prometheus { port = 1 tls { authorized_spiffe_ids = ["x"] } }', "authorized_spiffe_ids"),
        ('Statsd = [{ address = "x:1" }]', "not supported by this release"),
        ('DogStatsd = [{ address = "x:1" }]', "not supported by this release"),
        ('M3 = [{ address = "x:1" env = "y" }]', "not supported by this release"),
        ('MetricPrefix = "a b"', "takes letters"),
        ("Promtheus { port = 1 }", 'did you mean "Prometheus"?'),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    _, faults = read(text)
    assert any(words in message for message in faults), faults


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('Prometheus { port = 1 host = "0.0.0.0" }', "everybody who reaches 0.0.0.0:1"),
        ('Prometheus { port = 1 host = "node-1" }', "everybody who reaches node-1:1"),
        ("InMem {}", "InMem has no effect"),
    ],
)
def test_what_is_odd_is_noticed(text: str, words: str) -> None:
    raw, _ = read(text)
    assert any(words in notice for notice in telemetry_notices(raw))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Prometheus { port = 1 }",
        'Prometheus { port = 1 host = "::1" }',
        'Prometheus { port = 1 host = "0.0.0.0" tls { use_spire_svid = true } }',
    ],
)
def test_what_is_not_odd_is_not_noticed(text: str) -> None:
    raw, _ = read(text)
    assert list(telemetry_notices(raw)) == []

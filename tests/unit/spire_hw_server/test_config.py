from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from spire_hw.config.hcl import parse
from spire_hw.errors import ConfigError
from spire_hw.key import KeyType
from spire_hw.log import Format, Level
from spire_hw.posture.verdict import Action
from spire_hw.spiffeid import SpiffeId
from spire_hw.syslog import SyslogSettings
from spire_hw_server.config import ServerSettings, build_settings, load_settings
from spire_hw_server.postureconfig import WebhookSettings

SAMPLE = Path(__file__).parents[3] / "server" / "server.conf"
PLUGINS = 'plugins { DataStore "sql" { plugin_data { a = 1 } } KeyManager "disk" {} }'


def settings(keys: str = "", rest: str = "") -> ServerSettings:
    text = f'server {{\ntrust_domain = "example.org"\ndata_dir = "d"\n{keys}\n}}\n{PLUGINS}\n{rest}'
    return build_settings(parse(text, "s.conf"))


def refused(keys: str = "", rest: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        settings(keys, rest)
    return caught.value.message


def test_the_sample_is_good() -> None:
    made = load_settings(SAMPLE)
    assert made.trust_domain.name == "example.org"
    assert [p.name for p in made.plugins] == ["pkcs11", "tpm", "join_token"]
    assert made.notices == ()


def test_defaults_are_those_of_upstream() -> None:
    made = settings()
    assert (made.bind_address, made.bind_port) == ("0.0.0.0", 8081)  # noqa: S104
    assert made.socket_path == Path("/tmp/spire-server/private/api.sock")  # noqa: S108
    assert made.ca_ttl == timedelta(hours=24)
    assert made.x509_svid_ttl == made.agent_ttl == timedelta(hours=1)
    assert made.jwt_svid_ttl == timedelta(minutes=5)
    assert made.ca_key_type is made.jwt_key_type is KeyType.EC_P256
    assert (made.ca_subject.country, made.ca_subject.organization) == (("US",), ("SPIFFE",))
    assert (made.log.level, made.log.format, made.log.file) == (Level.INFO, Format.TEXT, None)
    assert made.ratelimit_attestation
    assert made.ratelimit_signing
    assert made.health is None


def test_values_are_parsed() -> None:
    made = settings(
        """admin_ids = ["spiffe://other.org/ops"]
        ca_key_type = "rsa-4096"
        default_x509_svid_ttl = "2h"
        ca_subject { common_name = "x" }
        log_level = "DEBUG" log_format = "json" log_file = "/x/y"
        ratelimit { signing = false }
        jwt_issuer = "https://issuer"
        prune_attested_nodes_expired_for = "720h"
        experimental { cache_reload_interval = "1s" }
        """,
        'health_checks { listener_enabled = true bind_port = "8080" }',
    )
    assert made.admin_ids == {SpiffeId.parse("spiffe://other.org/ops")}
    assert made.ca_key_type is made.jwt_key_type is KeyType.RSA_4096
    assert made.agent_ttl == timedelta(hours=2)
    assert (made.ca_subject.country, made.ca_subject.common_name) == ((), "x")
    assert (made.log.level, made.log.format) == (Level.DEBUG, Format.JSON)
    assert not made.ratelimit_signing
    assert made.prune_attested_nodes_expired_for == timedelta(days=30)
    assert made.cache_reload_interval == timedelta(seconds=1)
    assert made.health is not None
    assert (made.health.bind_port, made.health.live_path) == (8080, "/live")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "s.conf"
    file.write_text(f'server {{ trust_domain = "$TD" data_dir = "d" bind_port = 1 }}\n{PLUGINS}')
    made = load_settings(
        file,
        expand_env=True,
        environ={"TD": "expanded.org"},
        overrides={"bind_port": "2", "log_source_location": True},
    )
    assert (made.trust_domain.name, made.bind_port) == ("expanded.org", 2)
    assert made.log.source_location
    with pytest.raises(ConfigError, match="bind_port"):
        load_settings(file, overrides={"bind_port": "x", "trust_domain": "a.b"})


def test_all_faults_come_at_once() -> None:
    text = """server {
  trust_domain = "UPPER"
  bind_address = "localhost"
  ca_key_type = "rsa-1024"
  ca_ttl = "0s"
  admin_ids = ["x"]
  socket_path = "%s"
  frobnicate = 1
  ratelimit { atestation = true }
}
plugins { KeyManager "a" {} KeyManager "b" {} DataStore "postgres" {} }
"""
    with pytest.raises(ConfigError) as caught:
        build_settings(parse(text % ("x" * 200), "s.conf"))
    lines = [f.line for f in caught.value.faults]
    assert lines == sorted(lines)
    assert set(lines) == {1, 2, 3, 4, 5, 6, 7, 8, 9, 11}
    assert sum(line == 11 for line in lines) == 2
    assert 'did you mean "attestation"' in caught.value.message
    assert "data_dir" in caught.value.message


@pytest.mark.parametrize(
    ("keys", "rest"),
    [
        ("federation { bundle_endpoint { port = 1 } }", ""),
        ("profiling_enabled = true", ""),
        ('experimental { auth_opa_policy_engine { local { rego_path = "x" } } }', ""),
        ("experimental { require_pq_kem = true }", ""),
        ('max_attested_node_info_staleness = "1m"', ""),
        ("", 'telemetry { Statsd = [{ address = "x:1" }] }'),
    ],
)
def test_keys_not_supported_yet_are_refused_by_name(keys: str, rest: str) -> None:
    assert "is not supported by this release yet" in refused(keys, rest)


@pytest.mark.parametrize(
    ("keys", "rest"),
    [("profiling_enabled = false", ""), ("federation {}", ""), ("", "telemetry {}")],
)
def test_those_that_ask_for_nothing_pass(keys: str, rest: str) -> None:
    settings(keys, rest)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        build_settings(parse("", "s.conf"))
    assert '"server": is required' in caught.value.message
    assert '"plugins": is required' in caught.value.message
    assert len(caught.value.faults) == 2


def test_ttls_that_the_ca_cannot_guarantee_are_noticed() -> None:
    (notice,) = settings('agent_ttl = "12h"').notices
    assert notice == (
        "agent_ttl 12h0m0s is longer than what ca_ttl 24h0m0s can guarantee: "
        "set agent_ttl to 4h0m0s or less, or ca_ttl to 72h0m0s or more"
    )
    assert settings('agent_ttl = "12h" ca_ttl = "72h"').notices == ()


def test_unknown_experimental_keys_are_noticed() -> None:
    assert settings("experimental { brand_new = 1 }").notices == (
        "experimental.brand_new is unknown and ignored",
    )


def test_reload_intervals_must_fit() -> None:
    keys = 'experimental { cache_reload_interval = "2h" full_cache_reload_interval = "1h" }'
    assert "must be longer" in refused(keys)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_settings(tmp_path / "bytes")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path)


def test_secrets_of_plugins_stay_out_of_the_repr() -> None:
    text = 'server { trust_domain = "a.b" data_dir = "d" } plugins { KeyManager "x" {} DataStore "sql" {'
    made = build_settings(parse(text + 'plugin_data { connection_string = "password=hush" } } }'))
    assert "hush" not in repr(made)


def test_without_a_posture_block_its_defaults_stand() -> None:
    made = settings().posture
    assert not made.given
    assert made.heartbeat_interval == timedelta(seconds=60)
    assert (made.stale_after, made.stale_action) == (3, Action.ACCEPT)
    assert made.min_boot_time == timedelta(seconds=8)
    assert made.evidence_retention == timedelta(days=90)
    assert (made.policy_dir, made.webhook, made.syslog, made.drift) == (None, None, None, {})


def test_posture_block_is_read() -> None:
    made = settings(
        rest="""posture {
            policy_dir = "/etc/policies"
            heartbeat_interval = "0s"
            stale_after = 5
            stale_action = "quarantine"
            min_boot_time = "1m"
            evidence_retention = "24h"
            drift { pcr_changed_without_reset = "quarantine" ima_rollback = "quarantine" }
            webhook { url = "https://hooks.test/node" secret_path = "/s" }
            syslog { address = "tcp://log.test" facility = "local3" }
        }"""
    ).posture
    assert made.given
    assert made.policy_dir == Path("/etc/policies")
    assert made.heartbeat_interval is None
    assert (made.stale_after, made.stale_action) == (5, Action.QUARANTINE)
    assert made.drift == {
        "pcr_changed_without_reset": Action.QUARANTINE,
        "ima_rollback": Action.QUARANTINE,
    }
    assert made.webhook == WebhookSettings("https://hooks.test/node", Path("/s"))
    assert made.syslog == SyslogSettings("tcp", "log.test", 601, facility=19)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('heartbeat_interval = "500ms"', "heartbeat_interval"),
        ('heartbeat_interval = "25h"', "heartbeat_interval"),
        ("stale_after = 0", "stale_after"),
        ('stale_action = "ban"', "stale_action"),
        ('drift { pcr_mismach = "ban" }', "pcr_mismatch"),
        ('drift { pcr_mismatch = "banish" }', "banish"),
        ("drift { pcr_mismatch = 1 }", "pcr_mismatch"),
        ('drift { ima_rollback = "accept" }', "cannot be accepted"),
        ('webhook { url = "http://hooks.test/" }', "http://"),
        ('webhook { url = "https://u:p@hooks.test/" }', "secret_path"),
        ('webhook { url = "https:///x" }', "https://host"),
        ("webhook { }", "url"),
        ('syslog { address = "unix://dev/log" }', "unix:///path"),
        ('syslog { address = "udp://host:99999" }', "udp://host"),
        ('syslog { address = "udp://host" facility = "mail" }', "facility"),
        ("heartbeats = 3", "heartbeats"),
    ],
)
def test_faults_of_the_posture_block_are_named(keys: str, said: str) -> None:
    assert said in refused(rest=f"posture {{ {keys} }}")
